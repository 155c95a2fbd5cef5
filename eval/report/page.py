"""The report as one HTML file that needs nothing else: opens offline, reads well without JavaScript."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from vlmfast.eval.report import attention, captions, effect, interactive, plot, samples, table, text
from vlmfast.eval.report.archive import Archive
from vlmfast.eval.report.frame import across, down
from vlmfast.eval.report.rows import UNPATCHED, Interval, Row, Section, difference_interval, metric_interval

Stills = Mapping[tuple[bool, bool], bytes]  # (dark, narrow) -> PNG


def draw(sections: Sequence[Section]) -> Stills:
    """The Pareto picture for light and dark ground, for wide and narrow windows."""
    kinds = [(dark, narrow) for dark in (False, True) for narrow in (False, True)]
    return {(dark, narrow): plot.draw(sections, dark=dark, narrow=narrow) for dark, narrow in kinds}


def render(sections: Sequence[Section], archive: Archive | None = None, stills: Stills | None = None) -> str:
    """The page. archive: of the folders that the results lie in; stills: from `draw`, where they are there already."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "interval": text.interval,
        "percent": text.percent,
        "signed": text.signed,
        "number": text.number,
        "timing": text.timing,
        "count": text.count,
        "gflops": text.gflops,
        "kilobytes": text.kilobytes,
        "metric_name": text.metric_name,
        "place": text.place,
    }
    template = environment.from_string(_file("page.html"))
    pictures = samples.Pictures(archive)
    shown = [(section, samples.gather(section, pictures)) for section in sections]
    return template.render(
        sections=sections,
        samples=shown,
        pictures=pictures.found,
        styles=_slots(sections),
        pareto={kind: _data_uri(png) for kind, png in (stills or draw(sections)).items()},
        description=describe(sections),
        leads=[lead(section) for section in sections],
        charts={section.title: [_chart(section, task.name) for task in section.tasks] for section in sections},
        details=_details,
        attention=attention,
        watched=[section for section in sections if attention.measured(section)],
        effect=effect,
        captioned=captions.gather(shown),
        affected=[section for section in sections if effect.edited(section)],
        metric=text.metric,
        columns=COLUMNS,
        notes={section.title: table.notes(section) for section in sections},
        mark=table.MARK,
        provenance=_provenance(sections),
        unpatched=UNPATCHED,
        has_testbed=any(section.model.startswith("testbed:") for section in sections),
        odd_headlines=_odd_headlines(sections),
        live=interactive.gather(sections),
        css=Markup(_file("page.css")),  # noqa: S704 - files of ours and of plotly's
        script=Markup(_file("page.js")),  # noqa: S704
        plotly=Markup(get_plotlyjs()),  # noqa: S704
    )


@dataclass(frozen=True)
class Column:
    """A column of the table of all runs: its head, its unit, how a row's cell reads and by what it is sorted."""

    head: str
    unit: str
    cell: Any
    key: Any


COLUMNS = (
    Column("accuracy", "%, 95 %", lambda row: text.interval(row.accuracy), lambda row: row.accuracy.value),
    Column(
        "vs unpatched",
        "points, 95 %",
        lambda row: text.interval(row.difference, difference=True),
        lambda row: row.difference and row.difference.value,
    ),
    Column(
        "retention",
        "% of unpatched, 95 %",
        lambda row: text.interval(row.retention),
        lambda row: row.retention and row.retention.value,
    ),
    Column(
        "rank", "same budget", lambda row: text.place(row.place, whole=True), lambda row: row.place and row.place.rank
    ),
    Column("tokens", "mean of layers", lambda row: text.count(row.tokens), lambda row: row.tokens),
    Column("prefill", "GFLOPs", lambda row: text.gflops(row.flops), lambda row: row.flops),
    Column("share", "% of FLOPs", lambda row: text.percent(row.share, 0), lambda row: row.share),
    Column("TTFT", "ms", lambda row: text.timing(row.ttft), lambda row: row.ttft and row.ttft.value),
    Column("speed-up", "of TTFT", lambda row: text.ratio(row.speedup), lambda row: row.speedup and row.speedup.value),
    Column("decode", "ms/token", lambda row: text.timing(row.decode), lambda row: row.decode and row.decode.value),
    Column("forwards", "a token", lambda row: text.number(row.forwards), lambda row: row.forwards),
    Column("KV", "kB", lambda row: text.kilobytes(row.kv_bytes), lambda row: row.kv_bytes),
    Column("memory", "peak MB", lambda row: text.number(row.memory_mb), lambda row: row.memory_mb),
)


