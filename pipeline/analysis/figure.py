"""How every figure of the report looks, and how it becomes part of the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

from data_prep.files import write_atomically
from pipeline.analysis.contents import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which remain distinct in every form of colour blindness. The page gives
# each name a value for light and one for dark (`report.html`); these are the light ones.
INK, MUTED, GRID = "#1f2430", "#626b7a", "#d9dde4"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#b8578f", "#b07a00", "#2f9fd6")
_NAMES = {INK: "ink", MUTED: "muted", GRID: "grid"} | {
    color: f"series-{i}" for i, color in enumerate(SERIES, 1)
}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "reprise",
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
}
POINTS = 120
PIXELS_PER_INCH = 96
MARKERS = 30


@dataclass
class Picture:
    """One figure: `svg` is there once it has been drawn; `description` is for those who hear it.

    `width`, in pixels, is that at which its text has the size of the other figures'.
    """

    name: str
    description: str
    svg: Markup = field(default_factory=Markup)
    width: int = 0


@contextmanager
def drawing(picture: Picture, width: float = 4.3, height: float = 2.7) -> Iterator[Axes]:
    """Axes to draw on, in inches; leaving the block turns them into the picture's SVG."""
    with panels(picture, 1, 1, width, height) as axes:
        yield axes[0][0]


@contextmanager
def panels(
    picture: Picture, rows: int, columns: int, width: float, height: float
) -> Iterator[list[list[Axes]]]:
    """Rows of axes that share their scales, as `drawing` one."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat:
            axes.set_facecolor("none")
        yield grid.tolist()
        for axes in grid.flat:
            _mark_single_points(axes)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    picture.svg = _inline(buffer.getvalue(), picture)
    picture.width = round(width * PIXELS_PER_INCH)


def _mark_single_points(axes: Axes) -> None:
    """A run that has only begun has curves of one point, and a line through one is invisible."""
    for line in axes.get_lines():
        if np.isfinite(np.asarray(line.get_ydata(), np.float64)).sum() == 1:
            line.set(marker="o", markersize=2.8)


@contextmanager
def saving(
    path: Path, *, rows: int = 1, columns: int = 1, width: float, height: float
) -> Iterator[tuple[Figure, npt.NDArray[Any]]]:
    """A figure and its panels (rows, columns), in inches, that leaving the block saves as PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        yield figure, figure.subplots(rows, columns, squeeze=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def over_epochs(axes: Axes) -> None:
    """The horizontal axis that all curves of a run share."""
    axes.set_xlabel("epoch")
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", integer=True, nbins=7)


def legend_above(axes: Axes, columns: int = 4) -> None:
    """A legend that can cover no data."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        ncols=columns,
        columnspacing=1.2,
    )


def thin(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """At most `POINTS` points, each the mean of as many neighbours: long runs stay small pages."""
    if len(x) <= POINTS:
        return x, y
    groups = np.array_split(np.arange(len(x)), POINTS)
    return np.array([x[g].mean() for g in groups]), np.array([y[g].mean() for g in groups])


def markers(x: Floats, size: float) -> dict[str, Any]:
    """Plot options that mark points, of many points only some."""
    return {"marker": "o", "markersize": size, "markevery": max(1, math.ceil(len(x) / MARKERS))}


def _inline(svg: str, picture: Picture) -> Markup:
    """The element alone: its colours and fonts the page's, its ids its own, its numbers short."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>|<!--.*?-->|font-family: [^;]+; ", "", svg, flags=re.DOTALL)
    # Groups are never referred to, and their names are the same in every figure.
    svg = re.sub(r'<g id="[^"]+">', "<g>", svg)
    svg = re.sub(r' (d|x|y|transform)="[^"]+"', lambda found: _rounded(found.group()), svg)
    svg = re.sub(r"\s+", " ", svg).replace("> <", "><")
    for color, name in _NAMES.items():
        svg = svg.replace(color, f"var(--{name})")
    for reference in ('id="', 'href="#', "url(#"):
        svg = svg.replace(reference, f"{reference}{picture.name}-")
    label = f'<svg role="img" aria-label="{escape(picture.description)}"'
    return Markup(svg.replace("<svg", label, 1))


def _rounded(attribute: str) -> str:
    return re.sub(r"\d+\.\d+", lambda number: f"{float(number.group()):.2f}", attribute)
