"""Tokens that follow prompts whose layers hold different columns: decoding, and further turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmfast.layers.cache import LayerState, later_mask, sizes, window_of
from vlmfast.layers.rotary import Rotary

if TYPE_CHECKING:
    from vlmfast.layers.door import LayersDoor


class Later:
    """One forward over tokens that follow prompts a cache holds: decoding, or a further turn of text."""

    def __init__(self, door: LayersDoor, decoder: Any, state: LayerState, kwargs: dict[str, Any]) -> None:
        self.door, self.state, self.cache = door, state, kwargs["past_key_values"]
        embeds = kwargs["inputs_embeds"]
        self.rows, self.new = embeds.shape[:2]
        filled = len(state.stages[0].columns)
        if filled != self.rows:
            raise ValueError(f"{self.rows} rows for a cache that was filled with {filled}")
        self.held = self.cache.get_seq_length()
        if isinstance(self.held, Tensor):
            self.held = self.held.clone()  # a static cache counts on in place
        elif self.held < state.seen:
            raise ValueError(
                f"the cache holds {self.held} columns, fewer than the {state.seen} of the pruned prompt: "
                "cropping into a pruned prompt is not supported, start a fresh cache"
            )
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = (self.held + torch.arange(self.new, device=embeds.device))[None]
        self.positions = positions.expand(*positions.shape[:-2], self.rows, self.new)
        self.rotary = Rotary(door, decoder)
        self.memo: dict[Any, Any] = {}

    def enter(self, number: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The mask for what the layer holds, and its positions."""
        stage = self.state.stage(number)
        if stage is None or number in self.door.linear:
            return hidden, kwargs
        mask = kwargs.get("attention_mask")
        now, window = sizes(self.cache, self.new, number), window_of(self.door.config, number)
        key = (stage.first, mask is None, now, window)
        if key not in self.memo:
            implementation = self.door.config._attn_implementation or "eager"
            self.memo[key] = later_mask(
                mask, self.state, stage, self.held, self.new, now, window, implementation, hidden.dtype
            )
        kwargs["attention_mask"] = self.memo[key]
        if stage.shift is not None:
            if ("positions", stage.first) not in self.memo:
                moved = self.positions - stage.shift.view(-1, 1).to(self.positions.device)
                self.memo["positions", stage.first] = moved
            positions = self.memo["positions", stage.first]
            kwargs["position_embeddings"] = self.rotary.at(stage.first, positions, number, hidden)
            if kwargs.get("position_ids") is not None and positions.ndim == 2:
                kwargs["position_ids"] = positions
        return hidden, kwargs

    def columns(self, number: int) -> Tensor | None:
        """Which of the first layer's columns a layer's keys stand for, -1 for padding; None: the same. [B, K]"""
        stage = self.state.stage(number)
        if stage is None:
            return None
        length, offset = sizes(self.cache, self.new, number)
        key = ("columns", stage.first, length + offset)
        if key not in self.memo:
            more = max(0, offset + length - stage.columns.shape[1])
            later = (self.state.seen + torch.arange(more, device=stage.columns.device)).expand(self.rows, -1)
            self.memo[key] = torch.cat([stage.columns.masked_fill(~stage.live, -1), later], dim=1)
        return self.memo[key]
