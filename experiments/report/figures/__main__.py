"""Stage figures: the paper's figures from the results, as SVG (which the paper shows) and PNG."""

from experiments.params import load_params
from experiments.report.figures import arithmetic, lenses, mixtures, reinforcement, summary, training
from experiments.report.figures.draw import PaperFigure
from experiments.shared.stage import exit_on_bad_input, results_of

MODULES = (summary, arithmetic, lenses, training, reinforcement, mixtures)
FIGURES = [each for module in MODULES for each in vars(module).values() if isinstance(each, PaperFigure)]
"""All figures, as their functions stand in the modules."""


def run() -> None:
    """Draw and write every figure."""
    params = load_params()
    for figure in FIGURES:
        figure.write(*(results_of(stage, params) for stage in figure.stages))


if __name__ == "__main__":
    exit_on_bad_input(run)
