"""``vlmfast sinks``: the attention sinks of one prompt, as a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import vlmfast
from vlmfast.eval.asking import open_image
from vlmfast.eval.models import load_model
from vlmfast.eval.prompts import Prompts
from vlmfast.patching import entrance

# After Okabe and Ito (2008), told apart with every common colour blindness; sinks are the strong ones.
SHARES = {
    "text_sinks": ("text sinks", "#d55e00"),
    "image_sinks": ("image sinks", "#e69f00"),
    "image": ("image", "#0072b2"),
    "text": ("text", "#b8c4cc"),
}
LINES = ("#0072b2", "#d55e00", "#009e73", "#b0588f", "#a87400", "#5b4fa8", "#5f5f5f", "#111111")
MARKERS = "os^vPXD*"


def run(
    model: str,
    image: Path,
    prompt: str,
    out: Path,
    *,
    dims: str | None = None,
    tau: float | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    console: Console | None = None,
) -> vlmfast.Sinks:
    """Find the sinks of a question about a picture, print them and draw them."""
    console = console or Console()
    picture = open_image(image)
    if out.suffix.lower() != ".png":
        raise ValueError(f"the picture of the sinks is a PNG file, but --out {out} does not end in .png")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} to write {out.name} to")
    network, processor = load_model(model, device=device, dtype=dtype)
    if processor.chat_template is None:
        raise ValueError(f"the processor of {model} has no chat template, so vlmfast sinks cannot phrase the prompt")
    inputs = Prompts(processor, entrance(network), network.dtype).full(prompt, np.asarray(picture))
    found = vlmfast.find_sinks(network, inputs, dims=dims, **({} if tau is None else {"tau": tau}))
    draw(found, out)
    console.print(str(found), highlight=False, soft_wrap=True, markup=False)
    console.print(f"\nper layer  {out}", highlight=False, soft_wrap=True, markup=False)
    return found


def draw(found: vlmfast.Sinks, path: Path) -> None:
    """Write the picture as PNG."""
    figure(found).savefig(path, format="png")


def figure(found: vlmfast.Sinks) -> Any:
    """Two panels over the layers: where text behind the picture looks, and how large the sink dimensions are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(8, 6.5), dpi=110, layout="constrained")
    FigureCanvasAgg(drawn)
    bars, lines = drawn.subplots(2, 1, sharex=True)
    layers = [one.layer for one in found.layers]
    base = np.zeros(len(layers))
    for name, (label, colour) in SHARES.items():
        share = np.array([100 * getattr(one, name) for one in found.layers])
        bars.bar(layers, share, bottom=base, label=label, color=colour, width=0.85)
        base = base + share
    bars.set_ylim(0, 100)
    bars.set_ylabel("attention of text\nbehind the picture, %")
    by = f"sinks: phi > {found.tau:g} by dimensions {found.setting}" if found.dims else "no sink dimensions"
    bars.set_title(f"{by}; sink metric of the first token {found.first_metric:.0%}", loc="left", fontsize=10)
    bars.legend(ncols=4, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.01), fontsize=9)
    for place, dim in enumerate(found.dims):
        size = [one.largest[place] for one in found.layers]
        style = {"color": LINES[place % len(LINES)], "marker": MARKERS[place % len(MARKERS)], "markersize": 4}
        lines.plot(layers, size, label=f"|x| of dimension {dim}", **style)
    if found.dims:
        lines.set_yscale("log")
        low, high = (edge(size for one in found.layers for size in one.largest if size > 0) for edge in (min, max))
        lines.set_ylim(10 ** np.floor(np.log10(low)), 10 ** np.ceil(np.log10(high) + 0.01))
        lines.set_ylabel("largest |x| of a token\nas it enters the layer")
        lines.legend(frameon=False, fontsize=9)
    else:
        lines.text(0.5, 0.5, f"no massive dimensions: {found.source}", ha="center", transform=lines.transAxes)
        lines.set_yticks([])
    lines.set_xlabel("decoder layer")
    lines.xaxis.get_major_locator().set_params(integer=True)
    for panel in (bars, lines):
        panel.spines[["top", "right"]].set_visible(False)
    return drawn
