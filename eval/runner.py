"""`evaluate`: models x specs on tasks, one result file a run, several models at a time, resumable at any point.

Two processes for two models give the same numbers as one after the other: each model is always one sweep of its own
(`vlmfast.eval.sweep`) with a number of threads that does not depend on `workers`.
"""

import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty
from typing import Any

from transformers import AutoConfig

from vlmfast.adapters import from_spec
from vlmfast.eval.models import AUTO, DTYPES, check_device, model_folder, model_hash, split_adapter, weight_files
from vlmfast.eval.planning import check_goal, plan, usual_prompt
from vlmfast.eval.progress import Bars
from vlmfast.eval.results import check_identity, read_result, ready_folder, run_name, tell_matched
from vlmfast.eval.sharing import of_environment
from vlmfast.eval.sweep import Job, sweep
from vlmfast.eval.tasks import choose, task_hash
from vlmfast.families import family_of

SMALL = 500_000_000  # bytes of weights up to which models are evaluated side by side on a CPU


def evaluate(
    models: Sequence[str],
    specs: Sequence[str],
    keeps: Sequence[float | int],
    tasks: Sequence[str] | None,
    out: str | Path,
    *,
    flops: Sequence[float] = (),
    match: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch: int = 64,
    beams: int = 1,
    workers: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    progress: bool = True,
) -> list[Path]:
    """Score models under specs, one JSON a run, and return the files, model by model in the order of the runs.

    Parameters
    ----------
    models: `testbed:NAME`, folders, Hugging Face ids; with `+adapter=FOLDER` behind one, a PEFT adapter on it.
    specs: method specs, or "all" for every method that works on images of the model's family; a method that has a
        setting `keep` which the spec does not name runs with each of `keeps`. The unpatched model ("none") always
        runs, and first: every other run is compared with it.
    keeps: shares in (0, 1] as floats, or numbers of visual tokens as ints.
    flops: shares of the unpatched prefill FLOPs instead of `keeps`: `keep` is solved for each model and method, so
        that all runs of a share cost the same.
    match: "flops": each of `keeps` stands for the share of the prefill FLOPs that pruning so much costs by itself, and
        the `keep` of every method is solved for that share.
    tasks: names of offline tasks; None for all.
    out: folder of the results. Complete runs found there are kept, interrupted ones go on where they stopped.
    limit: images per task; None takes the tasks' defaults.
    seed: draws the images of the tasks and the resamples of the intervals.
    batch: questions answered at a time.
    beams: `num_beams` of every run, the unpatched one too. With 1, a method that needs beams takes its own number and
        is compared with greedy search.
    device: "auto" shares each model out among all GPUs.
    workers: processes, at most one a model; None: one a model on a CPU if the models are small, else one in all.

    Started by `accelerate launch` or torchrun, processes share the questions (see `vlmfast.eval.sharing`): the first
    one writes the results and returns when they are complete, the others when they have answered their part.

    Raises
    ------
    ValueError: an argument that cannot be; a file in `out` that is damaged or was made by another run.
    OSError: a model that is not there, a folder that cannot be written to, a full disk.
    RuntimeError: a question that could not be answered, or a worker process that died.
    What was finished stays, and the same call goes on from there; so it does after KeyboardInterrupt.
    """
    numbers = {
        "limit": (limit, 1),
        "batch": (batch, 1),
        "beams": (beams, 1),
        "workers": (workers, 1),
        "seed": (seed, 0),
    }
    for name, (value, least) in numbers.items():
        if value is None and name in ("limit", "workers"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number, {least} or more; got {value!r}")
    share = of_environment()
    if share.world > 1 and workers not in (None, 1):
        raise ValueError(f"workers={workers}: the launcher started {share.world} processes that share every model")
    check_device(share.device(device))
    if device == AUTO and workers not in (None, 1):
        raise ValueError(f"workers={workers}: device auto shares each model out among all devices, one at a time")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    if not models:
        raise ValueError("no model given")
    check_goal(match)
    chosen = choose(tasks)
    folders = {name: model_folder(name) for name in dict.fromkeys(models)}
    check_names(models)
    documents = {name: task.load(limit, seed) for name, task in chosen.items()}
    plans = {}
    for name, folder in folders.items():
        config = AutoConfig.from_pretrained(folder)
        usual = partial(usual_prompt, config, folder, chosen, documents)
        plans[name] = plan(config, specs, keeps, flops, match, usual)
        for note in plans[name].notes if share.first else ():
            print(f"{name}: {note}", file=sys.stderr)
    for name, folder in folders.items():
        check_specs(name, folder, plans[name].runs)
    ready_folder(Path(out))

    hashes = {name: task_hash(task, documents[name]) for name, task in chosen.items()}
    beside = share.world == 1 and _side_by_side(list(folders.values()), device)
    common: dict[str, Any] = {
        "hashes": hashes,
        "out": Path(out),
        "limit": limit,
        "seed": seed,
        "batch": batch,
        "beams": beams,
        "device": device,
        "dtype": dtype,
        "threads": max(1, cores() // (len(folders) if beside else share.beside)),
        "share": share,
        "command": shlex.join(sys.argv),
    }
    jobs = [
        Job(
            model=name,
            model_hash=model_hash(folder, split_adapter(name)[1]),
            specs=tuple(plans[name].runs),
            matched=plans[name].matched,
            **common,
        )
        for name, folder in folders.items()
    ]
    pending = [owed for owed in map(outstanding, jobs) if owed.specs]
    total = sum(map(len, documents.values()))
    with Bars(progress and share.first, {job.model: total * len(job.specs) for job in pending}) as bars:
        if min(len(pending), workers or (len(pending) if beside else 1)) > 1:
            work_side_by_side(pending, workers or min(len(pending), cores()), bars)
        else:
            for job in pending:
                sweep(job, partial(bars.update, job.model))
    if share.first:
        for job in jobs:
            for spec, goal in job.matched.items():
                tell_matched(job.path(spec), goal)
    return [job.path(spec) for job in jobs for spec in job.specs]


def check_specs(model: str, folder: Path, specs: Sequence[str]) -> None:
    """Raise, naming model and spec, if a method cannot work on a model's vision tower."""
    config = AutoConfig.from_pretrained(folder)
    tower = family_of(config).tower(config)
    for spec in specs:
        for adapter in from_spec(spec):
            try:
                adapter.check(family_of(config))
                adapter.wanted(tower) if hasattr(adapter, "wanted") else None
            except (NotImplementedError, ValueError) as error:
                raise type(error)(f"{spec} on {model}: {error}") from None


def check_names(models: Sequence[str]) -> None:
    """ValueError for models of different names whose results would have the same file names."""
    seen: dict[str, str] = {}
    for model in models:
        if (other := seen.setdefault(run_name(model, ""), model)) != model:
            raise ValueError(f"{other} and {model} would write the same files: evaluate each into a folder of its own")


def outstanding(job: Job) -> Job:
    """The job without the runs that are complete; ValueError for files that do not belong to it."""
    owed = []
    for spec in job.specs:
        path, answers = job.path(spec), job.answers(spec)
        stored = answers.everybodys()  # of complete runs, too: comparisons rest on the unpatched run's answers
        if not path.exists():
            owed.append(spec)
            continue
        check_identity(path, read_result(path).identity(), job.identity(spec))
        if not stored:
            raise ValueError(f"{path} has lost its answers {answers.path.name}: delete it to run it again")
    return Job(**vars(job) | {"specs": tuple(owed)})


def cores() -> int:
    """The processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _side_by_side(folders: Sequence[Path], device: str) -> bool:
    """Whether the models are evaluated at the same time by default: on a CPU, if they are small."""
    size = sum(file.stat().st_size for folder in folders for file in weight_files(folder))
    return device == "cpu" and 1 < len(folders) <= cores() and size <= SMALL


def work_side_by_side(jobs: Sequence[Job], workers: int, bars: Bars) -> None:
    """Every job in a process of its own, `workers` at a time; the first error stops all and is raised here."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads in an unknown state
    queue = context.Queue()
    waiting, running = list(jobs), dict[str, BaseProcess]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                running[job.model] = context.Process(target=_work, args=(job, queue), daemon=True)
                running[job.model].start()
            for model, event, content, questions in _messages(queue, running):
                if event == "error":
                    raise content
                if event == "end":
                    running.pop(model).join()
                else:
                    bars.update(model, event, content, questions)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def _messages(queue: Any, running: dict[str, BaseProcess]) -> Iterator[tuple[str, str, Any, int]]:
    """What the workers have sent, waiting up to a second for it; RuntimeError if one has died without a word."""
    dead = [model for model, process in running.items() if process.exitcode is not None]
    try:
        yield queue.get(timeout=1)
        while True:
            yield queue.get_nowait()
    except Empty:
        for model in dead:
            if model in running:  # it was dead before we listened, and still has not said that it ended
                code = running[model].exitcode
                raise RuntimeError(
                    f"the process that evaluated {model} died with exit code {code} (short of memory?); "
                    "run the same command again to go on from there"
                ) from None


def _work(job: Job, queue: Any) -> None:
    """The main function of a worker process: runs a job and tells its parent what happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides, and ends us
    parent = multiprocessing.parent_process()

    def notify(event: str, spec: str, questions: int) -> None:
        if parent is None or not parent.is_alive():
            raise SystemExit(1)  # nobody waits for the results any more
        queue.put((job.model, event, spec, questions))

    try:
        sweep(job, notify)
        queue.put((job.model, "end", "", 0))
    except Exception as error:
        queue.put((job.model, "error", _portable(error), 0))


def _portable(error: Exception) -> Exception:
    """The error as one that survives the way to another process: the same kind, or the nearest standard one."""
    if isinstance(error, OSError):
        return OSError(str(error)) if error.errno is None else OSError(error.errno, error.strerror, error.filename)
    for kind in (NotImplementedError, ValueError, TypeError, RuntimeError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
