"""SEAL: a chain of thought steered away from doubts and detours, at the tokens that end a thought.

Paper: SEAL: Steerable Reasoning Calibration of Large Language Models for Free (Chen et al., COLM 2025),
    arXiv:2504.07986
Code:  https://github.com/VITA-Group/SEAL, not obtainable: derived from the paper's abstract, a replication (EasySteer
    at 312c6d8) and lists of words copied by others

    v = mean of h_l over boundaries that an execution follows - mean over those that a reflection or transition follows
    h_l := h_l + coef v  at every token of the answer that contains a blank line

h_l [D] is what leaves decoder layer l; a boundary is a token that contains a blank line. Which thoughts are which, and
how a vector is made: vlmfast.steering. Defaults: coef=1, the layer that the vector was made at (the paper: 20 of the
28 of R1-Distill-Qwen-7B).

It edits no attention but hidden states, behind all methods that do. It was made for chains of thought of text models:
no figures exist for models that see, and one that writes no blank lines is not changed at all.

Differs from the authors' code, as far as that is known: words are looked for in any case; the prompt's last token is
steered too where it contains a blank line ("whenever the last input token is one"). The authors' coefficient and the
way they average are not certain: means here run over all thoughts of all traces, reflections and transitions together.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

from vlmfast.adapter import MODULES, Adapter
from vlmfast.families import Family
from vlmfast.patching import Patch
from vlmfast.steering import HOW, Steering, SteeringVector


@dataclass(frozen=True, kw_only=True)
class SEAL(Adapter):
    """Add a steering vector where a thought ends.

    vector: a file that `vlmfast.steering.extract` made. coef: how much of it; 0 changes nothing. layer: behind which
    decoder layer, negative: from the end; None: the one that the file names.
    """

    name: ClassVar[str] = "seal"
    kind: ClassVar[str] = "steering"
    summary: ClassVar[str] = "a vector added where a thought ends: fewer doubts and detours in chains of thought"
    paper: ClassVar[str] = "arXiv:2504.07986"
    door: ClassVar[int] = MODULES
    needs_file: ClassVar[bool] = True

    vector: str | None = None
    coef: float = 1.0
    layer: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.coef, bool) or not isinstance(self.coef, (int, float)) or not isfinite(self.coef):
            raise ValueError(f"coef={self.coef!r}: a number; 0 changes nothing")
        if self.layer is not None and (isinstance(self.layer, bool) or not isinstance(self.layer, int)):
            raise ValueError(f"layer={self.layer!r}: the number of a decoder layer, or None for the file's own")

    @classmethod
    def needs(cls, family: Family) -> dict[str, Any]:
        """A file with a vector of this very model."""
        return {"vector": "FILE"}

    def attach(self, patch: Patch) -> None:
        """Install the hook. Raises ValueError without a file, or with one that does not fit the model."""
        if self.vector is None:
            raise ValueError(f"seal needs vector=FILE, a steering vector of this model: {HOW}")
        steering = SteeringVector.load(self.vector)
        text = patch.model.config.get_text_config()
        if steering.vector.shape != (text.hidden_size,):
            raise ValueError(
                f"{self.vector}: a vector of width {steering.vector.numel()} for hidden states of width "
                f"{text.hidden_size}: it was made with another model{f' ({steering.model})' * bool(steering.model)}"
            )
        depth, layer = text.num_hidden_layers, steering.layer if self.layer is None else self.layer
        if not -depth <= layer < depth:
            raise ValueError(f"seal: layer={layer}: this decoder has layers 0 to {depth - 1}")
        if self.coef:
            Steering(patch, self.name, steering, layer % depth, self.coef)
