"""Supervised training of LoRA adapters, with an objective that may read the logit lens at a middle layer.

One family covers every study: ``loss = w * CE(lens at layer L, word) + (1 - w) * CE(answer)``. Dual reward is w = 0.4
on V and O; plain fine-tuning, on whatever text follows the prompt, is w = 0. Only the positions that a loss reads pass
through the unembedding.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainingArguments

from classifier_emergence import processes
from classifier_emergence.errors import InputError
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import outputs_of, stopping_after
from classifier_emergence.reading.tree import last_states
from classifier_emergence.training.adapters import ALONE, each_its_own, head_of, make_trainable, parameters_of
from classifier_emergence.training.cross_entropy import cross_entropy
from classifier_emergence.training.examples import Example, Objective, collate, order
from classifier_emergence.training.group_trainer import (
    EXPLODED,
    GroupTrainer,
    Schedule,
    adapter_settings,
    check_layer,
    digest_of,
    group_arguments,
    model_settings,
)
from classifier_emergence.training.run_folder import open_run_folder


@dataclass(frozen=True)
class Member:
    """One of several runs that train together."""

    examples: Sequence[Example]
    """From ``encode``; drawn without replacement, in an order that the seed sets."""
    objective: Objective
    seed: int
    watch: Callable[[], dict[str, Any]] | None = None
    """Measured before the first step and every ``Schedule.every`` steps, with the member's adapter on."""


@dataclass(frozen=True)
class Trained:
    """What a run leaves: the loss curve and what was watched, both by step."""

    losses: list[dict[str, float]]
    """``step``, ``loss`` and, where they are part of it, ``class_loss`` and ``answer_loss``: means over the steps
    since the entry before; nats."""
    watched: list[dict[str, Any]]
    """``step`` and what ``watch`` returned; step 0 comes first."""
    parameters: int
    """Trained parameters."""


def train(
    lm: LanguageModel,
    wrapped: PeftModel,
    examples: Sequence[Example],
    objective: Objective,
    schedule: Schedule,
    *,
    work: Path,
    watch: Callable[[], dict[str, Any]] | None = None,
    description: str | None = None,
) -> Trained:
    """Train the adapter of ``wrapped``; resume from the last checkpoint in ``work`` if it belongs to this very run.

    Args:
        lm: The model.
        wrapped: It with its adapter, from ``adapted``.
        examples: From ``encode``; drawn without replacement, in an order that the seed sets.
        objective: What is minimised.
        schedule: How long and how fast.
        work: Folder for checkpoints; what lies there from a run with other settings is deleted.
        watch: Measured before the first step and every ``schedule.every`` steps.
        description: Shown with the progress bar.

    Raises:
        InputError: The loss is not finite or explodes; names the step and the likely cause. Or the objective asks for a
            layer or head that the model does not have.
    """
    member = Member(examples, objective, schedule.seed, watch)
    return train_together(lm, wrapped, {ALONE: member}, schedule, work=work, description=description)[ALONE]


def train_together(
    lm: LanguageModel,
    wrapped: PeftModel,
    members: Mapping[str, Member],
    schedule: Schedule,
    *,
    work: Path,
    description: str | None = None,
) -> dict[str, Trained]:
    """Several runs at once, within rounding what each would be alone: a step streams the frozen weights once for all.

    Every member has its own data, order, loss, gradient norm and optimiser state; the model's blocks and unembedding
    pass the batches of all members as rows of one.

    Args:
        lm: The model.
        wrapped: It with the members' adapters, from ``adapted_together``.
        members: By the names of their adapters.
        schedule: Of all; its seed is not used.
        work: Folder for checkpoints, which hold all members; what lies there from other runs is deleted.
        description: Shown with the progress bar.

    Raises:
        InputError: As ``train``; of several members it is named.
    """
    for name, member in members.items():
        check_layer(lm, member.objective.layer)
        if (member.objective.classes is None) != (head_of(lm, name) is None):
            raise InputError(f"classes: {member.objective.classes} in the objective; give adapted() the same")
    for member in members.values():
        smallest = min(schedule.batch_size, len(member.examples) % schedule.batch_size or schedule.batch_size)
        if smallest < processes.count():
            raise InputError(
                f"batch_size: {len(member.examples)} items in batches of {schedule.batch_size} make one of {smallest}, "
                f"which {processes.count()} processes cannot share"
            )
    make_trainable(wrapped, list(members))
    arguments = group_arguments(wrapped, members, schedule, work)
    with arguments.main_process_first(local=False):
        open_run_folder(work, wrapped, _settings(lm, wrapped, members, schedule))
    log, watched, _ = LensTrainer(lm, wrapped, arguments, members, schedule.batch_size).run(description)
    return {
        name: Trained(
            [
                {
                    "step": entry["step"],
                    **{part: entry[f"{name}/{part}"] for part in LensTrainer.shown if f"{name}/{part}" in entry},
                }
                for entry in log
            ],
            [{"step": entry["step"], **entry[name]} for entry in watched if name in entry],
            sum(parameter.numel() for parameter in parameters_of(wrapped, name).values()),
        )
        for name in members
    }


