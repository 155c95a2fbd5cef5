"""`vlmfast eval --task lmms:NAME`: lmms-eval's tasks, scored by lmms-eval, on our models under our methods.

One result a run in the format of every other (`vlmfast.eval.results`), answers beside it. Written `lmms:NAME` or, for
tasks of one's own, `lmms:NAME,include=FOLDER` with a folder of lmms-eval's YAML files; NAME may be a group.

Metrics are lmms-eval's numbers as they are, in its units. Intervals: documents drawn with replacement, paired with the
unpatched run's, and scored by the task's own aggregation; where that cannot be repeated (it writes files, or takes too
long) low and high are the value itself and there is no interval of the difference.

lmms-eval runs a task as a whole: finished runs are kept, an interrupted one begins anew. `accelerate launch -m vlmfast
eval` shares the documents among processes as lmms-eval does.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import inspect
import io
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from rich.console import Console
from rich.table import Table

from vlmfast.adapters import from_spec
from vlmfast.eval.environment import describe
from vlmfast.eval.lmms.arguments import Arguments
from vlmfast.eval.lmms.costs import Costs
from vlmfast.eval.lmms.engine import Engine
from vlmfast.eval.matching import named
from vlmfast.eval.metrics import DRAWS, draw, interval
from vlmfast.eval.models import check_device, model_folder, model_hash, split_adapter
from vlmfast.eval.report import text
from vlmfast.eval.report.table import WIDEST
from vlmfast.eval.results import (
    SCHEMA,
    Answers,
    Metric,
    Result,
    TaskResult,
    check_identity,
    read_result,
    ready_folder,
    run_name,
    sole_writer,
    write_result,
)
from vlmfast.eval.runner import check_specs, expand
from vlmfast.eval.sharing import of_environment
from vlmfast.eval.sweep import REPEATS, UNPATCHED, describe_spec
from vlmfast.eval.tasks.files import existing, settings_of
from vlmfast.families import did_you_mean, family_of

PREFIX = "lmms:"
USAGE = "lmms:NAME,include=FOLDER"
REASONING = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'  # lmms-eval's own default
CHOICE = ("multiple_choice", "loglikelihood")  # kinds of tasks that lmms-eval builds for simple models alone
PATIENCE = 2.0  # seconds for the resamples of one metric
FEW = 2  # tasks in a table up to which differences are printed
DIFFERS = "*"
FEWEST = 200  # resamples that make an interval


@dataclass(frozen=True)
class Chosen:
    """A task of lmms-eval, ready. hash: of its configuration, functions and documents. n: documents that are asked."""

    name: str
    task: Any
    hash: str
    n: int

    @property
    def simple(self) -> bool:
        """Whether it is of the kind that goes through the simple model."""
        return self.task.OUTPUT_TYPE in CHOICE


def evaluate(
    models: Sequence[str],
    specs: Sequence[str],
    keeps: Sequence[float | int],
    tasks: Sequence[str],
    out: str | Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
) -> list[Path]:
    """Score models under specs on lmms-eval's tasks, one JSON a run, and return the files.

    Arguments as of `vlmfast.eval.runner.evaluate`. limit: documents of each task. tasks: see the module.

    Raises ModuleNotFoundError without lmms-eval, ImportError for a task that needs a package which is not there,
    ValueError for an unknown task, RuntimeError for a task that lmms-eval could not finish: no score is made up.
    """
    import lmms_eval  # noqa: F401  told first, by name

    for name, value, least in (("limit", limit, 1), ("batch", batch, 1), ("seed", seed, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be a whole number, {least} or more; got {value!r}")
    check_device(of_environment().device(device))
    names = [settings_of(name, {"include": ""}, USAGE) for name in tasks]
    folders = {name: model_folder(name) for name in dict.fromkeys(models)}
    from transformers import AutoConfig

    runs = {}
    for name, folder in folders.items():
        runs[name] = expand(list(named(specs, family_of(AutoConfig.from_pretrained(folder)).name)), keeps)
        check_specs(name, folder, runs[name])
    ready_folder(Path(out))
    with quiet():
        chosen = choose(names, limit)
    paths = []
    for name, folder in folders.items():
        identity = {
            "schema": SCHEMA,
            "model_hash": model_hash(folder, split_adapter(name)[1]),
            "limit": limit,
            "seed": seed,
            "batch": batch,
            "device": device,
            "dtype": dtype,
            "beams": 1,
            "tasks": {PREFIX + one.name: one.hash for one in chosen},
        }
        work = Work(name, Path(out), identity, chosen)
        paths += [work.path(spec) for spec in runs[name]]
        alone = sole_writer(Path(out), name) if _first_process() else contextlib.nullcontext()
        with alone, quiet():
            work.run([spec for spec in runs[name] if not work.done(spec)])
    return paths


def from_command(
    models: Sequence[str],
    specs: Sequence[str],
    keeps: Sequence[float | int],
    tasks: Sequence[str],
    out: Path,
    **settings: Any,
) -> list[Path]:
    """`evaluate` with what `vlmfast eval` was given; ValueError for what is not said of lmms-eval's tasks."""
    ours = [name for name in tasks if not name.startswith(PREFIX)]
    if ours:
        raise ValueError(f"{', '.join(ours)}: lmms-eval's tasks have a call of their own, without vlmfast's")
    why = {
        "flops": "name a keep",
        "beams": "each of lmms-eval's tasks names its own number of beams",
        "workers": "accelerate launch -m vlmfast eval shares the documents among processes",
    }
    plain = {"flops": [], "beams": 1, "workers": None}
    for name, reason in why.items():
        if settings.pop(name, plain[name]) != plain[name]:
            raise ValueError(f"--{name} does not go with lmms-eval's tasks: {reason}")
    return evaluate(models, specs, keeps, tasks, out, **settings)


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
            raise RuntimeError(f"lmms-eval could not load the task {name}: {_reason(error)}") from error
    return list(found.values())


