"""M3ID: away from what is said without the picture, the more the longer the answer gets.

Paper: Multi-Modal Hallucination Control by Visual Information Grounding (Favero et al., CVPR 2024), arXiv:2403.14003
Code:  https://github.com/zifuwan/ONLY (109bffe), its implementation as a baseline; the authors published none

    f = z + (z - u) (1 - g) / g,   g = exp(-rate t)      z, u [V]: logits with the pictures and without them
    tokens with z < ln(beta) + max z are out             t: tokens generated until now, from 0

The first token is thus chosen by z alone. Defaults: rate=0.02, beta=0.1.

Differs from that code: nothing in what is computed; the weight (1 - g) / g stays below a million, which it reaches
after 690 tokens, where z alone is far below the rounding of f. The paper gates the second term by how sure the model
is, which that code leaves out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfast.adapters.decoding.base import Decoding, number
from vlmfast.branches import BranchDoor, ImageFreeBranch, Prompts, Start, plausible
from vlmfast.decoders import Sizes
from vlmfast.patching import Patch
from vlmfast.towers import Picture

HEAVIEST = 1e6  # weight of the difference


@dataclass(frozen=True)
class FadingBranch:
    """The branch without pictures."""

    method: M3ID
    name: str = "m3id"
    what: str = "contrasted with the same text without its pictures, ever more"

    def start(self, prompts: Prompts) -> Start:
        """The text."""
        return ImageFreeBranch(self.name, 1.0).start(prompts)

    def combine(self, logits: Tensor, branch: Tensor, step: int) -> Tensor:
        """As the method has it. [R, V]"""
        return self.method.combine(logits, branch, step)


@dataclass(frozen=True, kw_only=True)
class M3ID(Decoding):
    """Contrast the logits with those of the same text without its pictures, ever more.

    rate: how fast the picture is forgotten, a token; 0: no contrast. beta: tokens less likely than this share of the
    likeliest are out; 0: none.
    """

    name: ClassVar[str] = "m3id"
    summary: ClassVar[str] = "contrast with the same text without its pictures, stronger token by token"
    paper: ClassVar[str] = "arXiv:2403.14003"

    rate: float = 0.02
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not number(self.rate, 0, 100):
            raise ValueError(f"rate={self.rate!r}: a number from 0 to 100, how fast the picture is forgotten")
        if not number(self.beta, 0, 1):
            raise ValueError(f"beta={self.beta!r}: a share from 0 to 1 of the likeliest token's probability")

    @property
    def neutral(self) -> bool:
        """No contrast, and nothing ruled out."""
        return self.rate == self.beta == 0

    def combine(self, logits: Tensor, branch: Tensor, step: int) -> Tensor:
        """Scores from the logits with pictures and without. [B, V] each; step: tokens generated until now"""
        weight = min(math.expm1(min(self.rate * step, 700.0)), HEAVIEST)
        return plausible(logits + (logits - branch) * weight, logits, self.beta)

    def install(self, patch: Patch) -> None:
        """Door 4."""
        BranchDoor(patch, FadingBranch(self))

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """The text through the decoder."""
        return 0 if self.neutral else ImageFreeBranch(self.name, 1.0).prefill_flops(text, model)

    def step_flops(self, picture: Picture, text: int, model: Sizes, step: int) -> int:
        """The branch's token."""
        return 0 if self.neutral else int(model.decoder.token(text + step))
