"""SliME's mixture of adapters: a projector that also looks at each visual token's whole view.

Paper: Beyond LLaVA-HD: Diving into High-Resolution Large Multimodal Models (Zhang et al. 2024), arXiv:2406.08487
Code:  https://github.com/yfzhang114/SliME (5c89ec9; llava/model/multimodal_projector/builder.py:38-209,
    llava/model/multimodal_resampler/sampler.py:91-173)

    y = g_0 E(x) + g_1 E(R(x))           E: the model's own projector, frozen, in both experts;  x [V, N, C] a view
    g = softmax(x W_g + e * (softplus(x W_n) + 0.01)),  g <- g / (sum g + 1e-6)         e ~ N(0, 1) while training
    R(x) = LN(MHA(LN(Q) + p, LN(x) + p, LN(x)))         Q [N, C] learned queries, p their sin-cos places, C / 128 heads

V views (images, crops or frames), N tokens a view, C width of the tower's features (side by side where the projector
takes several layers). R's tokens stand in the order of the queries' grid, so the experts mix token by token.
Parameters: N C + 4 C^2 and a little. fp32, computed in fp32; E stays in the model's precision.

`gate_init="official"` starts with W_g = 0, the mean of both experts, for a projector that is pre-trained this way.
"identity", the default, is for a model that exists: y = E(x) + s g_1 (E(R(x)) - E(x)) with s = 0 at first, learned;
s = 1 is the paper's.

Any square view: where N is not the number of queries (`num_queries`, by default the patches of a view), queries and
places are resized bicubically to the view's grid, as the authors do with places. A CLS token in front of a square is
projected by E alone. Views that are no square are refused.

Families: those whose projector maps the tower's tokens one by one (`Family.projector`); the other families merge
tokens in it. Methods that project tokens by themselves (VisionZip) are refused: R sees whole views.

Text alone never reaches the projector: its parameters get gradients of zero then, so that distributed training waits
for nobody.

Differs from the authors' code:
- W_n is trained; theirs is made and never used, the noise's scale comes from W_g (`parity="official"`);
- other N than the queries: see above; theirs is E alone then (`parity="official"`);
- E is frozen: their first stage trains it alone, which any tuner of linear layers does;
- their local resampler is the same R with fewer queries than tokens, for crops; it would change the number of visual
  tokens, which pruning is for. Load and balance of the gates are computed there and dropped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, scaled_dot_product_attention, softplus

from vlmfast.adapters.tuning.base import Tuner, TunerConfig, TunerLayer, register
from vlmfast.families import FAMILIES, family_of
from vlmfast.families.base import follow
from vlmfast.modality import Here
from vlmfast.patching import Patch

SLIME = "vlmfast_slime"  # attribute of a model: the Patch of its hook
HEAD = 128  # width of a head of R


@dataclass
class SlimeConfig(TunerConfig):
    """Settings of SliME's mixture of adapters.

    num_queries: a square number, None: the patches of a view. num_heads: of R, None: one for every 128 of the width.
    gate_init: "identity", the model as it was, or "official", both experts alike. noise: in the gates while training.
    parity: "official": the authors' noise, and the projector alone for views of other size.
    """

    method: ClassVar[str] = "slime"

    num_queries: int | None = None
    num_heads: int | None = None
    gate_init: str = "identity"
    noise: bool = True
    parity: str = "repaired"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_queries is not None and (self.num_queries < 1 or not square(self.num_queries)):
            raise ValueError(f"num_queries={self.num_queries}: a square number")
        if self.num_heads is not None and self.num_heads < 1:
            raise ValueError(f"num_heads={self.num_heads}: 1 or more")
        if self.gate_init not in ("identity", "official"):
            raise ValueError(f"gate_init={self.gate_init!r}: choose 'identity' or 'official'")
        if self.parity not in ("repaired", "official"):
            raise ValueError(f"parity={self.parity!r}: choose 'repaired' or 'official'")

    def heads(self, width: int) -> int:
        """Of R over a tower of this width. ValueError where they do not divide it."""
        heads = self.num_heads or max(1, width // HEAD)
        if width % heads or width % 4:
            raise ValueError(f"num_heads={heads} does not divide the tower's width of {width}; choose one that does")
        return heads


def square(number: int) -> bool:
    """Whether a number is one."""
    return math.isqrt(number) ** 2 == number


@functools.cache
def places(side: int, width: int) -> Tensor:
    """Sines and cosines of column and row, in half precision as the authors store them. -> fp32 [side^2, width]"""
    frequency = 10000.0 ** -(torch.arange(width // 4) / (width / 4.0))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [axis.flatten().float()[:, None] * frequency for axis in (column, row)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).half().float()


def resized(values: Tensor, side: int) -> Tensor:
    """Values of a square grid, bicubically to another one. [n, C] -> [side^2, C]"""
    own = math.isqrt(len(values))
    if own == side:
        return values
    grid = values.T.reshape(1, -1, own, own)
    return interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)[0].flatten(1).T


class Resampler(nn.Module):
    """R: learned queries that attend to the tokens of a view."""

    def __init__(self, width: int, queries: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, width))
        self.heads = heads
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)  # q, k and v on one another
        self.query_norm, self.view_norm, self.norm = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        nn.init.trunc_normal_(self.queries, std=0.02)
        nn.init.xavier_uniform_(self.inward.weight)
        nn.init.trunc_normal_(self.outward.weight, std=0.02)
        nn.init.zeros_(self.inward.bias)
        nn.init.zeros_(self.outward.bias)

    def places(self) -> Tensor:
        """p of the queries' own grid. -> fp32 [n, C]"""
        return places(math.isqrt(len(self.queries)), self.queries.shape[1])

    def forward(self, view: Tensor) -> Tensor:
        """[V, N, C] -> [V, N, C], N a square number"""
        side = math.isqrt(view.shape[1])
        place = resized(self.places().to(view), side)
        query = self.query_norm(resized(self.queries, side)) + place
        value = self.view_norm(view)
        weights, biases = self.inward.weight.chunk(3), self.inward.bias.chunk(3)
        q, k, v = (
            linear(given, weight, bias).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for given, weight, bias in zip((query[None], value + place, value), weights, biases)
        )
        seen = scaled_dot_product_attention(q.expand_as(k), k, v).transpose(-2, -3).flatten(-2)
        return self.norm(self.outward(seen))


