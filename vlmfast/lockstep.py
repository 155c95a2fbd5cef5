"""The image-free stream: prompts without their pictures, one decoder layer at a time beside the prompts themselves.

A method that compares what a layer does with and without a picture needs both at once, and must be able to change both
before the next layer. Rows of text beside the prompts in one batch would be padded to the prompts' length; here they
are as long as their text. The base model is called once on the text alone, with stand-ins of its layers that do
nothing but note what they are given (masks, rotary embeddings, whatever the family makes), which costs the embeddings;
then every layer runs when it is asked for, on the text's own hidden states, without a cache, without gradients, and
past the layers' hooks.

"Without its pictures" means: without the placeholders. Tokens that a template puts around them are text like any other
(`<|vision_start|>`, `<row_1_col_1>`, ...), and positions count the text alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context, ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlmfast.attention import EDIT

Heads = Callable[[Tensor], Tensor]
_streaming: ContextVar[bool] = ContextVar("vlmfast_streaming", default=False)


def streaming() -> bool:
    """Whether an image-free stream runs, for hooks inside layers: they are about the prompts."""
    return _streaming.get()


Noted = dict[int, tuple[Tensor, tuple[Any, ...], dict[str, Any]]]  # what layers are given: by number


class _Note(nn.Module):
    """Stands for a decoder layer: notes its arguments and hands the hidden states on."""

    def __init__(self, number: int, layer: nn.Module, noted: Noted) -> None:
        super().__init__()
        self.number, self.noted = number, noted
        self.__dict__["layer"] = layer  # no module of this one

    def __getattr__(self, name: str) -> Any:
        """What a decoder asks its layers for, such as the kind of their attention."""
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Nothing but noting."""
        self.noted[self.number] = hidden_states, args, kwargs
        return hidden_states


@contextmanager
def _noting(decoder: Any) -> Iterator[Noted]:
    """Let stand-ins of the layers note what these would be given."""
    noted: Noted = {}
    layers = decoder.layers
    decoder._modules["layers"] = nn.ModuleList(_Note(number, one, noted) for number, one in enumerate(layers))
    try:
        yield noted
    finally:
        decoder._modules["layers"] = layers


@dataclass(frozen=True)
class _Turn:
    """One attention call of the stream, as `vlmfast.edits.turn.Turn` is one of the prompts."""

    edit: Heads

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        own: Callable[[], Tensor],
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """The edited attention, in the shape that transformers expects. -> [R, T, H, d]"""
        return self.edit(own().transpose(1, 2)).transpose(1, 2).contiguous()


def alone(
    ids: Tensor, text: Tensor, pictured: Tensor, first_position: int = 0, more: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]] | None:
    """The text of some prompts, padded on the left. -> rows [R] of the batch, real tokens [R, T], inputs of the base
    model; None where no row has both picture and text.

    ids: [B, L] of the prompts; text: bool [B, L] which of them are text; pictured: bool [B] rows with a picture. more:
    further inputs of the base model, one value a token [B, L].
    """
    rows = (pictured & text.any(1)).nonzero().flatten()
    if not len(rows):
        return None
    text = text[rows]
    order = text.long().argsort(dim=1, stable=True)[:, -int(text.sum(1).max()) :]
    mask = text.gather(1, order)

    def taken(values: Tensor) -> Tensor:
        return values.expand(len(pictured), -1)[rows].gather(1, order).masked_fill(~mask, 0)

    inputs = {
        "input_ids": taken(ids),
        "attention_mask": mask.long(),
        "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0) + first_position,
        **{name: taken(values) for name, values in (more or {}).items()},
    }
    return rows, mask, inputs


@dataclass
class ImageFree:
    """The image-free stream of a batch of prompts.

    rows: int64 [R], the rows of the batch that have a picture, and text besides: no others are in it. mask: bool
    [R, T] real tokens, padded on the left, so that the last column is each prompt's last text token. last: the last
    layer that is going to be asked for. memory: what a method gathers on the way through the layers.
    """

    layers: Sequence[Any]
    rows: Tensor
    mask: Tensor
    last: int
    memory: dict[str, Any] = field(default_factory=dict)
    _noted: Noted = field(default_factory=dict, repr=False)
    _hidden: Tensor | None = field(default=None, repr=False)
    _next: int = 0

    @classmethod
    def of(
        cls,
        base: Any,
        ids: Tensor,
        text: Tensor,
        pictured: Tensor,
        last: int,
        first_position: int = 0,
        more: Mapping[str, Tensor] | None = None,
    ) -> ImageFree | None:
        """Make the stream of some prompts; None where no row has both picture and text.

        base: the multimodal base model. ids: [B, L] of the prompts; text: bool [B, L] which of them are text;
        pictured: bool [B] rows with a picture. more: further inputs of the base model, one value a token [B, L].
        """
        found = alone(ids, text, pictured, first_position, more)
        if found is None:
            return None
        rows, mask, inputs = found
        decoder = base.get_decoder()
        with torch.no_grad(), _noting(decoder) as noted:
            base.forward(**inputs, use_cache=False)
        return cls(decoder.layers, rows, mask, last, _noted=noted)

    def through(self, number: int, edit: Heads) -> None:
        """Take the stream through the layers up to `number`, whose attention is edited.

        edit: its head outputs [R, H, T, d] -> of the same shape. Layers are asked for in ascending order, each once.
        """
        if number < self._next:
            raise ValueError(f"layer {number} of the image-free stream has passed")
        # An empty context: what transformers collects of the prompts' layers (attention maps, ...) has none of these.
        Context().run(self._through, number, edit)
        if number >= self.last:
            self._noted, self._hidden = {}, None

    @torch.no_grad()
    def _through(self, number: int, edit: Heads) -> None:
        _streaming.set(True)  # in a context of its own
        for one in range(self._next, number + 1):
            hidden, args, kwargs = self._noted.pop(one)
            turn = {EDIT: _Turn(edit)} if one == number else {}
            # `forward`, past the hooks of the layer: they are about the prompts.
            output = self.layers[one].forward(
                hidden if self._hidden is None else self._hidden, *args, **{**kwargs, **turn}
            )
            self._hidden = output[0] if isinstance(output, tuple) else output
        self._next = number + 1
