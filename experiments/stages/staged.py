"""Stage staged@model: the originals' advice, which they never followed: dual reward first, then reinforcement learning.

One V/O adapter, trained on one reward after the other in both orders, and on both from the start; several seeds. Does
the word in the lens survive reinforcement learning, and does the reward of answers still grow?
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from classifier_emergence.tasks.problems import sample
from classifier_emergence.training.adapters import adapted
from classifier_emergence.training.rl.rewards import exact, parse_answer
from classifier_emergence.training.rl.run import train_grpo
from classifier_emergence.training.rl.trainer import PolicyObjective, PolicyTask
from classifier_emergence.training.supervised import Objective, Schedule, encode, train
from experiments.params import Params
from experiments.shared.reinforcement import PolicyStudy
from experiments.shared.runs import Run, Runs
from experiments.shared.stage import main
from experiments.shared.study import adapter_of, schedule_of
from experiments.shared.summaries import difference, over_seeds, summary_over_seeds

ORDERS = {"dual_then_grpo": ("dual", "grpo"), "grpo_then_dual": ("grpo", "dual"), "together": ("together",)}
"""Rewards in the order in which an adapter is trained on them."""


def run(params: Params, key: str) -> None:
    """Train in every order and write one result."""
    with Runs("staged", key, params, PolicyStudy, "dual_reward", "grpo", "collapse", "bank") as runs:
        before = runs.once("base", lambda study, _: measure_model(study))
        calls = {
            name: [Run(f"{name}-{seed}", train_in_order, (rewards, seed)) for seed in params.grpo.seeds]
            for name, rewards in ORDERS.items()
        }
        results, study = runs.by_arm(calls), runs.study
        result = {
            "model": key,
            "layers": study.lm.layers,
            "layer": study.lm.layers[study.row],
            "before": before,
            "orders": {
                name: {"runs": seeds, "summary": order_summary(seeds, before)} for name, seeds in results.items()
            },
        }
        runs.finish(result)


def train_in_order(study: PolicyStudy, work: Path, rewards: Sequence[str], seed: int) -> dict[str, Any]:
    """Train one adapter on one reward after the other and measure after each."""
    stages = []
    with adapted(study.lm, adapter_of(study.params.dual_reward, study.layer), seed=seed) as wrapped:
        for reward in rewards:
            train_on = train_dual if reward == "dual" else train_reinforced
            curves = train_on(study, wrapped, reward, seed, work / reward)
            stages.append({"reward": reward, **curves, **measure_model(study)})
    return {"stages": stages}


def train_dual(study: PolicyStudy, wrapped: PeftModel, reward: str, seed: int, work: Path) -> dict[str, Any]:
    """Train on the word in the lens and on the answer, by cross-entropy."""
    settings, steps, targets = study.params.dual_reward, study.params.staged.dual_steps, study.spaced_targets()
    problems = sample(study.problems.train, steps * settings.batch_size, seed=seed)
    examples = [encode(study.lm.tokenizer, study.prompt(p), f" {p.answer}", targets[p.operation]) for p in problems]
    trained = train(
        study.lm, wrapped, examples, Objective(settings.class_weight, study.layer), schedule_of(settings, seed, steps),
        work=work, description=f"staged training of {study.lm.key}: {reward} reward, seed {seed}",
    )  # fmt: skip
    return {"losses": trained.losses}


def train_reinforced(study: PolicyStudy, wrapped: PeftModel, reward: str, seed: int, work: Path) -> dict[str, Any]:
    """Train on the reward of drawn answers, and on the word in the lens as well if the two go together.

    The divergence is from the model as this training finds it: after dual reward, from the model with the classifier.
    """
    settings, targets = study.params.collapse, study.spaced_targets()
    weight = settings.class_weight if reward == "together" else 0.0
    # Drawn apart from those of the other reward.
    problems = sample(study.problems.train, study.params.staged.steps * settings.prompts, seed=1000 + seed)
    tasks = [PolicyTask(study.prompt(p), p.answer, targets[p.operation]) for p in problems]
    trained = train_grpo(
        study.lm, wrapped, tasks, exact(parse_answer),
        PolicyObjective(study.settings.kl_weight, weight, study.layer), study.sampling,
        Schedule(study.params.staged.steps, settings.prompts, settings.vo_learning_rate, seed, settings.every),
        work=work, checkpoint_every=settings.checkpoint_every,
        description=f"staged training of {study.lm.key}: GRPO ({reward}), seed {seed}",
    )  # fmt: skip
    return {"steps": trained.steps}


def measure_model(study: PolicyStudy) -> dict[str, Any]:
    """The lens on held-out problems put as in training, and what ``grpo`` measures of answers and reward."""
    problems = study.problems.test
    lens = study.read_problems(problems, [study.prompt(problem) for problem in problems])
    return {
        "lens": {"alignment": study.mean(lens.own_word[0]), "top": study.share(lens.is_top[0])},
        **study.behaviour(),
    }


def order_summary(runs: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers at the end over seeds, what all training changed, and what its last part did."""
    last = [run["stages"][-1] for run in runs]
    # Where there is one part, all of it is the last.
    earlier = [run["stages"][-2] if len(run["stages"]) > 1 else before for run in runs]
    paths = ("lens.alignment", "lens.top", "answers.exact", "answers.change", "sampled_reward")
    in_all = [changes(after, before) for after in last]
    in_last = [changes(after, start) for after, start in zip(last, earlier, strict=True)]
    return {
        "seeds": len(runs),
        **summary_over_seeds(last, paths),
        **{f"{name}_change": over_seeds(in_all, name) for name in in_all[0]},
        **{f"last_{name}_change": over_seeds(in_last, name) for name in in_last[0]},
    }


def changes(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Differences between two measures, with intervals."""
    return {
        "alignment": difference(after["lens"]["alignment"], before["lens"]["alignment"]),
        "reward": difference(after["sampled_reward"], before["sampled_reward"]),
        "exact": difference(after["answers"]["exact"], before["answers"]["exact"]),
    }


if __name__ == "__main__":
    main(run, __doc__)
