"""VCD and M3ID: against plain loops on unpatched models, which read everything from its beginning at every step."""

from __future__ import annotations

import copy
import itertools
import math
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import CORE, build, crossed, every_family, some_families
from test_branches import PLACEHOLDERS, WAYS, Words, longer, next_logits, text_alone
from test_promises import ROWS, snapshot
from tiny import Picture, Vlm
from torch import Tensor
from transformers import LogitsProcessor

import vlmfast
from vlmfast.adapters import from_spec, to_spec
from vlmfast.adapters.decoding.m3id import M3ID
from vlmfast.adapters.decoding.vcd import VCD, noise_of, noisy, shares
from vlmfast.encoding import encode_images, encoder_outputs
from vlmfast.solving import cost_of, nominal
from vlmfast.visual import VisualTokens

ALPHA, BETA, STEPS, SEED = 1.5, 0.02, 900, 3
SPEC = f"vcd:alpha={ALPHA},beta={BETA},steps={STEPS},seed={SEED}"
RATE = 0.4
FADING = f"m3id:rate={RATE},beta={BETA}"
VIDEO_ROWS = [[3, "A", 2], [2, "b", 1, "B", 4], [4]]


# --- the equations, a value at a time ----------------------------------------------------------------------------


def drawn(pixels: Tensor, frames: int = 1) -> Tensor:
    """A noisy picture by hand. pixels: [...] or patches [n, 3 * frames * p * p] that show one image `frames` times"""
    left = 1.0
    for i in range(STEPS + 1):
        left *= 1 - (1 / (1 + math.exp(-(-6 + 12 * i / 999))) * (5e-3 - 1e-5) + 1e-5)
    raw = pixels.contiguous().numpy().tobytes()
    eps = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(zlib.crc32(raw, SEED)))
    if frames > 1:
        parts = eps.view(len(eps), 3, frames, -1).clone()
        for frame in range(1, frames):
            parts[:, :, frame] = parts[:, :, 0]
        eps = parts.view(pixels.shape)
    return math.sqrt(left) * pixels + math.sqrt(1 - left) * eps


def masked(scores: list[float], own: list[float], beta: float) -> list[float]:
    most = max(own)
    return [-math.inf if z < math.log(beta) + most or z == -math.inf else f for f, z in zip(scores, own)]


def vcd_by_hand(own: Tensor, other: Tensor) -> list[float]:
    scores = [(1 + ALPHA) * z - ALPHA * y for z, y in zip(own.tolist(), other.tolist())]
    return masked(scores, own.tolist(), BETA)


def m3id_by_hand(own: Tensor, other: Tensor, step: int) -> list[float]:
    g = math.exp(-RATE * step)
    scores = [z + (z - u) * (1 - g) / g if step else z for z, u in zip(own.tolist(), other.tolist())]
    return masked(scores, own.tolist(), BETA)


def test_the_contrasts_in_plain_loops():
    generator = torch.Generator().manual_seed(1)
    own, other = torch.randn(2, 3, 50, generator=generator) * 2
    own[0, 4] = -torch.inf  # forbidden by another processor
    found = VCD(alpha=ALPHA, beta=BETA).combine(own, other)
    assert found.isinf().any(1).all() and found.isfinite().any(1).all()
    for row in range(3):
        expected = torch.tensor(vcd_by_hand(own[row], other[row]))
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)
        for step in (0, 1, 7):
            expected = torch.tensor(m3id_by_hand(own[row], other[row], step))
            fading = M3ID(rate=RATE, beta=BETA).combine(own, other, step)[row]
            torch.testing.assert_close(fading, expected, rtol=1e-5, atol=1e-5)
    assert not VCD(beta=0.0).combine(own, other)[1:].isinf().any()
    assert VCD(beta=1.0).combine(own, other).isfinite().sum(1).tolist() == [1, 1, 1], "at the cutoff a token stays"
    late = M3ID(beta=0.0).combine(own, other, 10**6)
    assert not late.isnan().any() and late.isinf().sum() == 1, "ever more, but numbers"


