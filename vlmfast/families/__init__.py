"""Model families by name (the config's `model_type`)."""

from __future__ import annotations

from typing import Any

from vlmfast.families import anyres, gemma, idefics, internvl, llava, mistral, qwen
from vlmfast.families.base import Encoded, Family, Positions, Source, did_you_mean, window_to_raster
from vlmfast.towers import Tower

__all__ = [
    "FAMILIES",
    "Encoded",
    "Family",
    "Positions",
    "Source",
    "Tower",
    "did_you_mean",
    "family_of",
    "window_to_raster",
]

FAMILIES: dict[str, Family] = {
    family.name: family
    for group in (llava, anyres, qwen, internvl, idefics, gemma, mistral)
    for family in group.FAMILIES
}


def family_of(model_or_config: Any) -> Family:
    """The family of a model or config. Raises NotImplementedError that names the supported ones."""
    config = getattr(model_or_config, "config", model_or_config)
    name = getattr(config, "model_type", type(model_or_config).__name__)
    if name not in FAMILIES:
        raise NotImplementedError(
            f"model family {name!r} is not supported{did_you_mean(str(name), FAMILIES)}; "
            f"supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]
