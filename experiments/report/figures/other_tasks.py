"""The figure of the study on other tasks."""

import numpy as np
from matplotlib.figure import Figure

from experiments.report.figures.drawing import Results, layer_axis, legend, line, name_columns, panels
from experiments.report.names import HELD_OUT, OTHER_TASKS


def other_tasks(other: Results) -> Figure:
    """Probe and lens over depth, tasks down and models across; beside them what the lens says after dual reward."""
    figure, grid = panels(len(OTHER_TASKS), len(other), height=0.4 + 1.75 * len(OTHER_TASKS), sharey=True)
    name_columns(grid, other)
    looks = (("-", "o", "0.0", -0.012), ("--", "s", "white", 0.012))
    for row, task in zip(grid, OTHER_TASKS, strict=True):
        row[0].set_ylabel(f"{task}\nright class")
        for axis, result in zip(row, other.values(), strict=True):
            found, layers = result[task], result["layers"]
            for part, (ls, marker, face, shift) in zip(HELD_OUT, looks, strict=True):
                name, curve = part.replace("_", " "), found["probing"][part]
                line(axis, curve["accuracy"], curve["interval"], alpha=0.12, color="0.0", ls=ls, label=f"probe, {name}")
                bag = curve["bag_of_tokens"]["accuracy"]
                axis.axhline(bag, color="0.4", ls=ls, lw=0.6, label=f"token counts, {name}")
                choice = found["dual_reward"][part]["choice"]
                bars = np.abs(np.subtract(choice["interval"], choice["value"]))[:, None]
                axis.errorbar(layers.index(result["layer"]) + shift * len(layers), choice["value"], yerr=bars,
                              fmt=marker, ms=4, mfc=face, mec="0.0", ecolor="0.3", elinewidth=0.8,
                              label=f"lens after dual reward, {name}")  # fmt: skip
            line(axis, found["lens"]["choice"]["accuracy"], color="0.45", ls=":", label="lens before training")
            axis.axhline(1 / len(found["classes"]), color="0.8", lw=0.6, zorder=0)
            axis.set_ylim(0, 1.04)
            layer_axis(axis, layers)
    legend(figure, grid[0, 0])
    return figure
