"""VisionZip, DivPrune, CDPruner and VisPruner: equations in plain loops, repaired failures, bad input, real models."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import math
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch.nn.functional import cosine_similarity

import vlmfast
from vlmfast.adapters import CDPruner, DivPrune, VisionZip, VisPruner, from_spec, support
from vlmfast.adapters.pruning.cdpruner import greedy_map, relevance
from vlmfast.adapters.pruning.divprune import max_min, nearest_similarity
from vlmfast.adapters.pruning.visionzip import merge, take_apart
from vlmfast.adapters.pruning.vispruner import diverse, important_and_diverse
from vlmfast.encoding import encode_images
from vlmfast.families import FAMILIES
from vlmfast.visual import Cosines, View, VisualTokens, apportion, unit

NAMES = ("cdpruner", "divprune", "visionzip", "vispruner")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(n: int = 24, views: int = 1, seed: int = 0, **changes: Any) -> VisualTokens:
    """A picture with everything the four methods ask for; views of equal size, interleaved token by token."""
    scores = {"attention": random(n, seed=seed + 1).exp(), "keys": random(n, 6, seed=seed + 2)}
    scores["hidden"] = random(n, 7, seed=seed + 3)
    scores["cls"] = random(views, 7, seed=seed + 4)[torch.arange(n) % views]
    parts = tuple(View(torch.arange(i, n, views), (1, n // views)) for i in range(views))
    matrix = random(7, 8, seed=9)
    settings: dict[str, Any] = {
        "scores": scores,
        "views": parts,
        "text": random(5, 8, seed=seed + 5),
        "project": lambda hidden: hidden @ matrix,
    }
    settings |= changes
    return VisualTokens(settings.pop("features", scores["hidden"] @ matrix), (1, 1, n), n + 1, **settings)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    length = float(a.double().norm() * b.double().norm())
    return float(a.double() @ b.double()) / length if length else 0.0


# --- DivPrune ------------------------------------------------------------------------------------------------------


def farthest(x: torch.Tensor, k: int) -> list[int]:
    """Max-min diversity as the paper writes it."""
    n = len(x)
    distance = [[1 - cosine(x[i], x[j]) for j in range(n)] for i in range(n)]
    chosen = [max(range(n), key=lambda j: (min(distance[i][j] for i in range(n) if i != j), -j))]
    while len(chosen) < k:
        others = [j for j in range(n) if j not in chosen]
        chosen.append(max(others, key=lambda j: (min(distance[i][j] for i in chosen), -j)))
    return chosen


@pytest.mark.parametrize("whole", [0, 1024])
@pytest.mark.parametrize("k", [1, 2, 9, 29])
def test_divprune_is_greedy_max_min(k, whole, monkeypatch):
    """With all pairs in one block, and in several of which none is kept."""
    monkeypatch.setattr("vlmfast.adapters.pruning.divprune.WHOLE", whole)
    monkeypatch.setattr("vlmfast.adapters.pruning.divprune.ROWS", 7)
    x = random(30, 5) + 0.5
    assert max_min(x, k).tolist() == farthest(x, k)
    assert max_min(x, k, official=True).tolist() == farthest(x, k)
    kept = DivPrune(keep=k).choose(picture(30, features=x)).kept.tolist()
    assert kept == sorted(farthest(x, k))


def test_nearest_neighbours_in_blocks(monkeypatch):
    """Blocks that do not divide the number of tokens, against all pairs at once."""
    x = unit(random(37, 6))
    pairs = x @ x.T - 4 * torch.eye(37)
    for rows in (1, 5, 36, 37, 64):
        monkeypatch.setattr("vlmfast.adapters.pruning.divprune.ROWS", rows)
        torch.testing.assert_close(nearest_similarity(x), pairs.amax(0))
    assert nearest_similarity(x[:1]).tolist() == [-2]


def test_divprune_never_takes_a_token_twice():
    x = random(12, 4)
    x[5], x[9] = x[2], x[3]
    assert len(max_min(x, 12, official=True).unique()) < 12, "the official failure that is repaired"
    assert len(max_min(x, 12).unique()) == 12
    assert len(DivPrune(keep=11).choose(picture(12, features=x)).kept) == 11
    assert len(DivPrune(keep=11, parity="official").choose(picture(12, features=x)).kept) < 11
    assert any("fewer tokens" in note for note in DivPrune(parity="official").notes(None))


def test_rows_of_cosines_come_once_and_some_ahead(monkeypatch):
    x = unit(random(20, 5))
    monkeypatch.setattr(Cosines, "AHEAD", 3)
    cosines = Cosines(x)
    for token in (4, 19, 4, 7):
        torch.testing.assert_close(cosines.row(token, torch.arange(20.0)), x @ x[token])
    assert list(cosines.rows) == [4, 19, 18, 17, 7]
    assert len(Cosines(x[:2]).row(0, torch.zeros(2))) == 2, "fewer tokens than are taken ahead"


# --- CDPruner ------------------------------------------------------------------------------------------------------


def best_determinant(kernel: torch.Tensor, k: int) -> list[int]:
    """Greedy by determinants of sub-matrices, each computed from scratch."""
    chosen: list[int] = []
    for _ in range(k):
        others = [j for j in range(len(kernel)) if j not in chosen]
        chosen.append(max(others, key=lambda j: float(torch.det(kernel[[*chosen, j]][:, [*chosen, j]]))))
    return chosen


@pytest.mark.parametrize("official", [False, True])
def test_cdpruner_is_greedy_by_determinants(official):
    x, r = random(14, 9), random(14, seed=1).sigmoid()
    kernel = torch.tensor([[float(r[i] * r[j]) * cosine(x[i], x[j]) for j in range(14)] for i in range(14)]).double()
    assert greedy_map(x, r, 7, official).tolist() == best_determinant(kernel, 7)


@pytest.mark.parametrize("sign", [1, -1])
def test_cdpruner_relevance(sign):
    image, text = random(2, 6, 5), random(3, 5, seed=1)
    raw = [[sign * sum(cosine(p, t) for t in text) / 3 for p in view] for view in image]
    low, high = min(map(min, raw)), max(map(max, raw))
    expected = torch.tensor([[(value - low + 1e-6) / (high - low) for value in view] for view in raw])
    torch.testing.assert_close(relevance(image, text, negate=sign < 0), expected)


def test_cdpruner_with_equal_relevances_is_the_unconditional_process():
    x = random(16, 9)
    text = torch.zeros(2, 9)  # as near to every token as to every other
    assert relevance(x, text).tolist() == [1] * 16
    assert not relevance(x, text, official=True).isfinite().all()
    assert relevance(random(1, 9).expand(33, 9), random(4, 9, seed=1)).tolist() == [1] * 33, "rounding is no relevance"
    kept = CDPruner(keep=6).choose(picture(16, features=x, text=text)).kept
    kernel = (unit(x) @ unit(x).T).double()
    assert kept.tolist() == sorted(best_determinant(kernel, 6))
    official = CDPruner(keep=6, parity="official").choose(picture(16, features=x, text=text)).kept
    assert len(official) < 6, "the official failure that is repaired"


def test_cdpruner_beyond_the_rank_of_the_kernel():
    """More tokens than dimensions: as long as there is volume by determinant, then by relevance."""
    x, r = random(30, 6), random(30, seed=1).sigmoid()
    order = greedy_map(x, r, 20).tolist()
    kernel = (r[:, None] * (unit(x) @ unit(x).T) * r).double()
    assert order[:6] == best_determinant(kernel, 6)
    rest = [i for i in r.argsort(descending=True).tolist() if i not in order[:6]]
    assert order[6:] == rest[:14]


def test_cdpruner_looks_at_the_question_and_at_each_view():
    one = picture(24, views=2)
    other = picture(24, views=2, text=random(5, 8, seed=77))
    kept = CDPruner(keep=8).choose(one).kept
    assert sorted((kept % 2).tolist()) == [0] * 4 + [1] * 4, "four of each view"
    assert kept.tolist() != CDPruner(keep=8).choose(other).kept.tolist()
    score = relevance(one.features, one.text)
    for view in one.views:
        expected = view.index[greedy_map(one.features[view.index], score[view.index], 4)].sort().values
        assert kept[torch.isin(kept, view.index)].tolist() == expected.tolist()
    with pytest.raises(ValueError, match="no text"):
        CDPruner(keep=8).choose(picture(24, text=None))


# --- VisPruner -----------------------------------------------------------------------------------------------------


def thinned(order: list[int], x: torch.Tensor, k: int) -> list[int]:
    """The rounds of VisPruner on lists."""
    left = list(order)
    while len(left) > max(k, 0):
        if k == 0:
            return []
        candidates, partners = left[::2], left[1::2]
        nearest = {i: max(cosine(x[i], x[j]) for j in partners) for i in candidates}
        candidates.sort(key=lambda i: -nearest[i])
        left = candidates[min(8, len(left) - k, len(candidates)) :] + partners
    return left


@pytest.mark.parametrize("k", [0, 1, 2, 3, 7, 8, 20, 36, 37, 41])
@pytest.mark.parametrize("n", [41, 42])
def test_vispruner_thins_out_even_places(n, k):
    """Odd residues and fewer than eight diverse tokens, where the official code raises, included."""
    x, order = random(n, 6), random(n, seed=1).argsort()
    assert diverse(order, x, k).tolist() == thinned(order.tolist(), x, k)


@pytest.mark.parametrize("important", [0.0, 0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("keep", [1, 6, 15, 23])
def test_vispruner_parts(important, keep):
    one = picture(24)
    score, hidden = one.scores["attention"], one.scores["hidden"]
    order = score.argsort(descending=True).tolist()
    first = int(keep * important)
    a, b = important_and_diverse(score, hidden, keep, important)
    assert a.tolist() == order[:first]
    assert b.tolist() == thinned(order[first:], hidden, keep - first)
    assert VisPruner(keep=keep, important=important).choose(one).kept.tolist() == sorted(a.tolist() + b.tolist())


# --- VisionZip -----------------------------------------------------------------------------------------------------


def zipped(score, keys, hidden, dominant: int, contextual: int, official: bool):
    """VisionZip of one view in plain loops. -> dominant, targets, contextual tokens"""
    n = len(score)
    first = sorted(sorted(range(n), key=lambda i: (-float(score[i]), i))[:dominant])
    rest = [i for i in range(n) if i not in first]
    targets = rest[:: max(1, len(rest) // contextual)][:contextual]
    members: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if i not in targets:
            members[max(targets, key=lambda t: cosine(keys[i], keys[t]))].append(i)
    tokens = []
    for target, group in members.items():
        if official:
            tokens.append(hidden[target] + (hidden[group].mean(0) if group else 0))
        else:
            tokens.append(hidden[[target, *group]].mean(0))
    return first, targets, torch.stack(tokens)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize(("dominant", "contextual"), [(5, 3), (0, 4), (12, 12), (3, 20), (23, 1)])
def test_visionzip_of_a_view(dominant, contextual, official):
    one = picture(24)
    score, keys, hidden = (one.scores[name] for name in ("attention", "keys", "hidden"))
    first, targets, tokens = zipped(score, keys, hidden, dominant, contextual, official)
    parts = take_apart(score, keys, dominant, contextual)
    assert parts.dominant.tolist() == first and parts.targets.tolist() == targets
    assert parts.assign[parts.targets].tolist() == list(range(contextual))
    assert set(parts.assign[parts.dominant].tolist()) <= {-1}
    torch.testing.assert_close(merge(hidden, parts, official), tokens)


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("project", [True, False])
def test_visionzip_puts_contextual_tokens_in_the_place_of_their_targets(views, project):
    one = picture(24, views) if project else picture(24, views, project=None)
    choice = VisionZip(keep=8, contextual=0.25).choose(one)
    expected = one.features.clone()
    kept = []
    for view in one.views:
        score, keys, hidden = (one.scores[name][view.index] for name in ("attention", "keys", "hidden"))
        features = hidden if project else one.features[view.index]
        first, targets, tokens = zipped(score, keys, features, 6 // views, 2 // views, official=False)
        kept += view.index[first + targets].tolist()
        expected[view.index[targets]] = one.project(tokens) if project else tokens
    assert choice.kept.tolist() == sorted(kept)
    torch.testing.assert_close(choice.features, expected[choice.kept])


@pytest.mark.parametrize("views", [1, 2])
def test_visionzip_official_layout(views):
    """CLS, dominant, contextual, view after view, over as many places; CLS counts as one of the dominant."""
    slots = torch.arange(24) + torch.arange(24) // 5  # a newline after every five tokens
    one = picture(24, views, slots=slots, span=29, newline=torch.zeros(8))
    choice = VisionZip(keep=8, contextual=0.25, parity="official").choose(one)
    expected = []
    for view in one.views:
        score, keys, hidden = (one.scores[name][view.index] for name in ("attention", "keys", "hidden"))
        first, _, tokens = zipped(score, keys, hidden, 6 // views - 1, 2 // views, official=True)
        expected += [one.project(one.scores["cls"][view.index[:1]]), one.features[view.index[first]]]
        expected.append(one.project(tokens))
    torch.testing.assert_close(choice.features, torch.cat(expected))
    assert len(choice.kept) == 8 - views and len(choice.slots) == 8
    assert choice.slots.tolist() == sorted(set(choice.slots.tolist()))
    assert set(slots[choice.kept].tolist()) < set(choice.slots.tolist()) <= set(slots.tolist())


def test_visionzip_budgets_of_the_paper():
    for total, contextual in ((64, 10), (128, 20), (192, 30), (32, 5)):
        assert VisionZip(keep=total)._contextual(total) == contextual


def test_visionzip_contextual_at_its_limits():
    one = picture(24)
    plain = VisionZip(keep=8, contextual=0).choose(one)
    assert plain.kept.tolist() == one.scores["attention"].argsort(descending=True)[:8].sort().values.tolist()
    assert plain.features is None, "nothing is merged"
    assert len(VisionZip(keep=8, contextual=1.0).choose(one).kept) == 8
    assert len(VisionZip(keep=23, contextual=23).choose(one).kept) == 23
    assert len(VisionZip(keep=1, contextual=1).choose(one).kept) == 1
    with pytest.raises(ValueError, match="contextual=9 tokens of 8"):
        VisionZip(keep=8, contextual=9).choose(one)
    with pytest.raises(ValueError, match="CLS needs one"):
        VisionZip(keep=8, contextual=8, parity="official").choose(one)
    with pytest.raises(ValueError, match="20 dominant and 5 contextual tokens of 24"):
        take_apart(one.scores["attention"], one.scores["keys"], 20, 5)
    with pytest.raises(NotImplementedError, match="token by token"):
        VisionZip(keep=8, parity="official").choose(picture(24, project=None))


# --- all four ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("kind", ["constant", "duplicates", "zeros", "one direction", "tiny", "huge"])
@pytest.mark.parametrize("name", NAMES)
def test_never_fewer_tokens_than_asked(name, kind, views):
    """Degenerate features, keys and scores: still `keep` different tokens, and finite features."""
    n = 24
    bad = {
        "constant": torch.ones(n, 8),
        "duplicates": random(4, 8).repeat(n // 4, 1),
        "zeros": torch.zeros(n, 8),
        "one direction": torch.arange(-5, n - 5)[:, None] * random(8),
        "tiny": random(n, 8) * 1e-30,
        "huge": random(n, 8) * 1e15,
    }[kind]
    scores = {"attention": torch.full((n,), 0.5), "keys": bad[:, :6], "hidden": bad[:, :7]}
    one = picture(n, views, features=bad, scores=scores)
    for keep in (1, 2, 5, 8, 13, 23, 24):
        choice = from_spec(f"{name}:keep={keep}")[0].choose(one)
        assert len(choice.kept) == keep
        assert choice.kept.tolist() == sorted(set(choice.kept.tolist()))
        assert choice.features is None or choice.features.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_choices_are_made_in_fp32_and_repeat(name):
    one, k = picture(24, views=2), 10
    half = picture(24, views=2, features=one.features.bfloat16(), project=None)
    full = picture(24, views=2, features=one.features.bfloat16().float(), project=None)
    method = from_spec(f"{name}:keep={k}")[0]
    assert torch.equal(method.choose(half).kept, method.choose(full).kept)
    assert torch.equal(method.choose(one).kept, method.choose(one).kept)


@pytest.mark.parametrize(
    "spec",
    [
        "divprune:parity=paper",
        "cdpruner:parity=paper",
        "visionzip:parity=paper",
        "visionzip:contextual=-1",
        "visionzip:contextual=1.5",
        "visionzip:contextual=nan",
        "visionzip:contextual=some",
        "visionzip:contextual=True",
        "visionzip:fallback=none",
        "vispruner:important=2",
        "vispruner:important=nan",
        "vispruner:important=True",
        "vispruner:important=half",
        "cdpruner:negate=1",
    ],
)
def test_settings_that_cannot_be(spec):
    with pytest.raises((ValueError, TypeError), match=spec.partition(":")[2].partition("=")[0]):
        from_spec(spec)


# --- on models -----------------------------------------------------------------------------------------------------


def encoded(vlm, methods, inputs) -> list[VisualTokens]:
    """The images among the inputs, with what the methods want."""
    names = inspect.signature(vlm.model.model.get_image_features).parameters
    return encode_images(vlm.model, methods, **{name: inputs[name] for name in names if name in inputs})


def with_scores(visual: VisualTokens, method, tower) -> VisualTokens:
    return dataclasses.replace(visual, scores={n: visual.statistics[s] for n, s in method.wanted(tower).items()})


def test_projected_tower_outputs_are_the_visual_tokens(any_vlm):
    """What VisionZip relies on where a family names a projector."""
    vlm = any_vlm
    tower = FAMILIES[vlm.name].tower(vlm.model.config)
    if FAMILIES[vlm.name].projector is None or tower.layers > 1:
        method = VisionZip(parity="official", **support("visionzip", vlm.name).needs)
        with pytest.raises(NotImplementedError, match="token by token"):
            vlmfast.patch(vlm.model, method)
        return
    method = VisionZip(**support("visionzip", vlm.name).needs)
    for visual in encoded(vlm, [method], vlm.prompts([[2, "a", 1, "b", 2]])):
        hidden = with_scores(visual, method, tower).scores["hidden"]
        with torch.no_grad():
            torch.testing.assert_close(visual.project(hidden), visual.features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_patched_models_choose_as_the_method_does(vlm, name):
    """Same choice through the door as by hand, and the report says what was used."""
    spec = name + "".join(f":{k}={v}" for k, v in support(name, vlm.name).needs.items())
    method = from_spec(spec)[0]
    inputs = vlm.prompts([[3, "a", 5]])
    tower = FAMILIES[vlm.name].tower(vlm.model.config)
    visual = with_scores(encoded(vlm, [method], inputs)[0], method, tower)
    text = vlm.model.get_input_embeddings()(inputs["input_ids"][0, -5:]).float()
    expected = method.choose(VisualTokens(**vars(visual) | {"text": text}))
    seen = {}

    def look(module, args, kwargs):
        seen.update(kwargs)

    hook = vlm.model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    with vlmfast.patch(vlm.model, spec) as handle, torch.no_grad():
        vlm.model(**inputs)
        report = handle.report()
    hook.remove()
    assert torch.equal(report.kept[0], expected.kept) and len(expected.kept) == round(len(visual) / 2)
    features = visual.features[expected.kept] if expected.features is None else expected.features
    tokens = seen["inputs_embeds"][0, 3 : 3 + len(expected.kept)]
    torch.testing.assert_close(tokens, features, rtol=1e-4, atol=1e-4)
    fallback = [note for note in report.notes if "no CLS" in note]
    assert bool(fallback) == (vlm.name == "qwen2_5_vl" and name in ("visionzip", "vispruner"))
    assert name not in ("visionzip", "cdpruner") or any(note.startswith(name) for note in report.notes)


def test_visionzip_from_the_tower_itself(fresh):
    """Official VisionZip of a tiny LLaVA from its own hidden states, keys and attention, computed by hand."""
    vlm = fresh("llava")
    model, inputs = vlm.model, vlm.prompts([[3, "a", 5]])
    with vlmfast.patch(model, "visionzip:keep=12,contextual=0.25,parity=official") as handle, torch.no_grad():
        model(**inputs)
        report = handle.report()
        seen = encoded_tokens(model, inputs)
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    before: dict[str, torch.Tensor] = {}
    hook = layers[-2].register_forward_pre_hook(lambda module, args: before.update(x=args[0]))
    after = layers[-2].register_forward_hook(
        lambda module, args, out: before.update(y=out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model.model.get_image_features(inputs["pixel_values"])
        block = layers[-2]
        normed = block.layer_norm1(before["x"])[0]
        keys, queries = (f(normed).view(37, 4, 8) for f in (block.self_attn.k_proj, block.self_attn.q_proj))
        attention = torch.einsum("hd,nhd->hn", queries[0], keys).div(math.sqrt(8)).softmax(-1).mean(0)[1:]
        hidden = before["y"][0]
        first, targets, tokens = zipped(attention, keys.mean(1)[1:], hidden[1:], 8, 3, official=True)
        expected = model.model.multi_modal_projector(torch.cat([hidden[:1], hidden[1:][first], tokens]))
    hook.remove()
    after.remove()
    assert report.kept[0].tolist() == sorted(first + targets) and report.images[0].kept == 12
    torch.testing.assert_close(seen[3:15], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_visionzip_trains_the_projector(fresh, name):
    """Merged features are part of the graph: the projector's gradient is that of the loss, by finite differences."""
    vlm = fresh(name)
    inputs = vlm.prompts([[3, "a", 5]])
    projector = vlm.model.model.visual.merger if name == "qwen2_5_vl" else vlm.model.model.multi_modal_projector
    weight = [p for p in projector.parameters() if p.ndim == 2][-1]
    needs = {"fallback": "received"} if name == "qwen2_5_vl" else {}
    with vlmfast.patch(vlm.model, VisionZip(keep=6, contextual=6, **needs)):
        vlm.model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 90, -100)).loss.backward()
        step = weight.grad / weight.grad.norm()
        losses = []
        with torch.no_grad():
            for sign in (1, -2):
                weight += sign * 1e-2 * step
                labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == 90, -100)
                losses.append(float(vlm.model(**inputs, labels=labels).loss))
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(weight.grad.norm()), rel=0.1)


