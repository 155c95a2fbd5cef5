"""Door 3, the arithmetic of edited attention: what a method does to the probabilities, without their map.

Three forms cover the methods:

* `redistribute`: keys fall into a few classes, and a row's probabilities are multiplied by a factor of the key's
  class, which may depend on the mass the row gives to each class (VAR). Rows are made explicitly, in blocks.
* `correct`: the same where one class is a handful of keys and the other is the rest (initial token, sinks): the
  attention that ran anyway, with its log-sum-exp, is corrected by these keys alone (ZeroTuning, ACT).
* `rescore`: scores before the softmax change in a few rows (PAI, PAINT).

Softmax, masses and factors run in fp32; what comes out has the type of the values. Shapes: query [B, H, Q, d], key
and value [B, H_kv, K, d], not repeated for grouped-query attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmfast import kernels
from vlmfast.attention import ENTRIES, ENTRIES_CPU, attention_rows

Factors = Callable[[Tensor], Tensor]
# From how large a factor on on "all other keys" their share is no longer found by subtraction: rounding errors of the
# attention that is corrected grow by it.
LARGEST_FACTOR = {torch.float64: 1e6, torch.float32: 64.0}
LARGEST_FACTOR_HALF = 4.0


def blocks(query: Tensor, n_key: int) -> Iterator[slice]:
    """Rows in blocks whose explicit attention stays small."""
    limit = ENTRIES_CPU if query.device.type == "cpu" else ENTRIES
    step = max(1, limit // (query.shape[0] * query.shape[1] * n_key))
    for start in range(0, query.shape[2], step):
        yield slice(start, min(start + step, query.shape[2]))


def weighted(weights: Tensor, value: Tensor) -> Tensor:
    """Explicit rows times values, GQA without repeating them. [B, H, R, K] x [B, H_kv, K, d] -> [B, H, R, d]"""
    batch, heads, rows, n_key = weights.shape
    kv_heads = value.shape[1]
    grouped = weights.reshape(batch, kv_heads, heads // kv_heads * rows, n_key)
    return (grouped @ value.to(weights.dtype)).view(batch, heads, rows, value.shape[-1])


@dataclass(frozen=True)
class Seen:
    """What each of Q queries sees of K keys; nothing given: everything.

    mask: [B or 1, H or 1, Q or 1, K or more], bool (True = visible) or additive. keys: bool [B, K], False for padding.
    places: int64 [Q], the key that each query stands at, where it sees no later one. window: keys it sees at most,
    itself included (with `places`).
    """

    mask: Tensor | None = None
    keys: Tensor | None = None
    places: Tensor | None = None
    window: int | None = None

    def of(self, rows: slice | Tensor, n_key: int) -> Tensor | None:
        """The mask of some queries, bool or additive, broadcastable to [B, H, R, K]."""
        if self.mask is not None:
            return (self.mask if self.mask.shape[2] == 1 else self.mask[:, :, rows])[..., :n_key]
        seen: Tensor | None = None
        if self.places is not None:
            place = self.places[rows][:, None]
            columns = torch.arange(n_key, device=place.device)
            seen = columns <= place
            if self.window is not None:
                seen = seen & (columns > place - self.window)
            seen = seen[None, None]
        if self.keys is not None:
            keys = self.keys[:, None, None, :n_key]
            seen = keys if seen is None else seen & keys
        return seen

    @property
    def parts(self) -> dict[str, Any]:
        """As the kernels take it."""
        return {"mask": self.mask, "keys": self.keys, "places": self.places, "window": self.window}

    def at(self, columns: Tensor, n_query: int, n_key: int) -> Tensor | None:
        """Which of a few keys each query sees. columns: int64 [B, H or 1, S] -> bool [B, H or 1, Q, S]"""
        if self.mask is None and self.keys is None:
            if self.places is None:
                return None
            place, columns = self.places[:, None], columns[:, :, None]
            seen = columns <= place
            return seen if self.window is None else seen & (columns > place - self.window)
        mask = self.of(slice(None), n_key)
        assert mask is not None
        if mask.dtype != torch.bool:
            mask = mask > torch.finfo(mask.dtype).min / 2
        mask = mask.expand(columns.shape[0], -1, n_query, -1)
        heads = max(mask.shape[1], columns.shape[1])
        where = columns[:, :, None].expand(-1, heads, n_query, -1)
        return mask.expand(-1, heads, -1, -1).gather(-1, where)

    def counts(self, rows: Tensor, n_key: int) -> Tensor:
        """How many of some queries see each key. rows: bool [B, Q], the queries that count -> int64 [B, 1 or H, K]"""
        if self.mask is not None:
            mask = self.of(slice(None), n_key)
            assert mask is not None
            if mask.dtype != torch.bool:
                mask = mask > torch.finfo(mask.dtype).min / 2
            return (mask & rows[:, None, :, None]).sum(dim=2)
        if self.places is None:
            counts = rows.sum(dim=1, keepdim=True).expand(-1, n_key)
        else:
            after = rows.new_zeros(len(rows), n_key + 1, dtype=torch.long)
            after[:, self.places] = rows.long()
            after = after.flip(1).cumsum(1).flip(1)  # queries that stand at a key or behind it
            last = torch.arange(n_key, device=rows.device) + (n_key if self.window is None else self.window)
            counts = after[:, :-1] - after[:, last.clamp(max=n_key)]
        return (counts if self.keys is None else counts * self.keys[:, :n_key])[:, None]

    def take(self, rows: Tensor) -> Seen:
        """The same for some of the queries. rows: int64 [R]"""
        return Seen(
            self.mask if self.mask is None or self.mask.shape[2] == 1 else self.mask[:, :, rows],
            self.keys,
            self.places if self.places is None else self.places[rows],
            self.window,
        )


EVERYTHING = Seen()


def _shown(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of probabilities; those of padding, which see nothing, are zero and not NaN."""
    return rows if mask is None else rows.nan_to_num(0.0)


