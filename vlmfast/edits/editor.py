"""Door 3, edits: what the door needs of the methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from vlmfast.edits.call import Call
from vlmfast.layers.tokens import Placed


class Editor(Protocol):
    """What the door needs of a method that edits attention.

    One with `prompts_alone = True` is not asked about generated tokens.
    """

    @property
    def name(self) -> str:
        """As in its spec."""
        ...

    def where(self, attends: Sequence[int], depth: int) -> Sequence[int]:
        """Which layers to edit, of those that attend (others hold one state of all tokens). ValueError for others."""
        ...

    @property
    def needs_visual(self) -> bool:
        """Whether it must know which tokens are visual."""
        ...

    @property
    def compares(self) -> bool:
        """Whether it compares prompts with the same ones without their pictures (`Call.free`)."""
        ...

    def edit(self, call: Call) -> Tensor:
        """The attention of one call, edited. -> [B, H, Q, d]"""
        ...

    def marks(self, picture: Placed) -> Mapping[str, Tensor]:
        """What it wants to know of each token of a picture: values [n] by name.

        A method with `wanted(tower)`, as methods that prune have it, finds these statistics of the vision tower in
        `picture.visual.scores`.
        """
        ...


class Watcher(Protocol):
    """What the door needs of a method that looks at attention and changes nothing."""

    @property
    def active(self) -> bool:
        """Whether it wants to see the forward that runs."""
        ...

    def watch(self, call: Call) -> None:
        """See one call, as it is before another method edits it."""
        ...


@runtime_checkable
class Summing(Protocol):
    """A method that sums up what its calls noted, layer by layer, before it is reported."""

    def remarks(self, notes: Sequence[str]) -> Sequence[str]:
        """Lines of the report. notes: what the calls of the last prompts noted, each once, in order."""
        ...
