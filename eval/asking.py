"""One question about one picture, without and with some methods: what `vlmfast run` and `vlmfast demo` share.

`prepare` reads question and picture once, `answer` generates and times under one spec, `drawn` shows what it kept.
`run` does all that for the command line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

import vlmfast
from vlmfast import Report
from vlmfast.adapters import from_spec, to_spec
from vlmfast.cost import CONVENTION
from vlmfast.encoding import encode_images
from vlmfast.eval.latency import Latency, image_inputs, measure, use_threads
from vlmfast.eval.models import load_model
from vlmfast.eval.overlay import overlay, visible
from vlmfast.eval.prompts import Prompts
from vlmfast.eval.report import text
from vlmfast.eval.sweep import beams_of
from vlmfast.patching import entrance, unwrap
from vlmfast.solving import cost_of
from vlmfast.towers import Picture, size_of

UNPATCHED = "none"
TIMED_TOKENS = 8  # tokens per timed generation
SMALL = 500_000_000  # parameters up to which one CPU thread is fast enough: its process time minds no other program
HEADS = ("visual\ntokens", "mean\na layer", "prefill\nFLOPs %", "TTFT\nms", "prefill\nms", "decode\nms/token")


@dataclass(frozen=True)
class Question:
    """A question about a picture as one model reads it.

    picture: what of it the model sees. inputs: the processor's, on the model's device. size: the picture's, for the
    cost model; text: tokens beside it. unknown: words that the tokenizer has no token for.
    """

    picture: Image.Image
    inputs: dict[str, Tensor]
    size: Picture
    text: int
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What one spec did to the question.

    kept, per_layer: visual tokens in the end, and mean over the layers. share: of the unpatched prefill FLOPs.
    """

    spec: str
    answer: str
    report: Report
    latency: Latency
    kept: int
    per_layer: float
    share: float


def open_image(path: Path) -> Image.Image:
    """The picture as RGB, turned as its camera says. FileNotFoundError or ValueError for what is no picture."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no image file {path}")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(f"{path} cannot be read as an image: {reason}") from error


def check_target(path: Path) -> None:
    """Raise before any work where the overlay cannot be written."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"the overlay is a PNG file, but --out {path} does not end in .png")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")


def specs_of(methods: Sequence[str]) -> list[str]:
    """Canonical specs, each once, without the unpatched model; ValueError for a wrong one or if none is left."""
    specs = [spec for spec in dict.fromkeys(to_spec(from_spec(method)) for method in methods) if spec != UNPATCHED]
    if not specs:
        raise ValueError(
            "the unpatched model is measured anyway: name a method to compare with it (vlmfast list methods)"
        )
    return specs


def run(
    model: str,
    image: Path,
    prompt: str,
    methods: Sequence[str],
    out: Path,
    *,
    max_new_tokens: int = 64,
    repeats: int = 3,
    device: str = "cpu",
    dtype: str = "float32",
    console: Console | None = None,
) -> list[Outcome]:
    """Answer a question unpatched and under every spec, print answers, tokens, FLOPs and times, write the overlay."""
    console = console or Console()
    picture, specs = open_image(image), specs_of(methods)
    check_target(out)
    network, processor = load_asked(model, device=device, dtype=dtype)
    question = prepare(network, processor, picture, prompt)
    outcomes = []
    with console.status("answering ...") as status:
        for spec in [UNPATCHED, *specs]:
            status.update(f"answering with {spec} ...")
            outcomes.append(answer(network, processor, question, spec, max_new_tokens, repeats))
    _print(question, outcomes, console)
    pruned = [outcome for outcome in outcomes if outcome.report.images]
    if not pruned:
        console.print("\nno token was dropped: no picture of kept tokens is written", highlight=False)
        return outcomes
    save_overlay(question, pruned, out)
    console.print(f"\nkept tokens  {out}", highlight=False, soft_wrap=True)
    return outcomes


def load_asked(name: str, *, device: str, dtype: str) -> tuple[Any, Any]:
    """A model that can be asked, and its processor; errors as in `load_model`, ValueError without a chat template."""
    model, processor = load_model(name, device=device, dtype=dtype)
    if processor.chat_template is None:
        raise ValueError(f"the processor of {name} has no chat template, so the prompt cannot be phrased")
    return model, processor


def prepare(model: Any, processor: Any, picture: Image.Image, prompt: str) -> Question:
    """Read a question and its picture, RGB. ValueError for an empty question."""
    if not prompt.strip():
        raise ValueError("the question is empty")
    inputs = Prompts(processor, entrance(model), model.dtype).full(prompt, np.asarray(picture))
    visual = encode_images(model, [], **image_inputs(unwrap(model), inputs))[0]
    if len(visual.views) == 1:  # a thumbnail and crops show all of the picture
        picture = visible(picture, processor.image_processor)
    text_tokens = inputs["input_ids"].shape[1] - visual.span
    size = size_of(visual.patches, visual.views, visual.span)
    return Question(picture, inputs, size, text_tokens, unknown_words(processor.tokenizer, prompt))


def unknown_words(tokenizer: Any, prompt: str) -> tuple[str, ...]:
    """The words of a prompt that the tokenizer replaces by its sign for what it does not know, each once."""
    sign = tokenizer.unk_token_id
    return tuple(
        word
        for word in dict.fromkeys(prompt.split())
        if sign is not None and sign in tokenizer(word, add_special_tokens=False)["input_ids"]
    )


