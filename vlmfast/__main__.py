"""Command line: ``vlmfast list | run | demo | sinks | eval | heads | rank-layers | bench | flops | report``.

The only core file that may import upwards, and only inside the commands: help must not wait for torch.
"""

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vlmfast.complaints import TOLD, system_error, told

TESTBED = ["testbed:llava", "testbed:qwen2_5_vl"]
METHODS = ["none", "random", "grid", "fastervlm:fallback=received", "hiprune"]
KEEPS = "1.0,0.5,0.33,0.2,0.11"
TOPICS = ("methods", "families", "tasks")
EXTRAS = dict.fromkeys(("accelerate", "datasets", "jinja2", "matplotlib", "plotly", "psutil", "sklearn"), "eval")
EXTRAS |= {"lmms_eval": "lmms", "gradio": "demo", "fastapi": "demo", "uvicorn": "demo"}
FAILED, WRONG, INTERRUPTED = 1, 2, 130  # exit codes
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)

_UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class OneLine(TyperGroup):
    """A command group that answers wrong input with one line on standard error and exit code 2."""

    def main(  # the arguments of click's own
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command; errors that are no answer to the user keep their traceback."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except _UsageError as error:
            code = complain(error.format_message())
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except ModuleNotFoundError as error:
            extra_name = EXTRAS.get((error.name or "").partition(".")[0])
            if extra_name is None:
                raise
            code = complain(f"{error.name} is not installed; pip install 'vlmfast[{extra_name}]' brings it")
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone, as in `vlmfast list | head -1`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                code = 1
            else:
                code = complain(system_error(error), FAILED if error.errno in FULL else WRONG)
        except TOLD as error:
            line = told(error)
            if line is None:
                raise
            failed = isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)
            code = complain(line, FAILED if failed else WRONG)
        code = code if isinstance(code, int) else 0
        if standalone_mode:
            sys.exit(code)
        return code


def complain(message: str, code: int = WRONG) -> int:
    """One line on standard error; returns the exit code."""
    typer.echo(f"vlmfast: {' '.join(message.split())}", err=True)
    return code


app = typer.Typer(
    cls=OneLine,
    name="vlmfast",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"vlmfast {version('vlmfast')}")
        raise typer.Exit()


@app.callback(
    invoke_without_command=True,
    epilog="""\b
examples:
  vlmfast list methods
  vlmfast run --model testbed:llava --image photo.png --prompt "what colour is the cup ?" --method hiprune:keep=0.33
  vlmfast eval
""",
)
def start(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Make vision-language models cheaper to run and less prone to hallucinate, without retraining."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(
    "list",
    epilog="""\b
examples:
  vlmfast list
  vlmfast list methods
""",
)
def list_(
    topic: Annotated[
        str | None, typer.Argument(metavar="[methods|families|tasks]", help="What to list (default: all three).")
    ] = None,
) -> None:
    """List methods, model families and tasks."""
    if topic is not None and topic not in TOPICS:
        raise ValueError(f"cannot list {topic!r}; there are {', '.join(TOPICS)}")
    from vlmfast.eval import listing

    listing.show([topic] if topic else TOPICS)


MODEL_HELP = "Hugging Face id, folder, testbed:llava or testbed:qwen2_5_vl."
METHOD_HELP = 'Spec such as hiprune:keep=0.33; join with +; "none" is the model as it is. Repeatable.'
EVAL_METHOD_HELP = f'{METHOD_HELP[:-12]} "all" is every method that works on images. Repeatable.'

Model = Annotated[str, typer.Option(metavar="ID", help=MODEL_HELP)]
Models = Annotated[list[str], typer.Option("--model", metavar="ID", help=f"{MODEL_HELP} Repeatable.")]
Methods = Annotated[list[str], typer.Option("--method", metavar="SPEC", help=METHOD_HELP)]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="NAME", help="See vlmfast list tasks (default: all). Repeatable."),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="cpu, cuda, ...; auto: the model shared out among all GPUs (default: cuda if there is one, else cpu).",
    ),
]
Dtype = Annotated[str, typer.Option(metavar="NAME", help="float32, bfloat16 or float16.")]
Adapter = Annotated[
    Path | None, typer.Option(metavar="DIR", help="A PEFT adapter on the model, as scripts/finetune.py writes it.")
]
Repeats = Annotated[int, typer.Option(min=1, metavar="N", help="Readings of each time.")]


