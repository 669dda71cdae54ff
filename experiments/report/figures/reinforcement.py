"""Figures of the studies on reinforcement learning; see ``figures``."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.figures.arithmetic import STYLE, WIDTH, Results, layer_axis, legend

_CURVES = {
    "reward": "reward", "kl": "KL, nats", "entropy": "entropy, nats", "zero_variance": "equal groups",
    "truncated": "truncated",
}  # fmt: skip
_SHADES = ("0.25", "0.6", "0.88")
_FLOOR = 1e-9  # of an alignment on a logarithmic axis


def grpo_steps(grpo: Results, names: Mapping[str, str]) -> Figure:
    """Curves of training: reward, divergence, entropy, share of groups that all score alike, and of cut completions."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.4 + 0.95 * len(_CURVES)), layout="constrained")
        panels = figure.subplots(len(_CURVES), len(grpo), sharex=True, sharey="row", squeeze=False)
        for column, (model, result) in zip(panels.T, grpo.items(), strict=True):
            for axis, key in zip(column, _CURVES, strict=True):
                for (arm, name), ls, shade in zip(names.items(), ("-", "--", ":"), ("0.0", "0.3", "0.5"), strict=True):
                    _band(axis, [run["steps"] for run in result["arms"][arm]["runs"]], key, name, ls, shade)
            column[0].set_title(model)
            column[-1].set_xlabel("step")
        for axis, label in zip(panels[:, 0], _CURVES.values(), strict=True):
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
        legend(figure, panels[0, 0])
    return figure


def _band(axis: Axes, runs: Sequence[Sequence[Mapping[str, Any]]], key: str, name: str, ls: str, shade: str) -> None:
    """Mean over seeds, and a band from the least to the largest."""
    steps = [entry["step"] for entry in runs[0]]
    values = np.array([[entry[key] for entry in run] for run in runs])
    axis.plot(steps, values.mean(0), color=shade, ls=ls, label=name)
    if len(runs) > 1:
        axis.fill_between(steps, values.min(0), values.max(0), color=shade, alpha=0.15, lw=0)


def grpo_depth(grpo: Results) -> Figure:
    """Mean alignment of the operation words over depth, before and after GRPO, below the largest of the null words."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.1), layout="constrained")
        panels = figure.subplots(1, len(grpo), sharey=True, squeeze=False)[0]
        for axis, (model, result) in zip(panels, grpo.items(), strict=True):
            x = np.arange(len(result["layers"]))
            before = result["before"]["alignment"]
            after = [run["alignment"] for run in result["arms"]["controlled"]["runs"]]
            ends = np.array([lens["interval"] for lens in after])
            null = np.max([lens["null"]["alignment_max"] for lens in after], axis=0)
            axis.plot(x, np.clip(null, _FLOOR, None), color="0.6", ls="--", label="largest null word, after")
            axis.plot(x, np.clip(before["alignment"], _FLOOR, None), color="0.4", ls=":", label="before")
            mean = np.mean([lens["alignment"] for lens in after], axis=0)
            axis.plot(x, np.clip(mean, _FLOOR, None), color="0.0", label="after GRPO")
            low, high = np.clip([ends[..., 0].min(0), ends[..., 1].max(0)], _FLOOR, None)
            axis.fill_between(x, low, high, color="0.0", alpha=0.15, lw=0)
            axis.axvline(result["layers"].index(result["layer"]), color="0.85", lw=0.7, zorder=0)
            axis.set_yscale("log")
            axis.set_ylim(_FLOOR, 2)
            axis.set_xlabel("layer")
            axis.set_title(model)
            layer_axis(axis, result["layers"])
        panels[0].set_ylabel("mean alignment")
        legend(figure, panels[0])
    return figure


def collapse_map(
    collapse: Results, factorial: Mapping[str, Sequence[str]], attempts: Mapping[str, str], flaws: Mapping[str, str]
) -> Figure:
    """Shares of the classes that the lens gives to held-out problems, over the steps of every run.

    The cells of the factorial go down, its seeds across; beside them the originals' configurations and the flaws.
    """
    with mpl.rc_context(STYLE):
        seeds = max(len(result["arms"][key]["runs"]) for result in collapse.values() for key in factorial)
        rows, columns = len(factorial), seeds + 2
        figure = Figure(figsize=(WIDTH, 0.3 + 0.78 * rows * len(collapse)), layout="constrained")
        panels = figure.subplots(rows * len(collapse), columns, sharey=True, squeeze=False)
        for block, (model, result) in zip(np.split(panels, len(collapse)), collapse.items(), strict=True):
            arms, classes = result["arms"], result["classes"]
            for line, (key, words) in zip(block, factorial.items(), strict=True):
                line[0].set_ylabel("\n".join(words))
                for axis, run in zip(line, arms[key]["runs"], strict=False):
                    _shares(axis, run["watched"], classes)
            for seed, axis in enumerate(block[0, :seeds]):
                named = seed == 0 and len(collapse) > 1
                axis.set_title(f"{model}, seed {seed}" if named else f"seed {seed}", fontsize=6, pad=2)
            for column, names in zip(block.T[seeds:], (attempts, flaws), strict=True):
                for axis, (key, name) in zip(column, names.items(), strict=False):
                    _shares(axis, arms[key]["runs"][0]["watched"], classes)
                    axis.set_title(name, fontsize=6, pad=2)
        for axis in panels.flat:
            if not axis.collections:
                axis.set_axis_off()
        for axis in panels[-1]:
            axis.set_xlabel("step")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def staged(staged: Results, names: Mapping[str, str], parts: Mapping[str, str]) -> Figure:
    """Alignment and reward before training and after each part of it, for every order of the rewards."""
    measures = {"alignment": ("lens", "alignment"), "reward": ("sampled_reward",)}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.4 + 1.5 * len(staged)), layout="constrained")
        panels = figure.subplots(len(staged), len(names), sharey=True, squeeze=False)
        for line, (model, result) in zip(panels, staged.items(), strict=True):
            for axis, (order, name) in zip(line, names.items(), strict=True):
                runs = result["orders"][order]["runs"]
                found = [[result["before"], *run["stages"]] for run in runs]
                x = range(len(found[0]))
                for (label, path), ls, shade in zip(measures.items(), ("-", "--"), ("0.0", "0.5"), strict=True):
                    values = np.array([[_at(part, path) for part in run] for run in found])
                    axis.plot(x, values.mean(0), color=shade, ls=ls, marker="o", ms=3, label=label)
                    axis.fill_between(x, values.min(0), values.max(0), color=shade, alpha=0.15, lw=0)
                axis.set_xticks(x, ["before", *(parts[part["reward"]] for part in runs[0]["stages"])])
                axis.set_xlim(-0.3, len(x) - 0.7)
                axis.set_ylim(0, 1.02)
                axis.set_title(name if len(staged) == 1 else f"{model}: {name}")
        legend(figure, panels[0, 0])
    return figure


def _at(part: Mapping[str, Any], path: Sequence[str]) -> float:
    """The mean that stands at a path."""
    node: Any = part
    for key in path:
        node = node[key]
    return float(node["mean"])


def _shares(axis: Axes, watched: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> None:
    steps = [entry["step"] for entry in watched]
    axis.stackplot(
        steps, [[entry["shares"][name] for entry in watched] for name in classes], colors=_SHADES, labels=classes
    )
    axis.set_xlim(0, steps[-1])
    axis.set_ylim(0, 1)
    axis.set_xticks([0, steps[-1]])
    axis.set_yticks([0, 1])
