"""Door 3, edits: one layer in one forward, from the hook in front of it to the `Call` that a method sees."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmfast.attention import EDIT
from vlmfast.edits.call import Call
from vlmfast.edits.memory import EDITS, Pass
from vlmfast.layers.cache import sizes
from vlmfast.layers.door import PASS

if TYPE_CHECKING:
    from vlmfast.edits.door import EditsDoor


@dataclass(frozen=True)
class Enter:
    """Pre-hook of an edited, watched or followed decoder layer, behind those that take tokens away."""

    door: EditsDoor
    number: int

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hand the layer's attention its turn."""
        one: Any = kwargs.get(EDITS)
        if one is None:
            return args, kwargs
        hidden = args[0] if args else kwargs["hidden_states"]
        if isinstance(one, Pass):
            turn = self.turn(one, hidden, kwargs.get("past_key_values"), kwargs.get(PASS))
        else:  # prompts of two caches in one batch (see `vlmfast.pairing`)
            turn = one.enter(self, hidden)
        return args, kwargs if turn is None else {**kwargs, EDIT: turn}

    def turn(self, one: Pass, hidden: Tensor, cache: Any, moved: Any) -> Turn | None:
        """The turn of the layer's method; None: the layer runs as it is. hidden: [B, Q, D]"""
        if cache is not None and getattr(cache, EDITS, None) is not one.memory:
            setattr(cache, EDITS, one.memory)
        watcher, editor = self.door.watchers.get(self.number), self.door.editors.get(self.number)
        idle = editor is None or (not one.prompt and getattr(editor, "prompts_alone", False))
        if idle and not (watcher is not None and watcher.active):
            return None
        return Turn(self.door, one, self.number, hidden, cache, moved)


class Turn:
    """One edited layer in one forward: makes the `Call` when its attention runs."""

    def __init__(self, door: EditsDoor, one: Pass, number: int, hidden: Tensor, cache: Any, moved: Any) -> None:
        self.door, self.one, self.number, self.hidden = door, one, number, hidden
        new = hidden.shape[1]
        self.offset = sizes(cache, new, number)[1]
        self.start: Any = 0
        if cache is not None:
            held = cache.get_seq_length(number)
            # A static cache counts on in place; while it decodes its length need not leave the device.
            self.start = (held.clone() if new == 1 else int(held)) if isinstance(held, Tensor) else held
            self.start = self.start - self.offset
        self.columns: Tensor | None = None if moved is None else moved.columns(number)

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        own: Callable[..., Tensor],
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """The edited attention, in the shape that transformers expects. -> [B, Q, H, d]"""
        n_key = key.shape[2]
        same = (self.offset, n_key, id(self.columns), query.shape[2], query.device)
        if same not in self.one.known:
            self.one.known[same] = self._tokens(n_key, query.shape[2], query.device)
        causal = kwargs.get("is_causal")
        editor, watcher = self.door.editors.get(self.number), self.door.watchers.get(self.number)
        call = Call(
            layer=self.number,
            depth=self.door.depth,
            query=query,
            key=key,
            value=value,
            scaling=scaling,
            start=self.start,
            mask=mask,
            causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
            window=None if mask is not None and mask.ndim == 4 else kwargs.get("sliding_window"),
            hidden=self.hidden.to(query.device),  # the hook in front of the layer saw it where the last layer is
            prompt=self.one.prompt,
            free=self.one.free,
            offset=self.offset,
            memory=self.one.memory.layers.setdefault(self.number, {}),
            own=own,
            **self.one.known[same],
            note=functools.partial(self.door.note, editor),
        )
        if watcher is not None and watcher.active:
            watcher.watch(call)
        return own() if editor is None else editor.edit(call).transpose(1, 2).contiguous()

    def new_tokens(self) -> tuple[Tensor, Tensor]:
        """Which of the tokens that the layer gets are visual, and which are no padding. bool [B, M] each"""
        memory, count = self.one.memory, self.hidden.shape[1]
        first = memory.count - self.one.ends.shape[1]
        return self._new(memory.visual[:, first:], count), self._new(memory.real[:, first:], count)

    def _tokens(self, n_key: int, count: int, device: torch.device) -> dict[str, Any]:
        """What the keys and the queries of this layer are, as `Call` has it: where the layer is."""
        memory = self.one.memory
        if memory.count:
            first = memory.real.long().argmax(1)
        else:
            first = torch.zeros(len(memory.real), dtype=torch.long, device=memory.real.device)
        if self.columns is not None:  # text before a picture is never taken away, so that the first token stays
            first = (self.columns.to(first.device) == first[:, None]).long().argmax(1)
        return {
            "visual": self._local(memory.visual, n_key, False).to(device),
            "real": self._local(memory.real, n_key, True).to(device),
            "initial": torch.where(first >= self.offset, first - self.offset, -1).to(device),
            "ends": self._new(self.one.ends, count).to(device),
            "marks": {name: self._local(mark, n_key, 0.0).to(device) for name, mark in memory.marks.items()},
        }

    def _local(self, values: Tensor, n_key: int, fill: float) -> Tensor:
        """Values of the first layer's columns for this layer's keys. [B, n] -> [B, K]"""
        if self.columns is not None:
            columns, count = self.columns.to(values.device), values.shape[1]
            values = values.gather(1, columns.clamp(0, count - 1))
            values = values.masked_fill(columns >= count, fill).masked_fill(columns < 0, 0)
        local = values[:, self.offset : self.offset + n_key]
        return torch.nn.functional.pad(local, (0, n_key - local.shape[1]), value=fill)

    def _new(self, values: Tensor, count: int) -> Tensor:
        """Values of the forward's tokens for those that the layer got. [B, Q] -> [B, M]"""
        return of_layer(values, self.columns, self.one.memory.count, count)


def of_layer(values: Tensor, columns: Tensor | None, known: int, count: int) -> Tensor:
    """What is true of a forward's tokens, for the `count` of them that a layer got. bool [B, Q] -> [B, M]

    columns: [B, K] the first layer's columns that the layer's keys stand for; None: all. known: of the first layer.
    """
    if values.shape[1] == count or columns is None:
        return values
    new = columns[:, -count:] - (known - values.shape[1])
    return values.gather(1, new.clamp(min=0).to(values.device)) & (new >= 0).to(values.device)
