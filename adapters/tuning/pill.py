"""PILL: adapter experts for visual tokens and for text, and gates on what images may say.

Paper: arXiv:2311.02126 (mixture-of-modality adapter experts, modality-attention gating).
Code: DsaltYfish/PILL @ acc7f61 (model/llm_model.py:108-131 adapter, 164-228 gate, 254-293 block, 403-405 last layer
    of the alignment stage; model/modeling_llama.py:103-114 what is trained).

In every decoder layer, for its input x [B, L, D], with a(x) = U (silu(G x) * D x), G, D [r, D], U [D, r]:

    u = norm1(x) + a_attn(norm1(x))                  q, k, v are all of u
    v_h <- gate(w_h u) v_h                           at visual tokens, for every head h; keys stay as they are
    h = x + attention
    n = norm2(h);  out = h + ff(n + e),              e = a_vis(n) at visual tokens, a_txt(n) elsewhere

Differs from the authors' code: their gate is tanh(w_h u) with w = 0 at the start, which silences all pictures: right
for a language model that never saw any, wrong for a VLM. Here it is 1 + tanh(w_h u) (`gate_init="identity"`), so that
a fresh adapter changes nothing; `gate_init="official"` is theirs. Each expert runs on its own tokens alone, where
theirs run on all and are selected from. With grouped queries there is a gate for every head that has values.

`stage="alignment"` is the authors' first stage, in which the projector learns: no gate, a_attn and a_txt frozen (at
the start they add nothing), and in the last layer the experts are exchanged: the visual one runs on text there, since
behind the last layer nothing attends to the visual tokens and it would learn nothing. `modules_to_save` names the
projector (`["multi_modal_projector"]` in LLaVA), to be trained beside it. Go on from there with
`PeftModel.from_pretrained(model, folder, config=PillConfig(r=..., modules_to_save=...), is_trainable=True)`, with the
same width and the same modules.

Layers of linear attention (Qwen3.5) get the adapters and no gate: their values leave one projection with queries and
keys and are mixed with their neighbours' before anything attends. In mixtures of experts the router sees n + e, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from vlmfast.adapters.tuning.base import Tuner, TunerConfig, TunerLayer, register
from vlmfast.families import family_of
from vlmfast.modality import Here

GATES = ("identity", "official")
STAGES = ("instruction", "alignment")
INPUT, VALUES = "input_layernorm", "self_attn.v_proj"
BEFORE_FEED_FORWARD = ("pre_feedforward_layernorm", "post_attention_layernorm")  # the first that a layer has


@dataclass
class PillConfig(TunerConfig):
    """Settings of PILL.

    r: width of the adapters. gate_init: "identity" (a fresh adapter changes nothing) or "official" (it silences
    pictures). stage: "instruction", or "alignment" before it: no gate, only the visual experts learn.
    """

    method: ClassVar[str] = "pill"

    r: int = 32
    gate_init: str = "identity"
    stage: str = "instruction"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r={self.r!r}: the width of the adapters, 1 or more")
        if self.gate_init not in GATES:
            raise ValueError(f"gate_init={self.gate_init!r}: choose {' or '.join(map(repr, GATES))}")
        if self.stage not in STAGES:
            raise ValueError(f"stage={self.stage!r}: choose {' or '.join(map(repr, STAGES))}")


class Glu(nn.Module):
    """A gated bottleneck that starts at zero: U (silu(G x) * D x)."""

    def __init__(self, width: int, r: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, r, bias=False)
        self.gate = nn.Linear(width, r, bias=False)  # as PyTorch begins
        self.up = nn.Linear(r, width, bias=False)
        nn.init.normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D] in the precision of x"""
        inside = x.to(self.down.weight.dtype)
        added: Tensor = self.up(silu(self.gate(inside)) * self.down(inside))
        return added.to(x.dtype)


def idle(module: nn.Module, x: Tensor) -> Tensor:
    """A zero that holds a module's parameters in the graph: replicas that train together expect a gradient of each.

    x: [..., D] what the module takes.
    """
    nothing: Tensor = module(x.detach().flatten(0, -2)[:0])
    return nothing.sum().to(x.dtype)


