"""Methods that rank tokens by a score: their equations in plain loops, repaired bugs, bad input, and whole models."""

from __future__ import annotations

import math
import random as python_random
from dataclasses import replace

import pytest
import torch
from canvas import canvas_order
from conftest import build, shared

import vlmfast
from vlmfast.adapters import ADAPTERS, from_spec, to_spec
from vlmfast.adapters.pruning import textmonkey
from vlmfast.adapters.pruning.fopru import FoPru, best_rows, significance
from vlmfast.adapters.pruning.globalcom2 import GlobalCom2, canvas_sequence, crop_weights, share_out
from vlmfast.adapters.pruning.slime import Slime, nucleus, text_similarity
from vlmfast.adapters.pruning.textmonkey import TextMonkey, later_similarity
from vlmfast.adapters.pruning.vtc_cls import VtcCls, ensemble, parse_layers
from vlmfast.families import FAMILIES, Tower, family_of
from vlmfast.visual import View, VisualTokens, apportion, budget

CLIP = Tower(depth=24, heads=1, feature_layer=22, full_layers=tuple(range(24)), has_cls=True)
SIGLIP = Tower(depth=27, heads=1, feature_layer=26, full_layers=tuple(range(27)), has_cls=False)
WINDOWS = Tower(depth=32, heads=1, feature_layer=31, full_layers=(7, 15, 23, 31), has_cls=False, merge=2, window=4)

# Every method with scores under the names it asks for, and as many random numbers as it needs.
METHODS = {
    "vtc_cls": (VtcCls, ("20", "21", "22")),
    "fopru": (FoPru, ("column", "row")),
    "fopru row": (lambda **how: FoPru(strategy="row", **how), ("column", "row")),
    "textmonkey": (TextMonkey, ()),
    "slime": (Slime, ()),
    "globalcom2": (GlobalCom2, ("logits",)),
}


def visual(rows, columns, names=(), seed=0, constant=False, **changes):
    """A picture of one view with random (or constant) features, scores and question."""
    generator = torch.Generator().manual_seed(seed)
    n = rows * columns

    def draw(*shape):
        return torch.ones(shape) if constant else torch.randn(*shape, generator=generator)

    settings = {
        "features": draw(n, 6),
        "grid": (1, rows, columns),
        "queries": n + 1,
        "scores": {name: draw(n) for name in names},
        "text": draw(5, 6),
    }
    return VisualTokens(**(settings | changes))


