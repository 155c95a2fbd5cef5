"""What fine-tuning teaches the testbed's models, what they forget, and what it costs: one table of all tuners.

    python scripts/tuning.py                                  # every way on testbed:llava
    python scripts/tuning.py --model testbed:qwen2_5_vl --way lora --way pill
    python scripts/tuning.py --table                          # only the table, from what was measured

Every way is trained on the new skill of `vlmfast.eval.testbed.novel` by `vlmfast.eval.finetune.finetune`: as many
steps on the same samples, at a learning rate of its own. Questions are then asked as a user would ask them, by
`generate`: the new skill and all of vlmfast's tasks, before and after. Differences are paired: the same questions,
images drawn with replacement. A way that trains under a pruning method is asked under it, and compared with the model
as it came under it. Costs are of the tuned model: a training step on a fixed batch (time; weights and the most bytes
held besides), and the first token of an answer (matrix products as they ran, tower included; time, in turns with the
model as it came).

The learning rates were chosen on other questions than those of the table: `--split validation --rate 0.01 --out ...`.

A way that is finished is not trained again, one that was interrupted goes on at its last checkpoint. Results go to
OUT/MODEL--WAY.json, the table to OUT/MODEL--tuning.md and .json.
"""

import argparse
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.trainer_utils import get_last_checkpoint

import vlmfast
from vlmfast.eval.environment import describe
from vlmfast.eval.finetune import Arguments, Training, finetune, load_samples
from vlmfast.eval.finetune.collate import Collator
from vlmfast.eval.latency import MB, Clock, LiveBytes, Spread, generation, interleave, use_threads, weight_bytes
from vlmfast.eval.latency import ratio as paired_ratio
from vlmfast.eval.metrics import Counts, measure
from vlmfast.eval.models import load_model, model_folder, model_hash
from vlmfast.eval.prompts import Prompts
from vlmfast.eval.results import WAY_OUT, Metric, ready_folder, run_name, write_atomic
from vlmfast.eval.tasks import NOVEL, TASKS, Doc, Task, image, task_hash
from vlmfast.eval.tasks.base import NOVEL as FIRST
from vlmfast.eval.tasks.base import documents
from vlmfast.eval.testbed import novel
from vlmfast.eval.testbed.scenes import SPLITS, Split

SCHEMA = 1
UNTUNED = "none"
BATCH = 8  # samples a step
ASKED = 64  # questions at a time
REHEARSAL = 0.25  # share of the samples that ask what the model was trained on
SAVE = 25  # steps between checkpoints
READINGS = 7


@dataclass(frozen=True)
class Way:
    """A way to tune: spec of the tuner, learning rate, pruning that is active in training and when asked."""

    tuner: str
    rate: float
    method: str = "none"


WAYS = {
    "lora": Way("lora:r=8,lora_alpha=16", 3e-3),
    "lora+hiprune": Way("lora:r=8,lora_alpha=16", 3e-3, "hiprune:keep=0.33"),
    "visual_lora": Way("visual_lora:r=8,alpha=16", 3e-3),
    "lofit": Way("lofit", 1e-2),  # the paper's: choose a tenth of the heads, then offsets for these
    "lofit-all": Way("lofit:component=both", 1e-2),  # scales and offsets of all heads, at once
    "pill": Way("pill:r=16", 3e-3),
    "ademvl-augment": Way("ademvl:mode=augment,grids=8/4,gate=zero", 1e-2),
    "ademvl-replace": Way("ademvl:mode=replace,grids=12/6", 1e-2),
}


@dataclass(frozen=True)
class Settings:
    """What all ways of a table share."""

    model: str
    out: Path
    steps: int
    limit: int
    split: Split = "test"
    seed: int = 0
    threads: int = 1

    def path(self, label: str) -> Path:
        """The file of a row."""
        return self.out / f"{run_name(self.model, label)}.json"


# --- questions


