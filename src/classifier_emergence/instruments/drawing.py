"""Figures of readings: what ``.plot()`` draws and ``--plot`` saves. They need no display."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.glyphs import visible
from classifier_emergence.results import write_bytes_atomic

if TYPE_CHECKING:
    from classifier_emergence.instruments.direction import DirectionReading
    from classifier_emergence.instruments.finetune import FineTuned
    from classifier_emergence.instruments.lens import LensReading
    from classifier_emergence.instruments.probe import ProbeReading
    from classifier_emergence.instruments.routing import TraceReading, UsageReading

ENDINGS = (".png", ".svg", ".pdf")
_FLOOR = 1e-12  # of a probability on a logarithmic axis
_MOST_TEXTS, _MOST_TOKENS = 8, 64  # of a grid of tokens
# A tuple of line styles carries what colours would.
_LINES = ("-", "--", ":", "-.")


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


def probe_curve(reading: "ProbeReading") -> Figure:
    """Accuracy over depth with its interval, beside the 95 % quantile of permuted labels."""
    figure, axis = _one(f"linear probes, n = {reading.n}", reading.layers)
    x = np.arange(len(reading.layers))
    low, high = reading.interval.T
    axis.plot(x, reading.accuracy, color="0.0", label="held-out accuracy")
    axis.fill_between(x, low, high, color="0.0", alpha=0.15, lw=0)
    axis.plot(x, reading.null_95, color="0.5", ls=":", label="permuted labels, 95 %")
    axis.plot(x, reading.null_mean, color="0.5", ls="-", lw=0.7, label="permuted labels, mean")
    axis.set_ylim(-0.03, 1.05)
    axis.set_ylabel("accuracy")
    axis.legend(frameon=False)
    axis.set_title(_text(reading.model), loc="left", fontsize="medium")
    return figure


def lens_curves(reading: "LensReading") -> Figure:
    """Alignment over depth, a panel a target and a line a prompt; without targets the top token's probability."""
    panels = [(f"“{_text(t)}”", reading.alignment[i]) for i, t in enumerate(reading.targets)]
    panels = panels or [("top token", reading.top_probability)]
    figure = Figure(figsize=(6.4, 0.8 + 2.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    x = np.arange(len(reading.layers))
    for axis, (title, values) in zip(axes, panels, strict=True):
        for j, prompt in enumerate(reading.prompts):
            shade = str(round(0.6 * j / max(1, len(reading.prompts) - 1), 3))
            line = _LINES[j % len(_LINES)]
            axis.plot(x, np.clip(values[:, j], _FLOOR, None), color=shade, ls=line, label=_text(prompt))
        axis.set_yscale("log")
        axis.set_ylim(_FLOOR, 2)
        axis.set_ylabel("probability")
        axis.set_title(title, loc="left", fontsize="medium")
        _layers(axis, reading.layers)
    if len(reading.prompts) <= 12:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
    axes[-1].set_xlabel("layer")
    return figure


def direction_bars(reading: "DirectionReading") -> Figure:
    """The tokens with the largest cosines, a row of panels a layer and a panel a class."""
    k = len(reading.classes)
    rows = len(reading.directions) // k
    figure = Figure(figsize=(2.4 * k + 0.6, 2.2 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, k, squeeze=False)
    for axis, item in zip(axes.flat, reading.directions, strict=True):
        y = np.arange(len(item.top_tokens))[::-1]
        axis.barh(y, item.top_cosines, color="0.6")
        axis.set_yticks(y, [_text(token) for token in item.top_tokens], family="monospace")
        axis.set_title(f"{item.layer}: {_text(item.label)}", loc="left", fontsize="medium")
        axis.set_xlabel("cosine")
    return figure


def before_and_after(reading: "FineTuned") -> Figure:
    """Mean alignment of the own class word over depth, before and after training."""
    figure, axis = _one(f"{reading.method}, {reading.n_test} held-out items", reading.layers)
    x = np.arange(len(reading.layers))
    axis.plot(x, np.clip(reading.before.alignment, _FLOOR, None), color="0.5", ls="--", label="before")
    axis.plot(x, np.clip(reading.after.alignment, _FLOOR, None), color="0.0", label="after")
    axis.axvline(reading.layers.index(reading.layer), color="0.7", lw=0.7)
    axis.set_yscale("log")
    axis.set_ylim(_FLOOR, 2)
    axis.set_ylabel("alignment of the class's word")
    axis.legend(frameon=False)
    axis.set_title(_text(reading.model), loc="left", fontsize="medium")
    return figure


def routing_grid(reading: "TraceReading") -> Figure:
    """Tokens down, layers across, a panel a text: the first expert's number on a shade of its weight.

    The first texts, and the first tokens of each: a page holds no more.
    """
    shown = [(item, item.tokens[:_MOST_TOKENS]) for item in reading.texts[:_MOST_TEXTS]]
    heights = [max(2, len(tokens)) for _, tokens in shown]
    width = max(4.0, 1.6 + 0.32 * len(reading.layers))
    figure = Figure(figsize=(width, 0.6 * len(heights) + 0.22 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (item, tokens) in zip(axes, shown, strict=True):
        first = item.weights[:, : len(tokens), 0].T  # (tokens, layers)
        axis.imshow(first, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for t, i in np.ndindex(first.shape):
            shade = "1" if first[t, i] > 0.5 else "0"
            axis.text(i, t, str(item.experts[i, t, 0]), color=shade, ha="center", va="center", fontsize=6)
        axis.set_yticks(range(len(tokens)), [_text(token) for token in tokens], family="monospace")
        axis.set_title(_text(item.text), loc="left", fontsize="medium")
        _layers(axis, reading.layers)
    axes[-1].set_xlabel("layer  (number of the first expert; black: it has all the weight)")
    return figure


def expert_load(reading: "UsageReading") -> Figure:
    """Share of tokens that each expert gets at each layer: of all texts, then of each class's."""
    panels = [("all tokens", reading.usage.load), *zip(reading.classes, reading.class_load, strict=True)]
    height = 0.6 + min(3.0, 0.5 + 0.16 * reading.n_experts)
    figure = Figure(figsize=(6.4, height * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    most = max(float(load.max()) for _, load in panels)
    for axis, (title, load) in zip(axes, panels, strict=True):
        image = axis.imshow(load.T, cmap="cividis", vmin=0, vmax=most, aspect="auto", interpolation="nearest")
        axis.set_ylabel("expert")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_title(_text(title), loc="left", fontsize="medium")
        _layers(axis, reading.layers)
    axes[-1].set_xlabel(f"layer  ({_text(reading.model)})")
    figure.colorbar(image, ax=list(axes), label="share of tokens")
    return figure


def _one(label: str, layers: Sequence[str]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.set_xlabel(f"layer  ({label})")
    _layers(axis, layers)
    return figure, axis


def _layers(axis: Axes, layers: Sequence[str]) -> None:
    step = max(1, round(len(layers) / 10))
    ticks = list(range(0, len(layers), step))
    axis.set_xticks(ticks, [layers[i] for i in ticks])


def _text(text: str) -> str:
    # The dollar would start mathematics; a label that starts with an underscore would be left out of the legend.
    shown = visible(text)  # escapes are long: what is cut is what is drawn
    shown = (shown if len(shown) <= 40 else f"{shown[:39]}…").replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
