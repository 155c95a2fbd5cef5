"""Door 4, search: beams that look one token ahead, and go back where a method says so.

Every step looks at a few candidates of each beam in one forward; a method (`Guide`) penalises them by what it saw, or
sends the beams back to an earlier step to choose otherwise. Candidates that are chosen have been computed already:
their forward is the next step's. `Walker` hides the model (see vlmfast.walking), so that the same loop runs on tables.
What is kept of a finished sequence, and when the search ends, is as in transformers' own beam search.

All this is of one prompt: prompts that go back would leave the others of their batch behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

DEAD = -1e9  # added to the score of a beam that is none: the copies of the first one, sequences that have ended
Processor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Look:
    """What the last tokens of some rows attend to: the largest of all heads for each key, divided by the row's sum.

    generated: [R, L] generated tokens, the row's own last one included. visual: [R] all visual tokens together.
    """

    generated: Tensor
    visual: Tensor

    @classmethod
    def of(cls, rows: Tensor, visual: Tensor, first: int, count: int) -> Look:
        """From rows of an attention map. [R, H, K], visual keys bool [R, K]

        first: the key of the first generated token, of `count`; negative where a sliding window has left some behind,
        which count as not attended to.
        """
        row = rows.amax(1)
        row = row / row.sum(-1, keepdim=True)
        generated = row[:, max(first, 0) : first + count]
        generated = torch.nn.functional.pad(generated, (count - generated.shape[1], 0))
        return cls(generated, (row * visual).sum(-1))


class Walker(Protocol):
    """A model that continues rows of one prompt. A state holds rows, and is never changed."""

    def begin(self, rows: int) -> tuple[Any, Tensor]:
        """The prompt, `rows` times. -> state, logits of the next token [R, V] fp32"""
        ...

    def step(self, state: Any, rows: Tensor, tokens: Tensor) -> tuple[Any, Tensor, Look]:
        """Some rows of a state, one token further, and what it attends to. int64 [R] each -> state, logits [R, V]"""
        ...

    def keep(self, state: Any, rows: Tensor) -> Any:
        """Some rows of a state. int64 [R]"""
        ...

    def back(self, state: Any, tokens: Tensor) -> tuple[Any, Tensor]:
        """Rows of an earlier step, from what a state still holds of them. tokens: [R, t] -> state, logits [R, V]"""
        ...


@dataclass(frozen=True)
class Judgement:
    """What a method makes of C candidates of n beams.

    penalty: [n, C] what the candidates' logits lose, `Guide.alpha` times. places: int64 [n, C] the generated token
    that each leans on most. memory: of the step, for when the search comes back to it; grown: what becomes of it
    behind each candidate.
    """

    penalty: Tensor
    places: Tensor
    memory: Any
    grown: Any


class Guide(Protocol):
    """The method of a search. It keeps no state: what it must remember of the beams is handed to it."""

    @property
    def candidates(self) -> int:
        """How many tokens of a beam are looked at in a step."""
        ...

    @property
    def alpha(self) -> float:
        """How much of its penalties is taken off."""
        ...

    @property
    def official(self) -> bool:
        """The authors' loop, bugs included; see `search`."""
        ...

    def begin(self, beams: int, device: torch.device) -> Any:
        """The memory of beams without a token."""
        ...

    def judge(self, memory: Any, look: Look) -> Judgement:
        """Judge candidates. look: generated [n, C, L], visual [n, C]"""
        ...

    def keep(self, judged: Judgement, parents: Tensor, which: Tensor) -> Any:
        """The memory of beams that continue `parents` with their candidates number `which`. int64 [n] each"""
        ...

    def follow(self, memory: Any, parents: Tensor, look: Look) -> Any:
        """The memory of beams that continue a step's `parents` with other tokens. look: generated [n, L]"""
        ...

    def back(self, judged: Judgement, alive: Tensor, spent: dict[int, int]) -> int | None:
        """How many generated tokens to go back to; None: go on. alive: bool [n]

        spent: how often the search went back to each number of tokens; the method counts.
        """
        ...


@dataclass(frozen=True)
class Sequence:
    """A finished sequence: its score, its generated tokens [t], and the beam it was in at each of them [t]."""

    score: float
    tokens: Tensor
    lineage: Tensor


@dataclass(frozen=True)
class Choice:
    """What becomes of the best continuations: which of them the beams go on with, their scores, whether it ends."""

    order: Tensor
    scores: Tensor
    done: bool
    ended: Any


