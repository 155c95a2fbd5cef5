"""Grid: the control that samples the image evenly.

Paper: none; the spatial-sampling control of the pruning literature, e.g. FasterVLM (arXiv:2412.01818).
Code:  none.

    the coarsest regular sub-grid with at least `keep` points, thinned evenly along the raster to exactly `keep`

A picture of several views (thumbnail, crops, frames) has such a grid in each, with its share of the budget. Rows and
columns are the centres of equal cells, so that no border is favoured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfast.adapters.pruning.base import Pruner
from vlmfast.visual import VisualTokens


def even_grid(rows: int, columns: int, k: int) -> Tensor:
    """`k` raster indices spread evenly over a grid. -> int64 [k]"""
    down = min(rows, max(1, round(math.sqrt(k * rows / columns))))
    across = min(columns, math.ceil(k / down))
    down = min(rows, math.ceil(k / across))
    y, x = _centres(rows, down), _centres(columns, across)
    points = (y[:, None] * columns + x).flatten()
    return points[_centres(len(points), k)]


def _centres(n: int, k: int) -> Tensor:
    """Centres of k equal parts of range(n). -> int64 [k], distinct and ascending"""
    return ((torch.arange(k, dtype=torch.float64) + 0.5) * n / k).long()


@dataclass(frozen=True, kw_only=True)
class Grid(Pruner):
    """Control: an even grid over the image."""

    name = "grid"
    summary = "control: an even grid over the image"
    paper = "arXiv:2412.01818"

    def select(self, visual: VisualTokens) -> Tensor:
        """An even grid over the rows and columns of every view. -> [budget]"""
        return self.per_view(visual, lambda view, k: even_grid(*view.grid, k).to(visual.features.device))
