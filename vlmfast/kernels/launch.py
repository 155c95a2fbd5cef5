"""What the Triton programs compute, and how they are started. Imported only where Triton is installed.

Every function has its plain torch reference in `vlmfast.edits.engine`, under the same name and with the same arguments
but for what a query sees, which comes in parts here: mask [B or 1, H or 1, Q or 1, K or more], bool (True = visible)
or additive; keys: bool [B, K], False for padding; places: int64 [Q]; window: int (see `vlmfast.edits.engine.Seen`).
query: [B, H, Q, d], key: [B, H_kv, K, d], value: [B, H_kv, K, d'], with any strides. Not differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from vlmfast.kernels import programs

INTERPRETED = not isinstance(programs.attend, triton.JITFunction)
SMALLEST = 16  # queries of a block, and numbers of a head: what a matrix unit takes at least
# With fewer programs than the device has processors, rows of more keys than this are cut into chunks of this at least.
CHUNK = 1024


@dataclass(frozen=True)
class Size:
    """How a program is cut: queries and keys of a block, warps, loads under way."""

    queries: int
    keys: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """As the programs take them."""
        return {"BM": self.queries, "BN": self.keys, "num_warps": self.warps, "num_stages": self.stages}


# By padded width of a head. fp32 is multiplied without tensor cores, from registers. Chosen so that registers suffice,
# and shared memory on every device (tests/test_kernels.py compiles them all for three).
HALF_SIZES = {64: Size(128, 64, 8, 3), 128: Size(128, 32, 8, 3), 256: Size(64, 32, 8, 2)}
FULL_SIZES = {64: Size(32, 16, 8, 2), 128: Size(32, 16, 8, 2), 256: Size(16, 16, 8, 1)}
COLUMN_SIZES = {64: Size(64, 64, 4, 3), 128: Size(64, 64, 4, 2), 256: Size(32, 64, 8, 2)}


def size_of(wide: int, dtype: torch.dtype, n_query: int, columns: bool = False) -> Size:
    """The cut for heads of this padded width. columns: for programs that walk over queries."""
    table = FULL_SIZES if dtype == torch.float32 else COLUMN_SIZES if columns else HALF_SIZES
    size = table[max(64, wide)]
    few = max(SMALLEST, triton.next_power_of_2(n_query))
    return size if columns or few >= size.queries else Size(few, size.keys, 4, size.stages)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def chunks(programs_now: int, n_key: int, device: torch.device) -> int:
    """Into how many parts rows are cut, so that a few queries over many keys keep a device busy."""
    return max(1, min(2 * processors(device) // max(1, programs_now), n_key // CHUNK))


def lined(tensor: Tensor) -> Tensor:
    """The same with the numbers of a line side by side."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides but for the last; 0 where one entry serves all."""
    return tuple(0 if size == 1 else step for size, step in zip(tensor.shape[:-1], tensor.stride()[:-1]))


