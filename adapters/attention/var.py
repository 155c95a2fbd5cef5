"""VAR: attention wasted on sinks goes to the rest of the picture, in heads that look at it.

Paper: See What You Are Told: Visual Attention Sink in Large Multimodal Models (Kang et al., ICLR 2025),
    arXiv:2503.03321
Code:  https://github.com/seilk/VisAttnSink (98e62d6)

A token is a sink of a layer if phi > tau at its input (`vlmfast.sinks`), found once, among the tokens of the prompt. A
head's row of attention a is edited if it looks at the picture, and not at its sinks only:

    m = sum_{image} a >= summ   and   s = sum_{image sinks} a / (m + 1e-6 n) <= rho,   n visual tokens

    a_j' = p a_j                          sinks, of text and picture alike
    a_j' = a_j (1 + (1 - p) W_S / W_I)    other visual tokens;   W_S, W_I what the row pays to either

and all other keys keep theirs, so that the row still sums to 1. Rows: text behind a visual sink, and generated
tokens; a prompt without a visual sink in a layer stays as it is there. Shapes: masses of (text sinks, visual sinks,
other visual tokens) [B, H, Q, 3] -> factors [B, H, Q, 3]. Defaults: the code's p=0.6, rho=0.5, tau=20, summ=0.2, and
layers 2 to the last but one.

The code and the paper give two numbers another meaning, so there are two settings for each: p is the share that sinks
keep, `budget` = 1 - p what they give away; s <= rho here is 1 - s >= `rho_paper` = 1 - rho there (the paper: 0.8 for
general questions, 0.5 against hallucination, 0.9 for vision-centric tasks). phi > tau is strict, as in the code (the
paper: >=).

Sink dimensions that are not given come from the list in `vlmfast.sinks` or, where the model is not on it, from the
prompt itself: those that are massive at its first token in the very layer. A layer where nothing is massive yet (or
any more) has no sinks by fixed dimensions either. `vlmfast.find_sinks` gives dimensions for all layers. Where there
are no sinks nothing is edited, and the report says so.

Differs from the official code: it spares the last layer, as the paper has it (the code's switch for that has no
effect: `parity="official"` edits it too); 13B models have their own dimensions (the code takes those of 7B); every
prompt of a batch has its own sinks (the code merges them); nothing of one prompt is left for the next (the code goes
on with the sinks of its first sample, and edits rows of the picture from the second on); where a row pays nothing to
other visual tokens, which rho=1 admits, it stays as it is (the code divides by zero). Only the first of these is
brought back by `parity="official"`; the others are accidents that no result should depend on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.adapters.attention.base import AttentionEdit, attending
from vlmfast.decoders import Attention, Sizes
from vlmfast.edits import Call
from vlmfast.patching import Patch
from vlmfast.sinks import TAU, known, massive, parsed, sizes, spelled
from vlmfast.towers import Picture

KEPT, SHARE = 0.6, 0.5  # p and rho of the code
LAYERS = "2:-1"
SINKS, DIMS, ACTIVE = "sinks", "dims", "active"  # what a layer remembers
CLASSES = 3  # text sinks, visual sinks, other visual tokens
EPS = 1e-6
# Why nothing was redistributed, from the first thing that was missing on.
NOTHING = tuple(
    f"{reason}; nothing was redistributed"
    for reason in ("no sink dimensions found", "no token is a sink", "no visual token is a sink")
)


@dataclass(frozen=True, kw_only=True)
class VAR(AttentionEdit):
    """Move attention from sinks to other visual tokens, in heads that look at the picture.

    p: the share of their attention that sinks keep, or budget: the share they give away (default: p=0.6, 1 changes
    nothing). rho: largest share of visual sinks in what a row pays to the picture, or rho_paper: least share of the
    others (default: rho=0.5). tau: a sink's phi is above it. summ: what a row pays to the picture, at least. dims:
    sink dimensions joined by slashes; None: listed or found (see above).
    """

    name: ClassVar[str] = "var"
    summary: ClassVar[str] = "attention on sinks moved to other visual tokens, in heads that look at the picture"
    paper: ClassVar[str] = "arXiv:2503.03321"

    layers: str | int = LAYERS
    p: float | None = None
    budget: float | None = None
    rho: float | None = None
    rho_paper: float | None = None
    tau: float = TAU
    summ: float = 0.2
    dims: str | int | None = None
    parity: str = "repaired"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("p", "budget", "rho", "rho_paper", "summ"):
            value = getattr(self, name)
            if value is None and name != "summ":
                continue
            if not _is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r}: a share from 0 to 1")
        if not _is_number(self.tau) or not 0 <= self.tau < float("inf"):
            raise ValueError(f"tau={self.tau!r}: a number from 0 on, such as {TAU:g}")
        for ours, theirs in (("p", "budget"), ("rho", "rho_paper")):
            if getattr(self, ours) is not None and getattr(self, theirs) is not None:
                raise ValueError(f"{ours} and {theirs}: give one of them, {theirs} is 1 - {ours}")
        if self.dims is not None:
            parsed(self.dims)

    @property
    def kept(self) -> float:
        """p, under whichever name it was given."""
        return 1 - self.budget if self.budget is not None else KEPT if self.p is None else self.p

    @property
    def limit(self) -> float:
        """rho, under whichever name it was given."""
        return 1 - self.rho_paper if self.rho_paper is not None else SHARE if self.rho is None else self.rho

    @property
    def neutral(self) -> bool:
        """p of 1."""
        return self.kept == 1

    def where(self, attends: Sequence[int], depth: int) -> Sequence[int]:
        """As `AttentionEdit.where`; the official code does not spare the last layer."""
        if self.parity == "official" and self.layers == LAYERS:
            return dataclasses.replace(self, layers="2:").where(attends, depth)
        return super().where(attends, depth)

    def check_decoder(self, text: Any, layers: Sequence[int]) -> None:
        """Raise ValueError for dimensions that there are not."""
        if self.dims is not None:
            parsed(self.dims, text.hidden_size)

    def attach(self, patch: Patch) -> None:
        """Install door 3, for a model on the list with its dimensions."""
        listed = known(patch.model.config) if self.dims is None else None
        one = self if listed is None else dataclasses.replace(self, dims=spelled(listed.dims))
        super(VAR, one).attach(patch)

    # --- sinks -------------------------------------------------------------------------------------------------

    def find(self, call: Call) -> None:
        """Remember which of a call's tokens, of a prompt, are sinks, bool [B, K], and tell what was found."""
        count = call.query.shape[2]
        columns = call.start + torch.arange(count, device=call.hidden.device)
        dims: tuple[int, ...] | Tensor
        if self.dims is None:
            dims = call.memory[DIMS] = self._massive(call, count)
            some = dims.any()
        else:
            dims = parsed(self.dims)
            some = torch.ones((), dtype=torch.bool, device=call.hidden.device)
        call.remember(SINKS, (sizes(call.hidden, dims) > self.tau) & call.real[:, columns])
        sinks = call.recall(SINKS)
        assert sinks is not None
        facts = torch.stack([some, sinks.any(), (sinks & call.visual).any(), call.visual.any()])
        *found, picture = facts.tolist()  # one wait for the device
        call.memory[ACTIVE] = found[-1]
        if picture and not all(found):
            call.note(f"{self.name}: {NOTHING[found.index(False)]}")
        elif picture:
            numbers = dims.any(0).nonzero().flatten().tolist() if isinstance(dims, Tensor) else dims
            by = "found at the first token" if isinstance(dims, Tensor) else "given or listed"
            call.note(f"{self.name}: sinks by dimensions {spelled(numbers)}, {by}")

    def _massive(self, call: Call, count: int) -> Tensor:
        """The massive dimensions of each prompt's first token in this layer, as soon as it was there. bool [B, D]"""
        place = call.initial - call.start
        here = (place >= 0) & (place < count)
        rows = torch.arange(len(place), device=place.device)
        found = massive(call.hidden[rows, place.clamp(0, count - 1)]) & here[:, None]
        before = call.memory.get(DIMS)
        return found if before is None else found | before

    def remarks(self, notes: Sequence[str]) -> Sequence[str]:
        """What was missing, only where no layer had it all."""
        reasons = [f"{self.name}: {reason}" for reason in NOTHING]
        missing = [note for note in reasons if note in notes]
        return [note for note in notes if note not in reasons] or missing[-1:]

    # --- redistribution ----------------------------------------------------------------------------------------

    def classes(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Text sinks, image sinks, other visual tokens. bool [B, 1, K] each"""
        sinks = call.recall(SINKS)
        if sinks is None:
            sinks = torch.zeros_like(call.visual)
        text, image, others = sinks & ~call.visual, sinks & call.visual, call.visual & ~sinks
        return text[:, None], image[:, None], others[:, None]

    def rows(self, call: Call) -> Tensor:
        """Rows of text behind a visual sink, and generated ones of prompts that have one. bool [B, Q]"""
        sinks = self.classes(call)[1][:, 0]
        if not call.prompt:
            return sinks.any(1, keepdim=True).expand(-1, call.query.shape[2])
        columns = call.start + torch.arange(call.query.shape[2], device=sinks.device)
        return call.after_visual & (sinks.long().cumsum(1) > 0)[:, columns]

    def selected(self, masses: Tensor, n: Tensor) -> Tensor:
        """Which rows of which heads look at the picture, and not at its sinks only. bool [B, H, Q]

        masses: [B, H, Q, 3], see `classes`. n: [B] visual tokens.
        """
        looks = masses[..., 1] + masses[..., 2]
        share = masses[..., 1] / (looks + EPS * n[:, None, None])
        return (share <= self.limit) & (looks >= self.summ) & (masses[..., 2] > 0)

    def factors(self, masses: Tensor, n: Tensor) -> Tensor:
        """Factors of the three classes; see `selected`. [B, H, Q, 3] -> [B, H, Q, 3]"""
        chosen = self.selected(masses, n)
        sinks = masses[..., 0] + masses[..., 1]
        gain = 1 + (1 - self.kept) * sinks / masses[..., 2].masked_fill(~chosen, 1.0)
        kept = torch.full_like(gain, self.kept)
        return torch.where(chosen[..., None], torch.stack([kept, kept, gain], dim=-1), 1.0)

    def edit(self, call: Call) -> Tensor:
        """The rows of `rows`; `find` comes first, also where there is no picture yet."""
        if call.prompt:
            self.find(call)
        if not call.memory.get(ACTIVE):
            return call.plain()
        n = call.visual.sum(1)
        return call.redistribute(self.classes(call), lambda masses: self.factors(masses, n), self.rows(call))

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """The text's rows again: scores, values, masses and factors of the classes.

        All of the text, as if the picture came first and had sinks in every layer.
        """
        if self.neutral:
            return 0
        keys, total = picture.span + text, 0
        for number in self.where(attending(model), len(model.decoder.layers)):
            layer = model.decoder.layers[number]
            assert isinstance(layer.mixer, Attention)
            total += 2 * layer.statistic(text, keys) + 2 * 2 * CLASSES * layer.mixer.heads * text * keys
        return total


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
