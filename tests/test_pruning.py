"""Oracles: each method's equation in plain loops, the layout of visual tokens, and the repaired bugs."""

from __future__ import annotations

import math
import random as python_random

import pytest
import torch
from canvas import canvas_order

from vlmfast.adapters.pruning.fastervlm import FasterVLM
from vlmfast.adapters.pruning.grid import Grid, even_grid
from vlmfast.adapters.pruning.hiprune import HiPrune, hierarchical, neighbours
from vlmfast.adapters.pruning.random import Random
from vlmfast.encoding import encode_images
from vlmfast.visual import VisualTokens, budget, top, window_order


def visual(rows, columns, queries=None, seed=0, **scores):
    generator = torch.Generator().manual_seed(seed)
    n = rows * columns
    return VisualTokens(
        torch.randn(n, 4, generator=generator),
        (1, rows, columns),
        queries or n + 1,
        pixels=torch.randn(3, rows, columns, generator=generator),
        scores={name: torch.as_tensor(values, dtype=torch.float32) for name, values in scores.items()},
    )


# --- budgets and order -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "n", "expected"),
    [
        (1.0, 576, 576),
        (0.33, 144, 48),
        (0.334, 140, 47),
        (0.112, 221, 25),
        (0.5, 5, 2),
        (0.5, 7, 4),
        (0.001, 9, 1),
        (64, 576, 64),
    ],
)
def test_budget(keep, n, expected):
    assert budget(keep, n) == expected


def test_top_orders_equal_scores_by_index():
    assert top(torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0]), 4).tolist() == [1, 3, 2, 4]
    assert top(torch.zeros(500), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("grid", "window"), [((1, 4, 6), 2), ((1, 5, 7), 2), ((2, 3, 5), 4), ((1, 8, 8), 4)])
def test_window_order_in_loops(grid, window):
    t, h, w = grid
    expected = []
    for frame in range(t):
        for wy in range(math.ceil(h / window)):
            for wx in range(math.ceil(w / window)):
                for y in range(wy * window, min(h, (wy + 1) * window)):
                    for x in range(wx * window, min(w, (wx + 1) * window)):
                        expected.append((frame * h + y) * w + x)
    assert window_order(grid, window).tolist() == expected


@pytest.mark.parametrize(
    ("crops", "size"), [((2, 1), None), ((2, 2), (80, 60)), ((1, 3), (20, 100)), ((3, 1), (90, 40))]
)
def test_canvas_order_in_loops(crops, size):
    columns, rows = crops
    side = 4
    height, width = rows * side, columns * side
    top_pad = left_pad = 0
    if size is not None:
        if size[0] / size[1] > width / height:
            top_pad = (height - int(size[1] * width / size[0])) // 2
        else:
            left_pad = (width - int(size[0] * height / size[1])) // 2
    expected = [(0, i) for i in range(side * side)]
    for y in range(top_pad, height - top_pad):
        for x in range(left_pad, width - left_pad):
            expected.append((1 + (y // side) * columns + x // side, (y % side) * side + x % side))
        if size is not None:
            expected.append((-1, -1))
    view, token = canvas_order(crops, side, size)
    assert list(zip(view.tolist(), token.tolist())) == expected


# --- controls ----------------------------------------------------------------------------------------------------


def test_random_is_seeded_by_image_and_seed():
    one, two = visual(8, 8, seed=1), visual(8, 8, seed=2)
    first = Random(keep=0.25).choose(one).kept
    assert torch.equal(first, Random(keep=0.25).choose(one).kept)
    assert not torch.equal(first, Random(keep=0.25).choose(two).kept)
    assert not torch.equal(first, Random(keep=0.25, seed=1).choose(one).kept)


def test_random_is_uniform():
    """Over 400 images every token is kept about keep * 400 times (5 standard deviations)."""
    counts = torch.zeros(36)
    for seed in range(400):
        counts[Random(keep=9).choose(visual(6, 6, seed=seed)).kept] += 1
    spread = 5 * math.sqrt(400 * 0.25 * 0.75)
    assert (counts - 100).abs().max() < spread


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9, 16, 29, 48, 72, 143])
@pytest.mark.parametrize(("rows", "columns"), [(12, 12), (8, 18), (24, 6)])
def test_grid_is_even(rows, columns, k):
    kept = even_grid(rows, columns, k).tolist()
    assert len(set(kept)) == k == len(kept)
    assert min(kept) >= 0 and max(kept) < rows * columns
    if k >= 9:  # every quarter of the image holds its share, to within a row of the sub-grid
        for half_y in (0, 1):
            for half_x in (0, 1):
                inside = sum(
                    (i // columns >= rows // 2) == bool(half_y) and (i % columns >= columns // 2) == bool(half_x)
                    for i in kept
                )
                assert abs(inside - k / 4) <= math.sqrt(k) + 1


def test_grid_on_a_regular_budget_is_a_regular_grid():
    assert even_grid(12, 12, 36).tolist() == [y * 12 + x for y in range(1, 12, 2) for x in range(1, 12, 2)]


# --- FasterVLM ---------------------------------------------------------------------------------------------------


def test_fastervlm_in_loops(vlm):
    """CLS row of the feature layer, from q and k recomputed with the tower's own modules."""
    if vlm.name != "llava":
        return
    tower = vlm.model.model.vision_tower
    pixels = vlm.prompts([[1, "a", 1]])["pixel_values"]
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        block = tower.encoder.layers[2]  # hidden_states[-2] of 4 layers is the output of block 2
        inner = block.layer_norm1(states[2])
        q, k = block.self_attn.q_proj(inner)[0], block.self_attn.k_proj(inner)[0]
        image = encode_images(vlm.model, [FasterVLM(keep=0.3)], pixel_values=pixels)[0]
    scores = [0.0] * 36
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        logits = [float(q[0, part] @ k[j, part]) / math.sqrt(8) for j in range(37)]
        powers = [math.exp(x - max(logits)) for x in logits]
        for j in range(36):
            scores[j] += powers[j + 1] / sum(powers) / 4
    expected = sorted(sorted(range(36), key=lambda j: -scores[j])[:11])
    method = FasterVLM(keep=0.3)
    score = next(iter(method.wanted(family_tower(vlm)).values()))
    torch.testing.assert_close(image.statistics[score], torch.tensor(scores), rtol=1e-4, atol=1e-6)
    chosen = method.choose(
        VisualTokens(image.features, image.grid, 37, scores={"attention": image.statistics[score]})
    ).kept
    assert chosen.tolist() == expected


def family_tower(vlm):
    from vlmfast.families import family_of

    return family_of(vlm.model).tower(vlm.model.config)


# --- HiPrune -----------------------------------------------------------------------------------------------------


def hiprune_in_loops(objects, deep, k, alpha, rows, columns, official):
    """The card's steps, one by one."""
    n = rows * columns
    anchors = sorted(range(n), key=lambda j: -objects[j])[: round(k * alpha / 5)]
    both = set(anchors)
    for a in anchors:
        if official:
            both |= {min(max(b, 0), n - 1) for b in (a - 1, a + 1, a - columns, a + columns)}
        else:
            y, x = divmod(a, columns)
            around = [(y, x - 1), (y, x + 1), (y - 1, x), (y + 1, x)]
            both |= {v * columns + u for v, u in around if 0 <= v < rows and 0 <= u < columns}
    if official:
        left = [d - 1 if j in both else d for j, d in enumerate(deep)]
        registers = sorted(range(n), key=lambda j: -left[j])[: k - len(both)]
    else:
        outer = sorted(both - set(anchors), key=lambda j: -objects[j])
        both = set((anchors + outer)[:k])
        registers = [j for j in sorted(range(n), key=lambda j: -deep[j]) if j not in both][: k - len(both)]
    return sorted(both | set(registers))


@pytest.mark.parametrize("scale", [1, 40])
@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "k", "alpha"), [(6, 6, 20, 0.5), (5, 9, 30, 0.3), (12, 12, 48, 0.1), (4, 4, 15, 0.0)]
)
def test_hiprune_in_loops(rows, columns, k, alpha, official, scale):
    draw = python_random.Random(rows * k)
    for _ in range(20):
        objects = [draw.random() * scale / 20 for _ in range(rows * columns)]
        deep = [draw.random() * scale / 20 for _ in range(rows * columns)]
        ours = hierarchical(torch.tensor(objects), torch.tensor(deep), k, alpha, (rows, columns), official)
        assert ours.kept.tolist() == hiprune_in_loops(objects, deep, k, alpha, rows, columns, official)


