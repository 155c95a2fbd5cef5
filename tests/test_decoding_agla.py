"""AGLA: the matcher against a plain forward, the mask against loops, and generation against plain loops."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_oracle import full_maps
from conftest import build, every_family
from test_branches import PLACEHOLDERS, next_logits
from test_decoding_vcd import forbid
from test_promises import ROWS, snapshot
from tiny import Picture, Vlm
from torch import Tensor
from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval

import vlmfast
from vlmfast import matching
from vlmfast.adapters import from_spec, support, to_spec
from vlmfast.adapters.decoding.agla import AGLA, Reader, image_of, patches_of, question_of
from vlmfast.adapters.pruning.base import Pruner
from vlmfast.eval.models import load_model
from vlmfast.eval.planning import named
from vlmfast.matching import Matcher, caption, gradcam, kept_pixels, share, smooth
from vlmfast.solving import cost_of, nominal

ALPHA, BETA, LAYER, SIDE = 1.5, 0.02, 1, 32  # the last layer tells of the first token alone
WORDS = ["is", "there", "a", "red", "dog", "in", "the", "picture", "?", "what", "colour", "one"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny matcher with three text layers."""
    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz0123456789"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    text = {"vocab_size": len(words) + 2, "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
    text |= {"bos_token_id": len(words), "eos_token_id": 3, "sep_token_id": 3, "projection_dim": 16}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": SIDE, "patch_size": 8}
    torch.manual_seed(3)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16, image_text_hidden_size=16)
    model = BlipForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 2.5 / parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor for the tiny models, whose text depends on the ids."""

    def decode(ids: Tensor, skip_special_tokens: bool) -> str:
        return " ".join(WORDS[token % len(WORDS)] for token in ids.tolist()) + "\nassistant\n"

    pictures = SimpleNamespace(image_mean=list(MEAN), image_std=list(STD))
    fake = SimpleNamespace(tokenizer=SimpleNamespace(decode=decode), image_processor=pictures)
    monkeypatch.setattr(Reader, "_processor", lambda self: fake)


def spec(blip: Path, **more: Any) -> str:
    settings = {"alpha": ALPHA, "beta": BETA, "matcher": blip, "layer": LAYER} | more
    return "agla:" + ",".join(f"{name}={value}" for name, value in settings.items())


# --- the matcher ------------------------------------------------------------------------------------------------


def test_captions():
    assert caption('Is there a "Dog"?  (RED)') == "is there a dog ? red"
    assert caption("A. B!  c:d") == "a b c d"
    assert caption(" ".join(["x"] * 60)) == " ".join(["x"] * 50)
    assert question_of("\nIs it red? ASSISTANT:") == "Is it red?"
    assert question_of("Is it red?\nassistant\n") == "Is it red?"
    assert question_of("Is this a model?") == "Is this a model?"


def test_gradcam_in_plain_loops():
    generator = torch.Generator().manual_seed(1)
    attention, gradient = torch.rand(3, 6, 10, generator=generator), torch.randn(3, 6, 10, generator=generator)
    real = torch.tensor([1, 1, 1, 1, 1, 0])
    expected = torch.zeros(3, 3)
    for place in range(9):
        total = 0.0
        for word in (1, 2, 3):  # neither [ENC], nor [SEP], nor padding
            for head in range(3):
                total += float(attention[head, word, 1 + place]) * max(0.0, float(gradient[head, word, 1 + place]))
        expected[place // 3, place % 3] = total / 3 / 3
    torch.testing.assert_close(gradcam(attention, gradient, real), expected)


def test_smoothing_is_that_of_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    cam = torch.rand(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = ((cam - cam.min()) / (cam.max() - cam.min())).numpy()
    grown = ndimage.zoom(values, 16, order=3, mode="grid-constant", grid_mode=True).clip(0, 1)
    blurred = ndimage.gaussian_filter(grown, 0.02 * 96)
    blurred = (blurred - blurred.min()) / (blurred.max() - blurred.min())
    torch.testing.assert_close(smooth(cam, 96), torch.from_numpy(blurred), rtol=1e-6, atol=1e-6)
    assert kept_pixels(smooth(torch.full((4, 4), 0.3), 32), 0.5).all(), "where all is the same all stays"


def test_which_pixels_stay():
    heat = torch.rand(16, 16, generator=torch.Generator().manual_seed(3))
    assert share(0.5) == 0.75 and share(-0.2) == matching.MOST
    kept = kept_pixels(heat, 0.75)
    assert int(kept.sum()) == 193 and heat[kept].min() > heat[~kept].max()
    assert kept_pixels(heat, share(-1)).all()


def heat_by_hand(folder: Path, image: Tensor, text: str) -> tuple[Tensor, float]:
    """The matcher as transformers has it, with everything kept that it attends."""
    model = BlipForImageTextRetrieval.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = BertTokenizer.from_pretrained(folder)
    size = (SIDE, SIDE)
    pixels = torch.nn.functional.interpolate(image[None], size, mode="bicubic", antialias=True).clamp(0, 1)
    for channel in range(3):
        pixels[:, channel] = (pixels[:, channel] - matching.MEAN[channel]) / matching.STD[channel]
    found = tokenizer(caption(text), return_tensors="pt")
    ids = found["input_ids"].clone()
    ids[0, 0] = model.config.text_config.vocab_size - 1
    kept = {}

    def keep(module, args, output):
        output[1].retain_grad()
        kept["attention"] = output[1]

    model.text_encoder.encoder.layer[LAYER].crossattention.self.register_forward_hook(keep)
    model(ids, pixels, attention_mask=found["attention_mask"]).itm_score[0, 1].backward()
    real = found["attention_mask"][0]
    alike = model(found["input_ids"], pixels, attention_mask=found["attention_mask"], use_itm_head=False)
    return gradcam(kept["attention"][0].detach(), kept["attention"].grad[0], real), float(alike.itm_score)


@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference"])
def test_the_matcher(blip, mode):
    """Gradients are there also where `generate` has turned them off."""
    matcher = Matcher(str(blip), LAYER, torch.device("cpu"))
    image = torch.rand(3, 40, 28, generator=torch.Generator().manual_seed(4))
    expected, alike = heat_by_hand(blip, image, "Is there a red dog?")
    around = {"plain": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]
    with around():
        cam, found = matcher.heat(image, "Is there a red dog?")
        keep = matcher.keep(image, "Is there a red dog?")
    assert expected.max() > 0
    torch.testing.assert_close(cam, expected, rtol=1e-4, atol=1e-7)
    assert abs(found - alike) < 1e-5
    assert torch.equal(keep, kept_pixels(smooth(expected, SIDE), share(alike))) and 0.3 < keep.float().mean() < 1
    assert not torch.allclose(matcher.heat(image, "what colour is the picture")[0], cam)
    assert all(parameter.grad is None for parameter in matcher.model.parameters())


def test_images_from_patches():
    """As the Qwen-VL processors lay them: blocks of merge x merge, every frame twice."""
    image = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(5))
    rows = []
    for block_row in range(2):
        for block_column in range(3):
            for i in range(2):
                for j in range(2):
                    top, left = 4 * (2 * block_row + i), 4 * (2 * block_column + j)
                    patch = image[:, top : top + 4, left : left + 4]
                    rows.append(torch.stack([patch, patch], dim=1).flatten())
    patches = torch.stack(rows)
    assert torch.equal(image_of(patches, (1, 4, 6), 2, 2), image)
    assert torch.equal(patches_of(image, (1, 4, 6), 2, 2), patches)


# --- whole models -----------------------------------------------------------------------------------------------


def masked(matcher: Matcher, vlm: Any, letter: str, question: str) -> Picture:
    """One picture, black where the question is not about it."""
    picture = vlm.picture(letter)
    pixels, packed = picture.inputs["pixel_values"], "image_grid_thw" in picture.inputs
    if packed:
        grid = tuple(picture.inputs["image_grid_thw"][0].tolist())
        image = image_of(pixels, grid, 2, 2)
    elif "image_sizes" in picture.inputs:
        height, width = picture.inputs["image_sizes"][0].tolist()
        image = pixels[0, :, :height, :width]
    else:
        image = pixels[0]
    raw = torch.stack([(image[c] * STD[c] + MEAN[c]).clamp(0, 1) for c in range(3)])
    cam, alike = matcher.heat(raw, question)
    keep = kept_pixels(smooth(cam, SIDE), share(alike))
    local = image.clone()
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            if not keep[int((y + 0.5) * SIDE / image.shape[1]), int((x + 0.5) * SIDE / image.shape[2])]:
                for channel in range(3):
                    local[channel, y, x] = -MEAN[channel] / STD[channel]
    if packed:
        changed = patches_of(local, grid, 2, 2)
    else:
        changed = pixels.clone()
        changed[0, :, : local.shape[1], : local.shape[2]] = local
    return Picture({**picture.inputs, "pixel_values": changed}, picture.ids, picture.types)


def local(matcher: Matcher, vlm: Any, rows: list[list[Any]], number: int) -> dict[str, Tensor]:
    """A row's prompt with masked pictures."""
    inputs = vlm.prompts(rows, only=number)
    ids = inputs["input_ids"][0].tolist()
    behind = ids[len(ids) - ids[::-1].index(90) :]
    question = " ".join(WORDS[token % len(WORDS)] for token in behind)
    letters = [part for part in rows[number] if isinstance(part, str)]
    changed = {letter: masked(matcher, vlm, letter, question) for letter in letters}
    return Vlm(vlm.name, vlm.model, vlm.tiny, changed).prompts(rows, only=number)


