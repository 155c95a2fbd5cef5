"""LayerPruner: the base of the methods that drop visual tokens inside the language model (door 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.adapter import LAYERS
from vlmfast.adapters.pruning.base import Budgeted
from vlmfast.decoders import Sizes
from vlmfast.families import Family, Positions
from vlmfast.layers.door import LayersDoor
from vlmfast.layers.tokens import Cut, LayerScore, LayerTokens
from vlmfast.patching import Patch
from vlmfast.towers import Picture
from vlmfast.visual import budget


def numbers(text: str | int, name: str) -> tuple[int, ...]:
    """A setting that is a list, written with slashes: "8/16/24" -> (8, 16, 24). A single number stands for itself.

    Raises ValueError that says how it is written.
    """
    try:
        return tuple(int(part) for part in str(text).split("/"))
    except ValueError as error:
        raise ValueError(f"{name}={text!r}: numbers joined by slashes, such as 8/16/24") from error


def scaled(layers: Sequence[int], of: int, depth: int) -> dict[int, int]:
    """Cuts of a decoder with `of` layers at the same share of `depth`. -> layer: number of the cut, ascending

    Where several fall on one layer of a shallow decoder, the last of them counts.
    """
    return {min(depth - 1, max(1, round(layer * depth / of))): number for number, layer in enumerate(layers)}


@dataclass(frozen=True, kw_only=True)
class LayerPruner(Budgeted):
    """Drop visual tokens between decoder layers.

    keep: what is left of a picture after the last cut; a float in (0, 1] is the share of the visual tokens that reach
    the language model, an int their number per picture. positions: "original" keeps the position ids of kept tokens,
    "compact" renumbers after each cut without gaps; None: what the official code does (`authors`).

    A method implements `layers`, `left`, `asks` and `cut` (see `vlmfast.layers.tokens.LayerSelector`).
    """

    door: ClassVar[int] = LAYERS
    authors: ClassVar[Positions] = "original"

    @property
    def fixed(self) -> bool:
        """Whether the layers were set by hand; else early ones may be left out."""
        return True

    def layers(self, depth: int) -> tuple[int, ...]:
        """Before which of the decoder's layers tokens are dropped, ascending."""
        raise NotImplementedError(f"{type(self).__name__} does not implement layers")

    def left(self, layer: int, total: int, depth: int) -> int | None:
        """How many of a picture's `total` tokens enter `layer`; None: decided only there."""
        return budget(self.keep, total)

    def asks(self, layer: int) -> Mapping[str, LayerScore]:
        """Statistics needed to cut before `layer`."""
        return {}

    def raters(self, visual: Tensor, question: Tensor) -> Tensor:
        """Which tokens of the question rate: all. [N, D], [T, D] -> [R]"""
        return torch.arange(len(question), device=question.device)

    def cut(self, tokens: LayerTokens) -> Cut:
        """What stays of one picture."""
        raise NotImplementedError(f"{type(self).__name__} does not implement cut")

    def visual_per_layer(self, picture: Picture, depth: int) -> Sequence[int]:
        """Whole until the first cut, then what each leaves. Newlines go as soon as a token goes."""
        held, total = picture.span, []
        cuts = self.layers(depth)
        for layer in range(depth):
            if layer in cuts:
                left = self.left(layer, picture.tokens, depth)
                if left is not None and left < picture.tokens:
                    held = left
            total.append(held)
        return total

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """The statistics of every cut; all text counts as question, half of it as raters.

        Of the layer to come, queries and keys are projected apart; of the layer before, they are there.
        """
        layers, total = model.decoder.layers, 0
        depth = len(layers)
        held = self.visual_per_layer(picture, depth)
        last = max((layer for layer in range(1, depth) if held[layer] != held[layer - 1]), default=0)
        for cut in (cut for cut in self.layers(depth) if cut <= last):
            left = self.left(cut, picture.tokens, depth)
            if left is not None and left >= held[cut - 1]:
                continue
            keys = text + held[cut - 1]
            for score in self.asks(cut).values():
                rows = {"last": 1, "question": text, "chosen": text // 2, "all": keys}[score.queries]
                rows = rows if score.kind == "attention" else 0
                layer = layers[cut if score.own else cut - 1]
                total += layer.statistic(rows, keys, apart=score.own)
        return total

    def attach(self, patch: Patch) -> None:
        """Install door 2, and door 1 in front of it where no method has."""
        LayersDoor(patch, self, self.positions or self.authors)


@dataclass(frozen=True, kw_only=True)
class EarlyPruner(LayerPruner):
    """A method that drops tokens once, behind an early layer.

    layer: the decoder layer (0-based) that gets `keep` of the tokens; the one before it gives the statistics.
    """

    layer: int = 2

    @classmethod
    def needs(cls, family: Family) -> dict[str, Any]:
        """A later layer where the published models of a family still add features to the early ones (deepstack: three)
        or have linear layers there (the fourth attends).
        """
        return {"layer": 4} if family.hybrid else {"layer": 3} if family.deepstack else {}

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise ValueError(f"layer={self.layer!r}: a decoder layer, 1 or more (0-based)")

    def layers(self, depth: int) -> tuple[int, ...]:
        """One cut."""
        return (self.layer,)


@dataclass(frozen=True, kw_only=True)
class StagedPruner(LayerPruner):
    """A method that drops tokens in stages through the decoder.

    stages: the layers before which it does, such as 8/16/24; None: the authors' (`plan`, of `plan_depth` layers), at
    the same shares of the depth.
    """

    plan: ClassVar[tuple[int, ...]] = ()
    plan_depth: ClassVar[int] = 32
    stages: str | int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages is not None:
            numbers(self.stages, "stages")

    @classmethod
    def unsupported(cls, family: Family) -> str | None:
        """Every stage needs a layer with attention."""
        if family.hybrid:
            return "most of its decoder layers have no attention that could score"
        return super().unsupported(family)

    @property
    def fixed(self) -> bool:
        """Whether `stages` is given."""
        return self.stages is not None

    @property
    def count(self) -> int:
        """Number of stages."""
        return len(self.plan if self.stages is None else numbers(self.stages, "stages"))

    def layers(self, depth: int) -> tuple[int, ...]:
        """The stages' layers."""
        if self.stages is None:
            return tuple(scaled(self.plan, self.plan_depth, depth))
        return numbers(self.stages, "stages")

    def stage(self, layer: int, depth: int) -> int:
        """Number of the stage before a layer, from 0: the last one due, where early ones had to be left out."""
        if self.stages is None:
            due = [number for planned, number in scaled(self.plan, self.plan_depth, depth).items() if planned <= layer]
            return max(due, default=0)
        return numbers(self.stages, "stages").index(layer)
