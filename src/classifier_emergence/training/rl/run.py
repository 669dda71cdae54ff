"""Reinforcement learning on short answers (GRPO), alone or with a loss on the lens: a run, resumed if it was cut short.

What is minimised is in ``trainer``, how completions are drawn in ``rollouts``.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from classifier_emergence.errors import InputError
from classifier_emergence.processes import check_alone
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.training.flaws import HeldInDtype, UncorrectedMoments, round_to_dtype_
from classifier_emergence.training.group_trainer import (
    Schedule,
    adapter_settings,
    check_layer,
    digest_of,
    model_settings,
)
from classifier_emergence.training.rl.rewards import Reward, name_of
from classifier_emergence.training.rl.rollouts import line_ends
from classifier_emergence.training.rl.trainer import GrpoWithLens, PolicyObjective, PolicyTask, Sampling, arguments
from classifier_emergence.training.run_folder import open_run_folder


@dataclass(frozen=True)
class GrpoRun:
    """What a run leaves."""

    steps: list[dict[str, float | None]]
    """One entry a step, under the names of ``STATISTICS``; ``step`` counts from 1."""
    watched: list[dict[str, Any]]
    """``step`` and what ``watch`` returned; step 0 comes first."""
    parameters: int
    """Trained parameters."""


STATISTICS = {
    "step": "step",
    "loss": "loss",
    "reward": "reward",
    "frac_reward_zero_std": "zero_variance",
    "kl": "kl",
    "signed_kl": "signed_kl",
    "entropy": "entropy",
    "completions/clipped_ratio": "truncated",
    "class_loss": "class_loss",
}
"""Names in the log of the trainer -> ours. ``reward`` is a mean; ``zero_variance`` the share of groups whose rewards
are all equal; ``kl`` (k3) and ``entropy`` are means over the completions' tokens, in nats; ``truncated`` is the share
of completions that were cut; ``class_loss`` is in nats. What a run does not have is missing."""


class UntilClassLoss(TrainerCallback):
    """Ends training after the first step whose class loss is at most ``limit``; of that end there is no checkpoint."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the step that was logged."""
        if kwargs["logs"].get("class_loss", math.inf) <= self.limit:
            control.should_training_stop = True
            control.should_save = False


@contextmanager
def all_weights_trainable(lm: LanguageModel) -> Iterator[PreTrainedModel]:
    """The model with every weight trainable; its weights are put back at the end."""
    model = lm.model
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    for parameter, values in before:
        parameter.data = values.clone()  # what was loaded stays as it is, mapped from its file: it takes no memory
    model.requires_grad_(True)
    try:
        yield model
    finally:
        for parameter, values in before:
            parameter.data = values
            parameter.grad = None
        model.requires_grad_(False).eval()


def train_grpo(
    lm: LanguageModel,
    model: PreTrainedModel | PeftModel,
    tasks: Sequence[PolicyTask],
    reward: Reward,
    objective: PolicyObjective,
    sampling: Sampling,
    schedule: Schedule,
    *,
    work: Path,
    watch: Callable[[], dict[str, Any]] | None = None,
    checkpoint_every: int | None = None,
    dtype: torch.dtype = torch.float32,
    bias_correction: bool = True,
    until: float = -math.inf,
    description: str | None = None,
) -> GrpoRun:
    """Train; resume from the last checkpoint in ``work`` if it belongs to this very run.

    Args:
        lm: The model.
        model: It, from ``all_weights_trainable`` or ``adapters.adapted``: what requires a gradient is trained.
            The reference of the divergence is the model as it was loaded, or with the adapter that it comes with.
        tasks: In the order in which they are taken, ``schedule.batch_size`` a step.
        reward: Of completions; what it does wrong stops the run (see ``rewards.checked``).
        objective: What is minimised.
        sampling: How completions are drawn.
        schedule: How long and how fast; one step is one draw of completions and one update.
        work: Folder for checkpoints; what lies there from a run with other settings is deleted.
        watch: Measured before the first step, every ``schedule.every`` steps and after the last.
        checkpoint_every: Steps between checkpoints, ``schedule.every`` if None; one of a whole model is three times
            the model's size.
        dtype: That the trained weights are held in, from before the first step on; see ``HeldInDtype``.
        bias_correction: Of Adam's moments; False is a flaw, see ``UncorrectedMoments``.
        until: End after the first step whose class loss, before its update, is at most this.
        description: Shown with the progress bar.

    Raises:
        InputError: There are several processes, the tasks are too many or too few, the model has no such layer,
            ``reward`` fails, or the loss is not finite.
    """
    check_run(lm, tasks, objective, sampling, schedule)
    adapters = {}
    if isinstance(model, PeftModel):
        adapters = {name: adapter_settings(model, name) for name in model.active_adapters}
    settings = {
        **model_settings(lm),
        "adapters": adapters,
        "reward": name_of(reward),
        "tasks": digest_of(tasks),
        "objective": asdict(objective),
        "sampling": asdict(sampling),
        "schedule": asdict(schedule),
        "dtype": str(dtype),
        "bias_correction": bias_correction,
        "until": str(until),
    }
    round_to_dtype_((p for p in model.parameters() if p.requires_grad), dtype)
    open_run_folder(work, model, settings)
    with borrowed(lm, model):
        how = arguments(objective, sampling, schedule, work, checkpoint_every)
        trainer = GrpoWithLens(lm, model, how, tasks, reward, objective, watch)
        trainer.add_callback(UntilClassLoss(until))
        if dtype != torch.float32:
            trainer.add_callback(HeldInDtype(dtype))
        if not bias_correction:
            trainer.add_callback(UncorrectedMoments())
        log, watched, parameters = trainer.run(description)
    steps = [{ours: entry[name] for name, ours in STATISTICS.items() if name in entry} for entry in log]
    return GrpoRun(steps, watched, parameters)


def check_run(
    lm: LanguageModel,
    tasks: Sequence[PolicyTask],
    objective: PolicyObjective,
    sampling: Sampling,
    schedule: Schedule,
) -> None:
    """Refuse what does not fit together.

    Raises:
        InputError: See ``train_grpo``.
    """
    check_alone("GRPO")
    needed = schedule.steps * schedule.batch_size
    if len(tasks) != needed:
        raise InputError(f"tasks: {len(tasks)} given, {schedule.steps} steps of {schedule.batch_size} take {needed}")
    if sampling.group < 2:
        raise InputError(f"group: {sampling.group} completion has nothing to be compared with; take 2 or more")
    check_layer(lm, objective.layer)


@contextmanager
def borrowed(lm: LanguageModel, model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """A model to give to a trainer: completions end at line breaks; what the trainer leaves on it is taken off."""
    base: Any = lm.model
    config = base.config.get_text_config()
    forward, generation, pad = vars(base).get("forward"), base.generation_config, config.pad_token_id
    recomputing = base.is_activation_checkpointing
    if recomputing:  # it goes without the cache that shared prompts need
        base.activation_checkpointing_disable()
    base.generation_config = copy.deepcopy(generation)
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    base.generation_config.eos_token_id = [*(i for i in ends if i is not None), *line_ends(lm.tokenizer)]
    try:
        yield
    finally:
        base.generation_config, config.pad_token_id = generation, pad
        if recomputing:
            base.activation_checkpointing_enable()
        elif base.is_activation_checkpointing:
            base.activation_checkpointing_disable()
        if forward is None:
            vars(base).pop("forward", None)
        else:
            base.forward = forward
        if isinstance(model, PeftModel) and "ref" in model.peft_config:
            model.delete_adapter("ref")
