"""ONLY: logits that one layer's attention to the text alone would give, for or against the model's own.

Paper: ONLY: One-Layer Intervention Sufficiently Mitigates Hallucinations in Large Vision-Language Models (Wan et al.,
    ICCV 2025), arXiv:2507.00898
Code:  https://github.com/zifuwan/ONLY (109bffe)

In one early layer, for the row that decides on a token, A [H, K] after the softmax, T text keys behind the first
token, I visual keys:

    A_j = 0 where A_j > mean + std               over T, and over I, by themselves (unbiased std), head by head
    r_h = H(A_T / sum A_T) / H(A_I / sum A_I)    entropies; heads with r_h < mean r are dropped
    c   = o_proj(A V)                            which skips all layers up to the last one:
    u   = norm_in(c) + 0.2 h,  u' = u + mlp(norm_mlp(u)),  z' = head(norm(u'))     h: input of the last layer
    s   = z + alpha_pos z'                       where sum |p - p'| < gamma: both say the same
          (1 + alpha_neg) z - alpha_neg z'       elsewhere
    tokens with p < beta max p are out

Shapes: scores [B, H, 1, K], z and z' [B, V]. Defaults: alpha_pos=3, alpha_neg=1, beta=0.1, gamma=0.2 (POPE; the
authors take 0.25 for captions), the first layer that sees the whole prompt.

Differs from the official code: visual tokens are those of each row (there columns 35 to 610 of one prompt), heads are
chosen and distributions compared row by row (`parity="official"`: the differences of all rows are summed up), rows
that see no picture decode plainly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmfast.adapters.decoding.base import Decoding, number
from vlmfast.decoders import Attention, Sizes
from vlmfast.edits import attending_layers
from vlmfast.layers.cache import window_of
from vlmfast.patching import Patch
from vlmfast.ranges import which
from vlmfast.sidepath import SidePath
from vlmfast.towers import Picture

MAIN = 0.2  # share of the last layer's input that the side path is given
TINY = 1e-6


def damped(shown: Tensor, keys: Tensor) -> Tensor:
    """Probabilities of some keys, those far above their mean set to zero. [B, H, R, K], bool [B, 1, 1, K]"""
    count = keys.sum(-1, keepdim=True)
    own = shown * keys
    mean = own.sum(-1, keepdim=True) / count
    std = (((own - mean) * keys).square().sum(-1, keepdim=True) / (count - 1)).sqrt()
    return own.masked_fill(own > mean + std, 0.0)


def entropy(weights: Tensor, nothing: float) -> Tensor:
    """Entropy of weights that need not add up to one, `nothing` where there are none. [..., K] -> [...]"""
    shares = weights / weights.sum(-1, keepdim=True)
    return (-(shares * (shares + TINY).log()).sum(-1)).nan_to_num(nan=nothing)


def textual(shown: Tensor, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The map that looks at the text. [B, H, R, K] -> the map, [B, H] ratio of entropies, bool [B, H] heads dropped

    text, image: bool [B, 1, 1, K], disjoint; the last row decides on the heads.
    """
    of_text, of_image = damped(shown, text), damped(shown, image)
    ratio = entropy(of_text[:, :, -1], 0.0) / entropy(of_image[:, :, -1], math.inf)
    dropped = ratio < ratio.mean(1, keepdim=True)
    edited = torch.where(text, of_text, torch.where(image, of_image, shown))
    return edited.masked_fill(dropped[:, :, None, None], 0.0), ratio, dropped


