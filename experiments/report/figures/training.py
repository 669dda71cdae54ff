"""Figures of supervised training: the dual reward, plain fine-tuning, chains of thought, and other tasks."""

import numpy as np
from matplotlib.figure import Figure

from experiments.report.figures import draw
from experiments.report.figures.draw import BAND, Results, dots, line
from experiments.report.names import NAMES

FLOOR = 1e-9
"""Of alignments on a logarithmic axis."""


@draw.figure("dual_reward")
def dual_reward_steps(dual: Results) -> Figure:
    """Alignment by layer and step of the main arm, beside its losses."""
    figure, grid = draw.panels(len(dual), 2, height=1.75 * len(dual), xlabel="step", width_ratios=(1.6, 1))
    for (heat, loss), (model, result) in zip(grid, dual.items(), strict=True):
        watched, losses, labels = result["main"]["watched"], result["main"]["losses"], result["layers"]
        steps = [entry["step"] for entry in watched]
        half = (steps[1] - steps[0]) / 2
        extent = (-half, steps[-1] + half, -0.5, len(labels) - 0.5)
        values = np.transpose([entry["by_layer"] for entry in watched])
        image = draw.heat_map(heat, values, origin="lower", extent=extent)
        ticks = sorted({0, labels.index(result["layer"]), len(labels) - 1})
        heat.set_yticks(ticks, [labels[i] for i in ticks])
        heat.set_title(model, loc="left")
        for name, ls, shade in (("class", "-", "0.0"), ("answer", "--", "0.35")):
            curve = [entry[f"{name}_loss"] for entry in losses]
            line(loss, curve, x=[entry["step"] for entry in losses], ls=ls, color=shade, label=f"{name} loss")
        loss.set(yscale="log", ylabel="loss, nats", xlim=(0, steps[-1]))
    grid[0, 1].legend(loc="upper right")
    figure.colorbar(image, ax=list(grid[:, 0]), shrink=0.7, pad=0.01, label="alignment")
    return figure


@draw.figure("dual_reward")
def dual_reward_arms(dual: Results) -> Figure:
    """What each arm makes (top token on held-out symbols and on words) and costs (exact answers)."""
    arm_names = NAMES["dual_reward_arms"]
    names = {key: arm_names[key] for key in arm_names if all(key in result["arms"] for result in dual.values())}
    y = np.arange(len(names))[::-1]
    figure, grid = draw.panels(1, 2 * len(dual), height=0.9 + 0.17 * len(names), sharey=True)
    for (lens, answers), (model, result) in zip(grid.reshape(-1, 2), dual.items(), strict=True):
        arms = [result["arms"][key] for key in names]
        dots(lens, [arm["symbol"]["top"] for arm in arms], y + 0.15, marker="o", face="0.0", label="symbols")
        dots(lens, [arm["word"]["top"] for arm in arms], y - 0.15, marker="s", face="white", label="words")
        dots(answers, [arm["answers"]["exact"] for arm in arms], y, marker="o", face="0.0", label="after training")
        answers.axvline(result["before"]["answers"]["exact"]["accuracy"], color="0.5", ls=":", label="before")
        lens.set_title(model, loc="left")
        lens.set_xlabel("lens says the word")
        answers.set_xlabel("exact answers")
    grid[0, 0].set_yticks(y, names.values())
    return draw.legend(figure, *grid[0, :2], ncols=4)


