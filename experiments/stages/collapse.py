"""Stage collapse@model: what collapses when GRPO and a loss on the lens are trained together?

Reported protocol: the five attempts of the originals, with their flaws, scored on six prompts. Controlled: whole model
or V/O adapter, GRPO, the loss on the lens or both, several seeds, scored on operands never trained on; then one flaw of
the originals at a time. A model has collapsed if nearly all prompts get one class; the threshold was chosen beforehand.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from classifier_emergence.results import lookup
from classifier_emergence.tasks.arithmetic import LENS, labelled
from classifier_emergence.tasks.problems import Problem
from classifier_emergence.training.adapters import adapted
from classifier_emergence.training.rl.rewards import exact, parse_answer, parse_reported
from classifier_emergence.training.rl.run import all_weights_trainable, train_grpo
from classifier_emergence.training.rl.trainer import PolicyObjective, PolicyTask
from classifier_emergence.training.supervised import Schedule
from experiments.params import Params
from experiments.shared.reinforcement import PolicyStudy, early_and_late, reported_problems, reported_prompt
from experiments.shared.runs import Run, Runs
from experiments.shared.stage import main
from experiments.shared.study import adapter_of
from experiments.shared.summaries import difference, over, summary_over_seeds

CLASSES = ("multiply", "add", "subtract")
MOVING = ("reported_first", "reported_own_targets")
"""The originals' attempts that are made in 32 bits as well."""


@dataclass(frozen=True)
class CollapseArm:
    """One way to train."""

    class_weight: float
    kl_weight: float
    learning_rate: float
    steps: int
    vo: bool = False
    """Train an adapter on V and O below the lens's layer, not the whole model."""
    reported: bool = False
    """The originals' prompts, operands, rule for the reward and group."""
    balanced: bool = True
    """As many problems of each class a step as can be, else classes at random."""
    shared_target: bool = False
    """Every prompt of a step gets the class of its first one: a flaw."""
    entropy_bonus: float = 0.0
    signed_kl: bool = False
    half: bool = False
    """Weights held in half precision, updated in place: a flaw."""
    several_seeds: bool = False


def run(params: Params, key: str) -> None:
    """Train every arm and write one result."""
    with Runs("collapse", key, params, PolicyStudy, "grpo", "bank") as runs:
        before, seeds = runs.once("base", lambda study, _: measure_model(study)), params.grpo.seeds
        calls = {
            name: [Run(f"{name}-{s}", train_arm, (name, arm, s)) for s in seeds[: None if arm.several_seeds else 1]]
            for name, arm in all_arms(params).items()
        }
        arms: dict[str, Any] = {
            name: {"runs": results, "summary": arm_summary(results)} for name, results in runs.by_arm(calls).items()
        }
        result = {
            "model": key,
            "layer": runs.study.lm.layers[runs.study.row],
            "classes": CLASSES,
            "before": before,
            "arms": arms,
            "contrasts": contrasts(arms),
            "reported_collapsed": sum(arms[name]["summary"]["reported_collapsed"] for name in reported_arms(params)),
        }
        runs.finish(result)


def all_arms(params: Params) -> dict[str, CollapseArm]:
    """Every arm by name."""
    settings = params.collapse
    kl, steps = params.grpo.kl_weight, settings.steps
    parts = {"grpo": 0.0, "class": 1.0, "both": settings.class_weight}
    factorial = {
        f"{name}_{part}": CollapseArm(weight, kl, rate, steps, vo=name == "vo", several_seeds=True)
        for name, rate in (("whole", settings.learning_rate), ("vo", settings.vo_learning_rate))
        for part, weight in parts.items()
    }
    both = replace(factorial["whole_both"], several_seeds=False)
    flaws = {
        "flaw_signed_kl": replace(both, signed_kl=True, kl_weight=params.grpo.reported.kl_weight),
        "flaw_shared_target": replace(both, balanced=False, shared_target=True),
        "flaw_half_precision": replace(both, half=True, learning_rate=params.grpo.reported.learning_rate),
        "without_half_precision": replace(both, learning_rate=params.grpo.reported.learning_rate),
    }
    attempts = reported_arms(params)
    # All other flaws of the originals together: half precision hides what they do.
    moving = {f"{name}_in_32_bits": replace(attempts[name], half=False) for name in MOVING}
    return {**attempts, **factorial, **flaws, **moving}


