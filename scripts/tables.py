"""A language model in tables, for the search that goes back (`vlmfast.search`): scripted logits and attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfast.search import Look


@dataclass(frozen=True)
class TableWalker:
    """A `Walker` over tables. A state is the generated tokens [R, t] themselves.

    logits: [T, V, V], behind token x at place t logits[t, x]. base [H, T, T], more [V, H, T]: the query at place t
    attends with the causal softmax over j of base[h, t, j] + more[x, h, j]. prompt: [1, P]; image: its visual columns.
    """

    logits: Tensor
    base: Tensor
    more: Tensor
    prompt: Tensor
    image: range

    def begin(self, rows: int) -> tuple[Tensor, Tensor]:
        """See `vlmfast.search.Walker`, also for the other methods."""
        state = self.prompt[:, :0].expand(rows, 0)
        return state, self._behind(state)

    def step(self, state: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Look]:
        """One token further."""
        state = torch.cat([state[rows], tokens[:, None]], dim=1)
        place = self.prompt.shape[1] + state.shape[1] - 1
        scores = self.base[:, place, : place + 1] + self.more[tokens, :, : place + 1]
        visual = torch.tensor([column in self.image for column in range(place + 1)])
        look = Look.of(scores.softmax(-1), visual, self.prompt.shape[1], state.shape[1])
        return state, self._behind(state), look

    def keep(self, state: Tensor, rows: Tensor) -> Tensor:
        """Some rows."""
        return state[rows]

    def back(self, state: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is lost here."""
        return tokens, self._behind(tokens)

    def _behind(self, state: Tensor) -> Tensor:
        whole = torch.cat([self.prompt.expand(len(state), -1), state], dim=1)
        return self.logits[whole.shape[1] - 1, whole[:, -1]]
