"""What there is: methods, model families and tasks as tables."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

import vlmfast


def show(topics: Sequence[str], console: Console | None = None) -> None:
    """Print the tables of these topics: methods, families, tasks."""
    console = console or Console()
    tables = {"methods": _methods, "families": _families, "tasks": _tasks}
    for topic in topics:
        console.print(tables[topic](), "")
        if topic == "families":
            _matrix(console)


def _methods() -> Table:
    table = _table("Methods", "name", "kind", "what it does", "settings", "paper")
    for method in vlmfast.methods().values():
        settings = ", ".join(f"{name}={value}" for name, value in method.settings.items())
        table.add_row(method.name, method.kind, method.summary, settings, method.paper)
    return table


def _families() -> Table:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    from vlmfast.families import FAMILIES

    table = _table("Model families", "no.", "name", "class of transformers", "pictures", "positions")
    for number, (name, family) in enumerate(FAMILIES.items(), 1):
        cls = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name]
        pictures = " ".join(f"{source}s" for source in family.sources)
        table.add_row(str(number), name, str(cls), pictures, family.positions)
    return table


def _matrix(console: Console) -> None:
    """Which method works on which family: the table that the tests run."""
    from vlmfast.adapters import ADAPTERS, DEFAULTS, support
    from vlmfast.families import FAMILIES

    console.print("vlmfast.patch(model) alone takes:", *dict.fromkeys(DEFAULTS.values()), "\n", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for column in ("method", *map(str, range(1, len(FAMILIES) + 1))):
        table.add_column(column)
    table.padding = (0, 1, 0, 0)
    notes: dict[str, list[str]] = {}
    for method in ADAPTERS:
        cells = []
        for number, family in enumerate(FAMILIES, 1):
            answer = support(method, family)
            needs = ",".join(f"{name}={value}" for name, value in answer.needs.items())
            cells.append("-" if answer.reason else "*" if needs else "x")
            if answer.reason:
                notes.setdefault(f"- {method}: {answer.reason}", []).append(str(number))
            elif needs:
                notes.setdefault(f"* {method}: with {method}:{needs}", []).append(str(number))
        table.add_row(method, *cells)
    console.print("Methods by family: x works, * works with the setting named below, - cannot work\n", highlight=False)
    console.print(table)
    console.print()
    for note, numbers in notes.items():
        console.print(f"{note} (families {', '.join(numbers)})", highlight=False, markup=False)
    console.print()


def _tasks() -> Table:
    from vlmfast.eval.tasks import NOVEL, TASKS, USAGES, chair, pope

    table = _table("Tasks", "name", "headline", "what is asked")
    for name, task in (TASKS | NOVEL).items():
        table.add_row(name, task.HEADLINE, " ".join((task.__doc__ or "").split("\n\n")[0].split()))
    for usage, module, cls in ((USAGES["pope"], pope, pope.Pope), (USAGES["chair"], chair, chair.Chair)):
        table.add_row(usage, cls.HEADLINE, " ".join((module.__doc__ or "").split("\n\n")[0].split()))
    table.add_row("lmms:NAME", "the task's first", "A task of lmms-eval (pip install 'vlmfast[lmms]').")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    return table