def joined(vlm: Any, rows: list[list[Any]], number: int, other: dict[str, Tensor], count: int) -> list[int]:
    alone, tokens = vlm.prompts(rows, only=number), []
    for _ in range(count):
        own, branch = forbid(next_logits(vlm.model, alone, tokens)), next_logits(vlm.model, other, tokens)
        scores = [
            z + ALPHA * y if z >= math.log(BETA) + float(own.max()) else -math.inf
            for z, y in zip(own.tolist(), branch.tolist())
        ]
        tokens.append(max(range(len(scores)), key=scores.__getitem__))
    return tokens


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "mistral3", "gemma3", "internvl"])
def test_greedy_equals_plain_loops(family, blip, reading):
    """Two caches: every token comes from both branches. `official`: the first one alone."""
    vlm, rows, count = build(family), [*ROWS[:2], [4]], 4
    inputs = vlm.prompts(rows)
    plain = vlm.model.generate(**inputs, max_new_tokens=count, do_sample=False)[:, -count:]
    before = snapshot(vlm.model)
    with vlmfast.patch(vlm.model, spec(blip)) as handle:
        found = vlm.model.generate(**inputs, max_new_tokens=count, do_sample=False)[:, -count:]
        assert any("agla: generated tokens are joined" in note for note in handle.report().notes)
    with vlmfast.patch(vlm.model, spec(blip, parity="official")):
        official = vlm.model.generate(**inputs, max_new_tokens=count, do_sample=False)[:, -count:]
    assert snapshot(vlm.model) == before
    assert torch.equal(found[2], plain[2])
    matcher = Matcher(str(blip), LAYER, torch.device("cpu"))
    for row in range(2):
        other = local(matcher, vlm, rows, row)
        assert found[row].tolist() == joined(vlm, rows, row, other, count)
        assert official[row, 0] == found[row, 0]
        tokens = official[row, :1].tolist()
        for _ in range(count - 1):  # z + alpha z
            tokens.append(int(forbid(next_logits(vlm.model, vlm.prompts(rows, only=row), tokens)).argmax()))
        assert official[row].tolist() == tokens


