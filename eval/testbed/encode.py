"""Scenes turned into arrays to train on: what each patch shows, and all questions packed with their supervision.

``encode(split, index)`` gives one scene's arrays. Things of a scene are numbered: objects 1-9, digits 10 and 11, the
sign 12; a set of things is a bit mask (``1 << number``). A patch belongs to the thing that covers it most.

A supervision row says where attention should go: (kind, token it starts from, target). Kinds: ``GROUND`` (a noun or
colour looks at what it names), ``COPY`` (the place of the answer looks at the noun), ``READ`` (the place of the answer
looks at what answers it), ``COUNT`` (at the centre of each thing counted, and at <s>). The target is a bit mask, 0
meaning <s> (there is no such thing), except for ``COPY``, where it is a token.
"""

from dataclasses import dataclass

import numpy as np

from vlmfast.eval.testbed import sprites
from vlmfast.eval.testbed.build import GRID, IDS
from vlmfast.eval.testbed.questions import TASKS, Question, caption_order, neighbours, questions
from vlmfast.eval.testbed.scenes import CATEGORIES, COLOURS, SIDE, WORDS, Box, Scene, Split, coverage, scene

GROUND, COPY, READ, COUNT = range(4)
SLOTS = 13  # nothing, nine objects, two digits, the sign
DIGIT_SLOT, SIGN_SLOT = 10, 12
CLASSES = 1 + len(CATEGORIES) + 10 + len(WORDS)
_END = ["assistant", ":"]


@dataclass
class Encoded:
    """One scene: things [13, 6] (class, colour, size, x, y, 1 if visible), patches {model: [N]}, letters {model: [N]},
    and the questions: tokens [T], per question (task, tokens, first answer token, rows) and rows [R, 3]."""

    things: np.ndarray
    patches: dict[str, np.ndarray]
    letters: dict[str, np.ndarray]
    tokens: np.ndarray
    table: np.ndarray
    rows: np.ndarray


def thing_boxes(shown: Scene) -> list[tuple[int, Box]]:
    """The numbered things of a scene with their boxes."""
    things = [(1 + i, o.box) for i, o in enumerate(shown.objects)]
    things += [(DIGIT_SLOT + i, d.box) for i, d in enumerate(shown.digits)]
    return things + ([(SIGN_SLOT, shown.word_box)] if shown.word_box else [])


