"""What figures of readings share: how they are saved, their axis of layers, their text. They need no display."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Cells:
    """A map of layers by tokens, to be drawn."""

    title: str
    texts: Sequence[Sequence[str]]
    """(layers, tokens)"""
    values: NDArray[np.float64]
    """(layers, tokens) the colours, from zero on."""
    colour: str
    """What the values are."""
    signed: bool = False
    """Whether values may be below zero."""


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


def token_map(maps: Sequence[Cells], tokens: Sequence[str], written: Sequence[bool], layers: Sequence[str]) -> Figure:
    """A cell for every layer (the last on top) and token; several maps of one text abreast, wide ones below another.

    Args:
        maps: Those with values from zero on share their scale.
        tokens: What stands below each column.
        written: Of each column, whether the model wrote what follows it; these are bold.
        layers: Labels of the rows.
    """
    parts = [range(i, min(i + COLUMNS, len(tokens))) for i in range(0, len(tokens), COLUMNS)]
    wide = min(COLUMNS, len(tokens))
    abreast = len(maps) if len(maps) * wide <= 1.5 * COLUMNS else 1
    rows = len(parts) * len(maps) // abreast
    width, height = max(4.5, 0.72 * wide + 1.6), 0.2 * len(layers) + 0.9
    figure, axes = panels(rows, abreast, (width * abreast, height * rows + 0.6 * len(maps) / abreast))
    common = max((float(cells.values.max()) for cells in maps if not cells.signed), default=0.0)
    for m, cells in enumerate(maps):
        own = axes[m * len(parts) : (m + 1) * len(parts)]
        largest = max(float(np.abs(cells.values).max()) if cells.signed else common, 1e-12)
        for axis, part in zip(own, parts, strict=True):
            _fill(axis, cells, part, largest)
            axis.set_xlim(-0.5, wide - 0.5)
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0, labelsize=7)
            axis.set_yticks(range(len(layers)), layers)
            axis.set_xticks(range(len(part)), [drawable(tokens[j], 11) for j in part], family="monospace")
            for j, label in zip(part, axis.get_xticklabels(), strict=True):
                label.set_fontweight("bold" if written[j] else "normal")
        own[0].set_title(drawable(cells.title), loc="left", fontsize="medium")
        bar = figure.colorbar(own[0].images[0], ax=own, location="top", shrink=0.4, anchor=(1.0, 0.0), aspect=40,
                              pad=0.01)  # fmt: skip
        bar.set_label(drawable(cells.colour, 60), fontsize="small")
        bar.ax.tick_params(labelsize=7)
    return figure


def _fill(axis: Axes, cells: Cells, part: range, largest: float) -> None:
    block = cells.values[:, part.start : part.stop]
    colours, least = ("RdBu", -largest) if cells.signed else ("Blues", 0.0)
    axis.imshow(block, cmap=colours, vmin=least, vmax=largest, aspect="auto", origin="lower")
    for (i, j), value in np.ndenumerate(block):
        shade = "white" if abs(value) > 0.65 * largest else "black"
        text = drawable(cells.texts[i][part.start + j], 9)
        axis.text(j, i, text, ha="center", va="center", size=6, color=shade, family="monospace")


def drawable(text: str, most: int = 40) -> str:
    """Anyone's text as a label: one line, at most so many characters, nothing in it read as markup."""
    # The dollar would start mathematics; a label that starts with an underscore would be left out of the legend.
    shown = visible(text)  # escapes are long: what is cut is what is drawn
    shown = (shown if len(shown) <= most else f"{shown[: most - 1]}…").replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