def test_the_second_prompt_is_another(vlm, blip, reading):
    """Scores differ from plain ones by more than a factor, and in ways that beams, samples and batches keep to."""
    inputs = vlm.prompts(ROWS)
    how = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    plain = vlm.model.generate(**inputs, **how).scores[0][:2].log_softmax(-1)
    with vlmfast.patch(vlm.model, spec(blip, beta=0)):
        found = vlm.model.generate(**inputs, **how).scores[0][:2]
        beams = vlm.model.generate(**inputs, max_new_tokens=3, num_beams=3, do_sample=False)
        assert torch.equal(beams, vlm.model.generate(**inputs, max_new_tokens=3, num_beams=3, do_sample=False))
    scaled = ((1 + ALPHA) * plain).log_softmax(-1)
    seen = scaled.isfinite()
    assert (found[seen] - scaled[seen]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["testbed:llava", "testbed:qwen2_5_vl"])
def test_a_model_with_its_own_processor(name, blip):
    """The question and the picture are read back from what the model gets."""
    import numpy as np
    from PIL import Image

    model, processor = load_model(name)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 120, 3), dtype=np.uint8))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what colour is the note ?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )
    seen: list[tuple[Tensor, str]] = []
    with vlmfast.patch(model, spec(blip)):
        keep = Matcher.keep

        def look(self, image, text):
            seen.append((image, text))
            return keep(self, image, text)

        with pytest.MonkeyPatch.context() as patching:
            patching.setattr(Matcher, "keep", look)
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
    ((image, text),) = seen
    assert text.lower().replace(" ", "") == "whatcolouristhenote?"
    original = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    assert image.shape == original.shape and (image - original).abs().max() < 0.02


