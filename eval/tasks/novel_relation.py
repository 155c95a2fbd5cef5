"""A new form of question: what colour is left of the cup? Only tuned models know it.

Things are of known and of new kinds. Right if the first colour named is the right one.
"""

import numpy as np

from vlmfast.eval.metrics import Totals
from vlmfast.eval.tasks.base import NOVEL, Doc, documents, first, right, shares
from vlmfast.eval.testbed.scenes import COLOURS

HEADLINE = "accuracy"
NEW_TOKENS = 16
SUBTASKS = ("known", "new")  # kind of the thing that the question names


def load(limit: int | None, seed: int) -> list[Doc]:
    """The questions on the first `limit` images."""
    return documents("novel_relation", limit, seed, first=NOVEL)


def prompt(doc: Doc) -> str:
    """The question, as the model is asked it."""
    return doc.prompt


def score(doc: Doc, answer: str) -> dict[str, float]:
    """Counts: asked, right, and both for the kind of the thing asked about."""
    return right(first(answer, COLOURS) == doc.answer, doc.subtask)


def summarise(totals: Totals) -> dict[str, np.ndarray]:
    """The accuracy, and that of each kind of thing asked about: accuracy/known, /new."""
    return shares(totals, SUBTASKS)
