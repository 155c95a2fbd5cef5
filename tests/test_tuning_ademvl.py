"""ADEM-VL as a PEFT tuner: the equation in plain loops through whole models, pictures by prompt, caches, patches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import vlmfast
from vlmfast.crossattention import Bank, cross_attention, multiscale, threshold
from vlmfast.encoding import encode_images
from vlmfast.visual import Score

peft = pytest.importorskip("peft")

from vlmfast.adapters.tuning import AdemVLConfig  # noqa: E402

STRONG: dict[str, Any] = {"alpha": 0.5, "beta": 0.5, "gamma": 0.3, "grids": [4, 2], "hidden": 8, "init_std": 0.3}
ENTRIES = 20
ROWS = [[3, "a", 2], [2, "b", 1, "c", 6], [4]]
MODES = ("augment", "replace")


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def pairs(fast: Sequence[tuple[str, str]], **others: str) -> list[Any]:
    """Families and modes: the fast ones, and the slow ones of each mode."""
    return [
        *fast,
        *(pytest.param(name, mode, marks=pytest.mark.slow) for mode in MODES for name in others.get(mode, "").split()),
    ]


def tune(model: Any, mode: str = "augment", **settings: Any) -> Any:
    """A tuned model whose branch changes much."""
    torch.manual_seed(3)
    tuned = peft.get_peft_model(model, AdemVLConfig(mode=mode, **(STRONG | settings))).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "ademvl_e2" in name or ("ademvl_" in name and name.endswith("bias")):
                parameter.normal_(0, 0.3)
    return tuned


MADE: dict[Any, Any] = {}


@pytest.fixture
def tuned(fresh) -> Any:
    """tuned(family, mode) -> (a tuned model that tests leave as it is, the tiny model as it was, with its prompts)."""

    def make(name: str, mode: str) -> tuple[Any, Any]:
        if (name, mode) not in MADE:
            MADE[name, mode] = tune(fresh(name).model, mode), fresh(name)
        return MADE[name, mode]

    return make


# --- the equation in plain loops -----------------------------------------------------------------------------------


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def mixed_by_hand(x: Tensor, entries: Tensor, e1: Tensor, e2: Tensor, gamma: float) -> Tensor:
    """x: [L, D], entries: [n N, D], e1, e2: [N, D]"""
    n = len(entries)
    keys = torch.stack([silu(entries[m] + e1[m % len(e1)]) for m in range(n)])
    values = torch.stack([entries[m] + e2[m % len(e2)] for m in range(n)])
    rows = []
    for hidden in x:
        scores = [float(score) for score in keys @ silu(hidden)]
        least = sorted(scores)[math.floor(gamma * n)] if gamma else -math.inf
        rows.append(torch.tensor([score if score >= least else 0.0 for score in scores]) @ values)
    return torch.stack(rows)


def pooled_by_hand(grid_map: Tensor, grids: Sequence[int]) -> Tensor:
    h, w = grid_map.shape[:2]
    cells = []
    for g in grids:
        for i in range(g):
            for j in range(g):
                rows = range(i * h // g, -(-(i + 1) * h // g))
                columns = range(j * w // g, -(-(j + 1) * w // g))
                cells.append(torch.stack([grid_map[r, c] for r in rows for c in columns]).mean(0))
    return torch.stack(cells)


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_cross_attention_is_the_equation(gamma):
    torch.manual_seed(0)
    x, entries, e1, e2 = torch.randn(5, 6), torch.randn(14, 6), torch.randn(7, 6), torch.randn(7, 6)
    expected = mixed_by_hand(x, entries, e1, e2, gamma)
    bank = Bank.of([entries], e1, e2)
    torch.testing.assert_close(bank.attend(x[None], gamma)[0], expected, rtol=1e-4, atol=1e-4)
    for rows in (1, 2, 5):
        torch.testing.assert_close(cross_attention(x[None], bank.keys, bank.values, gamma, rows)[0], expected)
    half = bank.attend(x[None].bfloat16(), gamma)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half[0], mixed_by_hand(x.bfloat16().float(), entries, e1, e2, gamma))


@pytest.mark.parametrize("gamma", [0.0, 0.4])
def test_gradients_are_those_of_the_whole_scores(gamma):
    torch.manual_seed(0)
    x, keys, values = (torch.randn(2, n, 4, dtype=torch.double, requires_grad=True) for n in (7, 9, 9))

    def whole(x, keys, values):
        scores = nn.functional.silu(x) @ keys.transpose(1, 2)
        if gamma:
            least = scores.sort(-1).values[..., int(gamma * 9)][..., None]
            scores = scores * (scores >= least)
        return scores @ values

    theirs = torch.autograd.grad(whole(x, keys, values).square().sum(), (x, keys, values))
    for rows in (2, 100):
        ours = torch.autograd.grad(cross_attention(x, keys, values, gamma, rows).square().sum(), (x, keys, values))
        for one, other in zip(ours, theirs):
            torch.testing.assert_close(one, other)
    some = cross_attention(x.detach(), keys, values.detach(), gamma)
    torch.testing.assert_close(
        torch.autograd.grad(some.sum(), keys), torch.autograd.grad(whole(x, keys, values).sum(), keys)
    )


def test_ties_at_the_threshold_stay():
    scores = torch.tensor([[1.0, -2.0, 3.0, -2.0, -2.0, 0.0, 1.0, 5.0, 4.0, 1.0]])
    assert threshold(scores, 0.2).item() == -2 and threshold(scores, 0.5).item() == 1
    assert threshold(scores, 0.0) is None and threshold(scores, 0.09).item() == -2
    keys = torch.tensor([[1.0], [1.0], [-1.0], [-1.0], [2.0]])[None]  # scores of x: [2, 2, -2, -2, 4] times silu
    values = torch.tensor([[1.0], [10.0], [100.0], [1000.0], [10000.0]])[None]
    weight = float(nn.functional.silu(torch.tensor(2.0)))
    for gamma, expected in ((0.2, 20011 - 1100), (0.4, 20011), (0.6, 20011), (0.8, 20000)):
        out = cross_attention(torch.tensor([[[2.0]]]), keys, values, gamma)
        assert out.item() == pytest.approx(expected * weight)


def test_scores_are_never_whole(monkeypatch):
    import vlmfast.crossattention as module

    seen = []
    original = module.scored
    monkeypatch.setattr(module, "scored", lambda *args: seen.append(args[0].shape[1]) or original(*args))
    monkeypatch.setattr(module, "ENTRIES_CPU", 40)
    x, keys = torch.randn(2, 9, 4, requires_grad=True), torch.randn(2, 10, 4)
    cross_attention(x, keys, keys, 0.1).sum().backward()
    assert seen == [2, 2, 2, 2, 1] * 2, "2 x 2 x 10 entries at a time, in both directions"


def test_prompts_with_different_banks():
    torch.manual_seed(0)
    e1, e2, gamma = torch.randn(3, 4), torch.randn(3, 4), 0.4
    entries = [torch.randn(n, 4) for n in (6, 3, 6, 9)]
    bank = Bank.of(entries, e1, e2)
    assert bank.counts == (6, 3, 6, 9)
    for prompts in ([0, 1, 2, 3], [0, 0, 2, 2], [3, 1, 3, 0], [2, 0, 0, 2], [1], [0, 2], [2, 2, 2]):
        x = torch.randn(len(prompts), 2, 4)
        out = bank.attend(x, gamma, prompts)
        for row, prompt in enumerate(prompts):
            torch.testing.assert_close(
                out[row], mixed_by_hand(x[row], entries[prompt], e1, e2, gamma), rtol=1e-4, atol=1e-5
            )


def test_grids():
    torch.manual_seed(0)
    for h, w, grids in ((6, 6, [4, 2]), (3, 5, [4, 2, 1]), (4, 4, [4]), (2, 3, [6])):
        maps = torch.randn(2, h, w, 3)
        for one, expected in zip(multiscale(maps, grids), maps):
            torch.testing.assert_close(one, pooled_by_hand(expected, grids))
    maps = torch.randn(1, 24, 24, 2)
    assert multiscale(maps, [16, 8]).shape == (1, 320, 2)
    official = multiscale(maps, [16, 8], "official")
    assert torch.equal(official[:, : 24 * 24], maps.flatten(1, 2)) and official.shape[1] == 24 * 24 + 64
    even = torch.randn(1, 16, 16, 2)
    assert torch.equal(multiscale(even, [16, 8], "official"), multiscale(even, [16, 8]))


# --- whole models --------------------------------------------------------------------------------------------------


class Hidden:
    """Wants the features of the tower."""

    def wanted(self, tower):
        one = {"hidden": Score(tower.feature_layer, "hidden")}
        return one | ({"cls": Score(tower.feature_layer, "cls_hidden")} if tower.has_cls else {})


def unit_variance(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def through(project: nn.Module, x: Tensor) -> Tensor:
    return silu(x @ project[0].weight.T + project[0].bias) @ project[2].weight.T + project[2].bias


class Oracle:
    """What an adapter is, by the definition. vlm: the model without it."""

    def __init__(self, tuned: Any, vlm: Any) -> None:
        named = dict(tuned.named_parameters())
        first = min(name.split(".ademvl_e1")[0] for name in named if "ademvl_e1" in name)
        layer = tuned.get_submodule(first)
        self.vlm, self.model = vlm, vlm.model
        self.project, self.cls = layer.ademvl_proj["default"], layer.ademvl_cls
        self.e1, self.e2 = layer.ademvl_e1["default"], layer.ademvl_e2["default"]

    @torch.no_grad()
    def picture(self, letter: str) -> tuple[Tensor, Tensor | None]:
        """Entries [n N, D] of a picture, and its token [D]."""
        kind = "video" if letter.isupper() else "image"
        visual = encode_images(self.model, [Hidden()], modality=kind, **self.vlm.picture(letter).inputs)
        entries, vectors = [], []
        for one in visual:
            scores = {score.kind: values for score, values in one.statistics.items()}
            views = [view for view in one.views if view.kind != "crop"]
            means = []
            for view in views:
                features = unit_variance(scores["hidden"][view.index])
                entries.append(through(self.project, pooled_by_hand(features.unflatten(0, view.grid), [4, 2])) * 0.5)
                has_cls = "cls_hidden" in scores
                means.append(unit_variance(scores["cls_hidden"][view.index[0]]) if has_cls else features.mean(0))
            vectors.append(torch.stack(means).mean(0))
        token = None
        if self.cls:
            token = torch.stack([through(self.cls["default"], one) for one in vectors])
        return torch.cat(entries), token

    def entries(self, row: Sequence[Any]) -> Tensor:
        """Those of a prompt."""
        some = [self.picture(part)[0] for part in row if isinstance(part, str)]
        return torch.cat(some) if some else torch.zeros(ENTRIES, self.e1.shape[1])

    @contextmanager
    def looking(self, entries: Tensor, gamma: float = 0.3) -> Iterator[None]:
        """Every decoder layer of the plain model with the branch. entries: of the one prompt."""
        handles = []

        def hook(net: nn.Module, norm: nn.Module | None) -> None:
            given = []
            handles.append(net.register_forward_pre_hook(lambda module, args: given.append(args[0])))

            def add(module, args, out):
                x = given.pop().flatten(0, 1)
                return out + 0.5 * mixed_by_hand(x, entries, self.e1, self.e2, gamma).view(out.shape)

            handles.append((norm or net).register_forward_hook(add))

        for layer in self.model.get_decoder().layers:
            hook(layer.mlp, getattr(layer, "post_feedforward_layernorm", None))
        try:
            with torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def embedded(self, row: Sequence[Any], ids: Tensor) -> Tensor:
        """The prompt with one token a picture. ids: [L] of the whole prompt -> [1, M, D]"""
        embed, parts, place = self.model.get_input_embeddings(), [], 0
        for part in row:
            if isinstance(part, int):
                parts.append(embed(ids[place : place + part]))
                place += part
                continue
            picture = self.vlm.picture(part)
            types = torch.tensor(picture.types) > 0
            token = self.picture(part)[1]
            spans = [int(types.sum()) // len(token)] * len(token)
            left = 0
            for kind, name in zip(types.tolist(), picture.ids):
                if kind and left == 0:
                    parts.append(token[:1])
                    token, left = token[1:], spans.pop()
                if kind:
                    left -= 1
                else:
                    parts.append(embed(torch.tensor([name])))
            place += len(picture.ids)
        parts.append(embed(ids[place:]))
        return torch.cat(parts)[None]


PLAIN = ["llava", "qwen2_5_vl"]
# Families by what is fast: every way through the code once.
ORACLE = pairs(
    [("llava", "augment"), ("gemma3", "augment"), ("qwen2_5_vl", "replace"), ("qwen3_vl", "replace")],
    augment="qwen2_5_vl qwen3_vl qwen2_vl qwen3_5 llava_next llava_onevision vipllava video_llava internvl idefics3 "
    "mistral3 paligemma llava_next_video smolvlm",
    replace="llava qwen2_vl qwen3_5 llava_next llava_onevision vipllava video_llava internvl mistral3 "
    "llava_next_video",
)
CORE = pairs(
    [("llava", "augment"), ("qwen2_5_vl", "replace")],
    augment="qwen2_5_vl gemma3 qwen3_5 llava_next idefics3 internvl",
    replace="llava gemma3 qwen3_5 llava_next idefics3 internvl",
)


@pytest.mark.parametrize(("name", "mode"), ORACLE)
def test_a_whole_model_is_the_definition(tuned, name, mode):
    """Prompt with two pictures, and tokens that follow, from the cache."""
    model, vlm = tuned(name, mode)
    oracle = Oracle(model, vlm)
    row = [3, "a", 2, "b", 3]
    inputs = vlm.prompts([row])
    width = inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        logits = model(**inputs).logits
    entries = oracle.entries(row)
    for step in range(3):
        ids = tokens[:, : width + step]
        with oracle.looking(entries):
            if mode == "augment":
                kind = vlm.tiny.types
                more = {} if kind is None else {kind: nn.functional.pad(inputs[kind], (0, step))}
                given = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | more
                expected = oracle.model(**given).logits
            else:
                embeds = oracle.embedded(row, ids[0])
                place = torch.arange(embeds.shape[1])[None] + vlmfast.families.family_of(vlm.model).first_position
                place = place.expand(3, 1, -1) if vlmfast.families.family_of(vlm.model).mrope else place
                hidden = oracle.model.get_decoder()(inputs_embeds=embeds, position_ids=place).last_hidden_state
                expected = oracle.model.lm_head(hidden)
        if not step:
            assert logits.shape == expected.shape
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
        assert int(tokens[0, width + step]) == int(barred(expected[0, -1]).argmax())


def barred(logits: Tensor) -> Tensor:
    """Without the placeholders, which the tiny models never generate."""
    return logits.index_fill(-1, torch.tensor([90, 91]), -torch.inf)


def test_features_are_those_of_the_tower(tuned):
    """CLIP's own hidden states, not by way of the encoder."""
    model, vlm = tuned("llava", "replace")
    oracle = Oracle(model, vlm)
    pixels = vlm.picture("a").inputs["pixel_values"]
    with torch.no_grad():
        hidden = vlm.model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][0]
    features = unit_variance(hidden)
    entries = through(oracle.project, pooled_by_hand(features[1:].unflatten(0, (6, 6)), [4, 2])) * 0.5
    token = through(oracle.cls["default"], features[0])
    ours = oracle.picture("a")
    torch.testing.assert_close(ours[0], entries, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1][0], token, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "mode"), CORE)
