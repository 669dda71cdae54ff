"""What figures of readings share: how they are saved, their axis of layers, their text. They need no display."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from classifier_emergence.errors import InputError
from classifier_emergence.extras import missing_extras_named

with missing_extras_named():
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from classifier_emergence.instruments.glyphs import visible

ENDINGS = (".png", ".svg", ".pdf", ".html")
FLOOR = 1e-12
"""The smallest probability on a logarithmic axis."""
COLUMNS = 16
"""Tokens side by side in a map; more go into further panels."""


def rendered(figure: Figure, kind: str) -> bytes:
    """A figure as a file of a kind: ``png``, ``svg`` or ``pdf``."""
    buffer = io.BytesIO()
    # Text as text: fonts embedded as Type 3 outlines cannot be searched.
    with mpl.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, dpi=150)
    return buffer.getvalue()


def check_ending(file: Path) -> None:
    """Refuse a file that a reading's ``save`` could not write, before the work is done.

    Raises:
        InputError: Another ending than .png, .svg, .pdf or .html.
    """
    if file.suffix.lower() not in ENDINGS:
        raise InputError(f"plot {file}: unknown ending; name a file that ends in {', '.join(ENDINGS)}")


def panels(rows: int, columns: int, size: tuple[float, float], **layout: Any) -> tuple[Figure, list[Axes]]:
    """A figure ``size`` inches wide and high, and its panels row by row; ``layout`` goes to ``subplots``."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **layout).flat)


def one_panel(label: str, layers: Sequence[str]) -> tuple[Figure, Axes]:
    """A figure of one panel over layers; ``label`` is written behind that of its axis."""
    figure, (axis,) = panels(1, 1, (6.4, 3.4))
    axis.set_xlabel(f"layer  ({label})")
    layer_axis(axis, layers)
    return figure, axis


def layer_axis(axis: Axes, layers: Sequence[str]) -> None:
    """Label about ten of the layers, which stand at 0, 1, 2 and so on."""
    step = max(1, round(len(layers) / 10))
    ticks = list(range(0, len(layers), step))
    axis.set_xticks(ticks, [layers[i] for i in ticks])


def probability_axis(axis: Axes, label: str) -> None:
    """Make the vertical axis one of probabilities over many orders of magnitude; draw nothing below ``FLOOR``."""
    axis.set_yscale("log")
    axis.set_ylim(FLOOR, 2)
    axis.set_ylabel(label)


def token_map(
    cells: Sequence[Sequence[str]],
    values: NDArray[np.float64],
    tokens: Sequence[str],
    written: Sequence[bool],
    layers: Sequence[str],
    *,
    title: str,
    colour: str,
) -> Figure:
    """A cell for every layer (the last on top) and token: its text, and a value as its colour.

    Args:
        cells: (layers, tokens) texts.
        values: (layers, tokens) the colours, from zero on.
        tokens: What stands below each column.
        written: Of each column, whether the model wrote what follows it; these are bold.
        layers: Labels of the rows.
        title: Above.
        colour: What the values are.
    """
    parts = [range(i, min(i + COLUMNS, len(tokens))) for i in range(0, len(tokens), COLUMNS)]
    wide = min(COLUMNS, len(tokens))
    height = 0.2 * len(layers) + 0.9
    figure, axes = panels(len(parts), 1, (max(4.5, 0.72 * wide + 1.6), height * len(parts) + 0.6))
    largest = max(float(values.max()), 1e-12)
    for axis, part in zip(axes, parts, strict=True):
        block = values[:, part.start : part.stop]
        image = axis.imshow(block, cmap="Blues", vmin=0, vmax=largest, aspect="auto", origin="lower")
        axis.set_xlim(-0.5, wide - 0.5)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0, labelsize=7)
        axis.set_yticks(range(len(layers)), layers)
        axis.set_xticks(range(len(part)), [drawable(tokens[j], 11) for j in part], family="monospace")
        for j, label in zip(part, axis.get_xticklabels(), strict=True):
            label.set_fontweight("bold" if written[j] else "normal")
        for (i, j), value in np.ndenumerate(block):
            shade = "white" if value > 0.65 * largest else "black"
            text = drawable(cells[i][part.start + j], 9)
            axis.text(j, i, text, ha="center", va="center", size=6, color=shade, family="monospace")
    axes[0].set_title(drawable(title), loc="left", fontsize="medium")
    bar = figure.colorbar(image, ax=axes, location="top", shrink=0.4, anchor=(1.0, 0.0), aspect=40, pad=0.01)
    bar.set_label(drawable(colour, 60), fontsize="small")
    bar.ax.tick_params(labelsize=7)
    return figure


def drawable(text: str, most: int = 40) -> str:
    """Anyone's text as a label: one line, at most so many characters, nothing in it read as markup."""
    # The dollar would start mathematics; a label that starts with an underscore would be left out of the legend.
    shown = visible(text)  # escapes are long: what is cut is what is drawn
    shown = (shown if len(shown) <= most else f"{shown[: most - 1]}…").replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
