"""VCD: away from what is said of the same picture under noise.

Paper: Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding (Leng et
    al., CVPR 2024), arXiv:2311.16922
Code:  https://github.com/DAMO-NLP-SG/VCD (d6568ff)

    beta_i = sigmoid(b_i) (5e-3 - 1e-5) + 1e-5       b: 1000 values from -6 to 6
    abar   = product of (1 - beta_i), i = 0..steps
    x'     = sqrt(abar) x + sqrt(1 - abar) eps       x: the normalised pixel values
    f      = (1 + alpha) z - alpha z'                z, z' [V]: logits with x and with x'
    tokens with z < ln(beta) + max z are out

Defaults: alpha=1, beta=0.1, steps=500 (the authors' evaluation; their code falls back on alpha=0.5, and takes beta=0.2
for LLaVA-1.5 on POPE). The noise of a picture is drawn from (seed, its pixels), so that the same picture has the same
noise in any batch.

`branch=fastervlm/keep=0.1` prunes the noisy picture, by its own statistics, before it enters the language model: the
branch costs less then (ours; there is no such paper).

Differs from the official code: greedy search and beams work, too (theirs always samples); z is what the other logits
processors left (theirs come behind the contrast), temperature, top-k and their like come behind as there; an image
that the tower takes twice over, as two frames of a video (Qwen-VL), has the same noise in both. In beam search z is
normalised, which moves f by a constant of the row and the cutoff not at all; scores are normalised behind it.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmfast.adapters.decoding.base import Decoding, number, pruner_of
from vlmfast.branch_pictures import PicturesDoor, Scene, branch_flops, kept_of
from vlmfast.branches import plausible
from vlmfast.decoders import Sizes
from vlmfast.patching import Patch
from vlmfast.towers import Picture


def shares(steps: int) -> tuple[float, float]:
    """Of the picture and of the noise after so many steps of diffusion: sqrt(abar), sqrt(1 - abar)."""
    betas = torch.linspace(-6, 6, 1000).sigmoid() * (5e-3 - 1e-5) + 1e-5
    left = float((1 - betas).cumprod(0)[steps])
    return math.sqrt(left), math.sqrt(1 - left)


def noisy(pixels: Tensor, noise: Tensor, steps: int) -> Tensor:
    """The picture under noise. Both of one shape"""
    picture, share = shares(steps)
    return picture * pixels + share * noise


def noise_of(pixels: Tensor, seed: int, frames: int = 1) -> Tensor:
    """Noise drawn from (seed, pixels), fp32.

    frames: of patches [n, C * frames * p * p] that all show the same, and have the same noise.
    """
    raw = pixels.detach().float().cpu().contiguous()
    draw = torch.Generator().manual_seed(zlib.crc32(raw.numpy().tobytes(), seed))
    noise = torch.randn(raw.shape, generator=draw)
    if frames > 1:
        colours = noise.view(len(noise), 3, frames, -1)
        noise = colours[:, :, :1].expand_as(colours).reshape(noise.shape)
    return noise


@dataclass(frozen=True)
class NoisyBranch:
    """The branch with noise over its pictures. frames: how often the tower takes one image."""

    method: VCD
    frames: int
    name: str = "vcd"

    @property
    def what(self) -> str:
        """Contrasted."""
        pruned = f", pruned by {self.method.branch}" if self.method.branch else ""
        return f"contrasted with the same prompt under noise{pruned}"

    def redraw(self, scene: Scene) -> Tensor:
        """The pixel values of the picture under noise."""
        pixels = scene.visual.pixels
        assert pixels is not None
        packed = pixels.ndim == 2 and scene.modality == "image"
        noise = noise_of(pixels, self.method.seed, self.frames if packed else 1)
        return noisy(pixels.float(), noise.to(pixels.device), self.method.steps).to(pixels.dtype)

    def combine(self, logits: Tensor, branch: Tensor, step: int = 0) -> Tensor:
        """As the method has it. [R, V]"""
        return self.method.combine(logits, branch)


@dataclass(frozen=True, kw_only=True)
class VCD(Decoding):
    """Contrast the logits with those of the same prompt whose pictures are noisy.

    alpha: strength; 0: none. beta: tokens less likely than this share of the likeliest are out; 0: none. steps: of
    diffusion, 0 (hardly any noise) to 999. seed: of the noise, beside the picture itself. branch: what prunes the
    noisy picture, its settings joined by slashes; None: what prunes the prompts, if anything does.
    """

    name: ClassVar[str] = "vcd"
    summary: ClassVar[str] = "contrast with the same prompt whose pictures are noisy"
    paper: ClassVar[str] = "arXiv:2311.16922"

    alpha: float = 1.0
    beta: float = 0.1
    steps: int = 500
    seed: int = 0
    branch: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not number(self.alpha, 0, 1e3):
            raise ValueError(f"alpha={self.alpha!r}: a number from 0 on, the strength of the contrast")
        if not number(self.beta, 0, 1):
            raise ValueError(f"beta={self.beta!r}: a share from 0 to 1 of the likeliest token's probability")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 0 <= self.steps < 1000:
            raise ValueError(f"steps={self.steps!r}: a whole number of steps of diffusion, from 0 to 999")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed!r}: an int from 0 to 2**32 - 1")
        pruner_of(self.branch)

    @property
    def neutral(self) -> bool:
        """No contrast, and nothing ruled out."""
        return self.alpha == self.beta == 0

    def combine(self, logits: Tensor, branch: Tensor) -> Tensor:
        """Scores from the logits of the picture and of the noisy one. [B, V] each"""
        return plausible((1 + self.alpha) * logits - self.alpha * branch, logits, self.beta)

    def install(self, patch: Patch) -> None:
        """Door 4."""
        frames = int(getattr(patch.model.config.vision_config, "temporal_patch_size", 1))
        pruner = pruner_of(self.branch)
        if pruner is not None:
            pruner.check(patch.family)
        PicturesDoor(patch, NoisyBranch(self, frames), pruner)

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """The tower again, and the prompt through the decoder again."""
        return 0 if self.neutral else branch_flops(picture, text, model, pruner_of(self.branch))

    def step_flops(self, picture: Picture, text: int, model: Sizes, step: int) -> int:
        """The branch's token."""
        if self.neutral:
            return 0
        return int(model.decoder.token(kept_of(picture, model, pruner_of(self.branch)) + text + step))
