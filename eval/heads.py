"""Which heads to edit: each (layer, head) of a decoder edited alone, and scored.

ZeroTuning profiles heads so ("up-effective", "down-effective"), and ACT calibrates so. The questions are asked about
scenes of the validation split, so that what is chosen by them can be scored on test scenes. Tasks over the user's
files have no such split: choose heads on other files than those that are reported.

Two files: `NAME.scores.json` holds every head's scores and grows while the heads are tried, so that an interrupted
search goes on from there; `NAME.json` {"layer": [head, ...]} holds the heads that help, for `heads=NAME.json`.
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

import vlmfast
from vlmfast.adapters import ADAPTERS, from_spec, to_spec
from vlmfast.decoders import Attention, decoder
from vlmfast.eval.environment import describe
from vlmfast.eval.latency import use_threads
from vlmfast.eval.metrics import Counts, measure
from vlmfast.eval.models import DTYPES, check_device, model_folder, model_hash, split_adapter
from vlmfast.eval.progress import Bars
from vlmfast.eval.results import WAY_OUT, Metric, check_identity, sole_writer, write_atomic
from vlmfast.eval.runner import check_specs, cores
from vlmfast.eval.sweep import UNPATCHED, Job, Notify, Sweep
from vlmfast.eval.tasks import TASKS, Doc, choose, task_hash
from vlmfast.eval.tasks.base import IMAGES, documents
from vlmfast.families import family_of

SHOWN = 5  # heads a layer that the table names


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One head edited alone: its score, and the difference from the unpatched model with its 95 % interval."""

    layer: int
    head: int
    score: float
    difference: float
    low: float
    high: float
    tasks: dict[str, float]


@dataclass(frozen=True)
class Profile:
    """The scores of all heads. unpatched: of the model as it is; scores: the mean of the tasks' headline metrics."""

    model: str
    spec: str
    questions: int
    images: int
    unpatched: float
    trials: tuple[Trial, ...]

    def chosen(self, margin: float = 0.0, top: float | int | None = None) -> dict[int, list[int]]:
        """The heads that help, by layer: whose difference is above `margin`; of them the best `top`.

        top: a share of all heads that were tried, as a float in (0, 1], or a number of heads; None: all.
        """
        if isinstance(top, bool) or top is not None and not (0 < top <= 1 if isinstance(top, float) else top >= 1):
            raise ValueError(f"top={top!r}: a share of the heads such as 0.4, or a number of heads such as 8")
        helping = sorted((t for t in self.trials if t.difference > margin), key=lambda t: -t.difference)
        if top is not None:
            helping = helping[: max(1, round(top * len(self.trials))) if isinstance(top, float) else top]
        found: dict[int, list[int]] = {}
        for trial in sorted(helping, key=lambda t: (t.layer, t.head)):
            found.setdefault(trial.layer, []).append(trial.head)
        return found


