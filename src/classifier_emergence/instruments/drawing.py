"""What figures of readings share: how they are saved, their axis of layers, their text. They need no display."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from classifier_emergence.errors import InputError
from classifier_emergence.extras import missing_extras_named
from classifier_emergence.results import write_bytes_atomic

with missing_extras_named():
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from classifier_emergence.instruments.glyphs import visible

ENDINGS = (".png", ".svg", ".pdf")
FLOOR = 1e-12
"""The smallest probability on a logarithmic axis."""


def save(figure: Figure, file: Path) -> None:
    """Write a figure in the format that the file's ending names, atomically.

    Raises:
        InputError: Another ending than .png, .svg or .pdf.
    """
    check_ending(file)
    buffer = io.BytesIO()
    # Text as text: fonts embedded as Type 3 outlines cannot be searched.
    with mpl.rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):
        figure.savefig(buffer, format=file.suffix[1:].lower(), dpi=150)
    write_bytes_atomic(file, buffer.getvalue())


def check_ending(file: Path) -> None:
    """Refuse a file that ``save`` could not write, before the work is done.

    Raises:
        InputError: Another ending than .png, .svg or .pdf.
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


def drawable(text: str) -> str:
    """Anyone's text as a label: one line, at most 40 characters, nothing in it read as markup."""
    # The dollar would start mathematics; a label that starts with an underscore would be left out of the legend.
    shown = visible(text)  # escapes are long: what is cut is what is drawn
    shown = (shown if len(shown) <= 40 else f"{shown[:39]}…").replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
