"""Figures of the models as they are published: probes and the lens over depth."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from classifier_emergence.reading.layers import layer_row
from classifier_emergence.tasks.arithmetic import STYLES
from experiments.report.figures import draw
from experiments.report.figures.draw import Results, band, line

FLOOR = 1e-12
"""Of alignments on a logarithmic axis."""


@draw.figure("probing")
def probe_depth(probing: Results) -> Figure:
    """Probe accuracy over depth: styles down, models across, the reported protocol beside the controlled one."""
    rows = {style: f"{style} prompts\naccuracy" for style in STYLES}
    figure, panels = draw.by_model(probing, rows, height=5.2, sharey=True)
    for axis, style, result in panels:
        controlled = result["controlled"][style]
        if style in result["reported"]:
            reported, first = result["reported"][style], layer_row(0)
            look: Any = {"ls": ":", "marker": ".", "ms": 3, "lw": 0.8, "x": range(first, len(reported["accuracy"]))}
            line(axis, reported["accuracy"][first:], label="reported protocol, n = 16", color="0.45", **look)
            line(axis, reported["optimum"]["accuracy"][first:], label="the same, converged", color="0.75", **look)
        for split, ls, shade in (("held_out_operands", "-", "0.0"), ("held_out_templates", "--", "0.3")):
            curve, name = controlled[split], split.replace("_", " ")
            line(axis, curve["accuracy"], curve["interval"], color=shade, ls=ls, label=f"controlled, {name}")
        bag = controlled["held_out_templates"]["bag_of_tokens"]["accuracy"]
        axis.axhline(bag, color="0.3", ls=(0, (1, 3)), lw=0.9, label="bag of tokens, held out templates")
        axis.axhline(0.25, color="0.7", lw=0.6, zorder=0)
        axis.set_ylim(0, 1.04)
    return draw.legend(figure)


@draw.figure("logit_lens")
def alignment_null(lens: Results) -> Figure:
    """Mean alignment of the operation word over depth, against other words of the same unembedding norm."""
    rows = {style: f"{style} prompts\nmean alignment" for style in STYLES}
    figure, panels = draw.by_model(lens, rows, height=5.2, sharey=True)
    for axis, style, result in panels:
        word, synonyms = (result["controlled"][style][key] for key in ("word", "synonyms"))
        median, upper, largest = (word["null"][f"alignment_{name}"] for name in ("median", "95", "max"))
        draw.alignment_axis(axis, FLOOR)
        band(axis, median, upper, color="0.85", label="null words, median to 95 %")
        line(axis, largest, color="0.6", ls=":", label="largest null word")
        line(axis, word["alignment"], word["interval"], alpha=0.25, color="0.0", label="operation word")
        line(axis, synonyms["alignment"], color="0.35", ls="--", lw=0.8, label="synonyms")
    return draw.legend(figure)


@draw.figure("logit_lens")
def lens_heatmap(lens: Results) -> Figure:
    """Alignment of each prompt's operation word by layer, for the originals' eight prompts."""
    figure, grid = draw.panels(len(lens), 1, height=0.35 + 1.35 * len(lens))
    for axis, (model, result) in zip(grid.flat, lens.items(), strict=True):
        reported, layers = result["reported"], result["layers"]
        values = np.log10(np.clip(np.transpose(reported["alignment"]), FLOOR, None))
        image = draw.heat_map(axis, values, vmin=np.log10(FLOOR), vmax=0)
        axis.set_yticks(range(len(reported["prompts"])), [entry["prompt"] for entry in reported["prompts"]])
        axis.set_title(model, loc="left")
        draw.layer_axis(axis, layers, margin=0.5)
        for side in (-0.5, 0.5):  # of the layer that the originals read
            axis.axvline(layers.index(reported["layer"]) + side, color="w", lw=0.6)
    figure.colorbar(image, ax=list(grid.flat), shrink=0.6, pad=0.01, label="alignment, log₁₀")
    return figure
