"""What table, picture and page show: results sorted into sections (one a model) of rows (one a run).

Rows of one section can be compared: same model and weights, same samples, same device.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import fmean
from typing import Any, NamedTuple

from vlmfast.adapters import ADAPTERS, from_spec
from vlmfast.eval.results import Metric, Result

CONTROLS = ("random", "grid")
UNPATCHED = "unpatched"
PLAIN_BEAMS = "plain beams"
PLAIN = ("length",)  # metrics of our tasks that are no shares


class Interval(NamedTuple):
    """A value and the ends of its interval: 95 % for metrics, quartiles for timings."""

    value: float
    low: float
    high: float


class Place(NamedTuple):
    """A run's rank among `of` runs of the same budget (see `vlmfast.eval.report.ranks`)."""

    rank: int
    tied: bool
    of: int


@dataclass(frozen=True)
class Task:
    """One task of a section: its headline metric, every metric that a run reports, its number of questions."""

    name: str
    headline: str
    metrics: tuple[str, ...]
    n: int


@dataclass(frozen=True)
class Row:
    """One run. Times in ms, FLOPs as counted by the section's convention, None where a run did not measure."""

    label: str  # names the row's line in the picture: the method, with its settings where it has several lines
    settings: str  # of the method, but for keep
    spec: str
    keep: float | int | None  # None: unpatched
    accuracy: Interval
    difference: Interval | None
    retention: Interval | None  # mean over the tasks of what is left of the unpatched model's
    tasks: Mapping[str, Interval]  # headline metrics
    flops: float | None
    share: float | None
    tokens: float | None  # visual tokens of a picture, mean over the decoder layers
    tokens_before: float | None
    kv_bytes: float | None
    ttft: Interval | None
    decode: Interval | None
    speedup: Interval | None  # unpatched TTFT / this TTFT, measured in turns
    memory_mb: float | None
    forwards: float | None  # decoder calls a further token
    result: Result = field(repr=False)
    beaten: bool = False  # random of the same budget has the higher accuracy
    beaten_tasks: frozenset[str] = frozenset()
    place: Place | None = None  # on the mean of the tasks
    places: Mapping[str, Place] = field(default_factory=dict)  # on each task

    @property
    def unpatched(self) -> bool:
        """Whether this is the model as it is."""
        return self.keep is None

    @property
    def budget(self) -> tuple[str, float | int]:
        """What runs share that are ranked together: ("flops", share) where `keep` was solved, else ("keep", keep)."""
        matched = self.result.matched
        return ("keep", self.keep or 1.0) if matched is None else ("flops", matched)

    @property
    def control(self) -> bool:
        """Whether the method is there for comparison only."""
        return self.result.method in CONTROLS

    @property
    def kinds(self) -> frozenset[str]:
        """What the methods do: "pruning", "attention", "decoding"."""
        names = self.result.method.split("+")
        return frozenset(ADAPTERS[name].kind for name in names if name in ADAPTERS)

    @property
    def edits(self) -> bool:
        """Whether a method changes answers otherwise than by dropping tokens: in the attention or while decoding."""
        return bool(self.kinds & {"attention", "decoding"})

    @property
    def beams(self) -> int:
        """Beams that the run searched with."""
        return int(self.result.latency.get("beams", self.result.beams))

    @property
    def keep_text(self) -> str:
        """The keep as it is typed in a spec: a share, or a whole number of tokens."""
        return "" if self.result.keep is None else str(self.keep)


