"""`finetune`: supervised fine-tuning of a VLM by HF Trainer, on one process or many, resumable at any checkpoint.

Everything that can be checked is checked before weights are loaded (`Plan.of`); then the plan is run.
"""

import copy
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from vlmfast.adapters import from_spec, to_spec
from vlmfast.adapters.tuning.lofit import LofitTrainer, select_heads, two_stages
from vlmfast.eval.environment import describe
from vlmfast.eval.finetune.arguments import TOO_LONG, Arguments, dtype_of, prepared
from vlmfast.eval.finetune.collate import Collator, fitting, some
from vlmfast.eval.finetune.data import Samples, load_samples
from vlmfast.eval.finetune.evaluating import Pruning, TaskEvaluation
from vlmfast.eval.finetune.folder import FIRST, HEADS, checkpoint_of, schedule, write_run
from vlmfast.eval.finetune.tuners import STAGES, Tuning, apply, parse, trainable
from vlmfast.eval.models import load_model, model_folder, model_hash
from vlmfast.eval.results import write_atomic
from vlmfast.eval.runner import check_specs
from vlmfast.eval.tasks import choose
from vlmfast.families.base import did_you_mean

logger = logging.get_logger("vlmfast.finetune")


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    folder: adapter (or model), processor, vlmfast_finetune.json. metrics: of training and of the last evaluation;
    history: everything logged. trainable, parameters: numbers trained, and all. model: unpatched, in evaluation mode.
    """

    folder: Path
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    trainable: int
    parameters: int
    model: Any
    processor: Any


class _Trainer(Trainer):
    """A Trainer whose evaluations ask tasks, too. tasks: model -> metrics, None: no tasks."""

    control: Any

    def __init__(self, *args: Any, tasks: Callable[[Any], dict[str, float]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tasks = tasks

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As ever, with the tasks' scores among the metrics."""
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics.update(self.scores(kwargs.get("metric_key_prefix", "eval")))
        return output

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As ever; the tasks alone where there is no data to evaluate on."""
        if eval_dataset or self.eval_dataset:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics = self.scores(metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def last_evaluation(self) -> dict[str, float]:
        """The metrics of the final weights: of the evaluation after the last step, or of one now."""
        logged = [one for one in self.state.log_history if any(name.startswith("eval_") for name in one)]
        if not logged or logged[-1]["step"] != self.state.global_step or self.args.load_best_model_at_end:
            return self.evaluate()
        return {name: value for name, value in logged[-1].items() if name.startswith("eval_")}

    def scores(self, prefix: str) -> dict[str, float]:
        """The tasks' scores, of the main process, on every process."""
        from accelerate.utils import broadcast_object_list

        if self.tasks is None:
            return {}
        found = [self.tasks(self.model) if self.args.process_index == 0 else {}]
        broadcast_object_list(found)
        return {f"{prefix}_{name}": value for name, value in found[0].items()}


class _LofitTrainer(LofitTrainer, _Trainer):
    """The same with LoFiT's L1 term, where the adapter's config has one."""


def finetune(arguments: Arguments, training: TrainingArguments) -> Outcome:
    """Tune a model and write the folder of the run, `training.output_dir`.

    Raises
    ------
    ValueError, TypeError, NotImplementedError: arguments or records that cannot be, and a folder that holds another
    run; OSError: files that are not there. All this before weights are loaded, but for records that are too long and
    settings of a tuner that do not fit the model.
    """
    plan = Plan.of(arguments, training)
    return plan.run()


