"""Stage tables: the paper's tables from the results, as CSV (which the paper reads), Markdown and LaTeX."""

from classifier_emergence.results import read_result
from experiments.params import load_params
from experiments.report.tables import arithmetic, lenses, mixtures, reinforcement, training
from experiments.report.tables.table import Table
from experiments.shared.stage import RESULTS, STAGES, exit_on_bad_input, results_of

MODULES = (arithmetic, lenses, training, reinforcement, mixtures)
TABLES = [each for module in MODULES for each in vars(module).values() if isinstance(each, Table)]
"""All tables with rows by model or claim, as their functions stand in the modules."""


def run() -> None:
    """Write every table."""
    params = load_params()
    results = {stage: results_of(stage, params) for stage in {each.stage for each in TABLES} & {*STAGES}}
    results |= {name: read_result(RESULTS / f"{name}.json") for name in ("claims", "predictions")}
    for each in TABLES:
        each.write(results[each.stage])
    arithmetic.held_out(results["probing"])


if __name__ == "__main__":
    exit_on_bad_input(run)
