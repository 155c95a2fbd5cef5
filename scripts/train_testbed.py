"""Train the testbed's models from nothing, export them and measure them.

    python scripts/train_testbed.py data                       # draw the training scenes (two minutes)
    python scripts/train_testbed.py train llava                # resumable; some hours on a core, minutes on a GPU
    python scripts/train_testbed.py export llava               # write eval/testbed/llava
    python scripts/train_testbed.py evaluate llava             # accuracy of the shipped folder, unpruned and pruned

Everything goes to ``runs/testbed``; a second ``train`` goes on where the first one stopped.
"""

import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from vlmfast.eval import testbed
from vlmfast.eval.testbed import build, card, measure, training
from vlmfast.eval.testbed.corpus import Corpus, write_corpus
from vlmfast.eval.testbed.scenes import check_test_split

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
RUNS = Path(__file__).resolve().parents[1] / "runs" / "testbed"
Name = Annotated[str, typer.Argument(help="llava or qwen2_5_vl")]
STAGES = {
    "llava": [
        training.Stage("tower", 5000, 16, 1.0e-3, sparse=0.8),
        training.Stage("align", 100, 16, 1e-3),
        training.Stage("language", 3400, 16, 1.2e-3, attention=(0.3, 0.1), sparse=0.8, tower=0.6),
        training.Stage("vary", 400, 16, 3e-4, vary=True, tower=0.5, decay=0.5),
        training.Stage("settle", 500, 16, 5e-4, vary=True, tower=0.0, swap=0.8, decay=0.5),
        training.Stage("clean", 500, 16, 5e-4, vary=True, clean=20.0, decay=0.5),
    ],
    "qwen2_5_vl": [
        training.Stage("tower", 3200, 16, 1.0e-3, sparse=0.9),
        training.Stage("align", 100, 16, 1e-3),
        training.Stage("language", 3400, 16, 1.2e-3, attention=(0.3, 0.1), sparse=0.8, tower=0.7),
        training.Stage("vary", 500, 16, 3e-4, vary=True, tower=0.0, decay=0.5),
    ],
}


@app.command()
def data(scenes: int = 100_000, workers: int = 2) -> None:
    """Draw the training and validation scenes."""
    write_corpus(RUNS / "validation", "validation", 600, workers)
    typer.echo(f"{len(write_corpus(RUNS / 'train', 'train', scenes, workers))} scenes in {RUNS / 'train'}")


@app.command()
def train(name: Name, device: str = "cpu", threads: int = 1, until: str = "", seed: int = 0) -> None:
    """Train a model through its stages, from where it stands."""
    torch.set_num_threads(threads)
    names = [stage.name for stage in STAGES[name]]
    run = training.Run(RUNS / name, name, seed, device)
    signal.signal(signal.SIGTERM, lambda *_: setattr(run, "stopping", True))
    run.train(STAGES[name][: names.index(until) + 1 if until else None], Corpus(RUNS / "train"))


@app.command()
def validate(name: Name, scenes: int = 100, threads: int = 1) -> None:
    """Accuracy of the checkpoint on validation scenes, with all visual tokens and with few."""
    torch.set_num_threads(threads)
    run = training.Run(RUNS / name, name)
    run.model.eval()
    typer.echo(f"{name} {run.stage} {run.step}")
    for select in ("all", "oracle", "attention", "random"):
        for compact in (False, True):
            found = measure.accuracy(run.model, name, "validation", scenes, select, compact=compact)
            label = f"{select} compact" if compact else select
            typer.echo(f"{label:18s}" + "  ".join(f"{task} {right / n:.2f}" for task, (right, n) in found.items()))


@app.command()
def export(name: Name) -> None:
    """Write the checkpoint's model and its processor as a Hugging Face folder into the package (bf16)."""
    run = training.Run(RUNS / name, name)
    target = testbed.folder(name)
    run.model.to(torch.bfloat16).save_pretrained(target)
    (target / "model.safetensors").chmod(0o644)
    build.save_processor(name, target)
    typer.echo(
        f"{target}: {(target / 'model.safetensors').stat().st_size / 2**20:.1f} MiB after {run.stage} {run.step}"
    )


@app.command()
def evaluate(name: Name, scenes: int = 500, threads: int = 1) -> None:
    """Measure the shipped folder on the test split and write its model card and curves."""
    torch.set_num_threads(threads)
    check_test_split()
    model, processor = testbed.load(name)
    found = {select: measure.accuracy(model, name, "test", scenes, select) for select in measure.SELECTIONS}
    for select in ("oracle", "random"):
        found[f"{select}, compact"] = measure.accuracy(model, name, "test", scenes, select, compact=True)
    curves = card.read_curves(RUNS / name / "curves.jsonl")
    results = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "scenes": len(Corpus(RUNS / "train")),
        "test_scenes": scenes,
        "minutes": curves[-1]["seconds"] / 60,
        "selections": found,
        "captions": measure.chair(measure.captions(model, processor, "test", scenes)),
        "sinks": {**measure.sinks(model, name, "test", 50), "scenes": 50},
    }
    (RUNS / name / "results.json").write_text(json.dumps(results, indent=1))
    for select, tasks in found.items():
        typer.echo(f"{select:16s}" + "  ".join(f"{task} {right / n:.3f}" for task, (right, n) in tasks.items()))
    typer.echo(json.dumps(results["captions"]))
    write(name)


@app.command()
def write(name: Name) -> None:
    """Write the model card and the curves from the last evaluation."""
    results = json.loads((RUNS / name / "results.json").read_text())
    stages = [{k: v for k, v in asdict(stage).items() if k != "decay"} for stage in STAGES[name]]
    target = testbed.folder(name)
    notes = (RUNS / name / "notes.md").read_text() if (RUNS / name / "notes.md").exists() else ""
    card.write_card(name, results, stages, notes, target / "README.md")
    card.plot_curves(card.read_curves(RUNS / name / "curves.jsonl"), f"testbed:{name}", target / "curves.png")


if __name__ == "__main__":
    app()
