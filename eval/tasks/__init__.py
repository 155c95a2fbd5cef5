"""The tasks: one file each, listed here by hand."""

import difflib
import functools
from collections.abc import Callable, Sequence

from vlmfast.eval.tasks import (
    binding,
    caption,
    chair,
    colour,
    count,
    digits,
    existence,
    novel_object,
    novel_relation,
    pope,
    relation,
    where,
    word,
)
from vlmfast.eval.tasks.base import Doc, Task, image, task_hash

__all__ = ["FILES", "NOVEL", "TASKS", "USAGES", "Doc", "Task", "choose", "image", "task", "task_hash"]

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
NOVEL: dict[str, Task] = {"novel_object": novel_object, "novel_relation": novel_relation}  # asked only by name

# Tasks over files of the user's, by the word before the colon.
FILES: dict[str, Callable[[str], Task]] = {"pope": pope.Pope.of, "chair": chair.Chair.of}
USAGES = {"pope": pope.USAGE, "chair": chair.USAGE}


@functools.lru_cache(maxsize=16)
def task(name: str) -> Task:
    """The task of this name; ValueError for an unknown one, FileNotFoundError for files that are not there."""
    if name in TASKS or name in NOVEL:
        return TASKS[name] if name in TASKS else NOVEL[name]
    kind, colon, _ = name.partition(":")
    if colon and kind in FILES:
        return FILES[kind](name)
    if kind == "lmms":
        raise ValueError(f"{name}: lmms-eval's tasks are for vlmfast eval alone, in a call of their own")
    known = [*TASKS, *NOVEL, *FILES]
    close = difflib.get_close_matches(kind, known, 1)
    hint = f", did you mean {close[0]}?" if close else "."
    raise ValueError(
        f"unknown task {name!r}{hint} There are {', '.join([*TASKS, *NOVEL])}; from files {', '.join(USAGES.values())}"
    )


def choose(names: Sequence[str] | None) -> dict[str, Task]:
    """The tasks of these names in the order of the tables (None: all of `TASKS`), then those over files.

    ValueError for an unknown name, FileNotFoundError for files that are not there.
    """
    if names is None:
        return dict(TASKS)
    if not names:
        raise ValueError(f"no task chosen; there are {', '.join([*TASKS, *NOVEL])}")
    chosen = {name: task(name) for name in names}
    return {name: chosen[name] for name in [*TASKS, *NOVEL, *chosen] if name in chosen}