def test_a_constant_of_the_row_changes_a_constant():
    """Beam search hands on log-probabilities: the same tokens are out, the others differ by a constant of the row."""
    own, other = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(2)) * 2
    for method in (VCD(), M3ID()):
        combine = (lambda z, y: method.combine(z, y, 4)) if method.name == "m3id" else method.combine  # noqa: B023
        raw, normalised = combine(own, other), combine(own.log_softmax(-1), other)
        assert torch.equal(raw.isinf(), normalised.isinf())
        torch.testing.assert_close(raw.log_softmax(-1), normalised.log_softmax(-1))


def test_noise():
    pixels = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(4))
    other = pixels + 1e-6
    torch.testing.assert_close(noisy(pixels, noise_of(pixels, SEED), STEPS), drawn(pixels), rtol=1e-5, atol=1e-5)
    assert torch.equal(noise_of(pixels, 1), noise_of(pixels, 1))
    assert not torch.equal(noise_of(pixels, 1), noise_of(pixels, 2))
    assert not torch.equal(noise_of(pixels, 1), noise_of(other, 1))
    patches = torch.randn(6, 3 * 2 * 4, generator=torch.Generator().manual_seed(4))
    twice = noise_of(patches, 1, frames=2).view(6, 3, 2, 4)
    assert torch.equal(twice[:, :, 0], twice[:, :, 1]) and twice[:, 0, 0].std() > 0.5
    assert torch.equal(noise_of(patches.bfloat16(), 1), noise_of(patches.bfloat16(), 1))
    assert abs(sum(share**2 for share in shares(STEPS)) - 1) < 1e-6
    assert shares(0)[0] > 0.999 and shares(999)[1] > shares(500)[1] > shares(100)[1]


# --- whole models ------------------------------------------------------------------------------------------------


def noisy_picture(vlm: Any, letter: str) -> Picture:
    """One picture under noise, on its own."""
    picture = vlm.picture(letter)
    name = "pixel_values_videos" if letter.isupper() else "pixel_values"
    pixels = picture.inputs[name]
    if pixels.ndim == 2:
        frames = 1 if letter.isupper() else vlm.model.config.vision_config.temporal_patch_size
        changed = drawn(pixels, frames)
    elif vlm.name == "mistral3":
        height, width = picture.inputs["image_sizes"][0].tolist()
        changed = pixels.clone()
        changed[0, :, :height, :width] = drawn(pixels[0, :, :height, :width])
    else:
        changed = drawn(pixels[0])[None]
    return Picture({**picture.inputs, name: changed}, picture.ids, picture.types)


def under_noise(vlm: Any, row: list[Any]) -> Vlm:
    """The family's prompts of a row with its pictures under noise."""
    letters = [part for part in row if isinstance(part, str)]
    changed = {letter: noisy_picture(vlm, letter) for letter in letters}
    if vlm.name in ("idefics3", "smolvlm") and letters:  # all tiles of a prompt are one picture there
        tiles = [vlm.picture(letter).inputs["pixel_values"][0] for letter in letters]
        for letter, part in zip(letters, drawn(torch.cat(tiles)).split([len(one) for one in tiles])):
            picture = vlm.picture(letter)
            changed[letter] = Picture({**picture.inputs, "pixel_values": part[None]}, picture.ids, picture.types)
    return Vlm(vlm.name, vlm.model, vlm.tiny, changed)


