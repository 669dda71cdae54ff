"""The figure of the study on other tasks; see ``figures``."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from experiments.report.figures.arithmetic import STYLE, WIDTH, Results, layer_axis, legend


def other_tasks(other: Results, tasks: Sequence[str]) -> Figure:
    """Probe and lens over depth, tasks down and models across; beside them what the lens says after dual reward.

    Args:
        other: Model -> result of stage other_tasks.
        tasks: Which tasks.
    """
    parts = (("held_out_groups", "-", "o", "0.0"), ("held_out_templates", "--", "s", "white"))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.4 + 1.75 * len(tasks)), layout="constrained")
        panels = figure.subplots(len(tasks), len(other), sharey=True, squeeze=False)
        for row, task in zip(panels, tasks, strict=True):
            for axis, result in zip(row, other.values(), strict=True):
                found, x = result[task], np.arange(len(result["layers"]))
                at = result["layers"].index(result["layer"])
                for (part, ls, marker, face), shift in zip(parts, (-0.012, 0.012), strict=True):
                    name, curve = part.replace("_", " "), found["probing"][part]
                    low, high = np.transpose(curve["interval"])
                    axis.plot(x, curve["accuracy"], color="0.0", ls=ls, label=f"probe, {name}")
                    axis.fill_between(x, low, high, color="0.0", alpha=0.12, lw=0)
                    bag = curve["bag_of_tokens"]["accuracy"]
                    axis.axhline(bag, color="0.4", ls=ls, lw=0.6, label=f"token counts, {name}")
                    choice = found["dual_reward"][part]["choice"]
                    bars = np.abs(np.subtract(choice["interval"], choice["value"]))[:, None]
                    axis.errorbar(at + shift * len(x), choice["value"], yerr=bars, fmt=marker, ms=4, mfc=face,
                                  mec="0.0", ecolor="0.3", elinewidth=0.8,
                                  label=f"lens after dual reward, {name}")  # fmt: skip
                axis.plot(x, found["lens"]["choice"]["accuracy"], color="0.45", ls=":", label="lens before training")
                axis.axhline(1 / len(found["classes"]), color="0.8", lw=0.6, zorder=0)
                axis.set_ylim(0, 1.04)
                layer_axis(axis, result["layers"])
        for axis, model in zip(panels[0], other, strict=True):
            axis.set_title(model)
        for axis in panels[-1]:
            axis.set_xlabel("layer")
        for axis, task in zip(panels[:, 0], tasks, strict=True):
            axis.set_ylabel(f"{task}\nright class")
        legend(figure, panels[0, 0])
    return figure
