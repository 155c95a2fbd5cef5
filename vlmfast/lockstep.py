"""The image-free stream: prompts without their pictures, one decoder layer at a time beside the prompts themselves.

A method that compares what a layer does with and without a picture needs both at once, and must be able to change both
before the next layer. Rows of text beside the prompts in one batch would be padded to the prompts' length; here they
are as long as their text. The base model is called once on the text alone with layers that do nothing but note what
they are given (masks, rotary embeddings, whatever the family makes), which costs the embeddings; then every layer runs
when it is asked for, on the text's own hidden states, without a cache, without gradients, and past all hooks.

"Without its pictures" means: without the placeholders. Tokens that a template puts around them are text like any other
(`<|vision_start|>`, `<row_1_col_1>`, ...), and positions count the text alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmfast.attention import EDIT

Heads = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Note:
    """Stands for a layer's `forward`: notes its arguments and hands the hidden states on."""

    number: int
    noted: dict[int, tuple[Tensor, tuple[Any, ...], dict[str, Any]]]

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.noted[self.number] = hidden_states, args, kwargs
        return hidden_states


@contextmanager
def _noting(layers: Sequence[Any]) -> Iterator[dict[int, tuple[Tensor, tuple[Any, ...], dict[str, Any]]]]:
    """Let the layers note what they are given, and do nothing else."""
    noted: dict[int, tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = {}
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for number, layer in enumerate(layers):
            layer.__dict__["forward"] = _Note(number, noted)
        yield noted
    finally:
        for layer, own in zip(layers, before):
            if own is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = own


@dataclass(frozen=True)
class _Turn:
    """One attention call of the stream, as `vlmfast.edits.door.Turn` is one of the prompts."""

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
    _noted: dict[int, tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict, repr=False)
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
        layers = base.get_decoder().layers
        with torch.no_grad(), _noting(layers) as noted:
            base.forward(**inputs, use_cache=False)
        return cls(layers, rows, mask, last, _noted=noted)

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
        for one in range(self._next, number + 1):
            hidden, args, kwargs = self._noted.pop(one)
            turn = {EDIT: _Turn(edit)} if one == number else {}
            # `forward`, past the hooks of the layer: they are about the prompts.
            output = self.layers[one].forward(
                hidden if self._hidden is None else self._hidden, *args, **{**kwargs, **turn}
            )
            self._hidden = output[0] if isinstance(output, tuple) else output
        self._next = number + 1
