"""The progress of an evaluation: one bar a model on a terminal, one line a finished run elsewhere."""

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Bars:
    """Shows how far each model's sweep is; `totals` is the number of questions of each, all its runs together.

    Writes to standard error, so that standard output holds nothing but the table.
    """

    def __init__(self, show: bool, totals: Mapping[str, int], console: Console | None = None) -> None:
        self.show, self.totals = show, totals
        self.console = console or Console(stderr=True)
        self.bars: dict[str, TaskID] = {}
        self.begun = time.monotonic()
        self.progress = Progress(
            TextColumn("{task.fields[model]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[spec]}"),
            console=self.console,
            disable=not (show and self.console.is_terminal),
        )

    def __enter__(self) -> "Bars":
        self.progress.start()
        for model, total in self.totals.items():
            self.bars[model] = self.progress.add_task("", total=total, model=model, spec="loading")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def update(self, model: str, event: str, spec: str, questions: int) -> None:
        """Take in an event of a sweep: questions were `answered`, or a run is `finished`."""
        if event == "answered":
            self.progress.update(self.bars[model], advance=questions, spec=spec)
        elif self.show and not self.console.is_terminal:
            seconds = time.monotonic() - self.begun
            line = f"{seconds:6.0f} s  {model}  {spec}  {questions} questions"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
