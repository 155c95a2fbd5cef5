"""Samples for the page: a question about a picture, what every run answered, and the tokens it kept."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmfast.eval.overlay import dropped_path
from vlmfast.eval.report.documents import Documents
from vlmfast.eval.report.rows import Row, Section


@dataclass(frozen=True)
class Answer:
    """What one run said, and what it looked at. `correct` is None where an answer is not simply right or wrong."""

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
    prompt: str
    expected: str
    picture: str | None
    missing: str
    answers: Mapping[str, Answer]  # spec -> answer

    def answer(self, row: Row | None) -> Answer | None:
        """The answer of a run."""
        return None if row is None else self.answers.get(row.spec)


class Pictures:
    """Test scenes as PNG data URIs, each once; only while they are the ones that the results were made on."""

    def __init__(self, documents: Documents | None = None) -> None:
        self.found: dict[str, str] = {}  # key -> data URI
        self.documents = documents or Documents()
        self._asked: dict[
            int, dict[tuple[int, str], Any]
        ] = {}  # by the set of documents: scene and prompt -> document

    def look_up(self, row: Row, task: str, index: int, prompt: str) -> tuple[str | None, Any, str]:
        """Key of the picture, the task's document, and, where there are none, the reason."""
        docs = self.documents.of(row.result, task)
        if isinstance(docs, str):
            return None, None, docs
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
        for record in row.result.samples:
            key = (record["task"], record["index"], record["prompt"])
            picture, doc, missing = pictures.look_up(row, *key)
            if key not in found:
                found[key] = Sample(record["task"], record["prompt"], record["expected"], picture, missing, {})
            found[key].answers[row.spec] = _answer(row, record, doc)  # type: ignore[index]
    return list(found.values())


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
    """The document's picture as a PNG data URI."""
    from PIL import Image

    from vlmfast.eval.tasks import image

    buffer = io.BytesIO()
    Image.fromarray(image(doc)).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
