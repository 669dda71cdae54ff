"""Stage collapse@model: what collapses when GRPO and a loss on the lens are trained together?

Reported protocol: the five attempts of the originals, with their flaws, scored on six prompts. Controlled: whole model
or V/O adapter, GRPO, the loss on the lens or both, several seeds, scored on operands never trained on; then one flaw of
the originals at a time. A model has collapsed if nearly all prompts get one class; the threshold was chosen beforehand.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from classifier_emergence.errors import InputError
from classifier_emergence.models.loading import load
from classifier_emergence.reading.layers import layer_row
from classifier_emergence.reading.vocabulary import WordTokens, token_text
from classifier_emergence.results import write_result
from classifier_emergence.tasks.arithmetic import LENS, labelled
from classifier_emergence.tasks.problems import Problem
from classifier_emergence.training.evaluation import Alignment, alignment
from classifier_emergence.training.rl.rewards import exact, parse_answer, parse_reported
from classifier_emergence.training.rl.run import all_weights_trainable, train_grpo
from classifier_emergence.training.rl.trainer import PolicyObjective, PolicyTask, Sampling
from classifier_emergence.training.supervised import VO, Adapter, Schedule, adapted
from experiments.params import Params
from experiments.shared.runs import Runs, over_seeds, share_of, summary_over_seeds
from experiments.shared.stage import main
from experiments.stages.grpo import Study as GrpoStudy
from experiments.stages.grpo import change, late_and_early, reported_problems, reported_prompt, sampled_reward

CLASSES = ("multiply", "add", "subtract")
MOVING = ("reported_first", "reported_own_targets")
"""The originals' attempts that are made in 32 bits as well."""


@dataclass(frozen=True)
class Arm:
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


class Study(GrpoStudy):
    """What all arms share."""

    @cached_property
    def words(self) -> list[WordTokens]:
        """The words of the classes."""
        return [self.targets[operation] for operation in CLASSES]

    @cached_property
    def target_ids(self) -> dict[str, int]:
        """What the lens is told to say: the words with a leading space, as bare words are cut by some vocabularies."""
        for word in self.words:
            if f" {word.word}" not in word.forms:
                raise InputError(
                    f"target word {word.word!r}: with a leading space it is no single token of {self.lm.key}"
                )
        return {word.word: word.forms[f" {word.word}"] for word in self.words}

    def read(self, problems: Sequence[Problem], prompts: Sequence[str]) -> Alignment:
        """The lens at the classifier layer."""
        own = [CLASSES.index(problem.operation) for problem in problems]
        row = layer_row(self.layer)
        return alignment(self.lm, prompts, own, self.words, rows=[row])

    def classes(self, problems: Sequence[Problem], prompt: Callable[[Problem], str]) -> dict[str, Any]:
        """Which class the lens gives to problems, put as prompts: its spread and whether it is right."""
        found = self.read(problems, [prompt(problem) for problem in problems])
        choice = found.choice[0]
        own = torch.tensor([CLASSES.index(problem.operation) for problem in problems])
        shares = choice.bincount(minlength=len(CLASSES)).double() / len(choice)
        settings = self.params.collapse
        return {
            "shares": dict(zip(CLASSES, shares, strict=True)),
            "entropy": -torch.special.xlogy(shares, shares).sum(),
            "modal_share": shares.max(),
            "collapsed": bool(shares.max() >= settings.modal_share),
            # As many problems of each class: accuracy is balanced accuracy, and a constant answer scores 1/3.
            "balanced_accuracy": share_of(choice == own, self.params),
            "alignment": found.own_word[0].mean(),
        }


def run(params: Params, key: str) -> None:
    """Train every arm and write one result."""
    study = Study(load(key, params.registry), params)
    runs = Runs("collapse", key, params, "grpo", "bank")
    _ = study.base_answers
    before = runs.once("base", lambda _: measure(study))
    jobs = {
        name: {
            f"{name}-{s}": trained(study, name, arm, s) for s in params.grpo.seeds[: None if arm.several_seeds else 1]
        }
        for name, arm in all_arms(params).items()
    }
    arms: dict[str, Any] = {
        name: {"runs": found, "summary": summary(found)} for name, found in runs.by_arm(jobs).items()
    }
    result = {
        "model": key,
        "layer": study.lm.layers[layer_row(study.layer)],
        "classes": CLASSES,
        "before": before,
        "arms": arms,
        "contrasts": contrasts(arms),
        "reported_collapsed": sum(arms[name]["summary"]["reported_collapsed"] for name in reported_arms(params)),
    }
    write_result(runs.result, result)
    shutil.rmtree(runs.folder)