def test_rows_of_a_batch_are_prompts_alone(tuned, name, mode):
    """One, two and no pictures, padded on the left; greedy, beams, without a cache, several samples of a prompt."""
    model, vlm = tuned(name, mode)
    inputs = vlm.prompts(ROWS)
    width = inputs["input_ids"].shape[1]
    how = {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        logits = model(**inputs).logits
    greedy, beams = (model.generate(**inputs, **how, num_beams=beams) for beams in (1, 2))
    assert torch.equal(model.generate(**inputs, **how, use_cache=False), greedy)
    two = model.generate(**inputs, **how, num_beams=2, num_return_sequences=2)
    assert torch.equal(two[::2], beams)
    for row in range(len(ROWS)):
        alone = vlm.prompts(ROWS, only=row)
        n = alone["input_ids"].shape[1]
        with torch.no_grad():
            torch.testing.assert_close(model(**alone).logits[0, -1], logits[row, -1], rtol=1e-3, atol=2e-4)
        assert torch.equal(model.generate(**alone, **how)[0, n:], greedy[row, width:])
        assert torch.equal(model.generate(**alone, **how, num_beams=2, use_cache=False)[0, n:], beams[row, width:])


def test_other_caches_and_chunks(tuned):
    model, vlm = tuned("llava", "augment")
    inputs = vlm.prompts([[3, "a", 4]])
    how = {"max_new_tokens": 4, "do_sample": False}
    tokens = model.generate(**inputs, **how)
    assert torch.equal(model.generate(**inputs, **how, cache_implementation="static"), tokens)
    assert torch.equal(model.generate(**inputs, **how, prompt_lookup_num_tokens=2), tokens)
    with pytest.raises(ValueError, match="without prefill_chunk_size"):
        model.generate(**inputs, **how, prefill_chunk_size=5)
    with pytest.raises(ValueError, match="without the ademvl adapter"), model.disable_adapter():
        cache = model(**inputs).past_key_values
        model.enable_adapter_layers()
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


@pytest.mark.parametrize(
    ("name", "mode"),
    pairs([("llava", "replace"), ("qwen2_5_vl", "augment")], replace="qwen2_5_vl", augment="llava"),
)
def test_a_further_turn_of_text_sees_the_picture(tuned, name, mode):
    """The same as the whole conversation at once; also after an interlude on another cache."""
    model, vlm = tuned(name, mode)
    inputs, cache, how = vlm.prompts([[3, "a", 2]]), DynamicCache(), {"max_new_tokens": 3, "do_sample": False}
    first = model.generate(**inputs, past_key_values=cache, **how)
    if name == "llava":  # transformers keeps the positions of Qwen's last prompt on the model
        model.generate(**vlm.prompts([[4, "b", 2]], seed=2), **how)
        model.generate(**vlm.prompts([[4]], seed=2), **how)
    ids = torch.cat([first, torch.tensor([[11, 12, 13]])], dim=1)
    longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    second = model.generate(**longer, past_key_values=cache, **how)
    more = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    if (kind := vlm.tiny.types) is not None:
        more[kind] = nn.functional.pad(more[kind], (0, ids.shape[1] - more[kind].shape[1]))
    assert torch.equal(model.generate(**longer, **more, **how), second)
    blind = model.generate(**vlm.prompts([[5]]), **how)
    model.generate(**vlm.prompts([[3, "a", 2]]), **how)
    assert torch.equal(model.generate(**vlm.prompts([[5]]), **how), blind), "nothing is left of a picture"


def test_a_further_picture_adds_its_entries(tuned):
    """What comes behind it sees both; a cropped cache forgets it, a reset one forgets all."""
    model, vlm = tuned("llava", "augment")
    oracle = Oracle(model, vlm)
    one, two = [3, "a", 2], [2, "b", 3]
    first, second = vlm.prompts([one]), vlm.prompts([two], seed=1)
    third = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        cache = model(**first).past_key_values
        held = cache.get_seq_length()
        mask = torch.ones(1, held + second["input_ids"].shape[1], dtype=torch.long)
        logits = model(**(second | {"attention_mask": mask}), past_key_values=cache).logits
        cache.crop(held - cache.get_seq_length())
        cropped = model(input_ids=third, past_key_values=cache).logits
    with oracle.looking(oracle.entries(one)):
        plain = vlm.model(**first).past_key_values
        later = vlm.model(input_ids=third, past_key_values=plain).logits
        plain.crop(held - plain.get_seq_length())
    with oracle.looking(oracle.entries([*one, *two])):
        expected = vlm.model(**(second | {"attention_mask": mask}), past_key_values=plain).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(cropped, later, rtol=1e-3, atol=2e-4)
    cache.reset()
    blind = third.repeat(2, 1)  # rows of their own, too
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=blind, past_key_values=cache).logits, model(input_ids=blind).logits)