class LensLoss(nn.Module):
    """The losses of a batch. It is what is trained, so that whatever wraps a module sees every product.

    Args:
        lm: The model.
        wrapped: It with adapters.
        objectives: By adapter.
    """

    def __init__(self, lm: LanguageModel, wrapped: PeftModel, objectives: Mapping[str, Objective]) -> None:
        super().__init__()
        self.wrapped, self.lm, self.objectives = wrapped, lm, objectives

    def forward(self, inputs: dict[str, Tensor], rows: list[int], members: dict[str, Any]) -> dict[str, Any]:
        """``class_loss`` and ``answer_loss`` of each member, where they are part of its loss, in nats.

        Means over the batch. In one of several processes a sum over its share of the batch, so divided that the mean
        over processes, which is what their gradients are reduced to, is the mean over the batch.
        """
        readout, objectives = self.lm.readout, self.objectives
        layers = {name: o.layer for name, o in objectives.items() if o.class_weight and o.layer is not None}
        answering = [name for name, objective in objectives.items() if objective.class_weight < 1]
        owners = [name for name, count in zip(members, rows, strict=True) for _ in range(count)]
        with ExitStack() as stack:
            outputs = {at: stack.enter_context(outputs_of(self.lm.blocks[at])) for at in set(layers.values())}
            stack.enter_context(each_its_own(self.wrapped, owners))
            if not answering:
                stack.enter_context(stopping_after(self.lm.blocks[max(layers.values())]))
            normed = last_states(inputs, self.lm.model)
        losses: dict[str, dict[str, Tensor]] = {name: {} for name in members}
        pieces: list[tuple[str, str, Tensor, Tensor]] = []
        for name, layer in layers.items():
            read = readout.norm(outputs[layer][0].flatten(0, 1)[members[name]["read"]])
            head, target = head_of(self.lm, name), members[name]["target"]
            if head is None:
                pieces.append((name, "class_loss", read, target))
            else:
                values = functional.cross_entropy(head(read), target, reduction="none")
                losses[name]["class_loss"] = values.sum() / members[name]["class_loss"]
        for name in answering:
            batch = members[name]
            pieces.append((name, "answer_loss", normed[batch["answer_read"]], batch["answer_token"]))
        if pieces:
            names, parts, states, tokens = zip(*pieces, strict=True)
            scored = cross_entropy(torch.cat(states), readout, torch.cat(tokens)).split([len(t) for t in tokens])
            for name, part, values in zip(names, parts, scored, strict=True):
                losses[name][part] = values.sum() / members[name][part]
        return losses


class LensTrainer(GroupTrainer):
    """Trains on what the lens and the text say: ``LensLoss``."""

    shown: ClassVar[dict[str, str]] = {"loss": "loss", "class_loss": "class", "answer_loss": "answer"}

    def __init__(
        self,
        lm: LanguageModel,
        wrapped: PeftModel,
        arguments: TrainingArguments,
        members: Mapping[str, Member],
        batch_size: int,
    ) -> None:
        self.members = members
        self.limit = EXPLODED * math.log(len(lm.readout.weight))
        objectives = {name: member.objective for name, member in members.items()}
        steps = [
            {name: [members[name].examples[i] for i in batch] for name, batch in zip(members, batches, strict=True)}
            for batches in zip(
                *(order(len(m.examples), batch_size, arguments.max_steps, m.seed) for m in members.values()),
                strict=True,
            )
        ]

        def inputs(step: dict[str, Any]) -> dict[str, Any]:
            return collate(step, objectives, lm.model, processes.rank(), processes.count())

        super().__init__(LensLoss(lm, wrapped, objectives), wrapped, arguments, members, steps, inputs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The sum over members of the loss of one batch; see ``Objective``."""
        total = []
        for name, losses in model(**inputs).items():
            weight = self.members[name].objective.class_weight
            shares = {"class_loss": weight, "answer_loss": 1 - weight}
            loss = torch.stack([shares[part] * value for part, value in losses.items()]).sum()
            self._check(name, loss)
            for part, value in {"loss": loss, **losses}.items():
                mean = self.accelerator.reduce(value.detach().clone(), "mean")
                self.parts.setdefault(f"{name}/{part}", []).append(mean.item())
            total.append(loss)
        return torch.stack(total).sum()

    def _check(self, name: str, loss: Tensor) -> None:
        if not loss.isfinite() or loss > self.limit:
            step = self.state.global_step + 1
            whose = "" if name == ALONE else f" of {name}"
            raise InputError(
                f"learning_rate: training{whose} diverged at step {step} (loss {loss.item():.4g}, learning rate "
                f"{self.args.learning_rate:g}); choose a smaller one and run again"
            )


def _settings(
    lm: LanguageModel, wrapped: PeftModel, members: Mapping[str, Member], schedule: Schedule
) -> dict[str, Any]:
    """Whatever decides the runs beside their starts."""
    settings = {
        name: {
            "adapter": adapter_settings(wrapped, name),
            "objective": asdict(member.objective),
            "seed": member.seed,
            "examples": digest_of(member.examples),
        }
        for name, member in members.items()
    }
    return {**model_settings(lm), "members": settings, "schedule": asdict(schedule)}
