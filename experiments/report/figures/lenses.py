"""Figures of the lenses beside the logit lens."""

from matplotlib.figure import Figure

from classifier_emergence.tasks.arithmetic import STYLES
from experiments.report.figures import draw
from experiments.report.figures.draw import PALE, Results, line, seeds_line
from experiments.report.names import NAMES, lenses_of


@draw.figure("lenses")
def lenses_choice(lenses: Results) -> Figure:
    """Choice among the four words over depth under three lenses: styles down, models across."""
    rows = {style: f"{style} prompts\nright choice" for style in STYLES}
    figure, panels = draw.by_model(lenses, rows, height=5.2, sharey=True)
    for axis, style, result in panels:
        for lens, name in lenses_of(result["untrained"]).items():
            curves = [fit["choice"] for fit in result["untrained"][lens][style]["fits"]]
            accuracy, interval = [c["accuracy"] for c in curves], [c["interval"] for c in curves]
            seeds_line(axis, accuracy, interval, label=f"{name} lens", **draw.lens(lens))
        null = result["untrained"]["jacobian"][style]["fits"][0]["choice"]["null_95"]
        line(axis, null, color="0.6", lw=0.7, label="matched words, 95 % (Jacobian lens)")
        axis.axhline(0.25, color=PALE, lw=0.6, zorder=0)
        axis.set_ylim(0, 1.04)
    return draw.legend(figure)


@draw.figure("lenses")
def lenses_trained_word(lenses: Results) -> Figure:
    """Alignment of a trained word over depth under every lens, symbol prompts: trainings down, models across."""
    rows = {stage: f"{name}\nmean alignment" for stage, name in NAMES["lens_stages"].items()}
    figure, panels = draw.by_model(lenses, rows, height=3.8, sharey=True)
    for axis, stage, result in panels:
        found = result["trained"][stage]
        for lens, name in lenses_of(found["after"]).items():
            curves = [seed[lens]["symbol"]["by_layer"] for seed in found["seeds"] if lens in seed]
            alignment, interval = [c["alignment"] for c in curves], [c["interval"] for c in curves]
            seeds_line(axis, alignment, interval, label=name, **draw.lens(lens))
        axis.axvline(result["layers"].index(found["layer"]), color=PALE, lw=0.6, zorder=0)
        axis.set_ylim(0, 1.04)
    return draw.legend(figure)