def encoded_tokens(model, inputs) -> torch.Tensor:
    """What enters the decoder for the first row. [L, D]"""
    seen: dict[str, Any] = {}
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    return seen["inputs_embeds"][0]


def test_cls_methods_refuse_a_tower_without_cls_unless_told(any_vlm):
    vlm = any_vlm
    for name in ("visionzip", "vispruner"):
        if FAMILIES[vlm.name].cls:
            assert support(name, vlm.name).needs == {}
            continue
        assert support(name, vlm.name).needs == {"fallback": "received"}
        with pytest.raises(NotImplementedError, match=f"{name}:fallback=received"):
            vlmfast.patch(vlm.model, name)


@pytest.mark.parametrize("name", NAMES)
def test_videos_are_pruned_frame_by_frame(any_vlm, name):
    """An image and a video of one prompt, each with its budget; frames share that of the video, but for DivPrune."""
    vlm = any_vlm
    if vlm.tiny.video is None:
        assert "video" not in FAMILIES[vlm.name].sources
        return
    needs = support(name, vlm.name).needs
    spec = f"{name}:keep=0.3" + "".join(f",{key}={value}" for key, value in needs.items())
    with vlmfast.patch(vlm.model, spec) as handle, torch.no_grad():
        assert vlm.model(**vlm.prompts([[3, "a", 2, "A", 5]])).logits.isfinite().all()
        report = handle.report()
    for one in report.images:
        sizes = [len(view) for view in one.views]
        assert len(one.indices) == one.kept == round(0.3 * sum(sizes))
        counts = [int(torch.isin(one.indices, view.index).sum()) for view in one.views]
        assert name == "divprune" or counts == apportion(one.kept, sizes)