def test_text_alone_has_the_offsets_as_a_memory(tuned, fresh):
    model, vlm = tuned("llava", "augment")
    oracle, inputs = Oracle(model, vlm), vlm.prompts([[6]])
    with torch.no_grad():
        logits = model(**inputs).logits
    with oracle.looking(torch.zeros(ENTRIES, 32)):
        torch.testing.assert_close(vlm.model(**inputs).logits, logits, rtol=1e-3, atol=2e-4)
    untrained = peft.get_peft_model(fresh("llava").model, AdemVLConfig(mode="augment", grids=[4])).eval()
    with torch.no_grad():
        assert torch.equal(untrained(**inputs).logits, vlm.model(**inputs).logits), "e2 = 0"
        assert not torch.equal(
            untrained(**vlm.prompts([[3, "a", 2]])).logits, vlm.model(**vlm.prompts([[3, "a", 2]])).logits
        )


@pytest.mark.parametrize("name", ["qwen2_5_vl", *slow("video_llava", "qwen3_vl", "llava_onevision")])
@pytest.mark.parametrize("mode", MODES)
def test_frames_of_a_video_are_entries(tuned, name, mode):
    model, vlm = tuned(name, mode)
    rows = [[2, "A", 2, "a", 3], [4]]
    counts = []
    handle = (
        model.get_base_model()
        .get_decoder()
        .layers[0]
        .register_forward_pre_hook(
            lambda module, args, kwargs: counts.append(
                kwargs["vlmfast_tokens"].notes["ademvl"].banks["default"].counts
            ),
            with_kwargs=True,
        )
    )
    with torch.no_grad():
        output = model(**vlm.prompts(rows))
    handle.remove()
    visual = encode_images(vlm.model, [], modality="video", **vlm.picture("A").inputs)[0]
    assert counts == [((len(visual.views) + 1) * ENTRIES, ENTRIES)] and len(visual.views) > 1
    if mode == "augment":
        entries = Oracle(model, vlm).entries(rows[0])
        with Oracle(model, vlm).looking(entries):
            expected = vlm.model(**vlm.prompts(rows, only=0)).logits[0, -1]
        torch.testing.assert_close(output.logits[0, -1], expected, rtol=1e-3, atol=1e-3)


