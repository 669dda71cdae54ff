"""Figures of mixtures of experts; see ``figures``. Results are those of stage moe_routers."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report.figures.arithmetic import STYLE, WIDTH, Results, layer_axis

Projections = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Model -> what its routers were when they were read ("fresh", "trained") -> what was read."""
FLOOR = 1e-16
"""Of alignments on a logarithmic axis; what lies below is drawn on it."""


def router_maxima(read: Projections) -> Figure:
    """What every expert's row says at most, by layer, beside what random rows say."""
    panels = (
        ("reported", "largest cosine"),
        ("controlled", "largest z-score, gains folded in"),
        ("coherence", "coherence of top tokens"),
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.4 + 2.0 * len(read)), layout="constrained")
        axes = figure.subplots(len(read), len(panels), squeeze=False)
        for row, (model, phases) in zip(axes, read.items(), strict=True):
            for axis, (part, label) in zip(row, panels, strict=True):
                last = list(phases.values())[-1]["projection"]
                null = last[part]
                axis.axhspan(null["null_mean"], null["null_95"], color="0.85", lw=0, label="random rows, mean to 95 %")
                axis.axhline(null["null_largest"], color="0.5", ls=":", lw=0.9, label="largest of the random rows")
                if part == "reported":
                    expected = last["expected_max_cosine"]
                    axis.axhline(expected, color="0.3", ls="--", lw=0.9, label="√(2 ln V / d)")
                for i, (name, result) in enumerate(phases.items()):
                    values = np.array(result["projection"][part]["value"])
                    trained = i == len(phases) - 1
                    x = np.repeat(np.arange(len(values)) + (0.2 if trained else -0.2), values.shape[1])
                    axis.plot(x, values.ravel(), ls="", marker="o", ms=1.8, mfc="0.0" if trained else "white",
                              mec="0.0" if trained else "0.5", mew=0.4, label=f"{name} routers")  # fmt: skip
                axis.set_ylabel(label)
                layer_axis(axis, last["layers"], margin=0.8)
            row[0].set_title(model, loc="left")
        for axis in axes[-1]:
            axis.set_xlabel("layer")
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=3)
    return figure


def routing_load(moe: Results) -> Figure:
    """Share of all tokens that each expert gets at each layer, before and after routers were trained (first seed)."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.35 + 1.15 * len(moe)), layout="constrained")
        axes = figure.subplots(len(moe), 2, squeeze=False, sharey="row")
        images = []
        for row, (model, result) in zip(axes, moe.items(), strict=True):
            run = result["mixtures"][0]
            loads = [np.array(run[when]["routing"]["usage"]["load"]).T for when in ("before", "after")]
            for axis, load, name in zip(row, loads, ("fresh routers", "trained routers"), strict=True):
                images.append(
                    axis.imshow(load, aspect="auto", cmap="cividis", vmin=0, vmax=max(map(np.max, loads)),
                                interpolation="nearest")
                )  # fmt: skip
                axis.set_title(f"{model}: {name}", loc="left")
                layer_axis(axis, run["after"]["routing"]["layers"], margin=0.5)
            row[0].set_yticks(range(len(result["experts"])), result["experts"])
            figure.colorbar(images[-1], ax=list(row), pad=0.01, label="share of tokens")
        for axis in axes[-1]:
            axis.set_xlabel("layer")
    return figure


def routing_domains(moe: Results) -> Figure:
    """Share of each domain's tokens that every expert gets, before and after routers were trained.

    Means over layers and seeds.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.35 + 2.1 * len(moe)), layout="constrained")
        axes = figure.subplots(len(moe), 2, squeeze=False, sharey="row")
        for row, (model, result) in zip(axes, moe.items(), strict=True):
            names = result["experts"]
            found = [
                np.mean([run[when]["routing"]["by_domain"] for run in result["mixtures"]], axis=(0, 2))
                for when in ("before", "after")
            ]
            top = max(map(np.max, found))
            for axis, shares, name in zip(row, found, ("fresh routers", "trained routers"), strict=True):
                image = axis.imshow(shares, aspect="auto", cmap="cividis", vmin=0, vmax=top, interpolation="nearest")
                for (i, j), share in np.ndenumerate(shares):
                    axis.text(j, i, f"{100 * share:.0f}", ha="center", va="center",
                              color="white" if share < top / 2 else "black")  # fmt: skip
                axis.set_title(f"{model}: {name}", loc="left")
                axis.set_xticks(range(len(names)), names)
                axis.set_xlabel("expert")
            row[0].set_yticks(range(len(names)), names)
            row[0].set_ylabel("domain of the text")
            figure.colorbar(image, ax=list(row), pad=0.01, label="share of tokens")
    return figure


