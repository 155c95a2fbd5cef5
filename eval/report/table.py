"""The report as tables in the terminal: accuracy never without cost, cost never without its convention."""

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vlmfast.eval.report import effect, text
from vlmfast.eval.report.rows import Row, Section

MARK = "†"
VERDICTS = {1: "▲", -1: "▼", 0: " "}
WIDEST = 126  # columns that the tables need at most; used where the output is not a terminal


def print_tables(sections: list[Section], console: Console | None = None) -> None:
    """Print the tables of every section."""
    console = console or Console()
    if not console.is_terminal and console.width < WIDEST:
        console = Console(file=console.file, width=WIDEST, force_terminal=False, no_color=True)
    for section in sections:
        console.print(render(section, narrow=console.width < WIDEST))


def render(section: Section, *, narrow: bool = False) -> Group:
    """Both tables of a section and the notes below them; ``narrow`` fits 80 columns."""
    return Group(
        Text(f"\n{section.title}\n", style="bold"),
        summary(section, narrow=narrow),
        Text(),
        per_task(section, narrow=narrow),
        Text(),
        *(part for table in _effects(section, narrow) for part in (table, Text())),
        *(Padding(Text(note, style="dim"), (0, 0, 0, 1)) for note in notes(section)),
    )


def summary(section: Section, *, narrow: bool = False) -> Table:
    """One row a run: mean accuracy over the tasks and what it costs; ``narrow`` leaves out an interval and KV."""
    table = _table("Mean over the tasks", narrow)
    table.add_column("accuracy %\n\\[95 %]", justify="right")
    table.add_column("vs un-\npatched" if narrow else "vs unpatched\npoints \\[95 %]", justify="right")
    table.add_column("\nrank", justify="right")
    table.add_column("tokens\n/layer", justify="right")
    table.add_column("prefill\nGFLOPs", justify="right")
    table.add_column("\n%", justify="right")
    table.add_column("TTFT\nms", justify="right")
    if not narrow:
        table.add_column("speed-\nup", justify="right")
    table.add_column("decode\nms/tok", justify="right")
    if not narrow:
        table.add_column("KV\nkB", justify="right")
    for row, ends in _with_ends(section):
        difference = text.interval(row.difference, difference=True)
        if narrow and row.difference:
            difference = text.signed(row.difference.value)
        table.add_row(
            *_name(row),
            text.interval(row.accuracy) + _mark(row.beaten),
            difference,
            text.place(row.place),
            text.count(row.tokens),
            text.gflops(row.flops),
            text.percent(row.share, 0),
            text.timing(row.ttft),
            *([] if narrow else [text.ratio(row.speedup)]),
            text.timing(row.decode),
            *([] if narrow else [text.kilobytes(row.kv_bytes)]),
            end_section=ends,
        )
    return table


def per_task(section: Section, *, narrow: bool = False) -> Table:
    """One row a run: the headline number of every task, beside the share of the prefill FLOPs."""
    table = _table("Task by task", narrow)
    table.add_column("FLOPs\n%", justify="right")
    for task in section.tasks:
        head = f"{task.name}\n{text.metric_name(task.headline)}".rstrip()
        table.add_column(head, justify="right", overflow="fold", min_width=5)
    for row, ends in _with_ends(section):
        cells = (
            text.percent(row.tasks[task.name].value) + _mark(task.name in row.beaten_tasks)
            if task.name in row.tasks
            else text.MISSING + " "
            for task in section.tasks
        )
        table.add_row(*_name(row), text.percent(row.share, 0), *cells, end_section=ends)
    return table


def of_effects(section: Section, columns: Sequence[effect.Column], title: str, *, narrow: bool = False) -> Table:
    """What methods change in the answers, one row a run: value, difference and, unless ``narrow``, its interval."""
    table = _table(f"Effect on the answers, {title}", narrow)
    table.columns.pop()  # keep
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for column in columns:
        table.add_column(f"{column.task.partition(':')[0]}\n{column.head}", justify="right", no_wrap=True)
    for row in effect.edited(section):
        table.add_row(
            Text(effect.name(row), style="bold" if row.unpatched else ""),
            *(_effect(column, effect.cell(row, column), narrow) for column in columns),
            end_section=not narrow,
        )
    return table