@dataclass(frozen=True)
class Exam:
    """Questions of some tasks, and how answers are counted."""

    tasks: Mapping[str, Task]
    docs: tuple[Doc, ...]

    @property
    def hash(self) -> str:
        """Changes with any question, picture or expected answer."""
        parts = [task_hash(task, [d for d in self.docs if d.task == name]) for name, task in self.tasks.items()]
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]

    def metrics(
        self, answers: Mapping[str, str], before: Mapping[str, str] | None, seed: int
    ) -> tuple[dict[str, dict[str, Metric]], Metric]:
        """The metrics by task, and the mean of the tasks' headlines; with paired differences from `before`."""
        scenes = list(dict.fromkeys(doc.scene for doc in self.docs))

        def counts(found: Mapping[str, str]) -> dict[str, Counts]:
            result = {}
            for name, task in self.tasks.items():
                docs = [doc for doc in self.docs if doc.task == name]
                scores = [task.score(doc, found[doc.id]) for doc in docs]
                result[name] = Counts.of(scores, [doc.scene for doc in docs], scenes)
            return result

        return measure(
            counts(answers),
            {name: task.summarise for name, task in self.tasks.items()},
            {name: task.HEADLINE for name, task in self.tasks.items()},
            None if before is None else counts(before),
            seed,
        )


@cache
def exams(limit: int, split: Split) -> dict[str, Exam]:
    """The new skill and what the models could do, on `limit` pictures of a split a task (new: twice that)."""
    groups = {"new": (NOVEL, 2 * limit, FIRST), "old": (TASKS, limit, 0)}
    return {
        name: Exam(tasks, tuple(doc for task in tasks for doc in documents(task, number, 0, split=split, first=first)))
        for name, (tasks, number, first) in groups.items()
    }


def ask(model: Any, processor: Any, exam: Exam, method: str) -> dict[str, str]:
    """The answers to an exam by the id of the question, each prompt with its picture as a user would give it."""
    prompts = Prompts(processor, model.device, model.dtype)
    order = sorted(exam.docs, key=lambda doc: (exam.tasks[doc.task].NEW_TOKENS, len(doc.prompt.split()), doc.id))
    answers: dict[str, str] = {}
    with vlmfast.patch(model, method) if method != "none" else nullcontext(), torch.no_grad():
        for start in range(0, len(order), ASKED):
            docs = order[start : start + ASKED]
            rows = [prompts.row(exam.tasks[doc.task].prompt(doc), image(doc)) for doc in docs]
            inputs = prompts.batch(rows) | prompts.pictures([image(doc) for doc in docs])
            longest = max(exam.tasks[doc.task].NEW_TOKENS for doc in docs)
            out = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
            texts = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers |= {doc.id: text.strip() for doc, text in zip(docs, texts)}
    return answers


# --- costs