def profile(
    model: str,
    spec: str,
    tasks: Sequence[str] | None,
    out: str | Path,
    *,
    limit: int | None = None,
    margin: float = 0.0,
    top: float | int | None = None,
    seed: int = 0,
    batch: int = 64,
    device: str = "cpu",
    dtype: str = "float32",
    progress: bool = True,
) -> Profile:
    """Score every head of a method's layers, edited alone; write the scores and the heads that help.

    Parameters
    ----------
    model: `testbed:NAME`, a folder, or a Hugging Face id.
    spec: one method with a setting `heads`, which is left open; its `layers` are tried.
    tasks: names of tasks; None: all offline ones.
    out: the file of the heads that help, NAME.json; the scores go to NAME.scores.json beside it.
    limit: images per task; None takes the tasks' defaults.
    margin, top: see `Profile.chosen`.
    seed: draws the images of the tasks and the resamples of the intervals.

    Raises
    ------
    ValueError: an argument that cannot be; a file of scores that was made otherwise, or is damaged.
    OSError, RuntimeError, KeyboardInterrupt: as `vlmfast.eval.runner.evaluate`; the same call goes on from there.
    """
    for name, value, least in (("limit", limit, 1), ("batch", batch, 1), ("seed", seed, 0)):
        if (name, value) != ("limit", None) and (
            isinstance(value, bool) or not isinstance(value, int) or value < least
        ):
            raise ValueError(f"{name} must be a whole number, {least} or more; got {value!r}")
    empty = Profile(model, spec, 0, 0, 0.0, ())
    empty.chosen(margin, top)  # before any work
    method = the_method(spec)
    check_device(device)
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; there are {', '.join(DTYPES)}")
    out = Path(out)
    if out.suffix != ".json" or not out.parent.is_dir():
        raise ValueError(f"--out {out}: a file NAME.json in a folder that is there")
    chosen, folder = choose(tasks), model_folder(model)
    check_specs(model, folder, [spec])
    config = AutoConfig.from_pretrained(folder)
    family_of(config)
    heads = candidates(method, config)
    job = Job(
        model=model,
        model_hash=model_hash(folder, split_adapter(model)[1]),
        specs=(to_spec((method,)),),
        hashes={name: task_hash(task, held_out(name, limit, seed)) for name, task in chosen.items()},
        out=out.parent,
        limit=limit,
        seed=seed,
        batch=batch,
        device=device,
        dtype=dtype,
        threads=cores(),
        command=shlex.join(sys.argv),
    )
    scores = Scores(out.with_suffix(".scores.json"), job.identity(job.specs[0]))
    stored = scores.read()
    left = [pair for pair in heads if pair not in stored.trials]
    if left:
        with (
            Bars(progress, {model: len(heads) + 1}) as bars,
            sole_writer(out.parent, model),
            use_threads(job.threads),
            torch.no_grad(),
        ):
            Search(job, method).run(left, stored, scores, partial(bars.update, model))
    found = Profile(
        model,
        job.specs[0],
        stored.questions,
        stored.images,
        stored.unpatched,
        tuple(stored.trials[pair] for pair in heads),
    )
    helping = {str(layer): numbers for layer, numbers in found.chosen(margin, top).items()}
    write_atomic(out, json.dumps(helping, indent=1) + "\n")
    return found


def the_method(spec: str) -> Any:
    """The one method of a spec whose heads can be chosen. ValueError for any other spec."""
    with_heads = [name for name, cls in ADAPTERS.items() if "heads" in cls.settings()]
    methods = from_spec(spec)
    if len(methods) != 1:
        raise ValueError(f"{spec!r}: heads are chosen for one method at a time, of {', '.join(with_heads)}")
    (method,) = methods
    if method.name not in with_heads:
        raise ValueError(f"{method.name} does not edit single heads; methods with heads: {', '.join(with_heads)}")
    if vars(method)["heads"] is not None:
        raise ValueError(
            f"{spec!r}: heads are what is looked for, leave the setting out (`layers` says where to look)"
        )
    if getattr(method, "neutral", False):
        raise ValueError(f"{spec!r} changes nothing in any head")
    return method


def candidates(method: Any, config: Any) -> list[tuple[int, int]]:
    """The (layer, head) pairs that a method could edit in a model."""
    layers = decoder(config).layers
    attends = [number for number, layer in enumerate(layers) if isinstance(layer.mixer, Attention)]
    heads = config.get_text_config().num_attention_heads
    return [(layer, head) for layer in method.where(attends, len(layers)) for head in range(heads)]


def held_out(name: str, limit: int | None, seed: int) -> list[Doc]:
    """A task's questions about validation scenes; of a task over the user's files those that it has."""
    task = choose([name])[name]
    if name not in TASKS:
        return task.load(limit, seed)
    return documents(name, limit, seed, getattr(task, "IMAGES", IMAGES), split="validation")


@dataclass
class Stored:
    """What is known so far."""

    questions: int
    images: int
    unpatched: float
    trials: dict[tuple[int, int], Trial]