def redistribute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    classes: Tensor,
    factors: Factors,
    scaling: float,
    seen: Seen = EVERYTHING,
) -> Tensor:
    """Attention whose probabilities are multiplied by a factor of the key's class. -> [B, H, Q, d]

    classes: bool [C, B or 1, H or 1, K], at most one of them true for a key; keys of no class keep their probability.
    factors: masses [B, H, Q, C] (fp32) -> factors [B, H, Q, C]; asked block by block.
    """
    if len(classes) <= kernels.MOST_CLASSES and kernels.usable(query, key, value):
        edited: Tensor = kernels.launcher().redistribute(query, key, value, classes, factors, scaling, **seen.parts)
        return edited
    member = classes.movedim(0, -1).float()  # [B or 1, H or 1, K, C]
    parts = []
    for rows in blocks(query, key.shape[2]):
        scores = masked_scores(query, key, scaling, seen, rows)
        shown = _shown(scores.softmax(dim=-1), seen.of(rows, key.shape[2]))
        wanted = factors(shown @ member)
        shown = shown * (1 + (wanted - 1) @ member.transpose(-1, -2))
        parts.append(weighted(shown, value))
    return torch.cat(parts, dim=2).to(value.dtype)


def rescore(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edit: Callable[[Tensor], Tensor],
    scaling: float,
    seen: Seen = EVERYTHING,
) -> Tensor:
    """Attention whose scores pass `edit` before the softmax. -> [B, H, Q, d]

    edit: masked scores [B, H, r, K] (fp32, hidden entries -inf) -> scores; asked block by block.
    """
    parts = []
    for rows in blocks(query, key.shape[2]):
        scores = masked_scores(query, key, scaling, seen, rows)
        parts.append(weighted(_shown(edit(scores).softmax(dim=-1), seen.of(rows, key.shape[2])), value))
    return torch.cat(parts, dim=2).to(value.dtype)


def with_lse(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, seen: Seen = EVERYTHING, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of each row's scores, natural logarithm. -> [B, H, Q, d], [B, H, Q] fp32

    causal: `seen` says no more than that query i sees key i and those before it. On a CPU the very kernel behind SDPA
    gives both. Not differentiable in the log-sum-exp.
    """
    if kernels.usable(query, key, value):
        found: tuple[Tensor, Tensor] = kernels.launcher().with_lse(query, key, value, scaling, **seen.parts)
        return found
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        mask = None if causal else seen.of(slice(None), key.shape[2])
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
            mask = mask.expand(query.shape[0], -1, query.shape[2], -1).to(query.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scaling
        )
        return out, lse
    outs, sums = [], []
    for rows in blocks(query, key.shape[2]):
        scores = masked_scores(query, key, scaling, seen, rows)
        sums.append(scores.logsumexp(dim=-1))
        shown = _shown(scores.softmax(dim=-1), seen.of(rows, key.shape[2]))
        outs.append(weighted(shown, value).to(value.dtype))
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


def column_sums(
    query: Tensor, key: Tensor, scaling: float, seen: Seen = EVERYTHING, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention each key receives, head by head, and the log-sum-exp of each row's scores.
    -> [B, H, K], [B, H, Q], fp32

    rows: bool [B, Q], the queries that count; None: all. Those that see nothing (padding) count nothing, and their
    log-sum-exp is -inf. The log-sum-exp is there for every query, counted or not.
    """
    if kernels.usable(query, key):
        found: tuple[Tensor, Tensor] = kernels.launcher().column_sums(query, key, scaling, rows=rows, **seen.parts)
        return found
    sums = query.new_zeros(*query.shape[:2], key.shape[2], dtype=torch.float32)
    logs = []
    for part in blocks(query, key.shape[2]):
        scores = masked_scores(query, key, scaling, seen, part)
        lse = scores.logsumexp(dim=-1)
        silent = lse.isneginf() if rows is None else lse.isneginf() | ~rows[:, None, part]
        sums = sums + (scores - lse.masked_fill(silent, torch.inf)[..., None]).exp().sum(dim=2)
        logs.append(lse)
    return sums, torch.cat(logs, dim=2)


def masked_scores(query: Tensor, key: Tensor, scaling: float, seen: Seen, rows: slice) -> Tensor:
    """Scores of some queries, fp32, hidden entries -inf whatever the form of the mask. -> [B, H, R, K]"""
    mask = seen.of(rows, key.shape[2])
    scores = attention_rows(query[:, :, rows], key, slice(None), scaling, mask, softmax=False)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)
    return scores


