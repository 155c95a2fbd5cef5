"""vlmfast: vision-language models, cheaper to run and less prone to hallucinate, without retraining.

import vlmfast

with vlmfast.patch(model, "hiprune:keep=0.33") as p:    # your own model, class, processor, generate
    out = model.generate(**inputs)
    print(p.report())
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmfast.adapter import Adapter

if TYPE_CHECKING:  # torch and transformers take seconds to import: not before they are needed
    from vlmfast.patching import Handle, Report
    from vlmfast.ranking import Ranking, rank_layers
    from vlmfast.sinks import Sinks, find_sinks

__all__ = [
    "Adapter",
    "Handle",
    "MethodInfo",
    "Ranking",
    "Report",
    "Sinks",
    "find_sinks",
    "from_pretrained",
    "methods",
    "patch",
    "rank_layers",
    "unpatch",
]


def patch(model: Any, *methods: Adapter | str, positions: str | None = None, flops: float | None = None) -> Handle:
    """Patch a model in place and return the handle (also a context manager) that restores it.

    Parameters
    ----------
    model: a transformers VLM of a supported family (`vlmfast list families`), or a PEFT model around one.
    methods: spec strings such as "hiprune:keep=0.33" or method objects; several compose. None given: the recommended
        default for the family.
    positions: "original" keeps each token's position, "compact" renumbers without gaps; default: what the methods'
        official code does for the family.
    flops: solve `keep` so that the prefill, vision tower included, costs this share of the unpatched one.

    Raises
    ------
    NotImplementedError: unknown family or a combination that cannot work; ValueError, TypeError: wrong method, setting
    or model; RuntimeError: the model is already patched. After an error the model is as before.
    """
    from vlmfast import adapters as registry
    from vlmfast.patching import install

    chosen = registry.resolve(model, methods)
    if flops is not None:
        chosen = registry.solve_flops(model, chosen, flops)
    if positions is not None:
        chosen = registry.with_positions(chosen, positions)
    return install(model, chosen, registry.to_spec(chosen))


def unpatch(model: Any) -> None:
    """Restore a patched model, bit for bit. Raises RuntimeError when it is not patched."""
    from vlmfast.patching import handle_of

    handle = handle_of(model)
    if handle is None:
        raise RuntimeError("the model is not patched")
    handle.close()


@dataclass(frozen=True)
class MethodInfo:
    """What there is to know of a method: settings with their defaults, and the families it works on."""

    name: str
    kind: str
    summary: str
    paper: str
    settings: dict[str, Any]
    families: tuple[str, ...]


def methods() -> dict[str, MethodInfo]:
    """Every method by name."""
    from vlmfast.adapters import ADAPTERS, support
    from vlmfast.families import FAMILIES

    return {
        name: MethodInfo(
            name,
            cls.kind,
            cls.summary,
            cls.paper,
            cls.settings(),
            tuple(family for family in FAMILIES if support(name, family).reason is None),
        )
        for name, cls in ADAPTERS.items()
    }


def from_pretrained(path: str | Path, **kwargs: Any) -> Any:
    """Load a model saved from a patched one and patch it as it was.

    kwargs go to `AutoModelForImageTextToText.from_pretrained`. A folder without vlmfast.json loads unpatched.
    """
    from transformers import AutoModelForImageTextToText

    from vlmfast.patching import FILE

    model = AutoModelForImageTextToText.from_pretrained(path, **kwargs)
    file = Path(path, FILE)
    if file.exists():
        try:
            spec = json.loads(file.read_text())["spec"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{file} is damaged: expected {{"spec": "..."}}') from error
        patch(model, spec)
    return model


def __getattr__(name: str) -> Any:
    """Handle, Report, Sinks, find_sinks, Ranking and rank_layers, imported when asked for."""
    if name in ("Handle", "Report"):
        from vlmfast import patching

        return getattr(patching, name)
    if name in ("Sinks", "find_sinks"):
        from vlmfast import sinks

        return getattr(sinks, name)
    if name in ("Ranking", "rank_layers"):
        from vlmfast import ranking

        return getattr(ranking, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
