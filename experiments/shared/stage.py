"""What every stage shares: its arguments, its errors, and where results lie."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from classifier_emergence.errors import InputError
from classifier_emergence.models.registry import source_of
from classifier_emergence.results import read_result
from classifier_emergence.statistics import Proportion
from experiments.params import Params, load_params

RESULTS = Path("results")
RESIDUALS = Path("data/residuals")

TRAINING = {
    "dual_reward": "trained_models", "dual_reward_long": "trained_models", "lora_sft": "trained_models",
    "cot_alignment": "trained_models", "other_tasks": "trained_models", "grpo": "reinforcement_models",
    "collapse": "reinforcement_models", "staged": "reinforcement_models", "moe_routers": "moe_models",
}  # fmt: skip
"""Stages that train -> the parameter that lists their models."""
STAGES = {"fetch": "models", "residuals": "models", "probing": "models", "logit_lens": "models", **TRAINING}
"""All stages that run on one model at a time -> the parameter that lists their models."""
ENDING = ("claims", "tables", "figures", "paper")
"""What follows from all results, in order."""


def result_path(stage: str, model: str) -> Path:
    """Where a stage writes its result for a model."""
    return RESULTS / stage / f"{model}.json"


def results_of(stage: str, params: Params) -> dict[str, dict[str, Any]]:
    """The results of a stage by model, of the models that it runs on.

    Raises:
        InputError: One is missing or damaged; names the file.
    """
    return {model: read_result(result_path(stage, model)) for model in getattr(params, STAGES[stage])}


def residuals_path(model: str) -> Path:
    """Where the residual streams of a model lie between stages."""
    return RESIDUALS / f"{model}.safetensors"


def accuracy_curve(correct: ArrayLike, confidence: float) -> dict[str, Any]:
    """Accuracy over the last axis of ``correct`` (layers, n) with the Wilson interval of every layer."""
    rows = np.asarray(correct, dtype=bool)
    layers = [Proportion.of(row, np.ones_like(row), confidence=confidence) for row in rows]
    return {
        "n": rows.shape[-1],
        "accuracy": [layer.accuracy for layer in layers],
        "interval": [layer.interval for layer in layers],
    }


def main(run: Callable[[Params, str], None], doc: str | None) -> None:
    """Command line of a stage that runs on one model: ``python -m experiments.<stage> --model KEY``."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--model", required=True, metavar="KEY", help="a key of registry in the parameter file")
    parser.add_argument("--params", default="params.yaml", metavar="FILE", help="default: %(default)s")
    arguments = parser.parse_args()

    def go() -> None:
        params = load_params(arguments.params)
        source_of(arguments.model, params.registry)
        import torch  # late: bad input is told at once, not after the seconds that these take
        import transformers

        torch.manual_seed(0)  # nothing draws from the global generator; if something did, it would repeat
        transformers.utils.logging.disable_progress_bar()
        run(params, arguments.model)

    exit_on_bad_input(go)


def exit_on_bad_input(run: Callable[[], None]) -> None:
    """Run; turn an ``InputError`` into its one line on standard error and exit code 2."""
    logging.captureWarnings(True)
    try:
        run()
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was written\n")
        sys.exit(130)
