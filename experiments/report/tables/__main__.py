"""Stage tables: the paper's tables from the results, as CSV (which the paper reads), Markdown and LaTeX."""

from collections.abc import Callable

from classifier_emergence.results import read_result
from experiments.params import load_params
from experiments.report.tables import arithmetic, mixtures, other_tasks, reinforcement, training
from experiments.report.tables.table import Results
from experiments.shared.stage import RESULTS, exit_on_bad_input, results_of

TABLES: dict[str, tuple[Callable[[Results], None], ...]] = {
    "fetch": (arithmetic.models, arithmetic.words),
    "probing": (
        arithmetic.probing_reported, arithmetic.probing_controlled, arithmetic.held_out, arithmetic.flaws,
        arithmetic.directions,
    ),
    "logit_lens": (arithmetic.lens_reported, arithmetic.lens_controlled),
    "dual_reward": (training.dual_reward_reported, training.dual_reward_arms, training.dual_reward_flaws),
    "dual_reward_long": (training.dual_reward_long, training.dual_reward_reading),
    "lora_sft": (training.lora_sft,),
    "cot_alignment": (training.cot_alignment, training.cot_flaws),
    "other_tasks": (other_tasks.other_tasks_probes, other_tasks.other_tasks_lens, other_tasks.other_tasks_training),
    "grpo": (reinforcement.grpo_probe, reinforcement.grpo_reported, reinforcement.grpo_controlled),
    "collapse": (
        reinforcement.collapse_prompts, reinforcement.collapse_attempts, reinforcement.collapse_factorial,
        reinforcement.collapse_flaws,
    ),
    "staged": (reinforcement.staged,),
    "moe_routers": (
        mixtures.router_found, mixtures.router_rows, mixtures.router_words, mixtures.expert_losses,
        mixtures.routing_use, mixtures.mixture_twin,
    ),
}  # fmt: skip
"""Stage -> the tables of its results."""


def run() -> None:
    """Write every table."""
    params = load_params()
    ledger = read_result(RESULTS / "claims.json")
    arithmetic.claims(ledger)
    arithmetic.evidence(ledger)
    for stage, tables in TABLES.items():
        results = results_of(stage, params)
        for write in tables:
            write(results)


if __name__ == "__main__":
    exit_on_bad_input(run)
