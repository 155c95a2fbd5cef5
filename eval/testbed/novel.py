"""A new skill for the trained models: kinds of things and forms of questions that their training never showed.

``scene(split, index)`` draws scenes as `vlmfast.eval.testbed.scenes` does, with eight new pictograms among the known
ones. They are named by words that the models know from signs only. Every thing in a scene has a colour of its own.
``questions`` asks about them: old forms about new kinds (task ``novel_object``), and a new form about any kinds (task
``novel_relation``). The scene gives every answer; all words are in ``VOCABULARY``.

    write("skill/train", 2400, "train", rehearsal=0.25)

writes a data set that fine-tuning reads: JSON lines in the chat format and PNG pictures.

Training, validation and test scenes have their own seeds, and none is one of `scenes`.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from vlmfast.eval.testbed import questions as known
from vlmfast.eval.testbed import scenes, sprites
from vlmfast.eval.testbed.questions import DIRECTIONS, Question
from vlmfast.eval.testbed.scenes import CATEGORIES, COLOURS, SPLITS, WORDS, Box, Scene, Split

KINDS = tuple(sprites.NEW_GLYPHS)
TASKS = ("novel_object", "novel_relation")
FILE = "data.jsonl"  # of a data set
PER_SCENE = 4  # questions of one scene in a data set
HASH = "6597e82f8adcc45b1f6662e0e9c520df1b5945de4c176fd01eb07cd4fdb6eb65"
_SIGNS = tuple(word for word in WORDS if word not in KINDS)  # no sign names a new kind


def scene(split: Split, index: int) -> Scene:
    """The scene number ``index`` of a split: two new kinds and one or two known ones, few of them twice."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    rng = np.random.default_rng((SPLITS.index(split) + 1, index, 2))
    placed: list[Box] = []
    image = scenes.ground(rng)
    digits = scenes.put_digits(image, rng, split, placed) if rng.random() < 0.25 else ()
    word = str(rng.choice(_SIGNS)) if rng.random() < 0.25 else None
    word_box = scenes.put_sign(image, rng, word, placed) if word else None
    kinds = [*rng.choice(KINDS, 2, replace=False), *rng.choice(CATEGORIES, int(rng.integers(1, 3)), replace=False)]
    wanted: list[scenes.Wanted] = []
    for kind, colour in zip(kinds, rng.choice(COLOURS, len(kinds), replace=False)):
        for _ in range(2 if rng.random() < 0.15 else 1):
            big = rng.random() < 0.5
            side = int(rng.integers(28, 33) if big else rng.integers(17, 21))
            wanted.append((side, str(kind), str(colour), "big" if big else "small", False))
    objects = scenes.put_objects(image, rng, wanted, placed)
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    return Scene(pixels, objects, word if word_box else None, word_box, digits)


def questions(scene: Scene, split: Split, index: int) -> list[Question]:
    """All questions about the scene number ``index`` of a split, always the same ones."""
    rng = np.random.default_rng((SPLITS.index(split) + 1, index, 3))
    return _objects(scene, rng) + _relations(scene)


def _objects(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Old forms about new kinds: what colour has it, what has the colour; is it there, once yes and once no."""
    present = [kind for kind in scene.present if kind in KINDS]
    asked = []
    for kind in present:
        colour = next(o.colour for o in scene.objects if o.category == kind)
        info = {"query": kind, "target": (kind,)}
        asked += [
            Question("novel_object", f"what colour is the {kind} ?", colour, "colour", info),
            Question("novel_object", f"what is {colour} ?", kind, "name", info | {"query": colour}),
        ]
    if present:
        absent = [kind for kind in KINDS if kind not in present]
        for kind, answer in ((str(rng.choice(present)), "yes"), (str(rng.choice(absent)), "no")):
            info = {"query": kind, "target": (kind,) if answer == "yes" else ()}
            asked.append(Question("novel_object", f"is there a {kind} ?", answer, "existence", info))
    return asked


def _relations(scene: Scene) -> list[Question]:
    """A new form: the colour of what lies in a direction of a single thing, where just one kind of thing clearly does.

    subtask: whether the thing that is named is of a "known" or a "new" kind.
    """
    asked = []
    for one in scene.objects:
        if sum(other.category == one.category for other in scene.objects) > 1:
            continue
        for direction in DIRECTIONS:
            found = {(o.category, o.colour) for o in known.neighbours(scene, one, direction)}
            if len(found) == 1:
                ((kind, colour),) = found
                info = {"query": one.category, "direction": direction, "target": (kind, one.category)}
                prompt = f"what colour is {direction} the {one.category} ?"
                subtask = "new" if one.category in KINDS else "known"
                asked.append(Question("novel_relation", prompt, colour, subtask, info))
    return asked


def samples(split: Split, count: int, rehearsal: float = 0.0) -> list[tuple[Scene, Question, str]]:
    """Questions with their scenes and the names of these, always the same ones; a longer list begins as a shorter.

    rehearsal: the share, in [0, 1), of questions that the models were trained on, about scenes of `scenes`, spread
    evenly. At most `PER_SCENE` questions of a scene.
    """
    if not 0 <= rehearsal < 1:
        raise ValueError(f"rehearsal is a share of the samples, at least 0 and below 1, got {rehearsal}")
    new, old = _stream(split, "new"), _stream(split, "old")
    return [next(old if int((i + 1) * rehearsal) > int(i * rehearsal) else new) for i in range(count)]


def _stream(split: Split, kind: str) -> Iterator[tuple[Scene, Question, str]]:
    """Scene after scene, of each some questions: of new scenes equally many of each task, of known ones any."""
    for index in itertools.count():
        rng = np.random.default_rng((SPLITS.index(split) + 1, index, 4))
        if kind == "new":
            shown = scene(split, index)
            asked = questions(shown, split, index)
            pools = [[q for q in asked if q.task == task] for task in TASKS]
        else:
            shown = scenes.scene(split, index)
            pools = [known.questions(shown, split, index)]
        for pool in pools:
            chosen = rng.permutation(len(pool))[: PER_SCENE // len(pools)]
            yield from ((shown, pool[i], f"{kind}-{index:06d}") for i in chosen)


def write(folder: str | Path, count: int, split: Split, rehearsal: float = 0.0) -> Path:
    """Write ``count`` samples as a data set in the chat format: ``data.jsonl`` and pictures beside it.

    A line is {"messages": [user's, assistant's], "images": [path from the folder], "task": ...}; the user's message
    has one part of type "image" and one of type "text". rehearsal: as in `samples`. Returns the JSON-lines file, which
    is written last, so that it is there only if all pictures are.
    """
    target = Path(folder)
    lines = []
    for shown, question, name in samples(split, count, rehearsal):
        picture = target / "images" / f"{name}.png"
        if not picture.exists():
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(shown.image).save(picture)
        answer = {"role": "assistant", "content": [{"type": "text", "text": question.answer}]}
        lines.append(
            {
                "messages": [*known.prompt_messages(question.prompt), answer],
                "images": [picture.relative_to(target).as_posix()],
                "task": question.task,
            }
        )
    file = target / FILE
    file.with_suffix(".new").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    file.with_suffix(".new").replace(file)
    return file


def fingerprint(count: int = 100) -> str:
    """A hash of the first ``count`` test scenes and of what is asked about them."""
    digest = hashlib.sha256()
    for index in range(count):
        shown = scene("test", index)
        asked = [(q.task, q.prompt, q.answer) for q in questions(shown, "test", index)]
        digest.update(repr((shown.objects, shown.word, shown.word_box, shown.digits, asked)).encode())
    return digest.hexdigest()