def forbid(logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[list(PLACEHOLDERS)] = -torch.inf  # as the generation config has it
    return logits


def contrasted(vlm: Any, rows: list[list[Any]], number: int, count: int) -> list[int]:
    """What VCD generates for one row, the model alone with it."""
    alone, tokens = vlm.prompts(rows, only=number), []
    noise = under_noise(vlm, rows[number]).prompts(rows, only=number)
    assert not torch.equal(noise[name := next(n for n in noise if n.startswith("pixel_values"))], alone[name])
    for _ in range(count):
        own, other = next_logits(vlm.model, alone, tokens), next_logits(vlm.model, noise, tokens)
        scores = vcd_by_hand(forbid(own), other)
        tokens.append(max(range(len(scores)), key=scores.__getitem__))
    return tokens


def keeps_to_the_loops(vlm: Any, rows: list[list[Any]], count: int = 4) -> None:
    inputs = vlm.prompts(rows)
    given = {name: value.clone() for name, value in inputs.items()}
    plain = vlm.model.generate(**inputs, max_new_tokens=count, do_sample=False)[:, -count:]
    before = snapshot(vlm.model)
    with vlmfast.patch(vlm.model, SPEC) as handle:
        found = vlm.model.generate(**inputs, max_new_tokens=count, do_sample=False)[:, -count:]
        assert any("vcd: generated tokens are contrasted" in note for note in handle.report().notes)
    assert snapshot(vlm.model) == before, "nothing is left behind"
    assert all(torch.equal(inputs[name], value) for name, value in given.items())
    assert torch.equal(found[-1], plain[-1]), "a prompt without a picture"
    assert not torch.equal(found[:-1], plain[:-1])
    for row in range(len(rows) - 1):
        assert found[row].tolist() == contrasted(vlm, rows, row, count)


def test_greedy_equals_plain_loops(any_vlm):
    """Rows of a padded batch with one cache a branch, and each row of an unpatched model alone without any."""
    keeps_to_the_loops(any_vlm, ROWS)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "video_llava"])
def test_videos(family):
    keeps_to_the_loops(build(family), VIDEO_ROWS, count=3)


class Afresh(LogitsProcessor):
    """A contrast of an unpatched (or otherwise patched) model, which reads every row from its beginning at every step.

    other: (row, tokens) -> logits of the branch [V]; combine: (scores, other, step) -> scores.
    """

    def __init__(self, inputs: dict[str, Tensor], other: Callable[..., Tensor], combine: Callable[..., Any]) -> None:
        self.inputs, self.other, self.combine = inputs, other, combine

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        width, repeat = self.inputs["input_ids"].shape[1], len(ids) // len(self.inputs["input_ids"])
        for row, tokens in enumerate(ids):
            number = row // repeat
            if not torch.isin(self.inputs["input_ids"][number], torch.tensor(PLACEHOLDERS)).any():
                continue
            other = self.other(number, tokens[width:].tolist())
            scores[row] = torch.as_tensor(self.combine(scores[row], other, ids.shape[1] - width)).log_softmax(-1)
        return scores


def vcd_afresh(vlm: Any, inputs: dict[str, Tensor], rows: list[list[Any]] = ROWS) -> Afresh:
    noise = [under_noise(vlm, row).prompts(rows, only=number) for number, row in enumerate(rows)]

    def other(number: int, tokens: list[int]) -> Tensor:
        return vlm.model(**longer(noise[number], tokens), use_cache=False).logits[0, -1]

    return Afresh(inputs, other, lambda own, branch, step: vcd_by_hand(own, branch))


def m3id_afresh(vlm: Any, inputs: dict[str, Tensor]) -> Afresh:
    texts = [text_alone(vlm.prompts(ROWS, only=number)) for number in range(len(ROWS))]

    def other(number: int, tokens: list[int]) -> Tensor:
        return vlm.model(**longer(texts[number], tokens), use_cache=False).logits[0, -1]

    return Afresh(inputs, other, m3id_by_hand)


ORACLES = {SPEC: vcd_afresh, FADING: m3id_afresh}


@pytest.mark.parametrize(("vlm", "how"), crossed(CORE, list(itertools.product(ORACLES, WAYS))), indirect=["vlm"])
def test_every_way_of_generating(vlm, how):
    spec, way = how
    model, inputs = vlm.model, vlm.prompts(ROWS)
    how = {"max_new_tokens": 7, "logits_processor": None, **WAYS[way]}
    torch.manual_seed(5)
    plain = model.generate(**inputs, **how)
    torch.manual_seed(5)
    expected = model.generate(**inputs, **how | {"logits_processor": [ORACLES[spec](vlm, inputs)]})
    assert not torch.equal(expected, plain)
    torch.manual_seed(5)
    with vlmfast.patch(model, spec):
        assert torch.equal(model.generate(**inputs, **how), expected)


