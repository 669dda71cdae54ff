"""Stage staged@model: the originals' advice, which they never followed: dual reward first, then reinforcement learning.

One V/O adapter, trained on one reward after the other in both orders, and on both from the start; several seeds. Does
the word in the lens survive reinforcement learning, and does the reward of answers still grow?
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from classifier_emergence.models.loading import load
from classifier_emergence.reading.layers import layer_row
from classifier_emergence.results import write_result
from classifier_emergence.tasks.problems import sample
from classifier_emergence.training.rl.rewards import exact, parse_answer
from classifier_emergence.training.rl.run import train_grpo
from classifier_emergence.training.rl.trainer import PolicyObjective, PolicyTask
from classifier_emergence.training.supervised import VO, Adapter, Objective, Schedule, adapted, encode, train
from experiments.params import Params
from experiments.shared.runs import Runs, mean_of, over_seeds, share_of, summary_over_seeds
from experiments.shared.stage import main
from experiments.stages.collapse import Study
from experiments.stages.grpo import behaviour, change, sampling

CHANGED = ("alignment", "reward", "exact")
ORDERS = {"dual_then_grpo": ("dual", "grpo"), "grpo_then_dual": ("grpo", "dual"), "together": ("together",)}
"""Rewards in the order in which an adapter is trained on them."""


def run(params: Params, key: str) -> None:
    """Train in every order and write one result."""
    study = Study(load(key, params.registry), params)
    runs = Runs("staged", key, params, "dual_reward", "grpo", "collapse", "bank")
    _ = study.base_answers
    before = runs.once("base", lambda _: measure(study))
    jobs = {
        name: {f"{name}-{seed}": trained(study, rewards, seed) for seed in params.grpo.seeds}
        for name, rewards in ORDERS.items()
    }
    orders = {name: {"runs": found, "summary": summary(found, before)} for name, found in runs.by_arm(jobs).items()}
    result = {
        "model": key,
        "layers": study.lm.layers,
        "layer": study.lm.layers[layer_row(study.layer)],
        "before": before,
        "orders": orders,
    }
    write_result(runs.result, result)
    shutil.rmtree(runs.folder)


def trained(study: Study, rewards: Sequence[str], seed: int) -> Callable[[Path], dict[str, Any]]:
    """Train one adapter on one reward after the other and measure after each."""

    def compute(work: Path) -> dict[str, Any]:
        settings = study.params.dual_reward
        place = Adapter(VO, settings.rank, settings.scale, tuple(range(study.layer)))
        stages = []
        with adapted(study.lm, place, seed=seed) as wrapped:
            for reward in rewards:
                curves = (dual if reward == "dual" else reinforced)(study, wrapped, reward, seed, work / reward)
                stages.append({"reward": reward, **curves, **measure(study)})
        return {"stages": stages}

    return compute


def dual(study: Study, wrapped: PeftModel, reward: str, seed: int, work: Path) -> dict[str, Any]:
    """Train on the word in the lens and on the answer, by cross-entropy."""
    settings, steps = study.params.dual_reward, study.params.staged.dual_steps
    schedule = Schedule(steps, settings.batch_size, settings.learning_rate, seed, settings.every)
    problems = sample(study.problems.train, steps * settings.batch_size, seed=seed)
    examples = [
        encode(study.lm.tokenizer, study.prompt(p), f" {p.answer}", study.target_ids[p.operation]) for p in problems
    ]
    objective = Objective(settings.class_weight, study.layer)
    text = f"staged training of {study.lm.key}: {reward} reward, seed {seed}"
    found = train(study.lm, wrapped, examples, objective, schedule, work=work, description=text)
    return {"losses": found.losses}


def reinforced(study: Study, wrapped: PeftModel, reward: str, seed: int, work: Path) -> dict[str, Any]:
    """Train on the reward of drawn answers, and on the word in the lens as well if the two go together.

    The divergence is from the model as this training finds it: after dual reward, from the model with the classifier.
    """
    settings = study.params.collapse
    weight = settings.class_weight if reward == "together" else 0.0
    objective = PolicyObjective(study.settings.kl_weight, weight, study.layer)
    schedule = Schedule(settings.steps, settings.prompts, settings.vo_learning_rate, seed, settings.every)
    # Drawn apart from those of the other reward.
    problems = sample(study.problems.train, settings.steps * settings.prompts, seed=1000 + seed)
    tasks = [PolicyTask(study.prompt(p), p.answer, study.target_ids[p.operation]) for p in problems]
    text = f"staged training of {study.lm.key}: GRPO ({reward}), seed {seed}"
    found = train_grpo(
        study.lm, wrapped, tasks, exact(parse_answer), objective, sampling(study), schedule, work=work,
        checkpoint_every=settings.checkpoint_every, description=text,
    )  # fmt: skip
    return {"steps": found.steps}


def measure(study: Study) -> dict[str, Any]:
    """The lens on held-out problems put as in training, and what ``grpo`` measures of answers and reward."""
    problems = study.problems.test
    found = study.read(problems, [study.prompt(problem) for problem in problems])
    return {
        "lens": {
            "alignment": mean_of(found.own_word[0], study.params, study.settings.resamples),
            "top": share_of(found.is_top[0], study.params),
        },
        **behaviour(study),
    }


def summary(runs: Sequence[dict[str, Any]], before: dict[str, Any]) -> dict[str, Any]:
    """The numbers at the end over seeds, what all training changed, and what its last part did."""
    last = [run["stages"][-1] for run in runs]
    # Where there is one part, all of it is the last.
    second = [run["stages"][-2] if len(run["stages"]) > 1 else before for run in runs]
    paths = ("lens.alignment", "lens.top", "answers.exact", "answers.change", "sampled_reward")
    return {
        "seeds": len(runs),
        **summary_over_seeds(last, paths),
        **{f"{name}_change": over_seeds([changes(run, before) for run in last], name) for name in CHANGED},
        **{
            f"last_{name}_change": over_seeds([changes(a, b) for a, b in zip(last, second, strict=True)], name)
            for name in CHANGED
        },
    }


def changes(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Differences between two measures, with intervals."""
    return {
        "alignment": change(after["lens"]["alignment"], before["lens"]["alignment"]),
        "reward": change(after["sampled_reward"], before["sampled_reward"]),
        "exact": change(after["answers"]["exact"], before["answers"]["exact"]),
    }


if __name__ == "__main__":
    main(run, __doc__)
