"""The methods by name, and their spec strings.

A spec names methods and settings: "hiprune:keep=0.33,alpha=0.1", several joined by "+", "none" for the unpatched
model. `from_spec` and `to_spec` round-trip.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmfast.adapter import Adapter
from vlmfast.adapters.attention.act import ACT
from vlmfast.adapters.attention.pai import PAI
from vlmfast.adapters.attention.paint import PAINT
from vlmfast.adapters.attention.seal import SEAL
from vlmfast.adapters.attention.var import VAR
from vlmfast.adapters.attention.vhr import VHR
from vlmfast.adapters.attention.zerotuning import ZeroTuning
from vlmfast.adapters.decoding.agla import AGLA
from vlmfast.adapters.decoding.deco import DeCo
from vlmfast.adapters.decoding.dola import DoLa
from vlmfast.adapters.decoding.m3id import M3ID
from vlmfast.adapters.decoding.only import ONLY
from vlmfast.adapters.decoding.opera import OPERA
from vlmfast.adapters.decoding.vcd import VCD
from vlmfast.adapters.decoding.vista import VISTA
from vlmfast.adapters.fusion.eemllm import EEMLLM
from vlmfast.adapters.pruning.cdpruner import CDPruner
from vlmfast.adapters.pruning.dart import Dart
from vlmfast.adapters.pruning.divprune import DivPrune
from vlmfast.adapters.pruning.evs import EVS
from vlmfast.adapters.pruning.fastervlm import FasterVLM
from vlmfast.adapters.pruning.fastv import FastV
from vlmfast.adapters.pruning.fopru import FoPru
from vlmfast.adapters.pruning.framefusion import FrameFusion
from vlmfast.adapters.pruning.globalcom2 import GlobalCom2
from vlmfast.adapters.pruning.grid import Grid
from vlmfast.adapters.pruning.hiprune import HiPrune
from vlmfast.adapters.pruning.lscenellm import LSceneLLM
from vlmfast.adapters.pruning.pyramiddrop import PyramidDrop
from vlmfast.adapters.pruning.random import Random
from vlmfast.adapters.pruning.slime import Slime
from vlmfast.adapters.pruning.sparsevlm import SparseVLM
from vlmfast.adapters.pruning.textmonkey import TextMonkey
from vlmfast.adapters.pruning.vidcom2 import VidCom2
from vlmfast.adapters.pruning.visionzip import VisionZip
from vlmfast.adapters.pruning.vispruner import VisPruner
from vlmfast.adapters.pruning.vtc_cls import VtcCls
from vlmfast.families import FAMILIES, did_you_mean, family_of
from vlmfast.patching import unwrap
from vlmfast.solving import solve_keep, with_keep

__all__ = [
    "ACT",
    "ADAPTERS",
    "AGLA",
    "DEFAULTS",
    "EEMLLM",
    "EVS",
    "M3ID",
    "ONLY",
    "OPERA",
    "PAI",
    "PAINT",
    "SEAL",
    "VAR",
    "VCD",
    "VHR",
    "VISTA",
    "CDPruner",
    "Dart",
    "DeCo",
    "DivPrune",
    "DoLa",
    "FastV",
    "FasterVLM",
    "FoPru",
    "FrameFusion",
    "GlobalCom2",
    "Grid",
    "HiPrune",
    "LSceneLLM",
    "PyramidDrop",
    "Random",
    "Slime",
    "SparseVLM",
    "Support",
    "TextMonkey",
    "VidCom2",
    "VisPruner",
    "VisionZip",
    "VtcCls",
    "ZeroTuning",
    "from_spec",
    "resolve",
    "solve_flops",
    "support",
    "to_spec",
    "with_positions",
]

ADAPTERS: dict[str, type[Adapter]] = {
    "act": ACT,
    "agla": AGLA,
    "cdpruner": CDPruner,
    "dart": Dart,
    "deco": DeCo,
    "divprune": DivPrune,
    "dola": DoLa,
    "eemllm": EEMLLM,
    "evs": EVS,
    "fastervlm": FasterVLM,
    "fastv": FastV,
    "fopru": FoPru,
    "framefusion": FrameFusion,
    "globalcom2": GlobalCom2,
    "grid": Grid,
    "hiprune": HiPrune,
    "lscenellm": LSceneLLM,
    "m3id": M3ID,
    "only": ONLY,
    "opera": OPERA,
    "pai": PAI,
    "paint": PAINT,
    "pyramiddrop": PyramidDrop,
    "random": Random,
    "seal": SEAL,
    "slime": Slime,
    "sparsevlm": SparseVLM,
    "textmonkey": TextMonkey,
    "var": VAR,
    "vcd": VCD,
    "vhr": VHR,
    "vidcom2": VidCom2,
    "visionzip": VisionZip,
    "vispruner": VisPruner,
    "vista": VISTA,
    "vtc_cls": VtcCls,
    "zerotuning": ZeroTuning,
}

# What `vlmfast.patch(model)` does, by family.
DEFAULTS: dict[str, str] = dict.fromkeys(FAMILIES, "hiprune:keep=0.33")

NONE = "none"


@dataclass(frozen=True)
class Support:
    """Whether a method works on a family: `reason`, why not (None if it does); `needs`, settings without which not."""

    reason: str | None
    needs: dict[str, Any]


def support(method: str, family: str) -> Support:
    """What `vlmfast list families` prints and the tests run: one answer for every method and family."""
    cls, about = ADAPTERS[method], FAMILIES[family]
    reason = cls.unsupported(about)
    return Support(reason, {} if reason else cls.needs(about))


def from_spec(spec: str) -> tuple[Adapter, ...]:
    """Methods from a spec string; "none" gives none. Raises ValueError that lists the real names or settings."""
    if spec.strip() == NONE:
        return ()
    return tuple(_one(part.strip(), spec) for part in spec.split("+"))


def _one(part: str, spec: str) -> Adapter:
    name, _, rest = part.partition(":")
    name = name.strip()
    if name not in ADAPTERS:
        raise ValueError(
            f"no method {name!r} in {spec!r}{did_you_mean(name, ADAPTERS)}; methods: {', '.join(ADAPTERS)} (or none)"
        )
    cls = ADAPTERS[name]
    known = cls.settings()
    settings: dict[str, Any] = {}
    for item in filter(None, (piece.strip() for piece in rest.split(","))):
        key, equals, value = (text.strip() for text in item.partition("="))
        if not equals or not value:
            raise ValueError(f"{item!r} in {spec!r}: settings are written name=value")
        if key not in known:
            raise ValueError(
                f"{name} has no setting {key!r}{did_you_mean(key, known)}; settings: "
                + ", ".join(f"{setting}={default}" for setting, default in known.items())
            )
        if key in settings:
            raise ValueError(f"{key} is given twice in {spec!r}")
        settings[key] = _value(value)
    try:
        return cls(**settings)
    except TypeError as error:
        raise ValueError(f"{part!r}: {error}") from error


def _value(text: str) -> Any:
    """Numbers, True, False and None as in Python; `nan` and `inf` as floats; everything else is a word."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return float(text) if text.lower().lstrip("+-") in ("nan", "inf") else text


