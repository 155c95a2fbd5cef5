"""Cross-attention without parameters: hidden states look at a bank of visual vectors beside the feed-forward net.

ADEM-VL. Paper: arXiv:2410.17779. Code: Hao840/ADEM-VL @ cec09b8, adem/adapter.py:28-61 and adem/model.py:33-59,
229-254, 327-348. For hidden states x [L, D], entries V [N, D] and offsets e1, e2 [N, D]:

    S = silu(x) silu(V + e1)^T        no softmax, no 1 / sqrt(D), one "head" over all of D
    t = the floor(gamma N)-th smallest of a row of S, counted from 0;   S = 0 where S < t (ties stay)
    O = S (V + e2)

Differs from the authors' code: in fp32 whatever the model's precision (S is not normalised: in fp16 it overflows, and
their loop skips the batches that do); S is never whole, neither in the forward nor in the backward pass; the threshold
comes from a selection instead of a full sort; prompts of one batch may have banks of different sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import adaptive_avg_pool2d, silu

from vlmfast.attention import ENTRIES, ENTRIES_CPU

SEEN = "vlmfast_seen"  # attribute of a cache: its Seen
UNPOOLED = 16  # the grid that the authors' code takes for that of the tower


def multiscale(maps: Tensor, grids: Sequence[int], parity: str = "repaired") -> Tensor:
    """Feature maps averaged to some grids, one behind the other. [F, h, w, C] -> [F, N, C], N = sum of g^2

    Adaptive average pooling, row by row; a map of g x g is its own. parity="official": the grid 16 is the map as it
    is, whatever its size (model.py:50-53), so that N is another one for towers of other than 16 x 16 patches.
    """
    channels = maps.permute(0, 3, 1, 2)
    parts = []
    for grid in grids:
        whole = grid == UNPOOLED if parity == "official" else maps.shape[1:3] == (grid, grid)
        parts.append((channels if whole else adaptive_avg_pool2d(channels, grid)).flatten(2))
    return torch.cat(parts, dim=-1).transpose(1, 2)


def threshold(scores: Tensor, gamma: float) -> Tensor | None:
    """The floor(gamma N)-th smallest of every row, counted from 0; None for a gamma of 0. [..., N] -> [..., 1]"""
    place = int(gamma * scores.shape[-1])
    if gamma == 0:
        return None
    # Of the smallest ones the largest: several times faster than a sort, and faster than kthvalue (L=600, N=320).
    return scores.topk(place + 1, dim=-1, largest=False, sorted=False).values.amax(-1, keepdim=True)


def scored(hidden: Tensor, keys: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """silu(x), the scores that stay (others 0), and which do (None: all). [B, R, D], [B, N, D] -> S: [B, R, N]"""
    query = silu(hidden.to(keys.dtype))
    scores = query @ keys.transpose(1, 2)
    least = threshold(scores, gamma)
    if least is None:
        return query, scores, None
    stays = scores >= least
    return query, scores * stays, stays


class _Fused(torch.autograd.Function):
    """silu(x) keys^T, thresholded, times values, block by block of the rows; the scores are made again for gradients.

    The threshold has no gradient, as in the authors' code.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, keys: Tensor, values: Tensor, gamma: float, rows: int) -> Tensor:
        ctx.save_for_backward(hidden, keys, values)
        ctx.gamma, ctx.rows = gamma, rows
        out = keys.new_empty(hidden.shape)
        for start in range(0, hidden.shape[1], rows):
            part = slice(start, start + rows)
            out[:, part] = scored(hidden[:, part], keys, gamma)[1] @ values
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return _Fused.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Of hidden, keys and values, as far as they are wanted."""
        hidden, keys, values = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        into = torch.empty_like(hidden) if wanted[0] else None
        to_keys, to_values = torch.zeros_like(keys), torch.zeros_like(values)
        for start in range(0, hidden.shape[1], ctx.rows):
            part = slice(start, start + ctx.rows)
            query, scores, stays = scored(hidden[:, part], keys, ctx.gamma)
            above = grad[:, part].to(keys.dtype)
            if wanted[2]:
                to_values += scores.transpose(1, 2) @ above
            inner = above @ values.transpose(1, 2)
            if stays is not None:
                inner = inner * stays
            if wanted[1]:
                to_keys += inner.transpose(1, 2) @ query
            if into is not None:
                before = hidden[:, part].to(keys.dtype)
                share = before.sigmoid()
                slope = share * (1 + before * (1 - share))
                into[:, part] = ((inner @ keys) * slope).to(into.dtype)
        return into, to_keys if wanted[1] else None, to_values if wanted[2] else None, None, None


def cross_attention(hidden: Tensor, keys: Tensor, values: Tensor, gamma: float, rows: int | None = None) -> Tensor:
    """Hidden states mixed with visual entries. [B, L, D], [B, N, D], [B, N, D] -> [B, L, D] in the keys' precision

    keys: silu(V + e1); values: V + e2. gamma: share of a row's entries, those of the lowest scores, that are left out.
    rows: of the scores at a time; None: as many as make a good block.
    """
    if rows is None:
        entries = ENTRIES_CPU if hidden.device.type == "cpu" else ENTRIES
        rows = max(1, entries // max(1, keys.shape[0] * keys.shape[1]))
    with torch.autocast(hidden.device.type, enabled=False):
        out: Tensor = _Fused.apply(hidden, keys, values, gamma, rows)
    return out


@dataclass
class Bank:
    """The entries that the prompts of one forward look at.

    keys, values: [P, M, D] of each prompt, see `cross_attention`, filled up behind its own `counts[p]` entries.
    """

    keys: Tensor
    values: Tensor
    counts: tuple[int, ...]
    _elsewhere: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, entries: Sequence[Tensor], before: Tensor, after: Tensor) -> Bank:
        """The bank of some prompts. entries: [n N, D] each, n pictures of N entries; before, after: e1, e2 [N, D],
        which every picture has anew.
        """
        counts = tuple(len(one) for one in entries)
        most = max(counts)
        exact = [one.to(torch.promote_types(one.dtype, torch.float32)) for one in (*entries, before, after)]
        entries, (before, after) = exact[:-2], exact[-2:]
        shifted = [[one + table.repeat(len(one) // len(table), 1) for one in entries] for table in (before, after)]
        keys, values = (
            torch.stack([torch.nn.functional.pad(one, (0, 0, 0, most - len(one))) for one in some])
            for some in ([silu(one) for one in shifted[0]], shifted[1])
        )
        return cls(keys, values, counts)

    def attend(self, hidden: Tensor, gamma: float, prompts: Sequence[int] | None = None) -> Tensor:
        """Each row of a batch with the entries of its prompt. [B, L, D] -> [B, L, D] in fp32

        prompts: of each row; None: all rows have the first. Entries that a prompt does not have are neither scored nor
        counted for its threshold.
        """
        keys, values = self._at(hidden.device)
        rows, length, width = hidden.shape
        prompts = [0] * rows if prompts is None else prompts
        shown = sorted(set(prompts))
        repeat = rows // len(shown)
        if len({self.counts[one] for one in shown}) == 1 and all(
            one == shown[row // repeat] for row, one in enumerate(prompts)
        ):  # beams and samples of a prompt are rows of its one matrix product
            if len(shown) < len(keys):
                keys, values = keys[shown], values[shown]
            count = self.counts[shown[0]]
            together = hidden.reshape(len(shown), repeat * length, width)
            return cross_attention(together, keys[:, :count], values[:, :count], gamma).view(rows, length, width)
        out: Tensor = keys.new_zeros(hidden.shape)
        for one in shown:
            own = torch.tensor([row for row, prompt in enumerate(prompts) if prompt == one], device=hidden.device)
            count = self.counts[one]
            part = hidden[own].reshape(1, -1, width)
            mixed = cross_attention(part, keys[one : one + 1, :count], values[one : one + 1, :count], gamma)
            out = out.index_copy(0, own, mixed.view(len(own), length, width))
        return out

    def _at(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and values where a layer is; models may be spread over devices."""
        if self.keys.device == device:
            return self.keys, self.values
        if device not in self._elsewhere:
            self._elsewhere[device] = self.keys.to(device), self.values.to(device)
        return self._elsewhere[device]


