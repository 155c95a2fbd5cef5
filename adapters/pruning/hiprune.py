"""HiPrune: anchors and their neighbours from a middle layer, registers from a deep layer.

Paper: HiPrune: Hierarchical Attention for Efficient Token Pruning in VLMs (ACL 2026 Findings), arXiv:2508.00553
Code:  https://github.com/Danielement321/HiPrune (6e83a12)

    o_j, d_j = attention received by token j, mean over heads and queries, in the object layer and in the deep layer
    anchors   = top round(K alpha / 5) of o
    buffers   = the four neighbours of each anchor
    registers = top K - |anchors + buffers| of d among the rest

Shapes: o, d [N] -> kept [K]. Layers: object 9 of 24 (CLIP-L) or 16 of 32 (Qwen2.5-VL), 1-based, scaled to the depth
of other towers; deep: the layer that gives the features. Thumbnail, crops and frames are chosen from one by one, each
with its share of the budget by size and with neighbours on its own grid.

Differs from the authors' code (`parity="official"` has all of it back):
- neighbours are those on the grid; theirs are index +-1, +-W, which wrap to the other end of a row, clamped to
  [0, N-1], which injects the two corner tokens;
- anchors and buffers never return as registers; in their Qwen code column sums exceed the 1 that is subtracted, so
  sinks are chosen twice and fewer than K tokens stay;
- when anchors and buffers outnumber K, anchors go first, then buffers, by object score; theirs raises;
- scores in fp32; equal scores go by index; W is the image's own width, where theirs is 24 or that of image 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmfast.adapters.pruning.base import Pruner
from vlmfast.families import Tower
from vlmfast.visual import Score, View, VisualTokens, top


@dataclass(frozen=True)
class Selection:
    """The parts of a choice: anchors and registers by descending score, anchor_buffer and kept ascending."""

    anchors: Tensor
    anchor_buffer: Tensor
    registers: Tensor
    kept: Tensor


def neighbours(anchors: Tensor, rows: int, columns: int, official: bool) -> Tensor:
    """Up to four neighbours of each anchor on a grid of rows x columns. [A] -> [<= 4 A]"""
    step = torch.tensor([-1, 1, -columns, columns], device=anchors.device)
    around = anchors[:, None] + step
    if official:
        return around.flatten().clamp(0, rows * columns - 1)
    same_row = around[:, :2] // columns == anchors[:, None] // columns
    inside = (around >= 0) & (around < rows * columns)
    inside[:, :2] &= same_row
    return around[inside]


def hierarchical(
    objects: Tensor, deep: Tensor, k: int, alpha: float, grid: tuple[int, int], official: bool = False
) -> Selection:
    """Choose k of N tokens. objects, deep: [N] column scores (official: means for CLIP, sums for Qwen); grid: (rows,
    columns). Raises ValueError where the official code cannot go on: more anchors and buffers than k.
    """
    anchors = top(objects, round(k * alpha / 5))
    buffers = neighbours(anchors, *grid, official)
    both = torch.cat([anchors, buffers]).unique()
    if len(both) > k:
        if official:
            raise ValueError(f"hiprune: {len(both)} anchors and buffers for keep={k}; lower alpha or raise keep")
        outer = both[~torch.isin(both, anchors)]
        both = torch.cat([anchors, outer[top(objects[outer], len(outer))]])[:k].sort().values
    rest = deep.float().clone()
    if official:
        rest[both] -= 1
    else:
        rest[both] = -torch.inf
    registers = top(rest, k - len(both))
    return Selection(anchors, both, registers, torch.cat([both, registers]).unique())


@dataclass(frozen=True, kw_only=True)
class HiPrune(Pruner):
    """alpha: share of the budget for anchors and neighbours; object_layer: 1-based, None: the paper's, scaled."""

    name = "hiprune"
    summary = "anchors and neighbours from a middle layer of the tower, registers from a deep one"
    paper = "arXiv:2508.00553"
    alpha: float = 0.1
    object_layer: int | None = None
    parity: Literal["repaired", "official"] = "repaired"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha!r}: a share in [0, 1]")

    def wanted(self, tower: Tower) -> dict[str, Score]:
        """Attention received in the object layer and in the deep layer."""
        if self.object_layer is not None:
            layer = self.object_layer - 1
        else:
            layer = tower.nearest_full_layer(9 / 24 if tower.has_cls else 16 / 32)
        objects = Score(layer, "column_mean")
        tower.check(objects)
        return {"objects": objects, "deep": Score(tower.feature_layer, "column_mean")}

    def select(self, visual: VisualTokens) -> Tensor:
        """Object and deep scores [N] -> kept [budget], view by view."""
        # The official Qwen code sums over queries where the CLIP one averages, which matters to its "- 1" alone.
        patches = visual.patches[1] * visual.patches[2] or len(visual.views[0])
        scale = 1 if visual.queries == patches + 1 else visual.queries
        objects, deep = visual.scores["objects"] * scale, visual.scores["deep"] * scale
        official = self.parity == "official"

        def choose(view: View, k: int) -> Tensor:
            index = view.index.to(objects.device)
            return hierarchical(objects[index], deep[index], k, self.alpha, view.grid, official).kept

        return self.per_view(visual, choose)