def reported_arms(params: Params) -> dict[str, CollapseArm]:
    """The five attempts; weight of the divergence of the first three is that of the originals' default."""
    kl = params.grpo.reported.kl_weight
    short, middle, long = params.collapse.reported_steps
    first = CollapseArm(
        0.4, kl, 1e-5, short, reported=True, balanced=False, shared_target=True, signed_kl=True, half=True
    )
    own = replace(first, balanced=True, shared_target=False)
    return {
        "reported_first": first,
        "reported_own_targets": own,
        "reported_entropy_bonus": replace(own, entropy_bonus=0.5),
        "reported_low_rate": replace(own, learning_rate=2e-6, kl_weight=0.001, steps=middle),
        "reported_class_focus": replace(own, class_weight=0.9, kl_weight=0.0, signed_kl=False, steps=long),
    }


def train_arm(study: PolicyStudy, work: Path, name: str, arm: CollapseArm, seed: int) -> dict[str, Any]:
    """Train one arm, watching the classes, and measure."""
    settings, few = study.params.collapse, study.problems.test[: study.params.collapse.curve_problems]
    how = replace(study.sampling, group=settings.reported_group) if arm.reported else study.sampling
    objective = PolicyObjective(
        arm.kl_weight, arm.class_weight, study.layer, signed_kl=arm.signed_kl, entropy_bonus=arm.entropy_bonus
    )

    def watch() -> dict[str, Any]:
        spread = classes(study, few, reported_prompt if arm.reported else study.prompt)
        return {"shares": {k: float(v) for k, v in spread["shares"].items()}, "modal": float(spread["modal_share"])}

    with prepared(study, arm, seed) as model:
        trained = train_grpo(
            study.lm, model, tasks(study, arm, seed), exact(parse_reported if arm.reported else parse_answer),
            objective, how, Schedule(arm.steps, prompts_a_step(study, arm), arm.learning_rate, seed, settings.every),
            work=work, watch=watch, checkpoint_every=settings.checkpoint_every,
            dtype=torch.bfloat16 if arm.half else torch.float32,
            description=f"collapse of {study.lm.key}: {name.replace('_', ' ')}, seed {seed}",
        )  # fmt: skip
        return {**vars(trained), **measure_model(study)}


def prepared(study: PolicyStudy, arm: CollapseArm, seed: int) -> AbstractContextManager[Any]:
    """The model as the arm trains it."""
    if not arm.vo:
        return all_weights_trainable(study.lm)
    return adapted(study.lm, adapter_of(study.params.collapse, study.layer), seed=seed)


def prompts_a_step(study: PolicyStudy, arm: CollapseArm) -> int:
    """As many completions in all with the originals' group as with ours."""
    settings = study.params.collapse
    return settings.reported_prompts if arm.reported else settings.prompts


def tasks(study: PolicyStudy, arm: CollapseArm, seed: int) -> list[PolicyTask]:
    """Problems in the order in which they are trained on, with the class that each is told to name."""
    size, random, targets = prompts_a_step(study, arm), np.random.default_rng(seed), study.spaced_targets()
    pools: dict[str, list[Problem]] = {name: list(study.problems.train[name]) for name in CLASSES}
    if arm.reported:
        drawn = reported_problems(8 * arm.steps * size, seed)
        pools = {name: [p for p in drawn if p.operation == name] for name in CLASSES}
    prompt = reported_prompt if arm.reported else study.prompt
    ordered = []
    for step in range(arm.steps):
        if arm.balanced:
            names = [CLASSES[(step * size + i) % len(CLASSES)] for i in range(size)]
        else:
            names = [CLASSES[i] for i in random.integers(len(CLASSES), size=size)]
        for name in names:
            problem = pools[name][int(random.integers(len(pools[name])))]
            target = targets[names[0] if arm.shared_target else name]
            ordered.append(PolicyTask(prompt(problem), problem.answer, target))
    return ordered


