"""What the figures share: style, panels, axes over layers, lines with bands, heat maps, dots with whiskers.

Same results, same bytes. Line styles carry what colours would.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from classifier_emergence.results import write_bytes_atomic

FOLDER = Path("paper/figures")
Result = Mapping[str, Any]
Results = Mapping[str, Result]
"""Model -> result of one stage."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "svg.hashsalt": "classifier-emergence",  # ids in the SVG are random without it
    "savefig.dpi": 200,
}
"""Settings of matplotlib for every figure of the paper."""
WIDTH = 6.3
"""Of the paper's text, in inches."""
BAND = 0.15
"""Opacity of a band around a line."""


@dataclass(frozen=True)
class PaperFigure:
    """A function that draws a figure from the results of some stages."""

    draw: Callable[..., Figure]
    stages: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its files."""
        return self.draw.__name__

    def write(self, *results: Results, folder: Path = FOLDER) -> None:
        """Draw in the paper's style and write SVG and PNG atomically, without dates or versions in them."""
        metadata: dict[str, dict[str, Any]] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
        with mpl.rc_context(STYLE):
            drawn = self.draw(*results)
            for ending, entries in metadata.items():
                buffer = io.BytesIO()
                drawn.savefig(buffer, format=ending, metadata=entries)
                write_bytes_atomic(folder / f"{self.name}.{ending}", buffer.getvalue())


def figure(*stages: str) -> Callable[[Callable[..., Figure]], PaperFigure]:
    """Make a function of the results of these stages a figure of the paper, under its own name."""
    return lambda draw: PaperFigure(draw, stages)


def panels(rows: int, columns: int, *, height: float, xlabel: str = "", **options: Any) -> tuple[Figure, Any]:
    """A figure of the paper's width with an array (rows, columns) of panels, and what runs along its bottom."""
    drawn = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = drawn.subplots(rows, columns, squeeze=False, **options)
    for axis in grid[-1]:
        axis.set_xlabel(xlabel)
    return drawn, grid


def by_model(
    results: Results, rows: Mapping[str, str], *, height: float, xlabel: str = "layer", **options: Any
) -> tuple[Figure, list[tuple[Axes, str, Result]]]:
    """A figure with the models across and ``rows`` (key -> label of the axis) down.

    Returns:
        The figure; each panel with the key of its row and the result of its model.
    """
    drawn, grid = panels(len(rows), len(results), height=height, xlabel=xlabel, **options)
    for axis, model in zip(grid[0], results, strict=True):
        axis.set_title(model)
    found = []
    for axes, (key, label) in zip(grid, rows.items(), strict=True):
        axes[0].set_ylabel(label)
        found += [(axis, key, result) for axis, result in zip(axes, results.values(), strict=True)]
    for axis, _, result in found if xlabel == "layer" else ():
        layer_axis(axis, result["layers"])
    return drawn, found


def layer_axis(axis: Axes, labels: Sequence[str], *, margin: float = 0.2) -> None:
    """Name some rows of a residual stream along an axis."""
    ticks = [0, *range(1, len(labels), max(1, round(len(labels) / 5)))]
    if len(ticks) > 2 and ticks[1] - ticks[0] < ticks[2] - ticks[1]:
        ticks.pop(1)  # emb and L0 would overlap
    axis.set_xticks(ticks, [labels[i] for i in ticks])
    axis.set_xlim(-margin, len(labels) - 1 + margin)


def alignment_axis(axis: Axes, floor: float) -> None:
    """Make the vertical axis a logarithmic one of alignments from ``floor`` on."""
    axis.set(yscale="log", ylim=(floor, 2))


def line(axis: Axes, y: Any, interval: Any = None, *, x: Any = None, alpha: float = BAND, **options: Any) -> None:
    """A line over rows of a residual stream, or over ``x``, with a band of that opacity between ends (n, 2).

    On a logarithmic axis, what lies below its lower end is drawn on it. ``options`` are those of ``Axes.plot``.
    """
    x = np.arange(len(y)) if x is None else x
    axis.plot(x, _raised(axis, y), **options)
    if interval is not None:
        band(axis, *np.transpose(interval), x=x, color=options["color"], alpha=alpha)


def band(axis: Axes, low: Any, high: Any, *, x: Any = None, **options: Any) -> None:
    """What lies between two such lines."""
    axis.fill_between(np.arange(len(low)) if x is None else x, _raised(axis, low), _raised(axis, high), lw=0, **options)


def _raised(axis: Axes, y: Any) -> Any:
    return np.clip(y, axis.get_ylim()[0], None) if axis.get_yscale() == "log" else np.asarray(y)


def seeds_line(axis: Axes, curves: Any, intervals: Any = None, **options: Any) -> None:
    """Mean over seeds (the first axis), and a band from the least to the largest, or over all of their intervals."""
    values = np.array(curves)
    span = spanning(np.stack([values, values], axis=-1)) if len(values) > 1 else None
    line(axis, values.mean(0), span if intervals is None else spanning(intervals), **options)


def spanning(intervals: Any) -> Any:
    """Intervals (n, 2) from the lowest to the highest end of any seed (the first axis)."""
    return np.stack([np.min(intervals, axis=0)[:, 0], np.max(intervals, axis=0)[:, 1]], axis=-1)


def heat_map(axis: Axes, values: Any, *, vmin: float = 0, vmax: float = 1, **options: Any) -> AxesImage:
    """Values as colours, one cell each."""
    return axis.imshow(values, aspect="auto", cmap="cividis", vmin=vmin, vmax=vmax, interpolation="nearest", **options)


def dots(axis: Axes, items: Sequence[Result], y: Any, *, marker: str, face: str, label: str) -> None:
    """Shares with whiskers, one in a row; of one run (``accuracy``) or over seeds (``value``)."""
    values = np.array([item["value"] if "value" in item else item["accuracy"] for item in items])
    low, high = np.array([item["interval"] for item in items]).T
    bars = np.clip([values - low, high - values], 0, None)
    axis.errorbar(
        values, y, xerr=bars, fmt=marker, ms=3, mfc=face, mec="0.0", ecolor="0.4", elinewidth=0.7, label=label
    )
    axis.set(xlim=(-0.03, 1.03), xticks=[0, 0.5, 1], xticklabels=["0", "½", "1"])


def legend(drawn: Figure, *axes: Axes, ncols: int = 3) -> Figure:
    """The figure with one legend above it, of what some panels show (else the first), each name once."""
    shown = [axis.get_legend_handles_labels() for axis in axes or drawn.axes[:1]]
    entries = {name: handle for handles, names in shown for handle, name in zip(handles, names, strict=True)}
    drawn.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=ncols)
    return drawn
