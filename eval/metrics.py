"""Metrics with 95 % intervals: bootstrap over images, paired bootstrap against the unpatched run, CHAIR.

Questions about one image are not independent, so images are drawn with replacement and all their questions with
them. The same draws serve every task, every metric and both runs of a comparison: the interval of a mean over tasks
knows how the tasks go together, and the interval of a difference is that of paired samples.

A task's `score` returns counts (how often was it asked, right, ...), and its metrics are functions of the summed
counts. Resampling is then one product of the draws [R, images] with the counts [images, columns].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlmfast.eval.results import Metric

DRAWS = 2000
Totals = Mapping[str, np.ndarray]  # name of a count -> its sums [R], one for each draw
Summarise = Callable[[Totals], dict[str, np.ndarray]]  # sums -> metrics [R]


def ratio(part: np.ndarray, whole: np.ndarray, empty: float = np.nan) -> np.ndarray:
    """part / whole, [R]; `empty` where whole is 0 (NaN: nothing was asked; 0: none found, as for a precision)."""
    return np.divide(part, whole, out=np.full(np.shape(whole), empty), where=np.asarray(whole) != 0)


@dataclass(frozen=True)
class Counts:
    """The scores of one task, summed per image: `values` [images, columns], float64; absent images hold zeros."""

    columns: tuple[str, ...]
    values: np.ndarray

    @classmethod
    def of(cls, scores: Sequence[Mapping[str, float]], groups: Sequence[int], images: Sequence[int]) -> "Counts":
        """Sum the scores of all questions (`groups`: the image of each) over the images, in the order of `images`."""
        columns = tuple(dict.fromkeys(name for score in scores for name in score))
        row = {image: i for i, image in enumerate(images)}
        values = np.zeros((len(images), len(columns)))
        for score, group in zip(scores, groups, strict=True):
            for name, value in score.items():
                values[row[group], columns.index(name)] += value
        return cls(columns, values)

    def totals(self, draws: np.ndarray) -> dict[str, np.ndarray]:
        """The sums of every column for draws [R, images]: name -> [R]."""
        return dict(zip(self.columns, (draws @ self.values).T))


def draw(images: int, seed: int, draws: int = DRAWS) -> np.ndarray:
    """How often each image is drawn in each resample, [draws, images], every row summing to `images`."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(images, np.full(images, 1 / images), size=draws).astype(np.float64)


def interval(point: np.ndarray, replicates: np.ndarray) -> tuple[float, float, float]:
    """Value and 95 % percentile interval from a point estimate [1] and its replicates [R].

    Resamples in which the metric has nothing to measure (NaN) do not count.
    """
    defined = replicates[~np.isnan(replicates)]
    value = float(point[0])
    low, high = np.percentile(defined, [2.5, 97.5]) if len(defined) else (value, value)
    return value, float(low), float(high)


def measure(
    counts: Mapping[str, Counts],
    summarise: Mapping[str, Summarise],
    headline: Mapping[str, str],
    baseline: Mapping[str, Counts] | None = None,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Metric]], Metric]:
    """Every metric of every task, and `macro`, the mean of the tasks' headline metrics, with intervals.

    With `baseline` (the counts of the unpatched run on the same images) every metric also carries its paired
    difference. A metric with nothing to measure (no question of a subtask among the images) is left out.
    """
    sizes = {len(c.values) for c in counts.values()}
    if len(sizes) != 1 or sizes == {0}:
        raise ValueError(f"all tasks must be summed over the same images, got {sorted(sizes)}")
    (images,) = sizes
    one = np.ones((1, images))  # every image once: the point estimate
    draws = draw(images, seed)

    def values(source: Mapping[str, Counts], weights: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
        return {task: summarise[task](source[task].totals(weights)) for task in counts}

    def macro(metrics: Mapping[str, Mapping[str, np.ndarray]]) -> np.ndarray:
        return np.mean([metrics[task][headline[task]] for task in counts], axis=0)

    def metric(*pairs: np.ndarray) -> Metric:
        value, low, high = interval(pairs[0], pairs[1])
        if len(pairs) == 2:
            return Metric(value=value, low=low, high=high)
        difference = interval(pairs[0] - pairs[2], pairs[1] - pairs[3])
        names = ("difference", "difference_low", "difference_high")
        return Metric(value=value, low=low, high=high, **dict(zip(names, difference)))

    sources = [counts] if baseline is None else [counts, baseline]
    tables = [values(source, weights) for source in sources for weights in (one, draws)]
    metrics = {
        task: {
            name: metric(*(table[task][name] for table in tables))
            for name in tables[0][task]
            if not np.isnan(tables[0][task][name][0])
        }
        for task in counts
    }
    return metrics, metric(*(macro(table) for table in tables))


def retention(
    counts: Mapping[str, Counts],
    summarise: Mapping[str, Summarise],
    headline: Mapping[str, str],
    baseline: Mapping[str, Counts],
    seed: int = 0,
) -> Metric | None:
    """What is left of the unpatched run: mean over the tasks of headline / unpatched headline, with its interval.

    Arguments as in `measure`; the draws are its own, too. None where the unpatched model is at zero in a task.
    """
    (images,) = {len(c.values) for c in counts.values()}
    shares = []
    for weights in (np.ones((1, images)), draw(images, seed)):
        own, before = (
            [summarise[task](source[task].totals(weights))[headline[task]] for task in counts]
            for source in (counts, baseline)
        )
        parts = [ratio(part, whole) for part, whole in zip(own, before)]
        shares.append(np.mean(parts, axis=0))
    if np.isnan(shares[0][0]):
        return None
    return Metric(**dict(zip(("value", "low", "high"), interval(*shares))))


def chair(mentioned: Sequence[str], present: Sequence[str]) -> dict[str, float]:
    """The counts behind CHAIR for one caption: which of the objects it mentions are in the picture.

    CHAIR_i = invented / mentioned, CHAIR_s = captions with an invention / captions, recall = found / present
    (Rohrbach et al., EMNLP 2018, arXiv:1809.02156). Each object counts once a caption.
    """
    said, there = set(mentioned), set(present)
    return {
        "captions": 1,
        "hallucinating": float(bool(said - there)),
        "mentioned": len(said),
        "invented": len(said - there),
        "found": len(said & there),
        "present": len(there),
    }


def summarise_chair(totals: Totals) -> dict[str, np.ndarray]:
    """chair_s, chair_i and recall from summed counts; an empty caption invents nothing and finds nothing."""
    return {
        "chair_s": ratio(totals["hallucinating"], totals["captions"]),
        "chair_i": ratio(totals["invented"], totals["mentioned"], empty=0.0),
        "recall": ratio(totals["found"], totals["present"]),
    }