@draw.figure("lora_sft", "cot_alignment")
def fine_tuning_depth(plain: Results, chain: Results) -> Figure:
    """Mean alignment over depth: plain fine-tuning by step, and training with and without a word before the answer."""
    figure, grid = draw.panels(2, len(plain), height=4.4, sharey=True)
    formats = NAMES["training_formats"].items()
    for (above, below), (model, result) in zip(grid.T, plain.items(), strict=True):
        for axis in (above, below):
            draw.alignment_axis(axis, FLOOR)
            draw.layer_axis(axis, result["layers"])
        shades = np.linspace(0.75, 0, len(result["by_step"]))
        for i, (point, shade) in enumerate(zip(result["by_step"], shades, strict=True)):
            ls, label = "-" if i else ":", f"step {point['step']}"
            line(above, point["by_layer"], color=f"{shade:.2f}", ls=ls, label=label)
        for (key, name), ls, shade in zip(formats, (":", "--", "-"), ("0.5", "0.3", "0.0"), strict=True):
            runs = chain[model][key].get("by_seed", [chain[model][key]])
            means, ends = ([run["alignment"]["by_layer"][part] for run in runs] for part in ("mean", "interval"))
            line(below, np.mean(means, axis=0), color=shade, ls=ls, label=name)
            low, high = draw.spanning(ends).T
            below.fill_between(range(len(low)), np.clip(low, FLOOR, None), high, color=shade, alpha=BAND, lw=0)
        above.set_title(model)
    for axis, name in zip(grid[:, 0], ("plain fine-tuning", "by what is trained on"), strict=True):
        axis.set_ylabel(f"{name}\nmean alignment")
        axis.legend(loc="upper left", fontsize=6)
    return figure


@draw.figure("cot_alignment")
def fine_tuning_answers(chain: Results) -> Figure:
    """Right answers before and after fine-tuning: on held-out operands, and on the nine prompts of the write-up."""
    figure, grid = draw.panels(1, len(chain), height=1.5, xlabel="right answers", sharey=True)
    formats = NAMES["training_formats"]
    y = np.arange(len(formats))[::-1]
    for axis, (model, result) in zip(grid[0], chain.items(), strict=True):
        many = [result[key]["answers"]["exact"] for key in formats]
        nine = [result[key]["reported"]["answers"] for key in formats]
        dots(axis, many, y + 0.15, marker="o", face="0.0", label=f"held-out operands, n = {many[0]['n']}")
        dots(axis, nine, y - 0.15, marker="s", face="white", label=f"the originals' prompts, n = {nine[0]['n']}")
        axis.set_title(model, loc="left")
    grid[0, 0].set(yticks=y, yticklabels=formats.values(), ylim=(-0.5, len(formats) - 0.5))
    return draw.legend(figure)


@draw.figure("other_tasks")
def other_tasks(other: Results) -> Figure:
    """Probe and lens over depth, tasks down and models across; beside them what the lens says after dual reward."""
    rows = {task: f"{task}\nright class" for task in NAMES["other_tasks"]}
    figure, panels = draw.by_model(other, rows, height=0.4 + 1.75 * len(rows), sharey=True)
    looks = (("-", "o", "0.0", -0.012), ("--", "s", "white", 0.012))
    for axis, task, result in panels:
        found, layers = result[task], result["layers"]
        for part, (ls, marker, face, shift) in zip(NAMES["held_out"], looks, strict=True):
            name, curve = part.replace("_", " "), found["probing"][part]
            line(axis, curve["accuracy"], curve["interval"], alpha=0.12, color="0.0", ls=ls, label=f"probe, {name}")
            axis.axhline(curve["bag_of_tokens"]["accuracy"], color="0.4", ls=ls, lw=0.6, label=f"token counts, {name}")
            choice = found["dual_reward"][part]["choice"]
            bars = np.abs(np.subtract(choice["interval"], choice["value"]))[:, None]
            x = layers.index(result["layer"]) + shift * len(layers)
            axis.errorbar(x, choice["value"], yerr=bars, fmt=marker, ms=4, mfc=face, mec="0.0", ecolor="0.3",
                          elinewidth=0.8, label=f"lens after dual reward, {name}")  # fmt: skip
        line(axis, found["lens"]["choice"]["accuracy"], color="0.45", ls=":", label="lens before training")
        axis.axhline(1 / len(found["classes"]), color="0.8", lw=0.6, zorder=0)
        axis.set_ylim(0, 1.04)
    return draw.legend(figure)