def test_a_question_in_front_of_the_picture(vlm, blip, monkeypatch):
    """Behind it there is what the template puts there, and no words: all text is the question then."""
    texts = []
    monkeypatch.setattr(Matcher, "keep", lambda self, image, text: texts.append(text) or torch.ones(SIDE, SIDE) > 0)
    decode = lambda ids, skip_special_tokens: ".." if len(ids) == 1 else WORDS[len(ids) % len(WORDS)]  # noqa: E731
    pictures = SimpleNamespace(image_mean=list(MEAN), image_std=list(STD))
    fake = SimpleNamespace(tokenizer=SimpleNamespace(decode=decode), image_processor=pictures)
    monkeypatch.setattr(Reader, "_processor", lambda self: fake)
    with vlmfast.patch(vlm.model, spec(blip)):
        vlm.model.generate(**vlm.prompts([[5, "a", 1], [3, "b", 4]]), max_new_tokens=1)
        assert texts == [WORDS[6], WORDS[4]]
        with pytest.raises(ValueError, match="no words"):
            vlm.model.generate(**vlm.prompts([["a", 1]]), max_new_tokens=1)


def test_neutral_and_specs(vlm, blip):
    with vlmfast.patch(vlm.model, "none"):
        bare = snapshot(vlm.model)
    with vlmfast.patch(vlm.model, "agla:alpha=0,beta=0"):
        assert snapshot(vlm.model) == bare
    assert to_spec(from_spec(spec(blip))) == spec(blip)
    assert to_spec(from_spec("agla")) == "agla"
    assert "agla" not in named(["all"], "llava"), "it needs another model"


@pytest.mark.parametrize(
    "settings", [{"alpha": -1}, {"beta": 2}, {"matcher": 3}, {"layer": -1}, {"layer": 1.5}, {"parity": "x"}]
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AGLA(**settings)


def test_what_cannot_work_is_said(vlm, blip, tmp_path, reading):
    before = snapshot(vlm.model)
    with pytest.raises(ValueError, match="there is no such folder"):
        vlmfast.patch(vlm.model, "agla:matcher=/no/such/folder")
    with pytest.raises(ValueError, match="no model"):
        vlmfast.patch(vlm.model, f"agla:matcher={tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="a clip model"):
        vlmfast.patch(vlm.model, f"agla:matcher={tmp_path}")
    assert snapshot(vlm.model) == before
    inputs = vlm.prompts(ROWS)
    with vlmfast.patch(vlm.model, spec(blip, layer=3)), pytest.raises(ValueError, match="layers 0 to 2"):
        vlm.model.generate(**inputs, max_new_tokens=2)
    assert snapshot(vlm.model) == before


def test_a_model_without_a_processor(vlm, blip):
    with vlmfast.patch(vlm.model, spec(blip)), pytest.raises(ValueError, match="not loaded with from_pretrained"):
        vlm.model.generate(**vlm.prompts(ROWS), max_new_tokens=2)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "idefics3", "smolvlm"])