@dataclass(frozen=True)
class Piece:
    """The entries of one prompt that came with some forward.

    start: columns that the cache held before. entries: [n N, D] by adapter.
    """

    start: int
    entries: Mapping[str, Tensor]


@dataclass
class Seen:
    """What a cache remembers of the pictures of its prompts.

    prompts: int64 [B] on the CPU, the prompt of each row (beams share one). pieces: of each prompt. banks: made of
    them, by adapter.
    """

    prompts: Tensor
    pieces: tuple[tuple[Piece, ...], ...]
    banks: dict[str, Bank] = field(default_factory=dict)

    def since(self, held: int) -> Seen:
        """Without what came at columns that a cropped cache has lost."""
        if all(piece.start < held for own in self.pieces for piece in own):
            return self
        return Seen(self.prompts, tuple(tuple(one for one in own if one.start < held) for own in self.pieces))

    def extended(self, start: int, keys: Sequence[Any], entries: Mapping[Any, Mapping[str, Tensor]]) -> Seen:
        """With new pictures behind `start` columns.

        keys: of each row, equal for rows of equal pictures, in `entries` where it has some.
        """
        numbers: dict[Any, int] = {}
        pieces: list[tuple[Piece, ...]] = []
        for before, key in zip(self.prompts.tolist(), keys):
            if (before, key) not in numbers:
                numbers[before, key] = len(pieces)
                new = (Piece(start, entries[key]),) if key in entries else ()
                pieces.append((*self.pieces[before], *new))
        rows = [numbers[before, key] for before, key in zip(self.prompts.tolist(), keys)]
        return Seen(torch.tensor(rows), tuple(pieces))


def seen_by(cache: Any, decoding: bool) -> Seen | None:
    """What a cache remembers; what is left over from before a reset is removed.

    decoding: one token follows the others, so that a static cache, whose length is on the device, need not be read.
    """
    seen: Seen | None = getattr(cache, SEEN, None)
    if seen is None:
        return None
    held = cache.get_seq_length()
    if decoding and isinstance(held, Tensor):
        return seen
    if int(held) == 0:
        delattr(cache, SEEN)
        return None
    return seen.since(int(held))
