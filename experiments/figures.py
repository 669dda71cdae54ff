"""Stage figures: draw the paper's figures from the results."""

import argparse
from pathlib import Path

from classifier_emergence import figures
from classifier_emergence.params import load_params
from classifier_emergence.results import read_result
from experiments.stage import exit_on_bad_input, result_path

FOLDER = Path("paper/figures")


def run() -> None:
    """Draw and write every figure."""
    models = load_params().models
    probing = {model: read_result(result_path("probing", model)) for model in models}
    logit_lens = {model: read_result(result_path("logit_lens", model)) for model in models}
    figures.save(figures.probe_depth(probing), FOLDER / "probe_depth")
    figures.save(figures.alignment_null(logit_lens), FOLDER / "alignment_null")
    figures.save(figures.lens_heatmap(logit_lens), FOLDER / "lens_heatmap")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    exit_on_bad_input(run)
