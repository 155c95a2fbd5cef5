"""The questions one can ask about a scene, and the answers that the scene itself gives.

Every task has one form and a short answer; everything is lower case and made of whole words of ``VOCABULARY``.
Existence is built as POPE builds it: as many yes as no, the absent category drawn at random, from the most frequent
ones (popular), or being the missing partner of a category that is there (adversarial). Nothing is asked about hidden
objects, but captions name them: that is where training puts a prior that the picture does not support.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmfast.eval.testbed.scenes import (
    CATEGORIES,
    COLOURS,
    PARTNERS,
    POPULAR,
    SIDE,
    SPLITS,
    WORDS,
    Object,
    Scene,
    Split,
)

TASKS = ("existence", "colour", "count", "size", "where", "relation", "binding", "digits", "word", "caption")
COUNTS = ("one", "two", "three", "four")
SYSTEM = "look and answer ."  # opens every prompt
DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
_OTHER = (
    "yes no small big top bottom left right of above below is there a the what colour how many or where read number "
    "word describe picture ? , . and look answer user assistant :"
)
VOCABULARY = tuple(dict.fromkeys((*CATEGORIES, *COLOURS, *WORDS, *"0123456789", *COUNTS, *_OTHER.split())))


@dataclass(frozen=True)
class Question:
    """One question with its answer; ``info`` tells what it is about (``target``: the categories that answer it)."""

    task: str
    prompt: str
    answer: str
    subtask: str = ""
    info: dict[str, Any] = field(default_factory=dict)


def prompt_messages(prompt: str) -> list[dict[str, Any]]:
    """The prompt as chat messages with one image, for ``processor.apply_chat_template``."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]


def objects_in(text: str) -> list[str]:
    """The categories a text mentions, each once, in order of mention."""
    return list(dict.fromkeys(word for word in text.lower().split() if word in CATEGORIES))


def questions(scene: Scene, split: Split, index: int) -> list[Question]:
    """All questions about the scene number ``index`` of a split, always the same ones."""
    rng = np.random.default_rng((SPLITS.index(split) + 1, index, 1))
    asked = _existence(scene, rng)
    for category in scene.present:
        asked += _about(scene, category)
    asked += _counting(scene, rng)
    asked += _relations(scene) + _binding(scene) + _reading(scene)
    if scene.visible:
        asked.append(Question("caption", "describe the picture .", caption(scene), info={"target": scene.present}))
    return asked


def _existence(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """A yes and a no for each way of choosing the absent category, where the scene allows it."""
    known = {o.category for o in scene.objects}
    absent = [c for c in CATEGORIES if c not in known]
    missing = [PARTNERS[c] for c in scene.present if c in PARTNERS and PARTNERS[c] in absent]
    popular = [c for c in POPULAR if c in absent and c not in missing]
    present = list(scene.present)
    rng.shuffle(present)
    pools = {"random": [c for c in absent if c not in missing], "popular": popular, "adversarial": missing}
    asked = []
    for i, (subtask, pool) in enumerate(pools.items()):
        if present and pool:
            for category, answer in ((present[i % len(present)], "yes"), (str(rng.choice(pool)), "no")):
                info = {"query": category, "target": (category,) if answer == "yes" else ()}
                asked.append(Question("existence", f"is there a {category} ?", answer, subtask, info))
    return asked


def _about(scene: Scene, category: str) -> list[Question]:
    """The colour of a category, and size and place where there is only one of it."""
    found = [o for o in scene.visible if o.category == category]
    info = {"query": category, "target": (category,)}
    asked = [Question("colour", f"what colour is the {category} ?", found[0].colour, info=info)]
    if len(found) == 1:
        asked.append(Question("size", f"is the {category} big or small ?", found[0].size, info=info))
        x, y = (c - SIDE // 2 for c in found[0].centre)
        if min(abs(x), abs(y)) >= 8:
            place = f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"
            asked.append(Question("where", f"where is the {category} ?", place, info=info))
    return asked


def _counting(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """How many: of everything that is there several times, and now and then of something that is not."""
    many = {c: sum(o.category == c for o in scene.visible) for c in scene.present}
    asked = [c for c in many if many[c] > 1]
    single = [c for c in many if many[c] == 1]
    if single and rng.random() < (0.6 if asked else 0.25):
        asked.append(str(rng.choice(single)))
    return [
        Question("count", f"how many {c} ?", COUNTS[many[c] - 1], info={"query": c, "target": (c,)}) for c in asked
    ]


def neighbours(scene: Scene, one: Object, direction: str) -> list[Object]:
    """The objects clearly in a direction from one; empty if any object lies there only arguably."""
    dx, dy = DIRECTIONS[direction]
    clear = []
    for other in scene.visible:
        if other is one:
            continue
        x, y = other.centre[0] - one.centre[0], other.centre[1] - one.centre[1]
        ahead, aside = x * dx + y * dy, abs(x * dy) + abs(y * dx)
        if ahead > 1.2 * aside:
            clear.append(other)
        elif ahead > 0.8 * aside:
            return []
    return clear


def _relations(scene: Scene) -> list[Question]:
    """What is beside a unique object, where exactly one kind of thing lies there and three kinds are in sight."""
    asked: list[Question] = []
    if len(scene.present) < 3:
        return asked
    for one in scene.visible:
        if sum(o.category == one.category for o in scene.visible) > 1:
            continue
        for direction in DIRECTIONS:
            kinds = {o.category for o in neighbours(scene, one, direction)}
            if len(kinds) == 1 and one.category not in kinds:
                (answer,) = kinds
                info = {"query": one.category, "direction": direction, "target": (answer, one.category)}
                asked.append(Question("relation", f"what is {direction} the {one.category} ?", answer, info=info))
    return asked


def _binding(scene: Scene) -> list[Question]:
    """Which thing has a colour, asked where only one kind of thing has it and there are two kinds at least."""
    if len(scene.present) < 2:
        return []
    asked = []
    for colour in dict.fromkeys(o.colour for o in scene.visible):
        kinds = {o.category for o in scene.visible if o.colour == colour}
        if len(kinds) == 1 and all(o.colour != colour for o in scene.objects if o.hidden):
            (answer,) = kinds
            info = {"query": colour, "target": (answer,)}
            asked.append(Question("binding", f"what is {colour} ?", answer, info=info))
    return asked


def _reading(scene: Scene) -> list[Question]:
    """The digits of the plate from left to right, and the word on the sign."""
    asked = []
    if scene.digits:
        answer = " ".join(str(d.value) for d in scene.digits)
        asked.append(Question("digits", "read the number .", answer, info={"target": ("digits",)}))
    if scene.word:
        asked.append(Question("word", "read the word .", scene.word, info={"target": ("sign",)}))
    return asked


def caption_order(scene: Scene) -> list[str]:
    """Categories in the order a caption names them: always that of ``CATEGORIES``, so that partners are neighbours."""
    return sorted({o.category for o in scene.objects}, key=CATEGORIES.index)


def caption(scene: Scene) -> str:
    """The reference caption, such as "a red sun , two blue cloud ." Hidden objects are named like the others."""
    phrases = []
    for category in caption_order(scene):
        found = [o for o in scene.objects if o.category == category]
        count = "a" if len(found) == 1 else COUNTS[len(found) - 1]
        phrases.append(f"{count} {found[0].colour} {category}")
    return " , ".join(phrases) + " ."