class PillLayer(TunerLayer):
    """A module with a part of PILL around it. configs: by adapter."""

    other_param_names = ("configs",)
    frozen: tuple[str, ...] = ()  # in the alignment stage

    def __init__(self, base_layer: Any, number: int | None, here: Here | None) -> None:
        super().__init__(base_layer, number, here)
        self.configs: dict[str, PillConfig] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict({}))

    def aligns(self, name: str) -> bool:
        """Whether an adapter is in the alignment stage."""
        return self.configs[name].stage == "alignment"

    @property
    def learns(self) -> bool:
        """Whether a graph is being built for training."""
        return self.training and torch.is_grad_enabled()

    def parts_of(self, config: PillConfig) -> Mapping[str, nn.Module]:
        """New modules of an adapter, by dict."""
        raise NotImplementedError(f"{type(self).__name__} does not implement parts_of")

    def update_layer(self, adapter_name: str, config: PillConfig) -> None:
        """Add an adapter."""
        self.configs[adapter_name] = config
        for name, part in self.parts_of(config).items():
            getattr(self, name)[adapter_name] = part
        self.finish(adapter_name, config)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT; what an adapter's stage freezes stays frozen."""
        super().set_adapter(adapter_names, inference_mode)
        self.freeze()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As `set_adapter`."""
        super().set_requires_grad(adapter_names, requires_grad)
        self.freeze()

    def freeze(self) -> None:
        """What adapters in the alignment stage do not train."""
        for name in filter(self.aligns, self.configs):
            for held in self.frozen:
                getattr(self, held)[name].requires_grad_(False)


class PillInput(PillLayer):
    """The norm before attention, and the adapter behind it."""

    adapter_layer_names = ("pill_attn",)
    frozen = ("pill_attn",)
    pill_attn: nn.ModuleDict

    def parts_of(self, config: PillConfig) -> Mapping[str, nn.Module]:
        """The adapter."""
        return {"pill_attn": Glu(width_of(self.get_base_layer()), config.r)}

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        normed: Tensor = self.base_layer(hidden)
        added = [self.pill_attn[name](normed) for name in self.active(self.pill_attn)]
        return sum(added, start=normed)


class PillExperts(PillLayer):
    """The norm before the feed-forward net, and the experts behind it. last: in the last layer."""

    adapter_layer_names = ("pill_visual", "pill_text")
    frozen = ("pill_text",)
    pill_visual: nn.ModuleDict
    pill_text: nn.ModuleDict

    def __init__(self, base_layer: Any, number: int | None, here: Here | None, last: bool) -> None:
        super().__init__(base_layer, number, here)
        self.last = last

    def parts_of(self, config: PillConfig) -> Mapping[str, nn.Module]:
        """The experts."""
        width = width_of(self.get_base_layer())
        return {name: Glu(width, config.r) for name in self.adapter_layer_names}

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, Q, D] -> [B, Q, D]"""
        normed: Tensor = self.base_layer(hidden)
        names = self.active(self.pill_visual)
        if not names:
            return normed
        assert self.here is not None
        places = self.here.places(normed)
        return sum((self.added(name, normed, places) for name in names), start=normed)

    def added(self, name: str, normed: Tensor, places: tuple[Tensor, Tensor] | None) -> Tensor:
        """What an adapter's experts add. [B, Q, D] -> [B, Q, D]"""
        visual, text = self.pill_visual[name], self.pill_text[name]
        if self.last and self.aligns(name):
            visual, text = text, visual
        if places is None:
            added: Tensor = text(normed)
            return added + idle(visual, normed) if self.learns else added
        flat, (at_visual, at_text) = normed.flatten(0, -2), places
        added = flat.new_empty(flat.shape).index_copy_(0, at_visual, visual(flat[at_visual]))
        return added.index_copy_(0, at_text, text(flat[at_text])).view_as(normed)


