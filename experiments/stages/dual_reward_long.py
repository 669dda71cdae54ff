"""Stage dual_reward_long@model: what the dual reward's single seed at full length leaves open.

The main arm at full length with more seeds, next to answers alone and Q/K for as many steps; and removing or
interchanging the words' directions in the model before training, which tells what reads them anyway from what training
made read them.
"""

from collections.abc import Sequence
from typing import Any

from classifier_emergence.results import read_result
from classifier_emergence.training.modules import QK
from experiments.params import Params
from experiments.shared.dual_reward import (
    DualRewardArm,
    DualRewardStudy,
    against,
    arm_summary,
    train_arms,
    train_main,
    who_reads,
)
from experiments.shared.runs import Run, Runs
from experiments.shared.stage import main, result_path
from experiments.shared.summaries import summary_over_seeds

ARMS = {"answer_only": DualRewardArm(class_weight=0.0), "qk": DualRewardArm(QK)}
"""What the main arm is compared with at full length."""


def run(params: Params, key: str) -> None:
    """Train, measure and write one result."""
    first = read_result(result_path("dual_reward", key))
    settings = params.dual_reward
    with Runs("dual_reward_long", key, params, DualRewardStudy, "dual_reward") as runs:
        before = runs.once("reading", lambda study, _: who_reads(study, study.words))
        seeds = params.dual_reward_long.seeds
        calls = [Run(f"main-{seed}", train_main, (seed, runs.adapters / f"seed-{seed}")) for seed in seeds]
        members = {name: {f"{name}-{seed}": (arm, seed) for seed in settings.seeds} for name, arm in ARMS.items()}
        calls += [Run(name, train_arms, (group, settings.steps), tuple(group)) for name, group in members.items()]
        results, study = runs.all(calls), runs.study
        mains = [first["main"], *(results[f"main-{seed}"] for seed in seeds)]
        arms = {name: [results[member] for member in group] for name, group in members.items()}
        result = {
            "model": key,
            "layers": study.lm.layers,
            "layer": study.lm.layers[study.row],
            "steps": settings.steps,
            "reading_before": before,
            "main": long_summary(mains),
            "arms": {name: arm_summary(measured) for name, measured in arms.items()},
            # The main arm minus another, problem by problem.
            "contrasts": {
                "answer_only": {"log_prob": against(study, mains, arms["answer_only"], "log_prob")},
                "qk": {"top": against(study, mains, arms["qk"], "top")},
            },
        }
        runs.finish(result)


def long_summary(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The main arm over its seeds, with the alignment of every seed at every layer and step."""
    paths = ("lone_space.top", "without_o.top", "further.symbol.alignment")
    return {
        **arm_summary(seeds),
        **summary_over_seeds(seeds, paths),
        "watched": [seed["watched"] for seed in seeds],
        "losses": [seed["losses"] for seed in seeds],
    }


if __name__ == "__main__":
    main(run, __doc__)
