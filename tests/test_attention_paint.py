"""PAINT: two sets of visual tokens by the tower's attention, and their scores on full maps."""

from __future__ import annotations

import inspect
import statistics
from typing import Any

import pytest
import torch
from attention_oracle import full_maps
from test_promises import ROWS, encoder_inputs, snapshot
from tiny import IMAGE, VIDEO
from torch import Tensor

import vlmfast
from vlmfast.adapters import support
from vlmfast.adapters.attention.paint import PAINT, informed
from vlmfast.encoding import encode_images, encoder_outputs

ALPHA, BETA = 3.0, 1.5
SETTINGS: dict[str, Any] = {"alpha": ALPHA, "beta": BETA, "gamma": 1, "layers": "1:"}


def by_hand(early: list[float], late: list[float], ratio: float) -> list[int]:
    """The codes of n tokens, one at a time."""
    n = len(late)
    ordered = sorted(late)

    def quartile(share: float) -> float:
        place = share * (n - 1)
        below = int(place)
        above = ordered[min(below + 1, n - 1)]
        return ordered[below] + (place - below) * (above - ordered[below])

    bound = quartile(0.75) + 1.5 * (quartile(0.75) - quartile(0.25))
    largest = sorted(range(n), key=lambda i: (-early[i], i))[: int(ratio * n)]
    return [2 if late[i] > bound else int(i in largest) for i in range(n)]


@pytest.mark.parametrize("n", [4, 16, 36, 49, 576])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.25, 1.0])
def test_the_two_sets_in_plain_loops(n, ratio):
    generator = torch.Generator().manual_seed(n)
    early, late = torch.rand(n, generator=generator), torch.randn(n, generator=generator).exp() ** 2
    codes = informed(early, late, ratio)
    assert codes.tolist() == by_hand(early.tolist(), late.tolist(), ratio)
    if n > 4:
        assert (codes == 2).any(), "outliers"
        assert statistics.mean(late[codes == 2].tolist()) > statistics.mean(late[codes != 2].tolist())
    scaled = informed(early * 3, late * 0.01, ratio)
    assert torch.equal(scaled, codes), "sums over heads rank as means do"


