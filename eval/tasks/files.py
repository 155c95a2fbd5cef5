"""Tasks over files of the user's: how they are named, and how their pictures and lines are read."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FIRST = 10**6  # numbers of the user's pictures; those below are the testbed's scenes


def settings_of(name: str, known: Mapping[str, str], usage: str) -> tuple[str, dict[str, str]]:
    """ "pope:questions.json,images=folder" -> (path, settings). known: settings with their defaults.

    Raises ValueError that says how the task is written.
    """
    path, *parts = name.partition(":")[2].split(",")
    found = dict(known)
    for part in parts:
        key, equals, value = (text.strip() for text in part.partition("="))
        if key not in known or not equals:
            raise ValueError(f"{part!r} in {name!r}: settings are {', '.join(known)}; written {usage}")
        found[key] = value
    if not path.strip():
        raise ValueError(f"{name!r} names no file: written {usage}")
    return path.strip(), found


def existing(path: str | Path, what: str) -> Path:
    """A path that is there; FileNotFoundError names what is missing."""
    found = Path(path).expanduser()
    if not found.exists():
        raise FileNotFoundError(f"there is no {what} {found}")
    return found


def json_of(path: Path) -> Any:
    """The content of a JSON file; ValueError names it."""
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error


def json_lines(path: Path, fields: Mapping[str, type]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; ValueError names the line that lacks one of the fields."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: no JSON object: {error}") from error
            for field, kind in fields.items():
                if not isinstance(record, dict) or not isinstance(record.get(field), kind):
                    raise ValueError(f"{path}, line {number}: needs {field!r} ({kind.__name__})")
            yield record


def scene_of(picture: Path) -> int:
    """The number under which a picture is encoded and resampled: the same in every task that asks about it."""
    return FIRST + int(hashlib.sha256(str(picture.resolve()).encode()).hexdigest()[:12], 16)


@functools.lru_cache(maxsize=32)
def pixels(picture: str) -> np.ndarray:
    """A picture, uint8 [H, W, 3], turned as its camera says; ValueError for what is none."""
    try:
        with Image.open(existing(picture, "picture")) as opened:
            return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except UnidentifiedImageError as error:
        raise ValueError(f"{picture} cannot be read as a picture") from error
