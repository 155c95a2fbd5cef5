"""Which tokens are visual, told to modules inside decoder layers: what adapters that treat them differently go by.

A hook on the base model looks at the ids that really enter it (rewritten by the inputs door where a method prunes) and
sends what it finds through the forward's keyword arguments; hooks on a layer and on what mixes its tokens (attention,
or a state of all tokens) pick it up there.

Gradient checkpointing runs a layer's forward a second time, past the layer's own hooks but with the arguments it had,
so from the mixer on a layer never sees the tokens of another forward, whatever ran in between. What comes before the
mixer, its input norm, must not ask.

What runs of a layer outside any forward of the prompts is text: the image-free stream, and paths beside the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.layers.door import PASS
from vlmfast.lockstep import streaming
from vlmfast.patching import Patch

KEYWORD = "vlmfast_tokens"  # of a forward: its Tokens
MODALITIES = "vlmfast_modalities"  # attribute of a model: its Modalities
MIXERS = ("self_attn", "linear_attn")  # of a layer: what mixes its tokens, and is given all of the layer's arguments
_beside: ContextVar[bool] = ContextVar("vlmfast_beside", default=False)


@contextmanager
def beside_the_prompts() -> Iterator[None]:
    """Parts of layers that run inside are given text, not the tokens of the running forward."""
    token = _beside.set(True)
    try:
        yield
    finally:
        _beside.reset(token)


@dataclass
class Tokens:
    """One forward. visual: bool [B, Q] of its tokens; None: none is. notes: what adapters send along themselves."""

    visual: Tensor | None
    notes: dict[str, Any] = field(default_factory=dict)
    _places: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def places(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Places of the visual tokens and of the others among all B Q, int64 [V] and [B Q - V]; None: none is visual.

        Found once a forward: that waits for the device.
        """
        if self.visual is None:
            return None
        if device not in self._places:
            flat = self.visual.flatten().to(device)
            self._places[device] = flat.nonzero().flatten(), (~flat).nonzero().flatten()
        return self._places[device]


TEXT = Tokens(None)


class Here:
    """What a decoder layer is told of the running forward. Modules inside the layer hold it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.tokens: Tokens | None = None
        self.moved = False  # tokens were dropped before this layer

    def enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the layer."""
        self.tokens = kwargs.get(KEYWORD)
        self.moved = bool(getattr(kwargs.get(PASS), "stages", ()))

    def enter_mixer(self, mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of what mixes the layer's tokens, which alone runs again where the layer is recomputed."""
        if streaming():  # the prompts' tokens come back when the stream has passed
            return None
        self.tokens = kwargs.get(KEYWORD)
        return args, {name: value for name, value in kwargs.items() if name != KEYWORD}  # kernels need not know

    @property
    def now(self) -> Tokens:
        """Of the running forward. RuntimeError where the layer was not reached through the multimodal base model."""
        if streaming() or _beside.get():
            return TEXT
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
        visual = self._checked(hidden.shape[:2]).visual
        return None if visual is None else visual.to(hidden.device)

    def places(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Where the visual tokens and the others are, see `Tokens.places`. hidden: [B, Q, D], or flat [B Q, D].

        NotImplementedError as `visual`.
        """
        return self._checked(hidden.shape[:-1]).places(hidden.device)

    def _checked(self, shape: torch.Size) -> Tokens:
        """The tokens, which must be those of hidden states of a shape: [B, Q] or [B Q]."""
        tokens = self.now
        if tokens.visual is None:
            return tokens
        if self.moved or shape not in (tokens.visual.shape, (tokens.visual.numel(),)):
            raise NotImplementedError(
                f"layer {self.number} got other tokens than the model: an adapter that tells visual tokens from text "
                "works with methods that prune before the language model, not inside it"
            )
        return tokens


class Modalities:
    """Tells the decoder layers of one model which tokens are visual. The model owns it: several adapters share it."""

    def __init__(self, model: Any) -> None:
        self.patch = Patch(model)
        base, config = self.patch.base, model.config
        sources = self.patch.family.sources.values()
        self.tokens = [int(getattr(config, source.token)) for source in sources]
        self.pictures = [*(source.pixels for source in sources), "mm_encoder_outputs"]
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
            for name in MIXERS:
                if (mixer := getattr(layer, name, None)) is not None:
                    self.patch.hook(mixer, here.enter_mixer, before=True, first=False)
            self.layers[number] = here
        return self.layers[number]

    def before_base(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the base model."""
        if not self.layers:
            return args, kwargs
        return args, {**kwargs, KEYWORD: Tokens(self.visual({**dict(zip(self.names, args)), **kwargs}))}

    def visual(self, given: Mapping[str, Any]) -> Tensor | None:
        """Which of a forward's tokens are visual. given: the base model's arguments -> bool [B, Q], None: none is.

        NotImplementedError for inputs_embeds without mm_token_type_ids that say where the pictures are.
        """
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        if ids is not None:
            pictured = any(given.get(name) is not None for name in self.pictures)
            if ids.shape[1] == 1 and not pictured:
                return None  # a generated token is text; the device need not be asked
            visual = torch.isin(ids, torch.tensor(self.tokens, device=ids.device))
        elif embeds is None:
            return None  # the model itself says what is missing
        else:
            visual = self._typed(given.get("mm_token_type_ids"), embeds, given.get("past_key_values"))
        return visual if bool(visual.any()) else None

    def _typed(self, types: Tensor | None, embeds: Tensor, cache: Any) -> Tensor:
        """By the types of the new tokens, or of all that the cache holds and them. -> bool [B, Q]"""
        rows, new = embeds.shape[:2]
        held = 0 if cache is None else int(cache.get_seq_length())
        if types is None or types.shape not in ((rows, new), (rows, held + new)):
            raise NotImplementedError(
                "an adapter that tells visual tokens from text needs input_ids, or mm_token_type_ids "
                f"{[rows, new]} beside inputs_embeds, which hide where the pictures are"
            )
        return types[:, -new:].to(embeds.device) > 0

    def close(self) -> None:
        """Take the hooks away."""
        self.patch.close()