@dataclass(frozen=True)
class Few:
    """A handful of keys. columns: int64 [B, H or 1, S]; there: bool of the same shape, False for places not used."""

    columns: Tensor
    there: Tensor

    @classmethod
    def of(cls, member: Tensor) -> Few:
        """From a mask over all keys, bool [B, H or 1, K]."""
        width = max(1, int(member.sum(-1).max()))
        order = (~member).long().argsort(dim=-1, stable=True)[..., :width]
        return cls(order, member.gather(-1, order))

    def member(self, n_key: int) -> Tensor:
        """The mask over all keys. bool [B, H or 1, K]"""
        found = self.columns.new_zeros(*self.columns.shape[:-1], n_key)
        return found.scatter_add_(-1, self.columns, self.there.long()) > 0

    def take(self, heads: Tensor, n_query_heads: int) -> Tensor:
        """Their keys or values for each query head. [B, H_kv, K, d] -> [B, H, S, d]"""
        batch, kv_heads, _, width = heads.shape
        columns = self.columns.expand(batch, n_query_heads, -1)
        group = torch.arange(n_query_heads, device=heads.device) // (n_query_heads // kv_heads)
        row = torch.arange(batch, device=heads.device)
        return heads[row[:, None, None], group[None, :, None], columns]


def shares(query: Tensor, key: Tensor, few: Few, lse: Tensor, scaling: float, visible: Tensor | None = None) -> Tensor:
    """Probabilities of a handful of keys in every row, fp32. -> [B, H, Q, S]

    lse: [B, H, Q] log-sum-exp of the rows over all keys. visible: bool [B, H or 1, Q, S] or None: all are.
    """
    scores = (query.float() * scaling) @ few.take(key, query.shape[1]).float().transpose(-1, -2)
    found = (scores - lse[..., None]).exp()
    there = few.there[:, :, None] if visible is None else few.there[:, :, None] & visible
    return found.masked_fill(~there, 0.0)


def correct(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    few: Few,
    factors: Callable[[Tensor], tuple[Tensor, Tensor]],
    scaling: float,
    seen: Seen = EVERYTHING,
    causal: bool = False,
) -> Tensor | None:
    """Attention in which a handful of keys and all others get a factor each. -> [B, H, Q, d]; None: ill-conditioned

    factors: mass of the few [B, H, Q] -> (factor of the few, factor of the others), each [B, H, Q]. causal: as in
    `with_lse`.

    None where a factor of the others is so large that their share, found by subtraction, would be all rounding error:
    `redistribute` makes such rows explicitly.
    """
    out, lse = with_lse(query, key, value, scaling, seen, causal)
    edited, ill = corrected(out, lse, query, key, value, few, factors, scaling, seen)
    return None if bool(ill.any()) else edited


def corrected(
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    few: Few,
    factors: Callable[[Tensor], tuple[Tensor, Tensor]],
    scaling: float,
    seen: Seen = EVERYTHING,
) -> tuple[Tensor, Tensor]:
    """`correct` where the attention [B, H, Q, d] and the log-sum-exp of its rows [B, H, Q] are there already.
    -> [B, H, Q, d], and which rows are ill-conditioned, bool [B, H, Q]
    """
    visible = seen.at(few.columns, query.shape[2], key.shape[2])
    found = shares(query, key, few, lse, scaling, visible)
    on_few, on_others = factors(found.sum(dim=-1))
    ill = ~(on_others <= LARGEST_FACTOR.get(out.dtype, LARGEST_FACTOR_HALF))  # NaN is, too
    moved = ((on_few - on_others)[..., None] * found) @ few.take(value, query.shape[1]).float()
    return (on_others[..., None] * out.float() + moved).to(out.dtype), ill
