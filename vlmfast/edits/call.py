"""Door 3, what a method sees of one attention call of a decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vlmfast.edits.engine import Factors, Few, Seen, corrected, redistribute, rescore, with_lse
from vlmfast.lockstep import ImageFree


@dataclass(frozen=True, kw_only=True)
class Call:
    """One attention call of a decoder layer, for a batch of prompts or for one more token of each.

    layer: 0-based, of `depth`. query: [B, H, Q, d]; key, value: [B, H_kv, K, d], those of the queries among them, the
    first one's at column `start`. mask: what the layer was given, in any of the forms that transformers uses (None,
    [B, K], [B, 1, Q, K] bool or additive). causal: what a mask of None means. window: tokens a query sees at most,
    where the mask does not say so (flash attention). hidden: [B, Q, D] the layer's input.
    visual: [B, K] which keys are visual tokens (newlines of any-resolution images included); real: [B, K] which are no
    padding. initial: [B] the prompt's first token among the keys, -1 where a sliding window has left it behind.
    prompt: whether the queries are tokens of a prompt, rather than generated ones. ends: [B, Q] queries whose output
    decides on a generated token: the last one of a prompt, and every one generated.
    memory: what the method remembers of this layer for as long as the prompts are in the cache; see `remember`.
    offset: columns that the layer has forgotten (sliding windows) before the first key. note: adds a line to the
    report of the running prompts, once however often it is said. own: the model's own attention, of these queries or
    of others under a mask of their own, `own(query, mask)`: [B, H, R, d], [B, 1, R, K] -> [B, R, H, d]. free: prompts
    on their first way through the decoder beside themselves without their pictures, for a method that says `compares`;
    None: there is no picture, or it came earlier.
    """

    layer: int
    depth: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    start: Any
    mask: Tensor | None
    causal: bool
    window: int | None
    hidden: Tensor
    visual: Tensor
    real: Tensor
    initial: Tensor
    prompt: bool
    ends: Tensor
    offset: int = 0
    marks: dict[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    own: Callable[..., Tensor]
    note: Callable[[str], None]
    free: ImageFree | None = None

    # --- who is who --------------------------------------------------------------------------------------------

    @cached_property
    def after_visual(self) -> Tensor:
        """Queries of text that have a visual token before them: the rows that can look at a picture. bool [B, Q]"""
        if not self.prompt:
            return self.visual.any(1, keepdim=True).expand(-1, self.query.shape[2])
        seen = self.visual.long().cumsum(1) > 0
        rows = self.start + torch.arange(self.query.shape[2], device=seen.device)
        return (seen & ~self.visual & self.real)[:, rows]

    def remember(self, name: str, values: Tensor) -> None:
        """Keep one value a token of this call, for `recall`. values: [B, ..., Q]"""
        before = self.memory.get(name)
        count = self.offset + int(self.start)
        if before is None:
            before = values.new_zeros(*values.shape[:-1], count)
        elif before.shape[-1] < count:  # tokens generated meanwhile
            before = torch.nn.functional.pad(before, (0, count - before.shape[-1]))
        self.memory[name] = torch.cat([before[..., :count], values], dim=-1)

    def recall(self, name: str) -> Tensor | None:
        """What was remembered, for each key: zero or False for those of which nothing was. [B, ..., K]"""
        known: Tensor | None = self.memory.get(name)
        return None if known is None else aligned(known, self.offset, self.key.shape[2])

    # --- attention ---------------------------------------------------------------------------------------------

    def plain(self) -> Tensor:
        """The model's own attention, unchanged; it runs once. [B, H, Q, d]"""
        return self._plain

    @cached_property
    def _plain(self) -> Tensor:
        return self.own().transpose(1, 2)

    @cached_property
    def seen(self) -> Seen:
        """What each query sees."""
        n_query, n_key = self.query.shape[2], self.key.shape[2]
        if self.mask is not None and self.mask.ndim == 4:
            return Seen(mask=self.mask)
        keys = None if self.mask is None else self.mask[:, :n_key].bool()
        if not self.causal or (n_query == 1 and self.window is None):
            return Seen(keys=keys)
        places = self.start + torch.arange(n_query, device=self.query.device)
        return Seen(keys=keys, places=places, window=self.window)

    def redistribute(self, classes: Sequence[Tensor], factors: Factors, rows: Tensor | None = None) -> Tensor:
        """Multiply probabilities by a factor of the key's class, in some rows or in all. -> [B, H, Q, d]

        classes: bool [B or 1, H or 1, K] each, disjoint. factors: masses of the classes [B, H, R, C] -> factors of the
        same shape. rows: bool [B, Q]; None: all. Other rows are the model's own, bit for bit.
        """
        member = torch.stack(torch.broadcast_tensors(*classes))
        return self._rows(
            rows, lambda query, seen: redistribute(query, self.key, self.value, member, factors, self.scaling, seen)
        )

    def rescore(self, edit: Callable[[Tensor], Tensor], rows: Tensor | None = None) -> Tensor:
        """Change scores before the softmax, in some rows or in all. -> [B, H, Q, d]

        edit: masked scores [B, H, R, K] (fp32, hidden entries -inf) -> scores. rows: bool [B, Q]; None: all.
        """
        return self._rows(rows, lambda query, seen: rescore(query, self.key, self.value, edit, self.scaling, seen))

    def correct(
        self,
        member: Tensor,
        factors: Callable[[Tensor], tuple[Tensor, Tensor]],
        heads: Tensor | None = None,
        *,
        lse: Tensor | None = None,
        exact: Factors | None = None,
    ) -> Tensor:
        """Give a handful of keys a factor, and all others another, in all rows. -> [B, H, Q, d]

        member: bool [B, H or 1, K] the few (H: of `heads` where given). factors: their mass [B, H, Q] -> (factor of
        the few, factor of the others). heads: int64 [n] query heads that are edited; None: all. Others are the model's
        own, bit for bit.
        lse: [B, H, Q] log-sum-exp of the rows' scores, where it is known; the attention does not run twice then.
        exact: the factors where rows are made explicitly, masses of the few and of the others [B, H, Q, 2] -> factors
        of the same shape: `1 - mass` is all rounding error where the few hold nearly everything.

        More keys than a head is wide are no handful: their shares alone would take more memory than the queries, and
        rows are made explicitly.
        """
        n_heads = self.query.shape[1]
        if heads is not None and len(heads) < n_heads:
            if not len(heads):
                return self.plain()
            if self.query.shape[2] > 1:
                some = self.of_heads(heads).correct(member, factors, lse=lse, exact=exact)
                return self.plain().index_copy(1, heads, some)
            # Keys of some heads would be copied once a query head, more than a row of all heads costs.
            known = member.new_zeros(len(self.query), n_heads, member.shape[-1])
            known[:, heads] = member
            picked = torch.zeros(n_heads, dtype=torch.bool, device=heads.device).index_fill(0, heads, True)
            return torch.where(picked[:, None, None], self.correct(known, factors, exact=exact), self.plain())

        def both(masses: Tensor) -> Tensor:
            return torch.stack(factors(masses[..., 0]), dim=-1)

        # One row is as cheap made explicitly; and behind the log-sum-exp there is no gradient.
        if self.query.shape[2] > 1 and not (torch.is_grad_enabled() and self.query.requires_grad):
            few = Few.of(member)
            if not bool(few.there.any()):
                return self.plain()
            if few.columns.shape[-1] <= self.query.shape[-1]:
                return self._corrected(few, member, factors, exact or both, lse)
        return self.redistribute((member, ~member), exact or both)

    def _corrected(
        self,
        few: Few,
        member: Tensor,
        factors: Callable[[Tensor], tuple[Tensor, Tensor]],
        exact: Factors,
        lse: Tensor | None,
    ) -> Tensor:
        """Rows corrected by a few keys, but those made explicitly in which these keys hold nearly everything."""
        query, key, value, seen = self.query, self.key, self.value, self.seen
        if lse is not None:
            out = self.plain()
        else:
            plain = seen.mask is None and seen.keys is None and seen.window is None and seen.places is not None
            causal = plain and not isinstance(self.start, Tensor) and self.start == 0
            if causal:  # a static cache has places that nothing fills yet
                key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
            out, lse = with_lse(query, key, value, self.scaling, seen, causal)
        edited, ill = corrected(out, lse, query, key, value, few, factors, self.scaling, seen)
        rows = ill.flatten(0, 1).any(dim=0).nonzero().flatten()
        if not len(rows):
            return edited
        classes = torch.stack([member, ~member])
        some = redistribute(query[:, :, rows], self.key, self.value, classes, exact, self.scaling, seen.take(rows))
        return edited.index_copy(2, rows, some)

    def of_heads(self, heads: Tensor) -> Call:
        """The same call for some of its query heads. heads: int64 [n]"""
        group = heads // (self.query.shape[1] // self.key.shape[1])
        return replace(
            self,
            query=self.query[:, heads],
            key=self.key[:, group],
            value=self.value[:, group],
            own=lambda: self.plain()[:, heads].transpose(1, 2),
        )

    def _rows(self, rows: Tensor | None, attend: Callable[[Tensor, Seen], Tensor]) -> Tensor:
        """Some rows edited, the others the model's own. rows differ between prompts: their union is made."""
        if rows is None:
            return attend(self.query, self.seen)
        if self.query.shape[2] == 1:  # decoding: nothing to be gained by leaving rows out
            edited = attend(self.query, self.seen)
            return edited if bool(rows.all()) else torch.where(rows[:, None, :, None], edited, self.plain())
        union = rows.any(0).nonzero().flatten()
        if not len(union):
            return self.plain()
        plain = self.plain()
        edited = attend(self.query[:, :, union], self.seen.take(union))
        edited = torch.where(rows[:, None, union, None], edited, plain[:, :, union])
        return plain.index_copy(2, union, edited)


def aligned(values: Tensor, offset: int, n_key: int) -> Tensor:
    """Values of a layer's columns [..., n] -> of its keys [..., K]: forgotten ones cut off, later ones zero."""
    values = values[..., offset : offset + n_key]
    return torch.nn.functional.pad(values, (0, n_key - values.shape[-1]))