class Job:
    """What all programs of one attention call have in common."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        scaling: float,
        mask: Tensor | None,
        keys: Tensor | None,
        places: Tensor | None,
        window: int | None,
        classes: Tensor | None = None,
    ) -> None:
        if places is None:
            window = None
        self.query, self.key = lined(query), lined(key)
        self.batch, self.heads, self.n_query, self.width = query.shape
        self.n_key = key.shape[2]
        self.kinds = self._kinds(keys, classes)
        self.places = None if places is None else places.contiguous()
        kind, lowest = 0, 0.0
        if mask is not None:
            kind = programs.BOOL.value if mask.dtype == torch.bool else programs.ADDITIVE.value
            lowest = 0.0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min / 2
            mask = mask[(None,) * (4 - mask.ndim)]
            mask = lined(mask.view(torch.uint8) if mask.dtype == torch.bool else mask)
        self.mask = mask
        self.own = {
            "q": strides(self.query)[:3],
            "k": strides(self.key)[:3],
            "kinds": (0, 0) if self.kinds is None else strides(self.kinds),
            "mask": (0, 0, 0) if mask is None else strides(mask),
        }
        self.group = self.heads // key.shape[1]
        self.tail = (window, float(scaling) * programs.LOG2E.value, lowest)
        self.flags: dict[str, Any] = {
            "MASK": kind,
            "UPCAST": INTERPRETED and query.dtype == torch.bfloat16,
            "WIDTH": self.width,
            "WIDE": max(SMALLEST, triton.next_power_of_2(self.width)),
        }

    def _kinds(self, keys: Tensor | None, classes: Tensor | None) -> Tensor | None:
        """What each key is, see `programs`. uint8 [B or 1, H or 1, K]"""
        kinds: Tensor | None = None
        if classes is not None:
            number = torch.arange(1, len(classes) + 1, dtype=torch.uint8, device=classes.device)
            kinds = (classes * number[:, None, None, None]).sum(0, dtype=torch.uint8)
        if keys is not None:
            real = keys[:, None, : self.n_key]
            nothing = torch.zeros((), dtype=torch.uint8, device=keys.device)
            kinds = (nothing if kinds is None else kinds).masked_fill(~real, programs.HIDDEN.value)
        return None if kinds is None else kinds.contiguous()

    def size(self, columns: bool = False, wide: int = 0) -> Size:
        """How to cut it."""
        return size_of(max(wide, self.flags["WIDE"]), self.query.dtype, self.n_query, columns)

    def split(self, size: Size) -> tuple[int, int]:
        """(chunks of keys, keys of a chunk) for programs that walk over keys."""
        now = self.batch * self.heads * triton.cdiv(self.n_query, size.queries)
        many = chunks(now, self.n_key, self.query.device)
        length = triton.cdiv(triton.cdiv(self.n_key, many), size.keys) * size.keys
        return max(1, triton.cdiv(self.n_key, length)) if length else 1, max(length, size.keys)

    def empty(self, *shape: int) -> Tensor:
        """Room for fp32 results."""
        return torch.empty(shape, dtype=torch.float32, device=self.query.device)

    def start(self, program: Any, blocks: int, parts: int, *args: Any, **flags: Any) -> None:
        """Start a program for every block of every head, and every chunk of keys."""
        count = self.batch * self.heads * blocks
        if count:
            with torch.cuda.device(self.query.device) if self.query.is_cuda else nullcontext():
                program[(count, parts)](*args, **self.flags, **flags)

    def row_sums(self, n_classes: int) -> tuple[Tensor, Tensor]:
        """Log-sum-exp of rows [B, H, Q] and what each class holds [B, H, Q, C]."""
        size = self.size()
        parts, chunk = self.split(size)
        lse = self.empty(parts, self.batch, self.heads, self.n_query)
        masses = self.empty(*lse.shape, n_classes)
        self.start(
            programs.row_sums, triton.cdiv(self.n_query, size.queries), parts,
            self.query, self.key, lse, masses, self.kinds, self.places, self.mask,
            *self.own["q"], *self.own["k"], *self.own["kinds"], *self.own["mask"],
            self.n_query, self.n_key, self.heads, self.group, chunk, *self.tail,
            CLASSES=n_classes, PAD=triton.next_power_of_2(max(1, n_classes)), **size.options(),
        )  # fmt: skip
        if parts == 1:
            return lse[0], masses[0]
        whole = lse.logsumexp(dim=0)
        return whole, (share_of(lse, whole)[..., None] * masses).sum(0)

    def column_sums(self, lse: Tensor, counted: Tensor | None) -> Tensor:
        """Probabilities summed over rows [B, H, K]."""
        size = self.size(columns=True)
        sums = self.empty(self.batch, self.heads, self.n_key)
        counted = None if counted is None else counted.contiguous().view(torch.uint8)
        self.start(
            programs.column_sums, triton.cdiv(self.n_key, size.keys), 1,
            self.query, self.key, lse, sums, counted, self.kinds, self.places, self.mask,
            *self.own["q"], *self.own["k"], *self.own["kinds"], *self.own["mask"],
            self.n_query, self.n_key, self.heads, self.group, *self.tail, **size.options(),
        )  # fmt: skip
        return sums

    def _room(self, value: Tensor, parts: int) -> Tensor:
        """Room for outputs, by queries first as transformers wants them. [S, B, Q, H, d']"""
        dtype = value.dtype if parts == 1 else torch.float32
        shape = (parts, self.batch, self.n_query, self.heads, value.shape[-1])
        return torch.empty(shape, dtype=dtype, device=value.device)

    def _of_value(self, value: Tensor) -> dict[str, Any]:
        return {
            "UPCAST_V": INTERPRETED and value.dtype == torch.bfloat16,
            "WIDTH_V": value.shape[-1],
            "WIDE_V": max(SMALLEST, triton.next_power_of_2(value.shape[-1])),
        }

    def attend(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Attention [B, H, Q, d'] and the rows' log-sum-exp [B, H, Q]."""
        value, flags = lined(value), self._of_value(value)
        size = self.size(wide=flags["WIDE_V"])
        parts, chunk = self.split(size)
        lse, out = self.empty(parts, self.batch, self.heads, self.n_query), self._room(value, parts)
        self.start(
            programs.attend, triton.cdiv(self.n_query, size.queries), parts,
            self.query, self.key, value, out, lse, self.kinds, self.places, self.mask,
            *self.own["q"], *self.own["k"], *strides(value)[:3], *self.own["kinds"], *self.own["mask"],
            self.n_query, self.n_key, self.heads, self.group, chunk, *self.tail, **flags, **size.options(),
        )  # fmt: skip
        if parts == 1:
            return out[0].transpose(1, 2), lse[0]
        whole = lse.logsumexp(dim=0)
        out = (share_of(lse, whole).transpose(2, 3)[..., None] * out).sum(0)
        return out.to(value.dtype).transpose(1, 2), whole

    def weigh(self, value: Tensor, lse: Tensor, masses: Tensor, factors: Tensor) -> Tensor:
        """Attention whose probabilities are multiplied by factors [B, H, Q, C] of the key's class. [B, H, Q, d']"""
        value, flags = lined(value), self._of_value(value)
        size = self.size(wide=flags["WIDE_V"])
        parts, chunk = self.split(size)
        out = self._room(value, parts)
        self.start(
            programs.weigh, triton.cdiv(self.n_query, size.queries), parts,
            self.query, self.key, value, out, lse.contiguous(), masses.contiguous(), factors, self.kinds, self.places,
            self.mask, *self.own["q"], *self.own["k"], *strides(value)[:3], *self.own["kinds"], *self.own["mask"],
            self.n_query, self.n_key, self.heads, self.group, chunk, *self.tail,
            CLASSES=factors.shape[-1], HALF=value.dtype == torch.float16, **flags, **size.options(),
        )  # fmt: skip
        return (out[0] if parts == 1 else out.sum(0).to(value.dtype)).transpose(1, 2)


def share_of(lse: Tensor, whole: Tensor) -> Tensor:
    """What each chunk of keys holds of a row, 0 where it sees nothing. [S, B, H, Q], [B, H, Q] -> [S, B, H, Q]"""
    return (lse - whole.masked_fill(whole.isneginf(), 0.0)).exp()


def column_sums(
    query: Tensor,
    key: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    keys: Tensor | None = None,
    places: Tensor | None = None,
    window: int | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention each key receives, head by head, and the rows' log-sum-exp. -> [B, H, K], [B, H, Q], fp32

    rows: bool [B, Q] or [1, Q], queries that count. Two passes over q k^T: log-sum-exp of rows, then columns.
    """
    job = Job(query, key, scaling, mask, keys, places, window)
    lse, _ = job.row_sums(0)
    return job.column_sums(lse, None if rows is None else rows.expand(job.batch, -1)), lse


def redistribute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    classes: Tensor,
    factors: Callable[[Tensor], Tensor],
    scaling: float,
    mask: Tensor | None = None,
    keys: Tensor | None = None,
    places: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention whose probabilities are multiplied by a factor of the key's class. -> [B, H, Q, d']

    classes: bool [C, B or 1, H or 1, K], disjoint, C <= kernels.MOST_CLASSES. factors: masses [B, H, Q, C] -> factors.
    Two passes: the classes' masses, then sum_c f_c m_c O_c as one weighted sum. Outputs by class, which would take
    C + 1 accumulators or passes over the values, are never made.
    """
    job = Job(query, key, scaling, mask, keys, places, window, classes)
    lse, masses = job.row_sums(len(classes))
    wanted = factors(masses).to(torch.float32).expand_as(masses).contiguous()
    return job.weigh(value, lse, masses, wanted)


def with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    keys: Tensor | None = None,
    places: Tensor | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of each row's scores, natural logarithm. -> [B, H, Q, d'], [B, H, Q] fp32"""
    return Job(query, key, scaling, mask, keys, places, window).attend(value)
