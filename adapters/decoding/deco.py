"""DeCo: the likely tokens once more, with what the early layer says that is surest of one of them.

Paper: MLLM Can See? Dynamic Correction Decoding for Hallucination Mitigation (Wang et al., ICLR 2025),
    arXiv:2410.11779
Code:  https://github.com/zjunlp/Deco (fee8d75)

    C    = the likeliest tokens: as few as hold top_p of the probability, at most top_k
    z_l  = head(norm(h_l)),  p_l = softmax(z_l)           h_l behind l layers
    l*   = the layer with the largest p_l(y), y in C;  m = that probability
    s(y) = z(y) + alpha m z_l*(y)                         for y in C; the others are out

for the token decided on. Shapes: early logits [n, B, V], logits [B, V] -> scores [B, V]. Defaults: alpha=0.6,
top_p=0.9, top_k=20, behind layers 20 to 28 of 32, scaled to the decoder's depth.

Differs from the official code: every row decides for itself in greedy search as well (the code squeezes a batch of
one), and stateful logits processors run once a step (there, twice).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.adapters.decoding.base import StepDecoding, number
from vlmfast.ranges import DEEP, scaled, which
from vlmfast.steps import Step

FIRST, LAST = 20, 28  # of 32 layers


def candidates(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """Which tokens are likely enough. [B, V] -> bool [B, V]"""
    width = min(top_k, logits.shape[-1]) if top_k else logits.shape[-1]
    probabilities, order = logits.softmax(-1).topk(width, dim=-1)
    # The first one that reaches top_p is the last that belongs to them.
    before = torch.nn.functional.pad(probabilities.cumsum(-1)[:, :-1], (1, 0))
    inside = (before < top_p) | (top_p == 1)
    inside[:, 0] = True
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, order, inside)


def correct(logits: Tensor, early: Tensor, likely: Tensor, alpha: float) -> Tensor:
    """The likely tokens' logits and those of the surest early layer, weighted by how sure it is; -inf elsewhere.

    logits: [B, V]; early: [n, B, V]; likely: bool [B, V] -> [B, V]
    """
    sure = early.softmax(-1).masked_fill_(~likely, -1.0).amax(-1)  # [n, B]
    most, layer = sure.max(0)
    surest = early[layer, torch.arange(len(layer), device=layer.device)]
    return (logits + alpha * most[:, None] * surest).masked_fill(~likely, -torch.inf)


@dataclass(frozen=True, kw_only=True)
class DeCo(StepDecoding):
    """Correct the likely tokens' logits by the early layer that is surest of one of them.

    alpha: weight of the early layer; 0: none. top_p, top_k: tokens behind these are out; top_p=1 and top_k=0: none.
    layers: "late" (20 to 28 of 32, scaled), or numbers and ranges joined by slashes: behind so many layers.
    """

    name: ClassVar[str] = "deco"
    summary: ClassVar[str] = "corrects likely tokens by the early layer that is surest of one"
    paper: ClassVar[str] = "arXiv:2410.11779"

    alpha: float = 0.6
    top_p: float = 0.9
    top_k: int = 20
    layers: str | int = "late"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers != "late":
            which(self.layers, DEEP)
        if not number(self.alpha, 0, 1e3):
            raise ValueError(f"alpha={self.alpha!r}: a number from 0 on, the weight of the early layer")
        if not number(self.top_p, 0, 1):
            raise ValueError(f"top_p={self.top_p!r}: a probability; 1 rules nothing out")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k!r}: a number of tokens; 0 rules nothing out")

    @property
    def neutral(self) -> bool:
        """No correction, and nothing ruled out."""
        return self.alpha == 0 and self.top_p == 1 and self.top_k == 0

    def reads(self, depth: int, tied: bool) -> Sequence[int]:
        """The early layers."""
        if self.layers == "late":
            return range(scaled(FIRST, depth), min(scaled(LAST, depth), depth - 1) + 1)
        found, _ = which(self.layers, depth)
        if not found:
            raise ValueError(f"deco: layers={self.layers!r} are none of this decoder's {depth}")
        return found

    def asks(self, step: Step) -> Tensor:
        """The early layers' hidden states behind the final norm. [n, B, D]"""
        return step.norm(step.hidden())

    def combine(self, logits: Tensor, others: Tensor) -> Tensor:
        """Scores from the model's logits and those of the early layers. [B, V], [n, B, V] -> [B, V]"""
        return correct(logits, others, candidates(logits, self.top_p, self.top_k), self.alpha)

    def what(self, layers: Sequence[int], depth: int) -> str:
        """Which layers."""
        return f"corrects likely tokens by the surest of layers {'/'.join(map(str, layers))} of {depth}"
