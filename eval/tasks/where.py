"""Place: in which quadrant of the picture is the thing asked about?"""

import numpy as np

from vlmfast.eval.metrics import Totals
from vlmfast.eval.tasks.base import Doc, accuracy, documents, first, right

HEADLINE = "accuracy"
NEW_TOKENS = 16

PLACES = ("top left", "top right", "bottom left", "bottom right")


def load(limit: int | None, seed: int) -> list[Doc]:
    """The questions on the first `limit` images."""
    return documents("where", limit, seed)


def prompt(doc: Doc) -> str:
    """The question, as the model is asked it."""
    return doc.prompt


def score(doc: Doc, answer: str) -> dict[str, float]:
    """Counts: asked, right."""
    return right(first(answer, PLACES) == doc.answer)


def summarise(totals: Totals) -> dict[str, np.ndarray]:
    """The accuracy."""
    return accuracy(totals)
