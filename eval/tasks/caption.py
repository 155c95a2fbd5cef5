"""Captions, scored with CHAIR (Rohrbach et al., EMNLP 2018, arXiv:1809.02156) against the things in the picture.

chair_s (captions that invent a thing), chair_i (mentioned things that are invented), recall (things in the picture
that are mentioned), f1 (of recall and 1 - chair_i, the headline: neither silence nor invention pays), and length in
words. Captions are long answers and cost most of the time, hence fewer images by default.
"""

import re

import numpy as np

from vlmfast.eval.metrics import Totals, chair, ratio, summarise_chair
from vlmfast.eval.tasks.base import WORD, Doc, Mention, documents, words
from vlmfast.eval.testbed.questions import objects_in

HEADLINE = "f1"
NEW_TOKENS = 32
IMAGES = 40


def load(limit: int | None, seed: int) -> list[Doc]:
    """One request for a caption for each of the first `limit` images."""
    return documents("caption", limit, seed, IMAGES)


def prompt(doc: Doc) -> str:
    """The request, as the model is given it."""
    return doc.prompt


def score(doc: Doc, answer: str) -> dict[str, float]:
    """The counts of CHAIR, and length."""
    said = words(answer)
    return chair(objects_in(" ".join(said)), doc.info["target"]) | {"length": len(said)}


def mentions(doc: Doc, answer: str) -> list[Mention]:
    """The things that a caption mentions, each time it does."""
    found = []
    for word in re.finditer(WORD, answer.lower()):
        found += [Mention(*word.span(), thing, thing in doc.info["target"]) for thing in objects_in(word[0])]
    return found


def summarise(totals: Totals) -> dict[str, np.ndarray]:
    """chair_s, chair_i, recall, f1, length."""
    return summarise_chair(totals) | {
        "f1": ratio(2 * totals["found"], totals["mentioned"] + totals["present"]),
        "length": ratio(totals["length"], totals["captions"]),
    }