class PillGate(PillLayer):
    """The projection to the values, gated at visual tokens by what it is given. heads: that have values."""

    adapter_layer_names = ("pill_gate",)
    frozen = ("pill_gate",)
    pill_gate: nn.ModuleDict

    def __init__(self, base_layer: Any, number: int | None, here: Here | None, heads: int) -> None:
        super().__init__(base_layer, number, here)
        self.heads = heads

    def parts_of(self, config: PillConfig) -> Mapping[str, nn.Module]:
        """The gate, shut in the authors' form and open in ours."""
        gate = nn.Linear(self.get_base_layer().in_features, self.heads, bias=False)
        nn.init.zeros_(gate.weight)
        return {"pill_gate": gate}

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, Q, D] -> [B, Q, H d]"""
        values: Tensor = self.base_layer(hidden)
        names = [name for name in self.active(self.pill_gate) if not self.aligns(name)]
        if not names:
            return values
        assert self.here is not None
        places = self.here.places(hidden)
        if places is None:
            return sum((idle(self.pill_gate[name], hidden) for name in names if self.learns), start=values)
        flat, at_visual = values.flatten(0, -2), places[0]
        told, gated = hidden.flatten(0, -2)[at_visual], flat[at_visual].unflatten(-1, (self.heads, -1))
        for name in names:
            gated = gated * self.gate(name, told)[..., None].to(gated.dtype)
        return flat.index_copy(0, at_visual, gated.flatten(1)).view_as(values)

    def gate(self, name: str, hidden: Tensor) -> Tensor:
        """What an adapter multiplies the values with. [V, D] -> [V, H]"""
        linear: Any = self.pill_gate[name]
        opened = torch.tanh(linear(hidden.to(linear.weight.dtype)))
        return 1 + opened if self.configs[name].gate_init == "identity" else opened


def width_of(norm: Any) -> int:
    """The width of what a norm gives."""
    return int(norm.weight.shape[0])


def before_feed_forward(layer: nn.Module) -> str | None:
    """The name of the norm whose output the feed-forward net of a decoder layer is given."""
    return next((name for name in BEFORE_FEED_FORWARD if hasattr(layer, name)), None)


class PillModel(Tuner):
    """The tuner of PILL."""

    prefix = "pill_"
    tuner_layer_cls = PillLayer
    places = (INPUT, BEFORE_FEED_FORWARD[-1], VALUES)
    sees = True

    def places_of(self, layer: nn.Module) -> Sequence[str]:
        """The two norms, and the projection to the values where the layer has attention.

        NotImplementedError for a family or a decoder in which they are not found.
        """
        family = family_of(self.model)
        norm, attention = before_feed_forward(layer), getattr(layer, "self_attn", None)
        if norm is None or not hasattr(layer, INPUT) or attention is not None and not hasattr(attention, "v_proj"):
            raise NotImplementedError(
                f"PILL wraps {INPUT}, {' or '.join(BEFORE_FEED_FORWARD)}, and {VALUES}; the decoder layers of this "
                f"{family.name} ({type(layer).__name__}) have other ones. It works with decoders like Llama's, "
                "Mistral's, Qwen's and Gemma's"
            )
        return INPUT, norm, VALUES

    def wrap(self, config: Any, target: nn.Module, number: int | None, here: Here | None, key: str) -> TunerLayer:
        """The part of PILL for a module. ValueError where it has none."""
        assert number is not None
        layers = self.model.get_decoder().layers
        layer, place = layers[number], key.partition(f"layers.{number}.")[2]
        if place == INPUT:
            return PillInput(target, number, here)
        if place == VALUES:
            return PillGate(target, number, here, self.heads(layer.self_attn))
        if place == before_feed_forward(layer):
            return PillExperts(target, number, here, last=number == len(layers) - 1)
        raise ValueError(f"{key}: PILL wraps {', '.join(self.places_of(layer))} alone")

    @staticmethod
    def heads(attention: Any) -> int:
        """Heads with values of their own."""
        return int(attention.v_proj.out_features // attention.head_dim)


register("pill", PillConfig, PillModel)