# --- settings, training --------------------------------------------------------------------------------------------


def test_a_gate_of_zero_is_the_identity(fresh):
    vlm = fresh("llava")
    inputs = vlm.prompts(ROWS)
    with torch.no_grad():
        plain = vlm.model(**inputs).logits
        model = tune(vlm.model, gate="zero")
        assert torch.equal(model(**inputs).logits, plain)
    model(**inputs).logits.square().sum().backward()
    gates = {name: p for name, p in model.named_parameters() if "ademvl_gate" in name}
    assert len(gates) == 3 and all(p.grad.abs().sum() > 0 for p in gates.values())
    with torch.no_grad():
        for parameter in gates.values():
            parameter.fill_(1)
        opened = model(**inputs).logits
        assert torch.allclose(opened, tune(fresh("llava").model)(**inputs).logits)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llava", *slow("qwen3_5", "gemma3", "qwen3_vl")])
def test_gradients_with_checkpointing(fresh, name, mode):
    vlm = fresh(name)
    model, inputs = tune(vlm.model, mode).train(), vlm.prompts([[3, "a", 2], [2, "b", 1, "c", 3]], side="right")
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] >= 90) | (inputs["attention_mask"] == 0), -100)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert all("ademvl_" in key for key in trained)

    other = vlm.prompts([[5, "b", 1], [3]], seed=1, side="right")

    def gradients() -> dict[str, Tensor]:
        """Of two forwards, the second of which is not what the first one's layers are to see when they run again."""
        model.zero_grad()
        first = model(**inputs, labels=labels).loss
        (first + model(**other).logits.square().mean()).backward()
        return {key: p.grad.clone() for key, p in trained.items()}

    whole = gradients()
    assert all(bool(grad.any()) for grad in whole.values())
    model.gradient_checkpointing_enable()
    for key, grad in gradients().items():
        torch.testing.assert_close(grad, whole[key], rtol=1e-4, atol=1e-5)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(NotImplementedError, match="use_reentrant"):
        gradients()
    model.disable_input_require_grads()
    with model.eval().disable_adapter(), torch.no_grad():
        assert torch.equal(model(**inputs).logits, fresh(name).model(**inputs).logits), "nothing is left behind"


