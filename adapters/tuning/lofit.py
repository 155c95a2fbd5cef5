"""LoFiT: localised fine-tuning of the outputs of a few attention heads.

Paper: LoFiT: Localized Fine-tuning on LLM Representations (Yin, Ye & Durrett, NeurIPS 2024), arXiv:2406.01563
Code:  https://github.com/fc2869/lo-fit (ebd344a; models/modeling_llama.py:236-383, lofit_trainer.py:295-317,
    utils/trainers.py:28-64)

    z_i <- (1 + A_i) * z_i + v_i         z_i [d]: what query head i sends into the output projection, at every token

    stage 1  A of all heads by  loss + l1_lambda sum |A|;  the K heads of the whole model with the largest ||A_i||_2
    stage 2  the model as it was, v of these K heads alone                              (K = 10 % of the heads)

`two_stages` runs both, around your own training; `select_heads` ranks, `LofitTrainer` adds the L1 term. Shapes: z
[B, Q, H d]; A, v [K_l, d] of the K_l chosen heads of layer l, initially N(0, init_std^2). Grouped-query attention has
one of each for every query head. Parameters: K d. They are fp32 and the affine map is computed in fp32.

What z is where attention gates its output (Qwen3.5: z = sigmoid(g) * softmax(q k^T) V): behind the gate. Head i's part
of the residual stream is W_o,i z_i, so v_i is the constant offset of the paper and not one that the gate of each token
scales, and merging stays exact; for A, gate and factor commute. Layers of linear attention have no such heads.

The language model alone, never the tower; every token, visual ones too. `positions="text"` (not in the paper) leaves
visual tokens as they are, on the families that vlmfast knows.

Merging: W_o <- W_o diag(1 + a), bias <- bias + W_o b. Undone from the W_o of before, therefore exactly and for A = -1,
too. Most decoders make W_o without a bias: after merge_and_unload with v the model has one that its class does not
know, and `save_pretrained` refuses, because what is loaded back would silently lack it.

Differs from the authors' code: A and v in fp32 (theirs: the model's precision); the L1 term counts LoFiT's parameters
alone (theirs: whatever requires a gradient) and is no part of the loss of an evaluation; equal norms go by layer and
head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftModel, get_peft_model
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from vlmfast.adapters.tuning.base import Tuner, TunerConfig, TunerLayer, register
from vlmfast.modality import Here

COMPONENTS, POSITIONS = ("A", "v", "both"), ("all", "text")


@dataclass
class LofitConfig(TunerConfig):
    """Settings of LoFiT.

    component: what is trained: "A", "v" or "both". heads: {"layer": [heads]} (`select_heads` makes it), None: all.
    init_std: of the first values; 0 starts from the model as it is. l1_lambda: weight of the L1 term, which
    `LofitTrainer` adds; the paper's stage 1 takes 5e-4 or 1e-3. positions: "all" tokens, or "text" alone.
    """

    method: ClassVar[str] = "lofit"

    component: str = "both"
    heads: dict[str, list[int]] | None = None
    init_std: float = 1e-3
    l1_lambda: float = 0.0
    positions: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.component not in COMPONENTS:
            raise ValueError(f"component={self.component!r}: choose 'A', 'v' or 'both'")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions={self.positions!r}: choose 'all' or 'text'")
        for name in ("init_std", "l1_lambda"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)!r}: a number, 0 or more")
        if self.heads is not None:
            self.heads = checked(self.heads)
            if self.layers_to_transform is not None:
                raise ValueError("heads names the layers: leave layers_to_transform out")

    @property
    def components(self) -> tuple[str, ...]:
        """Of "A" and "v", those that are trained."""
        return ("A", "v") if self.component == "both" else (self.component,)

    def heads_of(self, layer: int | None, count: int) -> list[int]:
        """The chosen heads of a layer that has `count`."""
        return list(range(count)) if self.heads is None else self.heads.get(str(layer), [])


def checked(heads: Mapping[Any, Any]) -> dict[str, list[int]]:
    """Heads by layer as a config file holds them: layers and heads ascending. ValueError for anything else."""
    found: dict[str, list[int]] = {}
    try:
        for layer, numbers in sorted((int(layer), sorted(map(int, numbers))) for layer, numbers in heads.items()):
            if layer < 0 or any(head < 0 for head in numbers) or len(set(numbers)) < len(numbers):
                raise ValueError(f"layer {layer}: {numbers}")
            if numbers:
                found[str(layer)] = numbers
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f'heads={heads!r}: {{"layer": [heads]}}, every head once, counted from 0') from error
    if not found:
        raise ValueError("heads names no head; None means all")
    return found


class LofitLayer(TunerLayer):
    """An output projection W_o that takes (1 + A) * z + v. heads: how many it takes z of."""

    adapter_layer_names = ("lofit_A", "lofit_v")
    other_param_names = ("lofit_heads", "lofit_positions")

    def __init__(self, base_layer: nn.Module, number: int | None, here: Here | None, heads: int) -> None:
        super().__init__(base_layer, number, here)
        self.heads = heads
        self.lofit_A, self.lofit_v = nn.ParameterDict(), nn.ParameterDict()
        self.lofit_heads = BufferDict({}, persistent=False)  # those chosen, ascending
        self.lofit_positions: dict[str, str] = {}
        self.before: tuple[Tensor, Tensor | None] | None = None  # weight and bias of before merging

    def update_layer(self, adapter_name: str, config: LofitConfig) -> None:
        """Add an adapter, where it has heads here."""
        chosen = config.heads_of(self.number, self.heads)
        if not chosen:
            return
        device = next(self.get_base_layer().parameters()).device
        self.lofit_heads[adapter_name] = torch.tensor(chosen, device=None if device.type == "meta" else device)
        self.lofit_positions[adapter_name] = config.positions
        for component in config.components:
            first = torch.randn(len(chosen), self.in_features // self.heads) * config.init_std
            getattr(self, f"lofit_{component}")[adapter_name] = nn.Parameter(first)
        self.finish(adapter_name, config)

    def spread(self, name: str, component: str) -> Tensor | None:
        """A or v of all heads, 0 for those not chosen; None where the adapter has none of it. [K, d] -> fp32 [H d]"""
        held = getattr(self, f"lofit_{component}")
        if name not in held:
            return None
        values: Tensor = held[name].float()
        if len(values) == self.heads:
            return values.flatten()
        return values.new_zeros(self.heads, values.shape[1]).index_copy(0, self.lofit_heads[name], values).flatten()

    def affine(self, name: str, z: Tensor) -> Tensor:
        """What one adapter makes of z. [B, Q, H d] -> fp32 of the same shape"""
        factor, offset = self.spread(name, "A"), self.spread(name, "v")
        moved = z.float() if factor is None else (1 + factor) * z
        moved = moved if offset is None else moved + offset
        if self.lofit_positions[name] == "text" and self.here is not None:
            visual = self.here.visual(z)
            return moved if visual is None else torch.where(visual[..., None], z, moved)
        return moved

    def forward(self, z: Tensor) -> Tensor:
        """[B, Q, H d] -> [B, Q, D]"""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.merged else self.active(self.lofit_heads)
        moved = z
        for name in names:
            moved = self.affine(name, moved)
        return self.base_layer(moved.to(z.dtype))

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """NotImplementedError for adapters that act on text alone, and on weights that are no plain matrix."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in wanted if name in self.lofit_heads]
        if any(self.lofit_positions[name] == "text" for name in names):
            raise NotImplementedError('LoFiT with positions="text" cannot be merged: weights act on every token')
        base = self.base_layer
        plain = isinstance(base, nn.Linear) and not isinstance(base, BaseTunerLayer)
        if names and not (plain and base.weight.is_floating_point() and base.weight.ndim == 2):
            raise NotImplementedError(
                f"LoFiT cannot be merged into {type(base).__name__}: quantised weights, and layers that another "
                "tuner wraps, stay beside their adapter"
            )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into W_o and its bias, which is made where there was none, once each.

        adapter_names: None: the active ones. ValueError: safe_merge met NaN.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in wanted if name in self.lofit_heads and name not in self.merged_adapters]
        self.check_merge(names)
        if not names:
            return
        base = self.base_layer
        weight, bias = self.before or (base.weight.data, None if base.bias is None else base.bias.data)
        scale, shift = torch.ones(self.in_features, device=weight.device), None
        for name in (*self.merged_adapters, *names):  # one after the other, as they act
            factor, offset = self.spread(name, "A"), self.spread(name, "v")
            if factor is not None:
                scale = scale * (1 + factor.detach())
                shift = None if shift is None else shift * (1 + factor.detach())
            if offset is not None:
                shift = offset.detach() if shift is None else shift + offset.detach()
        merged = (weight.float() * scale).to(weight.dtype)
        added = None if shift is None else (weight.float() @ shift + (0 if bias is None else bias.float()))
        if safe_merge and not all(bool(one.isfinite().all()) for one in (merged, added) if one is not None):
            raise ValueError(f"merging {', '.join(names)} makes NaN or infinite weights")
        self.before = (weight, bias)
        base.weight.data = merged
        if added is not None:
            base.bias = nn.Parameter(added.to(weight.dtype), requires_grad=False)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """The weights as they were, bit for bit."""
        if self.before is not None:
            weight, bias = self.before
            now = self.base_layer.weight  # the model may have moved since
            self.base_layer.bias = None if bias is None else nn.Parameter(bias.to(now), requires_grad=False)
            now.data = weight.to(now)
            self.before, self.merged_adapters = None, []

    @property
    def made_bias(self) -> bool:
        """Whether merging gave W_o a bias that it had not."""
        return self.before is not None and self.before[1] is None and self.base_layer.bias is not None


