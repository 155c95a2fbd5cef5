"""ZeroTuning: more or less attention on the initial token.

Paper: ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models Without Training (Han et al.,
    ICLR 2026), arXiv:2505.11739
Code:  https://github.com/FeijiangHan/ZeroTuning (51df35b)

    a_0' = gamma a_0 / D,   a_i' = a_i / D,   D = 1 + (gamma - 1) a_0

in all rows of the chosen layers and heads, prefill and decoding: the same as a bias of ln(gamma) on the first token's
score. Shapes: mass of the first token [B, H, Q] -> two factors [B, H, Q]. Default: gamma=2, all layers, all heads. The
paper finds gamma > 1 good for classification and gamma < 1 for question answering, on text models; gamma and heads are
found on a small labelled set (`vlmfast heads`).

Differs from the official code: the first token is each row's own first that is no padding (the code takes column 0, in
a left-padded batch a masked one); rows that see nothing else stay as they are where gamma is 0 (the code divides 0 by
0). `parity="official"` brings both back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.adapters.attention.base import HeadEdit
from vlmfast.decoders import Sizes
from vlmfast.edits import Call
from vlmfast.towers import Picture


@dataclass(frozen=True, kw_only=True)
class ZeroTuning(HeadEdit):
    """Scale the attention on the prompt's first token, and renormalise.

    gamma: the factor; 1 changes nothing. start, end: scale tokens start to end - 1 of the prompt instead, counted from
    its first one (0, 0: the first token).
    """

    name: ClassVar[str] = "zerotuning"
    summary: ClassVar[str] = "more or less attention on the initial token, renormalised"
    paper: ClassVar[str] = "arXiv:2505.11739"
    needs_visual: ClassVar[bool] = False

    gamma: float = 2.0
    start: int = 0
    end: int = 0
    parity: str = "repaired"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, (int, float)) or not 0 <= self.gamma < 1e6:
            raise ValueError(f"gamma={self.gamma!r}: a number from 0 on; 1 changes nothing")
        whole = all(isinstance(place, int) for place in (self.start, self.end))
        if not whole or not (self.start == self.end == 0 or 0 <= self.start < self.end):
            raise ValueError(f"start={self.start!r}, end={self.end!r}: tokens start to end - 1 of the prompt")

    @property
    def neutral(self) -> bool:
        """gamma of 1."""
        return self.gamma == 1

    def factors(self, mass: Tensor) -> tuple[Tensor, Tensor]:
        """(factor of the initial token, factor of the others) for its mass. [...] -> [...] each"""
        total = 1 + (self.gamma - 1) * mass
        if self.parity == "official":
            return self.gamma / total, 1 / total
        alone = total <= 1e-6  # gamma is 0 and the row sees nothing else
        total = total.masked_fill(alone, 1.0)
        return torch.where(alone, 1.0, self.gamma / total), 1 / total

    def exact(self, masses: Tensor) -> Tensor:
        """Factors of (the initial token, the others) for their masses. [..., 2] -> [..., 2]"""
        total = self.gamma * masses[..., 0] + masses[..., 1]
        alone = total == 0  # gamma is 0 and the row sees nothing else
        if self.parity != "official":
            total = total.masked_fill(alone, 1.0)
        found = torch.stack([self.gamma / total, 1 / total], dim=-1)
        return found if self.parity == "official" else found.masked_fill(alone[..., None], 1.0)

    def scaled(self, call: Call) -> Tensor:
        """Which keys are scaled. bool [B, 1, K]"""
        columns = torch.arange(call.key.shape[2], device=call.key.device)
        first = torch.zeros_like(call.initial) if self.parity == "official" else call.initial
        begin, stop = (0, 1) if self.start == self.end else (self.start, self.end)
        place = columns - first[:, None]
        return ((place >= begin) & (place < stop) & (first >= 0)[:, None])[:, None]

    def edit(self, call: Call) -> Tensor:
        """All rows, corrected by the scaled keys."""
        return call.correct(self.scaled(call), self.factors, self.picked(call), exact=self.exact)

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """The scaled keys' scores and values, again, in every row."""
        rows, keys = picture.span + text, max(1, self.end - self.start)
        return 2 * self.statistic(model, rows, keys)
