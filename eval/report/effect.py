"""What editing attention changes in the answers: existence by split, captions by CHAIR, reading."""

from typing import NamedTuple

from vlmfast.eval.report import text
from vlmfast.eval.report.rows import Interval, Row, Section, difference_interval, metric_interval


class Column(NamedTuple):
    """A metric of a task. better: 1 where more is better, -1 where less is, 0 where neither."""

    task: str
    metric: str
    head: str
    better: int


COLUMNS = (
    Column("existence", "accuracy/random", "random", 1),
    Column("existence", "accuracy/popular", "popular", 1),
    Column("existence", "accuracy/adversarial", "adversarial", 1),
    Column("existence", "yes_ratio", "says yes", 0),
    Column("caption", "chair_i", "CHAIR_i", -1),
    Column("caption", "chair_s", "CHAIR_s", -1),
    Column("caption", "recall", "recall", 1),
    Column("caption", "length", "length", 0),
    Column("digits", "accuracy", "digits", 1),
    Column("word", "accuracy", "word", 1),
)


class Cell(NamedTuple):
    """A metric of a run: value, paired difference from the unpatched run, and which of the two is better.

    verdict: 1 or -1 where the interval of the difference excludes zero and one of the two is better, else 0.
    """

    value: Interval
    difference: Interval | None
    verdict: int


def edited(section: Section) -> list[Row]:
    """The unpatched run and those that edit attention; empty where there are none of these."""
    rows = [row for row in section.rows if row.edits]
    return [*([section.baseline] if section.baseline else []), *rows] if rows else []


def columns(section: Section) -> list[Column]:
    """The metrics that any of these runs reports."""
    return [column for column in COLUMNS if any(cell(row, column) for row in edited(section))]


def cell(row: Row, column: Column) -> Cell | None:
    """A run's metric; None where it was not asked."""
    task = row.result.tasks.get(column.task)
    metric = None if task is None else task.metrics.get(column.metric)
    if metric is None:
        return None
    difference = difference_interval(metric)
    sure = 0 if difference is None else (difference.low > 0) - (difference.high < 0)
    return Cell(metric_interval(metric), difference, sure * column.better)


def lines(section: Section) -> list[tuple[Row, list[Cell | None]]]:
    """The table."""
    shown = columns(section)
    return [(row, [cell(row, column) for column in shown]) for row in edited(section)]


def name(row: Row) -> str:
    """A run as it is named beside others: its line, and its keep where tokens are dropped."""
    return row.label if row.result.keep is None else f"{row.label} keep {row.keep_text}"


def summary(section: Section) -> str:
    """In a sentence, how many of the runs that edit attention are better or worse than the unpatched model."""
    differences = [row.difference for row in section.rows if row.edits and row.result.keep is None]
    known = [difference for difference in differences if difference is not None]
    if not known:
        return ""
    better, worse = sum(one.low > 0 for one in known), sum(one.high < 0 for one in known)
    runs = "1 run edits" if len(known) == 1 else f"{len(known)} runs edit"
    return (
        f"{runs} attention and keep all tokens: {better} better than the unpatched model on the mean of the tasks, "
        f"{worse} worse, {len(known) - better - worse} not to be told apart (95 % interval of the paired difference)."
    )


def written(column: Column, value: Interval, *, difference: bool = False) -> str:
    """The middle of an interval, with a sign if it is a difference."""
    return text.metric(column.metric, value, difference=difference).split(" ")[0]