@dataclass
class RefuseSave:
    """Stands for `save_pretrained` of a merged model whose saved copy would lose something."""

    kind: str
    count: int

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """RuntimeError."""
        raise RuntimeError(
            f"merging LoFiT gave {self.count} output projections of this {self.kind} a bias, which the model's class "
            "does not know: a copy saved here would lose it silently when it is loaded. Save the adapter instead "
            "(save_pretrained of the PEFT model, before merging), or merge one with component='A'"
        )


class LofitModel(Tuner):
    """The tuner of LoFiT."""

    prefix = "lofit_"
    tuner_layer_cls = LofitLayer
    places = ("self_attn.o_proj",)

    def told(self, config: LofitConfig) -> bool:
        """Where visual tokens stay as they are."""
        return config.positions == "text"

    def _prepare_adapter_config(self, peft_config: LofitConfig, model_config: dict[str, Any]) -> LofitConfig:
        """The layers of the heads, all of them there."""
        if peft_config.heads is not None and peft_config.target_modules is None:
            peft_config.target_modules = self.expression([int(layer) for layer in peft_config.heads])
        config: LofitConfig = super()._prepare_adapter_config(peft_config, model_config)
        if config.heads is None:
            return config
        counts = {
            self.layer_of(key): self.count(key, module)
            for key, module in list(self.model.named_modules())
            if self._check_target_module_exists(config, key)
        }
        for layer, heads in config.heads.items():
            if int(layer) not in counts:
                raise ValueError(f"heads: layer {layer} is none of those that target_modules names")
            if heads[-1] >= counts[int(layer)]:
                raise ValueError(f"heads: layer {layer} has heads 0 to {counts[int(layer)] - 1}, not {heads[-1]}")
        return config

    def wrap(
        self, config: LofitConfig, target: nn.Module, number: int | None, here: Here | None, key: str
    ) -> LofitLayer | None:
        """Around an output projection, where heads of it were chosen."""
        count = self.count(key, target)
        return LofitLayer(target, number, here, count) if config.heads_of(number, count) else None

    def count(self, key: str, target: nn.Module) -> int:
        """The heads whose outputs a module takes. TypeError where it is no linear layer."""
        if not hasattr(target, "in_features"):
            raise TypeError(
                f"LoFiT wraps the linear layer that attention heads send their outputs to, not {key}, "
                f"a {type(target).__name__}"
            )
        return heads_into(self.model, self.model.get_submodule(key.rpartition(".")[0]), target)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        layers = [layer for layer in self.model.modules() if isinstance(layer, LofitLayer)]
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        made = sum(layer.made_bias for layer in layers)
        if made:
            model.__dict__["save_pretrained"] = RefuseSave(type(model).__name__, made)
        return model