class Scores:
    """The file of scores, whole at every moment. identity: what it must agree with to be gone on with."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.environment = describe(identity["device"])

    def read(self) -> Stored:
        """What is stored; nothing where there is no file. ValueError for a file of another search, or damaged."""
        if not self.path.exists():
            return Stored(0, 0, 0.0, {})
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            trials = [Trial(**trial) for trial in content["heads"]]
            known = Stored(
                content["questions"],
                content["images"],
                content["unpatched"],
                {(trial.layer, trial.head): trial for trial in trials},
            )
            identity = dict(content["search"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): {WAY_OUT}") from None
        check_identity(self.path, identity, self.identity)
        return known

    def write(self, stored: Stored) -> None:
        """Store what is known."""
        content = {
            "search": self.identity,
            "split": "validation",
            "questions": stored.questions,
            "images": stored.images,
            "unpatched": stored.unpatched,
            "environment": self.environment,
            "heads": [dataclasses.asdict(trial) for _, trial in sorted(stored.trials.items())],
        }
        write_atomic(self.path, json.dumps(content, indent=1, allow_nan=False) + "\n")


class Search(Sweep):
    """A loaded model with the questions and the encoded pictures that all heads are tried on."""

    def __init__(self, job: Job, method: Any) -> None:
        super().__init__(job)
        self.method = method

    def documents(self) -> list[Doc]:
        """Questions apart from those that methods are scored on."""
        return [doc for name in self.tasks for doc in held_out(name, self.job.limit, self.job.seed)]

    def run(  # type: ignore[override]  # one method, many heads, where a sweep has many methods
        self, heads: Sequence[tuple[int, int]], stored: Stored, scores: Scores, notify: Notify
    ) -> None:
        """Try heads one by one, and store each one's scores at once."""
        plain = self.counts(self.answered(UNPATCHED, UNPATCHED))
        stored.questions, stored.images = len(self.docs), len(self.scenes)
        stored.unpatched = self.measured(plain)[1].value
        notify("answered", UNPATCHED, 1 + len(stored.trials))
        for number, (layer, head) in enumerate(heads):
            alone = dataclasses.replace(self.method, layers=layer, heads=head)
            name = f"layer {layer} head {head}"
            stored.trials[layer, head] = self.trial(layer, head, self.answered(alone, name), plain)
            scores.write(stored)
            notify("answered", name, 1)
            if number + 1 == len(heads) or heads[number + 1][0] != layer:
                notify("finished", f"layer {layer}", len(self.docs))

    def answered(self, method: Any, name: str) -> dict[str, dict[str, Any]]:
        """The answers to all questions under a method, by question."""
        records: dict[str, dict[str, Any]] = {}
        with vlmfast.patch(self.model, method) as handle:
            for batch in self.batches:
                records |= {record["id"]: record for record in self.answer(batch, name, handle)}
        return records

    def trial(self, layer: int, head: int, records: dict[str, dict[str, Any]], plain: Mapping[str, Counts]) -> Trial:
        """The scores of one head, compared with those of the unpatched model."""
        metrics, macro = self.measured(self.counts(records), plain)
        assert macro.difference is not None and macro.difference_low is not None and macro.difference_high is not None
        return Trial(
            layer=layer,
            head=head,
            score=macro.value,
            difference=macro.difference,
            low=macro.difference_low,
            high=macro.difference_high,
            tasks={name: metrics[name][task.HEADLINE].value for name, task in self.tasks.items()},
        )

    def measured(
        self, counts: Mapping[str, Counts], baseline: Mapping[str, Counts] | None = None
    ) -> tuple[dict[str, dict[str, Metric]], Metric]:
        """All metrics, and the mean of the headlines."""
        return measure(
            counts,
            {name: task.summarise for name, task in self.tasks.items()},
            {name: task.HEADLINE for name, task in self.tasks.items()},
            baseline,
            self.job.seed,
        )


def show(found: Profile, chosen: Mapping[int, Sequence[int]], console: Console | None = None) -> None:
    """Print the heads that were chosen, layer by layer."""
    console = console or Console()
    helping = [t for t in found.trials if t.difference > 0]
    hurting = [t for t in found.trials if t.difference < 0]
    idle = len(found.trials) - len(helping) - len(hurting)
    console.print(
        f"{found.model}  {found.spec}  each head edited alone, {found.questions} questions on {found.images} images "
        f"kept apart from the test scenes\nunpatched {100 * found.unpatched:.1f} %; of {len(found.trials)} heads "
        f"{len(helping)} help, {len(hurting)} hurt, {idle} change nothing\n",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", justify="right")
    for column in ("help", "hurt", "chosen"):
        table.add_column(column, justify="right")
    table.add_column("best heads (points against unpatched, 95 % interval)")
    for layer in dict.fromkeys(trial.layer for trial in found.trials):
        own = sorted((t for t in found.trials if t.layer == layer), key=lambda t: -t.difference)
        best = [t for t in own if t.difference > 0][:SHOWN]
        table.add_row(
            str(layer),
            str(sum(t in helping for t in own)),
            str(sum(t in hurting for t in own)),
            str(len(chosen.get(layer, ()))),
            "  ".join(f"{t.head} {100 * t.difference:+.1f} ({100 * t.low:+.1f} to {100 * t.high:+.1f})" for t in best),
        )
    console.print(table)