def all_arms(params: Params) -> dict[str, Arm]:
    """Every arm by name."""
    settings = params.collapse
    kl, steps = params.grpo.kl_weight, settings.steps
    parts = {"grpo": 0.0, "class": 1.0, "both": settings.class_weight}
    factorial = {
        f"{name}_{part}": Arm(weight, kl, rate, steps, vo=name == "vo", several_seeds=True)
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


def reported_arms(params: Params) -> dict[str, Arm]:
    """The five attempts; weight of the divergence of the first three is that of the originals' default."""
    kl = params.grpo.reported.kl_weight
    short, middle, long = params.collapse.reported_steps
    first = Arm(0.4, kl, 1e-5, short, reported=True, balanced=False, shared_target=True, signed_kl=True, half=True)
    own = replace(first, balanced=True, shared_target=False)
    return {
        "reported_first": first,
        "reported_own_targets": own,
        "reported_entropy_bonus": replace(own, entropy_bonus=0.5),
        "reported_low_rate": replace(own, learning_rate=2e-6, kl_weight=0.001, steps=middle),
        "reported_class_focus": replace(own, class_weight=0.9, kl_weight=0.0, signed_kl=False, steps=long),
    }


def trained(study: Study, name: str, arm: Arm, seed: int) -> Callable[[Path], dict[str, Any]]:
    """Train one arm, watching the classes, and measure."""

    def compute(work: Path) -> dict[str, Any]:
        settings, lm = study.params.collapse, study.lm
        objective = PolicyObjective(
            arm.kl_weight,
            arm.class_weight,
            study.layer,
            signed_kl=arm.signed_kl,
            entropy_bonus=arm.entropy_bonus,
        )
        schedule = Schedule(arm.steps, prompts(study, arm), arm.learning_rate, seed, settings.every)
        group = settings.reported_group if arm.reported else study.settings.group
        how = Sampling(group, study.settings.temperature, study.settings.new_tokens)
        reward = exact(parse_reported if arm.reported else parse_answer)
        dtype = torch.bfloat16 if arm.half else torch.float32
        few = study.problems.test[: settings.curve_problems]

        def watch() -> dict[str, Any]:
            found = study.classes(few, reported_prompt if arm.reported else study.prompt)
            return {"shares": {k: float(v) for k, v in found["shares"].items()}, "modal": float(found["modal_share"])}

        with prepared(study, arm, seed) as model:
            found = train_grpo(
                lm, model, tasks(study, arm, seed), reward, objective, how, schedule, work=work, watch=watch,
                checkpoint_every=settings.checkpoint_every, dtype=dtype,
                description=f"collapse of {lm.key}: {name.replace('_', ' ')}, seed {seed}",
            )  # fmt: skip
            after = measure(study)
        return {"steps": found.steps, "watched": found.watched, "parameters": found.parameters, **after}

    return compute


def prepared(study: Study, arm: Arm, seed: int) -> AbstractContextManager[Any]:
    """The model as the arm trains it."""
    if not arm.vo:
        return all_weights_trainable(study.lm)
    settings = study.params.collapse
    place = Adapter(VO, settings.rank, settings.scale, tuple(range(study.layer)))
    return adapted(study.lm, place, seed=seed)


def prompts(study: Study, arm: Arm) -> int:
    """Prompts a step: as many completions in all with the originals' group as with ours."""
    settings = study.params.collapse
    return settings.reported_prompts if arm.reported else settings.prompts


def tasks(study: Study, arm: Arm, seed: int) -> list[PolicyTask]:
    """Problems in the order in which they are trained on, with the class that each is told to name."""
    size = prompts(study, arm)
    n = arm.steps * size
    random = np.random.default_rng(seed)
    pools: dict[str, list[Problem]] = {operation: list(study.problems.train[operation]) for operation in CLASSES}
    if arm.reported:
        drawn = reported_problems(8 * n, seed)
        pools = {operation: [p for p in drawn if p.operation == operation] for operation in CLASSES}
    found = []
    for step in range(arm.steps):
        if arm.balanced:
            names = [CLASSES[(step * size + i) % len(CLASSES)] for i in range(size)]
        else:
            names = [CLASSES[i] for i in random.integers(len(CLASSES), size=size)]
        problems = [pools[name][int(random.integers(len(pools[name])))] for name in names]
        for name, problem in zip(names, problems, strict=True):
            prompt = reported_prompt(problem) if arm.reported else study.prompt(problem)
            target = study.target_ids[names[0] if arm.shared_target else name]
            found.append(PolicyTask(prompt, problem.answer, target))
    return found


def measure(study: Study) -> dict[str, Any]:
    """Classes and rewards on held-out problems, and the originals' table."""
    problems = [problem for problem in map(Problem.parse, labelled(LENS)[0]) if problem.operation in CLASSES]
    found = study.read(problems, [problem.symbol for problem in problems])
    return {
        "classes": study.classes(study.problems.test, study.prompt),
        "answers": share_of(study.answer().exact, study.params),
        "sampled_reward": sampled_reward(study, study.problems.test[: study.params.collapse.curve_problems]),
        "reported": {
            "prompts": [
                {
                    "prompt": problem.symbol,
                    "top_token": token_text(study.lm.tokenizer, int(found.top_id[0, i])),
                    "top_probability": found.top_probability[0, i],
                    "own_probability": found.own_word[0, i],
                }
                for i, problem in enumerate(problems)
            ],
            "score": share_of(found.is_top[0], study.params),
            # Where the originals' configurations are trained: at the lone space.
            "classes": study.classes(study.problems.test, reported_prompt),
        },
    }


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of an arm over its seeds."""
    paths = (
        "classes.entropy", "classes.modal_share", "classes.balanced_accuracy", "classes.alignment", "answers",
        "sampled_reward", "reported.score", "reported.classes.modal_share", "reported.classes.balanced_accuracy",
    )  # fmt: skip
    last = [run["steps"][-1] for run in runs]
    drawn = "reward" in last[0]  # the class loss alone draws no completions
    rewards = [late_and_early(run["steps"]) for run in runs] if drawn else []
    return {
        "seeds": len(runs),
        "collapsed": sum(run["classes"]["collapsed"] for run in runs),
        "reported_collapsed": sum(run["reported"]["classes"]["collapsed"] for run in runs),
        **summary_over_seeds(runs, paths),
        **{f"reward_{when}": over_seeds(rewards, when) for when in ("early", "late") if drawn},
        "reported_one_word": over_seeds([{"share": one_word(run["reported"]["prompts"])} for run in runs], "share"),
        "final_reward": [step.get("reward") for step in last],
        "final_kl": [step.get("kl") for step in last],
        "final_signed_kl": [step.get("signed_kl") for step in last],
        "final_class_loss": [step.get("class_loss") for step in last],
    }


def one_word(prompts: Sequence[Mapping[str, Any]]) -> float:
    """Largest share of the prompts that have one and the same class's word on top: 1 is the originals' collapse."""
    found = [entry["top_token"].strip().lower() for entry in prompts]
    return max(found.count(name) for name in CLASSES) / len(found)


def contrasts(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Differences between cells of the factorial, by seed.

    What the combination loses against each half of the loss alone, and what it gains if V and O alone are trained.
    """

    def between(a: str, b: str, part: Callable[[Any], Any]) -> dict[str, Any]:
        pairs = zip(arms[a]["runs"], arms[b]["runs"], strict=True)
        return over_seeds([{"change": change(part(x), part(y))} for x, y in pairs], "change")

    def accuracy(run: Mapping[str, Any]) -> Any:
        return run["classes"]["balanced_accuracy"]

    def reward(run: Mapping[str, Any]) -> Any:
        return run["sampled_reward"]

    return {
        "whole_accuracy": between("whole_both", "whole_class", accuracy),
        "whole_reward": between("whole_both", "whole_grpo", reward),
        "vo_accuracy": between("vo_both", "vo_class", accuracy),
        "vo_reward": between("vo_both", "vo_grpo", reward),
        "vo_against_whole_accuracy": between("vo_both", "whole_both", accuracy),
        "vo_against_whole_reward": between("vo_both", "whole_both", reward),
    }


if __name__ == "__main__":
    main(run, __doc__)
