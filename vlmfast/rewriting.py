"""The arithmetic of a shorter prompt: which columns stay, where images lie, how positions are renumbered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmfast.visual import VisualTokens


@dataclass(frozen=True)
class Selected:
    """One image of a batch: what is kept of it ([kept], ascending) and where its tokens stand (row, columns [N])."""

    visual: VisualTokens
    kept: Tensor
    row: int
    columns: Tensor


def following(positions: Tensor, real: Tensor) -> Tensor:
    """Position after the last token that is not padding. positions: [B, L] or [A, B, L], real: [B, L] -> [B]."""
    flat = positions if positions.ndim == 2 else positions[-3:].amax(0)
    return flat.masked_fill(~real, -1).amax(1) + 1


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


def compact(positions: Tensor, keep: Tensor, selected: Sequence[Selected]) -> tuple[Tensor, Tensor]:
    """Renumber without gaps. -> (positions, shift [B]: how far the text after the images moved)

    One axis: a position falls by the number of tokens dropped before it. M-RoPE: inside an image, the distinct
    values of each axis are numbered densely; what follows starts after the largest of them.
    """
    if positions.ndim == 2:
        gone = (~keep).long().cumsum(1)
        return positions - gone, gone[:, -1]
    positions = positions.clone()
    axes = positions[-3:]
    shift = torch.zeros(keep.shape[0], dtype=torch.long, device=keep.device)
    for one in selected:
        row, columns = one.row, one.columns
        image = columns[one.kept.to(columns.device)]
        first = axes[:, row, columns].min()
        end = axes[:, row, columns].max() + 1
        for axis in axes:
            axis[row, image] = first + axis[row, image].unique(return_inverse=True)[1]
        moved = end - (axes[:, row, image].max() + 1)
        axes[:, row, columns[-1] + 1 :] -= moved
        shift[row] += moved
    if len(positions) == 4:  # the text row, which numbers the sequence itself
        positions[0] = positions[0] - (~keep).long().cumsum(1)
    return positions, shift
