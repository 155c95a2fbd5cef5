"""Base of the tuners: third-party methods of PEFT that know where a VLM's language model is.

A tuner of ours is an ordinary one for its user: `get_peft_model(model, Config())`, `PeftModel.from_pretrained`,
several adapters, disable, delete, Trainer. Importing `vlmfast.adapters.tuning` makes PEFT know them; do so before you
load one of their adapters.

PEFT keeps its methods in a closed enum without an entry point. `register` adds a member at run time, which is private
to CPython's enum: tests/test_tuning_base.py watches over it.

Adapters are made in fp32 and stay so under a model in half precision, whatever PEFT's `autocast_adapter_dtype` says:
their forward computes in fp32 and returns what the model computes in. Small steps would be rounded away otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import nn

from vlmfast.modality import MODALITIES, Here, Modalities


def register(name: str, config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Make PEFT know a method. Safe to call twice.

    RuntimeError where PEFT has a method of this name that is not ours.
    """
    upper = name.upper()
    if upper not in PeftType.__members__:
        member = str.__new__(PeftType, upper)
        member._name_, member._value_, member.__objclass__ = upper, upper, PeftType
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(upper)
        PeftType._member_map_[upper] = member
        PeftType._value2member_map_[upper] = member
        type.__setattr__(PeftType, upper, member)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[upper])
    if known is config:
        return
    if known is not None:
        raise RuntimeError(
            f"PEFT has a method {name!r} of its own ({known.__module__}): vlmfast's cannot be registered"
        )
    register_peft_method(name=name, config_cls=config, model_cls=model)


@dataclass
class TunerConfig(PeftConfig):
    """What the configs of all tuners have.

    target_modules: names (of modules in the decoder layers, for tuners that tell visual tokens from text) or a regular
        expression; None: the tuner's own places in the language model, never the vision tower.
    layers_to_transform: decoder layers, None: all.
    exclude_modules, modules_to_save: as in PEFT.
    """

    method: ClassVar[str] = ""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[self.method.upper()]
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]


