"""DivPrune: keep tokens that lie as far apart as possible.

Paper: DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (Alvar et al., CVPR 2025),
       arXiv:2503.02175
Code:  https://github.com/vbdi/divprune (799e2d9; CC BY-NC: nothing of it is used here)

    d_ij  = 1 - cos(x_i, x_j)                      features after the projector
    first = argmax_j min_{i != j} d_ij             the token farthest from its nearest neighbour
    next  = argmax_j min_{i chosen} d_ij           until `keep` are chosen (greedy max-min diversity)

Shapes: x [N, D] -> kept [budget]. All tokens of a picture compete, whatever view they belong to, as in the official
code; it needs neither the vision tower's attention nor the question.

The minimum over the chosen tokens is carried along, O(budget N D), where the official code gathers and reduces all
chosen rows of an N x N matrix anew for every token it takes. Only the first token needs all pairs: they are looked at
in blocks, and kept where they are one block.

Differs from the authors' code:
- a chosen token cannot be chosen again (theirs can be, with duplicates: fewer tokens than asked; back with
  `parity="official"`, and said in the report);
- a feature of length zero is orthogonal to all (theirs: NaN);
- newline tokens of any-resolution pictures are no candidates, all pictures are pruned and every row of a batch by
  itself (theirs: the first picture, the first row's choice for all);
- distances in fp32 (theirs: the model's dtype, where bf16 moves 5 of 64 tokens); equal distances go by index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmfast.adapters.pruning.base import Pruner
from vlmfast.decoders import Sizes
from vlmfast.families import Tower
from vlmfast.towers import Picture
from vlmfast.visual import Cosines, VisualTokens, budget, unit

ROWS = 512  # of the block in which all pairs are looked at
WHOLE = 1024  # up to so many tokens all pairs are one block, which then serves for the other tokens, too


def nearest_similarity(x: Tensor) -> Tensor:
    """Largest cosine of each token to another one. x: unit [N, D] -> [N]; a lone token has none: -2

    Each pair is computed once: blocks of the upper triangle, reduced along both sides.
    """
    nearest = x.new_full((len(x),), -2.0)
    for start in range(0, len(x), ROWS):
        rows = x[start : start + ROWS]
        block = rows @ x[start:].T
        block.diagonal().fill_(-2.0)
        mine, others = nearest[start : start + ROWS], nearest[start:]
        torch.maximum(mine, block.amax(1), out=mine)
        torch.maximum(others, block.amax(0), out=others)
    return nearest


def max_min(features: Tensor, k: int, official: bool = False) -> Tensor:
    """Greedy max-min diversity. [N, D] -> indices in the order of choice [k]; official: may repeat an index."""
    x = unit(features)
    cosines = Cosines(x)
    if len(x) <= WHOLE:
        pairs = x @ x.T
        cosines.rows.update(enumerate(pairs.unbind()))
        nearest = pairs.clone().fill_diagonal_(-2).amax(0)
    else:
        nearest = nearest_similarity(x)
    distance = 1 - nearest
    order = [int(distance.argmax())]
    least = torch.full_like(distance, torch.inf)
    for _ in range(k - 1):
        last = order[-1]
        torch.minimum(least, 1 - cosines.row(last, distance), out=least)
        if not official:
            least[last] = -torch.inf
        distance = least
        order.append(int(least.argmax()))
    return torch.tensor(order, device=x.device)


@dataclass(frozen=True, kw_only=True)
class DivPrune(Pruner):
    """Keep the most diverse tokens."""

    name = "divprune"
    summary = "greedy max-min diversity of the visual tokens"
    paper = "arXiv:2503.02175"
    parity: Literal["repaired", "official"] = "repaired"

    def notes(self, tower: Tower) -> tuple[str, ...]:
        """Say that the official form may fall short."""
        if self.parity == "repaired":
            return ()
        return ("divprune: the official form may choose a duplicate twice and then keeps fewer tokens than asked",)

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """All pairs once, whole or in blocks, and then a row for every token taken (rows fetched in advance apart)."""
        n = picture.tokens
        if n <= WHOLE:
            return 2 * model.decoder.width * n * n
        pairs = sum(min(ROWS, n - start) * (n - start) for start in range(0, n, ROWS))
        return 2 * model.decoder.width * (pairs + (self.kept_of(picture) - 1) * n)

    def select(self, visual: VisualTokens) -> Tensor:
        """Features [N, D] -> kept [budget]; official: up to budget."""
        return max_min(visual.features, budget(self.keep, len(visual)), self.parity == "official").unique()