@dataclass(frozen=True)
class Ended:
    """The finished sequences of a prompt, best first, at most `beams` of them: as in transformers' beam search.

    stops: (sequences [K, L]) -> bool [K]; prompt: [1, P]. room: how many tokens may be generated. ends: the tokens
    that end a sequence, None: none does.
    """

    beams: int
    prompt: Tensor
    stops: Callable[[Tensor], Tensor]
    room: int
    ends: Tensor | None = None
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    found: tuple[Sequence, ...] = ()

    @property
    def wide(self) -> int:
        """How many continuations to look at, so that enough are left when those that end are taken out."""
        return max(2, 1 + (0 if self.ends is None else len(self.ends))) * self.beams

    def take(self, best: Tensor, tokens: Tensor, lineage: Tensor) -> Choice:
        """Decide on the best continuations. best: scores [K] descending; tokens, lineage: [K, t]"""
        count = tokens.shape[1]
        hits = self.stops(torch.cat([self.prompt.expand(len(tokens), -1), tokens], dim=1)).to(best.device)
        running, order = (best + hits * DEAD).topk(self.beams)
        more = [
            Sequence(float(best[k]) / count**self.length_penalty, tokens[k], lineage[k])
            for k in hits[: self.beams].nonzero().flatten().tolist()
        ]
        found = tuple(sorted((*self.found, *more), key=lambda one: -one.score)[: self.beams])
        full = len(found) == self.beams
        reach = self.room if self.early_stopping == "never" and self.length_penalty > 0 else count
        worst = found[-1].score if full else DEAD
        hopeless = not float(running[0]) / reach**self.length_penalty > worst  # no running beam can become better
        done = hopeless or (full and self.early_stopping is True) or bool(hits.all())
        return Choice(order, running, done, replace(self, found=found))

    def final(self, tokens: Tensor, scores: Tensor, lineage: Tensor) -> tuple[Sequence, ...]:
        """The sequences, best first. tokens, lineage: [n, t] and scores [n] of the beams that still run

        Those stand in where nothing could be said any more before there were enough.
        """
        missing, length = self.beams - len(self.found), tokens.shape[1] ** self.length_penalty
        more = [Sequence(float(scores[k]) / length, tokens[k], lineage[k]) for k in range(missing)]
        return (*self.found, *more)


@dataclass(eq=False)
class Moment:
    """The beams after t generated tokens.

    tokens, lineage: int64 [n, t]; scores: [n]. memory: the method's. chosen: (parents, tokens), how the search went on
    from here the last time.
    """

    tokens: Tensor
    lineage: Tensor
    scores: Tensor
    memory: Any
    ended: Any
    chosen: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Step:
    """One step, for those who want to see: what the loop decided, in the order it did.

    tokens: [n, t] before it. candidates, penalised: [n, C] tokens and their logits after the penalty. back: how many
    tokens it went back to, None. scores, parents, chosen: [n] of the beams behind it.
    """

    tokens: Tensor
    candidates: Tensor
    penalised: Tensor
    judged: Judgement
    back: int | None
    scores: Tensor
    parents: Tensor
    chosen: Tensor


@dataclass
class Tally:
    """What a search did: calls of the model behind the prompt, their rows, steps, and how often it went back."""

    calls: int = 0
    rows: int = 0
    steps: int = 0
    backs: int = 0
    watch: Callable[[Step], None] | None = field(default=None, repr=False)


