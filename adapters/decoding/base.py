"""Decoding: the base of the methods that change what `generate` makes of the logits (door 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlmfast.adapter import GENERATION, Adapter
from vlmfast.branches import BranchDoor
from vlmfast.decoders import Sizes
from vlmfast.patching import HANDLE, Patch
from vlmfast.steps import Step, StepsDoor
from vlmfast.towers import Picture


def number(value: Any, low: float, high: float) -> bool:
    """Whether a setting is a number from `low` to `high`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def pruner_of(branch: Any) -> Any:
    """The pruning method of a branch: its name and settings joined by slashes, "fastervlm/keep=0.1"; None: none.

    Raises ValueError for anything but one method that prunes before the language model.
    """
    from vlmfast.adapters import ADAPTERS, from_spec
    from vlmfast.adapters.pruning.base import Pruner

    if branch is None:
        return None
    explain = "a method that prunes before the language model and its settings, as in fastervlm/keep=0.1"
    if not isinstance(branch, str):
        raise ValueError(f"branch={branch!r}: {explain}")
    name, *pieces = (piece.strip() for piece in branch.split("/"))
    if name not in ADAPTERS or not issubclass(ADAPTERS[name], Pruner):
        able = ", ".join(sorted(known for known, cls in ADAPTERS.items() if issubclass(cls, Pruner)))
        raise ValueError(f"branch={branch!r}: {explain}; there are {able}")
    return from_spec(f"{name}:{','.join(pieces)}")[0]


@dataclass(frozen=True, kw_only=True)
class Decoding(Adapter):
    """Change what `model.generate` returns, and nothing else: direct calls of the model are as without the method.

    A method implements `neutral` (settings under which it changes nothing: nothing is installed then) and `install`.
    One such method owns the logits of a model.
    """

    kind: ClassVar[str] = "decoding"
    door: ClassVar[int] = GENERATION

    def __post_init__(self) -> None:
        parity = getattr(self, "parity", "repaired")
        if parity not in ("repaired", "official"):
            raise ValueError(f"parity={parity!r}: choose 'repaired' or 'official'")

    @property
    def neutral(self) -> bool:
        """Whether these settings change nothing."""
        raise NotImplementedError(f"{type(self).__name__} does not implement neutral")

    def install(self, patch: Patch) -> None:
        """Install the method."""
        raise NotImplementedError(f"{type(self).__name__} does not implement install")

    def attach(self, patch: Patch) -> None:
        """Install the method where it changes something. Raises NotImplementedError beside another one of its kind."""
        if self.neutral:
            return
        handle = patch.model.__dict__[HANDLE]
        owners = [one.name for one in handle.adapters if one.door == GENERATION and not getattr(one, "neutral", False)]
        owners += [one.branch.name for one in handle.reporters if isinstance(one, BranchDoor)]
        if len(owners) > 1:
            raise NotImplementedError(f"{' and '.join(owners)} both decide on the generated tokens: choose one")
        self.install(patch)


@dataclass(frozen=True, kw_only=True)
class StepDecoding(Decoding):
    """Decide on every token from what the model's one forward computed (see `vlmfast.steps`).

    A method implements `reads`, `asks`, `combine` and `what`.
    """

    def reads(self, depth: int, tied: bool) -> Sequence[int]:
        """Behind which of `depth` layers it wants hidden states, 0: in front of the first. ValueError for others.

        tied: the head's weights are those of the input embeddings.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement reads")

    def asks(self, step: Step) -> Tensor:
        """What is to pass the model's head, of the hidden states that it wanted. [n, B, D]"""
        return step.hidden()

    def combine(self, logits: Tensor, others: Tensor) -> Tensor:
        """Scores of the next token, unnormalised; -inf: out. [B, V] of the model, [n, B, V] asked for -> [B, V]"""
        raise NotImplementedError(f"{type(self).__name__} does not implement combine")

    def what(self, layers: Sequence[int], depth: int) -> str:
        """What the method does, in the words of a report. layers: what it reads."""
        raise NotImplementedError(f"{type(self).__name__} does not implement what")

    def install(self, patch: Patch) -> None:
        """Door 4. Raises ValueError for layers that there are not."""
        text = patch.model.config.get_text_config()
        depth = text.num_hidden_layers
        layers = self.reads(depth, tied(patch.model))
        StepsDoor(patch, self.name, layers, self.asks, self.combine, self.what(layers, depth))

    def selection_flops(self, picture: Picture, text: int, model: Sizes) -> int:
        """The head on the hidden states that are read, for the first token."""
        return self.step_flops(picture, text, model, 0)

    def step_flops(self, picture: Picture, text: int, model: Sizes, step: int) -> int:
        """The same for every token."""
        if self.neutral:
            return 0
        return model.decoder.head * len(self.reads(len(model.decoder.layers), False))


def tied(model: Any) -> bool:
    """Whether the head's weights are those of the input embeddings."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight
