"""Figures of the models as they are published: probes and the lens over depth."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from classifier_emergence.reading.layers import layer_row
from classifier_emergence.tasks.arithmetic import STYLES
from experiments.report.figures.drawing import (
    Results,
    alignment_axis,
    heat_map,
    layer_axis,
    legend,
    line,
    name_columns,
    panels,
)

FLOOR = 1e-12
"""Of alignments on a logarithmic axis."""


def _style_by_model(results: Results, quantity: str) -> tuple[Figure, Any]:
    """Panels: styles of prompts down, models across."""
    figure, grid = panels(len(STYLES), len(results), height=5.2, sharey=True)
    name_columns(grid, results)
    for row, style in zip(grid, STYLES, strict=True):
        row[0].set_ylabel(f"{style} prompts\n{quantity}")
    return figure, grid


def probe_depth(probing: Results) -> Figure:
    """Probe accuracy over depth: styles down, models across, the reported protocol beside the controlled one."""
    figure, grid = _style_by_model(probing, "accuracy")
    for row, style in zip(grid, STYLES, strict=True):
        for axis, result in zip(row, probing.values(), strict=True):
            reported, controlled = result["reported"], result["controlled"][style]
            if style in reported:
                rows = np.arange(len(result["layers"]))[layer_row(0) :]
                line(axis, np.array(reported[style]["accuracy"])[rows], x=rows, color="0.45", ls=":", marker=".", ms=3,
                     lw=0.8, label="reported protocol, n = 16")  # fmt: skip
            for split, ls, shade in (("held_out_operands", "-", "0.0"), ("held_out_templates", "--", "0.3")):
                curve, label = controlled[split], f"controlled, {split.replace('_', ' ')}"
                line(axis, curve["accuracy"], curve["interval"], color=shade, ls=ls, label=label)
            bag = controlled["held_out_templates"]["bag_of_tokens"]["accuracy"]
            axis.axhline(bag, color="0.3", ls=(0, (1, 3)), lw=0.9, label="bag of tokens, held out templates")
            axis.axhline(0.25, color="0.7", lw=0.6, zorder=0)
            axis.set_ylim(0, 1.04)
            layer_axis(axis, result["layers"])
    legend(figure, grid[0, 0])
    return figure


def alignment_null(logit_lens: Results) -> Figure:
    """Mean alignment of the operation word over depth, against other words of the same unembedding norm."""
    figure, grid = _style_by_model(logit_lens, "mean alignment")
    for row, style in zip(grid, STYLES, strict=True):
        for axis, result in zip(row, logit_lens.values(), strict=True):
            word, synonyms = (result["controlled"][style][key] for key in ("word", "synonyms"))
            null = {name: np.clip(word["null"][f"alignment_{name}"], FLOOR, None) for name in ("median", "95", "max")}
            axis.fill_between(np.arange(len(null["max"])), null["median"], null["95"], color="0.85", lw=0,
                              label="null words, median to 95 %")  # fmt: skip
            line(axis, null["max"], color="0.6", ls=":", label="largest null word")
            line(axis, word["alignment"], word["interval"], floor=FLOOR, alpha=0.25, color="0.0",
                 label="operation word")  # fmt: skip
            line(axis, synonyms["alignment"], floor=FLOOR, color="0.35", ls="--", lw=0.8, label="synonyms")
            alignment_axis(axis, FLOOR)
            layer_axis(axis, result["layers"])
    legend(figure, grid[0, 0])
    return figure


def lens_heatmap(logit_lens: Results) -> Figure:
    """Alignment of each prompt's operation word by layer, for the originals' eight prompts."""
    figure, grid = panels(len(logit_lens), 1, height=0.35 + 1.35 * len(logit_lens))
    for axis, (model, result) in zip(grid[:, 0], logit_lens.items(), strict=True):
        reported = result["reported"]
        values = np.log10(np.clip(np.transpose(reported["alignment"]), FLOOR, None))
        image = heat_map(axis, values, vmin=np.log10(FLOOR), vmax=0)
        axis.set_yticks(range(len(reported["prompts"])), [entry["prompt"] for entry in reported["prompts"]])
        axis.set_title(model, loc="left")
        layer_axis(axis, result["layers"], margin=0.5)
        for side in (-0.5, 0.5):  # of the layer that the originals read
            axis.axvline(result["layers"].index(reported["layer"]) + side, color="w", lw=0.6)
    figure.colorbar(image, ax=list(grid[:, 0]), shrink=0.6, pad=0.01, label="alignment, log₁₀")
    return figure