def _number(explanation: str, least: int = 1) -> Any:
    """An option that takes a whole number."""
    return typer.Option(min=least, metavar="N", help=explanation)


@app.command(
    epilog="""\b
examples:
  vlmfast run --model testbed:llava --image photo.png --prompt "what is red ?" --method hiprune:keep=0.33
  vlmfast run --model testbed:llava --adapter runs/lora --image photo.png --prompt "what is red ?" --method hiprune
  vlmfast run --model Qwen/Qwen2.5-VL-3B-Instruct --dtype bfloat16 --image photo.jpg \\
      --prompt "What is written on the sign?" --method fastervlm:keep=0.5 --method random:keep=0.5 --out kept.png
""",
)
def run(
    model: Model,
    image: Annotated[Path, typer.Option(metavar="FILE", help="The picture.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The question.")],
    method: Methods,
    out: Annotated[Path, typer.Option(metavar="FILE", help="PNG of the kept tokens over the picture.")] = Path(
        "overlay.png"
    ),
    adapter: Adapter = None,
    max_new_tokens: Annotated[int, _number("Longest answer.")] = 64,
    repeats: Repeats = 3,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Answer one question with and without a method.

    Prints both answers, visual tokens, FLOPs and times; writes a PNG of the kept tokens over the picture.
    """
    from vlmfast.eval import asking
    from vlmfast.eval.models import with_adapter

    asking.run(
        with_adapter(model, adapter),
        image,
        prompt,
        method,
        out,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        device=device or best_device(),
        dtype=dtype,
    )


@app.command(
    epilog="""\b
examples:
  vlmfast demo
  vlmfast demo --model testbed:qwen2_5_vl --port 8000 --open
  vlmfast demo --model llava-hf/llava-1.5-7b-hf --device cuda --dtype bfloat16
""",
)
def demo(
    model: Model = TESTBED[0],
    adapter: Adapter = None,
    max_new_tokens: Annotated[int, _number("Longest answer.")] = 64,
    repeats: Repeats = 3,
    host: Annotated[
        str, typer.Option(metavar="NAME", help="Who reaches the page: 127.0.0.1, this machine alone; 0.0.0.0, all.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", help="Where it is served.")] = 7860,
    open_: Annotated[bool, typer.Option("--open", help="Open it in a browser, too.")] = False,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Ask a model on a page in the browser.

    A picture, a question and methods: answers, kept tokens, FLOPs and times side by side. The page asks nobody outside
    of this machine, and uploaded pictures are gone when it is closed.
    """
    from vlmfast.eval.demo import serving
    from vlmfast.eval.models import with_adapter

    serving.serve(
        with_adapter(model, adapter),
        host=host,
        port=port,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        device=device or best_device(),
        dtype=dtype,
        browse=open_,
    )


@app.command(
    epilog="""\b
examples:
  vlmfast sinks --model testbed:llava --image photo.png
  vlmfast sinks --model llava-hf/llava-1.5-7b-hf --image photo.jpg --prompt "What is on the table?" --dims 1415/2533
""",
)
def sinks(
    model: Model,
    image: Annotated[Path, typer.Option(metavar="FILE", help="The picture.")],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The question.")] = "describe the picture .",
    out: Annotated[Path, typer.Option(metavar="FILE", help="PNG of what every layer does.")] = Path("sinks.png"),
    dims: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Sink dimensions, such as 1415/2533 (default: listed for the model or found)."
        ),
    ] = None,
    tau: Annotated[float | None, typer.Option(metavar="X", help="A sink is larger than this (default: 20).")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Find attention sinks: tokens, dimensions, shares.

    Prints a table with a line a layer and the sink metric; writes a PNG of the same.
    """
    from vlmfast.eval import sinks as finding

    finding.run(model, image, prompt, out, dims=dims, tau=tau, device=device or best_device(), dtype=dtype)


@app.command(
    "eval",
    epilog="""\b
examples:
  vlmfast eval
  vlmfast eval --limit 10 --out /tmp/quick
  vlmfast eval --model testbed:llava --method random --method hiprune --keep 0.5,0.25,16 --task colour --task count
  vlmfast eval --method all --keep 0.33 --match flops             (all at the cost of a third of the tokens)
  vlmfast eval --model testbed:llava --method random --method fastv --flops 0.6     (all at 60 % of the FLOPs)
  vlmfast eval --model testbed:llava --adapter runs/lora --method none --method hiprune --keep 0.33
  vlmfast eval --model llava-hf/llava-1.5-7b-hf --method none --method hiprune --device cuda --dtype bfloat16
  vlmfast eval --model llava-hf/llava-1.5-7b-hf --method hiprune:keep=0.33 --task lmms:pope --batch 8
  vlmfast eval --model llava-hf/llava-v1.6-34b-hf --device auto --dtype bfloat16     (too large for one GPU)
  accelerate launch --num_processes 8 -m vlmfast eval --model llava-hf/llava-1.5-7b-hf --dtype bfloat16 --out shared
""",
)
def evaluate(
    model: Models = TESTBED,
    adapter: Adapter = None,
    method: Annotated[list[str], typer.Option("--method", metavar="SPEC", help=EVAL_METHOD_HELP)] = METHODS,
    keep: Annotated[
        str, typer.Option(metavar="LIST", help="For specs that name no keep: shares (0.5) or numbers of tokens (64).")
    ] = KEEPS,
    flops: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Instead of --keep: shares of the unpatched prefill FLOPs, keep is solved."),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(metavar="flops", help="Every --keep as the cost of random pruning; keep is solved to match it."),
    ] = None,
    task: Tasks = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results; what is done stays.")] = Path(
        "results"
    ),
    limit: Annotated[int | None, _number("Images per task (default: what each task takes).")] = None,
    seed: Annotated[int, _number("Draws the images and the intervals.", 0)] = 0,
    batch: Annotated[int, _number("Questions answered at a time.")] = 64,
    beams: Annotated[int, _number("Beams of every run, the unpatched one too.")] = 1,
    workers: Annotated[int | None, _number("Processes, at most one a model (default: by the models' size).")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Score methods: accuracy, FLOPs, latency.

    Writes one JSON a run, and ends with a table, one HTML page, a Pareto picture (PNG) and a CSV file. Without options
    it is the main job: both testbed models, two controls and two methods. Finished runs are kept, interrupted ones go
    on.
    """
    keeps = parse_keeps(keep)
    shares = parse_shares(flops) if flops is not None else []
    if shares and keep != KEEPS:
        raise ValueError("give --keep or --flops, not both: with --flops keep is solved")
    from vlmfast.eval import report
    from vlmfast.eval.models import with_adapter
    from vlmfast.eval.runner import evaluate as score
    from vlmfast.eval.sharing import of_environment

    if adapter is not None and len(model) != 1:
        raise ValueError("--adapter goes with one --model, the one that it was trained on")
    names = [with_adapter(name, adapter) for name in model]
    settings: dict[str, Any] = {"limit": limit, "seed": seed, "batch": batch, "workers": workers, "dtype": dtype}
    settings |= {"flops": shares, "match": match, "beams": beams}
    if any(name.startswith("lmms:") for name in task or ()):
        from vlmfast.eval.lmms import runner as lmms

        lmms.show(lmms.from_command(names, method, keeps, task or [], out, device=device or best_device(), **settings))
        if of_environment().first:
            report.make(out, tables=False)
        return
    try:
        score(names, method, keeps, task or None, out, device=device or best_device(), **settings)
    except KeyboardInterrupt:
        typer.echo(f"vlmfast: interrupted; what is done is in {out}, the same command goes on from there", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if of_environment().first:
        report.make(out)


@app.command(
    epilog="""\b
examples:
  vlmfast heads --model testbed:llava --method zerotuning:gamma=2 --task existence --limit 20 --out heads.json
  vlmfast heads --model testbed:llava --method act:layers=1: --margin 0.01 --top 0.4 --out act-heads.json
  vlmfast eval --model testbed:llava --method zerotuning:gamma=2,heads=heads.json --task existence
""",
)
def heads(
    model: Model,
    method: Annotated[str, typer.Option(metavar="SPEC", help="One method that edits heads; its layers are searched.")],
    task: Tasks = None,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="NAME.json of the heads; every score goes to NAME.scores.json.")
    ] = Path("heads.json"),
    limit: Annotated[int | None, _number("Images per task (default: what each task takes).")] = None,
    margin: Annotated[
        float, typer.Option(metavar="X", help="A head helps that scores this much more than the unpatched model.")
    ] = 0.0,
    top: Annotated[
        str | None, typer.Option(metavar="N", help="Take the best of them alone: a share (0.4) or a number (8).")
    ] = None,
    seed: Annotated[int, _number("Draws the images and the intervals.", 0)] = 0,
    batch: Annotated[int, _number("Questions answered at a time.")] = 64,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Choose the heads that a method edits.

    Edits each head alone and asks questions about pictures that no evaluation uses; writes the heads that help, for
    the setting heads=FILE. An interrupted search goes on; --margin and --top choose again from the same scores.
    """
    best = parse_keeps(top) if top is not None else [None]
    if len(best) != 1:
        raise ValueError(f"--top {top!r}: one share such as 0.4, or one number of heads such as 8")
    from vlmfast.eval import heads as search

    settings: dict[str, Any] = {"limit": limit, "margin": margin, "top": best[0], "seed": seed, "batch": batch}
    settings |= {"device": device or best_device(), "dtype": dtype}
    try:
        found = search.profile(model, method, task or None, out, **settings)
    except KeyboardInterrupt:
        typer.echo(f"vlmfast: interrupted; the same command goes on from {out.with_suffix('.scores.json')}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    search.show(found, found.chosen(margin, best[0]))
    typer.echo(f"\nheads  {out}\nscores {out.with_suffix('.scores.json')}")


@app.command(
    "rank-layers",
    epilog="""\b
examples:
  vlmfast rank-layers --model testbed:llava --task existence --limit 20 --visual-update none --out ranking.json
  vlmfast rank-layers --model llava-hf/llava-1.5-7b-hf --image a.jpg --image b.jpg --prompt "What is on the table?"
  vlmfast eval --model testbed:llava --method eemllm:layers=ranking.json,top=0.5,visual_update=none --task existence
""",
)
def rank(
    model: Model,
    task: Tasks = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", metavar="FILE", help="Pictures of your own, no task. Repeatable.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The question about them.")] = None,
    visual_update: Annotated[
        str, typer.Option(metavar="HOW", help="self, ffn or none: what visual tokens go through in a layer.")
    ] = "self",
    layers: Annotated[str, typer.Option(metavar="LIST", help="Which are tried, such as 2: or 1/-14:.")] = "all",
    greedy: Annotated[bool, typer.Option("--greedy", help="Add layers one by one, in some L^2 / 2 trials.")] = False,
    count: Annotated[int | None, _number("With --greedy: how many are added so (default: all).")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="NAME.json, for eemllm:layers=NAME.json,top=N.")] = Path(
        "ranking.json"
    ),
    limit: Annotated[int | None, _number("Images per task (default: what each task takes).")] = None,
    batch: Annotated[int, _number("Questions at a time.")] = 16,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Rank layers by how little they need visual attention.

    Lets visual tokens skip attention to each other (eemllm) in one layer after the other, and measures how far the
    distribution of the answer's first token moves, on pictures that no evaluation uses.
    """
    from vlmfast.eval import ranking

    settings: dict[str, Any] = {"visual_update": visual_update, "layers": layers, "greedy": greedy, "count": count}
    settings |= {"images": image or (), "prompt": prompt, "tasks": task or None, "limit": limit, "batch": batch}
    ranking.run(model, out, device=device or best_device(), dtype=dtype, **settings)


@app.command(
    epilog="""\b
examples:
  vlmfast bench --model testbed:llava --method hiprune:keep=0.33
  vlmfast bench --model testbed:qwen2_5_vl --method none --method hiprune:keep=0.25 --repeats 20
  vlmfast bench --model llava-0.5b --method hiprune:keep=0.33     (random weights; also: qwen2.5-vl, small)
""",
)
def bench(
    model: Model,
    method: Methods,
    repeats: Repeats = 10,
    threads: Annotated[int, _number("CPU threads; with 1, process time is taken.")] = 1,
    device: Device = None,
    dtype: Dtype = "float32",
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers as JSON, too.")] = None,
) -> None:
    """Measure speed and memory against the unpatched model.

    Everything in one process and in turns, so that the ratios hold on a busy machine, too. Methods that decide on
    tokens have a table of their own.
    """
    from vlmfast.eval import bench as benchmark
    from vlmfast.eval import bench_decoding as decoding

    settings: dict[str, Any] = {"repeats": repeats, "threads": threads, "dtype": dtype}
    settings["device"] = device or best_device()
    decode = [spec for spec in method if decoding.decodes(spec)]
    others = [spec for spec in method if spec not in decode]
    whole = benchmark.bench(model, others, out=out, **settings) if others else []
    decoded = decoding.bench_decoding(model, decode, **settings) if decode else []
    if whole:
        benchmark.print_table(whole)
    if decoded:
        decoding.print_decoding(decoded)
    if decoded and out is not None:
        benchmark.write_rows(out, [*whole, *decoded], settings["device"])


@app.command(
    epilog="""\b
examples:
  vlmfast flops --model llava-1.5-7b --method hiprune:keep=192 --method fastv --tokens 100 --gpu a100
  vlmfast flops --model qwen2.5-vl-7b --image-size 1080x1920 --method random --keep 0.33,0.11 --json costs.json
  vlmfast flops --model path/to/config.json --method "hiprune:keep=0.33+vcd"
""",
)
def flops(
    model: Annotated[
        str,
        typer.Option(
            metavar="ID",
            help="Hugging Face id, folder, config.json, testbed:llava, or bundled: llava-1.5-7b, llava-1.5-13b, "
            "llava-next-7b, llava-onevision-7b, qwen2.5-vl-3b, qwen2.5-vl-7b, qwen3-vl-8b.",
        ),
    ],
    method: Methods = [],  # noqa: B006  typer copies it
    keep: Annotated[
        str | None, typer.Option(metavar="LIST", help="For specs that name no keep (default: each method's own).")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Of the image, in pixels (default: a usual one).")
    ] = None,
    max_pixels: Annotated[
        int | None, _number("Pixels that a processor of Qwen's kind leaves (default: the hub's).")
    ] = None,
    images: Annotated[int, _number("Images in the prompt.")] = 1,
    text: Annotated[int, _number("Text tokens of the prompt.")] = 60,
    tokens: Annotated[int, _number("Tokens of the answer.")] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Estimate times by the roofline: a100, h100, h200, l4, l40s, rtx4090."),
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers as JSON, too.")
    ] = None,
) -> None:
    """Count what a prompt costs, from a config alone.

    Tower, projector, selection, prefill, decode and cache, under methods; no weights are read.
    """
    from vlmfast.eval import flops as counting

    counting.run(
        model,
        method,
        keeps=parse_keeps(keep) if keep is not None else [],
        size=parse_size(image_size) if image_size is not None else None,
        most=max_pixels,
        images=images,
        text=text,
        generated=tokens,
        gpu=gpu,
        out=json_,
    )


