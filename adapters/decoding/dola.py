"""DoLa: what the last layer says and an early one does not say yet.

Paper: DoLa: Decoding by Contrasting Layers Improves Factuality in Large Language Models (Chuang et al., ICLR 2024),
    arXiv:2309.03883
Code:  https://github.com/voidism/DoLa (805230e)

    q_l = softmax(head(h_l))                     h_l behind l layers, without the final norm; p: the model's own
    l*  = argmax_l (KL(m || p) + KL(m || q_l)) / 2,   m = (p + q_l) / 2
    s   = log p - log q_l*                       for tokens with p >= relative_top max p; the others are out

for the token decided on. Shapes: premature logits [n, B, V], logits [B, V] -> scores [B, V]. Candidates l are the even
ones of the lower or the upper half of the layers (LLaVA-1.5: 0 to 14, 16 to 30), at most 20 deep, as transformers has
them; with tied embeddings the lower ones begin at 2, since behind 0 layers a token predicts itself. One layer alone is
the paper's static mode. The paper advises `repetition_penalty=1.2` for long answers, an argument of `generate`.

Differs from the official code: each row of a batch chooses its layer (the code chooses one by the batch's mean);
`parity="official"` brings that back. With relative_top=0 the code subtracts logits rather than log-probabilities,
which differ by a constant of the row that no search sees. The divergence is the code's: the paper's would be
KL(p || m) + KL(q || m).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.adapters.decoding.base import StepDecoding, number
from vlmfast.ranges import DEEP, which

DEEPEST = 20  # layers of a bucket
NEVER = torch.finfo(torch.float32).tiny  # as good as no probability


def divergences(logits: Tensor, premature: Tensor) -> Tensor:
    """How much an early layer's distribution differs from the last one's, mean over the vocabulary.

    [B, V], [n, B, V] -> [n, B]
    """
    final, early = logits.log_softmax(-1)[None], premature.log_softmax(-1)
    mean = early.exp().add_(final.exp()).mul_(0.5)
    # Both divergences from the mean at once, sum mean (log mean - final) + mean (log mean - early), in place: tensors
    # of this size come from the system anew each time.
    both = mean.clamp(min=NEVER).log_().mul_(2).sub_(final).sub_(early)
    return 0.5 * both.mul_(mean).mean(-1)


def contrast(logits: Tensor, premature: Tensor, relative_top: float) -> Tensor:
    """Log-probabilities over those of an early layer, -inf for implausible tokens. [B, V] each"""
    if not relative_top:
        return logits - premature
    final = logits.log_softmax(-1)
    implausible = final < final.amax(-1, keepdim=True) + math.log(relative_top)
    return (final - premature.log_softmax(-1)).masked_fill(implausible, -torch.inf)


@dataclass(frozen=True, kw_only=True)
class DoLa(StepDecoding):
    """Contrast the last layer's distribution with that of the early layer that differs most.

    layers: "low" or "high" (even ones of the lower or the upper half), or numbers and ranges joined by slashes: behind
    so many layers, 0: the embeddings; "none": no contrast. relative_top: tokens less likely than this share of the
    likeliest one are out.
    """

    name: ClassVar[str] = "dola"
    summary: ClassVar[str] = "contrasts the last layer with the early one that differs most"
    paper: ClassVar[str] = "arXiv:2309.03883"

    layers: str | int = "low"
    relative_top: float = 0.1
    parity: str = "repaired"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers not in ("low", "high", "none"):
            which(self.layers, DEEP)
        if not number(self.relative_top, 0, 1):
            raise ValueError(f"relative_top={self.relative_top!r}: a share from 0 to 1 of the likeliest token's")

    @property
    def neutral(self) -> bool:
        """No layer to contrast with."""
        return self.layers == "none"

    def reads(self, depth: int, tied: bool) -> Sequence[int]:
        """The candidates."""
        if self.layers == "low":
            return range(2 if tied and depth >= 6 else 0, min(depth // 2, DEEPEST), 2)
        if self.layers == "high":
            return range(max(depth // 2, depth - DEEPEST), depth, 2)
        found, _ = which(self.layers, depth)
        if not found:
            raise ValueError(f"dola: layers={self.layers!r} are none of this decoder's {depth}")
        return found

    def combine(self, logits: Tensor, others: Tensor) -> Tensor:
        """Scores from the logits of the last layer and those of the candidates. [B, V], [n, B, V] -> [B, V]"""
        choice = self.choice(logits, others)
        chosen = others[choice, torch.arange(len(choice), device=choice.device)]
        return contrast(logits, chosen, self.relative_top)

    def choice(self, logits: Tensor, premature: Tensor) -> Tensor:
        """Which candidate each row is contrasted with. [B, V], [n, B, V] -> int64 [B]"""
        found = divergences(logits, premature)
        if self.parity == "official":
            found = found.mean(1, keepdim=True).expand_as(found)
        return found.argmax(0)

    def what(self, layers: Sequence[int], depth: int) -> str:
        """Which layers."""
        return f"contrasts layer {depth} with one of {'/'.join(map(str, layers))}"
