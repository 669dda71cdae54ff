"""Stage replication@model: trainings on which a verdict hangs, again, with many seeds that no other stage has.

Three seeds show an effect; where it is small, or the seeds differ, the verdict hangs on which three they are. GRPO on
answers (claim C14), GRPO after dual reward (C23), dual reward (C11) and fine-tuning on answers (C21) are made again on
the model whose verdict hung. Only what the claim asks is measured: what training changed, problem by problem, with
operands never trained on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from classifier_emergence.models.loading import load
from classifier_emergence.training.adapters import Start, adapted_together
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.modules import QKVO
from classifier_emergence.training.rl.rewards import exact, parse_answer
from classifier_emergence.training.rl.run import all_weights_trainable, train_grpo
from classifier_emergence.training.rl.trainer import PolicyObjective
from experiments.params import Params
from experiments.shared.chain_of_thought import ChainOfThoughtStudy, train_to_write
from experiments.shared.dual_reward import DualRewardArm, DualRewardStudy, trained_arms
from experiments.shared.reinforcement import PolicyStudy
from experiments.shared.runs import Run, Runs
from experiments.shared.stage import main
from experiments.shared.staged import Order, train_dual, train_reinforced
from experiments.shared.study import ProblemStudy, adapter_of
from experiments.shared.summaries import over_seeds_and_clusters

SeedOf = Mapping[str, int]
"""Name of a run -> its seed."""
Changes = Iterator[tuple[str, dict[str, Any]]]
"""Name of a run, and what it changed of each test problem."""


class ReplicationStudy:
    """A model and the problems of every training, made when they are asked for."""

    def __init__(self, params: Params, key: str) -> None:
        self.params, self.key, self.lm = params, key, load(key, params.registry)

    @cached_property
    def policy(self) -> PolicyStudy:
        """Of the trainings with GRPO."""
        return PolicyStudy(self.params, self.key, self.lm)

    @cached_property
    def dual(self) -> DualRewardStudy:
        """Of dual reward, with as many test problems as this stage wants."""
        return DualRewardStudy(self._tested("dual_reward", self.params.replication.test_problems), self.key, self.lm)

    @cached_property
    def chain(self) -> ChainOfThoughtStudy:
        """Of fine-tuning on answers, with as many."""
        tested = dict.fromkeys(self.params.cot_alignment.operands, self.params.replication.test_problems)
        return ChainOfThoughtStudy(self._tested("cot_alignment", tested), self.key, self.lm)

    def _tested(self, section: str, problems: int | dict[str, int]) -> Params:
        settings = getattr(self.params, section).model_copy(update={"test_problems": problems})
        return self.params.model_copy(update={section: settings})


def run(params: Params, key: str) -> None:
    """Train with every seed, measure before and after and write one result."""
    seeds = params.replication.seeds
    sections = ("grpo", "collapse", "staged", "dual_reward", "cot_alignment", "bank")
    with Runs("replication", key, params, ReplicationStudy, *sections) as runs:
        made = runs.all([call for training, of in seeds.items() for call in calls(training, of)])
        study = runs.study
        found = {
            training: summary(study, training, {seed: made[f"{training}-{seed}"] for seed in of})
            for training, of in seeds.items()
        }
        runs.finish({"model": key, "layers": study.lm.layers, "trainings": found})


def calls(training: str, seeds: Sequence[int]) -> Iterator[Run]:
    """The runs of a training, as many together as share a pass over the weights."""
    train, together, _ = TRAININGS[training]
    for first in range(0, len(seeds), together):
        members = {f"{training}-{seed}": seed for seed in seeds[first : first + together]}
        yield Run(f"{training}-from-{seeds[first]}", train, (members,), tuple(members))


# --- Training ---


def grpo(study: ReplicationStudy, work: Path, wanted: Sequence[str], seeds: SeedOf) -> Changes:
    """On the reward of drawn answers, all weights: the controlled arm of ``grpo``."""
    policy, how = study.policy, study.params.grpo
    for name in wanted:
        with all_weights_trainable(study.lm) as model:
            train_grpo(
                study.lm, model, policy.tasks(how.steps * how.prompts, seeds[name]), exact(parse_answer),
                PolicyObjective(how.kl_weight), policy.sampling,
                Schedule(how.steps, how.prompts, how.learning_rate, seeds[name], how.every),
                work=work, description=f"GRPO of {study.key}, seed {seeds[name]}",
            )  # fmt: skip
            now, base = policy.answer(), policy.base_answers
        yield name, {"log_prob": now.log_prob - base.log_prob, "exact": now.exact.double() - base.exact.double()}


def dual_then_grpo(study: ReplicationStudy, work: Path, wanted: Sequence[str], seeds: SeedOf) -> Changes:
    """On one reward and then the other: what the second changes of what the first has made, as in ``staged``."""
    policy, settings = study.policy, study.params.dual_reward
    order = Order(("dual", "grpo"), study.params.collapse.vo_learning_rate)

    def alignment(name: str) -> torch.Tensor:
        wrapped.set_adapter(name)
        problems = policy.problems.test
        return policy.read_problems(problems, [policy.prompt(problem) for problem in problems]).own_word[0]

    starts = {name: Start(adapter_of(settings, policy.layer), seed) for name, seed in seeds.items()}
    with adapted_together(study.lm, starts) as wrapped:
        text = f"staged training of {study.key}, {len(seeds)} seeds"
        train_dual(policy, wrapped, seeds, work / "dual", f"{text}: dual reward")
        dual = {name: alignment(name) for name in wanted}
        orders = {name: (order, seed) for name, seed in seeds.items()}
        train_reinforced(policy, wrapped, orders, work / "grpo", f"{text}: GRPO")
        for name in wanted:
            yield name, {"alignment": alignment(name) - dual[name]}


def dual_reward(study: ReplicationStudy, work: Path, wanted: Sequence[str], seeds: SeedOf) -> Changes:
    """On the word in the lens and on the answer: the main arm of ``dual_reward``."""
    dual, arms = study.dual, {name: (DualRewardArm(), seed) for name, seed in seeds.items()}
    with trained_arms(dual, work, arms, dual.settings.arm_steps) as (wrapped, _):
        for name in wanted:
            wrapped.set_adapter(name)
            yield name, {"log_prob": dual.answer().log_prob - dual.base_answers.log_prob}


def direct(study: ReplicationStudy, work: Path, wanted: Sequence[str], seeds: SeedOf) -> Changes:
    """On answers without a word before them, as in ``cot_alignment``."""
    chain = study.chain
    before = np.array(chain.right()[0], dtype=float)
    adapter = adapter_of(chain.settings, study.lm.n_layers, QKVO)
    with adapted_together(study.lm, {name: Start(adapter, seed) for name, seed in seeds.items()}) as wrapped:
        train_to_write(chain, wrapped, "direct", seeds, work, f"fine-tuning of {study.key}, {len(seeds)} seeds")
        for name in wanted:
            wrapped.set_adapter(name)
            yield name, {"exact": np.array(chain.right()[0], dtype=float) - before}


TRAININGS: dict[str, tuple[Callable[..., Changes], int, str]] = {
    "grpo": (grpo, 1, "policy"),
    "dual_then_grpo": (dual_then_grpo, 6, "policy"),
    "dual_reward": (dual_reward, 8, "dual"),
    "direct": (direct, 8, "chain"),
}
"""How each is made, how many runs of it train together, and whose test problems it is measured on."""


# --- Over seeds ---


def summary(study: ReplicationStudy, training: str, runs: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """What a training changed on average over its seeds and problems."""
    problems: ProblemStudy = getattr(study, TRAININGS[training][2])
    of_runs = [*runs.values()]
    return {
        "seeds": [*runs],
        **{
            item: over_seeds_and_clusters([run[item] for run in of_runs], problems.units(), study.params.confidence)
            for item in of_runs[0]
        },
    }


if __name__ == "__main__":
    main(run, __doc__)
