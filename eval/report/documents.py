"""The questions behind a result, as long as they are the ones that it was made on."""

from collections.abc import Sequence
from typing import Any

from vlmfast.eval.results import Result


class Documents:
    """Tasks' documents for results, each set loaded once."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], Sequence[Any] | str] = {}

    def of(self, result: Result, task: str) -> Sequence[Any] | str:
        """The documents of a task that a run answered, in their order, or why they cannot be had."""
        from vlmfast.eval.tasks import task as named
        from vlmfast.eval.tasks import task_hash

        digest = result.tasks[task].hash if task in result.tasks else None
        key = (task, result.limit, result.seed, digest)
        if key not in self._found:
            try:
                asked = named(task)
                docs = asked.load(result.limit, result.seed)
            except (OSError, ValueError) as error:  # files of the user's that are elsewhere by now
                self._found[key] = f"the pictures of {task} are not at hand: {error}"
                return self._found[key]
            changed = f"the scenes of {task} have changed since this result was made"
            self._found[key] = docs if digest == task_hash(asked, docs) else changed
        return self._found[key]
