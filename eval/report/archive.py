"""What lies behind results: the questions, as long as they are the ones that were asked, and the raw answers."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlmfast.eval.results import Missing, Result, answers_of


class Archive:
    """Documents of tasks, each set loaded once, and answers from the folders that the results lie in."""

    def __init__(self, folders: Iterable[str | Path] = ()) -> None:
        self.folders = [Path(folder) for folder in folders]
        self._documents: dict[tuple[Any, ...], Sequence[Any] | Missing] = {}

    def answers(self, result: Result) -> list[dict[str, Any]]:
        """The raw answers of a run; `Missing` where they are not at hand, or damaged."""
        return answers_of(result, self.folders)

    def documents(self, result: Result, task: str) -> Sequence[Any]:
        """The documents of a task that a run answered, in their order; `Missing` where they cannot be had."""
        key = (task, result.limit, result.seed, result.tasks[task].hash if task in result.tasks else None)
        if key not in self._documents:
            self._documents[key] = _load(task, result.limit, result.seed, key[-1])
        found = self._documents[key]
        if isinstance(found, Missing):
            raise found
        return found


def _load(task: str, limit: int | None, seed: int, digest: Any) -> Sequence[Any] | Missing:
    from vlmfast.eval.tasks import task as named
    from vlmfast.eval.tasks import task_hash

    try:
        asked = named(task)
        docs = asked.load(limit, seed)
    except (OSError, ValueError) as error:  # files of the user's that are elsewhere by now
        return Missing(f"the pictures of {task} are not at hand: {error}")
    if digest != task_hash(asked, docs):
        return Missing(f"the scenes of {task} have changed since this result was made")
    return docs
