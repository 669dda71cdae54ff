"""Figures of the models as they are published: probes and the lens over depth."""

import numpy as np
from matplotlib.figure import Figure

from classifier_emergence.reading.layers import layer_row
from classifier_emergence.tasks.arithmetic import STYLES
from experiments.report.figures import draw
from experiments.report.figures.draw import INK, PALE, Results, band, line

FLOOR = 1e-12
"""Of alignments on a logarithmic axis."""


@draw.figure("probing")
def probe_depth(probing: Results) -> Figure:
    """Probe accuracy over depth: styles down, models across, the reported protocol beside the controlled one."""
    rows = {style: f"{style} prompts\naccuracy" for style in STYLES}
    figure, panels = draw.by_model(probing, rows, height=4.4, sharey=True)
    for axis, style, result in panels:
        color = draw.look(result["model"], list(probing))["color"]
        controlled = result["controlled"][style]
        if style in result["reported"]:
            reported, first = result["reported"][style], layer_row(0)
            for found, shade in ((reported["optimum"], "0.75"), (reported, "0.4")):
                accuracy = found["accuracy"]
                x = range(first, len(accuracy))
                line(axis, accuracy[first:], x=x, color=shade, ls=":", marker=".", ms=3, lw=0.8)
        for split, ls in (("held_out_operands", "-"), ("held_out_templates", "--")):
            line(axis, controlled[split]["accuracy"], controlled[split]["interval"], color=color, ls=ls)
        bag = controlled["held_out_templates"]["bag_of_tokens"]["accuracy"]
        axis.axhline(bag, color=INK, ls=(0, (1, 2)), lw=0.9)
        axis.axhline(0.25, color=PALE, lw=0.6, zorder=0)
        axis.set_ylim(0, 1.04)
    return draw.key(figure, {
        "as reported, 16 prompts": {"color": "0.4", "ls": ":", "marker": ".", "ms": 3},
        "the same, converged": {"color": "0.75", "ls": ":", "marker": ".", "ms": 3},
        "controlled, operands held out": {"color": INK, "ls": "-"},
        "controlled, templates held out": {"color": INK, "ls": "--"},
        "token counts, templates held out": {"color": INK, "ls": (0, (1, 2))},
    })  # fmt: skip


@draw.figure("logit_lens")
def alignment_null(lens: Results) -> Figure:
    """Mean alignment of the operation word over depth, against other words of the same unembedding norm."""
    rows = {style: f"{style} prompts\nmean alignment" for style in STYLES}
    figure, panels = draw.by_model(lens, rows, height=4.4, sharey=True)
    for axis, style, result in panels:
        color = draw.look(result["model"], list(lens))["color"]
        word, synonyms = (result["controlled"][style][key] for key in ("word", "synonyms"))
        median, upper, largest = (word["null"][f"alignment_{name}"] for name in ("median", "95", "max"))
        draw.alignment_axis(axis, FLOOR)
        band(axis, median, upper, color="0.85")
        line(axis, largest, color="0.6", ls=":")
        line(axis, word["alignment"], word["interval"], alpha=0.25, color=color)
        line(axis, synonyms["alignment"], color=color, ls="--", lw=0.8)
    return draw.key(figure, {
        "operation word": {"color": INK}, "synonyms": {"color": INK, "ls": "--", "lw": 0.8},
        "matched words, median to 95 %": {"color": "0.85", "lw": 5},
        "largest matched word": {"color": "0.6", "ls": ":"},
    })  # fmt: skip


@draw.figure("logit_lens")
def lens_heatmap(lens: Results) -> Figure:
    """Alignment of each prompt's operation word by layer, for the originals' eight prompts."""
    across = 1 if len(lens) <= draw.ACROSS else 2
    figure, made = draw.blocks(lens, across=across, height=1.35)
    for _, result, block in made:
        axis, reported, layers = block[0, 0], result["reported"], result["layers"]
        values = np.log10(np.clip(np.transpose(reported["alignment"]), FLOOR, None))
        image = draw.heat_map(axis, values, vmin=np.log10(FLOOR), vmax=0)
        axis.set_yticks(range(len(reported["prompts"])), [entry["prompt"] for entry in reported["prompts"]])
        draw.layer_axis(axis, layers, margin=0.5)
        for side in (-0.5, 0.5):  # of the layer that the originals read
            axis.axvline(layers.index(reported["layer"]) + side, color="w", lw=0.6)
    figure.colorbar(image, ax=figure.axes, shrink=0.6, pad=0.01, label="alignment, log₁₀")
    return figure