def answer(model: Any, processor: Any, question: Question, spec: str, max_new_tokens: int, repeats: int) -> Outcome:
    """Generate under a spec, greedily or with the beams it needs, then time the same prompt."""
    inputs, size = question.inputs, question.size
    threads = 1 if model.num_parameters() <= SMALL else torch.get_num_threads()
    with vlmfast.patch(model, spec) as handle, torch.no_grad(), use_threads(threads):
        beams = beams_of(handle.adapters)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=beams)
        report = handle.report()
        latency = measure(
            model,
            inputs,
            new_tokens=min(TIMED_TOKENS, max_new_tokens),
            repeats=repeats,
            threads=threads,
            memory=False,
            beams=beams,
        )
    new = ids[0, inputs["input_ids"].shape[1] :]
    kept, per_layer, share = sum(image.kept for image in report.images), report.per_layer, report.share
    if not report.prompts:  # nothing was dropped, and so nothing of it is told
        kept, per_layer = size.span, (size.span,)
        plain, own = (cost_of(model.config, methods, question.text, [size]) for methods in ((), from_spec(spec)))
        share = own.total_prefill / plain.total_prefill
    return Outcome(
        spec,
        processor.tokenizer.decode(new, skip_special_tokens=True).strip(),
        report,
        latency,
        kept,
        sum(per_layer) / len(per_layer),
        share or 1.0,
    )


def drawn(question: Question, outcome: Outcome) -> Image.Image:
    """The picture with what a spec kept of it, of one size for all specs; as it is where nothing can be dropped."""
    if not outcome.report.images:
        return overlay(question.picture, [0], (1, 1, 1))
    seen = outcome.report.images[0]
    return overlay(question.picture, seen.indices.tolist(), seen.grid, seen.views)


def save_overlay(question: Question, outcomes: Sequence[Outcome], path: Path) -> None:
    """Write one PNG: the kept tokens of every spec, each under its name, three in a line."""
    font = ImageFont.load_default(size=16)
    panels = []
    for outcome in outcomes:
        seen = outcome.report.images[0]
        panels.append((f"{outcome.spec}: {seen.kept} of {seen.n}", drawn(question, outcome)))
    gap, head, columns = 16, 28, min(3, len(panels))
    width = max(max(panel.width, round(font.getlength(title))) for title, panel in panels) + gap
    height = panels[0][1].height + head + gap
    sheet = Image.new("RGB", (width * columns + gap, height * -(-len(panels) // columns)), "white")
    brush = ImageDraw.Draw(sheet)
    for i, (title, panel) in enumerate(panels):
        left, top = gap + width * (i % columns), height * (i // columns)
        brush.text((left, top + 5), title, fill="black", font=font)
        sheet.paste(panel, (left, top + head))
    sheet.save(path, format="PNG")


def figures(outcome: Outcome) -> tuple[str, ...]:
    """What a spec left and what it costs, in the order of `HEADS`."""
    decode = outcome.latency.decode_ms_per_token
    return (
        str(outcome.kept),
        f"{outcome.per_layer:.1f}",
        text.percent(outcome.share),
        text.number(outcome.latency.ttft_ms.median),
        text.number(outcome.latency.prefill_ms.median),
        text.number(None if decode is None else decode.median),
    )


def conventions(outcome: Outcome) -> tuple[str, str]:
    """How the FLOPs of `figures` are counted, and how its times were taken."""
    latency = outcome.latency
    return (
        f"FLOPs: prefill with the vision tower. {CONVENTION}.",
        f"Times: median of {latency.repeats} readings, {latency.clock}, {latency.device}, threads: {latency.threads}. "
        "TTFT includes the vision tower, prefill does not.",
    )


def notes(outcomes: Sequence[Outcome]) -> list[str]:
    """What a user should know of what the specs did, each thing once."""
    return list(dict.fromkeys(note for outcome in outcomes for note in outcome.report.notes))


def misread(question: Question) -> str | None:
    """What a user should know of a question with words that the model has never met; None where there are none."""
    if not question.unknown:
        return None
    words = ", ".join(map(repr, question.unknown))
    return f"the tokenizer has no token for {words}: the model reads an unknown word there"


def called(spec: str) -> str:
    """What a spec is called in front of a user."""
    return "unpatched" if spec == UNPATCHED else spec


def _print(question: Question, outcomes: Sequence[Outcome], console: Console) -> None:
    """The answers, then what they cost."""
    answers = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    answers.add_column(no_wrap=True)
    for outcome in outcomes:
        answers.add_row(Text(called(outcome.spec), style="bold"), Text(outcome.answer))
    console.print(answers)
    costs = Table(box=box.SIMPLE_HEAD, show_edge=False)
    costs.add_column("")
    for head in HEADS:
        costs.add_column(head, justify="right")
    for outcome in outcomes:
        costs.add_row(Text(called(outcome.spec)), *figures(outcome))
    console.print()
    console.print(costs)
    console.print("\n".join(conventions(outcomes[0])), style="dim", highlight=False)
    for note in filter(None, (misread(question), *notes(outcomes))):
        console.print(f"Note: {note}", highlight=False)
