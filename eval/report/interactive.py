"""The interactive picture: every run's scores and costs as data, which page.js hands to plotly."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmfast.eval.report import effect, plot, text
from vlmfast.eval.report.rows import UNPATCHED, Interval, Row, Section

MEAN = "mean"
SIDES = {"left": "flops", "right": "ttft"}  # what the charts show at first
SYMBOLS = {"o": "circle", "s": "square", "^": "triangle-up", "v": "triangle-down", "P": "cross", "X": "x"}
SYMBOLS |= {"D": "diamond", "*": "star"}
DASHES = {"-": "solid", "--": "dash", ":": "dot", "": "solid"}


def _plain(value: float | None, unit: float) -> Interval | None:
    return None if value is None else Interval(value / unit, value / unit, value / unit)


# Name -> what it is, and a run's value with its interval (None: not measured).
COSTS: Mapping[str, tuple[str, Callable[[Row], Interval | None]]] = {
    "flops": ("prefill, GFLOPs (tower included)", lambda row: _plain(row.flops, 1e9)),
    "total": ("prompt and answer, GFLOPs (tower included)", lambda row: _plain(row.result.cost.get("total"), 1e9)),
    "ttft": ("time to first token, ms", lambda row: row.ttft),
    "decode": ("time of a further token, ms", lambda row: row.decode),
    "tokens": ("visual tokens, mean over the layers", lambda row: _plain(row.tokens, 1)),
    "kv": ("KV cache, kB", lambda row: _plain(row.kv_bytes, 1e3)),
    "memory": ("peak memory, MB", lambda row: _plain(row.memory_mb, 1)),
}


@dataclass(frozen=True)
class Live:
    """data: as page.js wants it. scores, costs: what can be chosen for the axes, by name. sides: what is, at first."""

    data: dict[str, Any]
    scores: dict[str, str]
    costs: dict[str, str]
    tasks: tuple[str, ...]
    sides: Mapping[str, str]


def gather(sections: Sequence[Section]) -> Live:
    """All that the picture shows of the sections."""
    rows = [row for section in sections for row in section.rows]
    costs = {name: about for name, (about, value) in COSTS.items() if any(value(row) for row in rows)}
    tasks = {task.name: task.headline for section in sections for task in section.tasks}
    scores = {MEAN: "the mean of the tasks"} | {
        task: f"{task} {text.metric_name(tasks[task])}".strip() for task in tasks
    }
    data = {
        "labels": [_label(label, style) for label, style in plot.styles(sections).items()],
        "sections": [[_run(row, section, costs) for row in section.rows] for section in sections],
        "scores": scores,
        "costs": costs,
        "unit": "% or own units" if any(section.plain for section in sections) else "%",
    }
    return Live(data, scores, costs, tuple(tasks), SIDES)


def _label(label: str, style: plot.Style) -> dict[str, Any]:
    return {
        "name": label,
        "light": style.light,
        "dark": style.dark,
        "symbol": SYMBOLS[style.marker] + ("-open" if plot.control(label) else ""),
        "dash": DASHES[style.dashes],
        "line": label != UNPATCHED,
    }


def _run(row: Row, section: Section, costs: Mapping[str, str]) -> dict[str, Any]:
    scores = {MEAN: row.accuracy, **row.tasks}
    return {
        "label": row.label,
        "name": effect.name(row),
        "scores": {name: [100 * end for end in value] for name, value in scores.items()},
        "costs": {name: list(value) if (value := COSTS[name][1](row)) else None for name in costs},
        "told": told(row, section),
    }


def told(row: Row, section: Section) -> list[str]:
    """A run in a few lines, as the point says it."""
    lines = [f"accuracy {text.interval(row.accuracy)}{'' if section.plain_mean else ' %'}"]
    if row.difference is not None:
        lines.append(f"{text.interval(row.difference, difference=True)} points from unpatched")
    if row.place is not None:
        lines.append(f"rank {text.place(row.place, whole=True)} of the same budget")
    if row.flops is not None:
        lines.append(f"{text.gflops(row.flops)} GFLOPs of prefill ({text.percent(row.share, 0)} % of unpatched)")
    if row.tokens is not None:
        lines.append(f"{text.count(row.tokens)} visual tokens, mean over the layers")
    if row.ttft is not None:
        faster = "" if row.speedup is None else f" ({text.ratio(row.speedup)} times as fast)"
        lines.append(f"{text.timing(row.ttft)} ms to the first token{faster}")
    return lines