def test_cosine_oracle():
    """The oracle above against torch's own."""
    a, b = random(2, 5)
    assert cosine(a, b) == pytest.approx(float(cosine_similarity(a, b, dim=0)), abs=1e-6)
    assert cosine(a, 0 * b) == 0


# --- the benchmark -------------------------------------------------------------------------------------------------


def script():
    spec = importlib.util.spec_from_file_location("bench_selection", ROOT / "scripts" / "bench_selection.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = script()


@pytest.mark.parametrize("name", bench.PRUNERS)
def test_methods_keep_what_a_straightforward_reading_keeps(name):
    """Of a made-up picture; `random` has nothing to read."""
    row = bench.measure(name, "576 -> 64", 1, [1], width=128)
    assert row["ms"][1] > 0
    assert row["equal"] is (True if name in bench.REFERENCES else None)
    assert name in bench.REFERENCES or name == "random"


def test_benchmark_prints_writes_and_notices(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    options = ["--repeats", "1", "--threads", "1", "--width", "16", "--methods", "fastervlm", "--out", str(out)]
    assert bench.main(options) == 0
    assert "fastervlm" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [row["size"] for row in rows] == list(bench.SIZES) and all(row["equal"] for row in rows)
    monkeypatch.setitem(bench.REFERENCES, "fastervlm", lambda visual, method: list(range(64)))
    assert bench.main([*options, "--sizes", "576 -> 64"]) == 1
    assert "other tokens than the straightforward reading: fastervlm" in capsys.readouterr().err
    assert bench.main(["--methods", "fastvlm"]) == 2
    assert "did you mean fastervlm?" in capsys.readouterr().err
    assert bench.main(["--repeats", "0"]) == 2