def routing_layers(moe: Results) -> Figure:
    """What experts go by, layer by layer: the text's domain, the prompt's operation, and the context of a token."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.4 + 1.9 * len(moe)), layout="constrained")
        axes = figure.subplots(len(moe), 3, squeeze=False)
        for (told, own, context), (model, result) in zip(axes, moe.items(), strict=True):
            runs = result["mixtures"]
            labels = runs[0]["after"]["routing"]["layers"]
            for when, name, ls, shade in (
                ("before", "fresh routers", "--", "0.5"),
                ("after", "trained routers", "-", "0.0"),
            ):
                routings = [run[when]["routing"] for run in runs]
                _over_seeds(told, [r["domain"]["share"] for r in routings], ls, shade, name)
                _over_seeds(context, [r["context"]["change"] for r in routings], ls, shade, name)
                for style, mark in (("symbol", ""), ("word", "s")):
                    _over_seeds(own, [r["prompts"][style]["own_share"] for r in routings], ls, shade, name, mark)
            routings = [run["after"]["routing"] for run in runs]
            context.plot(np.mean([r["context"]["other_tokens"] for r in routings], axis=0), color="0.3", ls=":",
                         label="another token")  # fmt: skip
            context.plot(np.mean([r["context"]["repeated"] for r in routings], axis=0), color="0.3", ls="-.", lw=0.7,
                         label="the same context again")  # fmt: skip
            own.plot([], [], color="0.0", ls="", marker="s", ms=2, label="word prompts")
            own.axhline(routings[0]["prompts"]["symbol"]["chance"], color="0.7", lw=0.6)
            told.axhline(0, color="0.7", lw=0.6)
            told.set_title(model, loc="left")
            told.set_ylabel("part of the domain told")
            own.set_ylabel("share of the own expert")
            context.set_ylabel("experts changed by context")
            for axis in (own, context):
                axis.set_ylim(-0.03, 1.03)
            for axis in (told, own, context):
                layer_axis(axis, labels)
                axis.set_xlabel("layer")
        entries = {
            name: handle for axis in axes[0] for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=len(entries))
    return figure


def mixture_lens(moe: Results) -> Figure:
    """Alignment and probe accuracy over depth: the base model, experts under a fresh router, mixture, dense twin."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.4 + 3.2 * len(moe)), layout="constrained")
        axes = figure.subplots(2 * len(moe), 2, squeeze=False, sharey="row")
        for i, (model, result) in enumerate(moe.items()):
            runs = {
                "base": [result["base"]],
                "fresh routers": [run["before"] for run in result["mixtures"]],
                "mixture": [run["after"] for run in result["mixtures"]],
                "dense twin": [run["after"] for run in result["twins"]],
            }
            looks = (("0.6", ":"), ("0.5", "-."), ("0.0", "-"), ("0.3", "--"))
            for j, style in enumerate(("symbol", "word")):
                lens, probe = axes[2 * i, j], axes[2 * i + 1, j]
                for (name, found), (shade, ls) in zip(runs.items(), looks, strict=True):
                    curves = [np.clip(run["lens"][style]["alignment"], FLOOR, None) for run in found]
                    _over_seeds(lens, curves, ls, shade, name)
                    _over_seeds(probe, [run["probe"][style]["accuracy"] for run in found], ls, shade, name)
                lens.set_yscale("log")
                lens.set_ylim(FLOOR, 2)
                probe.set_ylim(0, 1.04)
                probe.axhline(1 / 4, color="0.7", lw=0.6)
                lens.set_title(f"{model}: {style} prompts", loc="left")
                for axis in (lens, probe):
                    axis.axvline(result["layers"].index(result["depth_layer"]), color="0.8", lw=0.6)
                    layer_axis(axis, result["layers"])
            axes[2 * i, 0].set_ylabel("mean alignment")
            axes[2 * i + 1, 0].set_ylabel("probe accuracy")
        for axis in axes[-1]:
            axis.set_xlabel("layer")
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(names))
    return figure


def _over_seeds(axis: Axes, curves: Sequence[Any], ls: str, shade: str, label: str, mark: str = "") -> None:
    """Mean over seeds, and a band from the least to the largest."""
    values = np.array(curves)
    x = np.arange(values.shape[1])
    axis.plot(x, values.mean(0), color=shade, ls=ls, marker=mark, ms=2, markevery=3, label=label)
    if len(values) > 1:
        axis.fill_between(x, values.min(0), values.max(0), color=shade, alpha=0.15, lw=0)
