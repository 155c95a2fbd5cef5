"""`vlmfast eval --task lmms:NAME`: lmms-eval's tasks, scored by lmms-eval, on our models under our methods.

One result a run in the format of every other (`vlmfast.eval.results`), answers beside it. Written `lmms:NAME` or, for
tasks of one's own, `lmms:NAME,include=FOLDER` with a folder of lmms-eval's YAML files; NAME may be a group. Metrics
are lmms-eval's numbers as they are, in its units.

lmms-eval runs a task as a whole: finished runs are kept, an interrupted one begins anew. `accelerate launch -m vlmfast
eval` shares the documents among processes as lmms-eval does.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from vlmfast.adapters import from_spec
from vlmfast.eval.environment import describe
from vlmfast.eval.lmms.arguments import Arguments
from vlmfast.eval.lmms.costs import Costs
from vlmfast.eval.lmms.engine import Engine
from vlmfast.eval.lmms.scores import measure, records_of, values_of
from vlmfast.eval.lmms.tasks import PREFIX, Chosen, choose, indexed, quiet, reason
from vlmfast.eval.models import check_device, model_folder, model_hash, split_adapter
from vlmfast.eval.planning import plan
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
    tell_matched,
    write_result,
)
from vlmfast.eval.runner import check_names, check_specs
from vlmfast.eval.sharing import of_environment
from vlmfast.eval.sweep import REPEATS, UNPATCHED, describe_spec
from vlmfast.eval.tasks.files import settings_of
from vlmfast.solving import NOMINAL_TEXT, nominal
from vlmfast.towers import Picture

USAGE = "lmms:NAME,include=FOLDER"
REASONING = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'  # lmms-eval's own default
FEW = 2  # tasks in a table up to which differences are printed
DIFFERS = "*"


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
    flops: Sequence[float] = (),
    match: str | None = None,
) -> list[Path]:
    """Score models under specs on lmms-eval's tasks, one JSON a run, and return the files.

    Arguments as of `vlmfast.eval.runner.evaluate`. limit: documents of each task. tasks: see the module. flops, match:
    keeps are solved as shares, for an image of the family's usual size; the results tell what the documents cost.

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
    check_names(models)
    plans = {}
    for name, folder in folders.items():
        config = AutoConfig.from_pretrained(folder)
        usual = partial(usual_prompt, config)
        plans[name] = plan(config, specs, keeps, flops, match, usual, counted=False)
        notes = plans[name].notes
        if plans[name].matched:
            text_tokens, picture = usual()
            grid = "x".join(map(str, picture.patches))
            about = f"keep is solved for {text_tokens} text tokens and an image of {grid} patches"
            notes = [f"{about}; the results tell what the documents really cost", *notes]
        for note in notes if _first_process() else ():
            print(f"{name}: {note}", file=sys.stderr)
        check_specs(name, folder, plans[name].runs)
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
        work = Work(name, Path(out), identity, chosen, plans[name].matched)
        paths += [work.path(spec) for spec in plans[name].runs]
        alone = sole_writer(Path(out), name) if _first_process() else contextlib.nullcontext()
        with alone, quiet():
            work.run([spec for spec in plans[name].runs if not work.done(spec)])
        if _first_process():
            for spec, share in plans[name].matched.items():
                tell_matched(work.path(spec), share)
    return paths


def usual_prompt(config: Any) -> tuple[int, Picture]:
    """(text tokens, picture) that a keep is solved for: the documents' own are not known before they are asked."""
    return NOMINAL_TEXT, nominal(config)


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
        "beams": "each of lmms-eval's tasks names its own number of beams",
        "workers": "accelerate launch -m vlmfast eval shares the documents among processes",
    }
    plain = {"beams": 1, "workers": None}
    for name, instead in why.items():
        if settings.pop(name, plain[name]) != plain[name]:
            raise ValueError(f"--{name} does not go with lmms-eval's tasks: {instead}")
    return evaluate(models, specs, keeps, tasks, out, **settings)


class Work:
    """The runs of one model."""

    def __init__(
        self,
        model: str,
        out: Path,
        identity: dict[str, Any],
        chosen: Sequence[Chosen],
        matched: Mapping[str, float] | None = None,
    ) -> None:
        self.model, self.out, self.chosen, self.matched = model, out, list(chosen), matched or {}
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
        path, stored = self.path(spec), self.answers(spec).everybodys()
        if not path.exists():
            return False
        check_identity(path, read_result(path).identity(), self.identity(spec))
        if not stored:
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
        baseline = {} if spec == UNPATCHED else values_of(self.answers(UNPATCHED).read())
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
                    task_manager=indexed("", False),  # the tasks are there: it need not know any
                    verbosity="ERROR",
                )
            except Exception as error:
                names = ", ".join(one.name for one in tasks)
                raise RuntimeError(f"{self.model} with {spec} on {names}: {reason(error)}") from error
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
                hash=one.hash,
                n=one.n,
                images=one.n,
                headline=next(iter(metrics[one.name])),
                metrics=metrics[one.name],
                better=one.better,
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
            matched=self.matched.get(spec),
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


def _first_process() -> bool:
    """Whether this is the one process, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


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