@pytest.mark.parametrize(
    "family", some_families("qwen3_5", "gemma3", "paligemma", "mistral3", "idefics3", "llava_next")
)
def test_beams_of_other_families(family):
    vlm = build(family)
    inputs, how = vlm.prompts(ROWS), {"max_new_tokens": 4, "do_sample": False, "num_beams": 3}
    with vlmfast.patch(vlm.model, SPEC):
        found = vlm.model.generate(**inputs, **how, output_scores=True, return_dict_in_generate=True)
    expected = vlm.model.generate(**inputs, **how, logits_processor=[generating_afresh(vlm, inputs)])
    assert torch.equal(found.sequences, expected)


def generating_afresh(vlm: Any, inputs: dict[str, Tensor]) -> Afresh:
    noise = [under_noise(vlm, row).prompts(ROWS, only=number) for number, row in enumerate(ROWS)]
    return Afresh(
        inputs,
        lambda number, tokens: next_logits(vlm.model, noise[number], tokens),
        lambda own, branch, step: vcd_by_hand(own, branch),
    )


def test_the_second_token_is_the_first_that_m3id_changes(vlm):
    inputs, how = vlm.prompts(ROWS), {"do_sample": False, "max_new_tokens": 3}
    plain = vlm.model.generate(**inputs, **how)
    with vlmfast.patch(vlm.model, "m3id:rate=6"):
        found = vlm.model.generate(**inputs, **how)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(found[:, : width + 1], plain[:, : width + 1]) and not torch.equal(found, plain)


def test_pictures_that_were_encoded_before(vlm):
    """Their pixels come with them, in any order of encoding; others cannot be redrawn, which is said."""
    inputs, how = vlm.prompts(ROWS), {"max_new_tokens": 4, "do_sample": False}
    names = {"pixel_values", "image_grid_thw"} & set(inputs)
    images = encode_images(vlm.model, [], **{name: inputs[name] for name in names})
    with vlmfast.patch(vlm.model, SPEC):
        expected = vlm.model.generate(**inputs, **how)
        pixels = inputs.pop("pixel_values")
        assert torch.equal(vlm.model.generate(**inputs, **how, mm_encoder_outputs=encoder_outputs(images)), expected)
        with pytest.raises(ValueError, match="pass pixel_values"):
            vlm.model.generate(**inputs, **how)
        with pytest.raises(ValueError, match="not both"):
            vlm.model.generate(**inputs, **how, pixel_values=pixels, mm_encoder_outputs=encoder_outputs(images))
        bare = [VisualTokens(one.features, one.grid, one.queries, patches=one.patches) for one in images]
        with pytest.raises(ValueError, match="do not carry"):
            vlm.model.generate(**inputs, **how, mm_encoder_outputs=encoder_outputs(bare))


@pytest.mark.parametrize("family", ["internvl", "vipllava", "mistral3", "llava_next"])
def test_pictures_encoded_before_of_other_families(family):
    vlm = build(family)
    inputs, how = vlm.prompts(ROWS), {"max_new_tokens": 3, "do_sample": False}
    names = {"pixel_values", "image_sizes"} & set(inputs)
    images = encode_images(vlm.model, [], **{name: inputs[name] for name in names})
    with vlmfast.patch(vlm.model, SPEC):
        expected = vlm.model.generate(**inputs, **how)
        inputs.pop("pixel_values")
        assert torch.equal(vlm.model.generate(**inputs, **how, mm_encoder_outputs=encoder_outputs(images)), expected)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "llava_next"])
