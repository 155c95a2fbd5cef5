"""What lmms-eval's `--model_args` may say of a model of ours, and how it is read.

lmms-eval separates arguments by commas, and so do settings in a spec. They are told apart by their names: what follows
`method=` is an argument if it has the name of one, and else a setting of the methods named so far:

    pretrained=llava-hf/llava-1.5-7b-hf,method=vtc_cls:keep=0.3,preset=paper,dtype=bfloat16

No setting of a method has the name of an argument (a test sees to it). Quotes keep commas together as well:
method="vtc_cls:keep=0.3,preset=paper".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmfast.adapters import ADAPTERS, from_spec, to_spec
from vlmfast.eval.models import DTYPES
from vlmfast.families import did_you_mean

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
CLOSING = {"{": "}", "[": "]", "(": ")"}
PIXELS = ("min_pixels", "max_pixels")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """One model, as lmms-eval is to run it.

    pretrained: testbed:NAME, folder or Hugging Face id. method: spec. adapter: folder of a PEFT adapter. flops: `keep`
    solved for this share of the prefill FLOPs. device, dtype: default cuda and bfloat16 where there is CUDA, else cpu
    and float32. device_map: "auto", ... or JSON, as transformers takes it; instead of device, of which
    "auto" is the same. max_new_tokens: for tasks that name none. min_pixels, max_pixels: for processors that take
    images of any size. num_frames, fps: of videos, one of the two. system_prompt: text, or a file of it. latency:
    readings of the time to first token, 0: none. costs: JSON file for what the run cost.
    """

    pretrained: str
    method: str = "none"
    adapter: str | None = None
    flops: float | None = None
    device: str | None = None
    device_map: Any = None
    dtype: str | None = None
    attn_implementation: str | None = None
    batch_size: int = 1
    max_new_tokens: int = 1024
    min_pixels: int | None = None
    max_pixels: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    system_prompt: str | None = None
    latency: int = 5
    costs: str | None = None

    def __post_init__(self) -> None:
        whole = {"batch_size": 1, "max_new_tokens": 1, "latency": 0, "num_frames": 1} | dict.fromkeys(PIXELS, 1)
        for name, least in whole.items():
            value = getattr(self, name)
            if value is None and self.defaults()[name] is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value}: a whole number, {least} or more")
        if self.flops is not None and not 0 < self.flops <= 1:
            raise ValueError(f"flops={self.flops}: a share of the unpatched FLOPs, above 0 and at most 1")
        if self.fps is not None and (self.num_frames is not None or self.fps <= 0):
            raise ValueError("fps: a number above 0, and not together with num_frames")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype}{did_you_mean(self.dtype, DTYPES)}; there are {', '.join(DTYPES)}")
        if self.attn_implementation not in (None, *ATTENTION):
            raise ValueError(f"attn_implementation={self.attn_implementation}; there are {', '.join(ATTENTION)}")
        if self.device is not None and self.device_map is not None:
            raise ValueError("device or device_map, not both: a device map says where everything goes")
        adapters = from_spec(self.method)
        if self.flops is not None and not any("keep" in one.settings() for one in adapters):
            raise ValueError(f"flops={self.flops}: none of the methods in {self.method!r} has a keep to solve")
        object.__setattr__(self, "method", to_spec(adapters))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The arguments and their defaults."""
        return {field.name: field.default for field in dataclasses.fields(cls)}

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Arguments:
        """From names and values, texts or read already; None: not given. ValueError for what cannot be."""
        known = cls.defaults()
        for name in given:
            if name not in known:
                raise ValueError(_unknown(name))
        values = {name: _value(name, value) for name, value in given.items() if value is not None}
        if "pretrained" not in values:
            raise ValueError("pretrained is missing: --model_args pretrained=ID,method=SPEC")
        return cls(**values)


def parse(text: str) -> dict[str, str]:
    """`pretrained=ID,method=vtc_cls:keep=0.3,preset=paper` -> arguments by name; ValueError for unknown ones."""
    found: dict[str, str] = {}
    current = ""
    for piece in pieces(text):
        name, equals, value = (part.strip() for part in piece.partition("="))
        value = value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
        if name in Arguments.defaults() and equals:
            if name in found:
                raise ValueError(f"{name} is given twice in --model_args")
            if not value:
                raise ValueError(f"{name}= in --model_args has no value")
            found[name], current = value, name
        elif current == "method" and name in _settings(found["method"]):
            found["method"] += f",{piece.strip()}"
        else:
            raise ValueError(_unknown(name, found.get("method", "")))
    return found


def pieces(text: str) -> list[str]:
    """The parts between commas that are in no quotes and no brackets."""
    parts, open_, start = [], "", 0
    for i, char in enumerate(text):
        if open_ and char == open_[-1]:
            open_ = open_[:-1]
        elif open_[-1:] in ('"', "'"):
            continue
        elif char in "\"'":
            open_ += char
        elif char in CLOSING:
            open_ += CLOSING[char]
        elif char == "," and not open_:
            parts.append(text[start:i])
            start = i + 1
    return [part for part in (*parts, text[start:]) if part.strip()]


def _settings(spec: str) -> list[str]:
    """The settings of all methods that a spec names, as far as it is known."""
    names = [part.partition(":")[0].strip() for part in spec.split("+")]
    return [setting for name in names if name in ADAPTERS for setting in ADAPTERS[name].settings()]


def _unknown(name: str, spec: str = "") -> str:
    settings = _settings(spec)
    known = ", ".join(Arguments.defaults())
    if name in settings:
        return f"{name!r} in --model_args is a setting of {spec!r}: write it right behind the method"
    hint = did_you_mean(name, [*Arguments.defaults(), *settings])
    return f"unknown argument {name!r} in --model_args{hint}; there are {known}" + (
        f"; settings of {spec!r}: {', '.join(dict.fromkeys(settings))}" if settings else ""
    )


def _value(name: str, value: Any) -> Any:
    """An argument as its field wants it: numbers read, everything else a text."""
    kind = str(Arguments.__annotations__[name]).partition(" ")[0]
    if name == "device_map" and isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except ValueError as error:
            raise ValueError(f"device_map={value}: no JSON ({error})") from None
    if kind in ("int", "float"):
        try:
            return int(str(value)) if kind == "int" else float(value)
        except ValueError:
            words = "whole number" if kind == "int" else "number"
            raise ValueError(f"{name}={value}: no {words}") from None
    if name == "system_prompt":
        try:
            return Path(value).read_text(encoding="utf-8").strip()
        except OSError:  # no file: the text itself
            pass
    return value