def test_every_parameter_has_a_gradient_without_a_picture(fresh):
    """Distributed training waits for all."""
    vlm = fresh("llava")
    model = tune(vlm.model, "replace").train()
    inputs = vlm.prompts([[6], [3]], side="right")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in grads.values())
    assert all(not grad.any() for key, grad in grads.items() if "_proj" in key or "_cls" in key)
    assert all(grad.any() for key, grad in grads.items() if "_e1" in key or "_e2" in key)


@pytest.mark.parametrize("settings", [{"gamma": 1.0}, {"gamma": -0.1}, {"alpha": math.nan}, {"init_std": -1.0}])
def test_numbers_out_of_range(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AdemVLConfig(**settings)


def test_other_bad_settings(fresh, tuned):
    for settings in ({"grids": []}, {"grids": [0]}, {"grids": 16}, {"hidden": 0}, {"mode": "both"}, {"gate": "one"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            AdemVLConfig(**settings)
    with pytest.raises(TypeError, match="alpha='much'"):
        AdemVLConfig(alpha="much")
    with pytest.raises(TypeError, match="beta=True"):
        AdemVLConfig(beta=True)
    model, vlm = tuned("llava", "augment")
    inputs = vlm.prompts([[3, "a", 2]])
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="cannot be merged"):
            merge()
    output = vlm.model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    given = {"input_ids": inputs["input_ids"], "mm_encoder_outputs": {"image": output}}
    with pytest.raises(ValueError, match="carry no features for ademvl"):
        model(**given)
    embeds = vlm.model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(NotImplementedError, match="inputs_embeds"):
        model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"])
    replacing, _ = tuned("llava", "replace")
    with pytest.raises(RuntimeError, match="not its base model"):
        replacing.get_base_model().model(**inputs)
    with torch.no_grad():
        direct = model.get_base_model().model(**inputs).last_hidden_state
        assert torch.equal(model.get_base_model().lm_head(direct), model(**inputs).logits)


# --- mode replace --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_replace_shortens_the_prompt(tuned, name):
    """Length, positions, FLOPs with the tower; labels follow their tokens."""
    model, vlm = tuned(name, "replace")
    rows = [[3, "a", 4], [2, "b", 1, "c", 6]]
    inputs = vlm.prompts(rows, side="right")
    ids = inputs["input_ids"]
    labels = ids.masked_fill((ids >= 90) | (inputs["attention_mask"] == 0), -100)
    seen: dict[str, Any] = {}
    handle = model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        output = model(**inputs, labels=labels)
    handle.remove()
    mask = seen["attention_mask"]
    picture = [len(vlm.picture("a").ids) - 1, len(vlm.picture("b").ids) + len(vlm.picture("c").ids) - 2]
    whole = inputs["attention_mask"].sum(1)
    assert mask.sum(1).tolist() == (whole - torch.tensor(picture)).tolist()
    place = seen["position_ids"].reshape(-1, *mask.shape)
    for row, real in enumerate(mask.sum(1).tolist()):
        assert all(torch.equal(axis[row, :real], torch.arange(real)) for axis in place)
    short = torch.full_like(mask, -100)
    for row in range(2):
        kept = seen["input_ids"][row]
        short[row] = kept.masked_fill((kept >= 90) | (mask[row] == 0), -100)
    loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), short[:, 1:].flatten())
    torch.testing.assert_close(output.loss, loss)
    counts = []
    for one in (model, vlm.model):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one(**inputs)
        counts.append(counter.get_total_flops())
    assert counts[0] < counts[1]
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**inputs).logits, vlm.model(**inputs).logits)


