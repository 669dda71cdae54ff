"""The paper's figures, drawn from results alone: same results, same bytes. Line styles carry what colours would."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from classifier_emergence.results import write_bytes_atomic

Results = Mapping[str, Mapping[str, Any]]
"""Model -> result of one stage."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "svg.hashsalt": "classifier-emergence",  # ids in the SVG are random without it
    "savefig.dpi": 200,
}
"""Settings of matplotlib for every figure of the paper."""
WIDTH = 6.3
"""Of the paper's text, in inches."""
_STYLES = ("symbol", "word", "story")


def save(figure: Figure, stem: Path) -> None:
    """Write ``stem.svg`` and ``stem.png`` atomically, without dates or versions in them."""
    metadata: dict[str, dict[str, Any]] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}
    for ending, entries in metadata.items():
        buffer = io.BytesIO()
        with mpl.rc_context(STYLE):
            figure.savefig(buffer, format=ending, metadata=entries)
        write_bytes_atomic(stem.parent / f"{stem.name}.{ending}", buffer.getvalue())


def probe_depth(probing: Results) -> Figure:
    """Probe accuracy over depth: styles down, models across, the reported protocol beside the controlled one."""
    with mpl.rc_context(STYLE):
        figure, axes = _grid(probing, height=5.2)
        for (style, model), axis in axes.items():
            result = probing[model]
            x = np.arange(len(result["layers"]))
            if style in result["reported"]:
                axis.plot(x[1:], result["reported"][style]["accuracy"][1:], color="0.45", ls=":", marker=".", ms=3,
                          lw=0.8, label="reported protocol, n = 16")  # fmt: skip
            for split, ls, shade in (("held_out_operands", "-", "0.0"), ("held_out_templates", "--", "0.3")):
                curve = result["controlled"][style][split]
                low, high = np.transpose(curve["interval"])
                label = f"controlled, {split.replace('_', ' ')}"
                axis.plot(x, curve["accuracy"], color=shade, ls=ls, label=label)
                axis.fill_between(x, low, high, color=shade, alpha=0.15, lw=0)
            bag = result["controlled"][style]["held_out_templates"]["bag_of_tokens"]["accuracy"]
            axis.axhline(bag, color="0.3", ls=(0, (1, 3)), lw=0.9, label="bag of tokens, held out templates")
            axis.axhline(0.25, color="0.7", lw=0.6, zorder=0)
            axis.set_ylim(0, 1.04)
            layer_axis(axis, result["layers"])
        for style in _STYLES:
            axes[style, next(iter(probing))].set_ylabel(f"{style} prompts\naccuracy")
        legend(figure, axes["symbol", next(iter(probing))])
    return figure


def alignment_null(logit_lens: Results) -> Figure:
    """Mean alignment of the operation word over depth, against other words of the same unembedding norm."""
    with mpl.rc_context(STYLE):
        figure, axes = _grid(logit_lens, height=5.2)
        for (style, model), axis in axes.items():
            result = logit_lens[model]
            word = result["controlled"][style]["word"]
            x = np.arange(len(result["layers"]))
            low, high = np.clip(np.transpose(word["interval"]), 1e-12, None)
            null = {name: np.clip(word["null"][f"alignment_{name}"], 1e-12, None) for name in ("median", "95", "max")}
            axis.fill_between(x, null["median"], null["95"], color="0.85", lw=0, label="null words, median to 95 %")
            axis.plot(x, null["max"], color="0.6", ls=":", label="largest null word")
            axis.plot(x, np.clip(word["alignment"], 1e-12, None), color="0.0", label="operation word")
            axis.fill_between(x, low, high, color="0.0", alpha=0.25, lw=0)
            synonyms = np.clip(result["controlled"][style]["synonyms"]["alignment"], 1e-12, None)
            axis.plot(x, synonyms, color="0.35", ls="--", lw=0.8, label="synonyms")
            axis.set_yscale("log")
            axis.set_ylim(1e-12, 2)
            layer_axis(axis, result["layers"])
        for style in _STYLES:
            axes[style, next(iter(logit_lens))].set_ylabel(f"{style} prompts\nmean alignment")
        legend(figure, axes["symbol", next(iter(logit_lens))])
    return figure


