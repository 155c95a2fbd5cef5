"""Adapter: the base of every method.

Shape letters, used everywhere in the package: B batch, L sequence, N visual tokens, H heads, D width, d head width,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from vlmfast.decoders import Decoder, Parts, Sizes
    from vlmfast.families import Family
    from vlmfast.patching import Patch
    from vlmfast.towers import Picture


# The doors into a model, in the order of effect: before the language model, between its layers, in their attention, in
# their hidden states, in what is generated.
INPUTS, LAYERS, ATTENTION, MODULES, GENERATION = range(5)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One method with its settings: frozen, so that no state of one prompt can leak into the next.

    A method is a frozen dataclass whose fields are its settings (defaults: the paper's) and which implements
    `attach`. Run-time state belongs to what `attach` installs and goes when the patch goes.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    door: ClassVar[int] = INPUTS  # methods take effect in this order
    drops: ClassVar[bool] = False  # may drop visual tokens
    foreseeable: ClassVar[bool] = True  # what stays of a picture depends on its size alone
    beams: ClassVar[int] = 1  # `num_beams` for those who generate and have no wish of their own
    needs_file: ClassVar[bool] = False  # a file made for a model first (`needs` names its setting), or another model

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Settings and their defaults, in the order of definition."""
        return {field.name: field.default for field in dataclasses.fields(cls)}

    @classmethod
    def unsupported(cls, family: Family) -> str | None:
        """Why the method cannot work on a family, under no setting; None where it can."""
        return None

    @classmethod
    def needs(cls, family: Family) -> dict[str, Any]:
        """Settings without which the method does not run on a family, for example a fallback; usually none."""
        return {}

    def check(self, family: Family) -> None:
        """Raise NotImplementedError where the method cannot work on the family."""
        reason = self.unsupported(family)
        if reason is not None:
            raise NotImplementedError(f"{self.name} does not work on {family.name}: {reason}")

    @property
    def prefills_in_parts(self) -> bool:
        """Whether prompts may be prefilled in two parts, cut anywhere behind their pictures, with the same result.

        Then nothing that the method does to the first part, or reads of it, depends on where it ends or what follows.
        """
        return False

    def visual_per_layer(self, picture: Picture, depth: int) -> Sequence[int]:
        """What each of `depth` decoder layers holds of a picture that reaches the method in this size.

        For the cost model alone, so that `flops=` can be solved: whole tokens, exactly what the method would do, newly
        made tokens included. A method that works between decoder layers is given what those before the language model
        leave (`picture.span` tokens).
        """
        return [picture.span] * depth

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """What the method multiplies itself for one picture, in X2 (see `vlmfast.cost`), the tower's statistics apart.

        Rows of the attention taken again in a decoder layer are `model.decoder.layers[i].statistic(rows, keys)`. text:
        text tokens of the prompt.
        """
        return 0

    def step_flops(self, picture: Picture, text: int, model: Sizes, step: int) -> int:
        """What the method multiplies itself for one further token, behind `step` generated ones, in X2.

        As for `selection_flops`: further rows through the decoder, the head on other hidden states. What it reweights
        in the one row of a step is left out. A method with beams of its own tells of all of them.
        """
        return 0

    def visual_parts(self, decoder: Decoder) -> Mapping[int, Parts]:
        """By decoder layer, what visual tokens of prompts go through, where that is not everything.

        For the cost model, exactly what the method would do; what layers hold is told by `visual_per_layer`.
        """
        return {}

    def attach(self, patch: Patch) -> None:
        """Install the method on `patch.model`; every change goes through `patch`, which can undo it."""
        raise NotImplementedError(f"{type(self).__name__} does not implement attach")
