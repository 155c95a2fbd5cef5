"""Attribute binding: which thing has this colour? Right if the first thing named is the right one."""

import numpy as np

from vlmfast.eval.metrics import Totals
from vlmfast.eval.tasks.base import Doc, accuracy, documents, first, right
from vlmfast.eval.testbed.scenes import CATEGORIES

HEADLINE = "accuracy"
NEW_TOKENS = 16


def load(limit: int | None, seed: int) -> list[Doc]:
    """The questions on the first `limit` images."""
    return documents("binding", limit, seed)


def prompt(doc: Doc) -> str:
    """The question, as the model is asked it."""
    return doc.prompt


def score(doc: Doc, answer: str) -> dict[str, float]:
    """Counts: asked, right."""
    return right(first(answer, CATEGORIES) == doc.answer)


def summarise(totals: Totals) -> dict[str, np.ndarray]:
    """The accuracy."""
    return accuracy(totals)