def anyres(crops, side, size, seed=0, width=6):
    """A picture as thumbnail and crops with newlines, with random features and logits.

    crops: (columns, rows); size: (width, height) of the picture. -> visual tokens, [(view, token in its padded view)]
    """
    view, token = canvas_order(crops, side, size)
    slots = (view >= 0).nonzero().flatten()
    span, view, token = len(view), view[slots], token[slots]
    generator = torch.Generator().manual_seed(seed)
    views = [View((view == 0).nonzero().flatten(), (side, side), "thumbnail")]
    for number in range(1, crops[0] * crops[1] + 1):
        index = (view == number).nonzero().flatten()
        height = len({int(one) // side for one in token[index]})
        views.append(View(index, (height, len(index) // height), "crop", divmod(number - 1, crops[0])))
    n = len(view)
    picture = VisualTokens(
        torch.randn(n, width, generator=generator),
        (1, 1, n),
        side * side + 1,
        scores={"logits": torch.randn(n, generator=generator)},
        views=views,
        slots=slots,
        span=span,
        newline=torch.full((width,), -7.0),
        text=torch.randn(4, width, generator=generator),
    )
    return picture, list(zip(view.tolist(), token.tolist()))


def ranked(scores):
    """Indices by falling score, equal ones by index."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))


# --- what all of them promise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("keep", [1, 2, 5, 17, 34, 35, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("name", METHODS)
def test_the_budget_holds(name, keep, constant):
    cls, names = METHODS[name]
    kept = cls(keep=keep).choose(visual(5, 7, names, constant=constant)).kept.tolist()
    assert len(kept) == budget(keep, 35) and kept == sorted(set(kept)) and set(kept) <= set(range(35))


@pytest.mark.parametrize("keep", [1, 2, 9, 40, 63, 95, 0.3])
@pytest.mark.parametrize("name", METHODS)
def test_the_budget_holds_over_thumbnail_and_crops(name, keep):
    cls, names = METHODS[name]
    picture, _ = anyres((2, 2), 5, (80, 60))
    scores = picture.scores | {one: torch.randn(len(picture)) for one in names}
    picture = VisualTokens(**{**vars(picture), "scores": scores if names else {}})
    kept = cls(keep=keep).choose(picture).kept.tolist()
    assert len(kept) == budget(keep, len(picture)) and kept == sorted(set(kept))


@pytest.mark.parametrize("name", ["vtc_cls", "fopru", "slime", "globalcom2"])
def test_equal_scores_go_by_index(name):
    cls, names = METHODS[name]
    assert cls(keep=3).choose(visual(5, 7, names, constant=True)).kept.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["vtc_cls", "fopru", "fopru row"])
def test_video_frames_are_chosen_one_by_one(name):
    cls, names = METHODS[name]
    scores = {one: torch.randn(24, generator=torch.Generator().manual_seed(3)) for one in names}
    video = VisualTokens(torch.randn(24, 4), (2, 3, 4), 13, scores=scores)
    kept = cls(keep=10).choose(video).kept
    for frame in range(2):
        alone = VisualTokens(
            torch.randn(12, 4), (1, 3, 4), 13, scores={k: v[12 * frame : 12 * frame + 12] for k, v in scores.items()}
        )
        own = kept[(kept >= 12 * frame) & (kept < 12 * frame + 12)] - 12 * frame
        assert torch.equal(own, cls(keep=5).choose(alone).kept)


@pytest.mark.parametrize(
    "spec",
    [
        "vtc_cls:preset=last",
        "vtc_cls:layers=-1",
        "vtc_cls:layers=22-20",
        "vtc_cls:fallback=cosine",
        "fopru:strategy=rows",
        "fopru:scores=raw",
        "fopru:parity=1",
        "textmonkey:thumbnail=keep",
        "slime:top_p=0",
        "slime:top_p=1.5",
        "slime:top_p=nan",
        "slime:temperature=0",
        "slime:temperature=nan",
        "slime:reduce=max",
        "slime:thumbnail=1",
        "globalcom2:tau=0",
        "globalcom2:parity=none",
        "globalcom2:fallback=received",
        "globalcom2:parity=official,positions=original",
    ],
)
def test_wrong_settings_are_refused(spec):
    name = spec.split(":")[1].split("=")[0]
    with pytest.raises(ValueError, match=name):
        from_spec(spec)


@pytest.mark.parametrize("cls", [VtcCls, GlobalCom2])
def test_a_tower_without_cls_is_refused_or_replaced_in_the_open(cls):
    with pytest.raises(NotImplementedError, match=f"{cls.name}:fallback={cls.substitute[0]}"):
        cls().wanted(SIGLIP)
    method = cls(fallback=cls.substitute[0])
    assert cls.needs(FAMILIES["qwen2_5_vl"]) == {"fallback": cls.substitute[0]} and not cls.needs(FAMILIES["llava"])
    assert "no CLS" in method.notes(SIGLIP)[0] and not method.notes(CLIP)
    assert all(score.kind != "cls_row" for score in method.wanted(SIGLIP).values())
    assert all(score.kind == "cls_row" for score in method.wanted(CLIP).values())


# --- VTC-CLS -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "tower", "expected"),
    [
        ({}, CLIP, [20, 21, 22]),
        ({"preset": "repo"}, CLIP, [16, 17, 18, 19, 20, 21, 22]),
        ({"layers": "20-22"}, CLIP, [20, 21, 22]),
        ({"layers": (5, 3)}, CLIP, [3, 5]),
        ({"layers": 22}, CLIP, [22]),
        ({"preset": "repo"}, replace(CLIP, depth=12, feature_layer=10, full_layers=tuple(range(12))), [8, 9, 10]),
        ({"fallback": "received"}, SIGLIP, [24, 25, 26]),
        ({"fallback": "received"}, WINDOWS, [15, 23, 31]),
        ({"fallback": "received", "preset": "repo"}, WINDOWS, [23, 31]),
    ],
)
def test_vtc_cls_layers(settings, tower, expected):
    method = VtcCls(**settings)
    assert [score.layer for score in method.wanted(tower).values()] == expected
    assert from_spec(to_spec([method])) == (method,)


def test_vtc_cls_layers_in_words():
    assert parse_layers("16/20-22/3") == (3, 16, 20, 21, 22)
    for text in ("", "a", "1-", "1//2", "3-1", "-4", "1.5", True, (), (1, -2)):
        with pytest.raises(ValueError, match="0-based"):
            parse_layers(text)


def test_vtc_cls_layers_the_tower_does_not_have(vlm):
    needs = "" if family_of(vlm.model).cls else ",fallback=received"
    with pytest.raises(ValueError, match="layer 4 of a vision tower with 4 layers"):
        vlmfast.patch(vlm.model, "vtc_cls:layers=4" + needs)
    if vlm.name == "qwen2_5_vl":
        with pytest.raises(ValueError, match="attends inside windows"):
            vlmfast.patch(vlm.model, "vtc_cls:layers=2" + needs)


def test_vtc_cls_in_loops():
    rows = torch.rand(3, 35)
    total = [sum(float(row[j]) for row in rows) for j in range(35)]
    torch.testing.assert_close(ensemble(list(rows)), torch.tensor(total))
    picture = visual(5, 7, scores={str(i): row for i, row in enumerate(rows)})
    assert VtcCls(keep=9).choose(picture).kept.tolist() == sorted(ranked(total)[:9])


def projections(vlm, inputs):
    """q and k [views, tokens, heads, d] of every layer of a CLIP tower, from a plain run, and the features."""
    found, tower = {}, vlm.model.model.vision_tower
    hooks = []
    for number, block in enumerate(tower.encoder.layers):
        for name in ("q_proj", "k_proj"):

            def take(module, args, output, key=(number, name)):
                found[key] = output.unflatten(-1, (4, -1))

            hooks.append(getattr(block.self_attn, name).register_forward_hook(take))
    with torch.no_grad():
        features = vlm.model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    for hook in hooks:
        hook.remove()
    return found, list(features)


def attention_in_loops(q, k, query, softmax=True):
    """Attention of one query to all keys, mean over heads. q, k: [tokens, heads, d]"""
    mean = [0.0] * len(k)
    for head in range(q.shape[1]):
        logits = [float(q[query, head] @ one[head]) / math.sqrt(q.shape[2]) for one in k]
        if softmax:
            powers = [math.exp(x - max(logits)) for x in logits]
            logits = [x / sum(powers) for x in powers]
        mean = [m + x / q.shape[1] for m, x in zip(mean, logits)]
    return mean


def test_vtc_cls_on_a_model():
    """Layers 0, 1 and 2 of a tower of four whose features leave after layer 2."""
    vlm = shared("llava")
    inputs = vlm.prompts([[3, "a", 2]])
    found, _ = projections(vlm, inputs)
    rows = [attention_in_loops(found[layer, "q_proj"][0], found[layer, "k_proj"][0], 0)[1:] for layer in range(3)]
    total = [sum(values) for values in zip(*rows)]
    with vlmfast.patch(vlm.model, "vtc_cls:keep=10") as handle:
        vlm.model(**inputs)
        assert handle.report().kept[0].tolist() == sorted(ranked(total)[:10])


# --- FoPru ---------------------------------------------------------------------------------------------------------


def variance(values):
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def test_the_statistic_of_larger_variance():
    draw = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(20):
        column, row = torch.rand(12, generator=draw), torch.rand(12, generator=draw)
        wins = variance(column.tolist()) > variance(row.tolist())
        assert torch.equal(significance(column, row), column if wins else row)
        seen.add(wins)
    assert seen == {True, False}
    assert significance(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])).tolist() == [2.0, 1.0], "a tie: rows"
    assert significance(torch.tensor([1.0]), torch.tensor([2.0])).tolist() == [2.0], "no variance of one token"


@pytest.mark.parametrize(("h", "w"), [(5, 7), (7, 5), (6, 6), (1, 9), (9, 1)])
def test_fopru_rows_in_loops(h, w):
    """Whole rows by their sum, then the best tokens of the next row: exactly k."""
    score = torch.rand(h * w, generator=torch.Generator().manual_seed(h))
    sums = [sum(float(score[y * w + x]) for x in range(w)) for y in range(h)]
    order = ranked(sums)
    for k in range(1, h * w + 1):
        expected = [y * w + x for y in order[: k // w] for x in range(w)]
        if k % w:
            y = order[k // w]
            expected += [y * w + x for x in ranked(score[y * w : y * w + w].tolist())[: k % w]]
        assert best_rows(score, (h, w), k).tolist() == expected


def test_fopru_official_rows_are_whole_and_may_be_fewer():
    picture = visual(5, 7, ("column", "row"))
    official = FoPru(keep=17, strategy="row", parity="official").choose(picture).kept
    repaired = FoPru(keep=17, strategy="row").choose(picture).kept
    assert len(official) == 14 and len(repaired) == 17 and set(official.tolist()) < set(repaired.tolist())
    assert len(FoPru(keep=0.5, strategy="row", parity="official").choose(picture).kept) == 14  # floor(0.5 x 5) rows
    with pytest.raises(ValueError, match="less than one row of a view of 5 rows of 7 tokens"):
        FoPru(keep=6, strategy="row", parity="official").choose(picture)
    assert "fewer than keep" in FoPru(strategy="row", parity="official").notes(CLIP)[0]
    assert not FoPru(strategy="row").notes(CLIP)


def test_fopru_statistics():
    """CLS is left out where there is one; a softmax without CLS has one mean for all rows."""
    assert all(score.patches and score.softmax for score in FoPru().wanted(CLIP).values())
    assert list(FoPru().wanted(WINDOWS)) == ["column"]
    logits = FoPru(scores="logits").wanted(WINDOWS)
    assert list(logits) == ["column", "row"] and not any(one.patches or one.softmax for one in logits.values())


@pytest.mark.parametrize("scores", ["softmax", "logits"])
def test_fopru_on_a_model(scores):
    vlm = shared("llava")
    inputs = vlm.prompts([[3, "b", 2]])
    found, _ = projections(vlm, inputs)
    q, k = found[2, "q_proj"][0], found[2, "k_proj"][0]
    rows = [attention_in_loops(q, k, i, scores == "softmax")[1:] for i in range(1, 37)]
    column = [sum(row[j] for row in rows) / 36 for j in range(36)]
    row = [sum(values) / 36 for values in rows]
    best = column if variance(column) > variance(row) else row
    with vlmfast.patch(vlm.model, f"fopru:keep=9,scores={scores}") as handle:
        vlm.model(**inputs)
        assert handle.report().kept[0].tolist() == sorted(ranked(best)[:9])


def test_fopru_takes_each_view_by_its_own_statistic():
    """One view tells its tokens apart by columns, the other by rows."""
    flat, steep = torch.zeros(6), torch.tensor([0.0, 5.0, 0.0, 4.0, 0.0, 0.0])
    views = [View(torch.arange(6), (2, 3), "thumbnail"), View(torch.arange(6, 12), (2, 3), "crop")]
    scores = {"column": torch.cat([steep, flat]), "row": torch.cat([flat, steep.flip(0)])}
    picture = VisualTokens(torch.randn(12, 2), (1, 1, 12), 7, scores=scores, views=views)
    assert FoPru(keep=4).choose(picture).kept.tolist() == [1, 3, 8, 10]


# --- TextMonkey ----------------------------------------------------------------------------------------------------


def later_in_loops(features):
    def cosine(a, b):
        lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b)) / lengths if lengths else 0.0

    n = len(features)
    return [max(cosine(features[i], features[j]) for j in range(i + 1, n)) for i in range(n - 1)] + [-1.0]


@pytest.mark.parametrize("rows", [1, 2, 3, 256])
def test_similarity_to_later_tokens_in_loops(rows, monkeypatch):
    monkeypatch.setattr(textmonkey, "ROWS", rows)
    features = torch.randn(11, 4, generator=torch.Generator().manual_seed(1))
    features[3] = 0
    expected = later_in_loops(features.tolist())
    torch.testing.assert_close(later_similarity(features), torch.tensor(expected))
    kept = TextMonkey(keep=4).choose(VisualTokens(features, (1, 1, 11), 11)).kept
    assert kept.tolist() == sorted(sorted(range(11), key=lambda i: expected[i])[:4])


def test_of_two_alike_the_later_stays_and_the_last_always():
    features = torch.eye(6)
    features[1] = features[4]
    assert TextMonkey(keep=5).choose(VisualTokens(features, (1, 2, 3), 6)).kept.tolist() == [0, 2, 3, 4, 5]
    assert TextMonkey(keep=1).choose(VisualTokens(features, (1, 2, 3), 6)).kept.tolist() == [5]
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])  # both are at -1: the last is the one that stays
    assert TextMonkey(keep=1).choose(VisualTokens(opposite, (1, 1, 2), 2)).kept.tolist() == [1]
    same = torch.ones(6, 4)
    assert TextMonkey(keep=2).choose(VisualTokens(same, (1, 2, 3), 6)).kept.tolist() == [4, 5]


def test_zero_vectors_resemble_nothing():
    features = torch.rand(8, 3, generator=torch.Generator().manual_seed(0)) + 0.1  # all cosines positive
    features[2] = 0
    assert later_similarity(features).isfinite().all()
    assert later_similarity(features)[2] == 0
    assert TextMonkey(keep=2).choose(VisualTokens(features, (1, 2, 4), 8)).kept.tolist() == [2, 7]
    assert len(TextMonkey(keep=3).choose(VisualTokens(torch.zeros(8, 3), (1, 2, 4), 8)).kept) == 3


def test_textmonkey_filters_the_crops_together_and_in_their_order():
    """Crop after crop, which is not the order of the prompt; the thumbnail by itself."""
    picture, places = anyres((2, 1), 3, (60, 30))
    crops = [i for view in picture.views[1:] for i in view.index.tolist()]
    assert crops != sorted(crops), "the prompt goes row by row through both crops"
    method = TextMonkey(keep=9)
    kept = method.choose(picture).kept.tolist()
    shares = apportion(9, [9, len(crops)])
    for index, k in zip((list(range(9)), crops), shares):
        similarity = later_in_loops(picture.features[index].tolist())
        expected = {index[i] for i in sorted(range(len(index)), key=lambda i: similarity[i])[:k]}
        assert expected == set(kept) & set(index)


@pytest.mark.parametrize("method", [TextMonkey, Slime])
def test_a_thumbnail_that_stays_whole(method):
    picture, _ = anyres((2, 2), 3, (60, 60))
    kept = method(keep=20, thumbnail="whole").choose(picture).kept.tolist()
    assert kept[:9] == list(range(9)) and len(kept) == 20
    with pytest.raises(ValueError, match="fewer than the thumbnail's 9"):
        method(keep=8, thumbnail="whole").choose(picture)
    single = visual(3, 4)
    assert len(method(keep=5, thumbnail="whole").choose(single).kept) == 5


# --- SliME ---------------------------------------------------------------------------------------------------------


def test_similarity_to_the_question_in_loops():
    picture = visual(3, 4)
    features, text = picture.features.tolist(), picture.text.tolist()
    total = []
    for v in features:
        cosines = [sum(x * y for x, y in zip(v, t)) / (math.hypot(*v) * math.hypot(*t)) for t in text]
        total.append(sum(cosines))
    torch.testing.assert_close(text_similarity(picture.features, picture.text, "sum"), torch.tensor(total))
    mean = [value / len(text) for value in total]
    torch.testing.assert_close(text_similarity(picture.features, picture.text), torch.tensor(mean))
    for reduce in ("mean", "sum"):
        assert Slime(keep=5, reduce=reduce).choose(picture).kept.tolist() == sorted(ranked(total)[:5])


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.9, 1.0])
def test_top_p_in_loops(top_p):
    picture = visual(3, 4)
    method = Slime(keep=1.0, top_p=top_p, temperature=0.2)
    logits = [float(x) / 0.2 for x in text_similarity(picture.features, picture.text)]
    powers = [math.exp(x) for x in logits]
    order, number, cumulative = ranked(logits), 0, 0.0
    for i in order:
        cumulative += powers[i] / sum(powers)
        if cumulative > top_p + 1e-6:
            break
        number += 1
    expected = sorted(order[: min(number + 1, 12)])
    assert method.choose(picture).kept.tolist() == expected
    capped = Slime(keep=2, top_p=top_p, temperature=0.2).choose(picture).kept.tolist()
    assert capped == sorted(order[: min(2, len(expected))]), "keep is the most that stays"
    assert f"top_p={top_p}" in method.remarks([])[-1] and not Slime().remarks([])
    assert nucleus(torch.tensor([0.5, 0.5]), 0.5) == 2 and nucleus(torch.tensor([0.9, 0.1]), 0.5) == 1


def test_slime_without_words_or_with_zero_vectors():
    for text in (None, torch.empty(0, 6)):
        with pytest.raises(ValueError, match="has no text"):
            Slime(keep=3).choose(visual(3, 4, text=text))
    features = -torch.ones(12, 6)
    features[[4, 9]] = 0  # orthogonal to the words, all others opposite
    assert Slime(keep=2).choose(visual(3, 4, features=features, text=torch.ones(2, 6))).kept.tolist() == [4, 9]
    assert Slime(keep=2).choose(visual(3, 4, text=torch.zeros(2, 6))).kept.tolist() == [0, 1]


def test_slime_reads_the_question_of_each_prompt(vlm):
    """The text after the last picture, of its own row; the same picture under two questions."""
    inputs = vlm.prompts([[3, "a", 4], [5, "a", 7]])
    with torch.no_grad():
        one = vlm.prompts([[1, "a", 1]])
        extra = {"image_grid_thw": one["image_grid_thw"]} if "image_grid_thw" in one else {}
        output = vlm.model.model.get_image_features(one["pixel_values"], **extra, return_dict=True)
    features = output.pooler_output[0]
    with vlmfast.patch(vlm.model, "slime:keep=6") as handle:
        vlm.model(**inputs)
        kept = handle.report().kept
    for row, length in enumerate((4, 7)):
        words = vlm.model.get_input_embeddings()(inputs["input_ids"][row, -length:]).detach()
        score = text_similarity(features, words).tolist()
        assert kept[row].tolist() == sorted(ranked(score)[:6])
    assert not torch.equal(kept[0], kept[1])


def test_textmonkey_on_a_model(vlm):
    inputs = vlm.prompts([[3, "a", 4]])
    with torch.no_grad():
        extra = {"image_grid_thw": inputs["image_grid_thw"]} if "image_grid_thw" in inputs else {}
        output = vlm.model.model.get_image_features(inputs["pixel_values"], **extra, return_dict=True)
    similarity = later_in_loops(output.pooler_output[0].tolist())
    with vlmfast.patch(vlm.model, "textmonkey:keep=7") as handle:
        vlm.model(**inputs)
        expected = sorted(range(len(similarity)), key=lambda i: similarity[i])[:7]
        assert handle.report().kept[0].tolist() == sorted(expected)


# --- GlobalCom2 ----------------------------------------------------------------------------------------------------


def resized_in_loops(values, h, w, height, width):
    """Bilinear, corners not aligned, no smoothing."""

    def around(i, size, new):
        x = max((i + 0.5) * size / new - 0.5, 0.0)
        low = min(int(x), size - 1)
        return low, min(low + 1, size - 1), x - low

    result = []
    for y in range(height):
        y0, y1, fy = around(y, h, height)
        for x in range(width):
            x0, x1, fx = around(x, w, width)
            above = values[y0 * w + x0] * (1 - fx) + values[y0 * w + x1] * fx
            below = values[y1 * w + x0] * (1 - fx) + values[y1 * w + x1] * fx
            result.append(above * (1 - fy) + below * fy)
    return result


def weights_in_loops(overview, side, crops, tau):
    columns, rows = crops
    total = [0.0] * (columns * rows)
    for i, value in enumerate(overview):
        y, x = divmod(i, side)
        row = min(y // max(side // rows, 1), rows - 1)
        total[row * columns + min(x // max(side // columns, 1), columns - 1)] += value
    powers = [math.exp((value - max(total)) / tau) for value in total]
    sigma = [power / (sum(powers) + 1e-8) for power in powers]
    return [1 + s - sum(sigma) / len(sigma) for s in sigma]


def globalcom2_in_loops(picture, places, crops, side, k, tau):
    """The kept tokens per view, by falling score. Budgets: R as large as it may be, then the largest remainders."""
    logits = picture.scores["logits"].tolist()
    own = {v: [i for i, (view, _) in enumerate(places) if view == v] for v in range(crops[0] * crops[1] + 1)}
    overview = [logits[i] for i in own[0]]
    weights = weights_in_loops(overview, side, crops, tau)
    ys = sorted({(v - 1) // crops[0] * side + t // side for v, t in places if v})
    xs = sorted({(v - 1) % crops[0] * side + t % side for v, t in places if v})
    picture_map = resized_in_loops(overview, side, side, len(ys), len(xs))
    sizes = [len(own[v]) for v in own]
    first, rest = apportion(k, [sizes[0], sum(sizes[1:])])
    low, high = 0.0, 1e6  # the factor R at which the crops' numbers add up
    for _ in range(200):
        ratio = (low + high) / 2
        if sum(min(ratio * w, 1) * n for w, n in zip(weights, sizes[1:])) < rest:
            low = ratio
        else:
            high = ratio
    ideal = [min(high * w, 1) * n for w, n in zip(weights, sizes[1:])]
    numbers = [int(x + 1e-9) for x in ideal]
    for i in sorted(range(len(ideal)), key=lambda i: -(ideal[i] - numbers[i]))[: rest - sum(numbers)]:
        numbers[i] += 1
    kept = [[own[0][i] for i in ranked(overview)[:first]]]
    for v, number in enumerate(numbers, 1):
        local = [logits[i] for i in own[v]]
        piece = []
        for i in own[v]:
            y = (v - 1) // crops[0] * side + places[i][1] // side
            x = (v - 1) % crops[0] * side + places[i][1] % side
            piece.append(picture_map[ys.index(y) * len(xs) + xs.index(x)])
        both = [a / math.hypot(*local) + g / math.hypot(*piece) for a, g in zip(local, piece)]
        kept.append([own[v][i] for i in ranked(both)[:number]])
    return kept


ANYRES = [((2, 2), (60, 60)), ((2, 2), (80, 60)), ((2, 2), (50, 90)), ((3, 1), (140, 40)), ((1, 3), (20, 100))]


@pytest.mark.parametrize("keep", [3, 13, 0.5, 0.9])
@pytest.mark.parametrize(("crops", "size"), ANYRES)
def test_globalcom2_in_loops(crops, size, keep):
    picture, places = anyres(crops, 6, size, seed=size[0])
    choice = GlobalCom2(keep=keep).choose(picture)
    k = budget(keep, len(picture))
    expected = globalcom2_in_loops(picture, places, crops, 6, k, 10)
    assert choice.kept.tolist() == sorted(i for view in expected for i in view) and len(choice.kept) == k
    assert choice.slots is None and choice.features is None


@pytest.mark.parametrize("crops", [(1, 1), (2, 2), (3, 2), (1, 4), (7, 7)])
def test_crop_weights_in_loops(crops):
    """Crops that do not divide the thumbnail, and more of them than it has rows."""
    columns, rows = crops
    overview = torch.randn(30, generator=torch.Generator().manual_seed(2)) * 3
    square = torch.randn(25, generator=torch.Generator().manual_seed(2)) * 3
    ours = crop_weights(square, (5, 5), (rows, columns), 2.0)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, torch.tensor(weights_in_loops(square.tolist(), 5, crops, 2.0)).double())
    assert crop_weights(overview, (5, 6), (rows, columns), 1e-3).isfinite().all(), "a sharp softmax does not overflow"


def test_share_out():
    assert share_out(10, [1.0, 1.0], [20, 20]) == [5, 5]
    assert share_out(10, [1.5, 0.5], [4, 20]) == [4, 6], "what a full crop cannot take goes to the other"
    assert share_out(3, [1.0, 1.0], [5, 5]) == [2, 1], "equal remainders go by index"
    assert share_out(0, [1.0, 2.0], [5, 5]) == [0, 0] and share_out(10, [1.0, 2.0], [5, 5]) == [5, 5]
    assert share_out(2, [1.0, 1.0], [0, 5]) == [0, 2]
    with pytest.raises(ValueError, match="11 tokens of crops that have 10"):
        share_out(11, [1.0, 1.0], [5, 5])
    draw = python_random.Random(0)
    for _ in range(300):
        sizes = [draw.randint(0, 30) for _ in range(draw.randint(1, 6))]
        weights = [draw.uniform(0.2, 2) for _ in sizes]
        k = draw.randint(0, sum(sizes))
        shares = share_out(k, weights, sizes)
        assert sum(shares) == k and all(0 <= share <= size for share, size in zip(shares, sizes))


def test_the_authors_sequence_in_loops():
    """Numbers among unpadded tokens taken for places in the padded crop, and a newline after every canvas row."""
    columns, rows, side = 2, 2, 4
    draw = python_random.Random(1)
    kept = [sorted(draw.sample(range(12), n)) for n in (5, 0, 12, 3)]
    expected = []
    for y in range(rows * side):
        for x in range(columns * side):
            crop = y // side * columns + x // side
            place = y % side * side + x % side
            if place in kept[crop]:
                expected.append((crop, place))
        expected.append((-1, -1))
    cells = [(0, 0), (0, 1), (1, 0), (1, 1)]
    crop, token = canvas_sequence([torch.tensor(one, dtype=torch.long) for one in kept], cells, (side, side), (2, 2))
    assert list(zip(crop.tolist(), token.tolist())) == expected


@pytest.mark.parametrize(("crops", "size"), ANYRES)
def test_globalcom2_official_order(crops, size):
    picture, places = anyres(crops, 6, size)
    choice = GlobalCom2(keep=0.4, parity="official").choose(picture)
    logits, n = picture.scores["logits"], int(36 * 0.4)
    thumbnail = ranked(logits[:36].tolist())[:n]
    assert torch.equal(choice.features[:n], picture.features[thumbnail]), "by falling score"
    newlines = (choice.features == picture.newline).all(dim=1)
    assert int(newlines.sum()) == crops[1] * 6, "a newline for every row of the padded canvas"
    assert len(choice.features) == len(choice.kept) + crops[1] * 6 == len(choice.slots)
    assert len(choice.kept) <= budget(0.4, len(picture))
    weights = weights_in_loops(logits[:36].tolist(), 6, crops, 10)
    for number, weight in enumerate(weights, 1):
        own = [i for i, (view, _) in enumerate(places) if view == number]
        assert len(set(own) & set(choice.kept.tolist())) == int(len(own) * min(0.4 * weight, 1))
    with pytest.raises(ValueError, match="leaves no token"):
        GlobalCom2(keep=1, parity="official").choose(picture)


def test_the_official_newlines_may_need_more_places_than_the_prompt_has():
    picture, _ = anyres((1, 1), 6, (100, 20))  # two of six rows are no padding
    assert picture.span == 36 + 12 + 2
    with pytest.raises(ValueError, match="needs 51 places, the prompt has 50; lower keep"):
        GlobalCom2(keep=0.97, parity="official").choose(picture)


def test_a_single_view_keeps_its_largest_logits():
    picture = visual(5, 7, ("logits",))
    expected = sorted(ranked(picture.scores["logits"].tolist())[:8])
    for parity in ("repaired", "official"):
        assert GlobalCom2(keep=8, parity=parity).choose(picture).kept.tolist() == expected


def test_globalcom2_without_cls_in_loops():
    picture = visual(5, 7)
    mean = [sum(row[c] for row in picture.features.tolist()) / 35 for c in range(6)]
    score = [
        -sum(x * y for x, y in zip(row, mean)) / (math.hypot(*row) * math.hypot(*mean))
        for row in picture.features.tolist()
    ]
    method = GlobalCom2(keep=8, fallback="cosine")
    torch.testing.assert_close(method.score(picture), torch.tensor(score))
    assert method.choose(picture).kept.tolist() == sorted(ranked(score)[:8])
    zero = GlobalCom2(keep=8).score(visual(5, 7, features=torch.zeros(35, 6)))
    assert torch.equal(zero, torch.zeros(35))


def test_globalcom2_refuses_videos():
    with pytest.raises(NotImplementedError, match="on videos"):
        GlobalCom2(keep=5).choose(VisualTokens(torch.randn(24, 4), (2, 3, 4), 13, scores={"logits": torch.rand(24)}))


def test_globalcom2_on_a_single_view_of_a_model():
    """Logits of the CLS query in the last layer, which is not the one that gives the features."""
    vlm = shared("llava")
    inputs = vlm.prompts([[3, "a", 2]])
    found, _ = projections(vlm, inputs)
    logits = attention_in_loops(found[3, "q_proj"][0], found[3, "k_proj"][0], 0, softmax=False)[1:]
    with vlmfast.patch(vlm.model, "globalcom2:keep=10") as handle:
        vlm.model(**inputs)
        report = handle.report()
    assert report.kept[0].tolist() == sorted(ranked(logits)[:10])
    assert any("without thumbnail and crops" in note for note in report.notes)


@pytest.mark.parametrize("parity", ["repaired", "official"])
def test_globalcom2_on_crops_of_a_model(parity):
    """An any-resolution model: tokens of all views by the equation, newlines of its rows (all rows: official)."""
    vlm = build("llava_next")
    inputs = vlm.prompts([[3, "c", 2]])
    with vlmfast.patch(vlm.model, f"globalcom2:keep=0.4,parity={parity}") as handle:
        logits = vlm.model(**inputs).logits
        report = handle.report()
        assert vlm.model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == logits.shape[1] + 3 + (
            report.images[0].n - report.images[0].kept
        )
    image = report.images[0]
    assert [view.kind for view in image.views][0] == "thumbnail" and len(image.views) > 2
    n = sum(len(view) for view in image.views)
    newlines = image.n - n
    if parity == "repaired":
        assert len(image.indices) == budget(0.4, n) and image.kept == len(image.indices) + newlines
        assert not report.notes
    else:
        rows = 4 * (1 + max(view.cell[0] for view in image.views[1:]))
        assert len(image.indices) <= budget(0.4, n) and image.kept == len(image.indices) + rows
        assert any("rounds every view down" in note for note in report.notes)


def test_every_method_here_is_registered():
    assert {"fopru", "globalcom2", "slime", "textmonkey", "vtc_cls"} <= set(ADAPTERS)
