"""One reward after the other on V/O adapters: the parts of staged training, for the stages that use them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from classifier_emergence.tasks.problems import sample
from classifier_emergence.training.examples import Objective, encode
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.rl.rewards import exact, parse_answer
from classifier_emergence.training.rl.run import GrpoRun
from classifier_emergence.training.rl.together import PolicyMember, train_grpo_together
from classifier_emergence.training.rl.trainer import PolicyObjective
from classifier_emergence.training.supervised import Member, Trained, train_together
from experiments.shared.reinforcement import PolicyStudy
from experiments.shared.study import schedule_of


@dataclass(frozen=True)
class Order:
    """What an adapter is trained on, part by part, GRPO being one of the parts."""

    rewards: tuple[str, ...]
    learning_rate: float
    """Of GRPO."""
    class_weight: float = 0.0
    """Of the loss on the lens during GRPO."""


def train_dual(
    study: PolicyStudy, wrapped: PeftModel, seeds: Mapping[str, int], work: Path, description: str
) -> dict[str, Trained]:
    """Train adapters, each with its seed, on the word in the lens and on the answer, by cross-entropy."""
    settings, steps, targets = study.params.dual_reward, study.params.staged.dual_steps, study.spaced_targets()
    members = {}
    for name, seed in seeds.items():
        problems = sample(study.problems.train, steps * settings.batch_size, seed=seed)
        data = [encode(study.lm.tokenizer, study.prompt(p), f" {p.answer}", targets[p.operation]) for p in problems]
        members[name] = Member(data, Objective(settings.class_weight, study.layer), seed)
    schedule = schedule_of(settings, 0, steps)
    return train_together(study.lm, wrapped, members, schedule, work=work, description=description)


def train_reinforced(
    study: PolicyStudy, wrapped: PeftModel, orders: Mapping[str, tuple[Order, int]], work: Path, description: str
) -> dict[str, GrpoRun]:
    """Train adapters, each in its order and with its seed, on the reward of drawn answers.

    And on the word in the lens as well where it has a weight. The divergence is from the model as this training finds
    it: after dual reward, from the model with the classifier.
    """
    settings = study.params.collapse
    members = {}
    for name, (order, seed) in orders.items():
        # Drawn apart from those of the other reward.
        tasks = study.tasks(settings.steps * settings.prompts, 1000 + seed)
        objective = PolicyObjective(study.settings.kl_weight, order.class_weight, study.layer)
        members[name] = PolicyMember(tasks, objective, seed, order.learning_rate)
    return train_grpo_together(
        study.lm, wrapped, members, exact(parse_answer), study.sampling,
        Schedule(settings.steps, settings.prompts, settings.vo_learning_rate, 0, settings.every), work=work,
        checkpoint_every=settings.checkpoint_every, description=description,
    )  # fmt: skip