def _effect(column: effect.Column, cell: effect.Cell | None, narrow: bool) -> str:
    """A metric of a run; ``narrow``: the difference alone."""
    if cell is None:
        return text.MISSING
    value = effect.written(column, cell.value)
    if cell.difference is None:
        return f"{value} "
    difference = effect.written(column, cell.difference, difference=True) + VERDICTS[cell.verdict]
    ends = text.metric(column.metric, cell.difference, difference=True).partition(" ")[2]
    return difference if narrow else f"{value} {difference}\n{ends} ".replace("[", "\\[")


def notes(section: Section) -> list[str]:
    """What a reader must know to read the numbers."""
    lines = [
        f"{row.label} is run with {row.settings.replace(' ', ', ')}."
        for row in (section.line(label)[0] for label in section.labels)
        if row.settings and row.settings not in row.label
    ]
    for beams in sorted({row.beams for row in section.rows} - {section.beams}):
        rows = dict.fromkeys(row.label for row in section.rows if row.beams == beams)
        lines.append(f"{', '.join(rows)}: {beams} beams; the unpatched model: {section.beams}.")
    if section.convention:
        lines.append(f"FLOPs and KV are means per prompt. {section.convention}.")
    lines.append("Tokens: visual tokens of a picture, mean over the layers of the language model.")
    if section.plain:
        names = (f"{metric} of {task}" for task, metric in section.plain)
        lines.append(f"Not in %, but in their own units: {', '.join(names)}.")
    lines += budgets(section)
    if any(row.speedup for row in section.rows):
        lines.append("Speed-up: unpatched TTFT over this TTFT, both measured in turns in one process.")
    if any(row.beaten or row.beaten_tasks for row in section.rows):
        lines.append(f"{MARK} random pruning of the same budget scores higher.")
    if effect.edited(section):
        lines.append("Effect on the answers: ▲ better and ▼ worse where the interval of the difference excludes zero.")
    if section.baseline is None:
        lines.append("There is no unpatched run among the results: run vlmfast eval with --method none.")
    return lines


def budgets(section: Section) -> list[str]:
    """What was held equal among runs, how well, and what ranks mean."""
    lines = []
    for goal in sorted({row.result.matched for row in section.rows if row.result.matched is not None}, reverse=True):
        rows = [row for row in section.rows if row.result.matched == goal and row.share is not None]
        shares = [row.share for row in rows if row.share is not None]
        ends = [text.percent(end) for end in (min(shares, default=goal), max(shares, default=goal))]
        reached = f"{ends[0]} %" if ends[0] == ends[1] else f"{ends[0]} to {ends[1]} %"
        lines.append(
            f"Equal cost: keep was solved so that {len(rows)} runs take {text.percent(goal)} % of the unpatched "
            f"prefill FLOPs, tower and selection included; they took {reached}."
        )
    if any(row.place or row.places for row in section.rows):
        lines.append(
            "Rank: 1 + the number of runs of the same budget (equal cost, else equal keep) that are better, the 95 % "
            "interval of the paired difference above zero; = is a tie. Of twenty such comparisons one errs by luck."
        )
    if section.unranked:
        lines.append(f"No ranks of some runs or tasks: {section.unranked}.")
    return lines


def _table(title: str, narrow: bool) -> Table:
    table = Table(title=title, title_justify="left", title_style="italic", box=box.SIMPLE_HEAD, show_edge=False)
    table.padding = (0, 0) if narrow else (0, 1)
    table.header_style = "none"
    table.add_column("method", no_wrap=True)
    table.add_column("keep", justify="right", no_wrap=True)
    return table


def _effects(section: Section, narrow: bool) -> list[Table]:
    """The tables of the runs that change more than what is seen: a table a task, reading in one."""
    groups: dict[str, list[effect.Column]] = {}
    for column in effect.columns(section):
        if not (narrow and column.wide):
            title = "reading" if column.task in ("digits", "word") else column.asked
            groups.setdefault(title, []).append(column)
    return [of_effects(section, columns, title, narrow=narrow) for title, columns in groups.items()]


def _name(row: Row) -> tuple[Text, str]:
    return Text(row.label, style="bold" if row.unpatched else ""), row.keep_text


def _mark(marked: bool) -> str:
    return MARK if marked else " "


def _with_ends(section: Section) -> list[tuple[Row, bool]]:
    """Every row, and whether another method begins after it."""
    following = [*section.rows[1:], None]
    return [(row, after is not None and after.label != row.label) for row, after in zip(section.rows, following)]
