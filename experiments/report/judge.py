"""Stage claims: judge every claim of paper/claims.yaml by the results; writes results/claims.json."""

import argparse
from pathlib import Path

from classifier_emergence.results import read_result, write_result
from experiments.params import load_params
from experiments.report.ledger import evaluate, load_claims
from experiments.shared.stage import RESULTS, exit_on_bad_input, result_path

LEDGER = Path("paper/claims.yaml")
STAGES = ("probing", "logit_lens")
TRAINED = ("dual_reward", "dual_reward_long", "lora_sft", "cot_alignment")
"""Stages that run on the trained models only."""
REINFORCED = ("grpo", "collapse", "staged")
"""Stages that run on the models of reinforcement learning."""


def run() -> None:
    """Evaluate the ledger on the models of the paper."""
    params = load_params()
    models = params.models
    on = dict.fromkeys(STAGES, models) | dict.fromkeys(TRAINED, params.trained_models)
    on |= dict.fromkeys(REINFORCED, params.reinforcement_models) | {"moe_routers": params.moe_models}
    results = {stage: {m: read_result(result_path(stage, m)) for m in chosen} for stage, chosen in on.items()}
    parameters = {model: read_result(result_path("fetch", model))["parameters"] for model in models}
    judged = list(dict.fromkeys([*models, *params.moe_models]))
    ledger = load_claims(LEDGER)
    verdicts = {key: evaluate(claim, results, judged, parameters) for key, claim in ledger.items()}
    write_result(RESULTS / "claims.json", verdicts)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    exit_on_bad_input(run)
