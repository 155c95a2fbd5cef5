"""What lmms-eval's tasks make of answers, with intervals: documents drawn again, paired with the unpatched run's.

A metric is aggregated by its task's own function; where that cannot be repeated (it writes files, or takes too long)
low and high are the value itself and there is no interval of the difference.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeGuard

import numpy as np

from vlmfast.eval.lmms.tasks import PREFIX, Chosen
from vlmfast.eval.metrics import DRAWS, draw, interval
from vlmfast.eval.results import Metric

PATIENCE = 2.0  # seconds for the resamples of one metric
FEWEST = 200  # resamples that make an interval


def records_of(one: Chosen, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is stored of each document: the answer, what was expected, and what the task made of the two."""
    names = list(one.task.aggregation())
    return [
        {
            "id": f"{PREFIX}{one.name}/{sample['doc_id']}",
            "prompt": _plain(next(iter(sample["arguments"]), "")),
            "expected": _plain(sample["target"]),
            "answer": _plain(sample["filtered_resps"]),
            "tokens": sum((count or {}).get("output_tokens", 0) for count in sample["token_counts"]),
            "values": {name: _plain(sample[name]) for name in names if name in sample},
        }
        for sample in samples
    ]


def measure(
    one: Chosen,
    numbers: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    baseline: Mapping[str, Any],
    seed: int,
) -> dict[str, Metric]:
    """Every number that lmms-eval gives of a task, the headline first: its first metric. Filters by their names."""
    ids = [f"{PREFIX}{one.name}/{sample['doc_id']}" for sample in samples]
    filters = list(dict.fromkeys(key.partition(",")[2] for key in numbers if "," in key))
    metrics: dict[str, Metric] = {}
    for name, aggregate in one.task.aggregation().items():
        for number, filter_ in enumerate(filters):
            value = numbers.get(f"{name},{filter_}")
            label = name if number == 0 else f"{name}/{filter_}"
            if isinstance(value, Mapping):
                leaves = {f"{label}/{key}": leaf for key, leaf in value.items() if _is_number(leaf)}
                metrics |= {key: _point(float(leaf)) for key, leaf in leaves.items()}
            elif _is_number(value):
                values = (
                    [sample[name] for sample in samples] if len(filters) == 1 and len(set(ids)) == len(ids) else []
                )
                others = [baseline.get(key, {}).get(name) for key in ids] if baseline else None
                metrics[label] = resampled(float(value), values, others, aggregate, seed)
    if not metrics:
        raise RuntimeError(
            f"lmms-eval gives no number for {one.name}: {', '.join(map(str, numbers))}; tasks that only write a file "
            "for a server are run by lmms-eval itself"
        )
    return metrics


def resampled(
    value: float, values: Sequence[Any], others: Sequence[Any] | None, aggregate: Callable[..., Any], seed: int
) -> Metric:
    """A metric with its interval and, paired, its difference from the unpatched run (others: None for that run)."""
    if not values or "args" in inspect.signature(aggregate).parameters:
        return _point(value)
    start = time.perf_counter()
    again = _aggregated(aggregate, values)
    spent = max(time.perf_counter() - start, 1e-7)
    plain = getattr(aggregate, "__name__", "") == "mean" and all(_is_number(one) for one in values)
    rounds = DRAWS if plain else min(DRAWS, int(PATIENCE / spent))
    if not np.isclose(again, value, rtol=1e-9, atol=1e-12) or rounds < FEWEST:
        return _point(value)
    draws = draw(len(values), seed, rounds)
    own = _replicates(aggregate, values, draws, plain)
    _, low, high = interval(np.array([value]), own)
    if others is None or any(one is None for one in others):  # the unpatched run itself, or values JSON cannot hold
        return Metric(value=value, low=low, high=high)
    before = _aggregated(aggregate, others)
    same = plain and all(_is_number(one) for one in others)
    difference = interval(np.array([value - before]), own - _replicates(aggregate, others, draws, same))
    return Metric(
        value=value,
        low=low,
        high=high,
        difference=difference[0],
        difference_low=difference[1],
        difference_high=difference[2],
    )


def _replicates(aggregate: Callable[..., Any], values: Sequence[Any], draws: np.ndarray, plain: bool) -> np.ndarray:
    """The metric of every draw. draws: [R, documents] -> [R]"""
    if plain:
        return draws @ np.asarray(values, dtype=np.float64) / len(values)
    numbers = np.arange(len(values))
    drawn = (np.repeat(numbers, times).tolist() for times in draws.astype(int))
    return np.array([_aggregated(aggregate, [values[i] for i in some]) for some in drawn])


def _aggregated(aggregate: Callable[..., Any], values: Sequence[Any]) -> float:
    """The metric of some documents, NaN where it is not defined."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            found = aggregate(list(values))
        except (ZeroDivisionError, ValueError, KeyError, IndexError):
            return float("nan")
    return float(found) if _is_number(found) else float("nan")


def values_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """What the tasks made of each document, by its id."""
    return {record["id"]: record["values"] for record in records}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool) and bool(np.isfinite(float(value)))


def _point(value: float) -> Metric:
    return Metric(value=value, low=value, high=value)


def _plain(value: Any) -> Any:
    """A value as JSON holds it; None where it cannot."""
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=_scalar))
    except (TypeError, ValueError):
        return None


def _scalar(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(type(value).__name__)
