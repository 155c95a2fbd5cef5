"""Door 2, statistics of a decoder layer's attention: chosen rows of the map, in blocks, in fp32."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmfast.attention import ENTRIES, ENTRIES_CPU, attention_rows
from vlmfast.layers.tokens import LayerScore


@dataclass
class Asked:
    """What one batch row wants of one layer's attention.

    scores: by the method's names. rows: for each name the queries, as places among the tokens that enter the layer.
    """

    scores: Mapping[str, LayerScore]
    rows: Mapping[str, Tensor]


def measure(
    score: LayerScore,
    query: Callable[[Tensor], Tensor],
    rows: Tensor,
    key: Tensor,
    start: int,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """A statistic of kind "attention" for one prompt. -> [K - start], or [R, K - start], [H, K - start]

    query: places [r] -> queries [1, H, r, d]; rows: [R] places among the new tokens; key: [1, H_kv, K, d], whose last
    K - start are the new tokens'; mask: None (causal), [1, K] bool of real keys, or [1, 1, Q, K] bool or additive.
    """
    columns = torch.arange(key.shape[2], device=key.device)
    heads = query(rows[:0]).shape[1]  # none projected
    limit = ENTRIES_CPU if key.device.type == "cpu" else ENTRIES
    parts: list[Tensor] = []
    total = torch.zeros((), device=key.device)
    for part in rows.split(max(1, limit // (heads * key.shape[2]))):
        if mask is not None and mask.ndim == 4:
            seen = mask[:, :, part, : key.shape[2]]
        else:
            seen = (columns <= (part + start)[:, None])[None, None]
            seen = seen if mask is None else seen & mask[:, None, None, : key.shape[2]].bool()
        block = attention_rows(query(part), key, slice(None), scaling, seen)[0, :, :, start:]
        if score.reduce == "rows":
            parts.append(block.mean(0))
        else:
            total = total + block.sum(1)
    if score.reduce == "rows":
        return torch.cat(parts)
    by_head = total / len(rows)
    return by_head if score.reduce == "heads" else by_head.mean(0)


def rotated(module: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys behind the rotary embedding of the module's family. [1, H, M, d], cos, sin: [1, M, d]"""
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    return rotate(heads, heads[:, :0], cos, sin)[0]


def key_norm(module: Any, key: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """L1 norm of each key without its rotary embedding, all heads together. [1, H_kv, M, d] -> [M]"""
    return rotated(module, key.float(), cos.float(), -sin.float())[0].abs().sum(dim=(0, 2))


@dataclass
class LayerTaps:
    """Takes statistics of one decoder layer while it runs (the object behind `vlmfast.attention.KEYWORD`).

    asked: by batch row. start: how many keys the layer returns before those of the new tokens. cos, sin: of the new
    tokens, [1 or B, M, d]. results: {row: {name: statistic over the new tokens}}.
    """

    asked: dict[int, Asked]
    start: int
    cos: Tensor
    sin: Tensor
    results: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    closed: bool = False  # set when read: a recomputation (gradient checkpointing) takes nothing again

    @torch.no_grad()
    def observe(
        self, module: Any, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float, kwargs: dict[str, Any]
    ) -> None:
        """Take what is asked from one attention call."""
        if self.closed:
            return
        end = self.start + query.shape[2]
        for row, asked in self.asked.items():
            mine = None if mask is None else mask[row : row + 1] if mask.shape[0] > 1 else mask
            take, keys = _Rows(query[row : row + 1]), key[row : row + 1, :, :end]
            cos, sin = ((one[row : row + 1] if len(one) > 1 else one).to(key.device) for one in (self.cos, self.sin))
            self.results[row] = {
                name: measure(score, take, asked.rows[name].to(key.device), keys, self.start, mine, scaling)
                if score.kind == "attention"
                else key_norm(module, keys[:, :, self.start :], cos, sin)
                for name, score in asked.scores.items()
            }


@dataclass(frozen=True)
class _Rows:
    """Some of the queries of a call. [1, H, Q, d]"""

    query: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        return self.query[:, :, rows]


@dataclass(frozen=True)
class OwnAttention:
    """Queries and keys of a layer that has not run yet, for one prompt: only the rows that are asked for.

    layer: decoder layer of the usual make (input_layernorm, self_attn with q_proj and k_proj). hidden: [1, M, D];
    cos, sin: [1, M, d]. past: [1, H_kv, P, d] keys the layer holds already.
    """

    layer: Any
    hidden: Tensor
    cos: Tensor
    sin: Tensor
    past: Tensor | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        """Queries. [r] -> [1, H, r, d]"""
        return self._project("q", rows)

    def keys(self) -> Tensor:
        """Keys of what the layer holds, and of the new tokens. [1, H_kv, P + M, d]"""
        new = self._project("k", torch.arange(self.hidden.shape[1], device=self.hidden.device))
        return new if self.past is None else torch.cat([self.past, new], dim=2)

    def _project(self, which: str, rows: Tensor) -> Tensor:
        module = self.layer.self_attn
        hidden = self.layer.input_layernorm(self.hidden[:, rows])
        heads = getattr(module, f"{which}_proj")(hidden).unflatten(-1, (-1, module.head_dim))
        norm = getattr(module, f"{which}_norm", None)
        if norm is not None:
            heads = norm(heads)
        heads = heads.transpose(1, 2)
        return rotated(module, heads, self.cos[..., rows, :], self.sin[..., rows, :])


def rotates(layer: Any) -> bool:
    """Whether the rotary embedding of a decoder layer's keys can be taken back."""
    return hasattr(sys.modules[type(layer.self_attn).__module__], "apply_rotary_pos_emb")


def plain(layer: Any) -> bool:
    """Whether queries and keys of a decoder layer can be computed apart from it."""
    module = getattr(layer, "self_attn", None)
    if module is None or not all(hasattr(module, name) for name in ("q_proj", "k_proj", "head_dim", "config")):
        return False
    gated = module.q_proj.out_features != module.config.num_attention_heads * module.head_dim
    return not gated and rotates(layer)
