"""FoPru: focal pruning, by the attention statistic that tells the tokens apart best; tokens, or whole rows of them.

Paper: FoPru: Focal Pruning for Efficient Large Vision-Language Models (Jiang et al. 2024), arXiv:2411.14164
Code:  none by the authors; an engine of the same group has it: https://github.com/dongxianzhe/hydrainfer (d4d5f4f,
       hydrainfer/layer/token_prunning.py)

    A = mean_h of the attention among patches (CLS row and column left out) in the layer that gives the features
    c_j = mean_i A_ij  (attention received),   r_i = mean_j A_ij
    significance s = c if Var(c) > Var(r) else r          (unbiased variance)
    strategy="rank": the largest s;   strategy="row": the rows of the grid with the largest sum of s
    in raster order                                       (per view, each with its own statistic; per frame)

Shapes: c, r [N] -> s [N] -> kept [budget]. `scores`: "softmax" takes A after the softmax, "logits" the scaled logits
before it, as the engine does; which of them the paper means is not known.

Differs from that code (`parity="official"` has the first point back):
- "row" keeps floor(budget / width) whole rows and fills the budget up with the most significant tokens of the next
  best row; theirs keeps floor(share x rows) whole rows and so up to a row less than asked for, or nothing at all
  (an error here);
- a row is a row of the picture's own grid; theirs needs a square number of tokens;
- equal scores go by index; scores in fp32.
Towers without CLS have the same statistics over all their patches. There the rows of a softmax all have the mean 1/N,
so that the attention received is the statistic without further ado. Where patches are merged into a token, it has the
mean of their statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmfast.adapters.pruning.base import Pruner
from vlmfast.families import Tower
from vlmfast.visual import Score, View, VisualTokens, top


def significance(column: Tensor, row: Tensor) -> Tensor:
    """The statistic with the larger unbiased variance, `row` where they are equal, fp32. column, row: [N] -> [N]"""
    column, row = column.float(), row.float()
    if len(column) < 2:
        return row
    return column if bool(column.var() > row.var()) else row


def best_rows(score: Tensor, grid: tuple[int, int], k: int) -> Tensor:
    """k tokens of the best rows: whole rows, then the best tokens of the next. score [h * w] -> [k]

    A row counts by the sum of its scores; equal rows and tokens go by index.
    """
    h, w = grid
    rows = score.float().view(h, w)
    order = top(rows.sum(dim=1), min(h, k // w + 1))
    whole = order[: k // w]
    tokens = (whole[:, None] * w + torch.arange(w, device=score.device)).flatten()
    if k % w == 0:
        return tokens
    partial = order[k // w]
    return torch.cat([tokens, partial * w + top(rows[partial], k % w)])


@dataclass(frozen=True, kw_only=True)
class FoPru(Pruner):
    """strategy: "rank" tokens or "row"s of the grid. scores: attention after the softmax, or "logits" before it."""

    name = "fopru"
    summary = "tokens or rows of the grid by the attention statistic of larger variance"
    paper = "arXiv:2411.14164"
    strategy: Literal["rank", "row"] = "rank"
    scores: Literal["softmax", "logits"] = "softmax"
    parity: Literal["repaired", "official"] = "repaired"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (
            ("strategy", ("rank", "row")),
            ("scores", ("softmax", "logits")),
            ("parity", ("repaired", "official")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {' or '.join(map(repr, choices))}")

    def wanted(self, tower: Tower) -> dict[str, Score]:
        """Both statistics of the feature layer; one where the other is constant."""
        softmax = self.scores == "softmax"
        column = Score(tower.feature_layer, "column_mean", softmax, patches=tower.has_cls)
        if softmax and not tower.has_cls:
            return {"column": column}
        return {"column": column, "row": Score(tower.feature_layer, "row_mean", softmax, patches=tower.has_cls)}

    def notes(self, tower: Tower) -> tuple[str, ...]:
        """Say when fewer tokens than `keep` may stay."""
        if (self.strategy, self.parity) != ("row", "official"):
            return ()
        return (f"{self.name}: whole rows only (parity=official), up to one row a view fewer than keep",)

    def select(self, visual: VisualTokens) -> Tensor:
        """Statistics [N] -> kept [budget]; with parity="official" and strategy="row" down to a row a view fewer."""
        column = visual.scores["column"]
        row = visual.scores.get("row")

        def choose(view: View, k: int) -> Tensor:
            index = view.index.to(column.device)
            score = column[index] if row is None else significance(column[index], row[index])
            if self.strategy == "rank":
                return top(score, k)
            h, w = view.grid
            if self.parity == "official":
                k = (int(h * self.keep) if isinstance(self.keep, float) else k // w) * w
                if not k:
                    raise ValueError(
                        f"{self.name}: keep={self.keep} is less than one row of a view of {h} rows of {w} tokens, and "
                        "parity=official keeps whole rows; raise keep or leave parity out"
                    )
            return best_rows(score, view.grid, k)

        return self.per_view(visual, choose)
