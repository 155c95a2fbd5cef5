"""lmms-eval's tasks by name: found, loaded, hashed; its log kept short."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from vlmfast.eval.tasks.files import existing
from vlmfast.families import did_you_mean

PREFIX = "lmms:"
CHOICE = ("multiple_choice", "loglikelihood")  # kinds of tasks that lmms-eval builds for simple models alone


@dataclass(frozen=True)
class Chosen:
    """A task of lmms-eval, ready. hash: of its configuration, functions and documents. n: documents that are asked.

    better: 1 where more of its first metric is better, -1 where less is.
    """

    name: str
    task: Any
    hash: str
    n: int
    better: int = 1

    @property
    def simple(self) -> bool:
        """Whether it is of the kind that goes through the simple model."""
        return self.task.OUTPUT_TYPE in CHOICE


def choose(names: Sequence[tuple[str, Mapping[str, str]]], limit: int | None) -> list[Chosen]:
    """The tasks of these names, groups taken apart; their documents are loaded."""
    from lmms_eval.evaluator_utils import get_task_list
    from lmms_eval.tasks import get_task_dict

    found: dict[str, Chosen] = {}
    for name, settings in names:
        manager = _manager(name, settings["include"])
        try:
            for output in get_task_list(get_task_dict([name], manager, "chat")):
                task = output.task
                if task.OUTPUT_TYPE in CHOICE:
                    task = get_task_dict([output.task_name], manager, "simple")[output.task_name]
                found[output.task_name] = _chosen(output.task_name, task, limit)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"lmms-eval's task {name} needs the package {error.name}, which is not installed "
                "(pip install lmms-eval brings all that any task needs)"
            ) from error
        except Exception as error:
            raise RuntimeError(f"lmms-eval could not load the task {name}: {reason(error)}") from error
    return list(found.values())


@functools.cache
def indexed(folder: str, defaults: bool) -> Any:
    """lmms-eval's index of tasks: of a folder, its own 2,000, or both. Reading its own takes seconds."""
    from lmms_eval.tasks import TaskManager

    return TaskManager("ERROR", include_path=folder or None, include_defaults=defaults, model_name="vlmfast")


def _manager(name: str, folder: str) -> Any:
    """The index that knows a task; a folder of the user's comes first. ValueError for an unknown name."""
    if folder:
        own = indexed(str(existing(folder, "folder of tasks")), False)
        if name in own.all_subtasks:
            return own
    manager = indexed(folder, True)
    if name not in manager.all_tasks:
        hint = did_you_mean(name, manager.all_tasks)
        raise ValueError(f"lmms-eval has no task {name!r}{hint}; `lmms-eval tasks list` lists its own")
    return manager


def _chosen(name: str, task: Any, limit: int | None) -> Chosen:
    split = task.config.test_split if task.has_test_docs() else task.config.validation_split
    docs = task.dataset[split]
    digest = hashlib.sha256(version("lmms-eval").encode())
    for key, value in sorted(task.config.to_dict().items()):
        digest.update(f"{key}={_written(getattr(task.config, key, value))}\n".encode())
    digest.update(str(getattr(docs, "_fingerprint", len(docs))).encode())
    n = len(docs) if limit is None else min(limit, len(docs))
    more = next(iter(task.higher_is_better().values()), True)  # None where lmms-eval does not say
    return Chosen(name, task, digest.hexdigest()[:16], n, -1 if more is False else 1)


def _written(value: Any) -> str:
    """A value of a configuration as text, functions as their source; no addresses."""
    if callable(value):
        with contextlib.suppress(OSError, TypeError):
            return inspect.getsource(value)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def reason(error: BaseException) -> str:
    """What went wrong, in one line: the error itself, not that it was tried again."""
    attempt = getattr(error, "last_attempt", None)
    if attempt is not None and attempt.exception() is not None:
        error = attempt.exception()
    words = " ".join(str(error).split())
    return words if isinstance(error, RuntimeError) and words else f"{type(error).__name__}: {words}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lmms-eval's log on standard error, from warnings on."""
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}")
    try:
        yield
    finally:
        logger.remove()
