"""The offline tasks: one file each, listed here by hand."""

import difflib
from collections.abc import Sequence

from vlmfast.eval.tasks import binding, caption, colour, count, digits, existence, relation, where, word
from vlmfast.eval.tasks.base import Doc, Task, image, task_hash

__all__ = ["TASKS", "Doc", "Task", "choose", "image", "task_hash"]

TASKS: dict[str, Task] = {
    "existence": existence,
    "colour": colour,
    "count": count,
    "where": where,
    "relation": relation,
    "binding": binding,
    "digits": digits,
    "word": word,
    "caption": caption,
}


def choose(names: Sequence[str] | None) -> dict[str, Task]:
    """The tasks of these names in the order of the table (None: all); ValueError for an unknown name."""
    if names is None:
        return dict(TASKS)
    if not names:
        raise ValueError(f"no task chosen; there are {', '.join(TASKS)}")
    for name in names:
        if name not in TASKS:
            close = difflib.get_close_matches(name, TASKS, 1)
            hint = f", did you mean {close[0]}?" if close else "."
            raise ValueError(f"unknown task {name!r}{hint} There are {', '.join(TASKS)}")
    return {name: task for name, task in TASKS.items() if name in names}
