"""The Pareto picture: accuracy against prefill FLOPs and against time to first token, one line a method."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from vlmfast.eval.report.rows import CONTROLS, UNPATCHED, Row, Section


@dataclass(frozen=True)
class Style:
    """How one method is drawn: told apart by colour, marker and dashes alike."""

    light: str
    dark: str
    marker: str
    dashes: str


# Colours after Okabe and Ito (2008), told apart with every common colour blindness; lightened for the dark ground.
_METHODS = (
    Style("#0072b2", "#4fb3f0", "o", "-"),
    Style("#d55e00", "#ff8a3d", "s", "-"),
    Style("#009e73", "#33c79b", "^", "-"),
    Style("#b0588f", "#e39ac6", "v", "-"),
    Style("#a87400", "#f0b840", "P", "-"),
    Style("#5b4fa8", "#a89df2", "X", "-"),
)
_CONTROLS = {"random": Style("#5f5f5f", "#b8b8b8", "D", ":"), "grid": Style("#858585", "#8f8f8f", "s", "--")}
_UNPATCHED = Style("#111111", "#f5f5f5", "*", "")
_GROUND = {False: ("#ffffff", "#222222", "#dddddd"), True: ("#16181c", "#e8e8e8", "#3a3d43")}


def styles(sections: Sequence[Section]) -> dict[str, Style]:
    """A style for every method of the sections, the same in picture and page."""
    labels = list(dict.fromkeys(label for section in sections for label in section.labels))
    methods = sorted(label for label in labels if not control(label))
    found = dict(zip(methods, islice(cycle(_METHODS), len(methods))))
    return {UNPATCHED: _UNPATCHED} | {label: _CONTROLS.get(label.split()[0]) or found[label] for label in labels}


def control(label: str) -> bool:
    """Whether a method is there for comparison only."""
    return label.split()[0] in CONTROLS


def draw(sections: Sequence[Section], *, dark: bool = False, narrow: bool = False) -> bytes:
    """Draw the picture and return it as PNG: two panels (FLOPs, TTFT) a section, below each other if `narrow`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ground, ink, grid = _GROUND[dark]
    lines, columns = (2 * len(sections), 1) if narrow else (len(sections), 2)
    size = (5, 0.9 + 3.4 * lines) if narrow else (11, 0.6 + 4.1 * lines)
    figure = Figure(figsize=size, dpi=110, facecolor=ground, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).reshape(len(sections), 2)
    look = styles(sections)
    for pair, section in zip(panels, sections):
        for panel, measure in zip(pair, ("flops", "ttft")):
            _panel(panel, section, look, measure, dark)
            panel.set_facecolor(ground)
            panel.grid(color=grid, linewidth=0.7)
            panel.set_axisbelow(True)
            panel.tick_params(colors=ink)
            for side, spine in panel.spines.items():
                spine.set_visible(side in ("left", "bottom"))
                spine.set_color(ink)
            panel.xaxis.label.set_color(ink)
            panel.set_ylabel("mean accuracy, % (bars: 95 %)", color=ink)
        pair[1].sharey(pair[0])
        pair[0].set_title(section.title, loc="left", color=ink, fontweight="bold")
    figure.legend(
        handles=[_key(label, style, dark) for label, style in look.items()],
        loc="outside upper center",
        ncols=3 if narrow else 6,
        frameon=False,
        labelcolor=ink,
    )
    return _png(figure, ground)


def _key(label: str, style: Style, dark: bool) -> Any:
    """A method's entry in the legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **_line(label, style, dark))


def _line(label: str, style: Style, dark: bool) -> dict[str, Any]:
    """How matplotlib draws a method's line and markers; those of controls are hollow."""
    return {
        "color": style.dark if dark else style.light,
        "marker": style.marker,
        "linestyle": style.dashes or "none",
        "markersize": 15 if label == UNPATCHED else 6,
        "markerfacecolor": _GROUND[dark][0] if control(label) else None,
        "linewidth": 1.8,
    }


def _png(figure: Any, ground: str) -> bytes:
    """The figure with 256 colours, a third of the size of full colour."""
    from PIL import Image

    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=ground)
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, format="PNG", optimize=True)
    return small.getvalue()


def _panel(axes: Any, section: Section, look: dict[str, Style], measure: str, dark: bool) -> None:
    """One panel: accuracy (error bars) against FLOPs or TTFT."""
    for label in (*section.labels, UNPATCHED):
        style = look[label]
        points = [(cost, row.accuracy) for row in section.line(label) if (cost := _cost(row, measure)) is not None]
        if not points:
            continue
        points.sort(key=lambda point: point[0][0])
        values = [100 * accuracy.value for _, accuracy in points]
        axes.errorbar(
            [cost[0] for cost, _ in points],
            values,
            yerr=_bars([(100 * a.value, 100 * a.low, 100 * a.high) for _, a in points]),
            xerr=_bars([cost for cost, _ in points]) if measure == "ttft" else None,
            label=label,
            **_line(label, style, dark),
            elinewidth=1,
            capsize=2.5,
            zorder=4 if label == UNPATCHED else 2 if control(label) else 3,
        )
    if measure == "flops":
        axes.set_xlabel("prefill of a prompt, GFLOPs (vision tower included)")
    else:
        axes.set_xlabel("time to first token, ms (median; bars: quartiles)")
    if not axes.has_data():
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color=_GROUND[dark][1])


def _cost(row: Row, measure: str) -> tuple[float, float, float] | None:
    """Value, low and high of what the x axis shows."""
    if measure == "flops":
        return None if row.flops is None else (row.flops / 1e9, row.flops / 1e9, row.flops / 1e9)
    return row.ttft


def _bars(points: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """Distances below and above each value, never negative."""
    return [[max(0.0, v - low) for v, low, _ in points], [max(0.0, high - v) for v, _, high in points]]
