"""Figures of reinforcement learning: GRPO alone, with a loss on the lens, and after or before the dual reward."""

from collections.abc import Mapping, Sequence
from itertools import product
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.figures import draw
from experiments.report.figures.draw import INK, PALE, Results, line, seeds_line
from experiments.report.names import NAMES, short_name

CURVES = {
    "reward": "reward", "kl": "KL, nats", "entropy": "entropy, nats", "zero_variance": "equal groups",
    "truncated": "truncated",
}  # fmt: skip
"""What is drawn of every step."""
CLASS_SHADES = ("#332288", "#88ccee", "#ddcc77")
FLOOR = 1e-9
"""Of alignments on a logarithmic axis."""


@draw.figure("grpo")
def grpo_steps(grpo: Results) -> Figure:
    """Curves of training: reward, divergence, entropy, share of groups that all score alike, and of cut completions."""
    figure, panels = draw.by_model(grpo, CURVES, height=0.8 * len(CURVES), xlabel="step", sharey="row")
    looks = (("-", draw.training("grpo")["color"]), ("--", "#009e73"), (":", "#cc79a7"))
    for axis, key, result in panels:
        for (arm, name), (ls, shade) in zip(NAMES["grpo_arms"].items(), looks, strict=True):
            runs = [run["steps"] for run in result["arms"][arm]["runs"]]
            values = [[entry[key] for entry in steps] for steps in runs]
            seeds_line(axis, values, x=[entry["step"] for entry in runs[0]], color=shade, ls=ls, label=name)
    for axis, _, _ in panels:  # at the end, as what is drawn after it would not widen the axis that models share
        axis.set_ylim(bottom=0)
    return draw.legend(figure)


@draw.figure("grpo")
def grpo_depth(grpo: Results) -> Figure:
    """Mean alignment of the operation words over depth, before and after GRPO, below the largest of the null words."""
    figure, panels = draw.by_model(grpo, {"": "mean alignment"}, height=2.1, sharey=True)
    for axis, _, result in panels:
        before = result["before"]["alignment"]["alignment"]
        after = [run["alignment"] for run in result["arms"]["controlled"]["runs"]]
        curves, intervals = ([lens[key] for lens in after] for key in ("alignment", "interval"))
        null = np.max([lens["null"]["alignment_max"] for lens in after], axis=0)
        draw.alignment_axis(axis, FLOOR)
        line(axis, null, color="0.6", ls=(0, (1, 1)), label="largest matched word, after")
        line(axis, before, **draw.training("before"), label="before")
        seeds_line(axis, curves, intervals, **draw.training("grpo"), label="after GRPO")
        axis.axvline(result["layers"].index(result["layer"]), color=PALE, lw=0.7, zorder=0)
    return draw.legend(figure)


@draw.figure("collapse")
def collapse_arms(collapse: Results) -> Figure:
    """One word on top of all prompts, and reward, after every run: controlled, by flaw, and as reported."""
    groups = _collapse_groups()
    rows = {key: name for title, arms in groups.items() for key, name in {title: title, **arms}.items()}
    y = np.arange(len(rows))[::-1]
    figure, made = draw.blocks(collapse, 1, 2, across=2, height=0.4 + 0.15 * len(rows), sharey=True)
    for i, (model, result, ((one_word, reward),)) in enumerate(made):
        color, arms = draw.look(model, list(collapse))["color"], result["arms"]
        for place, key in zip(y, rows, strict=True):
            if key in arms:
                found = arms[key]["summary"]
                face = color if found["collapsed"] else "white"
                draw.dots(one_word, [found["classes"]["one_word"]], [place], marker="o", face=face, edge=color)
                draw.dots(reward, [found["sampled_reward"]], [place], marker="D", face=face, edge=color)
        for names in groups.values():
            draw.not_run(
                (one_word, reward), [place for place, key in zip(y, rows, strict=True) if key in names.keys() - arms]
            )
        one_word.axvline(1 / len(result["classes"]), color=PALE, lw=0.6, zorder=0)
        reward.axvline(result["before"]["sampled_reward"]["mean"], **draw.training("before"), lw=1.1)
        one_word.set_xlabel("one word on top")
        reward.set_xlabel("reward")
        one_word.set_ylim(-0.8, len(rows) - 0.2)
        if i % 2 == 0:
            one_word.set_yticks(y, rows.values())
            for label, key in zip(one_word.get_yticklabels(), rows, strict=True):
                label.set_fontweight("bold" if key in groups else "normal")
    return draw.key(figure, {
        "no seed collapsed": {"color": INK, "ls": "", "marker": "o", "mfc": "white"},
        "a seed collapsed": {"color": INK, "ls": "", "marker": "o"},
        "one in three": {"color": PALE, "lw": 0.6}, "reward before training": draw.training("before"),
    })  # fmt: skip


def _collapse_groups() -> dict[str, dict[str, str]]:
    """Title of a group -> arm -> its name."""
    crossed = [zip(*level, strict=True) for level in product(*(x.items() for x in NAMES["collapse_levels"].values()))]
    return {
        "controlled": {key: ", ".join(words) for key, words in NAMES["collapse_factorial"].items()},
        "flaws, crossed": {"_".join(keys): ", ".join(words) for keys, words in crossed},
        "as reported": NAMES["collapse_attempts"],
    }


