"""``vlmfast run``: one question about one picture, without and with some methods."""

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

import vlmfast
from vlmfast import Report
from vlmfast.adapters import from_spec, to_spec
from vlmfast.cost import CONVENTION
from vlmfast.encoding import encode_images
from vlmfast.eval.latency import Latency, image_inputs, measure
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
    except (UnidentifiedImageError, OSError) as error:
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
    network, processor = load_model(model, device=device, dtype=dtype)
    if processor.chat_template is None:
        raise ValueError(f"the processor of {model} has no chat template, so vlmfast run cannot phrase the prompt")
    inputs = Prompts(processor, entrance(network), network.dtype).full(prompt, np.asarray(picture))
    size = picture_size(network, inputs)
    text_tokens = inputs["input_ids"].shape[1] - size.span
    outcomes = []
    with console.status("answering ...") as status:
        for spec in [UNPATCHED, *specs]:
            status.update(f"answering with {spec} ...")
            outcomes.append(answer(network, processor, inputs, spec, max_new_tokens, repeats, size, text_tokens))
    _print(outcomes, console)
    pruned = [outcome for outcome in outcomes if outcome.report.images]
    if not pruned:
        console.print("\nno token was dropped: no picture of kept tokens is written", highlight=False)
        return outcomes
    if len(pruned[0].report.images[0].views) == 1:  # a thumbnail and crops show all of the picture
        picture = visible(picture, processor.image_processor)
    save_overlay(picture, pruned, out)
    console.print(f"\nkept tokens  {out}", highlight=False, soft_wrap=True)
    return outcomes


def picture_size(model: Any, inputs: dict[str, torch.Tensor]) -> Picture:
    """The one picture of a prompt by its sizes."""
    visual = encode_images(model, [], **image_inputs(unwrap(model), inputs))[0]
    return size_of(visual.patches, visual.views, visual.span)


def answer(
    model: Any,
    processor: Any,
    inputs: dict[str, torch.Tensor],
    spec: str,
    max_new_tokens: int,
    repeats: int,
    size: Picture,
    text_tokens: int,
) -> Outcome:
    """Generate under a spec, greedily or with the beams it needs, then time the same prompt. size: of its picture."""
    with vlmfast.patch(model, spec) as handle, torch.no_grad():
        beams = beams_of(handle.adapters)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=beams)
        report = handle.report()
        latency = measure(
            model,
            inputs,
            new_tokens=min(TIMED_TOKENS, max_new_tokens),
            repeats=repeats,
            threads=1 if model.num_parameters() <= SMALL else torch.get_num_threads(),
            memory=False,
            beams=beams,
        )
    new = ids[0, inputs["input_ids"].shape[1] :]
    kept, per_layer, share = sum(image.kept for image in report.images), report.per_layer, report.share
    if not report.prompts:  # nothing was dropped, and so nothing of it is told
        kept, per_layer = size.span, (size.span,)
        plain, own = (cost_of(model.config, methods, text_tokens, [size]) for methods in ((), from_spec(spec)))
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


def save_overlay(picture: Image.Image, outcomes: Sequence[Outcome], path: Path) -> None:
    """Write one PNG: the kept tokens of every spec, each under its name, three in a line."""
    font = ImageFont.load_default(size=16)
    panels = []
    for outcome in outcomes:
        seen = outcome.report.images[0]
        drawn = overlay(picture, seen.indices.tolist(), seen.grid, seen.views)
        panels.append((f"{outcome.spec}: {seen.kept} of {seen.n}", drawn))
    gap, head, columns = 16, 28, min(3, len(panels))
    width = max(max(drawn.width, round(font.getlength(title))) for title, drawn in panels) + gap
    height = panels[0][1].height + head + gap
    sheet = Image.new("RGB", (width * columns + gap, height * -(-len(panels) // columns)), "white")
    brush = ImageDraw.Draw(sheet)
    for i, (title, drawn) in enumerate(panels):
        left, top = gap + width * (i % columns), height * (i // columns)
        brush.text((left, top + 5), title, fill="black", font=font)
        sheet.paste(drawn, (left, top + head))
    sheet.save(path, format="PNG")


def _print(outcomes: Sequence[Outcome], console: Console) -> None:
    """The answers, then what they cost."""
    answers = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    answers.add_column(no_wrap=True)
    for outcome in outcomes:
        answers.add_row(Text(_name(outcome.spec), style="bold"), Text(outcome.answer))
    console.print(answers)
    costs = Table(box=box.SIMPLE_HEAD, show_edge=False)
    costs.add_column("")
    for head in ("visual\ntokens", "mean\na layer", "prefill\nFLOPs %", "TTFT\nms", "prefill\nms", "decode\nms/token"):
        costs.add_column(head, justify="right")
    for outcome in outcomes:
        decode = outcome.latency.decode_ms_per_token
        costs.add_row(
            Text(_name(outcome.spec)),
            str(outcome.kept),
            f"{outcome.per_layer:.1f}",
            text.percent(outcome.share),
            text.number(outcome.latency.ttft_ms.median),
            text.number(outcome.latency.prefill_ms.median),
            text.number(None if decode is None else decode.median),
        )
    console.print()
    console.print(costs)
    first = outcomes[0].latency
    console.print(
        f"FLOPs: prefill with the vision tower. {CONVENTION}.\n"
        f"Times: median of {first.repeats} readings, {first.clock}, {first.device}, threads: {first.threads}. "
        "TTFT includes the vision tower, prefill does not.",
        style="dim",
        highlight=False,
    )
    for note in dict.fromkeys(note for outcome in outcomes for note in outcome.report.notes):
        console.print(f"Note: {note}", highlight=False)


def _name(spec: str) -> str:
    return "unpatched" if spec == UNPATCHED else spec