def classes(study: PolicyStudy, problems: Sequence[Problem], prompt: Callable[[Problem], str]) -> dict[str, Any]:
    """Which class the lens gives to problems, put as prompts: its spread and whether it is right."""
    lens = study.read_problems(problems, [prompt(problem) for problem in problems])
    choice, own = lens.choice[0], torch.tensor([CLASSES.index(problem.operation) for problem in problems])
    shares = choice.bincount(minlength=len(CLASSES)).double() / len(choice)
    return {
        "shares": dict(zip(CLASSES, shares, strict=True)),
        "entropy": -torch.special.xlogy(shares, shares).sum(),
        "modal_share": shares.max(),
        "collapsed": bool(shares.max() >= study.params.collapse.modal_share),
        # As many problems of each class: accuracy is balanced accuracy, and a constant answer scores 1/3.
        "balanced_accuracy": study.share(choice == own),
        "alignment": lens.own_word[0].mean(),
    }


def measure_model(study: PolicyStudy) -> dict[str, Any]:
    """Classes and rewards on held-out problems, and the originals' table."""
    test, table = study.problems.test, [Problem.parse(text) for text in labelled(LENS)[0]]
    table = [problem for problem in table if problem.operation in CLASSES]
    prompts = [problem.symbol for problem in table]
    lens = study.read_problems(table, prompts)
    return {
        "classes": classes(study, test, study.prompt),
        "answers": study.share(study.answer().exact),
        "sampled_reward": study.sampled_reward(test[: study.params.collapse.curve_problems]),
        "reported": {
            "prompts": study.table(prompts, lens),
            "score": study.share(lens.is_top[0]),
            # Where the originals' configurations are trained: at the lone space.
            "classes": classes(study, test, reported_prompt),
        },
    }


def arm_summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of an arm over its seeds."""
    paths = (
        "classes.entropy", "classes.modal_share", "classes.balanced_accuracy", "classes.alignment", "answers",
        "sampled_reward", "reported.score", "reported.classes.modal_share", "reported.classes.balanced_accuracy",
    )  # fmt: skip
    last = [run["steps"][-1] for run in runs]
    drawn = "reward" in last[0]  # the class loss alone draws no completions
    rewards = [early_and_late(run["steps"]) for run in runs] if drawn else []
    return {
        "seeds": len(runs),
        "collapsed": sum(run["classes"]["collapsed"] for run in runs),
        "reported_collapsed": sum(run["reported"]["classes"]["collapsed"] for run in runs),
        **summary_over_seeds(runs, paths),
        **{f"reward_{when}": over([reward[when] for reward in rewards]) for when in ("early", "late") if drawn},
        "reported_one_word": over([one_word(run["reported"]["prompts"]) for run in runs]),
        **{f"final_{name}": [step.get(name) for step in last] for name in ("reward", "kl", "signed_kl", "class_loss")},
    }


def one_word(prompts: Sequence[Mapping[str, Any]]) -> float:
    """Largest share of the prompts that have one and the same class's word on top: 1 is the originals' collapse."""
    tops = [entry["top_token"].strip().lower() for entry in prompts]
    return max(tops.count(name) for name in CLASSES) / len(tops)


def contrasts(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Differences between cells of the factorial, by seed.

    What the combination loses against each half of the loss alone, and what it gains if V and O alone are trained.
    """
    accuracy, reward = "classes.balanced_accuracy", "sampled_reward"
    pairs = {
        "whole_accuracy": ("whole_both", "whole_class", accuracy),
        "whole_reward": ("whole_both", "whole_grpo", reward),
        "vo_accuracy": ("vo_both", "vo_class", accuracy),
        "vo_reward": ("vo_both", "vo_grpo", reward),
        "vo_against_whole_accuracy": ("vo_both", "whole_both", accuracy),
        "vo_against_whole_reward": ("vo_both", "whole_both", reward),
    }
    return {
        name: over(
            [
                difference(lookup(x, path), lookup(y, path))
                for x, y in zip(arms[a]["runs"], arms[b]["runs"], strict=True)
            ]
        )
        for name, (a, b, path) in pairs.items()
    }


if __name__ == "__main__":
    main(run, __doc__)