class Mixture(nn.Module):
    """The gates, and the expert that the model has not."""

    def __init__(self, width: int, config: SlimeConfig) -> None:
        super().__init__()
        assert config.num_queries is not None
        self.resampler = Resampler(width, config.num_queries, config.heads(width))
        self.gate = nn.Parameter(torch.zeros(width, 2))
        self.spread = None if config.parity == "official" else nn.Parameter(torch.zeros(width, 2))
        self.strength = nn.Parameter(torch.zeros(())) if config.gate_init == "identity" else None
        self.noise, self.official = config.noise, config.parity == "official"

    def gates(self, view: Tensor) -> Tensor:
        """Weights of the projector alone, and behind R. [V, N, C] -> fp32 [V, N, 2]"""
        view = view.float()
        logits = view @ self.gate.float()
        if self.training and self.noise:
            spread = self.gate if self.spread is None else self.spread
            logits = logits + torch.randn_like(logits) * (softplus(view @ spread.float()) + 0.01)
        gates = logits.softmax(-1)
        return gates / (gates.sum(-1, keepdim=True) + 1e-6)

    def forward(self, view: Tensor, plain: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
        """view: [V, N, C] -> [V, N, D]. plain: the same projected, [V, N, D]

        NotImplementedError for views that are no square.
        """
        if view.ndim != 3:
            raise NotImplementedError(
                "SliME's projector looks at whole views, [V, N, C]: a method that projects tokens by itself "
                "(visionzip) needs the adapter off"
            )
        n = view.shape[1]
        if self.official and n != len(self.resampler.queries):
            return plain
        first = 0 if square(n) else 1  # CLS
        if not square(n - first):
            raise NotImplementedError(f"SliME mixes square views, with or without CLS; this one has {n} tokens")
        own, tokens = plain[:, first:].float(), view[:, first:]
        gates = self.gates(tokens)
        other = project(self.resampler(tokens.to(self.resampler.queries.dtype)).to(view.dtype)).float()
        if self.strength is None:
            mixed = gates[..., :1] * own + gates[..., 1:] * other
        else:
            mixed = own + self.strength.float() * gates[..., 1:] * (other - own)
        return torch.cat([plain[:, :first], mixed.to(plain.dtype)], dim=1)


def width_into(projector: nn.Module) -> int:
    """C of the features that a projector takes."""
    return next(int(part.in_features) for part in projector.modules() if isinstance(part, nn.Linear))


class SlimeLayer(TunerLayer):
    """A projector with mixtures around it."""

    adapter_layer_names = ("slime_mixture",)

    def __init__(self, base_layer: nn.Module, number: int | None, here: Here | None) -> None:
        super().__init__(base_layer, number, here)
        self.slime_mixture = nn.ModuleDict()
        self.width = width_into(base_layer)

    def update_layer(self, adapter_name: str, config: SlimeConfig) -> None:
        """Add an adapter."""
        self.slime_mixture[adapter_name] = Mixture(self.width, config)
        self.finish(adapter_name, config)

    def forward(self, view: Tensor) -> Tensor:
        """[V, N, C] -> [V, N, D]"""
        projected: Tensor = self.base_layer(view)
        for name in self.active(self.slime_mixture):
            projected = self.slime_mixture[name](view, projected, self.base_layer)
        return projected

    def touch(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Pre-hook of the decoder: parameters that no picture came to get gradients of zero."""
        embeds = kwargs.get("inputs_embeds")
        names = self.active(self.slime_mixture) if embeds is not None and torch.is_grad_enabled() else []
        held = [one for name in names for one in self.slime_mixture[name].parameters() if one.requires_grad]
        if not held:
            return args, kwargs
        nothing: Any = torch.stack([one.flatten()[0] for one in held]).sum() * 0
        return args, {**kwargs, "inputs_embeds": embeds + nothing.to(embeds)}


class SlimeModel(Tuner):
    """The tuner of SliME's mixture of adapters."""

    prefix = "slime_"
    tuner_layer_cls = SlimeLayer

    def _prepare_adapter_config(self, peft_config: SlimeConfig, model_config: dict[str, Any]) -> SlimeConfig:
        """The family's projector, and as many queries as a view has patches."""
        if peft_config.layers_to_transform is not None or peft_config.target_modules not in (
            None,
            self.expression(None),  # as saved before
        ):
            raise ValueError("SliME wraps the projector: leave target_modules and layers_to_transform out")
        config: SlimeConfig = super()._prepare_adapter_config(peft_config, model_config)
        config.heads(width_into(self.model.get_submodule(str(config.target_modules))))
        if config.num_queries is None:
            vision = self.model.config.vision_config
            config.num_queries = (vision.image_size // vision.patch_size) ** 2
        return config

    def expression(self, layers: Sequence[int] | int | None) -> str:
        """The name of the projector. NotImplementedError for a family that has none of this kind."""
        family = family_of(self.model)
        if family.projector is None:
            having = ", ".join(name for name, one in FAMILIES.items() if one.projector is not None)
            raise NotImplementedError(
                f"SliME wraps a projector that maps the tower's tokens one by one, which {family.name} has not; "
                f"these have one: {having}"
            )
        projector = follow(Patch(self.model).base, family.projector)
        return next(name for name, module in self.model.named_modules() if module is projector)

    def wrap(
        self, config: SlimeConfig, target: nn.Module, number: int | None, here: Here | None, key: str
    ) -> SlimeLayer:
        """Around the projector; the model's decoder hears of it."""
        layer, patch = SlimeLayer(target, number, here), Patch(self.model)
        patch.hook(self.model.get_decoder(), layer.touch, before=True, first=False)
        patch.set(self.model, SLIME, patch)
        return layer

    def forget(self) -> None:
        """Take the hook away."""
        super().forget()
        if (patch := self.model.__dict__.get(SLIME)) is not None:
            patch.close()


register("slime", SlimeConfig, SlimeModel)