@draw.figure("collapse")
def collapse_map(collapse: Results) -> Figure:
    """Shares of the classes that the lens gives to held-out problems, over the steps of every run.

    A row for each model with the cells of the factorial, the seeds of a cell side by side; then the originals'
    configurations on the models that went through them.
    """
    cells, attempts = NAMES["collapse_factorial"], NAMES["collapse_attempts"]
    rows = [(model, arms) for arms in (cells, attempts) for model in collapse if {*arms} <= {*collapse[model]["arms"]}]
    height = 0.9 + min(0.75, 7.2 / len(rows)) * len(rows)
    figure, grid = draw.panels(len(rows), max(len(cells), len(attempts)), height=height, sharey=True)
    for i, (row, (model, arms)) in enumerate(zip(grid, rows, strict=True)):
        first, last = (not 0 <= j < len(rows) or rows[j][1] is not arms for j in (i - 1, i + 1))
        color = draw.look(model, list(collapse))["color"]
        row[0].set_ylabel(short_name(model), color=color, weight="bold", rotation=0, ha="right", va="center")
        for axis, (key, name) in zip(row, arms.items(), strict=False):
            runs = [run["watched"] for run in collapse[model]["arms"][key]["runs"]]
            _class_shares(axis, runs, collapse[model]["classes"])
            axis.tick_params(labelbottom=last)
            if first:
                axis.set_title("\n".join(name) if arms is cells else fill(name, 13), pad=3)
            if last:
                axis.set_xlabel("step")
        for axis in row[len(arms) :]:
            axis.set_axis_off()
    return draw.legend(figure)


def _class_shares(axis: Axes, runs: Sequence[Sequence[Mapping[str, Any]]], classes: Sequence[str]) -> None:
    """One run after the other, a white line between."""
    last = runs[0][-1]["step"]
    for i, watched in enumerate(runs):
        steps = [i * last + entry["step"] for entry in watched]
        shares = [[entry["shares"][name] for entry in watched] for name in classes]
        axis.stackplot(steps, shares, colors=CLASS_SHADES, labels=["_" * (i > 0) + name for name in classes])
        axis.axvline(i * last, color="white", lw=1)
    axis.set(xlim=(0, last * len(runs)), ylim=(0, 1), xticks=[0, last], yticks=[0, 1])


@draw.figure("collapse")
def collapse_gradients(collapse: Results) -> Figure:
    """Cosines between gradients of half a batch, by block: of the two losses, and of either with itself."""
    figure, made = draw.blocks(collapse, 1, 2, across=2, height=1.6, sharey=True)
    lines = {"across": ("two losses", "-", draw.training("both")["color"]),
             "policy_halves": ("GRPO with itself", "--", draw.training("grpo")["color"]),
             "class_halves": ("class loss with itself", ":", draw.training("dual_reward")["color"])}  # fmt: skip
    for _, result, ((before, along),) in made:
        during = result["arms"]["whole_both"]["summary"]["gradients"]
        cases = {"block, before training": result["before"]["gradients"], "block, along training": during}
        for axis, (when, found) in zip((before, along), cases.items(), strict=True):
            for key, (name, ls, color) in lines.items():
                line(axis, found["by_block"][key], color=color, ls=ls, label=name)
            axis.axhline(0, color=PALE, lw=0.7, zorder=0)
            axis.locator_params(axis="x", integer=True)
            axis.set_xlabel(when)
    made[0][2][0, 0].set_ylabel("cosine")
    return draw.legend(figure)


def apart(heights: Sequence[float], least: float) -> list[float]:
    """Heights of two labels within (0, 1): clear of its ends, and at least so far from each other."""
    low, high = sorted(range(2), key=lambda i: heights[i])
    placed = [min(max(height, least / 2), 1 - least / 2) for height in heights]
    if (gap := least - (placed[high] - placed[low])) > 0:
        room = min(gap, 1 - least / 2 - placed[high])
        placed[high] += room
        placed[low] -= gap - room
    return placed


@draw.figure("staged")
def staged(staged: Results) -> Figure:
    """Alignment and reward before training and after each part of it, for every order of the rewards."""
    orders = NAMES["staged_orders"]
    rows = -(-len(orders) // 3)
    figure, made = draw.blocks(staged, rows, -(-len(orders) // rows), across=1, height=0.3 + 1.3 * rows, sharey=True)
    looks = {"alignment": draw.training("dual_reward"), "reward": {"color": INK, "ls": "--"}}
    for _, result, block in made:
        for axis, (order, name) in zip(block.flat, orders.items(), strict=False):
            found = [[result["before"], *run["stages"]] for run in result["orders"][order]["runs"]]
            alignment = [[part["lens"]["alignment"]["mean"] for part in run] for run in found]
            reward = [[part["sampled_reward"]["mean"] for part in run] for run in found]
            lines = {"alignment": alignment, "reward": reward}
            ends = [float(np.mean(values, axis=0)[-1]) for values in lines.values()]
            for (label, values), height in zip(lines.items(), apart(ends, 0.16), strict=True):
                seeds_line(axis, values, marker="o", ms=3, **looks[label])
                axis.annotate(label, (len(found[0]) - 1, height), xytext=(4, 0), textcoords="offset points",
                              color=looks[label]["color"], va="center", annotation_clip=False)  # fmt: skip
            trained_on = [NAMES["staged_rewards"][part["reward"]].replace(" ", "\n", 1) for part in found[0][1:]]
            axis.set_xticks(range(len(found[0])), ["before", *trained_on])
            axis.set(xlim=(-0.3, len(found[0]) - 0.7), ylim=(0, 1.02))
            axis.set_xlabel(name)
    return figure
