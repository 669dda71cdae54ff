"""Figures of mixtures of experts: rows of routers, routing in use, and the mixture beside its dense twin."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.report.figures import draw
from experiments.report.figures.draw import Results, line, seeds_line
from experiments.report.names import NAMES, router_readings, short_name, upcycled

FLOOR = 1e-16
"""Of alignments on a logarithmic axis."""
TRAINED, TWIN = "#0072b2", "#e69f00"
"""Colours of trained routers and of the dense twin."""
REPORTED_SCORES, EXPECTED_SCORE = (0.07, 0.11), 0.5
"""Cosines in the write-up: what it finds, and what it would expect of a strong alignment."""
MAXIMA = {
    "reported": "largest cosine", "controlled": "largest z, gains folded in",
    "coherence": "coherence of top tokens",
}  # fmt: skip


@draw.figure("moe_routers")
def router_maxima(moe: Results) -> Figure:
    """What every expert's row says at most, by layer, beside what random rows say."""
    figure, grid = draw.panels(len(moe), len(MAXIMA), height=0.4 + 2.0 * len(moe), xlabel="layer")
    for row, (model, result) in zip(grid, moe.items(), strict=True):
        phases = {name: read["projection"] for name, read in router_readings(result).items()}
        *_, last = phases
        color = draw.look(model, list(moe))["color"]
        for axis, (part, label) in zip(row, MAXIMA.items(), strict=True):
            null = phases[last][part]
            axis.axhspan(null["null_mean"], null["null_95"], color="0.85", lw=0, label="random rows, mean to 95 %")
            axis.axhline(null["null_largest"], color="0.5", ls=":", lw=0.9, label="largest of the random rows")
            for name, read in phases.items():
                values = np.array(read[part]["value"])
                shift, face, edge = (0.2, color, color) if name == last else (-0.2, "white", color)
                x = np.repeat(np.arange(len(values)) + shift, values.shape[1])
                axis.plot(x, values.ravel(), ls="", marker="o", ms=1.8, mfc=face, mec=edge, mew=0.4,
                          label=f"{name} routers")  # fmt: skip
            axis.set_ylabel(label)
            draw.layer_axis(axis, phases[last]["layers"], margin=0.8)
        row[0].set_title(short_name(model), fontweight="bold", color=draw.look(model, list(moe))["color"])
    return draw.legend(figure)


@draw.figure("moe_routers")
def router_power(moe: Results) -> Figure:
    """How often a word that is planted in a router's row is found, by its cosine with it; bands are 95 % intervals."""
    figure, made = draw.blocks(moe, height=1.9, xlabel="cosine of the row with the word", sharey=True)
    tests = {
        "found": ("by z-score", "-"),
        "largest_found": ("by largest cosine", "-."),
        "word_found": ("by the word's rank", "--"),
    }
    for i, (model, result, block) in enumerate(made):
        axis, color = block[0, 0], draw.look(model, list(moe))["color"]
        runs = result.get("mixtures", [{"after": result}])
        planted = [run["after"]["projection"]["power"] for run in runs]
        axis.axvspan(*REPORTED_SCORES, color="0.85", lw=0, label="scores that are reported")
        axis.axvline(EXPECTED_SCORE, color="0.5", ls=":", lw=0.9, label="score that the write-up would expect")
        for test, (label, ls) in tests.items():
            curves, intervals = ([each[test][key] for each in planted] for key in ("accuracy", "interval"))
            draw.seeds_line(axis, curves, intervals, x=planted[0]["cosine"], color=color, ls=ls, label=label)
        axis.set(ylim=(-0.03, 1.03), xlim=(0, None))
        if i % draw.ACROSS == 0:
            axis.set_ylabel("share of rows found")
    return draw.legend(figure)


