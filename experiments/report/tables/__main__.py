"""Stage tables: the paper's tables from the results, as CSV (which the paper reads), Markdown and LaTeX."""

import argparse

from classifier_emergence.results import read_result
from experiments.params import load_params
from experiments.report.tables import arithmetic
from experiments.report.tables import mixtures as moe_tables
from experiments.report.tables import other_tasks as other_tasks_tables
from experiments.report.tables import reinforcement as reinforcement_tables
from experiments.report.tables import training as training_tables
from experiments.shared.stage import RESULTS, exit_on_bad_input, result_path


def run() -> None:
    """Write every table."""
    params = load_params()
    fetched, probing, lens = (
        {model: read_result(result_path(stage, model)) for model in params.models}
        for stage in ("fetch", "probing", "logit_lens")
    )
    dual, long, plain, chain, other = (
        {model: read_result(result_path(stage, model)) for model in params.trained_models}
        for stage in ("dual_reward", "dual_reward_long", "lora_sft", "cot_alignment", "other_tasks")
    )
    grpo = {model: read_result(result_path("grpo", model)) for model in params.reinforcement_models}
    collapse = {model: read_result(result_path("collapse", model)) for model in params.reinforcement_models}
    staged = {model: read_result(result_path("staged", model)) for model in params.reinforcement_models}
    arithmetic.claims(read_result(RESULTS / "claims.json"))
    arithmetic.models(fetched)
    arithmetic.words(fetched)
    arithmetic.probing_reported(probing)
    arithmetic.probing_controlled(probing)
    arithmetic.held_out(probing)
    arithmetic.flaws(probing)
    arithmetic.lens_reported(lens)
    arithmetic.lens_controlled(lens, params.logit_lens.depth)
    arithmetic.directions(probing, params.logit_lens.depth)
    training_tables.dual_reward_reported(dual)
    training_tables.dual_reward_arms(dual)
    training_tables.dual_reward_long(long)
    training_tables.dual_reward_reading(long)
    training_tables.dual_reward_flaws(dual)
    training_tables.lora_sft(plain)
    training_tables.cot_alignment(chain)
    other_tasks_tables.write(other)
    reinforcement_tables.grpo_probe(grpo)
    reinforcement_tables.grpo_reported(grpo)
    reinforcement_tables.grpo_controlled(grpo)
    reinforcement_tables.collapse_prompts(collapse)
    reinforcement_tables.collapse_attempts(collapse)
    reinforcement_tables.collapse_factorial(collapse)
    reinforcement_tables.collapse_flaws(collapse)
    reinforcement_tables.staged(staged)
    moe_tables.write({model: read_result(result_path("moe_routers", model)) for model in params.moe_models})


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    exit_on_bad_input(run)
