"""Captions before and after a method, with the things in them that the picture does not show."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlmfast.eval.report import effect
from vlmfast.eval.report.rows import Section
from vlmfast.eval.report.samples import Sample


class Piece(NamedTuple):
    """A stretch of a caption. invented: whether the thing it mentions is; None where it mentions none."""

    text: str
    invented: bool | None


@dataclass(frozen=True)
class Caption:
    """What some runs said, word for word. invented, mentioned: different things, as CHAIR counts them."""

    names: tuple[str, ...]
    pieces: tuple[Piece, ...]
    invented: int
    mentioned: int


@dataclass(frozen=True)
class View:
    """One picture, the things in it, and its captions: the unpatched run's first. picture: key of `Pictures.found`."""

    picture: str | None
    things: tuple[str, ...]
    captions: tuple[Caption, ...]


def gather(shown: Sequence[tuple[Section, Sequence[Sample]]]) -> list[tuple[Section, list[View]]]:
    """Every section that has captions to show, of runs that edit attention or decode otherwise."""
    found = [(section, [made for sample in samples if (made := view(section, sample))]) for section, samples in shown]
    return [(section, views) for section, views in found if views]


def view(section: Section, sample: Sample) -> View | None:
    """A sample as captions; None where it is none, its document is not at hand, or no run has it."""
    rows = [(row, answer) for row in effect.edited(section) if (answer := sample.answer(row)) and answer.doc]
    if not rows or not hasattr(_task(sample), "mentions"):
        return None
    said: dict[str, list[str]] = {}
    for row, answer in rows:
        said.setdefault(answer.text, []).append(effect.name(row))
    doc = rows[0][1].doc
    captions = tuple(caption(names, _task(sample), doc, text) for text, names in said.items())
    return View(sample.picture, tuple(doc.info["target"]), captions)


def caption(names: Sequence[str], task: Any, doc: Any, text: str) -> Caption:
    """A caption in pieces. names: of the runs"""
    mentions = task.mentions(doc, text)
    pieces, end = [], 0
    for one in mentions:
        pieces += [Piece(text[end : one.start], None), Piece(text[one.start : one.end], not one.there)]
        end = one.end
    pieces = [piece for piece in (*pieces, Piece(text[end:], None)) if piece.text]
    things = {one.thing: one.there for one in mentions}
    return Caption(tuple(names), tuple(pieces), sum(not there for there in things.values()), len(things))


def _task(sample: Sample) -> Any:
    from vlmfast.eval.tasks import task

    return task(sample.task)