def lead(section: Section) -> list[str]:
    """The result in a few sentences: the model as it is, then every method at one budget."""
    sentences = []
    base = section.baseline
    if base is not None:
        cost = "" if base.flops is None else f" for {text.gflops(base.flops)} GFLOPs of prefill"
        first = "" if base.ttft is None else f" and {text.timing(base.ttft)} ms to the first token"
        sentences.append(f"Unpatched: {text.interval(base.accuracy)} % mean accuracy{cost}{first}.")
    if told := effect.summary(section):
        sentences.append(told)
    if budget := usual_budget(section):
        sentences += standing(section, budget)
    return sentences


def usual_budget(section: Section) -> tuple[str, float | int] | None:
    """The budget to tell of: equal cost before equal keep, the one nearest to a third of the tokens."""
    rows = [row for row in section.rows if row.budget != ("keep", 1.0) and row.tokens and row.tokens_before]
    kinds = [{row.budget for row in rows if row.budget[0] == kind} for kind in ("flops", "keep")]
    found = next((budgets for budgets in kinds if budgets), None)
    if found is None:
        return None

    def distance(budget: tuple[str, float | int]) -> float:
        shares = [(row.tokens or 0) / (row.tokens_before or 1) for row in rows if row.budget == budget]
        return abs(sum(shares) / len(shares) - 1 / 3)

    return min(sorted(found), key=distance)


def standing(section: Section, budget: tuple[str, float | int]) -> list[str]:
    """How the runs of a budget compare, best first."""
    rows = sorted((row for row in section.rows if row.budget == budget), key=lambda row: -row.accuracy.value)
    kind, value = budget
    parts = [f"{row.label} {text.percent(row.accuracy.value)} %{_price(row)}" for row in rows]
    what = f"{text.percent(value, 0)} % of the visual tokens" if isinstance(value, float) else f"{value} visual tokens"
    head = f"At equal cost, {text.percent(value, 0)} % of the prefill FLOPs" if kind == "flops" else f"Keeping {what}"
    sentences = [f"{head}: {'; '.join(parts)}."]
    best = [row.label for row in rows if row.place and row.place.rank == 1]
    if len(best) == len(rows) > 1:
        sentences.append("No two of them can be told apart.")
    elif len(best) > 1:
        sentences.append(f"Best, and not to be told apart: {', '.join(best)}.")
    random = next((row for row in rows if row.result.method == "random"), None)
    methods = [row for row in rows if not row.control]
    if random is not None and methods and random.accuracy.value >= max(row.accuracy.value for row in methods):
        sentences.append("At this budget no method is better than pruning at random.")
    return sentences


def describe(sections: Sequence[Section]) -> str:
    """What the picture shows, for those who do not see it."""
    parts = []
    for section in sections:
        lines = []
        for label in section.labels:
            row = section.line(label)[-1]
            price = "" if row.share is None else f" at {text.percent(row.share, 0)} % of the FLOPs"
            lines.append(f"{label} falls to {text.percent(row.accuracy.value)} %{price}")
        start = f" from {text.percent(section.baseline.accuracy.value)} % unpatched" if section.baseline else ""
        parts.append(f"{section.title}:{start} {', '.join(lines) or 'no method was run'}.")
    return (
        "Charts of mean accuracy against prefill FLOPs and against time to first token, one line a method. "
        + " ".join(parts)
        + " The table of all runs holds the same numbers."
    )


def _price(row: Row) -> str:
    """What a run costs against the unpatched model, in brackets."""
    parts = [] if row.share is None else [f"{text.percent(row.share, 0)} % of the FLOPs"]
    if row.difference is not None:
        parts.insert(0, f"{text.signed(row.difference.value)} points")
    return f" ({', '.join(parts)})" if parts else ""


