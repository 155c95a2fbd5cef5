"""New kinds of things: is one there, what colour has it, what has a colour? Only tuned models know these kinds.

Right if the first word that could be an answer to the question is the right one.
"""

import numpy as np

from vlmfast.eval.metrics import Totals
from vlmfast.eval.tasks.base import NOVEL, Doc, documents, first, right, shares
from vlmfast.eval.testbed.novel import KINDS
from vlmfast.eval.testbed.scenes import CATEGORIES, COLOURS

HEADLINE = "accuracy"
NEW_TOKENS = 16
ANSWERS = {"existence": ("yes", "no"), "colour": COLOURS, "name": (*KINDS, *CATEGORIES)}


def load(limit: int | None, seed: int) -> list[Doc]:
    """The questions on the first `limit` images."""
    return documents("novel_object", limit, seed, first=NOVEL)


def prompt(doc: Doc) -> str:
    """The question, as the model is asked it."""
    return doc.prompt


def score(doc: Doc, answer: str) -> dict[str, float]:
    """Counts: asked, right, and both for the form of the question."""
    return right(first(answer, ANSWERS[doc.subtask]) == doc.answer, doc.subtask)


def summarise(totals: Totals) -> dict[str, np.ndarray]:
    """The accuracy, and that of each form: accuracy/existence, /colour, /name."""
    return shares(totals, ANSWERS)
