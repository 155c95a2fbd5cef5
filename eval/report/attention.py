"""What the attention did: shares of sinks, image and text in every layer, before and after an edit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from vlmfast.eval.report import text
from vlmfast.eval.report.effect import name
from vlmfast.eval.report.frame import across, down
from vlmfast.eval.report.rows import Row, Section

# (name in the data, light, dark): colours after Okabe and Ito (2008), lightened for the dark ground.
CLASSES = (("sinks", "#d55e00", "#ff8a3d"), ("image", "#0072b2", "#4fb3f0"), ("text", "#007a59", "#33c79b"))
ROWS = {"answer": "rows that answer", "prompt": "text of the prompt behind the picture"}
WHEN = ("before", "after")
TICKS = 8  # on the axis of layers, at most


class Point(NamedTuple):
    """A layer's share in a chart."""

    x: float
    y: float


@dataclass(frozen=True)
class Line:
    """One class, before or after: a path that leaves out layers that were not measured."""

    name: str
    when: str
    path: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Chart:
    """The rows of one kind under one spec. x, y: ticks with their labels. label: the chart in words."""

    title: str
    lines: tuple[Line, ...]
    x: tuple[tuple[float, str], ...]
    y: tuple[tuple[float, str], ...]
    label: str


class Change(NamedTuple):
    """A share before and after."""

    before: float
    after: float


@dataclass(frozen=True)
class Entry:
    """A line of the table: means over the layers that a spec edits. total: what a row's weights sum to."""

    row: Row
    rows: str
    layers: str
    changes: Mapping[str, Change]
    total: float


def measured(section: Section) -> list[Row]:
    """The runs that tell where attention went."""
    return [row for row in section.rows if row.result.attention]


def charts(section: Section, rows: str) -> list[Chart]:
    """A chart for every run, of rows of one kind ("answer" or "prompt")."""
    return [chart(row, rows) for row in measured(section) if rows in _data(row)["before"]]


def chart(row: Row, rows: str) -> Chart:
    """Shares by layer, from 0 to 100 %, so that charts can be compared."""
    data = _data(row)
    depth = len(data["before"][rows][CLASSES[0][0]])
    step = max(1, -(-depth // TICKS))
    return Chart(
        title=name(row),
        lines=tuple(_line(data, rows, kind, when) for kind, *_ in CLASSES for when in WHEN),
        x=tuple((_x(layer, depth), str(layer)) for layer in range(0, depth, step)),
        y=tuple((down(1 - share / 4), str(25 * share)) for share in range(5)),
        label=spoken(entry(row, rows)),
    )


def entry(row: Row, rows: str) -> Entry:
    """A run's line of the table."""
    data = _data(row)
    chosen = set(data["edited"])

    def mean(shares: Sequence[float | None]) -> float:
        all_of_them = [(layer, share) for layer, share in enumerate(shares) if share is not None]
        found = [share for layer, share in all_of_them if layer in chosen] or [share for _, share in all_of_them]
        return fmean(found)

    return Entry(
        row=row,
        rows=rows,
        layers=spelled(data["edited"]),
        changes={kind: Change(*(mean(data[when][rows][kind]) for when in WHEN)) for kind, *_ in CLASSES},
        total=mean(data["total"][rows]),
    )


def entries(section: Section) -> list[Entry]:
    """The table: every run, every kind of rows."""
    return [entry(row, rows) for row in measured(section) for rows in ROWS if rows in _data(row)["before"]]


def rescaled(section: Section) -> bool:
    """Whether a method changes what a row's weights sum to."""
    return any(abs(one.total - 1) > 0.005 for one in entries(section))


def spoken(one: Entry) -> str:
    """A line of the table in words."""
    parts = [
        f"{kind} {text.percent(change.before)} % before, {text.percent(change.after)} % after"
        for kind, change in one.changes.items()
    ]
    return f"{name(one.row)}, {ROWS[one.rows]}: {'; '.join(parts)} (mean over layers {one.layers})."


def spelled(layers: Sequence[int]) -> str:
    """Ascending layers as runs: "0, 2-5"; "none"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"


def _data(row: Row) -> dict[str, Any]:
    assert row.result.attention is not None
    return row.result.attention


def _x(layer: int, depth: int) -> float:
    return across((layer + 0.5) / depth)


def _line(data: Mapping[str, Any], rows: str, kind: str, when: str) -> Line:
    shares = data[when][rows][kind]
    points = [None if share is None else Point(_x(n, len(shares)), down(1 - share)) for n, share in enumerate(shares)]
    path, pen = "", "M"
    for point in points:
        if point is not None:
            path += f"{pen}{point.x} {point.y}"
        pen = "M" if point is None else "L"
    return Line(kind, when, path, tuple(point for point in points if point is not None))
