"""LoFiT: localised fine-tuning of the outputs of a few attention heads.

Paper: arXiv:2406.01563. Code: fc2869/lo-fit @ ebd344a (models/modeling_llama.py:236-383, lofit_trainer.py:295-317).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmfast.adapters.tuning.base import Tuner, TunerConfig, TunerLayer, register


@dataclass
class LofitConfig(TunerConfig):
    """Settings of LoFiT."""

    method: ClassVar[str] = "lofit"

    component: str = "both"
    init_std: float = field(default=1e-3)


class LofitLayer(TunerLayer):
    """An output projection that takes (1 + A) * z + v."""

    adapter_layer_names = ("lofit_A", "lofit_v")

    def __init__(self, base_layer: nn.Module, number: int | None, here: Any) -> None:
        super().__init__(base_layer, number, here)
        self.lofit_A, self.lofit_v = nn.ParameterDict(), nn.ParameterDict()

    def update_layer(self, adapter_name: str, config: LofitConfig) -> None:
        """Add an adapter."""
        width = self.base_layer.in_features
        self.lofit_A[adapter_name] = nn.Parameter(torch.randn(width) * config.init_std)
        self.lofit_v[adapter_name] = nn.Parameter(torch.randn(width) * config.init_std)
        self.finish(adapter_name, config)

    def forward(self, z: Tensor) -> Tensor:
        """[..., H d] -> [..., D]"""
        for name in self.active(self.lofit_A):
            z = ((1 + self.lofit_A[name]) * z + self.lofit_v[name]).to(z.dtype)
        return self.base_layer(z)


class LofitModel(Tuner):
    """The tuner of LoFiT."""

    prefix = "lofit_"
    tuner_layer_cls = LofitLayer
    places = ("self_attn.o_proj",)


register("lofit", LofitConfig, LofitModel)