@functools.cache
def _indexed(folder: str, defaults: bool) -> Any:
    """lmms-eval's index of tasks: of a folder, its own 2,000, or both. Reading its own takes seconds."""
    from lmms_eval.tasks import TaskManager

    return TaskManager("ERROR", include_path=folder or None, include_defaults=defaults, model_name="vlmfast")


def _manager(name: str, folder: str) -> Any:
    """The index that knows a task; a folder of the user's comes first. ValueError for an unknown name."""
    if folder:
        own = _indexed(str(existing(folder, "folder of tasks")), False)
        if name in own.all_subtasks:
            return own
    manager = _indexed(folder, True)
    if name not in manager.all_tasks:
        hint = did_you_mean(name, manager.all_tasks)
        raise ValueError(f"lmms-eval has no task {name!r}{hint}; `lmms-eval tasks list` lists its own")
    return manager


class Work:
    """The runs of one model."""

    def __init__(self, model: str, out: Path, identity: dict[str, Any], chosen: Sequence[Chosen]) -> None:
        self.model, self.out, self.chosen = model, out, list(chosen)
        self.common = identity
        self.device = identity["device"]

    def identity(self, spec: str) -> dict[str, Any]:
        """What the files of one run must agree on."""
        return self.common | {"spec": spec}

    def path(self, spec: str) -> Path:
        """Where the result of one run belongs; not where one of other tasks would."""
        return self.out / f"{run_name(self.model, spec)}.json"

    def answers(self, spec: str) -> Answers:
        """The answers of one run."""
        return Answers(self.path(spec).with_name(f"{run_name(self.model, spec)}.jsonl"), self.identity(spec))

    def done(self, spec: str) -> bool:
        """Whether a run is complete; ValueError for files that do not belong to it."""
        path = self.path(spec)
        if not path.exists():
            return False
        check_identity(path, read_result(path).identity(), self.identity(spec))
        if not self.answers(spec).read():
            raise ValueError(f"{path} has lost its answers {self.answers(spec).path.name}: delete it to run it again")
        return True

    def run(self, specs: Sequence[str]) -> None:
        """Make these runs, one after the other, with the model loaded once."""
        if not specs:
            return
        name, adapter = split_adapter(self.model)
        arguments = Arguments(
            pretrained=name,
            adapter=None if adapter is None else str(adapter),
            device=self.device,
            dtype=self.common["dtype"],
            batch_size=self.common["batch"],
            latency=REPEATS,
        )
        engine = Engine(arguments)
        for spec in specs:
            self.one(engine, spec)

    def one(self, engine: Engine, spec: str) -> None:
        """One run: lmms-eval's evaluation of its chat tasks, then of the others; the result stored."""
        from lmms_eval.evaluator import simple_evaluate

        from vlmfast.eval.lmms.model import Vlmfast, VlmfastSimple

        started, clock = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.perf_counter()
        costs, latency = Costs(engine.model.config, from_spec(spec)), dict[str, Any]()
        metrics, records = dict[str, dict[str, Metric]](), list[dict[str, Any]]()
        baseline = {} if spec == UNPATCHED else _values(self.answers(UNPATCHED).read())
        options = argparse.Namespace(
            output_path=str(self.out), process_with_media=False, reasoning_tags=REASONING, agentic_trace_mode="basic"
        )
        first = True
        for kind in (Vlmfast, VlmfastSimple):
            tasks = [one for one in self.chosen if one.simple == kind.is_simple]
            if not tasks:
                continue
            engine.open(spec)
            model = kind(engine, times=not latency)
            try:
                found = simple_evaluate(
                    model=model,
                    tasks=[one.task for one in tasks],
                    limit=self.common["limit"],
                    batch_size=self.common["batch"],
                    device=self.device,
                    bootstrap_iters=0,
                    log_samples=True,
                    cli_args=options,
                    task_manager=_indexed("", False),  # the tasks are there: it need not know any
                    verbosity="ERROR",
                )
            except Exception as error:
                names = ", ".join(one.name for one in tasks)
                raise RuntimeError(f"{self.model} with {spec} on {names}: {_reason(error)}") from error
            finally:
                engine.close()
            costs.prompts.update(engine.costs.prompts)
            latency = latency or model.latency
            if found is None:  # not the first of several processes
                first = False
                continue
            for one in tasks:
                samples = sorted(found["samples"][one.name], key=lambda sample: sample["doc_id"])  # of all processes
                records += records_of(one, samples)
                metrics[one.name] = measure(one, found["results"][one.name], samples, baseline, self.common["seed"])
        if not first:
            return
        self.answers(spec).start(records)
        seconds = time.perf_counter() - clock
        write_result(self.path(spec), self.result(spec, metrics, costs.summary(), latency, started, seconds))

    def result(
        self,
        spec: str,
        metrics: Mapping[str, dict[str, Metric]],
        cost: dict[str, Any],
        latency: dict[str, Any],
        started: str,
        seconds: float,
    ) -> Result:
        """A finished run. Its mean over the tasks has no interval of its own."""
        tasks = {
            PREFIX + one.name: TaskResult(
                hash=one.hash, n=one.n, images=one.n, headline=next(iter(metrics[one.name])), metrics=metrics[one.name]
            )
            for one in self.chosen
        }
        heads = [task.metrics[task.headline] for task in tasks.values()]
        mean = float(np.mean([head.value for head in heads]))
        differences = [head.difference for head in heads if head.difference is not None]
        several = Metric(
            value=mean,
            low=mean,
            high=mean,
            difference=float(np.mean(differences)) if len(differences) == len(heads) else None,
        )
        macro = several if len(heads) > 1 else heads[0]
        method, keep = describe_spec(spec)
        fields = {name: value for name, value in self.common.items() if name not in ("tasks", "schema")}
        return Result(
            model=self.model,
            spec=spec,
            method=method,
            keep=keep,
            **fields,
            tasks=tasks,
            macro=macro,
            cost=cost,
            latency=latency,
            environment=describe(self.device) | {"lmms_eval": version("lmms-eval")},
            command=shlex.join(sys.argv),
            started=started,
            seconds=round(seconds, 3),
        )


