"""Figures of supervised training: the dual reward, plain fine-tuning, chains of thought, and other tasks."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, ScalarFormatter

from classifier_emergence.results import lookup
from experiments.report.figures import draw
from experiments.report.figures.draw import INK, PALE, Result, Results, dots, line, seeds_line
from experiments.report.names import NAMES

FLOOR = 1e-9
"""Of alignments on a logarithmic axis."""
COST = (
    "exact answers",
    "removed: change of the\nanswer's log-probability",
    "interchanged: answers\nof the other operation",
)
"""What each panel of ``cost`` shows."""


@draw.figure("dual_reward", "lora_sft", "cot_alignment", "grpo")
def training_depth(dual: Results, plain: Results, chain: Results, grpo: Results) -> Figure:
    """Mean alignment over depth on symbol prompts, before training and after each kind of training."""
    figure, panels = draw.by_model(dual, {"": "mean alignment"}, height=2.1, sharey=True)
    for (axis, _, result), model in zip(panels, dual, strict=True):
        draw.alignment_axis(axis, FLOOR)
        line(axis, result["before"]["symbol"]["by_layer"]["mean"], **draw.training("before"))
        finals = [seed["final"]["symbol"]["by_layer"] for seed in plain[model]["by_seed"]]
        seeds_line(axis, finals, **draw.training("answers"))
        runs = [run["alignment"]["by_layer"] for run in chain[model]["chain_of_thought"]["by_seed"]]
        intervals = [run["interval"] for run in runs]
        seeds_line(axis, [run["mean"] for run in runs], intervals, **draw.training("chain_of_thought"))
        if model in grpo:
            lenses = [run["alignment"] for run in grpo[model]["arms"]["controlled"]["runs"]]
            means, ends = ([lens[part] for lens in lenses] for part in ("alignment", "interval"))
            seeds_line(axis, means, ends, **draw.training("grpo"))
        main = result["main"]["symbol"]["by_layer"]
        line(axis, main["mean"], main["interval"], **draw.training("dual_reward"))
        axis.axvline(result["layers"].index(result["layer"]), color=PALE, lw=0.6, zorder=0)
    shown = ("before", "answers", "chain_of_thought", "grpo", "dual_reward")
    return draw.key(figure, {NAMES["trainings"][key]: draw.training(key) for key in shown})


@draw.figure("dual_reward")
def dual_reward_steps(dual: Results) -> Figure:
    """Alignment by layer and step of the main arm, beside its losses."""
    across = 1 if len(dual) <= draw.ACROSS else 2
    figure, made = draw.blocks(dual, 1, 2, across=across, height=1.6, xlabel="step", width_ratios=(1.6, 1))
    for _, result, ((heat, loss),) in made:
        watched, losses, labels = result["main"]["watched"], result["main"]["losses"], result["layers"]
        steps = [entry["step"] for entry in watched]
        half = (steps[1] - steps[0]) / 2
        extent = (-half, steps[-1] + half, -0.5, len(labels) - 0.5)
        values = np.transpose([entry["by_layer"] for entry in watched])
        image = draw.heat_map(heat, values, origin="lower", extent=extent)
        ticks = sorted({0, labels.index(result["layer"]), len(labels) - 1})
        heat.set_yticks(ticks, [labels[i] for i in ticks])
        for name, ls, color in (("class", "-", draw.training("dual_reward")["color"]), ("answer", "--", INK)):
            curve = [entry[f"{name}_loss"] for entry in losses]
            line(loss, curve, x=[entry["step"] for entry in losses], ls=ls, color=color)
            loss.annotate(name, (steps[-1], curve[-1]), xytext=(2, 0), textcoords="offset points", color=color,
                          va="center", annotation_clip=False)  # fmt: skip
        draw.log_axis(loss)
        loss.set(ylabel="loss, nats", xlim=(0, steps[-1]))
    figure.colorbar(image, ax=figure.axes, shrink=0.7, pad=0.01, label="alignment")
    return figure


@draw.figure("dual_reward")
def dual_reward_arms(dual: Results) -> Figure:
    """What each arm makes (top token on held-out symbols and on words) and costs (exact answers)."""
    arm_names = NAMES["dual_reward_arms"]
    names = {key: arm_names[key] for key in arm_names if any(key in result["arms"] for result in dual.values())}
    y = np.arange(len(names))[::-1]
    figure, made = draw.blocks(dual, 1, 2, across=2, height=0.5 + 0.16 * len(names), sharey=True)
    for i, (model, result, ((lens, answers),)) in enumerate(made):
        arms = [result["arms"][key] for key in names if key in result["arms"]]
        ran, color = np.array([key in result["arms"] for key in names]), draw.look(model, list(dual))["color"]
        at = y[ran]
        draw.not_run((lens, answers), y[~ran])
        keys = ("symbol.top", "word.top", "answers.exact")
        symbols, words, exact = ([lookup(arm, key) for arm in arms] for key in keys)
        dots(lens, symbols, at + 0.15, marker="o", face=color, edge=color)
        dots(lens, words, at - 0.15, marker="s", face="white", edge=color)
        dots(answers, exact, at, marker="D", face=color, edge=color)
        answers.axvline(result["before"]["answers"]["exact"]["accuracy"], **draw.training("before"), lw=1.1)
        lens.set_xlabel("lens says the word")
        answers.set_xlabel("exact answers")
        if i % 2 == 0:
            lens.set_yticks(y, names.values())
    return draw.key(figure, {
        "lens, on symbols": {"color": INK, "ls": "", "marker": "o"},
        "lens, on words": {"color": INK, "ls": "", "marker": "s", "mfc": "white"},
        "answers after training": {"color": INK, "ls": "", "marker": "D"},
        "answers before": draw.training("before"),
    })  # fmt: skip


@draw.figure("dual_reward", "dual_reward_long")
def cost(dual: Results, long: Results) -> Figure:
    """What training costs the answers, and whether they rest on the word: a row for each training, models down."""
    names = {key: NAMES["trainings"][key] for key in ("before", "dual_reward", "answers")}
    figure, made = draw.blocks(long, 1, 3, across=1, height=0.55 + 0.17 * len(names), sharey=True)
    y = np.arange(len(names))[::-1]
    for model, result, ((exact, removed, followed),) in made:
        color = draw.look(model, list(long))["color"]
        after = (result["main"], result["arms"]["answer_only"])
        answers = [dual[model]["before"]["answers"]["exact"], *(arm["answers"]["exact"] for arm in after)]
        dots(exact, answers, y, marker="D", face=color, edge=color)
        reading = [result["reading_before"], result["main"]["reading"]]
        interchanged = [read["interchange"]["followed"] for read in reading]
        for part, marker, face, shift in (("words", "o", color, 0.15), ("random", "s", "white", -0.15)):
            for axis, found in ((removed, reading), (followed, interchanged)):
                dots(axis, [read[part] for read in found], y[:2] + shift, marker=marker, face=face, edge=color)
        for axis in (removed, followed):
            axis.text(0.02, y[2], "not read", color="0.4", va="center", transform=axis.get_yaxis_transform())
        removed.axvline(0, color=PALE, lw=0.6, zorder=0)
        removed.autoscale(axis="x")
        removed.xaxis.set_major_locator(AutoLocator())
        removed.xaxis.set_major_formatter(ScalarFormatter())
        exact.set_yticks(y, names.values())
        exact.set_ylim(-0.6, len(names) - 0.4)
    for axis, label in zip(made[-1][2][0], COST, strict=True):
        axis.set_xlabel(label)
    return draw.key(figure, {
        "the operation words' directions": {"color": INK, "ls": "", "marker": "o"},
        "random directions": {"color": INK, "ls": "", "marker": "s", "mfc": "white"},
    })  # fmt: skip


@draw.figure("sample_efficiency")
def sample_efficiency(grid: Results) -> Figure:
    """The word on top, on held-out operands, by how many distinct problems were trained on and how fast."""
    rows = {style: f"{style}: word on top" for style in ("symbol", "story")}
    figure, panels = draw.by_model(grid, rows, height=3.2, xlabel="distinct problems", sharey=True)
    for axis, style, result in panels:
        cells, color = list(result["cells"].values()), draw.look(result["model"], list(grid))["color"]
        rates = dict(zip(sorted({cell["learning_rate"] for cell in cells}), ("-", "--", ":"), strict=False))
        for rate, ls in rates.items():
            row = sorted((c for c in cells if c["learning_rate"] == rate), key=lambda cell: cell["problems"])
            tops = [cell[style]["top"] for cell in row]
            line(axis, [top["value"] for top in tops], [top["interval"] for top in tops],
                 x=[cell["problems"] for cell in row], color=color, ls=ls)  # fmt: skip
        axis.set(xscale="log", ylim=(-0.03, 1.03), xticks=[cell["problems"] for cell in row])
        axis.set_xticks([cell["problems"] for cell in row], [str(cell["problems"]) for cell in row])
        axis.minorticks_off()
    return draw.key(figure, {f"learning rate {rate:g}": {"color": INK, "ls": ls} for rate, ls in rates.items()})


@draw.figure("lora_sft", "cot_alignment")
def fine_tuning_depth(plain: Results, chain: Results) -> Figure:
    """Mean alignment over depth: plain fine-tuning by step, and training with and without a word before the answer."""
    rows = {"plain": "plain fine-tuning\nmean alignment", "format": "by what is trained on\nmean alignment"}
    figure, panels = draw.by_model(plain, rows, height=3.6, sharey=True)
    models = [model for model in plain for _ in rows]
    looks = {"before": "before", "direct": "answers", "chain_of_thought": "chain_of_thought"}
    for (axis, row, result), model in zip(panels, models, strict=True):
        draw.alignment_axis(axis, FLOOR)
        if row == "plain":
            _by_step(axis, result)
            continue
        for key, name in looks.items():
            runs = chain[model][key].get("by_seed", [chain[model][key]])
            means, ends = ([run["alignment"]["by_layer"][part] for run in runs] for part in ("mean", "interval"))
            seeds_line(axis, means, ends, **draw.training(name))
    formats = {NAMES["training_formats"][key]: draw.training(name) for key, name in looks.items()}
    return draw.key(figure, {"plain fine-tuning, late steps darker": {"color": INK}, **formats})


def _by_step(axis: Any, result: Result) -> None:
    for i, point in enumerate(result["by_step"]):
        shade = 0.75 * (1 - i / max(1, len(result["by_step"]) - 1))
        line(axis, point["by_layer"], color=f"{shade:.2f}", ls="-" if i else ":")


@draw.figure("cot_alignment")
def fine_tuning_answers(chain: Results) -> Figure:
    """Right answers before and after fine-tuning: on held-out operands, and on the nine prompts of the write-up."""
    formats = NAMES["training_formats"]
    y = np.arange(len(formats))[::-1]
    figure, made = draw.blocks(chain, height=1.2, sharey=True)
    for i, (model, result, block) in enumerate(made):
        axis, color = block[0, 0], draw.look(model, list(chain))["color"]
        many = [result[key]["answers"]["exact"] for key in formats]
        nine = [result[key]["reported"]["answers"] for key in formats]
        dots(axis, many, y + 0.15, marker="o", face=color, edge=color)
        dots(axis, nine, y - 0.15, marker="s", face="white", edge=color)
        axis.set(xlabel="right answers", ylim=(-0.5, len(formats) - 0.5))
        if i % draw.ACROSS == 0:
            axis.set_yticks(y, formats.values())
    return draw.key(figure, {
        "held-out operands": {"color": INK, "ls": "", "marker": "o"},
        "the originals' prompts": {"color": INK, "ls": "", "marker": "s", "mfc": "white"},
    })  # fmt: skip


@draw.figure("other_tasks")
def other_tasks(other: Results) -> Figure:
    """Probe and lens over depth, tasks down and models across; beside them what the lens says after dual reward."""
    rows = {task: f"{task}\nright class" for task in NAMES["other_tasks"]}
    figure, panels = draw.by_model(other, rows, height=1.6 * len(rows), sharey=True)
    for axis, task, result in panels:
        found, layers = result[task], result["layers"]
        color = draw.look(result["model"], list(other))["color"]
        looks = (("-", "o", color, -0.012), ("--", "s", "white", 0.012))
        for part, (ls, marker, face, shift) in zip(NAMES["held_out"], looks, strict=True):
            curve = found["probing"][part]
            line(axis, curve["accuracy"], curve["interval"], alpha=0.12, color=color, ls=ls)
            axis.axhline(curve["bag_of_tokens"]["accuracy"], color="0.4", ls=ls, lw=0.6)
            choice = found["dual_reward"][part]["choice"]
            bars = np.abs(np.subtract(choice["interval"], choice["value"]))[:, None]
            x = layers.index(result["layer"]) + shift * len(layers)
            purple = draw.training("dual_reward")["color"]
            filled = purple if face == color else "white"
            axis.errorbar(x, choice["value"], yerr=bars, fmt=marker, ms=4, mfc=filled, mec=purple, ecolor=purple,
                          elinewidth=0.9)  # fmt: skip
        line(axis, found["lens"]["choice"]["accuracy"], **draw.training("before"))
        axis.axhline(1 / len(found["classes"]), color="0.8", lw=0.6, zorder=0)
        axis.set_ylim(0, 1.04)
    purple = draw.training("dual_reward")["color"]
    return draw.key(figure, {
        "probe, groups held out": {"color": INK}, "probe, templates held out": {"color": INK, "ls": "--"},
        "token counts (likewise)": {"color": "0.4", "lw": 0.6}, "lens before training": draw.training("before"),
        "lens after dual reward, groups": {"color": purple, "ls": "", "marker": "o"},
        "lens after dual reward, templates": {"color": purple, "ls": "", "marker": "s", "mfc": "white"},
    })  # fmt: skip
