"""What methods change in the answers that keep what is seen: existence by split, captions by CHAIR, reading."""

from pathlib import Path
from typing import NamedTuple

from vlmfast.eval.report import text
from vlmfast.eval.report.rows import Interval, Row, Section, difference_interval, metric_interval


class Column(NamedTuple):
    """A metric of a task. better: 1 where more is better, -1 where less is, 0 where neither."""

    task: str
    metric: str
    head: str
    better: int
    wide: bool = False  # only where there is room

    @property
    def asked(self) -> str:
        """The task by a short name: that of a file without its folder and settings."""
        kind, _, file = self.task.partition(":")
        return f"{kind} {Path(file.partition(',')[0]).stem}".strip()


LIKE = {"pope": "existence", "chair": "caption"}  # tasks over files of the user's have the same metrics
COLUMNS = (
    Column("existence", "accuracy/random", "random", 1),
    Column("existence", "accuracy/popular", "popular", 1),
    Column("existence", "accuracy/adversarial", "adversarial", 1),
    Column("existence", "precision", "precision", 1, wide=True),
    Column("existence", "recall", "recall", 1, wide=True),
    Column("existence", "f1", "F1", 1, wide=True),
    Column("existence", "yes_ratio", "says yes", 0),
    Column("caption", "chair_i", "CHAIR_i", -1),
    Column("caption", "chair_s", "CHAIR_s", -1),
    Column("caption", "recall", "recall", 1),
    Column("caption", "length", "length", 0),
    Column("digits", "accuracy", "digits", 1),
    Column("word", "accuracy", "word", 1),
)


DOES = {"attention": "with edited attention", "decoding": "with another decoding"}


class Cell(NamedTuple):
    """A metric of a run: value, paired difference from the unpatched run, and which of the two is better.

    verdict: 1 or -1 where the interval of the difference excludes zero and one of the two is better, else 0.
    """

    value: Interval
    difference: Interval | None
    verdict: int


def edited(section: Section) -> list[Row]:
    """The unpatched run and those that edit attention or decode otherwise; empty where there are none of these."""
    rows = [row for row in section.rows if row.edits]
    return [*([section.baseline] if section.baseline else []), *rows] if rows else []


def columns(section: Section) -> list[Column]:
    """The metrics that any of these runs reports."""
    asked = {task.name: task.name.partition(":")[0] for task in section.tasks}
    found = [
        column._replace(task=name)
        for about in dict.fromkeys(column.task for column in COLUMNS)
        for name, kind in asked.items()
        for column in COLUMNS
        if column.task == about == LIKE.get(kind, kind)
    ]
    return [column for column in found if any(cell(row, column) for row in edited(section))]


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
    """In a sentence, how many of these runs that keep all tokens are better or worse than the unpatched model."""
    rows = [row for row in section.rows if row.edits and row.result.keep is None and row.difference is not None]
    known = [row.difference for row in rows if row.difference is not None]
    if not known:
        return ""
    better, worse = sum(one.low > 0 for one in known), sum(one.high < 0 for one in known)
    kinds = {kind for row in rows for kind in row.kinds}
    does = [words for kind, words in DOES.items() if kind in kinds]
    runs = f"{len(known)} run{'s' if len(known) > 1 else ''} {' or '.join(does)}"
    return (
        f"{runs}, with all tokens: {better} better than the unpatched model on the mean of the tasks, {worse} worse, "
        f"{len(known) - better - worse} not to be told apart (95 % interval of the paired difference)."
    )


def written(column: Column, value: Interval, *, difference: bool = False) -> str:
    """The middle of an interval, with a sign if it is a difference."""
    return text.metric(column.metric, value, difference=difference).split(" ")[0]
