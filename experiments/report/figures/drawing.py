"""What the figures share: style, panels, axes over layers, bands, heat maps, dots with whiskers.

Same results, same bytes. Line styles carry what colours would.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from classifier_emergence.results import write_bytes_atomic

FOLDER = Path("paper/figures")
Results = Mapping[str, Mapping[str, Any]]
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


def write(draw: Callable[..., Figure], *results: Results, folder: Path = FOLDER) -> None:
    """Draw in the paper's style and write the figure under the name of the function."""
    with mpl.rc_context(STYLE):
        save(draw(*results), folder / draw.__name__)


def save(figure: Figure, stem: Path) -> None:
    """Write ``stem.svg`` and ``stem.png`` atomically, without dates or versions in them."""
    metadata: dict[str, dict[str, Any]] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
    for ending, entries in metadata.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending, metadata=entries)
        write_bytes_atomic(stem.parent / f"{stem.name}.{ending}", buffer.getvalue())


def panels(rows: int, columns: int, *, height: float, **options: Any) -> tuple[Figure, Any]:
    """A figure of the paper's width with a grid of panels, as an array (rows, columns)."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def name_columns(grid: Any, titles: Iterable[str], xlabel: str = "layer") -> None:
    """Titles above the columns of a grid, and what runs along the bottom."""
    for axis, title in zip(grid[0], titles, strict=True):
        axis.set_title(title)
    for axis in grid[-1]:
        axis.set_xlabel(xlabel)


def layer_axis(axis: Axes, labels: Sequence[str], *, margin: float = 0.2) -> None:
    """Name some rows of a residual stream along an axis."""
    ticks = [0, *range(1, len(labels), max(1, round(len(labels) / 5)))]
    if len(ticks) > 2 and ticks[1] - ticks[0] < ticks[2] - ticks[1]:
        ticks.pop(1)  # emb and L0 would overlap
    axis.set_xticks(ticks, [labels[i] for i in ticks])
    axis.set_xlim(-margin, len(labels) - 1 + margin)


def alignment_axis(axis: Axes, floor: float) -> None:
    """A logarithmic axis of alignments; what lies below is to be drawn on it (see ``line``)."""
    axis.set_yscale("log")
    axis.set_ylim(floor, 2)


def line(
    axis: Axes, y: Any, interval: Any = None, *, x: Any = None, floor: float | None = None, alpha: float = BAND,
    **options: Any,
) -> None:  # fmt: skip
    """A line over rows of a residual stream, or over ``x``, with a band.

    Args:
        axis: Where to draw.
        y: Values.
        interval: Ends of the band (n, 2), if there is one.
        x: Positions.
        floor: Values below it are drawn on it.
        alpha: Opacity of the band.
        options: Of ``Axes.plot``: ``ls``, ``color``, ``label``.
    """
    x = np.arange(len(y)) if x is None else x
    axis.plot(x, np.clip(y, floor, None), **options)
    if interval is not None:
        low, high = np.clip(np.transpose(interval), floor, None)
        axis.fill_between(x, low, high, color=options["color"], alpha=alpha, lw=0)


def seeds_line(axis: Axes, curves: Any, **options: Any) -> None:
    """Mean over seeds (the first axis), and a band from the least to the largest."""
    values = np.array(curves)
    band = np.stack([values.min(0), values.max(0)], axis=-1) if len(values) > 1 else None
    line(axis, values.mean(0), band, **options)


def spanning(intervals: Any) -> Any:
    """Intervals (n, 2) from the lowest to the highest end of any seed (the first axis)."""
    ends = np.array(intervals)
    return np.stack([ends[..., 0].min(0), ends[..., 1].max(0)], axis=-1)


def heat_map(axis: Axes, values: Any, *, vmin: float = 0, vmax: float = 1, **options: Any) -> AxesImage:
    """Values as colours, one cell each."""
    return axis.imshow(values, aspect="auto", cmap="cividis", vmin=vmin, vmax=vmax, interpolation="nearest", **options)


def dots(axis: Axes, items: Sequence[Mapping[str, Any]], y: Any, *, marker: str, face: str, label: str) -> None:
    """Shares with whiskers, one in a row; of one run (``accuracy``) or over seeds (``value``)."""
    values = np.array([item["value"] if "value" in item else item["accuracy"] for item in items])
    low, high = np.array([item["interval"] for item in items]).T
    bars = np.clip([values - low, high - values], 0, None)
    axis.errorbar(
        values, y, xerr=bars, fmt=marker, ms=3, mfc=face, mec="0.0", ecolor="0.4", elinewidth=0.7, label=label
    )
    axis.set_xlim(-0.03, 1.03)
    axis.set_xticks([0, 0.5, 1], ["0", "½", "1"])


def legend(figure: Figure, *axes: Axes, ncols: int = 3) -> None:
    """One legend above the figure, of what some panels show, each name once."""
    entries = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=ncols)
