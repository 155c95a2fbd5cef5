"""What later calls on a cache must know of the pruned prompts it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STATE = "vlmfast_state"  # on a cache: its CacheState


@dataclass
class CacheState:
    """What must be remembered of the prompts a cache holds.

    mask: [B, C] 1 for real tokens, 0 for padding, for the first C columns of the cache. columns: how many columns the
    user's own attention mask has for them. shift: [B] what compact positions lag behind the original ones.
    following: [B] original position of the token after these columns. padded: whether mask has a 0.
    """

    mask: Tensor
    columns: int
    shift: Tensor
    following: Tensor
    padded: bool

    @property
    def dropped(self) -> int:
        """Columns the user counts and the cache does not hold."""
        return self.columns - self.mask.shape[1]

    def extend(self, mask: Tensor | None, held: int, new: int) -> Tensor:
        """The mask [B, held + new] of a cache of `held` columns and `new` tokens.

        mask: the user's own, either over all columns counted by the user or already over the cache's; or None.
        """
        rows, seen = self.mask.shape
        if held < seen:
            raise ValueError(
                f"the cache holds {held} columns, fewer than the {seen} of the pruned prompt: "
                "cropping into a pruned prompt is not supported, start a fresh cache"
            )
        later = held + new - seen
        if mask is None:
            return torch.cat([self.mask, self.mask.new_ones(rows, later)], dim=1)
        if mask.shape[0] != rows:
            raise ValueError(f"attention_mask has {mask.shape[0]} rows, the cache was filled with {rows}")
        if mask.shape[1] == held + new:
            return mask
        if mask.shape[1] == self.columns + later:
            return torch.cat([self.mask.to(mask), mask[:, self.columns :]], dim=1)
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns; expected {self.columns + later} (the whole conversation) "
            f"or {held + new} (what the pruned cache holds)"
        )


def state_of(cache: Any) -> CacheState | None:
    """The state a cache carries; one left over from before a reset is removed."""
    state = getattr(cache, STATE, None)
    if state is not None and int(cache.get_seq_length()) == 0:
        delattr(cache, STATE)
        return None
    return state
