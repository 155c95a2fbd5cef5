"""OPERA: beam search that penalises over-trust in one token, and goes back to where it began.

Paper: OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and
    Retrospection-Allocation (Huang et al., CVPR 2024), arXiv:2311.17911
Code:  https://github.com/shikiw/OPERA (61426ef), transformers-4.29.2/src/transformers/generation/utils.py

w_ij: what generated token i gives to generated token j in the last decoder layer with attention, the largest of all
heads, as a share of its whole row. L: generated tokens, the candidate included.

    s_j = 1e-7 prod_{i=j..L} sigma w_ij                      how much everything since leans on j
    phi = max_j s_j,  for L <= 10:  phi = -(share of all visual tokens in the candidate's row)
    score of a candidate: its logit - alpha phi, as a share of the beam's `candidates` likeliest tokens

Where every beam has leaned on the same token c (argmax_j s_j, mode over candidates) in more than `threshold` steps,
and c is not one of the first ten, the search goes back to right behind c and takes something else: any tokens but
those chosen there before, without penalties. It comes back to a place `candidates` times, then to the one before it.

Shapes: n beams, C candidates; log s [n, C, L] fp32, of which a beam keeps [n, L]. Defaults: the authors' (alpha=1,
sigma=50, threshold=15, candidates=5, with num_beams=5); their faster variant is threshold=25, candidates=1.
Cost: one forward of n C rows a token, which is the chosen ones' next forward; no attention map. To go back, one
short forward (see `vlmfast.walking`).

Differs from the official code, which `parity="official"` brings back in all that decides on tokens:
- s is kept as a logarithm in fp32 (the code: fp16, below 6e-8 zero, above 65504 infinite), and phi is at most 1000.
- Tokens that are no candidates cannot be chosen (the code: logit -999, which beats candidates of a larger penalty).
- Candidates are chosen after the logits processors, which may forbid some; the first step, where all beams are one,
  has as many as there are beams (the code fills up with arbitrary tokens).
- Where its beams go, the record of what a beam leaned on goes with it (the code: stays at the beam's number); beams
  that are none do not count.
- Coming back restores the finished sequences of that step every time (the code: the first time), and forgets what was
  rejected at later ones.
- Ends and returned sequences as in transformers 5 (the code: those of 4.29, lengths with the prompt). Any batch (the
  code: one prompt).
Image tokens: those the language model gets, of all pictures, without a setting. The code has no windows for j and L
where the paper has; so do we. Prompts without a picture are searched like others, their phi for L <= 10 is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.adapters.decoding.base import Decoding, number
from vlmfast.decoders import Sizes
from vlmfast.patching import Patch
from vlmfast.search import Choice, Ended, Judgement, Look, Sequence
from vlmfast.towers import Picture
from vlmfast.walking import SearchDoor

UNIT = 1e-7
EARLY = 10  # tokens with the bonus for attention to pictures, and those that are no anchor
MOST = 1000.0  # of phi: no logit makes up for it
NEVER = 10**6  # a threshold that no answer reaches


@dataclass(frozen=True)
class Memory:
    """What n beams of t tokens leaned on.

    window: [n, t] log of prod sigma w_ij so far; official: [n, t, t] w itself. places: int64 [n, T] one a step.
    """

    window: Tensor
    places: Tensor


def mode(values: Tensor) -> Tensor:
    """The most frequent value, the smallest of several. int64 [..., n] -> [...]"""
    values = values.sort(dim=-1).values
    counts = (values[..., None] == values[..., None, :]).sum(-1)
    return values.gather(-1, counts.argmax(-1, keepdim=True))[..., 0]


@dataclass(frozen=True, kw_only=True)
class OPERA(Decoding):
    """Penalise candidates whose beam leans on one token, and go back where all beams do.

    alpha: weight of the penalty; 0: none. sigma: scale of the attention. threshold: how many steps must lean on one
    token before the search goes back; inf: it never does. candidates: tokens looked at for each beam and step. alpha=0
    with threshold=inf changes nothing: plain beam search.
    """

    name: ClassVar[str] = "opera"
    summary: ClassVar[str] = "beam search with an over-trust penalty that goes back to where over-trust began"
    paper: ClassVar[str] = "arXiv:2311.17911"
    beams: ClassVar[int] = 5  # the paper's

    alpha: float = 1.0
    sigma: float = 50.0
    threshold: float = 15
    candidates: int = 5
    parity: str = "repaired"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not number(self.alpha, 0, 1e6):
            raise ValueError(f"alpha={self.alpha!r}: the weight of the penalty, a number from 0 on")
        if not number(self.sigma, 1e-6, 1e6):
            raise ValueError(f"sigma={self.sigma!r}: the scale of the attention, a number above 0 (50 in the paper)")
        if not number(self.threshold, 0, math.inf):
            raise ValueError(f"threshold={self.threshold!r}: a number of steps from 0 on; inf: never back")
        if isinstance(self.candidates, bool) or not isinstance(self.candidates, int) or self.candidates < 1:
            raise ValueError(f"candidates={self.candidates!r}: how many tokens to look at, 1 or more")
        if self.official and self.candidates < 2:
            raise ValueError(f"candidates={self.candidates!r}: the official code asks for 2 or more")

    @property
    def neutral(self) -> bool:
        """No penalty, and never back."""
        return self.alpha == 0 and self.threshold >= NEVER

    @property
    def official(self) -> bool:
        """The authors' loop."""
        return self.parity == "official"

    def install(self, patch: Patch) -> None:
        """Door 4. Raises NotImplementedError for a decoder whose last attention is no plain softmax."""
        SearchDoor(patch, self.name, self, OfficialEnded if self.official else Ended, self.beams, alone=self.official)

    def step_flops(self, picture: Picture, text: int, model: Sizes, step: int) -> int:
        """All candidates of all beams, less the one token of greedy search. Steps that are taken again come atop."""
        rows = 1 if self.neutral else self.beams * self.candidates
        return int((rows - 1) * model.decoder.token(picture.span + text + step))

    # --- the guide of the search ---------------------------------------------------------------------------------

    def begin(self, beams: int, device: torch.device) -> Memory:
        """Nothing yet."""
        nothing = torch.zeros(beams, 0, device=device)
        return Memory(nothing.view(beams, 0, 0) if self.official else nothing, nothing.long())

    def grown(self, window: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
        """One more row. window: of n beams; generated: [n, C, L] -> window of each candidate, s or log s [n, C, L]"""
        count = generated.shape[-1]
        if self.official:
            before = torch.nn.functional.pad(window, (0, 1))[:, None].expand(-1, generated.shape[1], -1, -1)
            grown = torch.cat([before, generated[:, :, None]], dim=2)
            scaled = self.sigma * grown
            scores = [UNIT * scaled[..., j:, j].prod(-1) for j in range(count)]
            return grown, torch.stack(scores, dim=-1).half()
        grown = torch.nn.functional.pad(window, (0, 1))[:, None] + (self.sigma * generated).log()
        return grown, grown + math.log(UNIT)

    def judge(self, memory: Memory, look: Look) -> Judgement:
        """Penalties and anchors."""
        grown, scores = self.grown(memory.window, look.generated)
        largest, places = scores.max(-1)
        if not self.official:
            largest = largest.exp().clamp(max=MOST)
        phi = -look.visual if scores.shape[-1] <= EARLY else largest
        seen = torch.cat([memory.places, mode(places)[:, None]], dim=1)
        return Judgement(phi, places, replace(memory, places=seen), grown)

    def back(self, judged: Judgement, alive: Tensor, spent: dict[int, int]) -> int | None:
        """Right behind what all beams lean on."""
        seen: Tensor = judged.memory.places
        if not self.official:
            seen = seen[alive]
        place = int(mode(seen[:, -1]))
        if place < EARLY or not bool(((seen == place).sum(1) > self.threshold).all()):
            return None
        for back in (place + 1, place):
            if spent.get(back, 0) < self.candidates:
                spent[back] = spent.get(back, 0) + 1
                return back
        return None

    def keep(self, judged: Judgement, parents: Tensor, which: Tensor) -> Memory:
        """What the chosen candidates' forwards have told."""
        places = judged.memory.places
        return Memory(judged.grown[parents, which], places if self.official else places[parents])

    def follow(self, memory: Memory, parents: Tensor, look: Look) -> Memory:
        """The same from a forward of its own."""
        grown, _ = self.grown(memory.window[parents], look.generated[:, None])
        return Memory(grown[:, 0], memory.places if self.official else memory.places[parents])


@dataclass(frozen=True)
class OfficialEnded:
    """Finished sequences as transformers 4.29 keeps them, for one prompt: see `vlmfast.search.Ended` for the fields.

    Lengths count the prompt; those of finished sequences leave out the token that ends them.
    """

    beams: int
    prompt: Tensor
    stops: Callable[[Tensor], Tensor]
    room: int
    ends: Tensor | None = None
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    found: tuple[Sequence, ...] = ()
    complete: bool = False

    @property
    def wide(self) -> int:
        """Twice as many as beams."""
        return 2 * self.beams

    def added(self, score: float, tokens: Tensor, lineage: Tensor) -> OfficialEnded:
        """With one more sequence, if it is among the best."""
        length = self.prompt.shape[1] + len(tokens)
        one = Sequence(score / length**self.length_penalty, tokens, lineage)
        if len(self.found) == self.beams and one.score <= self.found[-1].score:
            return self
        found = sorted((*self.found, one), key=lambda other: -other.score)[: self.beams]
        return replace(self, found=tuple(found))

    def take(self, best: Tensor, tokens: Tensor, lineage: Tensor) -> Choice:
        """Sequences that end go, the others go on."""
        ended, order = self, []
        ends = [] if self.ends is None else self.ends.tolist()
        for rank, token in enumerate(tokens[:, -1].tolist()):
            if token not in ends:
                order.append(rank)
            elif rank < self.beams:
                ended = ended.added(float(best[rank]), tokens[rank, :-1], lineage[rank, :-1])
            if len(order) == self.beams:
                break
        index = torch.tensor(order, device=best.device)
        length, count = self.prompt.shape[1] + tokens.shape[1], tokens.shape[1]
        if not ended.complete and len(ended.found) == self.beams:
            never = self.early_stopping == "never" and self.length_penalty > 0
            reach = self.prompt.shape[1] + self.room if never else length
            hopeless = ended.found[-1].score >= float(best[0]) / reach**self.length_penalty
            ended = replace(ended, complete=self.early_stopping is True or hopeless)
        return Choice(index, best[index], ended.complete or count >= self.room, ended)

    def final(self, tokens: Tensor, scores: Tensor, lineage: Tensor) -> tuple[Sequence, ...]:
        """The sequences that run are finished, too, unless there are enough; a token that ends them follows."""
        ended = self
        if not self.complete:
            for row in range(len(tokens)):
                ended = ended.added(float(scores[row]), tokens[row], lineage[row])
        return tuple(ended.closed(one) for one in ended.found)

    def closed(self, one: Sequence) -> Sequence:
        """With a token that ends it, where there is room."""
        if self.ends is None or len(one.tokens) >= self.room:
            return one
        beam = one.lineage[-1:] if len(one.lineage) else one.lineage.new_zeros(1)
        return replace(one, tokens=torch.cat([one.tokens, self.ends[:1]]), lineage=torch.cat([one.lineage, beam]))
