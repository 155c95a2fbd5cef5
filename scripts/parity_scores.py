"""Golden sets of the methods that rank tokens by a score: see parity.py, which runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from canvas import canvas_order
from torch import Tensor

from vlmfast.adapters.pruning.fopru import FoPru, significance
from vlmfast.adapters.pruning.globalcom2 import GlobalCom2
from vlmfast.adapters.pruning.slime import Slime, nucleus, text_similarity
from vlmfast.adapters.pruning.textmonkey import TextMonkey, later_similarity
from vlmfast.adapters.pruning.vtc_cls import VtcCls, ensemble
from vlmfast.attention import statistic
from vlmfast.families import Tower
from vlmfast.visual import Score, View, VisualTokens, top

Case = dict[str, Any]
Arrays = Callable[[str], Tensor]
Checks = Iterator[tuple[str, Tensor, Tensor]]


def vtc_cls(case: Case, array: Arrays) -> Checks:
    """Layers, their summed CLS rows, and the kept indices."""
    hyper, rows = case["hyper"], array("in_{}_cls_rows").mean(dim=1)[:, 1:]
    depth, k = hyper["num_layers"], hyper["token_num"]
    tower = Tower(depth=depth, heads=1, feature_layer=depth - 2, full_layers=tuple(range(depth)), has_cls=True)
    settings: dict[Any, dict[str, Any]] = {16: {"preset": "repo"}, 20: {"preset": "paper"}, -4: {"preset": "paper"}}
    start = hyper["start_layer"]
    method = VtcCls(keep=k, **settings.get(start, {"layers": f"{start}-{depth - 2}"}))
    wanted = method.wanted(tower)
    yield "layers", torch.tensor([score.layer for score in wanted.values()]), torch.tensor(hyper["layers_used_0based"])
    scores = {name: rows[score.layer] for name, score in wanted.items()}
    total = ensemble(list(scores.values()))
    yield "score", total, array("out_{}_score")
    yield "topk", top(total, k), array("out_{}_topk_desc")
    yield "kept", method.choose(_visual(tuple(hyper["grid"]), **scores)).kept, array("out_{}_kept")


def fopru(case: Case, array: Arrays) -> Checks:
    """Both statistics from q and k, the choice between them, and the kept tokens or rows."""
    hyper, q, k = case["hyper"], array("in_{}_q"), array("in_{}_k")
    softmax = hyper["score_mode"] == "softmax"
    column, row = (
        statistic(Score(0, kind, softmax, patches=True), q, k, 1.0)[:, 1:] for kind in ("column_mean", "row_mean")
    )
    score = torch.stack([significance(*pair) for pair in zip(column, row)])
    yield "significance", score, array("out_{}_significance")
    uses_column = torch.stack([(one == other).all() for one, other in zip(score, column)])
    yield "statistic", uses_column, array("out_{}_uses_column_statistic")
    settings = {"strategy": hyper["strategy"], "scores": hyper["score_mode"]}
    methods = [FoPru(keep=hyper["n_kept"], **settings)]
    if hyper["strategy"] == "row":
        methods.append(FoPru(keep=hyper["ratio"], parity="official", **settings))
    for method in methods:
        kept = [method.choose(_visual(tuple(hyper["grid"]), column=c, row=r)).kept for c, r in zip(column, row)]
        yield f"kept {method.parity}", torch.stack(kept), array("out_{}_kept")


def textmonkey(case: Case, array: Arrays) -> Checks:
    """Similarity to later tokens, and the kept indices."""
    features = array("in_{}_features")
    yield "node_max", later_similarity(features), array("out_{}_node_max")
    method = TextMonkey(keep=case["hyper"]["r"])
    kept = [method.choose(VisualTokens(one, (1, 1, len(one)), len(one))).kept for one in features]
    yield "kept", torch.stack(kept), array("out_{}_kept")


def slime_selector(case: Case, array: Arrays) -> Checks:
    """Similarity to the words, probabilities and what stays of top_p. The local resampler of the set is trained."""
    hyper, features = case["hyper"], array("in_vis")
    text = array("in_txt")[array("in_attn_mask").bool()]
    similarity = text_similarity(features, text, "sum")
    yield "sim", similarity, array("out_sim")
    probability = (similarity / hyper["temp"]).softmax(dim=0)
    yield "prob", probability, array("out_prob")
    yield "number", torch.tensor(nucleus(probability, hyper["topp"])), torch.tensor(len(array("out_index")))
    method = Slime(keep=1.0, top_p=hyper["topp"], temperature=hyper["temp"], reduce="sum")
    kept = method.choose(VisualTokens(features, (1, 1, len(features)), len(features), text=text)).kept
    yield "index", kept, array("out_index")
    yield "selected", features[kept], array("out_selected")


def globalcom2(case: Case, array: Arrays) -> Checks:
    """Ratios, scores, kept tokens of thumbnail and crops, and the order with newlines, of the authors and repaired."""
    hyper = case["hyper"]
    ratio, side = hyper["retention_ratio"], hyper["grid"][0]
    logits = array("in_{}_cls_logits").mean(dim=1)
    visual, view, token = anyres(tuple(hyper["crops_wh"]), side, tuple(hyper["image_size_wh"]), logits)
    method = GlobalCom2(keep=ratio, tau=hyper["temperature"], parity="official")
    plan = method.plan(visual)
    assert plan is not None
    scales = (plan.weights * ratio).clamp(max=1)
    yield "scales", scales, array("out_{}_scales")
    combined = torch.full((len(plan.crops), side * side), torch.nan)
    for number, crop in enumerate(plan.crops):
        combined[number, token[crop.index]] = plan.scores[number]
    theirs = array("out_{}_crop_combined_score")
    yield "padding", combined.isnan(), theirs.isnan()
    yield "combined", combined.nan_to_num(), theirs.nan_to_num()
    yield "valid", torch.tensor([len(crop) for crop in plan.crops]), array("out_{}_crop_valid_tokens")
    choice = method.choose(visual)
    assert choice.features is not None
    order = choice.features[:, 0].long()
    first = hyper["thumb_k"]
    yield "thumbnail", order[:first], array("out_{}_thumb_order")
    rest = order[first:]
    newline = rest < 0
    yield "seq_view", view[rest].masked_fill(newline, -1), array("out_{}_seq_view")
    yield "seq_token", token[rest].masked_fill(newline, -1), array("out_{}_seq_token")
    kept_of = [choice.kept[view[choice.kept] == number] for number in range(len(logits))]
    yield "thumbnail kept", token[kept_of[0]], array("out_{}_thumb_kept")
    yield "crop_topk", torch.tensor([len(one) for one in kept_of[1:]]), array("out_{}_crop_topk")
    for number, crop in enumerate(plan.crops, 1):
        yield f"crop {number}", token[kept_of[number]], array(f"out_{{}}_crop{number}_kept")
        compact = torch.isin(crop.index, kept_of[number]).nonzero().flatten()
        yield f"crop {number} compact", compact, array(f"out_{{}}_crop{number}_kept_compact")


def anyres(
    crops: tuple[int, int], side: int, size: tuple[int, int], scores: Tensor
) -> tuple[VisualTokens, Tensor, Tensor]:
    """A picture of thumbnail and crops with newlines, whose features are the numbers of its tokens, newlines -1.

    crops: (columns, rows); size: (width, height) of the picture; scores: [views, side^2], padding included.
    -> (visual tokens, view [N] of every token, raster index [N] of every token in its padded view)
    """
    view, token = canvas_order(crops, side, size)
    slots = (view >= 0).nonzero().flatten()
    span, view, token = len(view), view[slots], token[slots]
    views = [View((view == 0).nonzero().flatten(), (side, side), "thumbnail")]
    for number in range(1, int(view.max()) + 1):
        index = (view == number).nonzero().flatten()
        height = len((token[index] // side).unique())
        cell = ((number - 1) // crops[0], (number - 1) % crops[0])
        views.append(View(index, (height, len(index) // height), "crop", cell))
    visual = VisualTokens(
        torch.arange(len(view), dtype=torch.float32)[:, None],
        (1, 1, len(view)),
        side * side + 1,
        scores={"logits": scores[view, token]},
        views=views,
        slots=slots,
        span=span,
        newline=torch.tensor([-1.0]),
    )
    return visual, view, token


def _visual(grid: tuple[int, int], **scores: Tensor) -> VisualTokens:
    """One image or view that has nothing but scores."""
    rows, columns = grid
    return VisualTokens(torch.empty(rows * columns, 1), (1, rows, columns), rows * columns + 1, scores=scores)


SETS: dict[str, Callable[[Case, Arrays], Checks]] = {
    "fopru": fopru,
    "globalcom2": globalcom2,
    "slime_selector": slime_selector,
    "textmonkey": textmonkey,
    "vtc_cls": vtc_cls,
}
