"""Which tokens are visual, told to modules inside decoder layers: what adapters that treat them differently go by.

A hook on the base model looks at the ids that really enter it (rewritten by the inputs door where a method prunes) and
sends what it finds through the forward's keyword arguments; hooks on a layer and on its attention pick it up there.
The arguments come again when gradient checkpointing runs a layer a second time, so a layer never sees the tokens of
another forward, whatever ran in between.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.lockstep import streaming
from vlmfast.patching import Patch

KEYWORD = "vlmfast_tokens"  # of a forward: its Tokens
MODALITIES = "vlmfast_modalities"  # attribute of a model: its Modalities


@dataclass
class Tokens:
    """One forward. visual: bool [B, Q] of its tokens; None: none is. notes: what adapters send along themselves."""

    visual: Tensor | None
    notes: dict[str, Any] = field(default_factory=dict)


class Here:
    """What a decoder layer is told of the running forward. Modules inside the layer hold it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.tokens: Tokens | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the layer, and of its attention, which runs again where a layer is recomputed."""
        self.tokens = kwargs.get(KEYWORD)
        if self.tokens is None and streaming():  # text alone, beside the prompts
            self.tokens = Tokens(None)

    @property
    def now(self) -> Tokens:
        """Of the running forward. RuntimeError where the layer was not reached through the multimodal base model."""
        if self.tokens is None:
            raise RuntimeError(
                "an adapter that tells visual tokens from text was reached past the model's own forward; call the "
                "XForConditionalGeneration model or its base model, not its language model"
            )
        return self.tokens

    def visual(self, hidden: Tensor) -> Tensor | None:
        """Which of the tokens are visual. hidden: [B, Q, D] -> bool [B, Q], or None: none is.

        NotImplementedError where the layer got other tokens than the model: some were dropped on the way.
        """
        visual = self.now.visual
        if visual is not None and visual.shape != hidden.shape[:2]:
            raise NotImplementedError(
                f"layer {self.number} got {hidden.shape[1]} of {visual.shape[1]} tokens: an adapter that tells visual "
                "tokens from text works with methods that prune before the language model, not inside it"
            )
        return None if visual is None else visual.to(hidden.device)


class Modalities:
    """Tells the decoder layers of one model which tokens are visual. The model owns it: several adapters share it."""

    def __init__(self, model: Any) -> None:
        self.patch = Patch(model)
        base, config = self.patch.base, model.config
        self.tokens = [int(getattr(config, source.token)) for source in self.patch.family.sources.values()]
        self.names = list(inspect.signature(base.forward).parameters)
        self.layers: dict[int, Here] = {}
        self.patch.hook(base, self.before_base, before=True, first=False)
        self.patch.set(model, MODALITIES, self)

    @classmethod
    def of(cls, model: Any) -> Modalities:
        """The one of a model, made where there is none. NotImplementedError for an unknown family."""
        found: Modalities | None = model.__dict__.get(MODALITIES)
        return cls(model) if found is None else found

    def layer(self, number: int) -> Here:
        """What layer `number` of the decoder is told."""
        if number not in self.layers:
            layer, here = self.patch.base.get_decoder().layers[number], Here(number)
            self.patch.hook(layer, here.enter, before=True, first=False)
            if (attention := getattr(layer, "self_attn", None)) is not None:
                self.patch.hook(attention, here.enter, before=True, first=False)
            self.layers[number] = here
        return self.layers[number]

    def before_base(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the base model."""
        if not self.layers:
            return args, kwargs
        return args, {**kwargs, KEYWORD: Tokens(self.visual({**dict(zip(self.names, args)), **kwargs}))}

    def visual(self, given: Mapping[str, Any]) -> Tensor | None:
        """Which of a forward's tokens are visual. given: the base model's arguments -> bool [B, Q], None: none is."""
        ids, cache = given.get("input_ids"), given.get("past_key_values")
        if ids is None:
            types, embeds = given.get("mm_token_type_ids"), given["inputs_embeds"]
            if types is None or types.shape[1] < embeds.shape[1]:
                raise NotImplementedError(
                    "an adapter that tells visual tokens from text needs input_ids (or mm_token_type_ids); "
                    "inputs_embeds hide where the images are"
                )
            visual = types[:, -embeds.shape[1] :] > 0
        elif ids.shape[1] == 1 and cache is not None:
            return None  # a generated token is text; the device need not be asked
        else:
            visual = sum((ids == token for token in self.tokens), torch.zeros_like(ids) > 0)
        return visual if bool(visual.any()) else None

    def close(self) -> None:
        """Take the hooks away."""
        self.patch.close()
