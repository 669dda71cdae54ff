"""Stage staged@model: the originals' advice, which they never followed: dual reward first, then reinforcement learning.

V/O adapters, trained on one reward after the other in both orders, and on both from the start; after dual reward at
three learning rates, and with a small class weight kept; several seeds. Does the word in the lens survive reinforcement
learning, and does the reward of answers still grow?
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from classifier_emergence.training.adapters import Start, adapted_together, copy_adapter
from experiments.params import Params
from experiments.shared.reinforcement import PolicyStudy
from experiments.shared.runs import Run, Runs
from experiments.shared.stage import main
from experiments.shared.staged import Order, train_dual, train_reinforced
from experiments.shared.study import adapter_of
from experiments.shared.summaries import over, over_seeds, summary_over_seeds


def run(params: Params, key: str) -> None:
    """Train in every order and write one result."""
    orders, seeds = all_orders(params), params.grpo.seeds
    with Runs("staged", key, params, PolicyStudy, "dual_reward", "grpo", "collapse", "bank") as runs:
        before = runs.once("base", lambda study, _: measure_model(study))
        # All orders of a seed train together: they have its problems in common, and most of them dual reward as well.
        calls = [
            Run(f"seed-{seed}", train_orders, (seed,), tuple(f"{name}-{seed}" for name in orders)) for seed in seeds
        ]
        made, study = runs.all(calls), runs.study
        results = {name: [made[f"{name}-{seed}"] for seed in seeds] for name in orders}
        found = {
            name: {"runs": found, "summary": order_summary(study, found, before)} for name, found in results.items()
        }
        result = {
            "model": key,
            "layers": study.lm.layers,
            "layer": study.lm.layers[study.row],
            "before": before,
            "orders": found,
            "kept_class_weight": kept_class_weight(study, results),
        }
        for measured in [before, *(part for found in results.values() for each in found for part in each["stages"])]:
            del measured["items"]  # what is compared problem by problem has been
        runs.finish(result)


def all_orders(params: Params) -> dict[str, Order]:
    """Every order by name; the rate of ``collapse`` lies between the other two."""
    rate, settings = params.collapse.vo_learning_rate, params.staged
    dual_first = ("dual", "grpo")
    return {
        "dual_then_grpo": Order(dual_first, rate),
        "dual_then_grpo_low_rate": Order(dual_first, settings.low_rate),
        "dual_then_grpo_high_rate": Order(dual_first, settings.high_rate),
        "dual_then_grpo_and_class": Order(("dual", "grpo_and_class"), rate, settings.kept_class_weight),
        "grpo_then_dual": Order(("grpo", "dual"), rate),
        "together": Order(("together",), rate, params.collapse.class_weight),
    }


def train_orders(
    study: PolicyStudy, work: Path, wanted: Sequence[str], seed: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train an adapter in each order, those with a part in common together, and measure after each part."""
    orders = {f"{name}-{seed}": order for name, order in all_orders(study.params).items()}
    start = Start(adapter_of(study.params.dual_reward, study.layer), seed)
    with adapted_together(study.lm, dict.fromkeys(orders, start)) as wrapped:

        def measured(name: str, reward: str, **curves: Any) -> dict[str, Any]:
            wrapped.set_adapter(name)
            return {"reward": reward, **curves, **measure_model(study)}

        def dual_losses(name: str, folder: str) -> list[dict[str, float]]:
            text = f"staged training of {study.lm.key}: dual reward, seed {seed}"
            return train_dual(study, wrapped, {name: seed}, work / folder, text)[name].losses

        first, *others = (name for name, order in orders.items() if order.rewards[0] == "dual")
        losses = dual_losses(first, "dual")
        copy_adapter(wrapped, first, others)
        dual = measured(first, "dual", losses=losses)
        of_all = {name: (order, seed) for name, order in orders.items()}
        text = f"staged training of {study.lm.key}: GRPO in {len(orders)} orders, seed {seed}"
        reinforced = train_reinforced(study, wrapped, of_all, work / "grpo", text)
        for name in wanted:
            rewards, stages = orders[name].rewards, []
            for reward in rewards:
                if reward != "dual":
                    stages.append(measured(name, reward, steps=reinforced[name].steps))
                elif not stages:
                    stages.append(dual)
                else:
                    losses = dual_losses(name, "dual_again")
                    stages.append(measured(name, reward, losses=losses))
            yield name, {"stages": stages}


def measure_model(study: PolicyStudy) -> dict[str, Any]:
    """The lens on held-out problems put as in training, and what ``grpo`` measures of answers and reward."""
    problems, units = study.problems.test, study.units()
    lens, found = study.read_problems(problems, [study.prompt(problem) for problem in problems]), study.behaviour()
    return {
        "lens": {"alignment": study.mean(lens.own_word[0], units), "top": study.share(lens.is_top[0], units)},
        **found,
        "items": {**found["items"], "alignment": lens.own_word[0]},
    }


def order_summary(study: PolicyStudy, runs: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers at the end over seeds, what all training changed, and what its last part did."""
    last = [run["stages"][-1] for run in runs]
    # Where there is one part, all of it is the last.
    earlier = [run["stages"][-2] if len(run["stages"]) > 1 else before for run in runs]
    paths = ("lens.alignment", "lens.top", "answers.exact", "answers.change", "sampled_reward")
    in_all = [changes(study, after, before) for after in last]
    in_last = [changes(study, after, start) for after, start in zip(last, earlier, strict=True)]
    return {
        "seeds": len(runs),
        **summary_over_seeds(last, paths),
        **{f"{name}_change": over_seeds(in_all, name) for name in in_all[0]},
        **{f"last_{name}_change": over_seeds(in_last, name) for name in in_last[0]},
    }


def changes(study: PolicyStudy, after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Differences between two measures, paired by problem."""
    return {item: study.paired(after, before, item) for item in ("alignment", "reward", "exact")}


def kept_class_weight(study: PolicyStudy, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """What GRPO with the class weight kept leaves, minus what GRPO at the same rate leaves without it; by seed."""
    ends = [[run["stages"][-1] for run in results[f"dual_then_grpo{kept}"]] for kept in ("_and_class", "")]
    found = [changes(study, kept, without) for kept, without in zip(*ends, strict=True)]
    return {name: over([each[name] for each in found]) for name in found[0]}


if __name__ == "__main__":
    main(run, __doc__)