@draw.figure("moe_routers")
def written_words(moe: Results) -> Figure:
    """The own operation word in what MLPs write, by block: base model, mixture and dense twin."""
    made = upcycled(moe)
    figure, grid = draw.panels(len(made), 4, height=0.4 + 1.9 * len(made), xlabel="layer")
    looks = (("0.46", ":"), (TRAINED, "-"), (TWIN, "--"))
    for axes, (model, result) in zip(grid, made.items(), strict=True):
        runs = {
            "base": [result["base"]],
            "mixture": [run["after"] for run in result["mixtures"]],
            "dense twin": [run["after"] for run in result["twins"]],
        }
        for (aligned, contrast), style in zip((axes[:2], axes[2:]), ("symbol", "word"), strict=True):
            draw.alignment_axis(aligned, FLOOR)
            for (name, found), (color, ls) in zip(runs.items(), looks, strict=True):
                of = [run["written"][style] for run in found]
                look: Any = {"ls": ls, "color": color, "label": name}
                draw.seeds_line(aligned, [each["alignment"]["mean"] for each in of], **look)
                draw.seeds_line(contrast, [each["log_contrast"] for each in of], **look)
            chance = np.mean([run["written"][style]["null"]["log_contrast_95"] for run in runs["mixture"]], axis=0)
            line(contrast, chance, color="0.3", ls="-.", lw=0.7, label="equally frequent tokens, 95 %")
            aligned.set(ylabel="mean alignment")
            aligned.set_title(f"{short_name(model)}: {style} prompts")
            contrast.set_ylabel("contrast, nats")
            for axis in (aligned, contrast):
                draw.layer_axis(axis, of[0]["layers"])
    return draw.legend(figure, grid[0][1])


def _fresh_beside_trained(moe: Results, shares: Any, *, height: float, xlabel: str) -> tuple[Figure, list[Any]]:
    """Heat maps of shares of tokens, fresh routers beside trained ones, of every model.

    Args:
        moe: Results.
        shares: Of (result, "before" or "after"): rows and columns of one map.
        height: Of a model's maps, in inches.
        xlabel: What runs along the bottom.

    Returns:
        The figure; the two panels of each model with its result and both maps.
    """
    made, phases = upcycled(moe), NAMES["routers"]
    figure, grid = draw.panels(len(made), len(phases), height=0.35 + height * len(made), xlabel=xlabel, sharey="row")
    drawn = []
    for row, (model, result) in zip(grid, made.items(), strict=True):
        maps = [shares(result, when) for when in phases]
        for axis, values, name in zip(row, maps, phases.values(), strict=True):
            image = draw.heat_map(axis, values, vmax=np.max(maps))
            axis.set_title(f"{short_name(model)}: {name}")
        row[0].set_yticks(range(len(result["experts"])), result["experts"])
        figure.colorbar(image, ax=list(row), pad=0.01, label="share of tokens")
        drawn.append((row, result, maps))
    return figure, drawn


@draw.figure("moe_routers")
def routing_load(moe: Results) -> Figure:
    """Share of all tokens that each expert gets at each layer, before and after routers were trained (first seed)."""

    def load(result: Any, when: str) -> Any:
        return np.transpose(result["mixtures"][0][when]["routing"]["usage"]["load"])

    figure, drawn = _fresh_beside_trained(moe, load, height=1.15, xlabel="layer")
    for row, result, _ in drawn:
        for axis in row:
            draw.layer_axis(axis, result["mixtures"][0]["after"]["routing"]["layers"], margin=0.5)
    return figure


@draw.figure("moe_routers")
def routing_domains(moe: Results) -> Figure:
    """Share of each domain's tokens that every expert gets, before and after routers were trained.

    Means over layers and seeds.
    """

    def by_domain(result: Any, when: str) -> Any:
        return np.mean([run[when]["routing"]["by_domain"] for run in result["mixtures"]], axis=(0, 2))

    figure, drawn = _fresh_beside_trained(moe, by_domain, height=2.1, xlabel="expert")
    for row, result, maps in drawn:
        for axis, shares in zip(row, maps, strict=True):
            for (i, j), share in np.ndenumerate(shares):
                ink = "white" if share < np.max(maps) / 2 else "black"
                axis.text(j, i, f"{100 * share:.0f}", ha="center", va="center", color=ink)
            axis.set_xticks(range(len(result["experts"])), result["experts"])
        row[0].set_ylabel("domain of the text")
    return figure


