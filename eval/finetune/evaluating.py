"""vlmfast's own tasks asked during training, of the weights as they are then."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import vlmfast
from vlmfast.eval.metrics import measure
from vlmfast.eval.sweep import Job, Sweep
from vlmfast.eval.tasks import choose
from vlmfast.patching import Handle, unwrap


class Pruning:
    """A spec that is active on a model while it is trained, and can be lifted."""

    def __init__(self, model: Any, spec: str) -> None:
        self.model, self.spec = model, spec
        self.handle: Handle | None = None

    def start(self) -> None:
        """Patch the model."""
        if self.spec != "none":
            self.handle = vlmfast.patch(self.model, self.spec)

    def stop(self) -> None:
        """Restore the model."""
        if self.handle is not None:
            self.handle.close()
            self.handle = None

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The model without the spec for a while."""
        active = self.handle is not None
        self.stop()
        try:
            yield
        finally:
            if active:
                self.start()


class TaskScores(Sweep):
    """Questions of some tasks, asked of a model that is there already."""

    def __init__(self, job: Job, model: Any, processor: Any) -> None:
        super().__init__(job, (model, processor))

    def scores(self, spec: str) -> dict[str, float]:
        """Every task's headline metric under a spec, and their mean."""
        records: dict[str, dict[str, Any]] = {}
        with vlmfast.patch(self.model, spec) as handle:
            for batch in self.batches:
                records |= {record["id"]: record for record in self.answer(batch, spec, handle)}
        headlines = {name: task.HEADLINE for name, task in self.tasks.items()}
        summaries = {name: task.summarise for name, task in self.tasks.items()}
        metrics, macro = measure(self.counts(records), summaries, headlines, None, self.job.seed)
        found = {f"{name}_{headlines[name]}": metrics[name][headlines[name]].value for name in self.tasks}
        return found if len(found) == 1 else found | {"tasks_mean": macro.value}


class TaskEvaluation:
    """Scores of tasks on a model in training. tasks: names; limit: images a task; batch: questions at a time."""

    def __init__(
        self,
        tasks: list[str],
        model: str,
        processor: Any,
        pruning: Pruning,
        *,
        limit: int | None,
        batch: int,
        seed: int,
    ) -> None:
        choose(tasks)
        self.processor, self.pruning = processor, pruning
        self.job = Job(
            model=model,
            model_hash="",
            specs=(pruning.spec,),
            hashes=dict.fromkeys(tasks, ""),
            out=Path("."),
            limit=limit,
            seed=seed,
            batch=batch,
            device="cpu",
            dtype="float32",
            threads=torch.get_num_threads(),
            command=shlex.join(sys.argv),
        )

    def __call__(self, model: Any) -> dict[str, float]:
        """The scores of the weights as they are, in evaluation mode; mode and random numbers stay as they were."""
        model = unwrap(model)
        training = [module for module in model.modules() if module.training]
        with self.pruning.lifted(), torch.random.fork_rng(), torch.no_grad():
            model.eval()
            try:
                job = replace(self.job, device=str(model.device), dtype=str(model.dtype).removeprefix("torch."))
                return TaskScores(job, model, self.processor).scores(self.pruning.spec)
            finally:
                for module in training:
                    module.training = True