class TunerLayer(nn.Module, BaseTunerLayer):
    """A module with adapters around it. Subclasses name their dicts in `adapter_layer_names` and write `forward`.

    number: the decoder layer it is in, None: in none.
    """

    other_param_names: tuple[str, ...] = ()

    base_layer: Any  # from here on what PEFT's class has, for type checkers: it comes without types
    adapter_layer_names: tuple[str, ...]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    get_base_layer: Callable[[], Any]
    set_adapter: Callable[..., None]
    in_features: int  # where the base layer has them
    out_features: int

    def __init__(self, base_layer: nn.Module, number: int | None, here: Here | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.number = number
        self.here = here
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter: str | list[str] = []
        for name in ("in_features", "out_features"):  # what is asked of a projection
            if hasattr(base_layer, name):
                setattr(self, name, getattr(base_layer, name))

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add an adapter: fill the dicts, then call `finish`."""
        raise NotImplementedError

    def finish(self, adapter_name: str, config: Any) -> None:
        """Put a new adapter where the base layer is, in the precision it has, trainable if it is active; it trains
        (noise, dropout) when the model does.
        """
        self.train(self.get_base_layer().training)
        device = next((parameter.device for parameter in self.get_base_layer().parameters()), None)
        for name in self.adapter_layer_names:
            held = getattr(self, name)
            if device is None or device.type == "meta" or adapter_name not in held:
                continue
            item = held[adapter_name]
            if not any(each.is_meta for each in ([item] if isinstance(item, torch.Tensor) else item.parameters())):
                held[adapter_name] = item.to(device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def active(self, held: Any) -> list[str]:
        """The adapters that act now, of those in one of the dicts; none when they are disabled."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in held]

    def check_merge(self, adapter_names: list[str] | None = None) -> None:
        """Asked of every layer before the first one is merged. NotImplementedError: most of these adapters are not
        linear in their input. adapter_names: None: the active ones.
        """
        raise NotImplementedError(
            f"{type(self).__name__} cannot be merged into the weights: what it does depends on its input. Keep the "
            "adapter beside the model (save_pretrained of the PEFT model) or take it off (unload)"
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """NotImplementedError, as `check_merge`."""
        self.check_merge(adapter_names)

    def unmerge(self) -> None:
        """Nothing: an adapter that cannot be merged is not."""


class Tuner(BaseTuner):
    """A PEFT tuner over a language model inside a VLM (or alone, where it needs no pictures).

    places: names of the wrapped modules inside a decoder layer, by dots; layers that have none of them stay as they
    are. sees: whether its layers are told which tokens are visual, which needs a supported family (`told`: for a
    config).
    """

    target_module_mapping: dict[str, Any] = {}
    tuner_layer_cls: type[TunerLayer] = TunerLayer
    places: tuple[str, ...] = ()
    sees = False

    def wrap(
        self, config: Any, target: nn.Module, number: int | None, here: Here | None, key: str
    ) -> TunerLayer | None:
        """The layer that goes around a module, without adapters yet; None: the module stays as it is.

        key: the module's name.
        """
        return self.tuner_layer_cls(target, number, here)

    def told(self, config: Any) -> bool:
        """Whether the layers of an adapter are told which tokens are visual."""
        return self.sees

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        """The places of the tuner, where the user named none."""
        if peft_config.target_modules is None:
            peft_config.target_modules = self.expression(peft_config.layers_to_transform)
        elif (
            isinstance(peft_config.target_modules, str)
            and peft_config.layers_to_transform is not None
            and peft_config.target_modules != self.expression(peft_config.layers_to_transform)  # as saved before
        ):
            raise ValueError("layers_to_transform goes with a list of target_modules; an expression names the layers")
        return peft_config

    def expression(self, layers: Sequence[int] | int | None) -> str:
        """The regular expression of the tuner's places in these layers.

        ValueError for a layer that there is not or that has no such place; NotImplementedError where none has.
        """
        if not hasattr(self.model, "get_decoder") or not hasattr(decoder := self.model.get_decoder(), "layers"):
            raise NotImplementedError(
                f"{type(self.model).__name__} has no decoder layers where {self.prefix.rstrip('_')} looks for them "
                "(get_decoder().layers); name the modules as target_modules"
            )
        depth = len(decoder.layers)
        numbers = [layers] if isinstance(layers, int) else layers
        wrong = [number for number in numbers or () if not 0 <= number < depth]
        if wrong or numbers is not None and not numbers:
            raise ValueError(f"layers {wrong or layers}: the decoder has layers 0 to {depth - 1}")
        there = {number: self.there(layer) for number, layer in enumerate(decoder.layers)}
        names = sorted({place for places in there.values() for place in places})
        if not names:
            wanted = " or ".join(self.places_of(decoder.layers[0]))
            raise NotImplementedError(
                f"no decoder layer of {type(self.model).__name__} has {wanted}; name the modules as target_modules"
            )
        without = [number for number in numbers or () if not there[number]]
        if without:
            having = ", ".join(str(number) for number, places in there.items() if places)
            raise ValueError(f"layers {without} have no {' or '.join(names)}; layers {having} do")
        name = next(name for name, module in self.model.named_modules() if module is decoder)
        layer = r"\d+" if numbers is None else f"(?:{'|'.join(map(str, sorted(numbers)))})"
        inside = re.escape(f"{name}.layers." if name else "layers.")
        return rf"(?:.*\.)?{inside}{layer}\.(?:{'|'.join(map(re.escape, names))})"

    def there(self, layer: nn.Module) -> list[str]:
        """Those of the tuner's places that a decoder layer has."""
        inside = dict(layer.named_modules())
        return [place for place in self.places_of(layer) if place in inside]

    def places_of(self, layer: nn.Module) -> Sequence[str]:
        """Names of the modules to wrap; families may name them differently."""
        return self.places

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:
        """As in PEFT; names of modules are those in decoder layers, where the tuner must know the layer."""
        found = super()._check_target_module_exists(peft_config, key)
        named = not isinstance(peft_config.target_modules, str)
        return found and not (named and self.told(peft_config) and self.layer_of(key) is None)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        number, told = self.layer_of(current_key), self.told(peft_config)
        if told and number is None:
            raise ValueError(
                f"{current_key} is in no decoder layer; {peft_config.method} wraps {', '.join(self.places)}"
            )
        here = Modalities.of(self.model).layer(number) if told and number is not None else None
        if isinstance(target, self.tuner_layer_cls):
            if target.here is None:
                target.here = here
            target.update_layer(adapter_name, peft_config)
            return
        new = self.wrap(peft_config, target, number, here, current_key)
        if new is None:
            return
        new.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        setattr(parent, target_name, new)

    def layer_of(self, key: str) -> int | None:
        """The number of the decoder layer that a module is in; None: in none, as those of a vision tower."""
        found = re.match(r"((?:.*?\.)?layers\.(\d+))\.", key)
        if found is None or not hasattr(self.model, "get_decoder"):
            return None if found is None else int(found[2])
        layers = getattr(self.model.get_decoder(), "layers", ())
        inside = any(self.model.get_submodule(found[1]) is layer for layer in layers)
        return int(found[2]) if inside else None

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """The name directly behind one of our dicts, however deep the adapter's own modules go."""
        return re.sub(rf"\.({re.escape(cls.prefix)}\w+)\.{re.escape(adapter_name)}(?=\.|$)", r".\1", key)

    def check_merge(self, adapter_names: list[str] | None) -> None:
        """Before anything changes: whether every layer can be merged."""
        for layer in self.model.modules():
            if isinstance(layer, TunerLayer):
                layer.check_merge(adapter_names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT, all layers or none: after an error nothing is merged."""
        self.check_merge(adapter_names)
        try:
            super().merge_adapter(adapter_names, safe_merge)
        except BaseException:
            self.unmerge_adapter()
            raise

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self.merge_adapter(adapter_names, safe_merge)  # before any layer is taken away
        else:
            self.unmerge_adapter()  # the base as it was, also where an adapter is merged at the moment
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        self.forget()
        return model

    def forget(self) -> None:
        """Take away what the model was told for this tuner."""
        if (modalities := self.model.__dict__.get(MODALITIES)) is not None:
            modalities.close()