@dataclass(frozen=True, kw_only=True)
class ONLY(Decoding):
    """Add the logits of a text-minded side path where it agrees with the model, contrast with them where not.

    alpha_pos, alpha_neg: weights of the side path where it agrees and where it does not. gamma: up to which sum of
    differences of probabilities (at most 2) it agrees. beta: tokens less likely than this share of the likeliest are
    out. layer: whose attention is changed, a number or "first": the first one that sees the whole prompt.
    """

    name: ClassVar[str] = "only"
    summary: ClassVar[str] = "with or against what one layer's attention to the text alone would say"
    paper: ClassVar[str] = "arXiv:2507.00898"

    alpha_pos: float = 3.0
    alpha_neg: float = 1.0
    beta: float = 0.1
    gamma: float = 0.2
    layer: str | int = "first"
    parity: str = "repaired"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha_pos", "alpha_neg"):
            if not number(getattr(self, name), 0, 1e3):
                raise ValueError(f"{name}={getattr(self, name)!r}: a number from 0 on, the weight of the side path")
        if not number(self.beta, 0, 1):
            raise ValueError(f"beta={self.beta!r}: a share from 0 to 1 of the likeliest token's probability")
        if not number(self.gamma, 0, 2):
            raise ValueError(f"gamma={self.gamma!r}: a sum of differences of probabilities, from 0 to 2")
        if self.layer != "first" and (isinstance(self.layer, bool) or not isinstance(self.layer, int)):
            raise ValueError(f"layer={self.layer!r}: a number, or 'first': the first that sees the whole prompt")

    @property
    def neutral(self) -> bool:
        """The side path counts for nothing, and nothing is ruled out."""
        return self.alpha_pos == self.alpha_neg == self.beta == 0

    def where(self, config: Any, attends: Sequence[int], depth: int) -> int:
        """The layer whose attention is changed. config: the decoder's. Raises ValueError for one without attention."""
        if self.layer == "first":
            whole = [layer for layer in attends if window_of(config, layer) is None]
            return (whole or attends)[0]
        (layer,), _ = which(self.layer, depth, "layer")
        if layer not in attends:
            raise ValueError(f"only: layer={self.layer!r} has no attention; {'/'.join(map(str, attends))} have")
        return layer

    def difference(self, logits: Tensor, side: Tensor) -> Tensor:
        """Sum of differences of probabilities. [B, V] each -> [B, 1]"""
        found = (logits.softmax(-1) - side.softmax(-1)).abs().sum(-1, keepdim=True)
        return found.sum().expand_as(found) if self.parity == "official" else found

    def combine(self, logits: Tensor, side: Tensor) -> Tensor:
        """Scores from the model's logits and those of the side path. [B, V] each"""
        against = (1 + self.alpha_neg) * logits - self.alpha_neg * side
        with_it = logits + self.alpha_pos * side
        scores = torch.where(self.difference(logits, side) < self.gamma, with_it, against)
        if not self.beta:
            return scores
        return scores.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(self.beta), -torch.inf)

    def aside(self, shown: Tensor, text: Tensor, image: Tensor) -> Tensor:
        """The map that looks at the text. [B, H, 1, K]"""
        return textual(shown, text, image)[0]

    def install(self, patch: Patch) -> None:
        """Door 4, and a look at one row of one layer's attention."""
        decoder = patch.base.get_decoder()
        SidePath(patch, self, self.where(decoder.config, attending_layers(decoder), len(decoder.layers)), MAIN)

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """One row again in one layer, and one token through a feed-forward net and the head."""
        return self.step_flops(picture, text, model, 0)

    def step_flops(self, picture: Picture, text: int, model: Sizes, step: int) -> int:
        """The same for every token."""
        if self.neutral:
            return 0
        decoder = model.decoder
        attends = [n for n, layer in enumerate(decoder.layers) if isinstance(layer.mixer, Attention)]
        whole = [n for n in attends if getattr(decoder.layers[n].mixer, "window", None) is None]
        number = (whole or attends)[0] if self.layer == "first" else which(self.layer, len(decoder.layers))[0][0]
        layer, last = decoder.layers[number], decoder.layers[-1]
        assert isinstance(layer.mixer, Attention)
        row = 2 * layer.statistic(1, picture.span + text + step) + 2 * layer.width * layer.mixer.query
        return int(row + 2 * last.width * (3 * last.ff + last.router) + decoder.head)
