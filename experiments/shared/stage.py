"""What every stage shares: its arguments, its errors, and where results lie."""

import importlib
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from classifier_emergence.errors import InputError, first_line, one_line
from classifier_emergence.interrupts import raised
from classifier_emergence.manifest import file_damage
from classifier_emergence.models.registry import ModelSource, PathSource, source_of, weight_hashes
from classifier_emergence.processes import check_alone
from classifier_emergence.progress import notice
from classifier_emergence.results import read_result
from experiments.params import Params, load_params

if TYPE_CHECKING:
    from torch import Tensor

RESULTS = Path("results")
RESIDUALS = Path("data/residuals")
FLAWED_SETS = ("symbol", "word")
"""The originals' prompts that flawed models read, too."""

TRAINING = {
    "dual_reward": "supervised_models", "dual_reward_long": "trained_models", "sample_efficiency": "trained_models",
    "lora_sft": "supervised_models", "cot_alignment": "supervised_models", "lenses": "lens_models",
    "trained_words": "trained_models", "tuning": "tuning_models", "other_tasks": "trained_models",
    "grpo": "grpo_models", "collapse": "grpo_models", "staged": "reinforcement_models",
    "replication": "replication_models", "moe_routers": "moe_models",
}  # fmt: skip
"""Stages that train -> the parameter that lists their models."""
STAGES = {
    "fetch": "models", "residuals": "models", "probing": "models", "logit_lens": "models", "word_lenses": "models",
    "conversations": "teachers", **TRAINING,
}  # fmt: skip
"""All stages that run on one model at a time -> the parameter that lists their models."""
ENDING = ("claims", "tables", "figures", "paper", "page")
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


def read_residuals(model: str) -> "dict[str, Tensor]":
    """What stage residuals wrote. Without a hash beside it, as earlier versions left it, it is taken as it is.

    Raises:
        InputError: The file is missing, damaged, or not as it was written; names it.
    """
    from safetensors.torch import load_file  # late: it brings torch

    path = residuals_path(model)
    try:
        found = file_damage(path)
        states = load_file(path)
    except Exception as error:  # of any type: safetensors has its own, and raises those of files
        raise InputError(f"{path}: cannot be read ({first_line(error)}); {again('residuals', model)}") from error
    if found:
        raise InputError(f"{path}: {found}; {again('residuals', model)}")
    return states


def again(stage: str, model: str) -> str:
    """What to do about a file that a stage left."""
    return f"run the stage that writes it: dvc repro --force --single-item {stage}@{model}"


def main(run: Callable[[Params, str], None], doc: str | None) -> None:
    """Command line of a stage that runs on one model: ``python -m experiments.stages.<stage> --model KEY``."""

    def command(
        model: Annotated[
            str, typer.Option(metavar="KEY", help="Which model: a key of registry in the parameter file.")
        ],
        params: Annotated[Path, typer.Option(metavar="FILE", help="The parameter file.")] = Path("params.yaml"),
        debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
    ) -> None:
        exit_on_bad_input(lambda: _run(run, model, params))

    command.__doc__ = doc
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command)
    app()


def _run(run: Callable[[Params, str], None], model: str, file: Path) -> None:
    params = load_params(file).of_model(model)
    check_alone("a stage of the paper, which makes its runs side by side by itself,")
    source = source_of(model, params.registry)
    spec = sys.modules["__main__"].__spec__
    assert spec is not None
    if not spec.name.endswith(".fetch"):
        check_weights(model, source)
    import torch  # late: the commands of the pipeline, which import this module, need none of it
    import transformers

    torch.manual_seed(0)  # nothing draws from the global generator; if something did, it would repeat
    transformers.utils.logging.disable_progress_bar()
    # Not as __main__, but under its own name: there other processes find what they are to call.
    getattr(importlib.import_module(spec.name), run.__name__)(params, model)


def check_weights(model: str, source: ModelSource) -> None:
    """Refuse local weights that are others than stage fetch has seen; pins see to those from elsewhere.

    Raises:
        InputError: They are; or the result of stage fetch cannot be read.
    """
    fetched = result_path("fetch", model)
    if not isinstance(source, PathSource) or not fetched.exists():
        return
    seen = read_result(fetched).get("source", {}).get("sha256")
    if seen is not None and seen != weight_hashes(source):
        raise InputError(
            f"registry.{model}: the weights in {source.path} are not those of {fetched}; {again('fetch', model)}"
        )


def exit_on_bad_input(run: Callable[[], None]) -> None:
    """Run; turn whatever goes wrong into one line on standard error and exit code 2, after its story with --debug."""
    logging.captureWarnings(True)
    try:
        with raised():
            run()
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        notice(f"error: {one_line(error)}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; finished runs are kept\n")
        sys.exit(130)