def heads_into(model: Any, attention: nn.Module, projection: Any) -> int:
    """How many heads of d values an output projection takes."""
    width = getattr(attention, "head_dim", None)
    if isinstance(width, int):
        return int(projection.in_features) // width
    return int(model.config.get_text_config().num_attention_heads)


def num_heads(model: Any) -> dict[str, int]:
    """Query heads of every decoder layer that has some, {"layer": H}. model: with or without adapters."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        str(number): heads_into(plain, layer.self_attn, layer.self_attn.o_proj)
        for number, layer in enumerate(plain.get_decoder().layers)
        if hasattr(getattr(layer, "self_attn", None), "o_proj")
    }


# --- which heads, and the L1 term ----------------------------------------------------------------------------------


def lofit_layers(model: nn.Module) -> Iterator[LofitLayer]:
    """All of a model, in the order of its layers. ValueError where there is none."""
    found = [layer for layer in model.modules() if isinstance(layer, LofitLayer)]
    if not found:
        raise ValueError(f"this {type(model).__name__} has no LoFiT adapter: get_peft_model(model, LofitConfig())")
    return iter(found)


def head_norms(factors: Tensor) -> Tensor:
    """||A_i||_2 of heads. [..., H, d] -> double [..., H]"""
    return factors.detach().double().norm(dim=-1)


def strongest(norms: Tensor, k: int) -> Tensor:
    """Indices of the k largest, largest first; equal ones in order. [n] -> [k]"""
    return norms.sort(descending=True, stable=True).indices[:k]


def select_heads(model: nn.Module, k: int | None = None, adapter_name: str = "default") -> dict[str, list[int]]:
    """The k heads of the whole model with the largest ||A||_2, for `LofitConfig(heads=...)`.

    k: None: 10 % of the adapter's heads. ValueError for an adapter without A, and for a k that is not among its heads.
    """
    places: list[tuple[int | None, int]] = []
    norms: list[Tensor] = []
    for layer in lofit_layers(model):
        if adapter_name in layer.lofit_A:
            places += [(layer.number, int(head)) for head in layer.lofit_heads[adapter_name]]
            norms.append(head_norms(layer.lofit_A[adapter_name]).cpu())
    if not norms:
        raise ValueError(f"no LoFiT adapter {adapter_name!r} with component 'A' or 'both' to rank heads by")
    k = max(1, len(places) // 10) if k is None else k
    if not 1 <= k <= len(places):
        raise ValueError(f"k={k}: a number of heads from 1 to {len(places)}")
    found: dict[Any, list[int]] = {}
    for index in strongest(torch.cat(norms), k).tolist():
        layer_number, head = places[index]
        found.setdefault(layer_number, []).append(head)
    return checked(found)


def penalty(model: nn.Module, adapter_name: str | None = None) -> Tensor:
    """Sum of the absolute values of LoFiT's parameters that are trained, 0-d; of one adapter, None: of all."""
    total: Any = 0.0
    for layer in lofit_layers(model):
        for held in (layer.lofit_A, layer.lofit_v):
            for name, values in held.items():
                if values.requires_grad and adapter_name in (None, name):
                    part = values.abs().sum()
                    total = part + (total.to(part.device) if isinstance(total, Tensor) else total)
    return torch.as_tensor(total)