def lens_heatmap(logit_lens: Results) -> Figure:
    """Alignment of each prompt's operation word by layer, for the originals' eight prompts."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.35 + 1.35 * len(logit_lens)), layout="constrained")
        panels = figure.subplots(len(logit_lens), 1, squeeze=False)[:, 0]
        for axis, (model, result) in zip(panels, logit_lens.items(), strict=True):
            reported = result["reported"]
            values = np.log10(np.clip(np.transpose(reported["alignment"]), 1e-12, None))
            image = axis.imshow(values, aspect="auto", cmap="cividis", vmin=-12, vmax=0, interpolation="nearest")
            axis.set_yticks(range(len(reported["prompts"])), [entry["prompt"] for entry in reported["prompts"]])
            axis.set_title(model, loc="left")
            layer_axis(axis, result["layers"], margin=0.5)
            # The layer that the originals read.
            row = result["layers"].index(reported["layer"])
            axis.axvline(row - 0.5, color="w", lw=0.6)
            axis.axvline(row + 0.5, color="w", lw=0.6)
        bar = figure.colorbar(image, ax=list(panels), shrink=0.6, pad=0.01)
        bar.set_label("alignment, log₁₀")
    return figure


def dual_reward_steps(dual: Results) -> Figure:
    """Alignment by layer and step of the main arm, beside its losses."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.75 * len(dual)), layout="constrained")
        panels = figure.subplots(len(dual), 2, squeeze=False, width_ratios=(1.6, 1))
        for (heat, line), (model, result) in zip(panels, dual.items(), strict=True):
            watched = result["main"]["watched"]
            values = np.array([entry["by_layer"] for entry in watched]).T
            steps = [entry["step"] for entry in watched]
            half = (steps[1] - steps[0]) / 2
            image = heat.imshow(
                values, aspect="auto", origin="lower", cmap="cividis", vmin=0, vmax=1, interpolation="nearest",
                extent=(-half, steps[-1] + half, -0.5, len(values) - 0.5),
            )  # fmt: skip
            labels = result["layers"]
            ticks = sorted({0, labels.index(result["layer"]), len(labels) - 1})
            heat.set_yticks(ticks, [labels[i] for i in ticks])
            heat.set_title(model, loc="left")
            for name, ls, shade in (("class_loss", "-", "0.0"), ("answer_loss", "--", "0.35")):
                losses = result["main"]["losses"]
                line.plot([e["step"] for e in losses], [e[name] for e in losses], ls=ls, color=shade,
                          label=f"{name.split('_')[0]} loss")  # fmt: skip
            line.set_yscale("log")
            line.set_ylabel("loss, nats")
            line.set_xlim(0, steps[-1])
        for axis in panels[-1]:
            axis.set_xlabel("step")
        panels[0, 1].legend(loc="upper right")
        bar = figure.colorbar(image, ax=list(panels[:, 0]), shrink=0.7, pad=0.01)
        bar.set_label("alignment")
    return figure


def dual_reward_arms(dual: Results, names: Mapping[str, str]) -> Figure:
    """What each arm makes (top token on held-out symbols and on words) and costs (exact answers)."""
    arms = [key for key in names if all(key in result["arms"] for result in dual.values())]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.17 * len(arms)), layout="constrained")
        panels = figure.subplots(1, 2 * len(dual), sharey=True, squeeze=False)[0]
        y = np.arange(len(arms))[::-1]
        for i, (model, result) in enumerate(dual.items()):
            lens, answers = panels[2 * i], panels[2 * i + 1]
            for key, marker, face, shift, label in (
                ("symbol", "o", "0.0", 0.15, "symbols"), ("word", "s", "white", -0.15, "words"),
            ):  # fmt: skip
                _dots(lens, [result["arms"][arm][key]["top"] for arm in arms], y + shift, marker, face, label)
            _dots(answers, [result["arms"][arm]["answers"]["exact"] for arm in arms], y, "o", "0.0", "after training")
            answers.axvline(result["before"]["answers"]["exact"]["accuracy"], color="0.5", ls=":", label="before")
            lens.set_title(model, loc="left")
            lens.set_xlabel("lens says the word")
            answers.set_xlabel("exact answers")
            for axis in (lens, answers):
                axis.set_xlim(-0.03, 1.03)
                axis.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        panels[0].set_yticks(y, [names[arm] for arm in arms])
        handles, labels = panels[0].get_legend_handles_labels()
        more, others = panels[1].get_legend_handles_labels()
        figure.legend(handles + more, labels + others, loc="outside upper center", ncols=4)
    return figure


