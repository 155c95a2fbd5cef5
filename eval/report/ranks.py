"""Ranks with ties among runs of the same budget.

A run's rank is 1 plus the number of runs of its budget that are better: whose paired difference from it has a 95 %
interval above zero, over the same resamples of the same images (or, for lmms-eval's tasks, documents). Runs that share
a rank are tied. A budget is the share of the FLOPs that `keep` was solved for, else `keep` itself; runs that drop no
token are one budget, the unpatched model among them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vlmfast.eval.lmms.tasks import PREFIX
from vlmfast.eval.metrics import DRAWS, Counts, draw, interval
from vlmfast.eval.report.archive import Archive
from vlmfast.eval.report.rows import PERCENT, Place, Row, Section
from vlmfast.eval.results import Missing, Result

Draws = Mapping[str, np.ndarray]  # task -> headline metric, [1 + R]: as it is, then of every resample


def ranked(sections: Sequence[Section], archive: Archive) -> list[Section]:
    """The sections with the places of their runs; `Section.unranked` says why some have none."""
    return [_ranked(section, archive) for section in sections]


def _ranked(section: Section, archive: Archive) -> Section:
    groups: dict[Any, list[Row]] = {}
    for row in section.rows:
        asked = tuple(sorted((name, task.hash) for name, task in row.result.tasks.items()))
        groups.setdefault((row.budget, asked), []).append(row)
    places: dict[str, tuple[Place | None, dict[str, Place]]] = {}
    missing: dict[str, None] = {}  # in order, each reason once
    for rows in groups.values():
        if len(rows) > 1:
            try:
                drawn = [replicates(row.result, archive, missing) for row in rows]
            except Missing as error:
                missing[str(error)] = None
                continue
            places |= _places(rows, drawn)
    return replace(
        section,
        unranked="; ".join(missing),
        rows=tuple(
            replace(row, place=places[row.spec][0], places=places[row.spec][1]) if row.spec in places else row
            for row in section.rows
        ),
    )


def _places(rows: Sequence[Row], drawn: Sequence[Draws]) -> dict[str, tuple[Place | None, dict[str, Place]]]:
    """Every run's place on the mean of the tasks, where all could be drawn, and on each of these, by spec."""
    directions = {name: task.better for name, task in rows[0].result.tasks.items()}
    known = [name for name in directions if all(name in one for one in drawn)]
    on_tasks = {name: places([directions[name] * one[name] for one in drawn]) for name in known}
    means: list[Place | None] = [None] * len(rows)
    if len(known) == len(directions) and len(set(directions.values())) == 1:  # else their mean says nothing
        sign = next(iter(directions.values()))
        means = list(places([sign * np.mean(list(one.values()), axis=0) for one in drawn]))
    return {row.spec: (means[i], {name: found[i] for name, found in on_tasks.items()}) for i, row in enumerate(rows)}


def places(values: Sequence[np.ndarray]) -> list[Place]:
    """The places of some runs by a metric of which more is better. values: of each run [1 + R], paired resamples."""
    worse_than = [sum(_better(other, own) for other in values) for own in values]
    return [Place(1 + worse, worse_than.count(worse) > 1, len(values)) for worse in worse_than]


def _better(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether the 95 % interval of the difference lies above zero."""
    difference = one - other
    return interval(difference[:1], difference[1:])[1] > 0


def replicates(result: Result, archive: Archive, missing: dict[str, None]) -> dict[str, np.ndarray]:
    """The headline metric of every task of a run, as it is and of every resample. [1 + R]

    missing: learns why a task of lmms-eval's is left out. `Missing` where the answers, or what ours are scored with,
    are not at hand.
    """
    records = archive.answers(result)
    if not all(name.startswith(PREFIX) for name in result.tasks):
        return _of_counts(result, records, archive)
    found = {}
    for name in result.tasks:
        try:
            found[name] = _of_values(result, name, records)
        except Missing as error:
            missing[str(error)] = None
    return found


def _of_values(result: Result, name: str, records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """From what lmms-eval made of each document, where its metric is their mean."""
    task = result.tasks[name]
    values = [record["values"].get(task.headline) for record in records if record["id"].startswith(f"{name}/")]
    numbers = np.array([value for value in values if isinstance(value, int | float)], dtype=np.float64)
    value = task.metrics[task.headline].value  # or a hundredth of it (`rows`)
    mean = np.isclose(numbers.mean() * np.array([1.0, PERCENT]), value).any() if len(numbers) else False
    if not mean or len(numbers) != len(values):
        raise Missing(f"{task.headline} of {name} is no mean over its documents")
    weights = np.concatenate([np.ones((1, len(numbers))), draw(len(numbers), result.seed)])
    return weights @ numbers / len(numbers)


def _of_counts(result: Result, records: Sequence[Mapping[str, Any]], archive: Archive) -> dict[str, np.ndarray]:
    """From the answers, scored again."""
    from vlmfast.eval.tasks import task

    answers = {record["id"]: record["answer"] for record in records}
    asked = {name: archive.documents(result, name) for name in result.tasks}
    scenes = list(dict.fromkeys(doc.scene for docs in asked.values() for doc in docs))
    weights = np.concatenate([np.ones((1, len(scenes))), draw(len(scenes), result.seed, DRAWS)])
    found = {}
    for name, docs in asked.items():
        if missing := next((doc.id for doc in docs if doc.id not in answers), None):
            raise Missing(f"the answers of {result.spec} lack question {missing}")
        scores = [task(name).score(doc, answers[doc.id]) for doc in docs]
        counts = Counts.of(scores, [doc.scene for doc in docs], scenes)
        found[name] = task(name).summarise(counts.totals(weights))[result.tasks[name].headline]
    return found
