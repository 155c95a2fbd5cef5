"""VISTA: hidden states steered to where the picture pulls them, and logits that layers before the last agree on.

Paper: The Hidden Life of Tokens: Reducing Hallucination of Large Vision-Language Models via Visual Information
    Steering (Li et al., ICML 2025), arXiv:2502.03628
Code:  https://github.com/LzVv123456/VISTA (dc62252)

    v  = h(prompt) - h(prompt without pictures)            behind a layer, where the prompt ends
    x' = |x| n(n(x) + lam (1 + max(0, cos(x, -v))) n(v))   x: output of the layer's feed-forward net, n(x) = x / |x|
    z' = (1 - gamma) z + gamma mean_l head(h_l)            l: layers near the end, without the final norm

The first two lines hold in every position of the prompt and behind it (visual steering vector), the last one for the
token decided on (self-logits augmentation). Shapes: x [B, L, D], v [B, D], z [B, V]. Defaults: lam=0.17 (the authors'
for captions of LLaVA-1.5; 0.01 for POPE), gamma=0.3, layers 25 to 30 of 32, scaled to the decoder's depth.

The directions cost two more forwards of the decoder a prompt, one of them without pictures; decoding costs no forward.

Differs from the official code: any batch (there, of one); rows without a picture are not steered; v is the difference
itself, the last layer's before the final norm (there, a principal component of this one vector is added, which is
noise); steering keeps the model's precision (there, half). The head is applied once, to the layers' mean, which is the
same for a linear one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmfast.adapters.decoding.base import Decoding, number
from vlmfast.decoders import Sizes
from vlmfast.directions import DirectionsDoor
from vlmfast.patching import Patch
from vlmfast.ranges import DEEP, scaled, which
from vlmfast.steps import Step, StepsDoor
from vlmfast.towers import Picture

FIRST, LAST = 25, 30  # of 32 layers, from 0 on
NOTHING = 1e-12  # no length


def steered(hidden: Tensor, directions: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Hidden states turned towards some directions, their length as before, fp32. [B, L, D], [B or 1, D] each

    directions: of length one, or zero for none.
    """
    hidden = hidden.float()
    length = hidden.norm(dim=-1, keepdim=True)
    turned = unit = hidden / length.clamp(min=NOTHING)
    for direction, weight in zip(directions, weights):
        towards = direction[:, None]  # the cosine counts where it points away
        turned = turned + (weight / len(directions)) * (1 + (unit * -towards).sum(-1, keepdim=True).relu()) * towards
    return turned * (length / turned.norm(dim=-1, keepdim=True).clamp(min=NOTHING))


@dataclass(frozen=True, kw_only=True)
class VISTA(Decoding):
    """Steer hidden states towards what the picture adds to them, and mix in the logits of late layers.

    lam: strength of the steering, 0: none. layers: which are steered. gamma: share of the late layers' logits, 0:
    none. logits_layers: "late" (25 to 30 of 32, scaled). Both: "all", numbers and ranges joined by slashes, 0: the
    first layer.
    """

    name: ClassVar[str] = "vista"
    summary: ClassVar[str] = "steers hidden states to where the picture pulls them; mixes in late layers' logits"
    paper: ClassVar[str] = "arXiv:2502.03628"

    lam: float = 0.17
    layers: str | int = "all"
    gamma: float = 0.3
    logits_layers: str | int = "late"

    def __post_init__(self) -> None:
        super().__post_init__()
        which(self.layers, DEEP)
        if self.logits_layers != "late":
            which(self.logits_layers, DEEP, "logits_layers")
        if not number(self.lam, 0, 1e3):
            raise ValueError(f"lam={self.lam!r}: a number from 0 on, the strength of the steering")
        if not number(self.gamma, 0, 1):
            raise ValueError(f"gamma={self.gamma!r}: a share from 0 to 1 of the late layers' logits")

    @property
    def neutral(self) -> bool:
        """Neither steering nor late layers."""
        return self.lam == self.gamma == 0

    def late(self, depth: int) -> tuple[int, ...]:
        """The layers whose logits are mixed in, from 0 on; none where they count for nothing."""
        if not self.gamma:
            return ()
        if self.logits_layers == "late":
            last = max(min(scaled(LAST, depth), depth - 2), 0)
            return tuple(range(min(scaled(FIRST, depth), last), last + 1))
        return self._named(self.logits_layers, depth, "logits_layers")

    def _named(self, text: str | int, depth: int, setting: str) -> tuple[int, ...]:
        found, _ = which(text, depth, setting)
        if not found:
            raise ValueError(f"vista: {setting}={text!r} are none of this decoder's {depth}")
        return found

    def turn(self, hidden: Tensor, direction: Tensor) -> Tensor:
        """The output of a feed-forward net, steered. [B, L, D], [B, D]"""
        return steered(hidden, [direction], [self.lam])

    def asks(self, step: Step) -> Tensor:
        """The late layers' mean. [1, B, D]"""
        hidden = step.hidden()
        return hidden.float().mean(0, keepdim=True).to(hidden.dtype)

    def combine(self, logits: Tensor, others: Tensor) -> Tensor:
        """The logits, with those of the late layers. [B, V], [1, B, V] -> [B, V]"""
        return (1 - self.gamma) * logits + self.gamma * others[0]

    def install(self, patch: Patch) -> None:
        """Door 4 and, for the steering, hooks on the feed-forward nets. Raises ValueError for layers there are not."""
        depth = len(patch.base.get_decoder().layers)
        late, layers = self.late(depth), self._named(self.layers, depth, "layers")
        parts = ["steers hidden states towards what pictures add to them"] if self.lam else []
        parts += [f"mixes in logits of layers {'/'.join(map(str, late))} of {depth}"] if late else []
        behind = [layer + 1 for layer in late]
        asks, scores = (self.asks, self.combine) if late else (None, None)
        steps = StepsDoor(patch, self.name, behind, asks, scores, "; ".join(parts), whole=self.lam > 0)
        if self.lam:
            DirectionsDoor(patch, steps, layers, self.turn)

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """The prompt once more, its text alone, and the head once more."""
        decoder = model.decoder
        total = self.step_flops(picture, text, model, 0)
        if self.lam:
            lengths = (picture.span + text, text)
            total += sum(int(layer.flops(length, length)) for layer in decoder.layers for length in lengths)
        return total

    def step_flops(self, picture: Picture, text: int, model: Sizes, step: int) -> int:
        """The head once more."""
        return model.decoder.head * (self.gamma > 0)
