"""GlobalCom2: the thumbnail of a picture decides how many tokens its crops keep, and helps to decide which.

Paper: Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large Vision-Language
       Models (Liu et al., AAAI 2026), arXiv:2501.05179
Code:  https://github.com/xuyang-liu16/GlobalCom2 (96b2d00, llava/model/llava_arch.py)

    a_j = mean_h q_CLS k_j / sqrt(d)     in the last layer of the tower, before the softmax; in every view its own
    thumbnail: the largest a
    S_c = sum of the thumbnail's a over the cell of crop c in the grid of crops
    w_c = 1 + sigma_c - mean sigma,   sigma = softmax(S / tau);   crop c keeps the share R w_c, at most 1
    crop c: the largest  a / |a| + g / |g|,   g = the piece of the thumbnail's a, resized to the picture, that c shows

Shapes: a [N] -> kept [budget]. tau belongs to sums of logits over a thumbnail of 576 tokens.

Views: a thumbnail and crops. A picture of a single view has no crops to rank: the authors' code leaves it whole; here
it keeps its largest a, so that `keep` holds, and the report says so (crops without a thumbnail likewise, each with its
share by size). Videos are refused: what the paper does with them is not published as code.

Differs from the authors' code (`parity="official"` has these back; fewer tokens than `keep` may then stay, which the
report says):
- the numbers of all views add up to the budget: R is the factor at which they do; theirs rounds every view down, and
  loses what a crop with more than all its tokens would have had;
- tokens stay in the order of the prompt, at the rows where they belong, with the newlines of these rows; theirs has
  the thumbnail by falling score, takes a token's number among its crop's unpadded tokens for its place in the padded
  crop, which shifts it to other rows wherever there is padding, and puts a newline after every row of the padded
  canvas.
Equal scores go by index; fp32 throughout (theirs: fp16). Newlines stay, as theirs; `keep` does not count them.
Towers without CLS: theirs has no such path. `fallback="cosine"` is the score of the paper's appendix,
a_j = -cos(x_j, mean x) with x the visual tokens of a view; without it such a tower is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vlmfast.adapters.pruning.base import ClsPruner
from vlmfast.families import Tower
from vlmfast.patching import ImageReport
from vlmfast.visual import Choice, Score, View, VisualTokens, apportion, budget, top, unit


@dataclass(frozen=True)
class Plan:
    """A picture's thumbnail and crops, and what decides over them.

    overview: [h * w] scores of the thumbnail; crops: row by row; weights: float64 [crops], the w of the equation;
    scores: per crop [n], local and global score together.
    """

    thumbnail: View
    overview: Tensor
    crops: list[View]
    weights: Tensor
    scores: list[Tensor]


def crop_weights(overview: Tensor, grid: tuple[int, int], crops: tuple[int, int], tau: float) -> Tensor:
    """How much more (> 1) or less (< 1) than the average each crop keeps, mean 1. -> float64 [rows * columns]

    overview: [h * w] scores of the thumbnail over `grid`; crops: (rows, columns). Where the crops do not divide the
    grid, the last row and column of crops take what is left.
    """
    (h, w), (rows, columns) = grid, crops
    row = (torch.arange(h) // max(1, h // rows)).clamp(max=rows - 1)
    column = (torch.arange(w) // max(1, w // columns)).clamp(max=columns - 1)
    cell = (row[:, None] * columns + column).flatten().to(overview.device)
    total = overview.new_zeros(rows * columns, dtype=torch.float64).index_add(0, cell, overview.double())
    powers = ((total - total.max()) / tau).exp()
    sigma = powers / (powers.sum() + 1e-8)
    return 1 + sigma - sigma.mean()


def join(local: Tensor, piece: Tensor) -> Tensor:
    """Local and global scores of a crop, each of length one, added. [n], [n] -> [n]"""
    return unit(local) + unit(piece)


def share_out(k: int, weights: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """k tokens shared out over crops in proportion to weight x size, none more than its size, by largest remainder.

    weights: positive. What a full crop cannot take goes to the others. Raises ValueError when k exceeds all sizes.
    """
    if not 0 <= k <= sum(sizes):
        raise ValueError(f"{k} tokens of crops that have {sum(sizes)}")
    shares, left, rest = [0] * len(sizes), k, list(range(len(sizes)))
    while True:
        total = sum(weights[i] * sizes[i] for i in rest)
        full = [i for i in rest if left * weights[i] >= total]
        if not full:
            break
        for i in full:
            shares[i] = sizes[i]
            left -= sizes[i]
        rest = [i for i in rest if i not in full]
    ideal = {i: left * weights[i] * sizes[i] / total for i in rest}
    for i in rest:
        shares[i] = int(ideal[i])
    for i in sorted(rest, key=lambda i: (shares[i] - ideal[i], i))[: k - sum(shares)]:
        shares[i] += 1
    return shares


def canvas_sequence(
    kept: Sequence[Tensor], cells: Sequence[tuple[int, int]], grid: tuple[int, int], crops: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The authors' order of the crops' tokens: rows of the padded canvas, a newline after each. -> crop, token [M]

    kept: per crop the numbers of its kept tokens among its unpadded ones, which the authors take for places in the
    padded crop of `grid` (h, w); cells: (row, column) per crop; crops: (rows, columns). Newlines are -1 in both.
    """
    (h, w), (rows, columns) = grid, crops
    width = columns * w + 1
    device = kept[0].device
    newlines = torch.full((rows * h,), -1, device=device)
    places = [(y * h + one // w) * width + x * w + one % w for one, (y, x) in zip(kept, cells)]
    places.append(torch.arange(1, rows * h + 1, device=device) * width - 1)
    order = torch.cat(places).argsort()
    crop = torch.cat([*(torch.full_like(one, i) for i, one in enumerate(kept)), newlines])
    return crop[order], torch.cat([*kept, newlines])[order]


@dataclass(frozen=True, kw_only=True)
class GlobalCom2(ClsPruner):
    """tau: temperature of the crops' ratios. fallback: "cosine" on a tower without CLS, or it is refused."""

    name = "globalcom2"
    summary = "crops keep as many tokens as the thumbnail finds them worth"
    paper = "arXiv:2501.05179"
    modalities = ("image",)
    keeps_newlines = True
    substitute = ("cosine", "the distance of a token to its view's mean")
    tau: float = 10.0
    parity: Literal["repaired", "official"] = "repaired"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau < float("inf"):
            raise ValueError(f"tau={self.tau!r}: a positive number")
        if self.parity == "official" and self.positions == "original":
            raise ValueError("parity='official' changes the order of tokens: original positions have no meaning there")

    def wanted(self, tower: Tower) -> dict[str, Score]:
        """CLS logits of the last layer; nothing of the tower with the fallback."""
        return {"logits": Score(tower.depth - 1, "cls_row", softmax=False)} if self.follows_cls(tower) else {}

    def remarks(self, pictures: Sequence[ImageReport]) -> tuple[str, ...]:
        """Say where there were no crops to compare, and where fewer tokens than `keep` may have stayed."""
        about, pruned = list(super().remarks(pictures)), [picture for picture in pictures if picture.kept < picture.n]
        single = sum(_parts(picture.views) is None for picture in pruned)
        if single:
            about.append(f"{self.name}: {single} picture(s) without thumbnail and crops, pruned by score alone")
        if self.parity == "official" and len(pruned) > single:
            about.append(f"{self.name}: parity=official rounds every view down, fewer tokens than keep")
        return tuple(about)

    def score(self, visual: VisualTokens) -> Tensor:
        """a of the equation, fp32 [N]."""
        if "logits" in visual.scores:
            return visual.scores["logits"].float()
        score = visual.features.new_empty(len(visual), dtype=torch.float32)
        for view in visual.views:
            index = view.index.to(score.device)
            features = visual.features[index].float()
            score[index] = -(unit(features) @ unit(features.mean(dim=0)))
        return score

    def plan(self, visual: VisualTokens) -> Plan | None:
        """What decides over thumbnail and crops; None where a picture has no such views."""
        parts = _parts(visual.views)
        if parts is None:
            return None
        thumbnail, crops = parts
        score = self.score(visual)
        overview = score[thumbnail.index.to(score.device)]
        heights, widths = _sizes(crops)
        weights = crop_weights(overview, thumbnail.grid, (len(heights), len(widths)), self.tau)
        resized = interpolate(
            overview.view(1, 1, *thumbnail.grid), (sum(heights), sum(widths)), mode="bilinear", align_corners=False
        )[0, 0]
        joined = []
        for crop in crops:
            (row, column), (h, w) = crop.cell, crop.grid
            y, x = sum(heights[:row]), sum(widths[:column])
            local = score[crop.index.to(score.device)]
            joined.append(join(local, resized[y : y + h, x : x + w].flatten()))
        cells = torch.tensor([row * len(widths) + column for row, column in (crop.cell for crop in crops)])
        return Plan(thumbnail, overview, crops, weights[cells.to(weights.device)], joined)

    def select(self, visual: VisualTokens) -> Tensor | Choice:
        """Scores [N] -> kept [budget]; with parity="official" fewer, in another order and with newlines."""
        if any(view.kind == "frame" for view in visual.views):
            raise NotImplementedError(
                f"{self.name} on videos: what its paper does with frames is not published as code; use another method"
            )
        plan = self.plan(visual)
        if plan is None:
            score = self.score(visual)
            return self.per_view(visual, lambda view, k: top(score[view.index.to(score.device)], k))
        if self.parity == "official":
            return self._official(visual, plan)
        sizes = [len(crop) for crop in plan.crops]
        first, others = apportion(budget(self.keep, len(visual)), [len(plan.thumbnail), sum(sizes)])
        shares = share_out(others, plan.weights.tolist(), sizes)
        kept = [top(plan.overview, first), *map(top, plan.scores, shares)]
        views = [plan.thumbnail, *plan.crops]
        return torch.cat([view.index.to(one.device)[one] for view, one in zip(views, kept)])

    def _official(self, visual: VisualTokens, plan: Plan) -> Choice:
        """The authors' numbers of tokens and their order, newlines of the padded canvas included."""
        ratio = self.keep if isinstance(self.keep, float) else self.keep / len(visual)
        first = top(plan.overview, int(len(plan.thumbnail) * ratio))
        shares = [int(len(crop) * min(1.0, ratio * w)) for crop, w in zip(plan.crops, plan.weights.tolist())]
        kept = [top(one, k).sort().values for one, k in zip(plan.scores, shares)]
        if not len(first) + sum(shares):
            raise ValueError(
                f"{self.name}: keep={self.keep} leaves no token of any view (parity=official rounds down)"
            )
        heights, widths = _sizes(plan.crops)
        crop, token = canvas_sequence(
            kept, [one.cell for one in plan.crops], plan.thumbnail.grid, (len(heights), len(widths))
        )
        device = visual.features.device
        if visual.newline is None:
            crop, token = crop[crop >= 0], token[crop >= 0]
        places = torch.full_like(crop, -1)
        for number, one in enumerate(plan.crops):
            own = crop == number
            places[own] = one.index.to(crop.device)[token[own]]
        places = torch.cat([plan.thumbnail.index.to(crop.device)[first], places]).to(device)
        features = visual.features[places.clamp(min=0)]
        if visual.newline is not None:
            features[places < 0] = visual.newline.to(features)
        if len(features) > visual.span:
            raise ValueError(
                f"{self.name}: keep={self.keep} with the newlines of the padded canvas (parity=official) needs "
                f"{len(features)} places, the prompt has {visual.span}; lower keep"
            )
        return Choice(places[places >= 0].sort().values, features, torch.arange(len(features), device=device))


def _parts(views: Sequence[View]) -> tuple[View, list[View]] | None:
    """Thumbnail, and crops row by row; None where one of them is missing."""
    thumbnail = next((view for view in views if view.kind == "thumbnail"), None)
    crops = sorted((view for view in views if view.kind == "crop" and len(view)), key=lambda view: view.cell)
    return None if thumbnail is None or not crops else (thumbnail, crops)


def _sizes(crops: Sequence[View]) -> tuple[list[int], list[int]]:
    """Heights of the rows and widths of the columns of crops, in tokens."""
    rows, columns = (1 + max(crop.cell[axis] for crop in crops) for axis in (0, 1))
    heights = [max((crop.grid[0] for crop in crops if crop.cell[0] == row), default=0) for row in range(rows)]
    widths = [max((crop.grid[1] for crop in crops if crop.cell[1] == column), default=0) for column in range(columns)]
    return heights, widths
