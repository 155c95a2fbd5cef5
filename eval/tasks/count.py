"""Counting: how many of a thing are there? A number may be a word or a figure ("3 clouds")."""

import numpy as np

from vlmfast.eval.metrics import Totals
from vlmfast.eval.tasks.base import Doc, accuracy, documents, first, right
from vlmfast.eval.testbed.questions import COUNTS

HEADLINE = "accuracy"
NEW_TOKENS = 16

FIGURES = {str(i): word for i, word in enumerate(COUNTS, 1)}


def load(limit: int | None, seed: int) -> list[Doc]:
    """The questions on the first `limit` images."""
    return documents("count", limit, seed)


def prompt(doc: Doc) -> str:
    """The question, as the model is asked it."""
    return doc.prompt


def score(doc: Doc, answer: str) -> dict[str, float]:
    """Counts: asked, right."""
    said = first(answer, [*COUNTS, *FIGURES])
    return right(FIGURES.get(said, said) == doc.answer)


def summarise(totals: Totals) -> dict[str, np.ndarray]:
    """The accuracy."""
    return accuracy(totals)
