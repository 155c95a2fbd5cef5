"""Reading digits: the handwritten number on the plate, from left to right; all digits must be right."""

import numpy as np

from vlmfast.eval.metrics import Totals
from vlmfast.eval.tasks.base import Doc, accuracy, documents, right, words

HEADLINE = "accuracy"
NEW_TOKENS = 16


def load(limit: int | None, seed: int) -> list[Doc]:
    """The questions on the first `limit` images."""
    return documents("digits", limit, seed)


def prompt(doc: Doc) -> str:
    """The question, as the model is asked it."""
    return doc.prompt


def score(doc: Doc, answer: str) -> dict[str, float]:
    """Counts: asked, right."""
    figures = "".join(word for word in words(answer) if word.isdigit())
    return right(figures == doc.answer.replace(" ", ""))


def summarise(totals: Totals) -> dict[str, np.ndarray]:
    """The accuracy."""
    return accuracy(totals)