@app.command(
    epilog="""\b
examples:
  vlmfast report results
  vlmfast report results-a results-b --out both
""",
)
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders that vlmfast eval wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where report.html, pareto.png, runs.csv go (default: the first DIR)."),
    ] = None,
) -> None:
    """Print the table, write page, picture and CSV again."""
    from vlmfast.eval.report import make

    make(folders, out)


def parse_keeps(text: str) -> list[float | int]:
    """``1.0,0.5,64`` -> [1.0, 0.5, 64]: shares have a point, numbers of tokens have none."""
    keeps: list[float | int] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        try:
            keeps.append(int(part))
        except ValueError:
            try:
                keeps.append(float(part))
            except ValueError:
                raise ValueError(
                    f"--keep {part!r} is no number: give shares such as 0.5 or numbers of tokens such as 64"
                ) from None
    return keeps


def parse_shares(text: str) -> list[float]:
    """``0.8,0.6`` -> [0.8, 0.6]: shares of the unpatched FLOPs in (0, 1]."""
    shares = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        try:
            share = float(part)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise ValueError(f"--flops {part!r} is no share of the unpatched FLOPs: give numbers such as 0.6")
        shares.append(share)
    if not shares:
        raise ValueError("--flops needs a share of the unpatched FLOPs, such as 0.6")
    return shares


def parse_size(text: str) -> tuple[int, int]:
    """``1080x1920`` -> (1080, 1920): height and width in pixels."""
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError(f"--image-size {text!r}: give height x width in pixels, such as 1080x1920")
    return int(height), int(width)


def best_device() -> str:
    """``cuda`` where there is one, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    app(args=arguments, prog_name="vlmfast")


if __name__ == "__main__":
    main()
