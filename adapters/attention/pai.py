"""PAI: more attention on the picture where a token is decided, and away from what is said without it.

Paper: Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs (Liu et al.,
    ECCV 2024), arXiv:2407.21771
Code:  https://github.com/LALBJ/PAI (9bbd8bd)

    s_j' = s_j + alpha |s_j|                     scores before the softmax, j: visual tokens (newlines among them)
    p(y) ~ gamma (log c - log u) + log u         c: with the pictures, u: the same text without them
    tokens with c(y) < plausibility max c        are out

The first line holds for the rows that decide on a token, the last of a prompt and each generated one, in all heads of
the chosen layers, and not in the image-free branch. The bias depends on the score itself, which is why these rows are
made explicitly: [B, H, 1, K]. Defaults: alpha=0.2, layers from the third on, gamma=1.1 (the authors' README; the paper
tunes alpha by model and has 0.5 for LLaVA), plausibility 0.1, which the code has fixed.

Differs from the official code: visual tokens are those of each row, of any number of pictures (the code takes one run
of columns from row 0); hidden keys stay hidden (a padded visual token could overflow there); the branch follows the
beams (its cache does not there), and what it gives is normalised, which beams alone can tell. With a branch the code
leaves the first generated token without the boost: a flag is set before the prefill (issue 22); `parity="official"`
does, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.adapters.attention.base import Boost
from vlmfast.edits import Call


def boosted(scores: Tensor, rise: Tensor) -> Tensor:
    """Scores that rise by a share of their size; hidden keys (-inf) stay hidden. [B, H, R, K], [B, 1, 1, K]"""
    return torch.where(scores.isfinite(), scores + rise * scores.abs(), scores)


@dataclass(frozen=True, kw_only=True)
class PAI(Boost):
    """Raise the scores of visual tokens in the rows that decide on a token, and contrast with the image-free prompt.

    alpha: share of its size that a score rises by; 0: none. gamma: strength of the contrast in `generate`; 1: none,
    and no second forward. plausibility: tokens less likely than this share of the likeliest are out (with a contrast).
    """

    name: ClassVar[str] = "pai"
    summary: ClassVar[str] = "raises scores of visual tokens where a token is decided; image-free contrast"
    paper: ClassVar[str] = "arXiv:2407.21771"

    layers: str | int = "2:"
    alpha: float = 0.2
    gamma: float = 1.1
    plausibility: float = 0.1
    parity: str = "repaired"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 <= self.alpha < 1e3:
            raise ValueError(f"alpha={self.alpha!r}: a number from 0 on, the share of its size that a score rises by")
        self.branch  # noqa: B018  checks its settings

    @property
    def edits(self) -> bool:
        """Whether any score rises."""
        return self.alpha != 0

    def edit(self, call: Call) -> Tensor:
        """The rows that decide on a token, where they can see a picture."""
        skipped = self.parity == "official" and self.gamma != 1 and call.prompt
        rows = call.ends & call.visual.any(1, keepdim=True)
        if skipped or not bool(rows.any()):
            return call.plain()
        rise = self.alpha * call.visual[:, None, None].float()
        return call.rescore(lambda scores: boosted(scores, rise), rows)