def search(
    walker: Walker, guide: Guide, ended: Any, process: Processor, tally: Tally | None = None
) -> tuple[Sequence, ...]:
    """Search with `ended.beams` beams. -> finished sequences, best first

    process: (sequences [n, L], log-probabilities [n, V]) -> log-probabilities. Candidates are the likeliest tokens of
    a beam once it is through; the method's penalties are taken off their logits, and their probability is their share
    of all candidates'. The copies of the prompt in the first step need as many candidates as there are beams.

    guide.official: candidates by logits, whatever `process` forbids; tokens that are none have logits of -999 instead
    of none; steps that the search goes back to know of sequences finished since, and which continuations were rejected
    is forgotten for the next step alone.
    """
    tally = tally or Tally()
    n, prompt = ended.beams, ended.prompt
    state, logits = walker.begin(n)
    device, size = logits.device, logits.shape[-1]
    scores = torch.zeros(n, device=device)
    scores[1:] = DEAD
    nothing = torch.zeros(n, 0, dtype=torch.long, device=device)
    now = Moment(nothing, nothing, scores, guide.begin(n, device), ended)
    history: list[Moment] = []
    spent: dict[int, int] = {}
    rejected: dict[int, Tensor] = {}
    linked: Moment | None = None
    while True:
        count, before = now.tokens.shape[1], now.tokens
        sequences = torch.cat([prompt.expand(n, -1), before], dim=1)
        wide = guide.candidates if guide.official or count else max(guide.candidates, n)
        likely = logits if guide.official else process(sequences, logits.log_softmax(-1))
        candidates = likely.topk(min(wide, size)).indices
        wide = candidates.shape[1]
        beams = torch.arange(n, device=device).repeat_interleave(wide)
        ahead, after, look = walker.step(state, beams, candidates.flatten())
        tally.calls, tally.rows, tally.steps = tally.calls + 1, tally.rows + len(beams), tally.steps + 1
        judged = guide.judge(now.memory, Look(look.generated.unflatten(0, (n, wide)), look.visual.view(n, wide)))
        now.memory = judged.memory
        history.append(now)
        penalised = logits.gather(1, candidates) - guide.alpha * judged.penalty
        back = guide.back(judged, now.scores > DEAD / 2, spent)
        if back is None:
            floor = -999.0 if guide.official else -torch.inf
            allowed = torch.full_like(logits, floor).scatter(1, candidates, penalised)
        else:
            kept = min(back, count - 1)  # by one step at least
            now = history[kept]
            del history[kept + 1 :]
            state, logits = walker.back(state, now.tokens)
            tally.calls, tally.rows, tally.backs = tally.calls + 1, tally.rows + n, tally.backs + 1
            allowed = _reject(guide.official, now, logits, back if guide.official else kept, count, rejected)
            sequences = torch.cat([prompt.expand(n, -1), now.tokens], dim=1)
            linked = now if guide.official else None
        values = process(sequences, allowed.log_softmax(-1)) + now.scores[:, None]
        best, index = values.flatten().topk(min(now.ended.wide, values.numel()))
        parents, tokens = index // size, index % size
        longer = torch.cat([now.tokens[parents], tokens[:, None]], dim=1)
        lineages = torch.cat([now.lineage[parents], parents[:, None]], dim=1)
        choice = now.ended.take(best, longer, lineages)
        if linked is not None:
            linked.ended = choice.ended
        parents, tokens = parents[choice.order], tokens[choice.order]
        now.chosen = parents, tokens
        if tally.watch is not None:
            tally.watch(Step(before, candidates, penalised, judged, back, choice.scores, parents, tokens))
        beams_on = longer[choice.order]
        lineage = lineages[choice.order]
        if choice.done:
            final: tuple[Sequence, ...] = choice.ended.final(beams_on, choice.scores, lineage)
            return final
        same = candidates[parents] == tokens[:, None]
        if back is None and bool(same.any(1).all()):
            which = same.long().argmax(1)
            rows = parents * wide + which
            state, logits, memory = walker.keep(ahead, rows), after[rows], guide.keep(judged, parents, which)
        else:
            del ahead, after
            state, logits, look = walker.step(state, parents, tokens)
            tally.calls, tally.rows = tally.calls + 1, tally.rows + n
            memory = guide.follow(now.memory, parents, look)
        now = Moment(beams_on, lineage, choice.scores, memory, choice.ended)


def _reject(official: bool, now: Moment, logits: Tensor, back: int, count: int, rejected: dict[int, Tensor]) -> Tensor:
    """The logits of a step that the search has come back to, without what was chosen there before. [n, V]

    rejected: continuations (beam * V + token) by numbers of tokens; `back` is the step's, `count` where it came from.
    """
    assert now.chosen is not None
    size = logits.shape[-1]
    pairs = now.chosen[0] * size + now.chosen[1]
    if official:  # the list of 512 positions is cleared at its end, whichever positions were left
        for place in [*range(512 - max(0, count - 1 - back), 512), back + 1]:
            rejected.pop(place, None)
        logits = logits - (999.0 + logits.amin(-1, keepdim=True))
    else:
        for place in [place for place in rejected if place > back]:
            del rejected[place]
    rejected[back] = torch.cat([rejected[back], pairs]) if back in rejected else pairs
    floor = -999.0 if official else -torch.inf
    return logits.flatten().index_fill(0, rejected[back], floor).view_as(logits)