def test_the_official_number_of_outliers():
    """A share of n, times n, rounded down."""
    n, count = next((n, c) for n in range(40, 60) for c in range(1, n // 4) if int(n * (c / n)) < c)
    late = torch.linspace(1, 1.1, n)
    late[:count] += 50 + torch.arange(count)
    assert int((informed(late, late, 0.0) == 2).sum()) == count
    official = informed(late, late, 0.0, official=True)
    assert int((official == 2).sum()) == count - 1 and official[0] == 0, "the smallest of them is left out"


def encoded(vlm: Any, inputs: dict[str, Tensor], methods: Any) -> list[Any]:
    """The pictures, with the statistics that methods want."""
    pixels, others = encoder_inputs(vlm, inputs)
    name = next(iter(inspect.signature(vlm.model.model.get_image_features).parameters))
    return encode_images(vlm.model, methods, **{name: pixels}, **others)


def coded(vlm: Any, inputs: dict[str, Tensor], method: PAINT) -> Tensor:
    """The codes of all columns of the prompts, by hand from the pictures' statistics. [B, L]"""
    images = iter(encoded(vlm, inputs, [method]))
    wanted = method.wanted(vlmfast.families.family_of(vlm.model).tower(vlm.model.config))
    codes = torch.zeros_like(inputs["input_ids"])
    for row, ids in enumerate(inputs["input_ids"]):
        columns = (ids == IMAGE).nonzero().flatten().tolist()
        while columns:
            image = next(images)
            early, late = (image.statistics[wanted[name]] for name in ("early", "late"))
            slots = range(len(image)) if image.slots is None else image.slots.tolist()
            for view in image.views:
                index = view.index.tolist()
                found = by_hand(early[index].tolist(), late[index].tolist(), method.ratio)
                for token, code in zip(index, found):
                    codes[row, columns[slots[token]]] = code
            del columns[: image.span]
    return codes


def boosted_maps(codes: Tensor, layers: list[int]):
    """The oracle: scores one by one, in the last row of a call."""

    def edit(layer, scores, hidden):
        if layer not in layers:
            return scores
        scores = scores.detach().clone()
        for row in range(len(scores)):
            for column in range(codes.shape[1]):
                rise = (0, ALPHA, BETA)[int(codes[row, column])]
                for head in range(scores.shape[1]):
                    s = float(scores[row, head, -1, column])
                    if rise and s > -torch.inf:
                        scores[row, head, -1, column] = s + rise * abs(s)
        return scores

    return edit


def needed(vlm: Any) -> dict[str, Any]:
    return support("paint", vlm.name).needs


def test_equals_full_maps(any_vlm):
    model, inputs = any_vlm.model, any_vlm.prompts(ROWS)
    method = PAINT(**SETTINGS, **needed(any_vlm))
    codes = coded(any_vlm, inputs, method)
    assert (codes[:2] == 1).any(1).all() and not codes[2].any()
    types = getattr(model.config.get_text_config(), "layer_types", None)
    depth = model.config.get_text_config().num_hidden_layers
    layers = [n for n in range(1, depth) if types is None or types[n] != "linear_attention"]
    how, real = {"max_new_tokens": 4, "do_sample": False}, inputs["attention_mask"].bool()
    plain = model(**inputs).logits
    with full_maps(model, boosted_maps(codes, layers), before_softmax=True):
        expected = model(**inputs).logits
        tokens = model.generate(**inputs, **how)
    before = snapshot(model)
    with vlmfast.patch(model, method) as handle:
        found = model(**inputs).logits
        torch.testing.assert_close(found[real], expected[real], rtol=1e-3, atol=2e-4)
        assert torch.equal(model.generate(**inputs, **how), tokens)
        notes = " ".join(handle.report().notes)
    assert snapshot(model) == before
    assert torch.equal(found[2, -1], plain[2, -1]), "a prompt without a picture"
    assert (found[:2, -1] - plain[:2, -1]).abs().amax(-1).min() > 1e-2
    assert ("no CLS in this tower" in notes) == bool(needed(any_vlm))


def test_what_is_asked_of_a_clip_tower(fresh):
    """The CLS rows of blocks 0 and -2, from its own queries and keys; outliers included."""
    vlm = fresh("llava")
    inputs, model = vlm.prompts([["a", 3], ["b", 4]]), vlm.model
    layers = (
        model.model.vision_tower.vision_model.encoder.layers
        if hasattr(model.model.vision_tower, "vision_model")
        else model.model.vision_tower.encoder.layers
    )
    seen: dict[int, Tensor] = {}
    hooks = [
        layers[n].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, n=n: seen.__setitem__(n, args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for n in (0, len(layers) - 2)
    ]
    images = encoded(vlm, inputs, [PAINT()])
    for hook in hooks:
        hook.remove()
    rows = {}
    for n, hidden in seen.items():
        attention = layers[n].self_attn
        query, key = (
            project(hidden).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj)
        )
        rows[n] = (query[:, :, :1] @ key.transpose(-1, -2) * attention.scale).softmax(-1)[:, :, 0, 1:].sum(1)
    codes = coded(vlm, inputs, PAINT())
    for number in range(2):
        expected = by_hand(rows[0][number].tolist(), rows[len(layers) - 2][number].tolist(), 0.25)
        assert codes[number][inputs["input_ids"][number] == IMAGE].tolist() == expected
        assert len(images[number]) == len(expected)


class Marks:
    """Notes the codes of the keys of every call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        edit = PAINT.edit
        monkeypatch.setattr(PAINT, "edit", lambda method, call: self.calls.append(call) or edit(method, call))


def test_views_choose_each_for_themselves(fresh, monkeypatch):
    """Thumbnail and crops: a quarter of each, of what is no padding; newlines are of neither set."""
    vlm, noted = fresh("llava_next"), Marks(monkeypatch)
    inputs = vlm.prompts([[3, "a", 2], [2, "b", 1, "c", 6]])
    method = PAINT(alpha=ALPHA, gamma=1)
    codes = coded(vlm, inputs, method)
    images = encoded(vlm, inputs, [method])
    assert max(len(image.views) for image in images) > 2 and any(image.slots is not None for image in images)
    with vlmfast.patch(vlm.model, method):
        vlm.model(**inputs)
    assert torch.equal(noted.calls[0].marks["paint"].long(), codes)
    expected = sum(
        int(0.25 * len(view)) for image in images for view in image.views
    )  # but for those that are of both sets
    assert 0 < int((codes == 1).sum()) <= expected


@pytest.mark.parametrize("family", ["video_llava", "llava_onevision", "qwen2_5_vl"])
def test_frames_choose_each_for_themselves(fresh, monkeypatch, family):
    vlm, noted = fresh(family), Marks(monkeypatch)
    inputs = vlm.prompts([[3, "A", 2], [2, "b", 1, "A", 6]])
    method = PAINT(alpha=ALPHA, gamma=1, **needed(vlm))
    with vlmfast.patch(vlm.model, method):
        vlm.model(**inputs)
    call = noted.calls[0]
    codes = [call.marks["paint"][row][inputs["input_ids"][row] == VIDEO] for row in range(2)]
    assert torch.equal(*codes), "the same video in both rows"
    name = "get_video_features"
    names = set(inspect.signature(getattr(vlm.model.model, name)).parameters) & set(inputs)
    videos = encode_images(vlm.model, [method], modality="video", **{n: inputs[n] for n in names})
    frames = [view for view in videos[0].views if view.kind == "frame"]
    assert len(frames) > 1
    slots = torch.arange(len(videos[0])) if videos[0].slots is None else videos[0].slots
    for frame in frames:
        local = int((codes[0][slots[frame.index]] == 1).sum())
        assert local <= int(0.25 * len(frame)) and bool((codes[0][slots[frame.index]] != 0).any())


@pytest.mark.parametrize("other", ["fastervlm:keep=0.5", "random:keep=0.4", "fastv:keep=0.5,layer=1"])
def test_behind_methods_that_drop_tokens(fresh, monkeypatch, other):
    """A code belongs to the picture's own token, wherever that stands now."""
    vlm, noted = fresh("llava"), Marks(monkeypatch)
    inputs = vlm.prompts(ROWS)
    codes = coded(vlm, inputs, PAINT())
    with vlmfast.patch(vlm.model, f"{other}+paint:gamma=1,layers=2") as handle:
        vlm.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        report = handle.report()
    first = noted.calls[0]
    kept = [one.indices for one in report.images]
    if other.startswith("fastv"):  # what stays is known in the layers: as many of them as it says
        assert first.visual.sum(1).tolist() == [p.per_layer[-1] for p in report.prompts]
        assert 0 < int((first.marks["paint"] != 0).sum()) < int((codes != 0).sum())
        return
    spans = [codes[row][inputs["input_ids"][row] == IMAGE].split(36) for row in range(2)]
    expected = [[part[k] for part, k in zip(spans[0], kept[:1])], [part[k] for part, k in zip(spans[1], kept[1:])]]
    for row in range(2):
        found = first.marks["paint"][row][first.visual[row]].long()
        assert torch.equal(found, torch.cat(expected[row])) and bool(found.any())
    assert not first.marks["paint"][~first.visual].any()
    later = noted.calls[-1]
    assert torch.equal(later.marks["paint"][:, : first.key.shape[2]], first.marks["paint"])
    assert not later.marks["paint"][:, first.key.shape[2] :].any()


def test_pictures_that_were_encoded_before(vlm):
    """With the method named, their statistics are known; without, that is said."""
    inputs = vlm.prompts(ROWS)
    method = PAINT(alpha=ALPHA, gamma=2, **needed(vlm))
    how = {"max_new_tokens": 4, "do_sample": False}
    with_statistics, without = encoded(vlm, inputs, [method]), encoded(vlm, inputs, [])
    with vlmfast.patch(vlm.model, method):
        expected = vlm.model.generate(**inputs, **how)
        given = {name: value for name, value in inputs.items() if name != "pixel_values"}
        assert torch.equal(
            vlm.model.generate(**given, **how, mm_encoder_outputs=encoder_outputs(with_statistics)), expected
        )
        with pytest.raises(ValueError, match="encoded without Score"):
            vlm.model.generate(**given, **how, mm_encoder_outputs=encoder_outputs(without))


def test_beams_and_several_answers(vlm, monkeypatch):
    """Every row of a prompt has the codes of its own pictures."""
    noted, inputs = Marks(monkeypatch), vlm.prompts(ROWS)
    method = PAINT(alpha=ALPHA, gamma=1, **needed(vlm))
    codes = coded(vlm, inputs, method)
    with vlmfast.patch(vlm.model, method):
        vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=3)
    for call in noted.calls:
        assert torch.equal(call.marks["paint"][:, : codes.shape[1]].long(), codes.repeat_interleave(3, 0))


def test_towers(fresh):
    """Without CLS: refused, unless the fallback is chosen; of towers with windows, layers that see everything."""
    vlm = fresh("qwen2_5_vl")
    before = snapshot(vlm.model)
    for spec in ("paint", "paint:gamma=1"):
        with pytest.raises(NotImplementedError, match="paint:fallback=received"):
            vlmfast.patch(vlm.model, spec)
        assert snapshot(vlm.model) == before
    tower = vlmfast.families.family_of(vlm.model).tower(vlm.model.config)
    wanted = PAINT(fallback="received").wanted(tower)
    assert {score.layer for score in wanted.values()} <= set(tower.full_layers)
    assert {score.kind for score in wanted.values()} == {"column_mean"}
    clip = fresh("llava").model
    tower = vlmfast.families.family_of(clip).tower(clip.config)
    wanted = PAINT(fallback="received").wanted(tower)
    assert [(score.layer, score.kind) for score in wanted.values()] == [(0, "cls_row"), (tower.depth - 2, "cls_row")]
    assert PAINT(alpha=0, beta=0).wanted(tower) == {}


def test_the_first_token_of_the_official_code_is_not_boosted(vlm):
    inputs = vlm.prompts([[3, "a", 4]])
    plain = vlm.model(**inputs).logits
    for parity in ("official", "repaired"):
        for gamma in (1, 1.1):
            with vlmfast.patch(vlm.model, PAINT(**SETTINGS | {"gamma": gamma}, parity=parity, **needed(vlm))):
                found = vlm.model(**inputs).logits
            assert torch.equal(found, plain) == (parity == "official" and gamma != 1)


def test_settings():
    for settings in (
        {"alpha": -1},
        {"beta": "x"},
        {"ratio": 1.5},
        {"ratio": True},
        {"gamma": -2},
        {"fallback": "cls"},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            PAINT(**settings)
    assert PAINT(alpha=0, beta=0, gamma=1).neutral
    assert not any(
        PAINT(**{"alpha": 0, "beta": 0, "gamma": 1, name: 0.5}).neutral for name in ("alpha", "beta", "gamma")
    )