def step_cost(model: Any, batch: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Milliseconds and megabytes of a training step of `model` on a batch: forward, backward, AdamW at rate 0."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.0, weight_decay=0.0)
    clock = Clock.of(model.device, threads)

    def step() -> float:
        start = clock.read()
        optimizer.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
        optimizer.step()
        return 1000 * (clock.read() - start)

    was_training = model.training
    model.train()
    try:
        with use_threads(threads):
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(model.device)
                before = torch.cuda.memory_allocated(model.device)
                step()
                peak = torch.cuda.max_memory_allocated(model.device) - before
            else:
                with LiveBytes() as live:
                    step()
                peak = live.peak
            times = interleave({"step": step}, repeats=READINGS)["step"]
    finally:
        model.train(was_training)
        optimizer.zero_grad(set_to_none=True)
    return {
        "ms": asdict(Spread.of(times)),
        "peak_mb": (weight_bytes(model) + peak) / MB,
        "clock": clock.name,
        "batch": len(batch["input_ids"]),
        "tokens": int(batch["attention_mask"].sum()),
    }


def first_token(model: Any, plain: Any, inputs: Mapping[str, Any], method: str, threads: int) -> dict[str, Any]:
    """Cost of the first token of an answer: GFLOPs of the matrix products, milliseconds, and both beside `plain`.

    plain: the model as it came, unpatched. The FLOPs are those of the operations that ran (2 x multiply-adds; full
    attention), tower included; what is no matrix product counts nothing.
    """
    clock = Clock.of(model.device, threads)
    patched = vlmfast.patch(model, method) if method != "none" else nullcontext()
    with use_threads(threads), patched:
        variants = {
            "plain": lambda: generation(plain, inputs, 1, clock).ttft_ms,
            "tuned": lambda: generation(model, inputs, 1, clock).ttft_ms,
        }
        times = interleave(variants, repeats=READINGS, warmup=2)
        flops = {name: _flops(one, inputs) for name, one in (("plain", plain), ("tuned", model))}
    return {
        "gflops": flops["tuned"] / 1e9,
        "gflops_share": flops["tuned"] / flops["plain"],
        "ttft_ms": asdict(Spread.of(times["tuned"])),
        "ttft_share": asdict(paired_ratio(times["tuned"], times["plain"])),
        "clock": clock.name,
    }


def _flops(model: Any, inputs: Mapping[str, Any]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return counter.get_total_flops()


# --- rows


def identity(settings: Settings, way: Way) -> dict[str, Any]:
    """What a stored row must agree on with the one that is asked for."""
    return {
        "schema": SCHEMA,
        "model_hash": model_hash(model_folder(settings.model)),
        "tuner": way.tuner,
        "rate": way.rate,
        "method": way.method,
        "steps": settings.steps if way.tuner != UNTUNED else 0,
        "batch": BATCH,
        "samples": novel.HASH,
        "rehearsal": REHEARSAL,
        "seed": settings.seed if way.tuner != UNTUNED else 0,
        "exams": {name: exam.hash for name, exam in exams(settings.limit, settings.split).items()},
    }


def data_of(settings: Settings) -> Path:
    """The samples of all ways, written if they are not there."""
    count = settings.steps * BATCH
    folder = settings.out / "data" / f"{count}-{REHEARSAL}-{novel.HASH[:8]}"
    file = folder / novel.FILE
    return file if file.is_file() else novel.write(folder, count, "train", REHEARSAL)


def stored(settings: Settings, label: str, way: Way) -> dict[str, Any] | None:
    """A finished row, None where there is none; ValueError if the file is one of another run."""
    path = settings.path(label)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a readable row ({error}): delete it to run it again") from None
    wanted = identity(settings, way)
    words = [f"{name} {found.get(name)} (now {value})" for name, value in wanted.items() if found.get(name) != value]
    if words:
        raise ValueError(f"{path} was made with {'; '.join(words)}: {WAY_OUT}")
    return record


def run(settings: Settings, label: str, way: Way, note: str) -> dict[str, Any]:
    """Train (unless untuned), ask, measure, and store one row."""
    start = time.perf_counter()
    record: dict[str, Any] = {"identity": identity(settings, way), "model": settings.model, "label": label}
    plain, processor = load_model(settings.model)
    data = data_of(settings)
    if way.tuner == UNTUNED:
        model = plain
        record |= {"trainable": 0, "parameters": sum(p.numel() for p in model.parameters())}
    else:
        made_of = hashlib.sha256(json.dumps(record["identity"]).encode()).hexdigest()[:8]
        folder = settings.out / "runs" / f"{run_name(settings.model, label)}-{made_of}"  # never one of other settings
        outcome = finetune(
            Arguments(model=settings.model, data=str(data), tuner=way.tuner, method=way.method),
            Training(
                output_dir=str(folder),
                max_steps=settings.steps,
                per_device_train_batch_size=BATCH,
                learning_rate=way.rate,
                lr_scheduler_type="cosine",
                warmup_steps=20,
                max_grad_norm=1.0,
                seed=settings.seed,
                save_steps=SAVE,
                save_total_limit=1,
                logging_steps=SAVE,
                use_cpu=True,
                resume_from_checkpoint="true" if folder.is_dir() and get_last_checkpoint(str(folder)) else None,
                disable_tqdm=not sys.stderr.isatty(),
            ),
        )
        model = outcome.model
        record |= {"trainable": outcome.trainable, "parameters": outcome.parameters, "history": outcome.history}
    record["answers"] = {
        name: ask(model, processor, exam, way.method) for name, exam in exams(settings.limit, settings.split).items()
    }
    samples = load_samples(str(data))
    batch = Collator(processor)([samples[i] for i in range(BATCH)])
    doc = exams(settings.limit, settings.split)["new"].docs[0]
    inputs = Prompts(processor, plain.device, plain.dtype).full(doc.prompt, image(doc))
    record["first_token"] = first_token(model, load_model(settings.model)[0], inputs, way.method, settings.threads)
    if way.tuner != UNTUNED:
        with vlmfast.patch(model, way.method) if way.method != "none" else nullcontext():
            record["step"] = step_cost(model, batch, settings.threads)
    record |= {
        "note": note,
        "command": shlex.join(sys.argv),
        "environment": describe("cpu"),
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_atomic(settings.path(label), json.dumps(record, indent=1) + "\n")
    return record


def before(way: Way) -> tuple[str, Way]:
    """The row that a way is compared with, by label: the model as it came, under the same pruning."""
    return (UNTUNED if way.method == "none" else f"{UNTUNED}+{way.method}"), Way(UNTUNED, 0.0, way.method)


def rows_of(labels: list[str]) -> dict[str, Way]:
    """The ways of these labels, behind the rows that they are compared with."""
    ways = {label: WAYS[label] for label in WAYS if label in labels}
    return dict([before(Way(UNTUNED, 0.0)), *(before(way) for way in ways.values()), *ways.items()])


# --- the table

COLUMNS = (
    "way", "trainable", "new skill %", "learnt, points", "objects %", "relations %", "old tasks %", "old, points",
    "ms/step", "peak MB", "prompt GFLOPs", "TTFT",
)  # fmt: skip


COPIED = ("trainable", "parameters", "step", "first_token", "identity", "note", "environment", "command", "seconds")


def summary(
    settings: Settings, records: Mapping[str, dict[str, Any]], rows: Mapping[str, Way]
) -> list[dict[str, Any]]:
    """One dict a row: metrics with intervals, paired differences, and costs."""
    found = []
    for label, record in records.items():
        reference, _ = before(rows[label])
        earlier = records[reference]["answers"] if label != reference else None
        row: dict[str, Any] = {"way": label, "model": settings.model}
        for name, exam in exams(settings.limit, settings.split).items():
            metrics, macro = exam.metrics(record["answers"][name], earlier and earlier[name], 0)
            row[name] = {
                "mean": asdict(macro),
                "tasks": {task: {key: asdict(value) for key, value in of.items()} for task, of in metrics.items()},
                "questions": len(exam.docs),
            }
        found.append(row | {"compared with": reference} | {key: record[key] for key in COPIED if key in record})
    return found


def _interval(metric: Mapping[str, Any], kind: str = "") -> str:
    names = (f"{kind}value", f"{kind}low", f"{kind}high") if not kind else (kind, f"{kind}_low", f"{kind}_high")
    if metric[names[0]] is None:
        return "-"
    value, low, high = (f"{100 * metric[name]:{'+' if kind else ''}.1f}" for name in names)
    return f"{value} [{low}, {high}]"


def markdown(summaries: list[dict[str, Any]]) -> str:
    """The table, and what its columns are."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for row in summaries:
        new, old, step, first = row["new"], row["old"], row.get("step"), row["first_token"]
        headline = {task: new["tasks"][task]["accuracy"] for task in new["tasks"]}
        cells = (
            row["way"],
            f"{row['trainable']:,}" if row["trainable"] else "-",
            _interval(new["mean"]),
            _interval(new["mean"], "difference"),
            f"{100 * headline['novel_object']['value']:.1f}",
            f"{100 * headline['novel_relation']['value']:.1f}",
            _interval(old["mean"]),
            _interval(old["mean"], "difference"),
            f"{step['ms']['median']:.0f}" if step else "-",
            f"{step['peak_mb']:.0f}" if step else "-",
            f"{first['gflops']:.3f} ({100 * first['gflops_share']:.0f} %)",
            f"{first['ttft_share']['median']:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    one = next((row for row in summaries if "step" in row), summaries[0])
    steps, batch = one["identity"]["steps"], one["identity"]["batch"]
    notes = [
        f"{one['model']}, {steps} steps of {batch} samples, {100 * one['identity']['rehearsal']:.0f} % of them "
        f"rehearsal; {one['new']['questions']} questions of the new skill, {one['old']['questions']} old ones; seed "
        f"{one['identity']['seed']}. 95 % intervals; points: paired differences from the model as it came, under the "
        "same pruning.",
        "ms/step, peak MB: a training step on a fixed batch, weights included. prompt GFLOPs: matrix products until "
        "the first token, tower included, and their share of the untuned model's. TTFT: times that of the untuned "
        "model.",
    ]
    notes += sorted({row["note"] for row in summaries if row.get("note")})
    return "\n".join([*lines, "", *(line for note in notes for line in (note, ""))])


def tabulate(settings: Settings, rows: Mapping[str, Way]) -> str:
    """Write the table of the rows that are there, as Markdown and JSON, and return it."""
    records = {label: record for label, way in rows.items() if (record := stored(settings, label, way)) is not None}
    records = {label: record for label, record in records.items() if before(rows[label])[0] in records}
    if not records:
        raise FileNotFoundError(f"{settings.out} holds no row of {settings.model} yet")
    summaries = summary(settings, records, rows)
    text = markdown(summaries)
    name = run_name(settings.model, "tuning")
    write_atomic(settings.out / f"{name}.json", json.dumps(summaries, indent=1) + "\n")
    write_atomic(settings.out / f"{name}.md", text)
    return text


def main() -> int:
    """Parse the options, make the rows that are missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="testbed:llava", help="testbed:llava or testbed:qwen2_5_vl (%(default)s)")
    parser.add_argument("--way", action="append", choices=list(WAYS), help="repeatable (default: all)")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each (%(default)s)")
    parser.add_argument("--limit", type=int, default=30, help="pictures a task, of the new skill twice (%(default)s)")
    parser.add_argument("--split", choices=SPLITS[1:], default="test", help="of the questions (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of adapters and of the order of samples (%(default)s)")
    parser.add_argument("--rate", type=float, help="learning rate instead of each way's own")
    parser.add_argument("--threads", type=int, default=1, help="with 1 times are process times (%(default)s)")
    parser.add_argument("--note", default="", help="stored with each row and shown below the table")
    parser.add_argument("--out", type=Path, default=Path("results/tuning"), help="folder (%(default)s)")
    parser.add_argument("--table", action="store_true", help="only the table, of the rows that are there")
    options = parser.parse_args()
    settings = Settings(
        options.model, options.out, options.steps, options.limit, options.split, options.seed, options.threads
    )
    rows = rows_of(options.way or list(WAYS))
    if options.rate is not None:
        rows = {label: replace(way, rate=options.rate) if way.rate else way for label, way in rows.items()}
    try:
        ready_folder(settings.out)
        torch.set_num_threads(settings.threads)
        for label, way in rows.items() if not options.table else ():
            if stored(settings, label, way) is None:
                print(f"{settings.model}  {label} ...", file=sys.stderr, flush=True)
                run(settings, label, way, options.note)
        print(tabulate(settings, rows))
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {settings.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
