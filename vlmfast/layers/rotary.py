"""Rotary embeddings of the tokens that are left behind a cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from vlmfast.layers.door import LayersDoor


@dataclass
class Rotary:
    """Rotary embeddings for some of the tokens, or for other positions."""

    door: LayersDoor
    decoder: Any
    memo: dict[Any, Any] = field(default_factory=dict)

    def picked(self, embeddings: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin: [..., B or 1, L, d], index [B, M] -> [..., B, M, d]"""
        key = ("picked", id(embeddings[0]), id(index))
        if key not in self.memo:
            self.memo[key] = embeddings, index, tuple(_pick(one, index) for one in embeddings)
        return self.memo[key][-1]

    def at(self, stage: int, positions: Tensor, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """For the positions behind a cut, computed once for it. [B, M] or [3 or 4, B, M]"""
        kind = (self.door.config.layer_types[layer],) if self.door.types else ()
        key = ("at", stage, kind)
        if key not in self.memo:
            axes = positions if positions.ndim == 2 else positions[-3:]
            self.memo[key] = self.decoder.rotary_emb(hidden, axes, *kind)
        return self.memo[key]


def _pick(embedding: Tensor, index: Tensor) -> Tensor:
    rows, width = index.shape[0], embedding.shape[-1]
    embedding = embedding.expand(*embedding.shape[:-3], rows, *embedding.shape[-2:])
    index = index.to(embedding.device)[..., None].expand(*embedding.shape[:-3], -1, -1, width)
    return embedding.gather(-2, index)
