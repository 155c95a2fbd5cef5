"""Door 4, steps: the logits of every step of `generate` decided anew from what its one forward computed anyway.

A method says behind which decoder layers it wants the hidden states, and turns them and the model's logits into
scores. Hooks take the hidden states of the last position alone, where prompts padded on the left end, and replace the
logits where `generate` reads them: in front of its logits processors, for every search it knows. Direct calls of the
model give its own logits, in training too. There is no second forward, and no state from step to step.

A method may rule tokens out. Where `generate` forbids the rest (suppressed tokens, grammars), nothing would be left to
choose from; so what a method rules out is put far behind everything else instead, in the model's own order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlmfast.patching import HANDLE, Patch, Report

FAR = 1e4  # how far behind the others tokens are that a method rules out: no softmax sees them at any temperature


@dataclass(frozen=True)
class Step:
    """One step of `generate`: rows are those of the batch, with beams and return sequences.

    logits: [B, V] fp32, the model's own. found: [B, D] by number of layers, the hidden states that were asked for.
    cap: what the model caps its logits at, None where it does not.
    """

    logits: Tensor
    found: dict[int, Tensor]
    final_norm: Any
    output: Any
    cap: float | None = None

    def hidden(self, number: int) -> Tensor:
        """The last position's hidden states behind `number` decoder layers, before the final norm. [B, D]

        0: what enters the first layer.
        """
        return self.found[number]

    def norm(self, hidden: Tensor) -> Tensor:
        """The norm behind the decoder's last layer. [..., D]"""
        normed: Tensor = self.final_norm(hidden)
        return normed

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, as the model makes them, without the final norm. [..., D] -> [..., V] fp32"""
        logits: Tensor = self.output(hidden).float().to(self.logits.device)
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def possible(scores: Tensor, logits: Tensor) -> Tensor:
    """Scores that rule nothing out for good: -inf becomes far less than all others, ordered by the logits. [B, V]"""
    out = scores.isneginf()
    lowest = scores.masked_fill(out, torch.inf).amin(-1, keepdim=True)
    lowest = lowest.masked_fill(lowest.isinf(), 0.0)
    return torch.where(out, lowest - FAR + logits - logits.amax(-1, keepdim=True), scores)


class StepsDoor:
    """Lets one method decide on the scores of every step of `generate`, on one patched model.

    layers: numbers of decoder layers behind which the method wants hidden states, 0: in front of the first. scores:
    Step -> [B, V], unnormalised, -inf: out. what: the method's doing in the words of a report. whole: it reads prompts
    as a whole.
    """

    def __init__(
        self,
        patch: Patch,
        name: str,
        layers: Sequence[int],
        scores: Callable[[Step], Tensor],
        what: str,
        whole: bool = False,
    ) -> None:
        self.name, self.scores, self.what, self.whole = name, scores, what, whole
        self.decoder = patch.base.get_decoder()
        self.head = patch.model.get_output_embeddings()
        self.capped = getattr(patch.model.config.get_text_config(), "final_logit_softcapping", None)
        self.runs = 0  # calls of `generate` until now
        self.running = 0  # which of them runs, 0: none
        self.found: dict[int, Tensor] = {}
        self.raw: Tensor | None = None
        for number in dict.fromkeys(layers):
            if number:
                patch.hook(self.decoder.layers[number - 1], Leave(self, number))
            else:
                patch.hook(self.decoder.layers[0], self.before_layers, before=True)
        if self.capped is not None:
            patch.hook(self.head, self.after_head)
        patch.hook(patch.model, self.after_model)
        patch.set(patch.model, "generate", Generate(self, patch.model))
        patch.model.__dict__[HANDLE].reporters.append(self)

    def before_layers(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the first layer: take its input."""
        if self.running:
            self.found[0] = last(args[0] if args else kwargs["hidden_states"])

    def after_head(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Hook of the head, to tell whether the model caps what comes out of it."""
        if self.running and self.raw is None:
            self.raw = last(output)

    def after_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook of the model: the method's scores take the place of the last position's logits."""
        if not self.running:
            return None
        kept = kwargs.get("logits_to_keep", 1)
        if isinstance(kept, int) and kept > 1:
            raise NotImplementedError(
                f"{self.name} decides on one token at a time: generate without assistant_model and prompt_lookup"
            )
        own = output.logits[:, -1].float()
        capped = self.raw is not None and not torch.equal(self.raw.float().to(own.device), own)
        step = Step(own, self.found, self.decoder.norm, self.head, self.capped if capped else None)
        try:
            output.logits = possible(self.scores(step), own)[:, None]
        finally:
            self.clear()
        return output

    def clear(self) -> None:
        """Forget what one forward left."""
        self.found, self.raw = {}, None

    def report(self, report: Report) -> Report:
        """Say what the method does."""
        return replace(report, notes=(*report.notes, f"{self.name}: {self.what}"))


def last(hidden: Tensor) -> Tensor:
    """The last position alone, without the memory of the others. [B, L, D] -> [B, D]"""
    return hidden[:, -1].clone()


class Taker(Protocol):
    """Who wants what leaves a layer."""

    @property
    def running(self) -> int:
        """Whether it does so now."""
        ...

    @property
    def found(self) -> dict[int, Tensor]:
        """Where it goes."""
        ...


@dataclass(frozen=True)
class Leave:
    """Hook of a decoder layer: take what leaves it, under a number."""

    door: Taker
    number: int

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Take the last position."""
        if self.door.running:
            self.door.found[self.number] = last(output[0] if isinstance(output, tuple) else output)


class Generate:
    """Stands for the instance's `generate`: the method decides inside it alone."""

    def __init__(self, door: StepsDoor, model: Any) -> None:
        self.door, self.original = door, model.generate
        functools.update_wrapper(self, self.original, updated=())  # none of the attributes of another door

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the original. Raises NotImplementedError for prompts in chunks where the method reads them whole."""
        door, config = self.door, kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        if door.whole and (kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)):
            raise NotImplementedError(f"{door.name} reads a prompt as a whole: generate without prefill_chunk_size")
        before = door.running
        door.runs += 1
        door.running = door.runs
        try:
            return self.original(*args, **kwargs)
        finally:
            door.running = before
            door.clear()
