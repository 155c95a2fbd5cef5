"""ACT: less attention on the sinks that are not the initial token.

Paper: Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through
    Attention Calibration (Yu et al., ICML 2024), arXiv:2406.15765
Code:  https://github.com/GATECH-EIC/ACT (a267af7)

In each of the chosen layers and heads, A [N, N] after the softmax:

    c_j = mean of A_ij over the rows i that see key j          attention that j receives
    S = {j : c_j > theta}, the initial token apart             its sinks (or c_j > alpha / N)
    A'_ij = beta A_ij for j in S,   A_ij (1 + (1 - beta) W_i / (1 - W_i)) for others,   W_i = sum of A_ij over S

so that beta is what the sinks keep, all other keys share what they lose in proportion, and rows go on to sum to one.
Shapes: sums over columns [B, H, K] (no map: vlmfast.edits.engine.column_sums) -> S bool [B, H, K] -> two factors
[B, H, Q]. Defaults are those of the authors' scripts: beta 0.4, theta 0.1, layers 2 to the last but one. The paper's
own criterion is reported by others as c_j > alpha / N with alpha=5, which follows the prompt's length; the code's
threshold does not.

While generating, the sinks of the prompt stand: tokens generated are no part of the square map in which sinks are
found. In a prompt that comes in chunks, a chunk's rows know the sinks by the rows so far, and generation by all of
them. Without a cache every step is a prompt of its own.

Differs from the official code, `parity="official"` brings it back: the code takes the first sink for the initial token
and spares it, whatever it is (here the prompt's first token is spared, and every other sink is one); it edits the
first prompt of a batch alone (here each its own sinks, rows and keys of padding apart); and it was written for one
forward: with a cache it looks for sinks in the one row there is, whose sinks share in what they lose, and gives the
first key a probability of 1 on top, so that rows sum to up to 2. Rows that see nothing but sinks stay as they are (the
code divides 0 by 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlmfast.adapters.attention.base import HeadEdit
from vlmfast.attention import attention_rows
from vlmfast.decoders import Sizes
from vlmfast.edits import Call
from vlmfast.edits.call import aligned
from vlmfast.edits.engine import column_sums, weighted
from vlmfast.towers import Picture

THETA = 0.1


@dataclass(frozen=True, kw_only=True)
class ACT(HeadEdit):
    """Take attention from sinks other than the initial token, and give it to all others in proportion.

    beta: what the sinks keep, 0 to 1; 1 changes nothing. theta: a key is a sink that receives more than this of every
    row that sees it, in the mean. alpha: instead of theta, more than alpha times what even attention would give it
    (the paper's 5). heads: None edits all heads; the paper calibrates those alone that help on a labelled set, layer
    by layer, and no list of them for vision-language models is published: `vlmfast heads` finds one.
    """

    name: ClassVar[str] = "act"
    summary: ClassVar[str] = "less attention on sinks other than the initial token, shared among the others"
    paper: ClassVar[str] = "arXiv:2406.15765"
    needs_visual: ClassVar[bool] = False

    layers: str | int = "2:-1"
    beta: float = 0.4
    theta: float = THETA
    alpha: float | None = None
    parity: str = "repaired"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("beta", 1.0), ("theta", 1.0), ("alpha", 1e6)):
            value = getattr(self, name)
            if name == "alpha" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
                means = {
                    "beta": "the share of their attention that sinks keep, 0 to 1",
                    "theta": "the attention from which on a key is a sink, 0 to 1",
                    "alpha": "from how many times even attention on a key is a sink, such as 5",
                }[name]
                raise ValueError(f"{name}={value!r}: {means}")
        if self.alpha is not None and self.theta != THETA:
            raise ValueError(f"theta={self.theta!r}, alpha={self.alpha!r}: two forms of one threshold, give one")

    @property
    def neutral(self) -> bool:
        """beta of 1; the official code writes the first key's probability all the same."""
        return self.beta == 1 and self.parity == "repaired"

    # --- which keys are sinks ----------------------------------------------------------------------------------

    @torch.no_grad()
    def sinks(self, call: Call) -> tuple[Tensor, Tensor]:
        """The sinks of each head, by the rows of a prompt so far. -> bool [B, H, K], log-sum-exp of the rows [B, H, Q]

        call: of the heads to be edited alone. Remembers what the next chunk of the prompt needs.
        """
        if self.parity == "official":
            return self._first_hit_dropped(call)
        n_query, n_key, start = call.query.shape[2], call.key.shape[2], int(call.start)
        rows = call.real[:, start : start + n_query]
        sums, lse = column_sums(call.query, call.key, call.scaling, call.seen, rows)
        counts = call.seen.counts(rows, n_key)
        # What the rows before gave, by how many there were: a cache that was cut back goes on from fewer of them.
        before: list[tuple[int, Tensor, Tensor]] = call.memory.setdefault("received", [])
        count = start + call.offset
        before[:] = [one for one in before if one[0] <= count]
        if before:
            _, given, seeing = before[-1]
            sums, counts = sums + aligned(given, call.offset, n_key), counts + aligned(seeing, call.offset, n_key)
        filled = start + n_query
        whole, rows_of = (nn.functional.pad(one[..., :filled], (call.offset, 0)) for one in (sums, counts))
        before.append((count + n_query, whole, rows_of))
        received = sums / counts.clamp(min=1)
        found = received > self._threshold(call.real[:, : start + n_query].sum(dim=1))
        columns = torch.arange(n_key, device=sums.device)
        return found & call.real[:, None] & (columns != call.initial[:, None, None]), lse

    def _threshold(self, length: Tensor) -> Tensor | float:
        """What a key must receive to be a sink. length: tokens of the prompts so far [B] -> [B, 1, 1]"""
        return self.theta if self.alpha is None else (self.alpha / length)[:, None, None]

    def _first_hit_dropped(self, call: Call) -> tuple[Tensor, Tensor]:
        """As the official code finds them, in the rows of this call, for the first prompt alone."""
        sums, lse = column_sums(call.query, call.key, call.scaling, call.seen)
        n_query, n_key = call.query.shape[2], call.key.shape[2]
        counts = n_query - (torch.arange(n_key, device=sums.device) - call.start).clamp(min=0)
        found = sums / counts.clamp(min=1) > self._threshold(call.real.new_full((len(sums),), n_key, dtype=torch.long))
        found = found & (found.long().cumsum(dim=-1) > 1)
        return found & (torch.arange(len(sums), device=sums.device) == 0)[:, None, None], lse

    # --- what happens to them ----------------------------------------------------------------------------------

    def factors(self, mass: Tensor) -> tuple[Tensor, Tensor]:
        """(factor of the sinks, factor of the others) for the sinks' mass. [...] -> [...] each"""
        return torch.full_like(mass, self.beta), 1 + (1 - self.beta) * mass / (1 - mass).clamp(min=1e-9)

    def exact(self, masses: Tensor) -> Tensor:
        """Factors of (sinks, others) for their masses. [..., 2] -> [..., 2]"""
        mass, rest = masses.unbind(-1)
        alone = rest <= torch.finfo(rest.dtype).tiny
        if self.parity == "official":
            alone = alone & (mass == 0)
            nan = torch.where(rest == 0, torch.nan, 0.0)  # 0 / 0, for every key of the row
            on_sinks, on_others = self.beta + nan, 1 + (1 - self.beta) * mass / rest + nan
        else:
            on_sinks = torch.full_like(mass, self.beta)
            on_others = 1 + (1 - self.beta) * mass / rest.masked_fill(alone, 1.0)
        return torch.stack([on_sinks, on_others], dim=-1).masked_fill(alone[..., None], 1.0)

    def edit(self, call: Call) -> Tensor:
        """All rows of the heads that have sinks."""
        heads = self.picked(call)
        if self.parity == "official":
            return self._official(call, heads)
        if not call.prompt:
            known = call.recall("sinks")
            return call.plain() if known is None else call.correct(known, self.factors, heads, exact=self.exact)
        sinks, lse = self.sinks(call if heads is None else call.of_heads(heads))
        holding = sinks.any(dim=-1).any(dim=0).nonzero().flatten()
        if not len(holding):
            call.memory.pop("sinks", None)
            return call.plain()
        call.memory["sinks"] = nn.functional.pad(sinks, (call.offset, 0))
        edited = holding if heads is None else heads[holding]
        return call.correct(sinks[:, holding], self.factors, edited, lse=lse[:, holding], exact=self.exact)

    def _official(self, call: Call, heads: Tensor | None) -> Tensor:
        """The official code's edit of the first prompt; rows explicitly."""
        some = call if heads is None else call.of_heads(heads)
        sinks, _ = self.sinks(some)
        edited = some.redistribute((sinks, ~sinks), self.exact)
        row = attention_rows(
            some.query[:, :, :1], some.key, slice(None), some.scaling, some.seen.of(slice(0, 1), some.key.shape[2])
        ).nan_to_num(0.0)
        taken = (1 - self.beta) * (row * sinks[:, :, None]).sum(dim=-1, keepdim=True)
        # In this row the sinks have their part of what is taken from them.
        row = torch.where(sinks[:, :, None], self.beta * row, row) + taken * row
        row[..., 0] = 1
        first = weighted(row, some.value).to(edited.dtype)
        edited = torch.cat([first, edited[:, :, 1:]], dim=2)
        plain = call.plain()
        if heads is not None:
            edited = plain.index_copy(1, heads, edited)
        return torch.cat([edited[:1], plain[1:]])

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """The scores of the edited heads, again, in all rows."""
        rows = picture.span + text
        return self.statistic(model, rows, rows)
