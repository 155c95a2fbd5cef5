"""Captions scored with CHAIR on annotations of COCO's form: `chair:INSTANCES.json,images=FOLDER,synonyms=FILE`.

Rohrbach et al., EMNLP 2018, arXiv:1809.02156. INSTANCES.json: images (id, file_name), annotations (image_id,
category_id), categories (id, name). The things in a picture are its annotated categories, and what its reference
captions mention where `captions` names their file (image_id, caption), as in the authors' script. Metrics as in the
task `caption`: chair_s, chair_i, recall, f1 and length.

Settings: images, the pictures' folder (default: beside the file); synonyms, a file of lines "person, girl, boy, ...",
whose first word is the thing's name (default: the names of the categories alone); captions; prompt; tokens, the
longest caption (512).

Words are found as the longest phrase of the synonyms that stands there, in singular or plural; "home plate" and "train
track" are neither a plate nor a train, and "baby bear" or "passenger train" is what it ends with. The authors take the
singular from a tagger, which is no part of this package: rare plurals may be missed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmfast.eval.metrics import Totals
from vlmfast.eval.metrics import chair as counted
from vlmfast.eval.tasks import caption
from vlmfast.eval.tasks.base import Doc, Mention
from vlmfast.eval.tasks.files import existing, json_of, scene_of, settings_of

USAGE = "chair:INSTANCES.json,images=FOLDER,synonyms=FILE,captions=FILE,prompt=TEXT,tokens=N"
PROMPT = "Please describe this image in detail."
NOTHING = ("home plate", "train track")  # phrases that only look like a thing
SAME = {"toilet seat": "toilet", "bow tie": "tie", "stove top oven": "oven", "laptop computer": "laptop"}
# Animals that captions call baby or adult.
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
IRREGULAR = {"people": "person", "men": "man", "women": "woman", "children": "child", "mice": "mouse"}
IRREGULAR |= {"geese": "goose", "knives": "knife", "wolves": "wolf", "calves": "calf", "sheep": "sheep"}


def singulars(word: str) -> Iterator[str]:
    """A word and what it may be the plural of."""
    yield word
    if word in IRREGULAR:
        yield IRREGULAR[word]
    if word.endswith("ies"):
        yield word[:-3] + "y"
    if word.endswith("es"):
        yield word[:-2]
    if word.endswith("s"):
        yield word[:-1]


def alike() -> Iterator[tuple[str, str]]:
    """Phrases that mean no more than one word of theirs."""
    yield from SAME.items()
    yield from ((f"{age} {animal}", animal) for animal in ANIMALS for age in ("baby", "adult"))
    yield from ((f"passenger {one}", one) for one in ("jet", "train"))


def things_in(text: str, names: Mapping[str, str]) -> list[str]:
    """The things a text mentions, in order, each time it does. names: word or phrase -> name of the thing"""
    return [thing for _, _, thing in places_in(text, names)]


def places_in(text: str, names: Mapping[str, str]) -> list[tuple[int, int, str]]:
    """Where a text mentions which thing: (start, end, thing). names: word or phrase -> name of the thing"""
    places = list(re.finditer(r"[a-z]+", text.lower()))
    said = [place[0] for place in places]
    known = {
        **dict.fromkeys(NOTHING, ""),
        **{phrase: names[word] for phrase, word in alike() if word in names},
        **names,
    }
    longest = max((len(phrase.split()) for phrase in known), default=1)
    found: list[tuple[int, int, str]] = []
    start = 0
    while start < len(said):
        for length in range(min(longest, len(said) - start), 0, -1):
            before, last = said[start : start + length - 1], said[start + length - 1]
            name = next((known[p] for end in singulars(last) if (p := " ".join([*before, end])) in known), None)
            if name is not None:
                found += [(places[start].start(), places[start + length - 1].end(), name)] * bool(name)
                break
        start += length
    return found


@dataclass(frozen=True)
class Chair:
    """Captions of annotated pictures. things: picture -> the things in it; names: see `things_in`."""

    name: str
    things: Mapping[Path, tuple[str, ...]] = field(repr=False)
    names: Mapping[str, str] = field(repr=False)
    request: str = PROMPT
    NEW_TOKENS: int = 512
    HEADLINE: str = caption.HEADLINE

    @classmethod
    def of(cls, name: str) -> Chair:
        """From "chair:INSTANCES.json,..."; ValueError or FileNotFoundError for what cannot be."""
        known = {"images": "", "synonyms": "", "captions": "", "prompt": PROMPT, "tokens": "512"}
        path, settings = settings_of(name, known, USAGE)
        file = existing(path, "annotation file")
        if not settings["tokens"].isdigit() or int(settings["tokens"]) < 1:
            raise ValueError(f"tokens={settings['tokens']!r} in {name!r}: a whole number, 1 or more")
        images = existing(settings["images"], "folder of pictures") if settings["images"] else file.parent
        content = parts_of(file, ("images", "annotations", "categories"))
        names = synonyms(settings["synonyms"], [one["name"] for one in content["categories"]])
        category = {one["id"]: names[one["name"].lower()] for one in content["categories"]}
        pictures = {one["id"]: images / one["file_name"] for one in content["images"]}
        there: dict[int, set[str]] = {key: set() for key in pictures}
        for one in content["annotations"]:
            there.setdefault(one["image_id"], set()).add(category[one["category_id"]])
        if settings["captions"]:
            captions = existing(settings["captions"], "caption file")
            for one in parts_of(captions, ("annotations",))["annotations"]:
                if one["image_id"] in there:
                    there[one["image_id"]].update(things_in(one["caption"], names))
        things = {pictures[key]: tuple(sorted(found)) for key, found in there.items() if key in pictures}
        return cls(name, things, names, settings["prompt"], int(settings["tokens"]))

    def load(self, limit: int | None, seed: int) -> list[Doc]:
        """A request for a caption for each of `limit` pictures (None: all), in the order that `seed` draws."""
        pictures = sorted(self.things)
        order = [pictures[i] for i in np.random.default_rng(seed).permutation(len(pictures))]
        return [
            Doc(
                self.name,
                scene_of(existing(picture, "picture")),
                0,
                self.request,
                ", ".join(self.things[picture]),
                info={"target": self.things[picture]},
                picture=str(picture),
            )
            for picture in (order if limit is None else order[:limit])
        ]

    def prompt(self, doc: Doc) -> str:
        """The request, as the model is given it."""
        return doc.prompt

    def score(self, doc: Doc, answer: str) -> dict[str, float]:
        """The counts of CHAIR, and length in words."""
        return counted(things_in(answer, self.names), doc.info["target"]) | {"length": len(answer.split())}

    def mentions(self, doc: Doc, answer: str) -> list[Mention]:
        """The things that a caption mentions, each time it does."""
        there = doc.info["target"]
        return [Mention(start, end, thing, thing in there) for start, end, thing in places_in(answer, self.names)]

    def summarise(self, totals: Totals) -> dict[str, np.ndarray]:
        """chair_s, chair_i, recall, f1, length."""
        return caption.summarise(totals)


def parts_of(file: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """An annotation file with these lists; ValueError says what is missing."""
    content = json_of(file)
    missing = [name for name in names if not isinstance(content, dict) or not isinstance(content.get(name), list)]
    if missing:
        raise ValueError(f"{file} is no annotation file of COCO's form: it has no list {missing[0]!r}")
    return content


def synonyms(path: str, categories: list[str]) -> dict[str, str]:
    """Word or phrase -> name of the thing. ValueError for a category that the file does not name."""
    if not path:
        return {name.lower(): name.lower() for name in categories}
    file = existing(path, "file of synonyms")
    names: dict[str, str] = {}
    for line in file.read_text().splitlines():
        words = [word.strip().lower() for word in line.split(",") if word.strip()]
        names |= dict.fromkeys(words, words[0])
    missing = [name for name in categories if name.lower() not in names]
    if missing:
        raise ValueError(f"{file} has no line for the category {missing[0]!r}")
    return names
