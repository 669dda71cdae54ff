"""What the figures share: style, panels, axes over layers, lines with bands, heat maps, dots with whiskers.

Same results, same bytes. A model, and a training, has one colour, line and marker everywhere (``paper/names.yaml``).
The colours are ones that colour-blind readers tell apart, and the lines tell apart what is printed in grey.
An SVG says in its metadata which function drew it from which stages; the paper's index of figures reads that.
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
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from classifier_emergence.results import write_bytes_atomic
from experiments.report.names import NAMES, short_name

FOLDER = Path("paper/figures")
Result = Mapping[str, Any]
Results = Mapping[str, Result]
"""Model -> result of one stage."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 7.2,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.2,
    "axes.titlelocation": "left",
    "xtick.labelsize": 7.2,
    "ytick.labelsize": 7.2,
    "legend.fontsize": 7.2,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "svg.hashsalt": "classifier-emergence",  # ids in the SVG are random without it
    "savefig.dpi": 200,
}
"""Settings of matplotlib for every figure of the paper."""
WIDTH = 6.5
"""Of the paper's text, in inches."""
CHARACTERS = 118
"""Of a legend, side by side."""
ACROSS = 3
"""Models in a row; more of them wrap."""
INK, PALE = "0.15", "0.7"
"""What is no model and no training, and what lies behind the data."""
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

    @property
    def script(self) -> str:
        """File of the function that draws it, from the repository's root."""
        return self.draw.__module__.replace(".", "/") + ".py"

    def write(self, *results: Results, folder: Path = FOLDER) -> None:
        """Draw in the paper's style and write SVG and PNG atomically, without dates or versions in them."""
        metadata: dict[str, dict[str, Any]] = {
            "svg": {"Date": None, "Creator": None, "Identifier": self.script, "Source": " ".join(self.stages)},
            "png": {"Software": None},
        }
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


def look(model: str, models: Sequence[str] = ()) -> dict[str, Any]:
    """Colour, line and marker of a model; those that are not named get theirs by their place among ``models``."""
    named, spare = NAMES["looks"]["models"], NAMES["looks"]["other_models"]
    others = [each for each in models if each not in named]
    color, ls, marker = named[model] if model in named else spare[others.index(model) % len(spare) if others else 0]
    return {"color": color, "ls": ls, "marker": marker}


def training(key: str) -> dict[str, Any]:
    """Colour and line of a training."""
    color, ls, _ = NAMES["looks"]["trainings"][key]
    return {"color": color, "ls": ls}


def lens(key: str) -> dict[str, Any]:
    """Colour and line of a lens."""
    color, ls = NAMES["looks"]["lenses"][key]
    return {"color": color, "ls": ls}