def fine_tuning_depth(plain: Results, chain: Results, names: Mapping[str, str]) -> Figure:
    """Mean alignment over depth: plain fine-tuning by step, and training with and without a word before the answer."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        panels = figure.subplots(2, len(plain), sharey=True, squeeze=False)
        for (above, below), model in zip(panels.T, plain, strict=True):
            labels = plain[model]["layers"]
            x = np.arange(len(labels))
            points = plain[model]["by_step"]
            for i, point in enumerate(points):
                shade, ls = f"{0.75 * (1 - i / (len(points) - 1)):.2f}", ":" if i == 0 else "-"
                above.plot(x, np.clip(point["by_layer"], 1e-9, None), color=shade, ls=ls, label=f"step {point['step']}")
            for (key, name), ls, shade in zip(names.items(), (":", "--", "-"), ("0.5", "0.3", "0.0"), strict=True):
                result = chain[model][key]
                curves = [run["alignment"]["by_layer"] for run in result.get("by_seed", [result])]
                ends = np.array([curve["interval"] for curve in curves])
                below.plot(x, np.clip(np.mean([c["mean"] for c in curves], axis=0), 1e-9, None), color=shade, ls=ls,
                           label=name)  # fmt: skip
                low, high = ends[..., 0].min(0), ends[..., 1].max(0)
                below.fill_between(x, np.clip(low, 1e-9, None), high, color=shade, alpha=0.15, lw=0)
            above.set_title(model)
            for axis in (above, below):
                axis.set_yscale("log")
                axis.set_ylim(1e-9, 2)
                layer_axis(axis, labels)
        for axis, name in zip(panels[:, 0], ("plain fine-tuning", "by what is trained on"), strict=True):
            axis.set_ylabel(f"{name}\nmean alignment")
            axis.legend(loc="upper left", fontsize=6)
    return figure


def fine_tuning_answers(chain: Results, names: Mapping[str, str]) -> Figure:
    """Right answers before and after fine-tuning: on held-out operands, and on the nine prompts of the write-up."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.5), layout="constrained")
        panels = figure.subplots(1, len(chain), sharey=True, squeeze=False)[0]
        y = np.arange(len(names))[::-1]
        for axis, (model, result) in zip(panels, chain.items(), strict=True):
            many, nine = [], []
            for key in names:
                found = result[key]
                if "by_seed" in found:
                    many.append(found["answers"]["exact"])
                    nine.append(found["reported"]["answers"])
                else:
                    tallies = found["answers"]["exact"], found["reported"]["answers"]
                    many.append({**tallies[0], "value": tallies[0]["accuracy"]})
                    nine.append({**tallies[1], "value": tallies[1]["accuracy"]})
            _dots(axis, many, y + 0.15, "o", "0.0", f"held-out operands, n = {many[0]['n']}")
            _dots(axis, nine, y - 0.15, "s", "white", f"the originals' prompts, n = {nine[0]['n']}")
            axis.set_title(model, loc="left")
            axis.set_xlim(-0.03, 1.03)
            axis.set_xticks([0, 0.5, 1], ["0", "½", "1"])
            axis.set_xlabel("right answers")
        panels[0].set_yticks(y, list(names.values()))
        panels[0].set_ylim(-0.5, len(names) - 0.5)
        legend(figure, panels[0])
    return figure


def _dots(axis: Axes, items: Sequence[Mapping[str, Any]], y: Any, marker: str, face: str, label: str) -> None:
    values = np.array([item["value"] for item in items])
    low, high = np.array([item["interval"] for item in items]).T
    bars = np.clip([values - low, high - values], 0, None)
    axis.errorbar(
        values, y, xerr=bars, fmt=marker, ms=3, mfc=face, mec="0.0", ecolor="0.4", elinewidth=0.7, label=label
    )


def _grid(results: Results, *, height: float) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(len(_STYLES), len(results), sharey=True, squeeze=False)
    axes = {(style, model): panels[i, j] for i, style in enumerate(_STYLES) for j, model in enumerate(results)}
    for model in results:
        axes["symbol", model].set_title(model)
        axes["story", model].set_xlabel("layer")
    return figure, axes


def layer_axis(axis: Axes, labels: Sequence[str], *, margin: float = 0.2) -> None:
    """Name some rows of a residual stream along an axis."""
    ticks = [0, *range(1, len(labels), max(1, round(len(labels) / 5)))]
    if len(ticks) > 2 and ticks[1] - ticks[0] < ticks[2] - ticks[1]:
        ticks.pop(1)  # emb and L0 would overlap
    axis.set_xticks(ticks, [labels[i] for i in ticks])
    axis.set_xlim(-margin, len(labels) - 1 + margin)


def legend(figure: Figure, axis: Axes) -> None:
    """One legend above the figure, of the lines of one panel."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3)
