"""Stage dual_reward_long@model: what the dual reward's single seed at full length leaves open.

The main arm at full length with more seeds; and removing the words' directions from the model before training, which
tells what reads them anyway from what training made read them.
"""

from collections.abc import Sequence
from typing import Any

from classifier_emergence.results import read_result
from experiments.params import Params
from experiments.shared.dual_reward import DualRewardStudy, arm_summary, train_main, who_reads
from experiments.shared.runs import Run, Runs
from experiments.shared.stage import main, result_path
from experiments.shared.summaries import summary_over_seeds


def run(params: Params, key: str) -> None:
    """Train, measure and write one result."""
    first = read_result(result_path("dual_reward", key))
    with Runs("dual_reward_long", key, params, DualRewardStudy, "dual_reward") as runs:
        before = runs.once("reading", lambda study, _: who_reads(study))
        calls = [
            Run(f"main-{seed}", train_main, (seed, runs.adapters / f"seed-{seed}"))
            for seed in params.dual_reward_long.seeds
        ]
        seeds = [first["main"], *runs.all(calls).values()]
        layers = runs.study.lm.layers
        result = {
            "model": key,
            "layers": layers,
            "layer": layers[runs.study.row],
            "steps": params.dual_reward.steps,
            "reading_before": before,
            "main": long_summary(seeds),
        }
        runs.finish(result)


def long_summary(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The main arm over its seeds, with the alignment of every seed at every layer and step."""
    paths = ("lone_space.top", "without_o.top", "further.symbol.alignment", "reading.words", "reading.random",
             "reading.difference")  # fmt: skip
    return {
        **arm_summary(seeds),
        **summary_over_seeds(seeds, paths),
        "watched": [seed["watched"] for seed in seeds],
        "losses": [seed["losses"] for seed in seeds],
    }


if __name__ == "__main__":
    main(run, __doc__)
