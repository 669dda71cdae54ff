"""The figure of page one: which training puts the word into the lens, at which depth, how well, in which model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.figures import draw
from experiments.report.figures.draw import INK, PALE, Result, Results, spanning
from experiments.report.names import NAMES, short_name

FLOOR = 1e-9
"""Of alignments on a logarithmic axis."""
COLOURS: Any = {"cmap": "cividis", "vmin": 0, "vmax": 1}
Band = tuple[float, tuple[float, float]]
"""A number and its interval."""


@dataclass(frozen=True)
class Reading:
    """What the lens says of the own operation word after a training, on prompts with operands that were held out."""

    by_layer: Sequence[float] | None
    """Mean alignment on symbol prompts at every row of the stream; None if it was read at one layer only."""
    symbol: Band
    """Where it is largest below the last layer, which is the model's own output; or at the layer that was read."""
    word: Band | None = None
    """At the same layer on prompts in words, which none of these trainings sees."""
    at: float = 0.5
    """Depth of that layer, from 0 to 1."""


@draw.figure("logit_lens", "lora_sft", "cot_alignment", "dual_reward", "dual_reward_long", "grpo", "staged")
def summary(*results: Results) -> Figure:
    """Which training, at which depth, how aligned, for which model."""
    found = _readings(results)
    models = list(results[0])
    rows = [(name, model) for name, by_model in found.items() for model in by_model]
    y = _places(rows)
    drawn = draw.panels(1, 3, height=0.75 + 0.152 * (y[-1] + 1), sharey=True, width_ratios=(1.25, 1, 1))
    figure, ((depth, symbol, word),) = drawn
    for place, (name, model) in zip(y, rows, strict=True):
        reading, look = found[name][model], draw.look(model, models)
        _strip(depth, place, reading, look["color"])
        _dot(symbol, place, reading.symbol, look)
        if reading.word:
            _dot(word, place, reading.word, look)
        else:
            word.text(0.02, place, "not read", color="0.4", va="center", transform=word.get_yaxis_transform())
    depth.set(xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "½", "1"], ylim=(y[-1] + 0.7, -0.7))
    depth.set_yticks(y, [short_name(model) for _, model in rows])
    for label, (_, model) in zip(depth.get_yticklabels(), rows, strict=True):
        label.set_color(draw.look(model, models)["color"])
    _name_trainings(depth, y, rows)
    image = depth.imshow([[0]], extent=(-2, -1, -2, -1), aspect="auto", **COLOURS)
    depth.set(xlim=(0, 1), ylim=(y[-1] + 0.7, -0.7))
    bar = figure.colorbar(image, ax=depth, location="top", aspect=28, pad=0.02, shrink=0.9, ticks=[0, 0.5, 1])
    bar.ax.set_xticklabels(["0", "alignment", "1"])
    bar.ax.tick_params(length=0, pad=1)
    titles = ("depth, symbol prompts", "alignment there, symbols", "the same, in words")
    for axis, title in zip((depth, symbol, word), titles, strict=True):
        axis.set_xlabel(title)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        for previous, place, (name, _), (before, _) in zip(y, y[1:], rows[1:], rows, strict=False):
            if name != before:
                axis.axhline((previous + place) / 2, color=PALE, lw=0.4)
    for axis in (symbol, word):
        axis.set(xscale="log", xlim=(FLOOR, 3))
        axis.set_xticks([1e-6, 1e-3, 1], map(draw.power_of_ten, [1e-6, 1e-3, 1]))
        axis.minorticks_off()
    return figure


def _readings(results: Sequence[Results]) -> dict[str, dict[str, Reading]]:
    lens, plain, chain, dual, long, grpo, staged = results
    readings = {
        "before": {model: _published(result) for model, result in lens.items()},
        "answers": {model: _plain(result) for model, result in plain.items()},
        "chain_of_thought": {model: _chain(result) for model, result in chain.items()},
        "grpo": {model: _grpo(result) for model, result in grpo.items()},
        "dual_reward": {model: _dual(result, long.get(model)) for model, result in dual.items()},
        "dual_then_grpo": {model: _staged(result) for model, result in staged.items()},
    }
    return {NAMES["summary"][name]: by_model for name, by_model in readings.items()}


def _published(result: Result) -> Reading:
    symbol, word = (result["controlled"][style]["word"] for style in ("symbol", "word"))
    return _at_peak(symbol["alignment"], [symbol["interval"]], word["alignment"], [word["interval"]])