class LofitTrainer:
    """Mixin: l1_lambda times the L1 term joins the loss of every training step.

    class MyTrainer(LofitTrainer, transformers.Trainer): ...
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As the Trainer's, whose arguments these are."""
        trainer: Any = self
        result = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if not model.training:
            return result
        plain = trainer.accelerator.unwrap_model(model)
        extra: Any = 0.0
        for name, config in plain.peft_config.items():
            if isinstance(config, LofitConfig) and config.l1_lambda:
                extra = extra + config.l1_lambda * penalty(plain, name)
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:  # as Trainer.training_step decides
            scaled = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = scaled or trainer.compute_loss_func is not None
        if scaled:  # the steps of an accumulated batch are summed up as they are: one penalty for all of them
            extra = extra / trainer.current_gradient_accumulation_steps
        if not return_outputs:
            return result + extra
        loss, outputs = result
        return loss + extra, outputs


def two_stages(
    model: Any,
    train: Callable[[PeftModel, int], Any],
    *,
    k: int | None = None,
    l1_lambda: float = 5e-4,
    init_std: float = 1e-3,
    positions: str = "all",
    heads: dict[str, list[int]] | None = None,
    adapter_name: str = "default",
) -> PeftModel:
    """LoFiT as in the paper: train A of all heads, take the k strongest, train v of these from the model as it was.

    model: a transformers model, whose weights stay as they are; after an error it is without adapters. train: trains a
    PEFT model in place, told the stage, 1 or 2; the paper's learning rates are 5e-3 and 1e-2 (Llama-2-7B). Stage 1 has
    an L1 term: use a Trainer with `LofitTrainer`. k: None: 10 % of the heads. heads: those of an earlier stage 1,
    which is skipped then. -> the model of stage 2, whose config holds the heads.
    """
    if heads is None:
        config = LofitConfig(component="A", l1_lambda=l1_lambda, init_std=init_std, positions=positions)
        first = get_peft_model(model, config, adapter_name=adapter_name)
        try:
            train(first, 1)
            heads = select_heads(first, k, adapter_name)
        finally:
            model = first.unload()
    second = get_peft_model(
        model,
        LofitConfig(component="v", heads=heads, init_std=init_std, positions=positions),
        adapter_name=adapter_name,
    )
    try:
        train(second, 2)
    except BaseException:
        second.unload()
        raise
    return second


register("lofit", LofitConfig, LofitModel)