def records_of(one: Chosen, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is stored of each document: the answer, what was expected, and what the task made of the two."""
    names = list(one.task.aggregation())
    return [
        {
            "id": f"{PREFIX}{one.name}/{sample['doc_id']}",
            "prompt": _plain(next(iter(sample["arguments"]), "")),
            "expected": _plain(sample["target"]),
            "answer": _plain(sample["filtered_resps"]),
            "tokens": sum((count or {}).get("output_tokens", 0) for count in sample["token_counts"]),
            "values": {name: _plain(sample[name]) for name in names if name in sample},
        }
        for sample in samples
    ]


def measure(
    one: Chosen,
    numbers: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    baseline: Mapping[str, Any],
    seed: int,
) -> dict[str, Metric]:
    """Every number that lmms-eval gives of a task, the headline first: its first metric. Filters by their names."""
    ids = [f"{PREFIX}{one.name}/{sample['doc_id']}" for sample in samples]
    filters = list(dict.fromkeys(key.partition(",")[2] for key in numbers if "," in key))
    metrics: dict[str, Metric] = {}
    for name, aggregate in one.task.aggregation().items():
        for number, filter_ in enumerate(filters):
            value = numbers.get(f"{name},{filter_}")
            label = name if number == 0 else f"{name}/{filter_}"
            if isinstance(value, Mapping):
                leaves = {f"{label}/{key}": leaf for key, leaf in value.items() if _is_number(leaf)}
                metrics |= {key: _point(float(leaf)) for key, leaf in leaves.items()}
            elif _is_number(value):
                values = (
                    [sample[name] for sample in samples] if len(filters) == 1 and len(set(ids)) == len(ids) else []
                )
                others = [baseline.get(key, {}).get(name) for key in ids] if baseline else None
                metrics[label] = resampled(float(value), values, others, aggregate, seed)
    if not metrics:
        raise RuntimeError(
            f"lmms-eval gives no number for {one.name}: {', '.join(map(str, numbers))}; tasks that only write a file "
            "for a server are run by lmms-eval itself"
        )
    return metrics


def resampled(
    value: float, values: Sequence[Any], others: Sequence[Any] | None, aggregate: Callable[..., Any], seed: int
) -> Metric:
    """A metric with its interval and, paired, its difference from the unpatched run (others: None for that run)."""
    if not values or "args" in inspect.signature(aggregate).parameters:
        return _point(value)
    start = time.perf_counter()
    again = _aggregated(aggregate, values)
    spent = max(time.perf_counter() - start, 1e-7)
    plain = getattr(aggregate, "__name__", "") == "mean" and all(_is_number(one) for one in values)
    rounds = DRAWS if plain else min(DRAWS, int(PATIENCE / spent))
    if not np.isclose(again, value, rtol=1e-9, atol=1e-12) or rounds < FEWEST:
        return _point(value)
    draws = draw(len(values), seed, rounds)
    own = _replicates(aggregate, values, draws, plain)
    _, low, high = interval(np.array([value]), own)
    if others is None or any(one is None for one in others):  # the unpatched run itself, or values JSON cannot hold
        return Metric(value=value, low=low, high=high)
    before = _aggregated(aggregate, others)
    same = plain and all(_is_number(one) for one in others)
    difference = interval(np.array([value - before]), own - _replicates(aggregate, others, draws, same))
    return Metric(
        value=value,
        low=low,
        high=high,
        difference=difference[0],
        difference_low=difference[1],
        difference_high=difference[2],
    )


def _replicates(aggregate: Callable[..., Any], values: Sequence[Any], draws: np.ndarray, plain: bool) -> np.ndarray:
    """The metric of every draw. draws: [R, documents] -> [R]"""
    if plain:
        return draws @ np.asarray(values, dtype=np.float64) / len(values)
    numbers = np.arange(len(values))
    drawn = (np.repeat(numbers, times).tolist() for times in draws.astype(int))
    return np.array([_aggregated(aggregate, [values[i] for i in some]) for some in drawn])


def _aggregated(aggregate: Callable[..., Any], values: Sequence[Any]) -> float:
    """The metric of some documents, NaN where it is not defined."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            found = aggregate(list(values))
        except (ZeroDivisionError, ValueError, KeyError, IndexError):
            return float("nan")
    return float(found) if _is_number(found) else float("nan")


def _first_process() -> bool:
    """Whether this is the one process, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def _values(records: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """What the tasks made of each document, by its id."""
    return {record["id"]: record["values"] for record in records}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool) and bool(np.isfinite(float(value)))


def _point(value: float) -> Metric:
    return Metric(value=value, low=value, high=value)


def _plain(value: Any) -> Any:
    """A value as JSON holds it; None where it cannot."""
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=_scalar))
    except (TypeError, ValueError):
        return None


def _scalar(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(type(value).__name__)


def _chosen(name: str, task: Any, limit: int | None) -> Chosen:
    split = task.config.test_split if task.has_test_docs() else task.config.validation_split
    docs = task.dataset[split]
    digest = hashlib.sha256(version("lmms-eval").encode())
    for key, value in sorted(task.config.to_dict().items()):
        digest.update(f"{key}={_written(getattr(task.config, key, value))}\n".encode())
    digest.update(str(getattr(docs, "_fingerprint", len(docs))).encode())
    n = len(docs) if limit is None else min(limit, len(docs))
    return Chosen(name, task, digest.hexdigest()[:16], n)


def _written(value: Any) -> str:
    """A value of a configuration as text, functions as their source; no addresses."""
    if callable(value):
        with contextlib.suppress(OSError, TypeError):
            return inspect.getsource(value)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _reason(error: BaseException) -> str:
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


def show(paths: Sequence[Path], console: Console | None = None) -> None:
    """A table of these runs: each task's first metric in lmms-eval's units, and what it cost.

    Of several processes the first one prints it.
    """
    if not _first_process():
        return
    results = [read_result(path) for path in paths]
    console = console or Console()
    if not console.is_terminal and console.width < WIDEST:
        console = Console(file=console.file, width=WIDEST, force_terminal=False, no_color=True)
    for model in dict.fromkeys(result.model for result in results):
        table = Table(title=f"{model}: lmms-eval", title_justify="left", box=None, pad_edge=False)
        table.add_column("method", no_wrap=True)
        rows = [result for result in results if result.model == model]
        for name, task in rows[0].tasks.items():
            table.add_column(f"{name.removeprefix(PREFIX)}\n{task.headline}", justify="right")
        for head in ("prefill\nFLOPs %", "visual\ntokens", "TTFT\nms", "speed-\nup"):
            table.add_column(head, justify="right")
        for result in rows:
            ttft, speedup = result.latency.get("ttft_ms"), result.latency.get("ttft_speedup")
            table.add_row(
                "unpatched" if result.spec == UNPATCHED else result.spec,
                *(_cell(task.metrics[task.headline], len(result.tasks) <= FEW) for task in result.tasks.values()),
                text.percent(result.cost.get("share_of_unpatched"), 0),
                text.count(result.cost.get("visual_tokens")),
                text.number(ttft and ttft["median"]),
                text.MISSING if speedup is None or result.spec == UNPATCHED else f"{speedup['median']:.2f}",
            )
        console.print(table)
    notes = f"{DIFFERS} differs from the unpatched model: the 95 % interval excludes zero. Results: {paths[0].parent}"
    console.print(notes, style="dim", highlight=False, markup=False, soft_wrap=True)


def _cell(metric: Metric, whole: bool) -> str:
    """`0.8 *`: a value; whole: with its difference from the unpatched run, `0.8 -0.2 [-0.6, -0.1] *`."""
    low, high = metric.difference_low, metric.difference_high
    if metric.difference is None or low is None or high is None:
        return f"{metric.value:.4g}  "
    mark = DIFFERS if low > 0 or high < 0 else " "  # which way is better is the metric's affair
    difference = f" {metric.difference:+.2g} \\[{low:+.2g}, {high:+.2g}]" if whole else ""
    return f"{metric.value:.4g}{difference} {mark}"
