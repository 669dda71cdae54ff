"""Stage figures: draw the paper's figures from the results."""

import argparse
from pathlib import Path

from classifier_emergence.results import read_result
from experiments.params import load_params
from experiments.report.figures import arithmetic as figures
from experiments.report.figures import mixtures as figures_moe
from experiments.report.figures import other_tasks as figures_tasks
from experiments.report.figures import reinforcement as figures_reinforcement
from experiments.report.tables import reinforcement as names
from experiments.report.tables.mixtures import projected, upcycled
from experiments.report.tables.other_tasks import TASKS
from experiments.report.tables.training import ARMS, FORMATS
from experiments.shared.stage import exit_on_bad_input, result_path

FOLDER = Path("paper/figures")


def run() -> None:
    """Draw and write every figure."""
    params = load_params()
    models = params.models
    probing = {model: read_result(result_path("probing", model)) for model in models}
    logit_lens = {model: read_result(result_path("logit_lens", model)) for model in models}
    dual = {model: read_result(result_path("dual_reward", model)) for model in params.trained_models}
    plain = {model: read_result(result_path("lora_sft", model)) for model in params.trained_models}
    chain = {model: read_result(result_path("cot_alignment", model)) for model in params.trained_models}
    other = {model: read_result(result_path("other_tasks", model)) for model in params.trained_models}
    grpo = {model: read_result(result_path("grpo", model)) for model in params.reinforcement_models}
    collapse = {model: read_result(result_path("collapse", model)) for model in params.reinforcement_models}
    figures.save(figures_reinforcement.grpo_steps(grpo, names.TRAININGS), FOLDER / "grpo_steps")
    figures.save(figures_reinforcement.grpo_depth(grpo), FOLDER / "grpo_depth")
    classes = figures_reinforcement.collapse_map(
        collapse, names.FACTORIAL, names.ATTEMPTS, names.FLAWS | names.IN_32_BITS
    )
    figures.save(classes, FOLDER / "collapse_map")
    staged = {model: read_result(result_path("staged", model)) for model in params.reinforcement_models}
    figures.save(figures_reinforcement.staged(staged, names.ORDERS, names.REWARDS), FOLDER / "staged")
    moe = {model: read_result(result_path("moe_routers", model)) for model in params.moe_models}
    read = {model: projected(result) for model, result in moe.items()}
    figures.save(figures_moe.router_maxima(read), FOLDER / "router_maxima")
    for draw in (
        figures_moe.routing_load, figures_moe.routing_domains, figures_moe.routing_layers, figures_moe.mixture_lens,
    ):  # fmt: skip
        figures.save(draw(upcycled(moe)), FOLDER / draw.__name__)
    figures.save(figures.fine_tuning_depth(plain, chain, FORMATS), FOLDER / "fine_tuning_depth")
    figures.save(figures.fine_tuning_answers(chain, FORMATS), FOLDER / "fine_tuning_answers")
    figures.save(figures.dual_reward_steps(dual), FOLDER / "dual_reward_steps")
    figures.save(figures.dual_reward_arms(dual, ARMS), FOLDER / "dual_reward_arms")
    figures.save(figures_tasks.other_tasks(other, TASKS), FOLDER / "other_tasks")
    figures.save(figures.probe_depth(probing), FOLDER / "probe_depth")
    figures.save(figures.alignment_null(logit_lens), FOLDER / "alignment_null")
    figures.save(figures.lens_heatmap(logit_lens), FOLDER / "lens_heatmap")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    exit_on_bad_input(run)