def test_a_further_turn(family):
    """On the cache of the first one: the branch sees the first turn's pictures."""
    vlm = build(family)
    inputs, how = vlm.prompts([[3, "a", 4], [6, "b", 4]]), {"max_new_tokens": 4, "do_sample": False}
    with vlmfast.patch(vlm.model, SPEC):
        first = vlm.model.generate(**inputs, **how, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]] * 2)], dim=1)
        given = inputs | {
            "input_ids": ids,
            "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 7), value=1),
        }
        if vlm.tiny.types is not None:
            given[vlm.tiny.types] = torch.nn.functional.pad(inputs[vlm.tiny.types], (0, 7))
        expected = vlm.model.generate(**given, **how)
        cached = {name: given[name] for name in ("input_ids", "attention_mask")}  # its pictures are in the cache
        scores = {"output_scores": True, "return_dict_in_generate": True}
        whole = vlm.model.generate(**given, **how, **scores).scores[0]
        more = vlm.model.generate(**cached, **how, **scores, past_key_values=copy.deepcopy(first.past_key_values))
        torch.testing.assert_close(more.scores[0], whole, rtol=1e-3, atol=1e-3)
        found = vlm.model.generate(**cached, **how, past_key_values=first.past_key_values)
        assert torch.equal(found, expected)
        again = torch.nn.functional.pad(found, (0, 2), value=8)
        cached = {
            "input_ids": again,
            "attention_mask": torch.nn.functional.pad(given["attention_mask"], (0, 6), value=1),
        }
        found = vlm.model.generate(**cached, **how, past_key_values=first.past_key_values)
        given |= cached
        if vlm.tiny.types is not None:
            given[vlm.tiny.types] = torch.nn.functional.pad(given[vlm.tiny.types], (0, 6))
        assert torch.equal(found, vlm.model.generate(**given, **how)), "a third one"


def test_a_new_picture_in_a_further_turn():
    """Its pixels come alone: the branch has the first one's from the first turn."""
    vlm = build("llava")
    how = {"max_new_tokens": 4, "do_sample": False}
    inputs, later = vlm.prompts([[3, "a", 4]]), vlm.prompts([[2, "b", 3]], seed=1)
    with vlmfast.patch(vlm.model, SPEC):
        first = vlm.model.generate(**inputs, **how, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, later["input_ids"]], dim=1)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        both = torch.cat([inputs["pixel_values"], later["pixel_values"]])
        expected = vlm.model.generate(**given, **how, pixel_values=both)
        found = vlm.model.generate(
            **given, **how, pixel_values=later["pixel_values"], past_key_values=first.past_key_values
        )
    assert torch.equal(found, expected)


def test_a_copy_is_patched_by_itself(vlm):
    inputs, how = vlm.prompts(ROWS), {"max_new_tokens": 4, "do_sample": False}
    plain = vlm.model.generate(**inputs, **how)
    with vlmfast.patch(vlm.model, f"{SPEC},branch=divprune/keep=0.3"):
        expected = vlm.model.generate(**inputs, **how)
        twin = copy.deepcopy(vlm.model)
    assert torch.equal(twin.generate(**inputs, **how), expected) and not torch.equal(plain, expected)
    vlmfast.unpatch(twin)
    assert torch.equal(twin.generate(**inputs, **how), plain)
    assert torch.equal(vlm.model.generate(**inputs, **how), plain)


def test_direct_calls_and_training_are_plain(vlm):
    inputs = vlm.prompts(ROWS)
    labels = inputs["input_ids"].masked_fill(torch.isin(inputs["input_ids"], torch.tensor(PLACEHOLDERS)), -100)
    plain, loss = vlm.model(**inputs).logits, vlm.model(**inputs, labels=labels).loss
    with vlmfast.patch(vlm.model, SPEC):
        vlm.model.generate(**inputs, max_new_tokens=2)
        assert torch.equal(vlm.model(**inputs).logits, plain)
        assert torch.equal(vlm.model(**inputs, labels=labels).loss, loss)


class Forced(LogitsProcessor):
    """Lets only given tokens through."""

    def __init__(self, width: int, tokens: list[int]) -> None:
        self.width, self.tokens = width, tokens

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        step = ids.shape[1] - self.width
        if step == len(self.tokens):
            return scores
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([self.tokens[step]]), 0.0)