def test_families_that_cut_their_pictures(family, blip):
    vlm = build(family)
    before = snapshot(vlm.model)
    with pytest.raises(NotImplementedError, match="agla:matcher=self"):
        vlmfast.patch(vlm.model, spec(blip))
    assert snapshot(vlm.model) == before and support("agla", family).needs == {"matcher": "self"}


def test_videos(blip, reading):
    vlm = build("qwen3_vl")
    with vlmfast.patch(vlm.model, spec(blip)), pytest.raises(NotImplementedError, match="does not work on videos"):
        vlm.model.generate(**vlm.prompts([[3, "A", 2]]), max_new_tokens=2)
    with vlmfast.patch(vlm.model, "agla:matcher=self"):
        vlm.model.generate(**vlm.prompts([[3, "A", 2]]), max_new_tokens=2)


# --- the model's own attention ----------------------------------------------------------------------------------


def attended(vlm: Any, rows: list[list[Any]], number: int, layer: int) -> list[Tensor]:
    """What the last token of a prompt attends to in each of its pictures, mean over heads, from the full map."""
    inputs = vlm.prompts(rows, only=number)
    maps: dict[int, Tensor] = {}

    def see(at: int, shown: Tensor, hidden: Tensor) -> Tensor:
        maps[at] = shown
        return shown

    with full_maps(vlm.model, see), torch.no_grad():
        vlm.model(**inputs)
    row = maps[layer][0, :, -1].mean(0)
    seen = row[torch.isin(inputs["input_ids"][0], torch.tensor(PLACEHOLDERS))]
    spans = [
        len([i for i in vlm.picture(part).ids if i in PLACEHOLDERS]) for part in rows[number] if part in vlm.cache
    ]
    return list(seen.split(spans))


class Chosen(Pruner):
    """Keeps what a test says, picture by picture."""

    name = "chosen"
    kept: list[Tensor] = []  # noqa: RUF012

    def select(self, visual: Any) -> Tensor:
        return self.kept.pop(0)


@pytest.mark.parametrize("family, layer", [("llava", 1), ("qwen2_5_vl", 1), ("qwen3_vl", 2), ("mistral3", 1)])
def test_the_models_own_attention(family, layer):
    """The second prompt is the one that a pruner would leave which keeps the most attended tokens."""
    vlm, rows, count = build(family), ROWS, 4
    inputs, how = vlm.prompts(rows), {"max_new_tokens": count, "do_sample": False}
    plain, before = vlm.model.generate(**inputs, **how), snapshot(vlm.model)
    with vlmfast.patch(vlm.model, f"agla:alpha={ALPHA},beta={BETA},matcher=self,part=0.25") as handle:
        found = vlm.model.generate(**inputs, **how)
        beams = vlm.model.generate(**inputs, max_new_tokens=count, do_sample=False, num_beams=2)
        again = vlm.model.generate(**inputs, **how)
        chunks = vlm.model.generate(**vlm.prompts(rows, only=0), **how, prefill_chunk_size=5)
        assert any("not the paper's" in note for note in handle.report().notes)
    assert snapshot(vlm.model) == before and torch.equal(found, again) and len(beams) == len(found)
    assert torch.equal(found[2], plain[2]) and not torch.equal(found[:2], plain[:2])
    for number in range(2):
        seen = attended(vlm, rows, number, layer)
        kept = [one.argsort(descending=True)[: max(1, round(len(one) / 4))] for one in seen]
        alone, tokens = vlm.prompts(rows, only=number), []
        for _ in range(count):
            own = forbid(next_logits(vlm.model, alone, tokens))
            Chosen.kept = [one.sort().values for one in kept]
            with vlmfast.patch(vlm.model, Chosen(keep=0.25)):
                branch = next_logits(vlm.model, alone, tokens)
            scores = own + ALPHA * branch
            scores[own < math.log(BETA) + own.max()] = -math.inf
            tokens.append(int(scores.argmax()))
        assert found[number, -count:].tolist() == tokens
        if number == 0:
            assert chunks[0, -count:].tolist() == tokens


