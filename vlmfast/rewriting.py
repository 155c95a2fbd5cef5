"""The arithmetic of a shorter prompt: which columns stay, where images lie, how positions are renumbered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmfast.patching import ImageReport
from vlmfast.visual import Choice, VisualTokens


class Span(Protocol):
    """A picture in a sequence: row of the batch, its columns [n] ascending, and which of them stay."""

    @property
    def row(self) -> int: ...

    @property
    def columns(self) -> Tensor: ...

    def stays(self) -> Tensor:
        """Indices into `columns`, ascending."""
        ...


@dataclass(frozen=True)
class Selected:
    """One picture of a batch: what is chosen of it and where its placeholders stand (row, columns [span])."""

    visual: VisualTokens
    choice: Choice
    row: int
    columns: Tensor
    newlines: bool = False  # whether places without a token stay when tokens are dropped

    def stays(self) -> Tensor:
        """The placeholders that stay, ascending. [M], of `span`"""
        visual, kept = self.visual, self.choice.kept
        if self.choice.slots is not None:
            return self.choice.slots
        if visual.slots is None:
            return kept
        keep = torch.zeros(visual.span, dtype=torch.bool, device=visual.slots.device)
        keep[visual.slots[kept.to(visual.slots.device)]] = True
        if self.newlines or len(kept) == len(visual):
            newline = torch.ones_like(keep)
            newline[visual.slots] = False
            keep |= newline
        return keep.nonzero().flatten()

    def tokens(self) -> Tensor:
        """Which visual token stands at each place that stays, -1 for a newline. [M]"""
        visual, stays = self.visual, self.stays()
        if self.choice.slots is not None and len(self.choice.kept) == len(stays):
            return self.choice.kept
        if visual.slots is None:
            return stays
        token = torch.full((visual.span,), -1, device=stays.device)
        token[visual.slots.to(stays.device)] = torch.arange(len(visual), device=stays.device)
        return token[stays]

    def features(self) -> Tensor:
        """What stands at the places that stay. [M, D]"""
        visual, choice = self.visual, self.choice
        if choice.slots is not None and choice.features is not None:
            return choice.features.to(visual.features)
        features = visual.features
        if choice.features is not None:
            features = features.clone()
            features[choice.kept.to(features.device)] = choice.features.to(features)
        return visual.spread(features)[self.stays().to(features.device)]

    def deepstack(self) -> list[Tensor]:
        """The deepstack features at the places that stay, one [M, D] a layer."""
        if not self.visual.deepstack:
            return []
        if self.visual.slots is not None or self.choice.slots is not None:
            raise NotImplementedError("deepstack features with newlines or a reordered sequence")
        return [layer[self.choice.kept.to(layer.device)] for layer in self.visual.deepstack]

    def report(self) -> ImageReport:
        """What a report says of it."""
        visual = self.visual
        return ImageReport(
            n=visual.span,
            kept=len(self.stays()),
            indices=self.choice.kept,
            grid=visual.grid,
            views=tuple(visual.views),
            patches=visual.patches,
            merged=self.choice.features is not None,
        )


def following(positions: Tensor, real: Tensor) -> Tensor:
    """Position after the last token that is not padding. positions: [B, L] or [A, B, L], real: [B, L] -> [B].

    M-RoPE: as `generate` goes on, from the last token and not from the time axis of a video, which may lie ahead. A
    picture at the end counts by its sides.
    """
    flat = positions if positions.ndim == 2 else positions[-2:].amax(0)
    last = real.shape[1] - 1 - real.long().flip(1).argmax(1, keepdim=True)
    return torch.where(real.any(1), flat.gather(1, last)[:, 0] + 1, 0)


def gather_index(keep: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Columns that stay, packed to the side that is not padded. [B, L] -> index [B, M], not padding [B, M].

    keep: tokens that stay; real: tokens that are not padding. Padding is on the left unless a row ends with it.
    """
    live = keep & real
    width = max(1, int(live.sum(1).max()))
    right_padded = bool((~real[:, -1]).any())
    order = ((~live) if right_padded else live).long().argsort(dim=1, stable=True)
    index = order[:, :width] if right_padded else order[:, -width:]
    return index, live.gather(1, index)


def rows_of_images(places: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(row, image) pairs in the order of the placeholders.

    places: placeholders per row; sizes: visual tokens per image. Beams and return sequences repeat every row, with
    the images of the row repeated as a group.
    """
    total, wanted = sum(places), sum(sizes)
    if wanted == 0 or total % wanted:
        raise ValueError(f"the prompts have {total} image placeholders, the images {wanted} visual tokens")
    repeat = total // wanted
    pairs: list[tuple[int, int]] = []
    image = 0
    for first in range(0, len(places), repeat):
        group, filled = [], 0
        while filled < places[first]:
            if image == len(sizes):
                break
            group.append(image)
            filled += sizes[image]
            image += 1
        if filled != places[first] or any(count != filled for count in places[first : first + repeat]):
            raise ValueError(
                f"row {first} has {places[first]} image placeholders, its images have {filled} visual tokens: "
                "was the processor's prompt changed?"
            )
        pairs += [(row, member) for row in range(first, first + repeat) for member in group]
    return pairs


def compact(positions: Tensor, keep: Tensor, selected: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """Renumber without gaps. -> (positions, shift [B]: how far the text after the images moved)

    One axis: a position falls by the number of tokens dropped before it. M-RoPE: inside a picture, or a run of it (a
    frame between its times), the k-th distinct value left on an axis becomes the k-th there was: rows and columns
    close up, and frames keep the distance in time that frames have. What follows starts after the larger side that is
    left, as transformers has it: the time axis never moves the text.
    """
    if positions.ndim == 2:
        gone = (~keep).long().cumsum(1)
        return positions - gone, gone[:, -1]
    positions = positions.clone()
    axes = positions[-3:]
    sides = axes[1:]
    shift = torch.zeros(keep.shape[0], dtype=torch.long, device=keep.device)
    for one in selected:
        row, stays = one.row, torch.zeros_like(one.columns, dtype=torch.bool)
        stays[one.stays().to(stays.device)] = True
        breaks = (one.columns.diff() != 1).nonzero().flatten().add(1).tolist()
        bounds = [0, *breaks, len(one.columns)]
        for begin, stop in zip(bounds[:-1], bounds[1:]):
            columns, left = one.columns[begin:stop], one.columns[begin:stop][stays[begin:stop]]
            end = sides[:, row, columns].max() + 1
            last = sides[:, row, columns].min()
            if len(left):
                for axis in axes:
                    values = axis[row, columns].unique()
                    axis[row, left] = values[axis[row, left].unique(return_inverse=True)[1]]
                last = sides[:, row, left].max() + 1
            axes[:, row, columns[-1] + 1 :] -= end - last
            shift[row] += end - last
    if len(positions) == 4:  # the text row, which numbers the sequence itself
        positions[0] = positions[0] - (~keep).long().cumsum(1)
    return positions, shift


def present(outputs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The encoder outputs that are there, by modality."""
    return {name: output for name, output in (outputs or {}).items() if output is not None}
