"""Stage dual_reward_long@model: what the dual reward's single seed at full length leaves open.

The main arm at full length with more seeds; and removing the words' directions from the model before training, which
tells what reads them anyway from what training made read them.
"""

from collections.abc import Sequence
from typing import Any

from classifier_emergence.models.loading import load
from classifier_emergence.reading.layers import layer_row
from classifier_emergence.results import read_result
from experiments.params import Params
from experiments.shared.runs import Runs, summary_over_seeds
from experiments.shared.stage import main, result_path
from experiments.stages.dual_reward import Study, main_arm, reading, summary


def run(params: Params, key: str) -> None:
    """Train, measure and write one result."""
    study = Study(load(key, params.registry), params)
    runs = Runs("dual_reward_long", key, params, "dual_reward")
    first = read_result(result_path("dual_reward", key))
    before = runs.once("reading", lambda _: reading(study, study.layer))
    _ = study.base_answers

    seeds = params.dual_reward_long.seeds
    more = runs.all({f"main-{seed}": main_arm(study, seed, runs.adapters / f"seed-{seed}") for seed in seeds})
    result = {
        "model": key,
        "layers": study.lm.layers,
        "layer": study.lm.layers[layer_row(study.layer)],
        "steps": params.dual_reward.steps,
        "reading_before": before,
        "main": over_all([first["main"], *more.values()]),
    }
    runs.finish(result)


def over_all(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The main arm over its seeds, with the alignment of every seed at every layer and step."""
    paths = ("lone_space.top", "without_o.top", "further.symbol.alignment", "reading.words", "reading.random",
             "reading.difference")  # fmt: skip
    return {
        **summary(seeds),
        **summary_over_seeds(seeds, paths),
        "watched": [seed["watched"] for seed in seeds],
        "losses": [seed["losses"] for seed in seeds],
    }


if __name__ == "__main__":
    main(run, __doc__)