@dataclass(frozen=True)
class Section:
    """The comparable runs of one model: the unpatched one first, then method by method with falling keep."""

    title: str
    model: str
    rows: tuple[Row, ...]
    tasks: tuple[Task, ...]
    convention: str
    plain: tuple[tuple[str, str], ...] = ()  # (task, metric) that are no shares: `PERCENT` of what they are
    unranked: str = ""  # why some runs have no ranks

    @cached_property
    def baseline(self) -> Row | None:
        """The unpatched run, if it is among the results."""
        return next((row for row in self.rows if row.unpatched), None)

    @property
    def beams(self) -> int:
        """Beams of the unpatched run, and of methods that do not need more."""
        return self.rows[0].result.beams

    @property
    def plain_mean(self) -> bool:
        """Whether the mean over the tasks is no share."""
        return any((task.name, task.headline) in self.plain for task in self.tasks)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The methods in the order of the table, without the unpatched model."""
        return tuple(dict.fromkeys(row.label for row in self.rows if not row.unpatched))

    @cached_property
    def keeps(self) -> tuple[float | int, ...]:
        """Every keep that occurs: shares, then numbers of tokens, each falling."""
        return tuple(sorted({row.keep for row in self.rows if row.keep is not None}, key=_falling))

    def find(self, label: str, keep: float | int) -> Row | None:
        """The run of a method at a keep."""
        return next((row for row in self.rows if row.label == label and row.keep == keep), None)

    def line(self, label: str) -> tuple[Row, ...]:
        """The runs of a method, keep falling."""
        return tuple(row for row in self.rows if row.label == label)


def arrange(results: Sequence[Result]) -> list[Section]:
    """Sort results into sections; a model with runs that cannot be compared gets a section for each kind."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(getattr(result, name) for name in _COMPARABLE), []).append(result)
    lines = dict.fromkeys(line_label(result.spec) for result in results)
    names = [name for name, _ in lines]
    labels = {line: line[0] if names.count(line[0]) == 1 else " ".join(line).strip() for line in lines}
    sections = []
    for key, group in sorted(groups.items(), key=lambda item: tuple(map(str, item[0]))):
        group, plain = _as_shares(group)
        rows = _mark(sorted((_row(result, labels[line_label(result.spec)]) for result in group), key=_order))
        conventions = dict.fromkeys(str(r.cost["convention"]) for r in group if r.cost.get("convention"))
        title = _title(key, [other for other in groups if other[0] == key[0]])
        sections.append(Section(title, str(key[0]), rows, _tasks(group), "; ".join(conventions), plain))
    return sections


PERCENT = 0.01


def _as_shares(results: Sequence[Result]) -> tuple[list[Result], tuple[tuple[str, str], ...]]:
    """The results, with metrics that are no shares in hundredths: written in %, they read as they are. -> also those

    Only tasks of others have such metrics: a score of 1,523.4 points. The mean over tasks is one where a headline is.
    """
    entries = [(name, task) for result in results for name, task in result.tasks.items()]
    plain = {(name, key) for name, task in entries for key, one in task.metrics.items() if abs(one.value) > 1}
    plain -= {(name, key) for name, key in plain if key in PLAIN}
    if not plain:
        return list(results), ()
    found = []
    for result in results:
        tasks = {
            name: replace(
                task,
                metrics={
                    key: _scaled(metric) if (name, key) in plain else metric for key, metric in task.metrics.items()
                },
            )
            for name, task in result.tasks.items()
        }
        mean = any((name, task.headline) in plain for name, task in tasks.items())
        found.append(replace(result, tasks=tasks, macro=_scaled(result.macro) if mean else result.macro))
    return found, tuple(sorted(plain))


def _scaled(metric: Metric) -> Metric:
    """A metric in hundredths."""
    values: dict[str, Any] = {name: value for name, value in vars(metric).items() if value is not None}
    return Metric(**{name: PERCENT * value for name, value in values.items()})


def line_label(spec: str) -> tuple[str, str]:
    """Method and settings of a spec, without keep: ``hiprune:keep=0.33,alpha=0.2`` -> (``hiprune``, ``alpha=0.2``).

    A search with beams that changes nothing else has a name of its own: it is there to be compared with.
    """
    if spec == "none":
        return UNPATCHED, ""
    if beams_alone(spec):
        return PLAIN_BEAMS, ""
    names, settings = [], []
    for part in spec.split("+"):
        name, _, rest = part.partition(":")
        names.append(name.strip())
        settings += [one.strip() for one in rest.split(",") if not re.match(r"\s*(keep\s*=|$)", one)]
    return "+".join(names), " ".join(settings)


def beams_alone(spec: str) -> bool:
    """Whether the methods of a spec change nothing but that there are beams: ``opera:alpha=0,threshold=inf``."""
    try:
        methods = from_spec(spec)
    except ValueError:  # of another version, with other settings
        return False
    return any(one.beams > 1 for one in methods) and all(getattr(one, "neutral", False) for one in methods)