@dataclass
class Plan:
    """Everything about a run that was checked before weights are loaded."""

    arguments: Arguments
    training: TrainingArguments
    tuning: Tuning
    method: str
    tasks: list[str]
    folder: Path
    data: Samples
    eval_data: Samples | None
    dtype: str
    record: dict[str, Any]
    checkpoint: str | None

    @property
    def resumes(self) -> bool:
        """Whether it goes on from a checkpoint."""
        return self.checkpoint is not None

    @classmethod
    def of(cls, arguments: Arguments, training: TrainingArguments) -> "Plan":
        """Check everything that can be checked without weights."""
        training = prepared(training)
        tuning, method = parse(arguments.tuner), to_spec(from_spec(arguments.method))
        if arguments.too_long not in TOO_LONG:
            hint = did_you_mean(arguments.too_long, TOO_LONG)
            raise ValueError(f"too_long={arguments.too_long!r}{hint}; there are {', '.join(TOO_LONG)}")
        for name in ("max_length", "eval_limit", "eval_batch"):
            if (value := getattr(arguments, name)) is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more; got {value}")
        tasks = [name.strip() for name in (arguments.eval_tasks or "").split(",") if name.strip()]
        if tasks:
            choose(tasks)
            if training.fsdp or training.deepspeed:
                raise NotImplementedError("eval_tasks with fsdp or deepspeed: no process holds the whole model")
        elif training.eval_strategy != "no" and arguments.eval_data is None:
            raise ValueError("there is nothing to evaluate: name eval_tasks or eval_data, or leave eval_steps out")
        dtype = dtype_of(arguments.dtype, tuning, training)
        if "+adapter=" in arguments.model:
            raise ValueError(f"{arguments.model}: an adapter is tuned on a model without another one")
        folder = model_folder(arguments.model)
        check_specs(arguments.model, folder, [method])
        data = load_samples(
            arguments.data,
            split=arguments.data_split,
            config=arguments.data_config,
            image_folder=arguments.image_folder,
        )
        data_hash, eval_data = data.check(), None
        if arguments.eval_data is not None:
            eval_data = load_samples(
                arguments.eval_data, split=arguments.eval_split, image_folder=arguments.image_folder
            )
            eval_data.check()
        record = {
            "complete": False,
            "command": shlex.join(sys.argv),
            "model": arguments.model,
            "model_hash": model_hash(folder),
            "tuner": str(tuning),
            "method": method,
            "pruned_in_training": any(adapter.drops for adapter in from_spec(method)),
            "data": arguments.data,
            "data_hash": data_hash,
            "records": len(data),
            "max_length": arguments.max_length,
            "dtype": dtype,
            "processes": training.world_size,
            "training": schedule(training),
            "versions": describe("cpu" if training.device.type == "cpu" else str(training.device)),
        }
        checkpoint = checkpoint_of(training, record)
        return cls(arguments, training, tuning, method, tasks, folder, data, eval_data, dtype, record, checkpoint)

    def run(self) -> Outcome:
        """Load the model, train, save."""
        main, arguments, training = self.training.process_index == 0, self.arguments, self.training
        set_seed(training.seed)  # adapters begin at random
        model, processor = load_model(arguments.model, dtype=self.dtype)
        collator = Collator(processor)
        data = self.data
        if arguments.max_length is not None:
            data, dropped = fitting(data, collator, arguments.max_length, arguments.too_long)
            self.record |= {"records_dropped": len(dropped), "records": len(data)}
            if dropped and main:
                told = f"{len(dropped)} records are longer than max_length={arguments.max_length} tokens and left out"
                logger.warning(f"{told}: {some(dropped)}")
        if self.tuning.stages:
            model, trainer, metrics = self._two_stages(model, processor, data)
        else:
            model = apply(self.tuning, model)
            trainer, metrics = self._train(model, processor, data, training, self.checkpoint)
        trainer.save_model()
        trainer.save_state()
        if main:
            self.record |= {"complete": True, "steps": trainer.state.global_step, "metrics": metrics}
            write_run(self.output, self.record)
        return Outcome(
            self.output,
            metrics,
            trainer.state.log_history,
            self.record["trainable_parameters"],
            self.record["parameters"],
            model.eval(),
            processor,
        )

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return Path(cast(str, self.training.output_dir))

    def _train(
        self, model: Any, processor: Any, data: Samples, training: TrainingArguments, checkpoint: str | None
    ) -> tuple[_Trainer, dict[str, float]]:
        """Train a model on what it lets be trained. -> (trainer, metrics); the model is without the method again."""
        learns, numbers = trainable(model)
        if not learns:
            raise ValueError(f"tuner {self.tuning}: there is nothing to train")
        self.record |= {"trainable_parameters": learns, "parameters": numbers}
        if training.process_index == 0:
            write_run(self.output, self.record)
        pruning = Pruning(model, self.method)
        evaluation = None
        evaluates = training.eval_strategy != "no" or training is self.training
        if self.tasks and evaluates:
            evaluation = TaskEvaluation(
                self.tasks,
                self.arguments.model,
                processor,
                pruning,
                limit=self.arguments.eval_limit,
                batch=self.arguments.eval_batch,
                seed=training.seed,
            )
        trainer = (_LofitTrainer if self.tuning.name == "lofit" else _Trainer)(
            model=model,
            args=training,
            data_collator=Collator(processor),
            train_dataset=cast(Any, data),
            eval_dataset=cast(Any, self.eval_data if self.eval_data is not None else ({} if self.tasks else None)),
            processing_class=processor,
            tasks=evaluation,
        )
        pruning.start()
        try:
            result = trainer.train(resume_from_checkpoint=checkpoint)
            metrics = dict(result.metrics)
            if evaluates and (self.tasks or self.eval_data is not None):
                metrics |= trainer.last_evaluation()
        finally:
            pruning.stop()
        return trainer, metrics

    def _two_stages(self, model: Any, processor: Any, data: Samples) -> tuple[Any, _Trainer, dict[str, float]]:
        """LoFiT: stage 1 is in the folder `heads`, what it chooses in lofit_heads.json. -> (model, trainer, metrics)

        A run that goes on skips stage 1 where the heads are chosen.
        """
        file, training = self.output / HEADS, self.training
        settings = STAGES | self.tuning.settings
        rate = settings.pop("first_rate")
        first = copy.copy(training)
        first.output_dir, first.load_best_model_at_end = str(self.output / FIRST), False
        first.eval_strategy = IntervalStrategy.NO
        first.learning_rate = training.learning_rate if rate is None else rate
        early = self.checkpoint is not None and Path(self.checkpoint).parent.name == FIRST
        heads = json.loads(file.read_text()) if self.resumes and file.is_file() else None
        if heads is None and training.process_index == 0:
            file.unlink(missing_ok=True)  # of a run that left nothing else to go on from
        trained: list[tuple[_Trainer, dict[str, float]]] = []

        def train(stage: Any, number: int) -> None:
            if number == 1:
                trainer, _ = self._train(stage, processor, data, first, self.checkpoint if early else None)
                self.record["heads"] = select_heads(stage, settings["k"])
                trainer.accelerator.wait_for_everyone()
                if training.process_index == 0:
                    write_atomic(file, json.dumps(self.record["heads"]) + "\n")
                set_seed(training.seed)  # stage 2 begins as it would without stage 1
            else:
                trained.append(self._train(stage, processor, data, training, None if early else self.checkpoint))

        self.record["heads"] = heads
        tuned = two_stages(model, train, heads=heads, **settings)
        return tuned, *trained[0]
