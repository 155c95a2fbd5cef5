"""Ways to tune, by spec strings such as "lora:r=8,lora_alpha=16": LoRA, vlmfast's own tuners, or all weights.

Settings are the fields of the PEFT config. Lists are written with slashes: "lora:target_modules=q_proj/v_proj". LoRA
adapts the projections of the language model, and names given to it are looked for there, never in the vision tower.
"lofit" runs the paper's two stages (settings: STAGES); with a `component` it is one stage, settings of LofitConfig.
"""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from vlmfast.adapters.tuning import TUNERS
from vlmfast.families import family_of
from vlmfast.families.base import did_you_mean

FULL = "full"
# The two stages of LoFiT; k: heads that are kept, None: 10 %; first_rate: learning rate of stage 1, None: as stage 2.
STAGES: dict[str, Any] = {
    "k": None, "l1_lambda": 5e-4, "init_std": 1e-3, "positions": "all", "first_rate": None,
}  # fmt: skip
WORDS = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class Tuning:
    """A way to tune: its name and the settings that were named."""

    name: str
    settings: dict[str, Any]

    @property
    def stages(self) -> bool:
        """Whether it is LoFiT in two stages."""
        return self.name == "lofit" and "component" not in self.settings

    def __str__(self) -> str:
        words = [f"{key}={_written(value)}" for key, value in self.settings.items()]
        return f"{self.name}:{','.join(words)}" if words else self.name


def known() -> dict[str, type[PeftConfig] | None]:
    """Every way to tune by its name, with its config; None for all weights."""
    return {"lora": LoraConfig, **TUNERS, FULL: None}


def parse(spec: str) -> Tuning:
    """The tuning of a spec string. ValueError or TypeError for an unknown name or setting, and for a wrong value."""
    name, colon, rest = (part.strip() for part in spec.partition(":"))
    ways = known()
    if name not in ways:
        raise ValueError(f"unknown tuner {name!r}{did_you_mean(name, ways)}; there are {', '.join(ways)}")
    settings: dict[str, Any] = {}
    parts = [piece.strip() for piece in rest.split(",") if piece.strip()] if colon else []
    stages = name == "lofit" and not any(part.partition("=")[0].strip() == "component" for part in parts)
    fields = {"tower": False} if ways[name] is None else STAGES if stages else _defaults(ways[name])
    for part in parts:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ValueError(f"tuner {spec!r}: write settings as name=value, got {part!r}")
        if key not in fields:
            some = ", ".join(sorted(fields)) if len(fields) < 20 else "the fields of its PEFT config"
            hint = " (in two stages; name a component for one)" if stages else ""
            raise ValueError(f"{name}{hint} has no setting {key!r}{did_you_mean(key, fields)}; there are {some}")
        if key in settings:
            raise ValueError(f"tuner {spec!r}: {key} is named twice")
        settings[key] = _read(value, fields[key], f"{name}: {key}")
    tuning = Tuning(name, settings)
    config = ways[name]
    if config is not None:
        try:
            config(**({key: value for key, value in settings.items() if key not in ("k", "first_rate")}))
        except (ValueError, TypeError) as error:
            raise ValueError(f"tuner {spec!r}: {error}") from error
    for key, value in settings.items() if stages else ():
        kind = {"k": int, "first_rate": int | float}.get(key)
        if kind is not None and (not isinstance(value, kind) or isinstance(value, bool) or value <= 0):
            raise ValueError(f"tuner {spec!r}: {key} must be a number above 0")
    return tuning


def _defaults(config: Any) -> dict[str, Any]:
    """The settings of a config that a user may name, with their defaults."""
    hidden = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    fields = [field for field in dataclasses.fields(config) if field.init and field.name not in hidden]
    return {
        field.name: field.default_factory() if field.default is dataclasses.MISSING and callable(field.default_factory)
        else field.default
        for field in fields
    }  # fmt: skip


def _read(text: str, default: Any, what: str) -> Any:
    """A value as written: of the kind of the default where that has one."""
    value = [_word(piece) for piece in text.split("/")] if "/" in text else _word(text)
    if isinstance(default, bool):
        right = isinstance(value, bool)
    elif isinstance(default, int):
        right = isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(default, float):
        right = isinstance(value, int | float) and not isinstance(value, bool)
    elif isinstance(default, str):
        return text
    else:
        return value
    if not right:
        raise ValueError(f"{what}={text}: it must be a {type(default).__name__}, such as {default}")
    return value


def _word(text: str) -> Any:
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _written(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(_written, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def apply(tuning: Tuning, model: Any) -> Any:
    """The model, ready to be tuned: a PEFT model around it, or itself with all weights but the tower's trainable.

    Every parameter says by `requires_grad` whether it is trained. ValueError for settings that do not fit the model.
    """
    config = known()[tuning.name]
    if config is None:
        model.requires_grad_(True)
        if not tuning.settings.get("tower", False):
            for tower in towers(model):
                tower.requires_grad_(False)
        return model
    settings = dict(tuning.settings)
    if tuning.name == "lora":
        settings["target_modules"] = projections(model, settings.get("target_modules"))
    return get_peft_model(model, config(**settings))


def towers(model: Any) -> list[nn.Module]:
    """The vision towers of a model, with a merger that is inside one (Qwen-VL's)."""
    family = family_of(model)
    base = getattr(model, model.base_model_prefix)
    paths = [path for source in family.sources.values() for path in source.blocks or family.blocks]
    tops = dict.fromkeys(path.partition(".")[0] for path in paths)
    return [getattr(base, top) for top in tops if hasattr(base, top)]


def projections(model: Any, names: Sequence[str] | str | None = None) -> str:
    """A regular expression of linear modules in the language model's decoder layers.

    names: their last parts, such as "q_proj"; None: all of them. ValueError for names that are not there.
    """
    decoder = model.get_decoder()
    where = next(name for name, module in model.named_modules() if module is decoder)
    found = dict.fromkeys(
        re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
        for layer in decoder.layers
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    )
    wanted = [names] if isinstance(names, str) else names
    if wanted is not None:
        last = {name.rpartition(".")[2] for name in found}
        for name in wanted:
            if name not in last:
                raise ValueError(
                    f"the language model has no projection {name!r}{did_you_mean(name, last)}; there are "
                    f"{', '.join(sorted(last))}"
                )
        found = dict.fromkeys(name for name in found if name.rpartition(".")[2] in wanted)
    places = "|".join(re.escape(name).replace(r"\#", r"\d+") for name in found)
    return rf"(?:.*\.)?{re.escape(where)}\.layers\.\d+\.(?:{places})"


def trainable(model: Any) -> tuple[int, int]:
    """Numbers that are trained, and all numbers of a model."""
    sizes = [(parameter.requires_grad, parameter.numel()) for parameter in model.parameters()]
    return sum(size for learns, size in sizes if learns), sum(size for _, size in sizes)