@pytest.mark.parametrize("family", every_family())
def test_the_models_own_attention_on_every_family(family):
    """Rows of a batch as if alone; all tokens are the prompt itself."""
    vlm = build(family)
    inputs, how = vlm.prompts(ROWS), {"max_new_tokens": 3, "do_sample": False}
    scores = {"output_scores": True, "return_dict_in_generate": True}
    plain = vlm.model.generate(**inputs, **how, **scores).scores[0]
    with vlmfast.patch(vlm.model, "agla:alpha=1,beta=0,matcher=self,part=0.3"):
        found = vlm.model.generate(**inputs, **how, **scores)
        for row in range(3):
            alone = vlm.model.generate(**vlm.prompts(ROWS, only=row), **how)
            assert torch.equal(alone[0, -3:], found.sequences[row, -3:])
    twice = (2 * plain[:2]).log_softmax(-1)
    seen = twice.isfinite()
    assert (found.scores[0][:2][seen] - twice[seen]).abs().max() > 0.05
    with vlmfast.patch(vlm.model, "agla:alpha=1,beta=0,matcher=self,part=1.0"):
        whole = vlm.model.generate(**inputs, **how, **scores).scores[0][:2]
    torch.testing.assert_close(whole[seen], twice[seen], rtol=1e-3, atol=1e-3)


def test_own_attention_in_a_further_turn(vlm):
    """The first picture stays as it was seen in its own turn."""
    inputs, how = vlm.prompts([[3, "a", 4]]), {"max_new_tokens": 3, "do_sample": False}
    with vlmfast.patch(vlm.model, "agla:matcher=self,part=0.3,beta=0.01"):
        first = vlm.model.generate(**inputs, **how, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6]])], dim=1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        second = vlm.model.generate(**given, **how, past_key_values=first.past_key_values)
    assert second.shape[1] == ids.shape[1] + 3


def test_own_attention_is_not_for_pruned_prompts(vlm):
    before = snapshot(vlm.model)
    for other in ("hiprune:keep=0.5", "fastv:keep=0.5,layer=1"):
        with pytest.raises(NotImplementedError, match="choose one"):
            vlmfast.patch(vlm.model, f"{other}+agla:matcher=self")
    with pytest.raises(ValueError, match="chooses the second prompt's tokens already"):
        AGLA(matcher="self", branch="hiprune/keep=0.3")
    with pytest.raises(ValueError, match="part"):
        AGLA(matcher="self", part=0)
    assert snapshot(vlm.model) == before


def test_a_pruned_branch(vlm, blip, reading):
    """The masked picture is cut before it enters the language model."""
    inputs, how = vlm.prompts([[3, "a", 4]]), {"max_new_tokens": 4, "do_sample": False}
    matcher = Matcher(str(blip), LAYER, torch.device("cpu"))
    other = local(matcher, vlm, [[3, "a", 4]], 0)
    alone, tokens = vlm.prompts([[3, "a", 4]], only=0), []
    for _ in range(4):
        own = forbid(next_logits(vlm.model, alone, tokens))
        with vlmfast.patch(vlm.model, "divprune:keep=0.3"):
            branch = next_logits(vlm.model, other, tokens)
        scores = (own + ALPHA * branch).masked_fill(own < math.log(BETA) + own.max(), -math.inf)
        tokens.append(int(scores.argmax()))
    with vlmfast.patch(vlm.model, spec(blip, branch="divprune/keep=0.3")):
        assert vlm.model.generate(**inputs, **how)[0, -4:].tolist() == tokens


def test_what_it_costs(vlm):
    """Both ways, until the first token; the matcher itself is left out."""
    config = vlm.model.config
    picture = nominal(config)
    plain = cost_of(config, (), 20, [picture])
    everything = plain.total_prefill
    assert cost_of(config, from_spec("agla"), 20, [picture]).selection == everything
    part = cost_of(config, from_spec("agla:matcher=self,part=0.25"), 20, [picture]).selection
    assert plain.head < part < plain.prefill + plain.head
    assert cost_of(config, from_spec("agla:alpha=0,beta=0"), 20, [picture]).selection == 0
