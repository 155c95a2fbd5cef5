"""The Pareto picture: accuracy against prefill FLOPs and against time to first token, one line a method."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from vlmfast.eval.report.rows import CONTROLS, UNPATCHED, Section


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
_CONTROLS = {"random": Style("#6b6b6b", "#b0b0b0", "x", ":"), "grid": Style("#8a8a8a", "#8c8c8c", "+", "--")}
_UNPATCHED = Style("#111111", "#f5f5f5", "*", "")
_GROUND = {False: ("#ffffff", "#222222", "#dddddd"), True: ("#16181c", "#e8e8e8", "#3a3d43")}


def styles(sections: Sequence[Section]) -> dict[str, Style]:
    """A style for every method of the sections, the same in picture and page."""
    labels = list(dict.fromkeys(label for section in sections for label in section.labels))
    methods = sorted(label for label in labels if label not in CONTROLS)
    found = dict(zip(methods, islice(cycle(_METHODS), len(methods))))
    return {UNPATCHED: _UNPATCHED} | {
        label: _CONTROLS[label] if label in CONTROLS else found[label] for label in labels
    }


def draw(sections: Sequence[Section], *, dark: bool = False) -> bytes:
    """Draw the picture and return it as PNG: a row of two panels (FLOPs, TTFT) for every section."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ground, ink, grid = _GROUND[dark]
    figure = Figure(figsize=(11, 0.9 + 4.1 * len(sections)), dpi=110, facecolor=ground, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(sections), 2, squeeze=False, sharey="row")
    look = styles(sections)
    for (left, right), section in zip(panels, sections):
        _panel(left, section, look, "flops", dark)
        _panel(right, section, look, "ttft", dark)
        left.set_ylabel("mean accuracy over the tasks, % (95 % interval)", color=ink)
        left.set_title(section.title, loc="left", color=ink, fontweight="bold")
        for panel in (left, right):
            panel.set_facecolor(ground)
            panel.grid(color=grid, linewidth=0.7)
            panel.set_axisbelow(True)
            panel.tick_params(colors=ink, labelleft=True)
            for side, spine in panel.spines.items():
                spine.set_visible(side in ("left", "bottom"))
                spine.set_color(ink)
            panel.xaxis.label.set_color(ink)
    handles = {}
    for panel in panels.flat:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels())))
    order = [label for label in look if label in handles]
    figure.legend(
        [handles[label] for label in order],
        order,
        loc="outside upper center",
        ncols=min(6, len(order)),
        frameon=False,
        labelcolor=ink,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=ground, metadata={"Software": "vlmfast"})
    return buffer.getvalue()


def _panel(axes, section: Section, look: dict[str, Style], measure: str, dark: bool) -> None:  # type: ignore[no-untyped-def]
    """One panel: accuracy (error bars) against FLOPs or TTFT."""
    for label in (*section.labels, UNPATCHED):
        style = look[label]
        points = [(cost, row.accuracy) for row in section.line(label) if (cost := _cost(row, measure)) is not None]
        if not points:
            continue
        points.sort(key=lambda point: point[0][0])
        values = [100 * accuracy.value for _, accuracy in points]
        star = label == UNPATCHED
        axes.errorbar(
            [cost[0] for cost, _ in points],
            values,
            yerr=_bars([(100 * a.value, 100 * a.low, 100 * a.high) for _, a in points]),
            xerr=_bars([cost for cost, _ in points]) if measure == "ttft" else None,
            label=label,
            color=style.dark if dark else style.light,
            marker=style.marker,
            linestyle=style.dashes or "none",
            markersize=15 if star else 6,
            linewidth=1.8,
            elinewidth=1,
            capsize=2.5,
            zorder=4 if star else 2 if label in CONTROLS else 3,
        )
    if measure == "flops":
        axes.set_xlabel("prefill cost of a prompt, GFLOPs (vision tower and selection included)")
    else:
        axes.set_xlabel("time to first token, ms (median; bars: quartiles)")
    if not axes.has_data():
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color=_GROUND[dark][1])


def _cost(row, measure: str) -> tuple[float, float, float] | None:  # type: ignore[no-untyped-def]
    """Value, low and high of what the x axis shows."""
    if measure == "flops":
        return None if row.flops is None else (row.flops / 1e9,) * 3
    return None if row.ttft is None else tuple(row.ttft)


def _bars(points: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """Distances below and above each value, never negative."""
    return [[max(0.0, v - low) for v, low, _ in points], [max(0.0, high - v) for v, _, high in points]]
