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


def _methods() -> Table:
    table = _table("Methods", "name", "kind", "what it does", "settings", "paper")
    for method in vlmfast.methods().values():
        settings = ", ".join(f"{name}={value}" for name, value in method.settings.items())
        table.add_row(method.name, method.kind, method.summary, settings, method.paper)
    return table


def _families() -> Table:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    from vlmfast.adapters import DEFAULTS
    from vlmfast.families import FAMILIES

    table = _table("Model families", "name", "class of transformers", "positions", "vlmfast.patch(model)")
    for name, family in FAMILIES.items():
        cls = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name]
        table.add_row(name, str(cls), family.positions, DEFAULTS.get(name, ""))
    return table


def _tasks() -> Table:
    from vlmfast.eval.tasks import TASKS

    table = _table("Tasks", "name", "headline", "what is asked")
    for name, task in TASKS.items():
        table.add_row(name, task.HEADLINE, " ".join((task.__doc__ or "").split("\n\n")[0].split()))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    return table
