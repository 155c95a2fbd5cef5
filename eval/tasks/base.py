"""What the tasks share: the document, how documents are drawn from the testbed, and how short answers are read."""

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from vlmfast.eval.metrics import Totals, ratio
from vlmfast.eval.tasks.files import pixels
from vlmfast.eval.testbed import novel
from vlmfast.eval.testbed.questions import Question, questions
from vlmfast.eval.testbed.scenes import TEST_SCENES, Scene, Split, scene

WORD = r"[a-z]+|\d+"  # in lower case
IMAGES = 70  # images a task takes when no limit is given
NOVEL = 10**5  # numbers of the scenes of `vlmfast.eval.testbed.novel` start here


@dataclass(frozen=True)
class Doc:
    """One question of a task about one image; `number` counts the task's questions on it.

    scene: the scene of `split`, from `NOVEL` on one of the new skill; or the number that stands for `picture`, a file
    of the user's.
    """

    task: str
    scene: int
    number: int
    prompt: str
    answer: str
    subtask: str = ""
    info: dict[str, Any] = field(default_factory=dict, compare=False)
    picture: str = ""
    split: Split = "test"

    @property
    def id(self) -> str:
        """Names the question in result files and error messages."""
        return f"{'' if self.split == 'test' else self.split + ':'}{self.task}/{self.scene}/{self.number}"


class Mention(NamedTuple):
    """A thing that a caption mentions, text[start:end], and whether it is in the picture."""

    start: int
    end: int
    thing: str
    there: bool


class Task(Protocol):
    """What a task file defines. `score` returns counts, `summarise` turns their sums [R] into metrics [R].

    Tasks about captions also have `mentions(doc, answer)`, what CHAIR counts, in order: a list of `Mention`.
    """

    @property
    def HEADLINE(self) -> str: ...  # noqa: D102, N802
    @property
    def NEW_TOKENS(self) -> int: ...  # noqa: D102, N802

    def load(self, limit: int | None, seed: int) -> list[Doc]: ...  # noqa: D102
    def prompt(self, doc: Doc) -> str: ...  # noqa: D102
    def score(self, doc: Doc, answer: str) -> dict[str, float]: ...  # noqa: D102
    def summarise(self, totals: Totals) -> dict[str, np.ndarray]: ...  # noqa: D102


@functools.lru_cache(maxsize=TEST_SCENES)
def scene_and_questions(index: int, split: Split = "test") -> tuple[Scene, tuple[Question, ...]]:
    """A scene and its questions; tasks share scenes. index: from `NOVEL` on the scenes of the new skill."""
    if index >= NOVEL:
        shown = novel.scene(split, index - NOVEL)
        return shown, tuple(novel.questions(shown, split, index - NOVEL))
    shown = scene(split, index)
    return shown, tuple(questions(shown, split, index))


def image(doc: Doc) -> np.ndarray:
    """The picture a document asks about, uint8 [H, W, 3]."""
    if doc.picture:
        return pixels(doc.picture)
    return scene_and_questions(doc.scene, doc.split)[0].image


def documents(
    task: str, limit: int | None, seed: int, images: int = IMAGES, split: Split = "test", first: int = 0
) -> list[Doc]:
    """All questions of a task on the first `limit` scenes that have any, in the order that `seed` draws.

    split: "test"; or "validation", for what is chosen by its scores: none of its scenes is a test scene. A smaller
    limit takes a part of what a larger one takes; None takes `images`. There are as many scenes to draw from as the
    test split has: a limit above takes them all. first: number of the first of these scenes.
    """
    docs: list[Doc] = []
    left = images if limit is None else limit
    for index in (first + np.random.default_rng(seed).permutation(TEST_SCENES)).tolist():
        asked = [q for q in scene_and_questions(index, split)[1] if q.task == task]
        docs += [Doc(task, index, i, q.prompt, q.answer, q.subtask, q.info, split=split) for i, q in enumerate(asked)]
        left -= bool(asked)
        if left == 0:
            break
    return docs


def words(answer: str) -> list[str]:
    """The words and numbers of an answer, lower case, without punctuation."""
    return re.findall(WORD, answer.lower())


def first(answer: str, known: Sequence[str]) -> str:
    """The first of the `known` words (or phrases) in an answer, "" if there is none: "It is red." -> "red"."""
    text = " " + " ".join(words(answer)) + " "
    found = [(text.find(f" {word} "), word) for word in known if f" {word} " in text]
    return min(found)[1] if found else ""


def right(correct: bool, subtask: str = "") -> dict[str, float]:
    """The counts of a question that is answered rightly or wrongly, and the same under the name of its subtask."""
    counts = {"asked": 1, "right": float(correct)}
    return counts | {f"{name}/{subtask}": n for name, n in counts.items()} if subtask else counts


def accuracy(totals: Totals) -> dict[str, np.ndarray]:
    """The share of right answers, of counts made by `right`."""
    return {"accuracy": ratio(totals["right"], totals["asked"])}


def shares(totals: Totals, subtasks: Iterable[str]) -> dict[str, np.ndarray]:
    """The accuracy, then that of each subtask that was asked: accuracy/subtask, of counts made by `right`."""
    found = [name for name in subtasks if f"asked/{name}" in totals]
    return accuracy(totals) | {
        f"accuracy/{name}": ratio(totals[f"right/{name}"], totals[f"asked/{name}"]) for name in found
    }


def task_hash(task: Task, docs: Sequence[Doc]) -> str:
    """Changes with any prompt, expected answer, image or answer length of the task."""
    digest = hashlib.sha256(str(task.NEW_TOKENS).encode())
    for doc in docs:
        digest.update(repr((doc.id, task.prompt(doc), doc.answer, doc.subtask)).encode())
        digest.update(hashlib.sha256(image(doc).tobytes()).digest())
    return digest.hexdigest()[:16]