def test_neighbours_do_not_wrap_when_repaired():
    corner, edge = torch.tensor([0]), torch.tensor([6])
    assert sorted(neighbours(corner, 3, 6, official=False).tolist()) == [1, 6]
    assert sorted(neighbours(edge, 3, 6, official=False).tolist()) == [0, 7, 12]
    assert sorted(neighbours(edge, 3, 6, official=True).tolist()) == [0, 5, 7, 12]
    assert sorted(neighbours(corner, 3, 6, official=True).tolist()) == [0, 0, 1, 6]


def test_official_sums_choose_sinks_twice_and_the_repaired_form_does_not():
    """Column sums far above 1: the official subtraction of 1 does not take anchors out of the registers."""
    n = 36
    objects, deep = torch.full((n,), 1e-3), torch.full((n,), 1e-3)
    objects[14] = deep[14] = 0.5  # a sink: 18 after scaling to a sum over 36 queries
    scores = {"objects": objects, "deep": deep}
    official = HiPrune(keep=12, alpha=0.4, parity="official").choose(visual(6, 6, queries=36, **scores)).kept
    repaired = HiPrune(keep=12, alpha=0.4).choose(visual(6, 6, queries=36, **scores)).kept
    assert len(official) < 12 == len(repaired)


def test_more_anchors_than_budget():
    objects, deep = torch.rand(36), torch.rand(36)
    objects[[7, 28]] = 2.0  # two anchors with four neighbours each: ten tokens for a budget of eight
    with pytest.raises(ValueError, match="lower alpha"):
        hierarchical(objects, deep, 8, 1.0, (6, 6), official=True)
    choice = hierarchical(objects, deep, 8, 1.0, (6, 6))
    assert len(choice.kept) == 8 and set(choice.anchors.tolist()) <= set(choice.kept.tolist())


def test_hiprune_layers_scale_with_depth():
    from vlmfast.families import Tower

    clip = Tower(depth=24, heads=1, feature_layer=22, full_layers=tuple(range(24)), has_cls=True)
    qwen = Tower(depth=32, heads=1, feature_layer=31, full_layers=(7, 15, 23, 31), has_cls=False, merge=2, window=4)
    assert [s.layer for s in HiPrune().wanted(clip).values()] == [8, 22]
    assert [s.layer for s in HiPrune().wanted(qwen).values()] == [15, 31]
    assert [s.layer for s in HiPrune(object_layer=3).wanted(clip).values()] == [2, 22]


@pytest.mark.parametrize("method", [Grid(keep=0.3), Random(keep=0.3)])
def test_controls_need_no_statistics(method, vlm):
    assert method.wanted(family_tower(vlm)) == {}