@draw.figure("moe_routers")
def routing_layers(moe: Results) -> Figure:
    """What experts go by, layer by layer: the text's domain, the prompt's operation, and the context of a token."""
    made = upcycled(moe)
    figure, grid = draw.panels(len(made), 3, height=0.4 + 1.9 * len(made), xlabel="layer")
    for (told, own, context), (model, result) in zip(grid, made.items(), strict=True):
        for (when, label), ls, color in zip(NAMES["routers"].items(), ("--", "-"), ("0.5", TRAINED), strict=True):
            look: Any = {"ls": ls, "color": color, "label": label}
            routings = [run[when]["routing"] for run in result["mixtures"]]
            seeds_line(told, [r["domain"]["share"] for r in routings], **look)
            seeds_line(context, [r["context"]["change"] for r in routings], **look)
            for style, marker in (("symbol", ""), ("word", "s")):
                shares = [r["prompts"][style]["own_share"] for r in routings]
                seeds_line(own, shares, marker=marker, ms=2, markevery=3, **look)
        other, again = (np.mean([r["context"][key] for r in routings], axis=0) for key in ("other_tokens", "repeated"))
        line(context, other, color="0.3", label="another token", ls=":")
        line(context, again, color="0.3", label="the same context again", ls="-.", lw=0.7)
        own.plot([], [], color=TRAINED, ls="", marker="s", ms=2, label="word prompts")
        own.axhline(routings[0]["prompts"]["symbol"]["chance"], color="0.7", lw=0.6)
        told.axhline(0, color="0.7", lw=0.6)
        told.set_title(short_name(model), fontweight="bold", color=draw.look(model, list(moe))["color"])
        told.set_ylabel("part of the domain told")
        own.set(ylabel="share of the own expert", ylim=(-0.03, 1.03))
        context.set(ylabel="experts changed by context", ylim=(-0.03, 1.03))
        for axis in (told, own, context):
            draw.layer_axis(axis, routings[0]["layers"])
    return draw.legend(figure, *grid[0])


@draw.figure("moe_routers")
def mixture_lens(moe: Results) -> Figure:
    """Alignment and probe accuracy over depth: the base model, experts under a fresh router, mixture, dense twin."""
    made = upcycled(moe)
    figure, grid = draw.panels(2 * len(made), 2, height=0.4 + 3.2 * len(made), xlabel="layer", sharey="row")
    looks = (("0.46", ":"), ("0.6", "-."), (TRAINED, "-"), (TWIN, "--"))
    for (lenses, probes), (model, result) in zip(grid.reshape(-1, 2, 2), made.items(), strict=True):
        runs = {
            "base": [result["base"]],
            "fresh routers": [run["before"] for run in result["mixtures"]],
            "mixture": [run["after"] for run in result["mixtures"]],
            "dense twin": [run["after"] for run in result["twins"]],
        }
        for lens, probe, style in zip(lenses, probes, ("symbol", "word"), strict=True):
            draw.alignment_axis(lens, FLOOR)
            for (name, found), (color, ls) in zip(runs.items(), looks, strict=True):
                look: Any = {"ls": ls, "color": color, "label": name}
                seeds_line(lens, [run["lens"][style]["alignment"] for run in found], **look)
                seeds_line(probe, [run["probe"][style]["accuracy"] for run in found], **look)
            probe.set_ylim(0, 1.04)
            probe.axhline(1 / 4, color="0.7", lw=0.6)
            lens.set_title(f"{short_name(model)}: {style} prompts")
            for axis in (lens, probe):
                axis.axvline(result["layers"].index(result["depth_layer"]), color="0.8", lw=0.6)
                draw.layer_axis(axis, result["layers"])
        lenses[0].set_ylabel("mean alignment")
        probes[0].set_ylabel("probe accuracy")
    return draw.legend(figure)
