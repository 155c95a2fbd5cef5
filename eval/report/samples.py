"""Samples for the page: a question about a picture, what every run answered, and the tokens it kept."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmfast.eval.lmms.tasks import PREFIX
from vlmfast.eval.overlay import dropped_path
from vlmfast.eval.report.archive import Archive
from vlmfast.eval.report.rows import Row, Section
from vlmfast.eval.results import Missing

WORDS = ("prompt", "expected", "answer")
SHOWN = 24  # documents of lmms-eval's tasks that are shown, in words alone
LARGEST = 640  # pixels of a picture's longer side on the page
SHARP = 320  # up to which it is stored without loss


@dataclass(frozen=True)
class Answer:
    """What one run said, and what it looked at. `correct` is None where an answer is not simply right or wrong.

    columns, rows: of the grid of visual tokens, 0 where there is no overlay.
    """

    row: Row
    text: str
    correct: bool | None
    dropped: str  # SVG path over the grid
    columns: int
    rows: int
    kept: int
    doc: Any  # the task's document, None where it is not at hand

    @property
    def total(self) -> int:
        """Visual tokens before pruning."""
        return self.columns * self.rows


@dataclass(frozen=True)
class Sample:
    """One question with all answers; `picture` is a key of `Pictures.found`, `missing` says why there is none."""

    task: str
    index: int  # of the test scene, or the document
    prompt: str
    expected: str
    picture: str | None
    missing: str
    answers: Mapping[str, Answer]  # spec -> answer

    def answer(self, row: Row | None) -> Answer | None:
        """The answer of a run."""
        return None if row is None else self.answers.get(row.spec)

    @property
    def differs(self) -> bool:
        """Whether not all runs said the same."""
        return len({answer.text for answer in self.answers.values()}) > 1

    @property
    def wrong(self) -> bool:
        """Whether some run was wrong."""
        return any(answer.correct is False for answer in self.answers.values())


class Pictures:
    """Test scenes as PNG data URIs, each once; only while they are the ones that the results were made on."""

    def __init__(self, archive: Archive | None = None) -> None:
        self.found: dict[str, str] = {}  # key -> data URI
        self.archive = archive or Archive()
        self._asked: dict[
            int, dict[tuple[int, str], Any]
        ] = {}  # by the set of documents: scene and prompt -> document

    def look_up(self, row: Row, task: str, index: int, prompt: str) -> tuple[str | None, Any, str]:
        """Key of the picture, the task's document, and, where there are none, the reason."""
        if task.startswith(PREFIX):
            return None, None, "lmms-eval keeps the pictures of its tasks"
        try:
            docs = self.archive.documents(row.result, task)
        except Missing as error:
            return None, None, str(error)
        asked = self._asked.get(id(docs))
        if asked is None:
            from vlmfast.eval.tasks import task as named

            prompt_of = named(task).prompt
            asked = self._asked[id(docs)] = {(doc.scene, prompt_of(doc)): doc for doc in docs}
        doc = asked.get((index, prompt))
        if doc is None:
            return None, None, f"test scene {index} has no such question"
        key = f"scene-{index}"
        if key not in self.found:
            self.found[key] = _data_uri(doc)
        return key, doc, ""


def gather(section: Section, pictures: Pictures) -> list[Sample]:
    """The samples of a section, in the order of the results, each with the answers of all runs that have it."""
    found: dict[tuple[str, int, str], Sample] = {}
    for row in section.rows:
        for record in _records(row, pictures.archive):
            key = (record["task"], record["index"], record["prompt"])
            if key not in found:
                picture, _, missing = pictures.look_up(row, *key)
                found[key] = Sample(*key, record["expected"], picture, missing, {})
            doc = pictures.look_up(row, *key)[1]
            found[key].answers[row.spec] = _answer(row, record, doc)  # type: ignore[index]
    return list(found.values())


def _records(row: Row, archive: Archive) -> list[Mapping[str, Any]]:
    """What one run answered, as in `Result.samples`: those, then what lies beside the result, task by task."""
    records: list[Mapping[str, Any]] = list(row.result.samples)
    asked = {(record["task"], record["prompt"], record["index"]) for record in records}
    try:
        stored = archive.answers(row.result)
    except Missing:
        return records
    theirs = [record for record in stored if record["id"].startswith(PREFIX)][:SHOWN]
    others = [
        {
            "task": task,
            "index": int(index),
            "prompt": record["prompt"],
            "expected": record["expected"],
            "answer": record["answer"],
            "kept": [record["indices"]],
            "grid": record["grid"],
        }
        for record in stored
        if "indices" in record
        for task, index, _ in [record["id"].rsplit("/", 2)]
    ]
    order = {name: number for number, name in enumerate(row.result.tasks)}
    others = [one for one in others if (one["task"], one["prompt"], one["index"]) not in asked]
    records += sorted(others, key=lambda one: (order.get(one["task"], 0), one["index"], one["prompt"]))
    return records + [_in_words(record) for record in theirs]


def _in_words(record: Mapping[str, Any]) -> dict[str, Any]:
    """A document of lmms-eval's, whose picture and kept tokens are not stored."""
    task, number = record["id"].rsplit("/", 1)
    words = {name: record[name] if isinstance(record[name], str) else _joined(record[name]) for name in WORDS}
    return {"task": task, "index": int(number), "grid": (1, 0, 0), "kept": [[]], **words}


def _joined(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _answer(row: Row, record: Mapping[str, Any], doc: Any) -> Answer:
    grid = record["grid"]
    kept = record["kept"][0] if record["kept"] else range(grid[1] * grid[2])
    return Answer(
        row=row,
        text=record["answer"],
        correct=None if doc is None else _correct(doc, record["answer"]),
        dropped=dropped_path(kept, grid),
        columns=grid[2],
        rows=grid[1],
        kept=len(kept),
        doc=doc,
    )


def _correct(doc: Any, answer: str) -> bool | None:
    """Whether the task counts the answer as right; None for tasks that count other things, such as captions."""
    from vlmfast.eval.tasks import task

    counts = {name: n for name, n in task(doc.task).score(doc, answer).items() if name.split("/")[0] == "right"}
    return any(counts.values()) if counts else None


def _data_uri(doc: Any) -> str:
    """The document's picture as a data URI: photographs are scaled down, for a page of a bearable size."""
    from PIL import Image

    from vlmfast.eval.tasks import image

    picture = Image.fromarray(image(doc))
    buffer, kind = io.BytesIO(), "PNG" if max(picture.size) <= SHARP else "JPEG"
    picture.thumbnail((LARGEST, LARGEST))
    picture.save(buffer, format=kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