def test_two_adapters_with_modes_of_their_own(fresh):
    vlm = fresh("llava")
    inputs = vlm.prompts([[3, "a", 4]])
    width = inputs["input_ids"].shape[1]
    with torch.no_grad():
        plain = vlm.model(**inputs).logits
        model = tune(vlm.model, "augment")
        alone = model(**inputs).logits
        model.add_adapter("short", AdemVLConfig(mode="replace", **(STRONG | {"grids": [2]})))
        assert torch.equal(model(**inputs).logits, alone)
        model.set_adapter("short")
        assert model(**inputs).logits.shape[1] == width - 35
        model.add_adapter("shorter", AdemVLConfig(mode="replace", layers_to_transform=[1], **STRONG))
        model.base_model.set_adapter(["short", "shorter"])
        with pytest.raises(NotImplementedError, match="activate one"):
            model(**inputs)
        model.base_model.set_adapter(["default", "short"])
        both = model(**inputs).logits
        assert both.shape[1] == width - 35
        model.delete_adapter("short")
        model.delete_adapter("shorter")
        model.set_adapter("default")
        cache = model(**inputs).past_key_values
        assert torch.equal(model(**inputs).logits, alone)
        model.add_adapter("late", AdemVLConfig(mode="augment", **STRONG))
        model.set_adapter("late")
        with pytest.raises(ValueError, match="'late' was not active"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        base = model.unload()
        assert torch.equal(base(**inputs).logits, plain)
        assert not [key for key in vars(base) if key.startswith("vlmfast")] and "get_image_features" not in vars(
            base.model
        )


def test_through_transformers(fresh):
    """`model.add_adapter`: the shared parts lie in a layer, none on the tuner."""
    vlm = fresh("llava")
    inputs = vlm.prompts(ROWS)
    torch.manual_seed(3)
    vlm.model.add_adapter(AdemVLConfig(mode="replace", **STRONG), adapter_name="one")
    vlm.model.eval()
    with torch.no_grad():
        logits = vlm.model(**inputs).logits
        assert logits.shape[1] < inputs["input_ids"].shape[1]
        vlm.model.disable_adapters()
        assert torch.equal(vlm.model(**inputs).logits, fresh("llava").model(**inputs).logits)
        vlm.model.enable_adapters()
        assert torch.equal(vlm.model(**inputs).logits, logits)


# --- with patches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    pairs([("llava", "augment"), ("llava", "replace")], augment="qwen2_5_vl", replace="qwen2_5_vl"),
)
def test_patched_and_unpatched(tuned, name, mode):
    """Methods on top work on every row as alone, or say why not; after them the model is as before."""
    model, vlm = tuned(name, mode)
    inputs, how = vlm.prompts(ROWS), {"max_new_tokens": 2, "do_sample": False}
    width = inputs["input_ids"].shape[1]
    encoder = model.get_base_model().model.get_image_features
    with torch.no_grad():
        before = model(**inputs).logits
    pruning = ["hiprune:keep=0.5", "fastv:keep=0.5", "vcd+random:keep=0.5"]
    for spec in [*pruning, "zerotuning:gamma=2", "m3id", "vhr", "opera"]:
        scores = encoder.scores
        if spec in pruning and mode == "replace":
            with pytest.raises(NotImplementedError, match="one token of each picture"):
                vlmfast.patch(model, spec)
            continue
        beams = 2 if spec == "opera" else 1
        with vlmfast.patch(model, spec) as handle:
            assert model.get_base_model().model.get_image_features is encoder, "one encoder for both"
            tokens = model.generate(**inputs, **how, num_beams=beams)
            assert str(handle.report())
            with pytest.raises(RuntimeError, match="unpatch"):
                model.unload()
            for row in (1, 2):
                alone = vlm.prompts(ROWS, only=row)
                own = model.generate(**alone, **how, num_beams=beams)[0, alone["input_ids"].shape[1] :]
                assert torch.equal(own, tokens[row, width:]), spec
        assert encoder.scores == scores and set(encoder.places) == set(scores)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, before), spec


def test_pruned_prompts_look_at_whole_pictures(tuned):
    model, vlm = tuned("llava", "augment")
    oracle, inputs = Oracle(model, vlm), vlm.prompts([[3, "a", 4]])
    with vlmfast.patch(model, "hiprune:keep=0.5"), torch.no_grad():
        logits = model(**inputs).logits
    entries = oracle.entries([3, "a", 4])
    with vlmfast.patch(vlm.model, "hiprune:keep=0.5"), oracle.looking(entries):
        expected = vlm.model(**inputs).logits
    assert logits.shape == expected.shape and logits.shape[1] == inputs["input_ids"].shape[1] - 18
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=2e-4)


def test_a_patched_model_takes_no_adapter(fresh):
    model = fresh("llava").model
    with vlmfast.patch(model, "hiprune:keep=0.5"), pytest.raises(RuntimeError, match="then patch"):
        tune(model)