def blocks(
    results: Results, rows: int = 1, columns: int = 1, *, across: int = ACROSS, height: float, **options: Any
) -> tuple[Figure, list[tuple[str, Result, Any]]]:
    """A figure with a block of panels for each model, at most ``across`` of them side by side.

    Args:
        results: Model -> result.
        rows: Of a block.
        columns: Of a block.
        across: Blocks in a row.
        height: Of a row of blocks, in inches.
        **options: Of ``Figure.subplots``; ``width_ratios`` those of one block.

    Returns:
        The figure; model, result and panels (rows, columns) of each block, titled with the model's name in its colour.
    """
    across = min(across, len(results))
    down = -(-len(results) // across)
    if "width_ratios" in options:
        options["width_ratios"] = [*options["width_ratios"]] * across
    drawn, grid = panels(down * rows, across * columns, height=0.35 + height * down, **options)
    places = [(i, j) for i in range(down) for j in range(across)]
    made = []
    for (i, j), (model, result) in zip(places, results.items(), strict=False):
        block = grid[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        block[0, 0].set_title(short_name(model), color=look(model, list(results))["color"], fontweight="bold")
        made.append((model, result, block))
    for i, j in places[len(results) :]:
        for axis in grid[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].flat:
            axis.set_axis_off()
    return drawn, made


def by_model(
    results: Results, rows: Mapping[str, str], *, height: float, xlabel: str = "layer", **options: Any
) -> tuple[Figure, list[tuple[Axes, str, Result]]]:
    """A figure with the models across (and wrapped) and ``rows`` (key -> label of the axis) down.

    Returns:
        The figure; each panel with the key of its row and the result of its model.
    """
    drawn, made = blocks(results, len(rows), height=height, **options)
    found = []
    for i, (_, result, block) in enumerate(made):
        for axis, (key, label) in zip(block[:, 0], rows.items(), strict=True):
            if i % ACROSS == 0:
                axis.set_ylabel(label)
            if xlabel == "layer":
                layer_axis(axis, result["layers"])
            found.append((axis, key, result))
        block[-1, 0].set_xlabel(xlabel)
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
    axis.set(ylim=(floor, 2))
    log_axis(axis)


def log_axis(axis: Axes) -> None:
    """Make the vertical axis logarithmic, with powers of ten in full-size type."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(numticks=6))
    axis.yaxis.set_major_formatter(FuncFormatter(power_of_ten))
    axis.yaxis.set_minor_formatter(NullFormatter())


def power_of_ten(x: float, _: object = None) -> str:
    """Its text: 10⁻⁶."""
    exponent = f"{np.log10(x):.0f}".replace("-", "−")
    return "1" if exponent in ("0", "−0") else "10" + exponent.translate(str.maketrans("−0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


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


def dots(
    axis: Axes, items: Sequence[Result], y: Any, *, marker: str, face: str, label: str = "", edge: str = INK
) -> None:
    """Shares with whiskers, one in a row; of one run (``accuracy``, ``mean``) or over seeds (``value``)."""
    values = np.array([next(item[name] for name in ("value", "accuracy", "mean") if name in item) for item in items])
    low, high = np.array([item["interval"] for item in items]).T
    bars = np.clip([values - low, high - values], 0, None)
    axis.errorbar(
        values,
        y,
        xerr=bars,
        fmt=marker,
        ms=3.5,
        mfc=face,
        mec=edge,
        ecolor=edge,
        elinewidth=0.8,
        label=label or "_",
    )
    axis.set(xlim=(-0.03, 1.03), xticks=[0, 0.5, 1], xticklabels=["0", "½", "1"])


def not_run(axes: Sequence[Axes], places: Sequence[float]) -> None:
    """Say so once in every stretch of rows without a dot."""
    ordered = np.sort(places)
    for stretch in np.split(ordered, 1 + np.flatnonzero(np.diff(ordered) > 1)):
        for axis in axes if len(stretch) else ():
            axis.text(0.03, stretch.mean(), "not run", color="0.4", va="center", transform=axis.get_yaxis_transform(),
                      bbox={"fc": "white", "ec": "none", "pad": 0.5})  # fmt: skip


def key(drawn: Figure, lines: Mapping[str, Mapping[str, Any]]) -> Figure:
    """The figure with a legend above it of what lines mean in all panels: name -> options of ``Line2D``."""
    handles = [Line2D([], [], label=name, **{"lw": 1.1, **options}) for name, options in lines.items()]
    return _legend_above(drawn, handles, list(lines))


def _legend_above(drawn: Figure, handles: Sequence[Any], names: Sequence[str]) -> Figure:
    """In as many columns as the width holds."""
    columns = max(1, int(CHARACTERS / (max(map(len, names)) + 6)))
    drawn.legend(handles, names, loc="outside upper center", ncols=columns, handlelength=2.4, columnspacing=1.4)
    return drawn


def legend(drawn: Figure, *axes: Axes) -> Figure:
    """The figure with one legend above it, of what some panels show (else the first), each name once."""
    shown = [axis.get_legend_handles_labels() for axis in axes or drawn.axes[:1]]
    entries = {name: handle for handles, names in shown for handle, name in zip(handles, names, strict=True)}
    return _legend_above(drawn, list(entries.values()), list(entries))