_COMPARABLE = ("model", "model_hash", "limit", "seed", "device", "dtype", "beams")


def _title(key: tuple[Any, ...], rivals: list[tuple[Any, ...]]) -> str:
    """A model's name, with whatever tells its sections apart where it has several."""
    differing = [i for i in range(1, len(key)) if len({rival[i] for rival in rivals}) > 1]
    extra = ", ".join(f"{_COMPARABLE[i]} {str(key[i])[:12]}" for i in differing)
    return f"{key[0]} ({extra})" if extra else str(key[0])


def _row(result: Result, label: str) -> Row:
    cost, latency = result.cost, result.latency
    unpatched = result.spec == "none"
    return Row(
        label=label,
        settings=line_label(result.spec)[1],
        spec=result.spec,
        keep=None if unpatched else 1.0 if result.keep is None else result.keep,
        accuracy=metric_interval(result.macro),
        difference=difference_interval(result.macro),
        retention=None if result.retention is None else metric_interval(result.retention),
        tasks={name: metric_interval(task.metrics[task.headline]) for name, task in result.tasks.items()},
        flops=cost.get("total_prefill"),
        share=1.0 if unpatched else cost.get("share_of_unpatched"),
        tokens=fmean(layers) if (layers := cost.get("visual_tokens_per_layer")) else cost.get("visual_tokens"),
        tokens_before=cost.get("visual_tokens_before"),
        kv_bytes=cost.get("kv_bytes"),
        ttft=_timing(latency.get("ttft_ms")),
        decode=_timing(latency.get("decode_ms_per_token")),
        speedup=None if unpatched else _timing(latency.get("ttft_speedup")),
        memory_mb=latency.get("peak_memory_mb"),
        forwards=latency.get("forwards_per_token"),
        result=result,
    )


def metric_interval(metric: Metric) -> Interval:
    """A metric with its 95 % interval."""
    return Interval(metric.value, metric.low, metric.high)


def difference_interval(metric: Metric) -> Interval | None:
    """A metric's paired difference from the unpatched run; None for that run itself."""
    if metric.difference is None or metric.difference_low is None or metric.difference_high is None:
        return None
    return Interval(metric.difference, metric.difference_low, metric.difference_high)


def _timing(value: Mapping[str, float] | None) -> Interval | None:
    return None if value is None else Interval(value["median"], value["low"], value["high"])


def _falling(keep: float | int) -> tuple[bool, float]:
    return isinstance(keep, int), -float(keep)


def _order(row: Row) -> tuple[Any, ...]:
    """Unpatched, then the controls, then the methods by name; each with falling keep."""
    control = CONTROLS.index(row.result.method) if row.control else len(CONTROLS)
    return (not row.unpatched, control, row.label, *_falling(row.keep or 0))


def _mark(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Mark where random of the same budget (the mean of its seeds) scores higher, on the whole and task by task."""
    marked = []
    for row in rows:
        rivals = [other for other in rows if other.result.method == "random" and other.budget == row.budget]
        if rivals and row.result.method != "random":
            beaten = fmean(rival.accuracy.value for rival in rivals) > row.accuracy.value
            tasks = {
                name
                for name, own in row.tasks.items()
                if (theirs := [rival.tasks[name].value for rival in rivals if name in rival.tasks])
                and fmean(theirs) > own.value
            }
            row = replace(row, beaten=beaten, beaten_tasks=frozenset(tasks))
        marked.append(row)
    return tuple(marked)


def _tasks(results: Sequence[Result]) -> tuple[Task, ...]:
    """Every task that occurs in the results, in their order."""
    tasks = []
    for name in dict.fromkeys(name for result in results for name in result.tasks):
        entries = [result.tasks[name] for result in results if name in result.tasks]
        metrics = dict.fromkeys(metric for entry in entries for metric in entry.metrics)
        tasks.append(Task(name, entries[0].headline, tuple(metrics), max(entry.n for entry in entries)))
    return tuple(tasks)