def to_spec(adapters: Sequence[Adapter]) -> str:
    """The spec string of configured methods: settings that differ from the defaults, `keep` always."""
    return "+".join(_spec(adapter) for adapter in adapters) or NONE


def _spec(adapter: Adapter) -> str:
    defaults = adapter.settings()
    shown = [
        f"{field.name}={getattr(adapter, field.name)}"
        for field in dataclasses.fields(adapter)
        if field.name == "keep" or getattr(adapter, field.name) != defaults[field.name]
    ]
    return adapter.name + (":" + ",".join(shown) if shown else "")


def resolve(model: Any, methods: Sequence[Adapter | str]) -> tuple[Adapter, ...]:
    """Spec strings and objects -> adapters; nothing given: the default of the model's family."""
    chosen: list[Adapter] = []
    for method in methods or (DEFAULTS[family_of(unwrap(model)).name],):
        if isinstance(method, str):
            chosen += from_spec(method)
        elif isinstance(method, Adapter):
            chosen.append(method)
        else:
            raise TypeError(f"a method is a spec string or an Adapter object, got {type(method).__name__}")
    return tuple(chosen)


def with_positions(adapters: Sequence[Adapter], positions: str) -> tuple[Adapter, ...]:
    """The same methods with another position policy. Raises ValueError when none of them has positions."""
    _require(adapters, "positions")
    return tuple(_replace(adapter, "positions", positions) for adapter in adapters)


def solve_flops(model: Any, adapters: Sequence[Adapter], share: float) -> tuple[Adapter, ...]:
    """The same methods with `keep` solved for a share of the unpatched prefill FLOPs, vision tower included.

    Solved for the family's nominal picture (`vlmfast.solving.nominal`): where the family takes any image size, others
    cost another share. Warns where no whole number of tokens comes within 1 % of the share. Raises ValueError when no
    method has `keep`, or when the share cannot be reached (naming what can).
    """
    _require(adapters, "keep")
    model = unwrap(model)
    for adapter in adapters:
        adapter.check(family_of(model))
    return with_keep(adapters, solve_keep(model.config, adapters, share))


def _require(adapters: Sequence[Adapter], name: str) -> None:
    if not any(name in adapter.settings() for adapter in adapters):
        raise ValueError(f"none of the methods in {to_spec(adapters)!r} has a setting {name!r}")


def _replace(adapter: Adapter, name: str, value: Any) -> Adapter:
    return dataclasses.replace(adapter, **{name: value}) if name in adapter.settings() else adapter
