"""EE-MLLM's composite attention without training: visual tokens that do not attend to each other.

Paper: EE-MLLM: A Data-Efficient and Compute-Efficient Multimodal Large Language Model (Ma et al., 2024),
    arXiv:2408.11795
Code:  none is public

In the chosen decoder layers, for text T [L, D] and visual tokens I [N, D] behind the layer's first norm:

    Q = T Wq,   K, V = [I; T] Wk, [I; T] Wv                 scores of L rows over N + L keys, not (N + L)^2
    T' = T + Wo softmax(Q K^T / sqrt(d)) V                  as ever: text sees all that stands before it
    I' = I + Wo V_I            visual_update="self"         then the feed-forward net: each sees itself alone
    I' = I                     visual_update="ffn"          then the feed-forward net
    I' = I                     visual_update="none"         and nothing else: they leave the layer as they came

"self" equals a mask that leaves visual rows their diagonal alone. What is not needed is not computed (see
`vlmfast.composite`); decoding is plain. Default: all layers, "self". Without training answers suffer most in early
layers: rank them (`vlmfast.rank_layers`, `vlmfast rank-layers`) and take as many as the answers bear.

Differs from the paper: no training, layers are chosen. How visual tokens reach the next layer is told there as
reusing the weights of each layer, which leaves open which of them: hence the three ways. "none" is close in spirit to
ShortV (arXiv:2504.00502) and SAISA (arXiv:2502.02458), which freeze visual tokens in most layers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from vlmfast.adapter import ATTENTION, Adapter
from vlmfast.composite import UPDATES, CompositeDoor, checked, contradicts
from vlmfast.decoders import Attention, Decoder, Parts
from vlmfast.edits import EditsDoor
from vlmfast.families import Family
from vlmfast.patching import Patch
from vlmfast.ranges import DEEP, attending, which
from vlmfast.ranking import Ranking

NO_LAYERS = "none"


@dataclass(frozen=True, kw_only=True)
class EEMLLM(Adapter):
    """Let the visual tokens of prompts skip attention to each other in some decoder layers.

    layers: "all", numbers (negative: from the end) and ranges as Python slices them, joined by slashes; "none": no
    layer; or the path of a ranking (FILE.json, see `vlmfast.rank_layers`), of which the best `top` are taken, a number
    or a share of those ranked. visual_update: "self", "ffn" or "none", what visual tokens go through there.
    """

    name: ClassVar[str] = "eemllm"
    kind: ClassVar[str] = "fusion"
    summary: ClassVar[str] = "visual tokens skip attention to each other, and more, in some layers"
    paper: ClassVar[str] = "arXiv:2408.11795"
    door: ClassVar[int] = ATTENTION

    layers: str | int = "all"
    top: int | float | None = None
    visual_update: str = "self"

    def __post_init__(self) -> None:
        if self.layers is None or self.layers == "":
            object.__setattr__(self, "layers", NO_LAYERS)
        checked(self.visual_update)
        ranking = self.ranking
        if ranking is None:
            if self.top is not None:
                raise ValueError(f"top={self.top!r} takes the best of a ranking: layers=FILE.json (see rank_layers)")
            if not self.neutral:
                which(self.layers, DEEP)  # how it is written; what it means depends on the decoder
            return
        if self.top is None:
            total = len(ranking.order)
            raise ValueError(
                f"layers={self.layers!r} ranks {total} layers: say how many to take with top=N or a share"
            )
        ranking.best(self.top)
        if ranking.visual_update != self.visual_update:
            raise ValueError(
                f"layers={self.layers!r} were ranked with visual_update={ranking.visual_update}, not "
                f"{self.visual_update}: rank them again, or name layers"
            )

    @functools.cached_property
    def ranking(self) -> Ranking | None:
        """The ranking that `layers` names, as the file had it when this was made; None: layers are named."""
        return Ranking.load(str(self.layers)) if str(self.layers).endswith(".json") else None

    @property
    def neutral(self) -> bool:
        """No layer."""
        return self.layers == NO_LAYERS or (self.ranking is not None and not self.where_ranked())

    def where_ranked(self) -> tuple[int, ...]:
        """The layers of the ranking that are taken."""
        assert self.ranking is not None and self.top is not None
        return self.ranking.best(self.top)

    def where(self, attends: Sequence[int], depth: int) -> tuple[int, ...]:
        """The layers, of those that attend. Raises ValueError where there are none, or for another decoder's."""
        if self.neutral:
            return ()
        if self.ranking is None:
            return attending(self.layers, attends, depth, self.name)
        if self.ranking.depth != depth:
            raise ValueError(
                f"{self.name}: layers={self.layers!r} ranks a decoder of {self.ranking.depth} layers, this one has "
                f"{depth}"
            )
        return attending("/".join(map(str, self.where_ranked())), attends, depth, self.name)

    @property
    def prefills_in_parts(self) -> bool:
        """A visual token is moved on by what it carries itself, and text sees all that stands before it as ever."""
        return True

    @classmethod
    def unsupported(cls, family: Family) -> str | None:
        """Families whose decoders see pictures in both directions."""
        return contradicts(family)

    def visual_parts(self, decoder: Decoder) -> Mapping[int, Parts]:
        """What visual tokens go through in the chosen layers."""
        attends = [number for number, layer in enumerate(decoder.layers) if isinstance(layer.mixer, Attention)]
        return dict.fromkeys(self.where(attends, len(decoder.layers)), UPDATES[self.visual_update])

    def attach(self, patch: Patch) -> None:
        """Install composite attention; nothing where no layer is chosen."""
        if self.neutral:
            return
        edits = EditsDoor.of(patch)
        CompositeDoor(patch, self.name, self.where(edits.attends, edits.depth), self.visual_update)
