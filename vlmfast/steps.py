"""Door 4, steps: the logits of every step of `generate` decided anew from what its one forward computed anyway.

A method says behind which decoder layers it wants the hidden states, what of them is to pass the model's head, and
what becomes of the logits. Hooks take the hidden states of the last position alone, where prompts padded on the left
end; what is to pass the head does so beside the model's own, in the same product, so that the head's weights are read
once (see `vlmfast.products`); and scores replace the logits where `generate` reads them: in front of its logits
processors, for every search it knows. Direct calls of the model give its own logits, in training too. There is no
second forward, and no state from step to step.

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

from vlmfast.patching import Patch, Report
from vlmfast.products import FewRows

FAR = 1e4  # how far behind the others tokens are that a method rules out: no softmax sees them at any temperature


@dataclass(frozen=True)
class Step:
    """One step of `generate`, before the head: rows are those of the batch, with beams and return sequences.

    found: [B, D] by number of layers, the last position's hidden states that were asked for, before the final norm;
    0: what enters the first layer. final_norm: behind the last layer.
    """

    found: dict[int, Tensor]
    final_norm: Any

    def hidden(self) -> Tensor:
        """All that was asked for, in the order of the layers. [n, B, D]"""
        states = [hidden for _, hidden in sorted(self.found.items())]
        return torch.stack([hidden.to(states[-1].device) for hidden in states])

    def norm(self, hidden: Tensor) -> Tensor:
        """The norm behind the decoder's last layer. [..., D]"""
        normed: Tensor = self.final_norm(hidden)
        return normed


Asks = Callable[[Step], Tensor]
Scores = Callable[[Tensor, Tensor], Tensor]


def possible(scores: Tensor, logits: Tensor) -> Tensor:
    """Scores that rule nothing out for good: -inf becomes far less than all others, ordered by the logits. [B, V]"""
    out = scores.isneginf()
    lowest = scores.masked_fill(out, torch.inf).amin(-1, keepdim=True)
    lowest = lowest.masked_fill(lowest.isinf(), 0.0)
    return torch.where(out, lowest - FAR + logits - logits.amax(-1, keepdim=True), scores)


class StepsDoor:
    """Lets one method decide on the scores of every step of `generate`, on one patched model.

    layers: numbers of decoder layers behind which the method wants hidden states, 0: in front of the first. asks: what
    is to pass the head besides, Step -> [n, B, D]. scores: the model's logits and those of what was asked, fp32,
    [B, V], [n, B, V] -> [B, V], unnormalised, -inf: out. what: the method's doing in the words of a report. whole: it
    reads prompts as a whole.
    """

    def __init__(
        self,
        patch: Patch,
        name: str,
        layers: Sequence[int],
        asks: Asks | None,
        scores: Scores | None,
        what: str,
        whole: bool = False,
    ) -> None:
        self.name, self.asks, self.scores, self.what, self.whole = name, asks, scores, what, whole
        self.model, self.decoder = patch.model, patch.base.get_decoder()
        self.cap = getattr(patch.model.config.get_text_config(), "final_logit_softcapping", None)
        self.running = False  # inside `generate`
        self.starts: list[Callable[[], None]] = []  # told when a `generate` starts
        self.found: dict[int, Tensor] = {}
        self.asked: Tensor | None = None  # [B, n, D], then [B, n, V]
        self.raw: Tensor | None = None  # [B, V] as the head gave it
        for number in dict.fromkeys(layers):
            if number:
                patch.hook(self.decoder.layers[number - 1], Leave(self, number))
            else:
                patch.hook(self.decoder.layers[0], self.before_layers, before=True)
        if asks is not None:
            head = patch.model.get_output_embeddings()
            if type(head) is nn.Linear and "forward" not in head.__dict__:
                patch.stand_in(head, FewRows(head, self.deciding))
            patch.hook(head, self.before_head, before=True, first=False)
            patch.hook(head, self.after_head)
        patch.hook(patch.model, self.after_model)
        patch.set(patch.model, "generate", Generate(self, patch.model))
        patch.reporters.append(self)

    # --- hooks -------------------------------------------------------------------------------------------------

    def before_layers(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the first layer: take its input."""
        if self.running:
            self.found[0] = last(args[0] if args else kwargs["hidden_states"])

    def before_head(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the head: what the method asks for goes with the model's own, [B, k, D] -> [B, k + n, D]."""
        if not self.running or self.asks is None:
            return None
        found, self.found = self.found, {}
        asked = self.asks(Step(found, self.decoder.norm)).transpose(0, 1)
        self.asked = asked
        return (torch.cat([args[0], asked.to(args[0])], dim=1), *args[1:]), kwargs

    def deciding(self, hidden: Tensor) -> bool:
        """Whether what passes the head is for `generate`."""
        return self.running

    def after_head(self, head: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        """Hook of the head: the model gets back what is its own."""
        if self.asked is None:
            return None
        kept = output.shape[1] - self.asked.shape[1]
        self.asked, self.raw = output[:, kept:], output[:, kept - 1]
        return output[:, :kept]

    def after_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hook of the model: the method's scores take the place of the last position's logits."""
        if not self.running or self.scores is None:
            return None
        kept = kwargs.get("logits_to_keep", 1)
        if isinstance(kept, int) and kept > 1:
            raise NotImplementedError(
                f"{self.name} decides on one token at a time: generate without assistant_model and prompt_lookup"
            )
        own, asked, raw = output.logits[:, -1].float(), self.asked, self.raw
        self.clear()
        assert asked is not None and raw is not None
        others, raw = asked.transpose(0, 1).to(own), raw.to(own)  # logits come back to where the inputs are
        if self.cap is not None and not torch.equal(raw, own):  # there are configs whose cap no model applies
            others = torch.tanh(others / self.cap) * self.cap
        output.logits = possible(self.scores(own, others), own)[:, None]
        return output

    def clear(self) -> None:
        """Forget what a forward left."""
        self.found, self.asked, self.raw = {}, None, None

    def report(self, report: Report) -> Report:
        """Say what the method does."""
        return replace(report, notes=(*report.notes, f"{self.name}: {self.what}"))


def last(hidden: Tensor) -> Tensor:
    """The last position alone, without the memory of the others. [B, L, D] -> [B, D]"""
    return hidden[:, -1].clone()


class Taker(Protocol):
    """Who wants what leaves a layer."""

    @property
    def running(self) -> bool:
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
        config = config or door.model.generation_config
        if door.whole and (kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)):
            raise NotImplementedError(f"{door.name} reads a prompt as a whole: generate without prefill_chunk_size")
        before, door.running = door.running, True
        for start in door.starts:
            start()
        try:
            return self.original(*args, **kwargs)
        finally:
            door.running = before
            door.clear()