def forced(model: Any, inputs: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """What a model says behind one prompt and tokens that it generated, as methods see it that tell them apart. [V]"""
    how = {"max_new_tokens": len(tokens) + 1, "do_sample": False, "output_logits": True}
    processors = [Forced(inputs["input_ids"].shape[1], tokens)]
    return model.generate(**inputs, **how, return_dict_in_generate=True, logits_processor=processors).logits[-1][0]


OTHERS = [
    "zerotuning:gamma=4,layers=0",
    "var:layers=all,dims=0/1,tau=1,summ=0,rho=1,p=0",
    "hiprune:keep=0.33",
    "hiprune:keep=9",
    "random:keep=0.5",
    "fastv:keep=0.4,layer=1",
]


@pytest.mark.parametrize(("vlm", "other"), crossed(CORE, OTHERS), indirect=["vlm"])
def test_beside_other_methods(vlm, other, monkeypatch):
    """The branch is the same patched model, and what is reported is about the prompts."""
    # Some methods choose by the last bit of a pixel.
    production = lambda pixels, frames=1: noisy(pixels, noise_of(pixels, SEED, frames), STEPS)  # noqa: E731
    monkeypatch.setitem(globals(), "drawn", production)
    inputs, how = vlm.prompts(ROWS), {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    noise = [under_noise(vlm, row).prompts(ROWS, only=number) for number, row in enumerate(ROWS)]
    with vlmfast.patch(vlm.model, other) as handle:
        plain = vlm.model.generate(**inputs, **how)
        alone = handle.report()
    twin = build(vlm.name)  # a model of its own for the branch: what it notes is not in the way
    with vlmfast.patch(vlm.model, other), vlmfast.patch(twin.model, other):
        oracle = Afresh(
            inputs,
            lambda number, tokens: forced(twin.model, noise[number], tokens),
            lambda own, branch, step: vcd_by_hand(own, branch),
        )
        expected = vlm.model.generate(**inputs, **how, logits_processor=[oracle])
    with vlmfast.patch(vlm.model, f"{other}+{SPEC}") as handle:
        assert torch.equal(vlm.model.generate(**inputs, **how), expected)
        report = handle.report()
    assert not torch.equal(plain, expected)
    assert [p.per_layer for p in report.prompts] == [p.per_layer for p in alone.prompts]
    assert [k.tolist() for k in report.kept] == [k.tolist() for k in alone.kept]
    assert set(alone.notes) <= set(report.notes)


PRUNED = [
    ("none", "hiprune/keep=0.3"),
    ("none", "random/keep=0.5/seed=4"),
    ("none", "divprune/keep=5"),
    ("hiprune:keep=0.5", "hiprune/keep=0.2/positions=compact"),
    ("fastv:keep=0.4,layer=1", "divprune/keep=0.3"),
    ("zerotuning:gamma=4,layers=0", "divprune/keep=0.3"),
]


@pytest.mark.parametrize(("vlm", "both"), crossed(CORE, PRUNED), indirect=["vlm"])
def test_a_pruned_branch(vlm, both, monkeypatch):
    """The noisy picture is cut by the branch's own method; the prompts by theirs, or not at all."""
    main, pruner = both
    production = lambda pixels, frames=1: noisy(pixels, noise_of(pixels, SEED, frames), STEPS)  # noqa: E731
    monkeypatch.setitem(globals(), "drawn", production)
    inputs, how = vlm.prompts(ROWS), {"max_new_tokens": 5, "do_sample": False, "num_beams": 2}
    noise = [under_noise(vlm, row).prompts(ROWS, only=number) for number, row in enumerate(ROWS)]
    name, _, settings = pruner.partition("/")
    alone = f"{name}:{settings.replace('/', ',')}"
    twin = build(vlm.name)
    branch = f"{alone}+{main}" if main.startswith("zerotuning") else alone
    with vlmfast.patch(vlm.model, main) as handle, vlmfast.patch(twin.model, branch):
        oracle = Afresh(
            inputs,
            lambda number, tokens: forced(twin.model, noise[number], tokens),
            lambda own, branch, step: vcd_by_hand(own, branch),
        )
        expected = vlm.model.generate(**inputs, **how, logits_processor=[oracle])
        report = handle.report()
    spec = f"{SPEC},branch={pruner}"
    assert to_spec(from_spec(spec)) == spec
    spec = spec if main == "none" else f"{main}+{spec}"
    before = snapshot(vlm.model)
    with vlmfast.patch(vlm.model, spec) as handle:
        assert torch.equal(vlm.model.generate(**inputs, **how), expected)
        assert [one.tolist() for one in handle.report().kept] == [one.tolist() for one in report.kept]
        plain = vlm.model(**inputs).logits
    assert snapshot(vlm.model) == before
    with vlmfast.patch(vlm.model, main):
        assert torch.equal(vlm.model(**inputs).logits, plain), "direct calls are not pruned by the branch's method"


@pytest.mark.parametrize("family", every_family())
def test_a_pruned_branch_on_every_family(family, monkeypatch):
    production = lambda pixels, frames=1: noisy(pixels, noise_of(pixels, SEED, frames), STEPS)  # noqa: E731
    monkeypatch.setitem(globals(), "drawn", production)
    vlm, twin = build(family), build(family)
    inputs, how = vlm.prompts(ROWS), {"max_new_tokens": 3, "do_sample": False}
    noise = [under_noise(vlm, row).prompts(ROWS, only=number) for number, row in enumerate(ROWS)]
    with vlmfast.patch(twin.model, "divprune:keep=0.3"):
        oracle = Afresh(
            inputs,
            lambda number, tokens: forced(twin.model, noise[number], tokens),
            lambda own, branch, step: vcd_by_hand(own, branch),
        )
        expected = vlm.model.generate(**inputs, **how, logits_processor=[oracle])
    with vlmfast.patch(vlm.model, f"{SPEC},branch=divprune/keep=0.3"):
        assert torch.equal(vlm.model.generate(**inputs, **how), expected)


def test_a_pruned_branch_is_short(vlm):
    inputs = vlm.prompts([[3, "a", 2]])
    width = inputs["input_ids"].shape[1]
    n = width - 5
    lengths = lengths_of_forwards(vlm, f"{SPEC},branch=divprune/keep=0.25", inputs, do_sample=False)
    assert lengths[:2] == [width, 5 + n // 4]


@pytest.mark.parametrize("branch", ["fastv/keep=0.5", "nothing", "hiprune/0.3", "hiprune/kep=0.3", 3])
def test_branches_that_there_are_not(branch):
    with pytest.raises(ValueError, match="branch=|settings are written|no setting"):
        VCD(branch=branch)


def test_a_branch_that_the_tower_cannot_serve():
    vlm = build("qwen2_5_vl")
    before = snapshot(vlm.model)
    with pytest.raises(NotImplementedError, match="needs a CLS token"):
        vlmfast.patch(vlm.model, "vcd:branch=fastervlm/keep=0.3")
    assert snapshot(vlm.model) == before
    with vlmfast.patch(vlm.model, "vcd:branch=fastervlm/keep=0.3/fallback=received") as handle:
        vlm.model.generate(**vlm.prompts(ROWS), max_new_tokens=2)
        notes = handle.report().notes
    assert any("pruned by fastervlm/keep=0.3" in note for note in notes)
    assert any("its branch: fastervlm: no CLS in this tower" in note for note in notes)


def test_what_a_branch_costs(vlm):
    """The tower and the prompt again; a pruned branch the shorter prompt, whatever prunes the prompts."""
    config = vlm.model.config
    picture = nominal(config)
    plain, pruned = (
        cost_of(config, (), 20, [picture]),
        cost_of(config, from_spec("divprune:keep=8"), 20, [picture], [8] * 3),
    )
    everything = plain.tower + plain.projector + plain.prefill + plain.head
    assert cost_of(config, from_spec("vcd"), 20, [picture]).selection == everything
    short = pruned.tower + pruned.projector + pruned.prefill + pruned.head + pruned.selection
    found = cost_of(config, from_spec("vcd:branch=divprune/keep=8"), 20, [picture]).selection
    assert found == short < everything
    both = from_spec("random:keep=4+vcd:branch=divprune/keep=8")
    assert cost_of(config, both, 20, [picture], [4] * 3).selection == short
    scored = cost_of(config, from_spec("vcd:branch=hiprune/keep=8"), 20, [picture]).selection
    alone = cost_of(config, from_spec("hiprune:keep=8"), 20, [picture], [8] * 3)
    assert scored == alone.total_prefill
    assert cost_of(config, from_spec("vcd:alpha=0,beta=0"), 20, [picture]).selection == 0


def lengths_of_forwards(vlm: Any, spec: str, inputs: dict[str, Tensor], **how: Any) -> list[int]:
    """How many tokens each forward of a patched model got."""
    lengths: list[int] = []
    with vlmfast.patch(vlm.model, spec):
        hook = vlm.model.model.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        try:
            vlm.model.generate(**inputs, max_new_tokens=4, **how)
        finally:
            hook.remove()
    return lengths


def test_a_step_costs_no_second_forward(vlm):
    """The branch starts once, also with beams; and not at all without a picture."""
    inputs = vlm.prompts(ROWS)
    width = inputs["input_ids"].shape[1]
    for how in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        assert lengths_of_forwards(vlm, SPEC, inputs, **how) == [width, width] + [1] * 3
    assert len(lengths_of_forwards(vlm, SPEC, vlm.prompts([[4], [6]]), do_sample=False)) == 4


def test_scores_streams_chunks_and_drafts(vlm):
    inputs = vlm.prompts([[3, "a", 6]])
    how = {"max_new_tokens": 6, "do_sample": False}
    with vlmfast.patch(vlm.model, SPEC):
        expected = vlm.model.generate(**inputs, **how)
        stream = Words()
        vlm.model.generate(**inputs, **how, streamer=stream)
        assert stream.tokens == expected[0].tolist()
        assert torch.equal(vlm.model.generate(**inputs, **how, prompt_lookup_num_tokens=3), expected)
        assert torch.equal(vlm.model.generate(**inputs, **how, prefill_chunk_size=5), expected)
        found = vlm.model.generate(**inputs, **how, output_scores=True, return_dict_in_generate=True)
    for scores in found.scores:
        torch.testing.assert_close(scores.exp().sum(1), torch.ones(1))


@pytest.mark.parametrize("spec", ["vcd:alpha=0,beta=0", "m3id:rate=0,beta=0"])
def test_the_neutral_setting_installs_nothing(vlm, spec):
    with vlmfast.patch(vlm.model, "none"):
        bare = snapshot(vlm.model)
    with vlmfast.patch(vlm.model, spec):
        assert snapshot(vlm.model) == bare


@pytest.mark.parametrize("family", every_family())
def test_one_seed_one_answer(family):
    """No state is left over; another seed is another noise."""
    vlm = build(family)
    inputs, how = vlm.prompts(ROWS), {"max_new_tokens": 3, "do_sample": False, "output_scores": True}
    scores = []
    for seed in (3, 3, 4):
        with vlmfast.patch(vlm.model, f"{SPEC.rpartition(',')[0]},seed={seed}"):
            one = vlm.model.generate(**inputs, **how, return_dict_in_generate=True)
        scores.append(one.scores[0][:2])
    assert torch.equal(scores[0], scores[1]) and not torch.equal(scores[0], scores[2])


BAD = [
    ("vcd", {"alpha": -1}),
    ("vcd", {"alpha": True}),
    ("vcd", {"beta": 2}),
    ("vcd", {"beta": "x"}),
    ("vcd", {"steps": 1000}),
    ("vcd", {"steps": 1.5}),
    ("vcd", {"seed": -1}),
    ("m3id", {"rate": -1}),
    ("m3id", {"rate": math.nan}),
    ("m3id", {"beta": -0.1}),
]


@pytest.mark.parametrize("name, settings", BAD)
def test_bad_settings(name, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        {"vcd": VCD, "m3id": M3ID}[name](**settings)


def test_what_cannot_work_is_said(vlm):
    before = snapshot(vlm.model)
    for others in (("vcd", "m3id"), ("vcd", "pai"), ("dola", "vcd")):
        with pytest.raises(NotImplementedError, match="choose one"):
            vlmfast.patch(vlm.model, *others)
    assert snapshot(vlm.model) == before
    with vlmfast.patch(vlm.model, SPEC):
        embeds = vlm.model.get_input_embeddings()(torch.tensor([[4, 5]]))
        with pytest.raises(NotImplementedError, match="vcd needs input_ids"):
            vlm.model.generate(inputs_embeds=embeds, max_new_tokens=2)


def test_specs_round_trip():
    assert to_spec(from_spec(SPEC)) == SPEC and to_spec(from_spec(FADING)) == FADING
