"""Pruner: the base of the methods that choose visual tokens before the language model (door 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.adapter import Adapter
from vlmfast.families import Positions, Tower
from vlmfast.inputs import Door
from vlmfast.patching import Patch
from vlmfast.visual import Score, VisualTokens, budget, check_keep


@dataclass(frozen=True, kw_only=True)
class Pruner(Adapter):
    """Keep some of an image's visual tokens.

    keep: a float in (0, 1] is the share of each image's visual tokens, an int their number per image, all its views
    together. positions: "original" keeps the position ids of kept tokens, "compact" renumbers without gaps; None: what
    the official codes do for the model family.

    A method implements `select`, and `wanted` when it needs statistics of the vision tower.
    """

    kind: ClassVar[str] = "pruning"
    keep: float | int = 0.5
    positions: Positions | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.positions not in (None, "original", "compact"):
            raise ValueError(f"positions={self.positions!r}: choose 'original' or 'compact'")

    def wanted(self, tower: Tower) -> dict[str, Score]:
        """Statistics of the vision tower the method needs, under its own names. Raises where it cannot work."""
        return {}

    def notes(self, tower: Tower) -> tuple[str, ...]:
        """What a user of this tower should read in the report."""
        return ()

    def select(self, visual: VisualTokens) -> Tensor:
        """Indices of the visual tokens to keep, any order. -> int64 [budget(keep, N)]"""
        raise NotImplementedError(f"{type(self).__name__} does not implement select")

    def choose(self, visual: VisualTokens) -> Tensor:
        """Kept indices in raster order; all of them, untouched by the method, when nothing is to go."""
        if budget(self.keep, len(visual)) == len(visual):
            return torch.arange(len(visual), device=visual.features.device)
        return self.select(visual).sort().values

    def attach(self, patch: Patch) -> None:
        """Install door 1. Two pruners would each rewrite what the other rewrote: refused."""
        if patch.base.__dict__.get("get_image_features") is not None:
            raise NotImplementedError("two pruning methods before the language model cannot be combined: choose one")
        Door(patch, self, self.positions)
