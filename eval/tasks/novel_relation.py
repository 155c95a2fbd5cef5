"""New questions about place: what colour is left of the cup? Is the sun above the cup? Only tuned models know them.

Things are of known and of new kinds. Right if the first word that could be an answer is the right one.
"""

import numpy as np

from vlmfast.eval.metrics import Totals
from vlmfast.eval.tasks.base import NOVEL, Doc, documents, first, right, shares
from vlmfast.eval.testbed.scenes import COLOURS

HEADLINE = "accuracy"
NEW_TOKENS = 16
ANSWERS = {"colour": COLOURS, "yes or no": ("yes", "no")}


def load(limit: int | None, seed: int) -> list[Doc]:
    """The questions on the first `limit` images."""
    return documents("novel_relation", limit, seed, first=NOVEL)


def prompt(doc: Doc) -> str:
    """The question, as the model is asked it."""
    return doc.prompt


def score(doc: Doc, answer: str) -> dict[str, float]:
    """Counts: asked, right, and both for the form of the question."""
    return right(first(answer, ANSWERS[doc.subtask]) == doc.answer, doc.subtask)


def summarise(totals: Totals) -> dict[str, np.ndarray]:
    """The accuracy, and that of each form: accuracy/colour, /yes or no."""
    return shares(totals, ANSWERS)