def _plain(result: Result) -> Reading:
    """Each seed's largest at any layer, of each style at its own: intervals were kept of these alone."""
    means = np.mean([seed["final"]["symbol"]["by_layer"] for seed in result["by_seed"]], axis=0)
    symbol, word = (_band(result["final"][style]["peak"]) for style in ("symbol", "word"))
    at = (int(np.argmax(means[1:])) + 1) / (len(means) - 1)
    return Reading(means, symbol, word, at)


def _chain(result: Result) -> Reading:
    runs = [run["alignment"]["by_layer"] for run in result["chain_of_thought"]["by_seed"]]
    return _at_peak(np.mean([run["mean"] for run in runs], axis=0), [run["interval"] for run in runs])


def _grpo(result: Result) -> Reading:
    runs = [run["alignment"] for run in result["arms"]["controlled"]["runs"]]
    return _at_peak(np.mean([run["alignment"] for run in runs], axis=0), [run["interval"] for run in runs])


def _dual(result: Result, long: Result | None) -> Reading:
    """All seeds at full length where there are some, else those of the short arm."""
    seeds = long["main"] if long else result["arms"]["vo"]
    by_layer, (symbol, word) = (
        result["main"]["symbol"]["by_layer"]["mean"],
        [_band(seeds[style]["alignment"]) for style in ("symbol", "word")],
    )
    return Reading(by_layer, symbol, word, result["layers"].index(result["layer"]) / (len(by_layer) - 1))


def _staged(result: Result) -> Reading:
    found = result["orders"]["dual_then_grpo"]["summary"]["lens"]["alignment"]
    at = result["layers"].index(result["layer"]) / (len(result["layers"]) - 1)
    return Reading(None, _band(found), at=at)


def _band(found: Result) -> Band:
    low, high = found["interval"]
    return found["value"], (low, high)


def _at_peak(symbol: Any, intervals: Any, word: Any = None, word_intervals: Any = None) -> Reading:
    """Where the mean alignment is largest below the last layer, with the interval that spans all seeds there."""
    row = int(np.argmax(symbol[1:-1])) + 1
    band = (symbol[row], tuple(spanning(intervals)[row]))
    words = (word[row], tuple(spanning(word_intervals)[row])) if word is not None else None
    return Reading(symbol, band, words, row / (len(symbol) - 1))


def _places(rows: Sequence[tuple[str, str]]) -> list[float]:
    """Heights of the rows, with a gap between trainings; a training's name needs the height of two."""
    places, y = [], 0.0
    for i, (name, _) in enumerate(rows):
        if i and name != rows[i - 1][0]:
            alone = sum(other == rows[i - 1][0] for other, _ in rows) == 1
            y += 1.0 if alone else 0.45
        places.append(y)
        y += 1
    return places


def _strip(axis: Axes, y: float, reading: Reading, color: str) -> None:
    if reading.by_layer is None:
        axis.plot([0, 1], [y, y], color=PALE, lw=0.6)
        axis.scatter(reading.at, y, c=reading.symbol[0], s=26, marker="s", edgecolors=INK, lw=0.5, **COLOURS)
    else:
        axis.imshow([reading.by_layer], extent=(0, 1, y + 0.42, y - 0.42), aspect="auto", **COLOURS)
    axis.plot([reading.at, reading.at], [y - 0.42, y + 0.42], color=color, lw=1.6)


def _dot(axis: Axes, y: float, band: Band, look: dict[str, Any]) -> None:
    value, (low, high) = band
    ends = np.clip([value - low, high - value], 0, None)[:, None]
    if value < FLOOR:
        axis.text(0.02, y, "below 10⁻⁹", color=look["color"], va="center", transform=axis.get_yaxis_transform())
        return
    axis.errorbar(max(value, FLOOR), y, xerr=ends, fmt=look["marker"], ms=3.5, color=look["color"], elinewidth=1.1)


def _name_trainings(axis: Axes, y: Sequence[float], rows: Sequence[tuple[str, str]]) -> None:
    left = -0.06 - 0.038 * max(len(short_name(model)) for _, model in rows)
    for name in dict.fromkeys(name for name, _ in rows):
        places = [place for place, (other, _) in zip(y, rows, strict=True) if other == name]
        axis.text(left, float(np.mean(places)), name, ha="right", va="center", fontweight="bold", color=INK,
                  linespacing=1.05, transform=axis.get_yaxis_transform())  # fmt: skip
