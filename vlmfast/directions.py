"""Hidden states steered behind every feed-forward net, in a direction that is found prompt by prompt.

The direction of a layer is what the pictures add to its output where the prompt ends: the last position's hidden
states of the prompt, less those of the same text without its pictures. Both are taken once a prompt, by two forwards
of the decoder that nothing steers, before `generate` prefills; the vision tower does not run again. Then the prompt
and all that is generated behind it are steered. Direct calls of the model are not.

Directions lie on the cache: a later turn of a conversation is steered as the one that brought its picture. Prompts
that are not the first in their cache, or that come in chunks, cannot be compared with anything and are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import DynamicCache

from vlmfast.edits import EditsDoor
from vlmfast.edits.memory import real_tokens
from vlmfast.lockstep import alone, streaming
from vlmfast.patching import Patch
from vlmfast.steps import Leave, StepsDoor

DIRECTIONS = "vlmfast_directions"  # on a cache: the Directions of its prompts
Steer = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Directions:
    """Directions of a batch of prompts.

    layers: [B, D] fp32 of length one, by number of the layer. pictured: bool [B], rows without one are not steered;
    every: all are.
    """

    layers: Mapping[int, Tensor]
    pictured: Tensor
    every: bool


class DirectionsDoor:
    """Steers the hidden states of decoder layers of one patched model inside `generate`.

    steps: the method's door 4, which knows when that is. layers: 0-based. steer: output of a layer's feed-forward net
    [B, L, D] and its directions [B, D] fp32 of length one -> the output, steered.
    """

    def __init__(self, patch: Patch, steps: StepsDoor, layers: tuple[int, ...], steer: Steer) -> None:
        self.patch, self.steps, self.steer = patch, steps, steer
        self.config = patch.model.config.get_text_config(decoder=True)
        self.tokens = [int(getattr(patch.model.config, source.token)) for source in patch.family.sources.values()]
        self.names = list(inspect.signature(patch.base.forward).parameters)
        self.running = False  # prompts are being compared
        self.found: dict[int, Tensor] = {}  # what leaves the layers meanwhile
        self.known = False  # those of the running `generate` have been
        self.directions: Directions | None = None
        steps.starts.append(self.forget)
        decoder = patch.base.get_decoder()
        patch.hook(patch.base, self.before_base, before=True)
        for layer in layers:
            patch.hook(decoder.layers[layer], Leave(self, layer))
            patch.hook(decoder.layers[layer].mlp, Behind(self, layer))

    def forget(self) -> None:
        """A `generate` starts."""
        self.known, self.directions = False, None

    def before_base(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the base model: at the first forward of a `generate`, find the directions."""
        if self.steps.running and not self.running and not self.known:
            self.directions = self._directions(base, {**dict(zip(self.names, args)), **kwargs})
            self.known = True

    def _directions(self, base: nn.Module, given: dict[str, Any]) -> Directions | None:
        ids, cache, name = given.get("input_ids"), given.get("past_key_values"), self.steps.name
        if ids is None:
            raise NotImplementedError(f"{name} needs input_ids; inputs_embeds hide where the images are")
        held = 0 if cache is None else int(cache.get_seq_length())
        real = real_tokens(given.get("attention_mask"), len(ids), held, ids.shape[1], ids.device)
        visual = torch.isin(ids, torch.tensor(self.tokens, device=ids.device)) & real
        found: Directions | None = getattr(cache, DIRECTIONS, None) if held else None
        if held and found is None and bool(visual.any()):
            raise NotImplementedError(
                f"{name}: a first picture behind text that a cache holds already; start with an empty cache"
            )
        if found is not None and len(found.pictured) != len(ids):
            raise ValueError(f"{len(ids)} rows for a cache that was filled with {len(found.pictured)}")
        if not held and bool(visual.any()):
            found = self._compared(base, given, ids, real, visual)
        if cache is not None:
            setattr(cache, DIRECTIONS, found)
        return found

    @torch.no_grad()
    def _compared(
        self, base: nn.Module, given: dict[str, Any], ids: Tensor, real: Tensor, visual: Tensor
    ) -> Directions | None:
        """What the pictures add where the prompts end; None where none has text besides."""
        types, more = given.get("token_type_ids"), {}
        if "token_type_ids" in self.names:  # text has type 0: causal (Gemma 3), or the prefix (PaliGemma)
            more["token_type_ids"] = torch.zeros_like(ids) if types is None else types
        text = alone(ids, real & ~visual, visual.any(1), self.patch.family.first_position, more)
        if text is None:
            return None
        rows, _, inputs = text
        whole = self._last(base, {**given, "attention_mask": real.long()})
        without = self._last(base, inputs)
        pictured = torch.zeros(len(ids), dtype=torch.bool, device=ids.device).index_fill(0, rows, True)
        layers = {}
        for number, hidden in whole.items():
            to = rows.to(hidden.device)
            difference = normalize(hidden[to] - without[number], dim=-1)
            layers[number] = torch.zeros_like(hidden).index_copy(0, to, difference)
        return Directions(layers, pictured, len(rows) == len(ids))

    def _last(self, base: nn.Module, inputs: dict[str, Any]) -> dict[int, Tensor]:
        """Hidden states behind the layers where prompts end, unsteered. [B, D] fp32 by number of the layer"""
        with self._comparing(inputs["input_ids"].shape[1]):
            base(**{**inputs, "past_key_values": DynamicCache(config=self.config), "use_cache": True})
            found, self.found = self.found, {}
        return {number: hidden.float() for number, hidden in found.items()}

    @contextmanager
    def _comparing(self, width: int) -> Iterator[None]:
        """Other prompts, of `width` columns, run meanwhile."""
        self.running = True
        with ExitStack() as stack:
            for one in self.patch.reporters:
                if isinstance(one, EditsDoor):
                    stack.enter_context(one.beside(width))
            try:
                yield
            finally:
                self.running, self.found = False, {}


@dataclass(frozen=True)
class Behind:
    """Hook of a layer's feed-forward net."""

    door: DirectionsDoor
    number: int

    def __call__(self, mlp: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Steer what leaves it."""
        door = self.door
        if not door.steps.running or door.directions is None or streaming():  # none while prompts are compared
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        steered = door.steer(hidden, door.directions.layers[self.number].to(hidden.device)).to(hidden.dtype)
        if not door.directions.every:
            steered = torch.where(door.directions.pictured[:, None, None].to(hidden.device), steered, hidden)
        return (steered, *output[1:]) if isinstance(output, tuple) else steered
