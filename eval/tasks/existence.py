"""Object existence, asked as POPE asks it (Li et al., EMNLP 2023, arXiv:2305.10355).

As many yes as no; the absent thing is drawn at random, from the most frequent ones (popular), or is the missing
partner of a thing that is there (adversarial). Metrics with the positive class "yes", over all and per split:
accuracy, precision, recall, f1, yes_ratio; and yes_accuracy, the accuracy where the answer is yes: pruning shows
there first. An answer that is neither yes nor no is wrong and counts as not said yes.
"""

import numpy as np

from vlmfast.eval.metrics import Totals, ratio
from vlmfast.eval.tasks.base import Doc, documents, first

HEADLINE = "accuracy"
NEW_TOKENS = 16
SPLITS = ("random", "popular", "adversarial", "all")


def load(limit: int | None, seed: int) -> list[Doc]:
    """The questions of all splits on the first `limit` images."""
    return documents("existence", limit, seed)


def prompt(doc: Doc) -> str:
    """The question, as the model is asked it."""
    return doc.prompt


def score(doc: Doc, answer: str) -> dict[str, float]:
    """Counts per split: asked, right, of_yes (the answer is yes), said_yes, hit (both)."""
    said = first(answer, ("yes", "no", "not"))
    yes = doc.answer == "yes"
    return {
        f"asked/{doc.subtask}": 1,
        f"right/{doc.subtask}": float(said == "yes" if yes else said in ("no", "not")),
        f"of_yes/{doc.subtask}": float(yes),
        f"said_yes/{doc.subtask}": float(said == "yes"),
        f"hit/{doc.subtask}": float(yes and said == "yes"),
    }


def summarise(totals: Totals) -> dict[str, np.ndarray]:
    """The metrics over all splits, then each with "/split" behind its name."""
    splits = [split for split in SPLITS if f"asked/{split}" in totals]
    metrics: dict[str, np.ndarray] = {}
    for ending, group in [("", splits), *((f"/{split}", [split]) for split in splits)]:
        names = ("asked", "right", "of_yes", "said_yes", "hit")
        asked, correct, of_yes, said_yes, hit = (
            np.sum([totals[f"{name}/{s}"] for s in group], axis=0) for name in names
        )
        metrics |= {
            f"accuracy{ending}": ratio(correct, asked),
            f"precision{ending}": ratio(hit, said_yes, empty=0.0),
            f"recall{ending}": ratio(hit, of_yes),
            f"f1{ending}": ratio(2 * hit, said_yes + of_yes),
            f"yes_ratio{ending}": ratio(said_yes, asked),
            f"yes_accuracy{ending}": ratio(hit, of_yes),
        }
    return metrics