def _chart(section: Section, task: str) -> dict[str, Any]:
    """Coordinates of a small chart: a task's headline metric against the share of the prefill FLOPs."""
    rows = [row for row in section.rows if task in row.tasks and row.share is not None]
    ends = [end for row in rows for end in row.tasks[task]]
    low, high, ticks = _axis(min(ends, default=0.0), max(ends, default=1.0))
    start = min((row.share or 0.0 for row in rows), default=0.0) - 0.03

    def x(share: float) -> float:
        return across((share - start) / (1.03 - start))

    def y(value: float) -> float:
        return down((high - value) / (high - low))

    lines = []
    for label in (*section.labels, UNPATCHED):
        line = [(row.share, row.tasks[task]) for row in rows if row.label == label]
        points = [(x(share or 0), y(v.value), y(v.low), y(v.high)) for share, v in line]
        path = " ".join(f"{'L' if i else 'M'}{px} {py}" for i, (px, py, _, _) in enumerate(points))
        lines.append({"label": label, "points": points, "path": path})
    step = 20 if start < 0.5 else 10 if start < 0.75 else 5
    shares = [tick / 100 for tick in range(0, 101, step) if tick / 100 >= start]
    return {
        "task": next(t for t in section.tasks if t.name == task),
        "lines": lines,
        "y": [(y(tick), text.percent(tick, 0)) for tick in ticks],
        "x": [(x(share), text.percent(share, 0)) for share in shares],
        "label": _spoken(section, task),
    }


def _spoken(section: Section, task: str) -> str:
    """A small chart in words."""
    parts = []
    if section.baseline is not None and task in section.baseline.tasks:
        parts.append(f"unpatched {text.percent(section.baseline.tasks[task].value)} %")
    for label in section.labels:
        values = [f"{text.percent(row.tasks[task].value)}" for row in section.line(label) if task in row.tasks]
        parts.append(f"{label} {', '.join(values)} % with falling keep")
    return f"{task}: {'; '.join(parts)}."


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Ends and ticks of an axis that holds low to high: steps of 5, 10, 20 or 25 points."""
    step = next((s for s in (0.05, 0.1, 0.2) if (high - low) / s <= 4), 0.25)
    first, last = int(low // step), -int(-high // step)
    last = max(last, first + 1)
    return first * step, last * step, [i * step for i in range(first, last + 1)]


def _details(section: Section, task: str) -> list[tuple[Row, list[tuple[Interval, Interval | None] | None]]]:
    """Every metric of a task for every run: value and difference, None where a run does not report it."""
    names = next(t for t in section.tasks if t.name == task).metrics
    lines = []
    for row in section.rows:
        if task in row.result.tasks:
            metrics = row.result.tasks[task].metrics
            cells = [
                (metric_interval(metrics[name]), difference_interval(metrics[name])) if name in metrics else None
                for name in names
            ]
            lines.append((row, cells))
    return lines


def _odd_headlines(sections: Sequence[Section]) -> dict[str, str]:
    """Tasks that enter the mean with another metric than accuracy."""
    return {task.name: task.headline for s in sections for task in s.tasks if task.headline != "accuracy"}


def _slots(sections: Sequence[Section]) -> dict[str, tuple[str, plot.Style]]:
    """A CSS class for every method's style."""
    return {label: (f"line-{i}", style) for i, (label, style) in enumerate(plot.styles(sections).items())}


def _provenance(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Runs made by the same command in the same surroundings, together."""
    groups: dict[str, dict[str, Any]] = {}
    for section in sections:
        for row in section.rows:
            result = row.result
            facts = {"command": result.command, **result.environment}
            facts |= {name: getattr(result, name) for name in ("device", "dtype", "seed", "batch", "limit")}
            facts["limit"] = "all" if result.limit is None else result.limit
            latency = {k: v for k, v in result.latency.items() if k in ("threads", "repeats", "clock", "memory")}
            key = json.dumps([facts, latency], sort_keys=True, default=str)
            group = groups.setdefault(key, {"facts": facts | latency, "runs": []})
            group["runs"].append(
                {
                    "model": result.model,
                    "spec": result.spec,
                    "started": result.started,
                    "seconds": result.seconds,
                    "weights": result.model_hash[:12],
                }
            )
    return list(groups.values())


def _file(name: str) -> str:
    """A file beside this one, also from a wheel."""
    return files("vlmfast.eval.report").joinpath(name).read_text("utf-8")


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
