"""Relations: what is left of, right of, above or below a thing?

Right if the first thing named, apart from the one asked about, is the right one.
"""

import numpy as np

from vlmfast.eval.metrics import Totals
from vlmfast.eval.tasks.base import Doc, accuracy, documents, first, right
from vlmfast.eval.testbed.scenes import CATEGORIES

HEADLINE = "accuracy"
NEW_TOKENS = 16


def load(limit: int | None, seed: int) -> list[Doc]:
    """The questions on the first `limit` images."""
    return documents("relation", limit, seed)


def prompt(doc: Doc) -> str:
    """The question, as the model is asked it."""
    return doc.prompt


def score(doc: Doc, answer: str) -> dict[str, float]:
    """Counts: asked, right."""
    return right(first(answer, [c for c in CATEGORIES if c != doc.info["query"]]) == doc.answer)


def summarise(totals: Totals) -> dict[str, np.ndarray]:
    """The accuracy."""
    return accuracy(totals)