def describe(shown: Scene) -> np.ndarray:
    """The properties of the numbered things, [13, 6]."""
    things = np.zeros((SLOTS, 6), np.int16)
    for i, o in enumerate(shown.objects):
        kind = (1 + CATEGORIES.index(o.category), COLOURS.index(o.colour), int(o.size == "big"))
        things[1 + i] = (*kind, *o.centre, not o.hidden)
    for i, d in enumerate(shown.digits):
        things[DIGIT_SLOT + i] = (25 + d.value, -1, -1, (d.box[0] + d.box[2]) // 2, (d.box[1] + d.box[3]) // 2, 1)
    if shown.word and shown.word_box:
        x, y = (shown.word_box[0] + shown.word_box[2]) // 2, (shown.word_box[1] + shown.word_box[3]) // 2
        things[SIGN_SLOT] = (35 + WORDS.index(shown.word), -1, -1, x, y, 1)
    return things


def patch_things(shown: Scene, grid: int) -> np.ndarray:
    """Which numbered thing each patch shows, [N]."""
    best, owner = np.full((grid, grid), 0.12), np.zeros((grid, grid), np.uint8)
    for number, box in thing_boxes(shown):
        share = coverage(box, grid)
        owner[share > best] = number
        best = np.maximum(best, share)
    return owner.ravel()


def patch_letters(shown: Scene, grid: int) -> np.ndarray:
    """Which letter of the sign each patch shows most of (1-26, 0 for none), [N]."""
    best, letters = np.full((grid, grid), 0.2), np.zeros((grid, grid), np.uint8)
    if shown.word and shown.word_box:
        x, y0, _, y1 = shown.word_box
        for letter, (start, end) in zip(shown.word, sprites.sign(shown.word)[1]):
            share = coverage((x + start, y0 + 3, x + end, y1 - 3), grid)
            letters[share > best] = ord(letter) - 96
            best = np.maximum(best, share)
    return letters.ravel()


def _bits(shown: Scene, category: str, hidden: bool = False) -> int:
    found = [i for i, o in enumerate(shown.objects) if o.category == category and (hidden or not o.hidden)]
    return sum(1 << (1 + i) for i in found)


def _target(shown: Scene, question: Question) -> tuple[int, int]:
    """The things that the question's noun names, and those that its answer is read from."""
    query = question.info.get("query", "")
    named = _bits(shown, query)
    if question.task == "binding":
        named = sum(1 << (1 + i) for i, o in enumerate(shown.objects) if o.colour == query)
    if question.task == "relation":
        (one,) = (o for o in shown.visible if o.category == query)
        beside = neighbours(shown, one, question.info["direction"])
        return named, sum(1 << (1 + i) for i, o in enumerate(shown.objects) if o in beside)
    if question.task == "digits":
        named = sum(1 << (DIGIT_SLOT + i) for i in range(len(shown.digits)))
    if question.task == "word":
        named = 1 << SIGN_SLOT
    return named, named


def _noun(question: Question, words: list[str]) -> int:
    """Where in the prompt the word stands that names what the question is about."""
    if question.task in ("digits", "word"):
        return 2
    return words.index(question.info["query"])


def _caption_rows(shown: Scene, start: int) -> list[tuple[int, int, int]]:
    """A caption looks at each thing before naming it, back at the last one named, and after it at the next, or <s>."""
    order = [_bits(shown, category, hidden=True) for category in caption_order(shown)]
    rows = []
    for i, bits in enumerate(order):
        at = start + 4 * i  # "a red sun ," is four tokens; the token before predicts the first
        rows += [(READ, at - 1, bits), (READ, at, bits), (READ, at + 1, bits)]
        rows += [(GROUND, at + 2, bits), (COPY, at - 1, at - 2 if i else 0)]
        rows.append((READ, at + 2, order[i + 1] if i + 1 < len(order) else 0))
    return rows


def supervision(shown: Scene, question: Question) -> tuple[list[str], int, list[tuple[int, int, int]]]:
    """A question as words with its answer, the place of the first answer word, and its supervision rows."""
    words = question.prompt.split()
    answer = question.answer.split()
    start = len(words) + len(_END)
    full = [*words, *_END, *answer, "</s>"]
    if question.task == "caption":
        return full, start, _caption_rows(shown, start)
    noun = _noun(question, words)
    named, read = _target(shown, question)
    rows = [(GROUND, noun, named), (COPY, start - 1, noun)]
    if question.task == "digits":
        rows += [(READ, start - 1 + i, 1 << (DIGIT_SLOT + i)) for i in range(len(answer))]
    elif question.task == "count":
        rows.append((COUNT, start - 1, read))
    else:
        rows += [(READ, start - 1 + i, read) for i in range(len(answer))]
    return full, start, rows


def encode(split: Split, index: int) -> tuple[Scene, Encoded]:
    """A scene and its arrays."""
    shown = scene(split, index)
    tokens: list[int] = []
    table, rows = [], []
    for question in questions(shown, split, index):
        words, start, found = supervision(shown, question)
        tokens += [IDS[word] for word in words]
        table.append((TASKS.index(question.task), len(words), start, len(found)))
        rows += found
    patches = {name: patch_things(shown, grid) for name, grid in GRID.items()}
    letters = {name: patch_letters(shown, grid) for name, grid in GRID.items()}
    arrays = (np.array(tokens, np.int16), np.array(table, np.int16), np.array(rows, np.int16).reshape(-1, 3))
    return shown, Encoded(describe(shown), patches, letters, *arrays)


def image_patches(images: np.ndarray, name: str) -> np.ndarray:
    """Pictures [B, 120, 120, 3] cut the way the model's tower reads them, in raster order of the visual tokens.

    llava [B, 144, 3 * 10 * 10]; qwen2_5_vl [B, 100, 4, 3 * 6 * 6], the four patches that one token merges.
    """
    batch, grid = len(images), GRID[name]
    if name == "llava":
        side = SIDE // grid
        cut = images.reshape(batch, grid, side, grid, side, 3).transpose(0, 1, 3, 5, 2, 4)
        return cut.reshape(batch, grid * grid, -1)
    cut = images.reshape(batch, grid, 2, 6, grid, 2, 6, 3).transpose(0, 1, 4, 2, 5, 7, 3, 6)
    return cut.reshape(batch, grid * grid, 4, -1)
