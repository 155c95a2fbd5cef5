"""Modality-gated LoRA: low-rank updates that visual tokens pass and text does not.

Paper: arXiv:2411.04996 (Mixture-of-Transformers: weights of its own for every modality, joint attention), reduced.
Code: facebookresearch/Mixture-of-Transformers @ 2ba51c0, which does not run as it is: nothing is taken from it.

For a projection W of the language model, A [r, in], B [out, r] with B = 0 at the start, and x of token t:

    y_t = W x_t + 1[t is visual] (alpha / r) B A x_t

Differs from the paper: there every modality has projections, feed-forward nets and norms of its own, trained from
scratch; here a trained model gets a small difference for one of them, and norms stay shared. What remains is the
point: visual tokens may be treated otherwise, text keeps its weights, all meet in the same attention and the same
cache. The update runs on the tokens it is for alone, so a generated token costs nothing. `tokens="text"` is the
other way round.

It wraps the projections of attention (q, k, v, o; of linear attention: in and out) and of dense feed-forward nets
(of mixtures: of the expert that all tokens pass). Routed experts stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from vlmfast.adapters.tuning.base import Tuner, TunerConfig, TunerLayer, register
from vlmfast.modality import Here

TOKENS = ("visual", "text")
PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
    "linear_attn": ("in_proj_qkv", "in_proj_z", "out_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
    "mlp.shared_expert": ("gate_proj", "up_proj", "down_proj"),
}


@dataclass
class VisualLoraConfig(TunerConfig):
    """Settings of modality-gated LoRA.

    r: rank. alpha: the update counts alpha / r. dropout: of what the update is given, in training. tokens: "visual" or
    "text", those that pass it.
    """

    method: ClassVar[str] = "visual_lora"

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    tokens: str = "visual"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r={self.r!r}: the rank, 1 or more")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha={self.alpha!r}: a number above 0; the update counts alpha / r")
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r}: a share from 0 to below 1")
        if self.tokens not in TOKENS:
            raise ValueError(f"tokens={self.tokens!r}: choose {' or '.join(map(repr, TOKENS))}")


class VisualLoraLayer(TunerLayer):
    """A projection with updates beside it. configs: by adapter."""

    adapter_layer_names = ("visual_lora_A", "visual_lora_B")
    other_param_names = ("configs",)

    def __init__(self, base_layer: Any, number: int | None, here: Here | None) -> None:
        super().__init__(base_layer, number, here)
        self.visual_lora_A, self.visual_lora_B = nn.ParameterDict({}), nn.ParameterDict({})
        self.configs: dict[str, VisualLoraConfig] = {}

    def update_layer(self, adapter_name: str, config: VisualLoraConfig) -> None:
        """Add an adapter."""
        base = self.get_base_layer()
        down, up = torch.empty(config.r, base.in_features), torch.zeros(base.out_features, config.r)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        self.visual_lora_A[adapter_name], self.visual_lora_B[adapter_name] = nn.Parameter(down), nn.Parameter(up)
        self.configs[adapter_name] = config
        self.finish(adapter_name, config)

    def forward(self, x: Tensor) -> Tensor:
        """[B, Q, in], or flat [B Q, in] -> [B, Q, out], as flat"""
        y: Tensor = self.base_layer(x)
        names = self.active(self.visual_lora_A)
        if not names:
            return y
        assert self.here is not None
        places = self.here.places(x)
        for name in names:
            y = self.updated(name, x, y, places)
        return y

    def updated(self, name: str, x: Tensor, y: Tensor, places: tuple[Tensor, Tensor] | None) -> Tensor:
        """The projection with an adapter's part for its tokens."""
        tokens = self.configs[name].tokens
        if places is None and tokens == "text":
            return y + self.update(name, x).to(y.dtype)
        if places is not None:
            rows = places[TOKENS.index(tokens)]
            added = self.update(name, x.flatten(0, -2)[rows])
            return y.flatten(0, -2).index_add(0, rows, added.to(y.dtype)).view_as(y)
        if self.training and torch.is_grad_enabled():  # replicas that train together expect a gradient of each
            return y + self.update(name, x.detach().flatten(0, -2)[:0]).sum().to(y.dtype)
        return y

    def update(self, name: str, x: Tensor) -> Tensor:
        """(alpha / r) B A x. [..., in] -> [..., out]"""
        config, down = self.configs[name], self.visual_lora_A[name]
        inside = linear(dropout(x.to(down.dtype), config.dropout, self.training), down)
        return linear(inside, self.visual_lora_B[name]) * (config.alpha / config.r)


class VisualLoraModel(Tuner):
    """The tuner of modality-gated LoRA."""

    prefix = "visual_lora_"
    tuner_layer_cls = VisualLoraLayer
    places = tuple(f"{inside}.{name}" for inside, names in PROJECTIONS.items() for name in names)
    sees = True

    def places_of(self, layer: nn.Module) -> Sequence[str]:
        """The projections that a layer has."""
        inside = dict(layer.named_modules())
        return [place for place in self.places if place in inside] or self.places

    def wrap(
        self, config: Any, target: nn.Module, number: int | None, here: Here | None, key: str
    ) -> TunerLayer | None:
        """ValueError for what is no projection."""
        if not hasattr(target, "in_features") or not hasattr(target, "out_features"):
            raise ValueError(f"{key}: visual_lora wraps linear layers, {type(target).__name__} is none")
        return super().wrap(config, target, number, here, key)


register("visual_lora", VisualLoraConfig, VisualLoraModel)
