"""Supervised training of LoRA adapters, with an objective that may read the logit lens at a middle layer.

One family covers every study: ``loss = w * CE(lens at layer L, word) + (1 - w) * CE(answer)``. Dual reward is w = 0.4
on V and O; plain fine-tuning, on whatever text follows the prompt, is w = 0. Only the positions that a loss reads pass
through the unembedding.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerState, TrainingArguments

from classifier_emergence import processes
from classifier_emergence.errors import InputError
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import outputs_of, stopping_after
from classifier_emergence.reading.tree import joint_pass, last_states
from classifier_emergence.training.adapters import ALONE, each_its_own, head_of, make_trainable, parameters_of
from classifier_emergence.training.cross_entropy import cross_entropy
from classifier_emergence.training.run_folder import WatchingTrainer, open_run_folder

TRAINED = "trained.safetensors"
EXPLODED = 10.0
"""Training has diverged once the loss exceeds this multiple of ``ln(vocabulary)``, the loss of a uniform guess."""


@dataclass(frozen=True)
class Objective:
    """What is minimised; see the top of this module."""

    class_weight: float
    """w, within [0, 1]."""
    layer: int | None = None
    """0-based block after which the lens reads; may be None if w is 0."""
    answer_shifted: bool = True
    """False scores the logits at a token against that same token: a flaw of the originals."""
    read: Literal["prompt", "answer"] = "prompt"
    """Where the lens reads: at the last token of the prompt, or (a flaw of the originals) of the answer."""
    classes: int | None = None
    """Train a linear head with so many classes on the state at ``layer`` instead of reading the lens."""

    def __post_init__(self) -> None:
        check_class_weight(self.class_weight, self.layer)


def check_class_weight(weight: float, layer: int | None) -> None:
    """Refuse the weight of a loss on the lens that is no share, or a lens that reads nowhere.

    Raises:
        InputError: One of the two.
    """
    if not 0 <= weight <= 1:
        raise InputError(f"class_weight: {weight} is not within [0, 1]")
    if weight and layer is None:
        raise InputError("layer: none given, but class_weight is not 0; say which layer the lens reads")


@dataclass(frozen=True)
class Schedule:
    """Steps of AdamW at a constant learning rate, without weight decay, gradients clipped at norm 1."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    every: int
    """Steps between log entries, evaluations and checkpoints."""


def common_arguments(schedule: Schedule, work: Path) -> dict[str, Any]:
    """Settings of every trainer here, none left at a default that a release may change."""
    return {
        "output_dir": str(work),
        "max_steps": schedule.steps,
        "learning_rate": schedule.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "logging_nan_inf_filter": False,
        "eval_steps": schedule.every,
        "seed": schedule.seed,
        "data_seed": schedule.seed,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": "none",
    }


class Watched(Protocol):
    """A run that trains with others."""

    @property
    def watch(self) -> Callable[[], dict[str, Any]] | None:
        """Measured with its adapter on."""


def group_arguments(
    wrapped: PeftModel, members: Mapping[str, Watched], schedule: Schedule, work: Path, **more: Any
) -> TrainingArguments:
    """Settings of the trainer of several runs; ``more`` in place of some of them."""
    settings = common_arguments(schedule, work) | {
        "max_grad_norm": 0.0,  # clipped by member
        "per_device_train_batch_size": 1,
        "optim": "adamw_torch_fused",
        "logging_steps": schedule.every,
        "eval_strategy": "no" if all(member.watch is None for member in members.values()) else "steps",
        "save_steps": schedule.every,
        "use_cpu": wrapped.device.type == "cpu",
    }
    return TrainingArguments(**settings | more)


@dataclass(frozen=True)
class Example:
    """One training text: ids of prompt and answer, and the class that the lens should name at the prompt's end."""

    ids: list[int]
    prompt_length: int
    target: int
    """Token id of the class's word, or number of the class for a head."""
    read_at: int | None = None
    """Index of the token at which the lens should name it; None: the one that ``Objective.read`` says."""


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


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, target: int = 0) -> Example:
    """Token ids of a prompt and what should follow it, ended by the end-of-text token.

    Raises:
        InputError: The tokens of the prompt change when the answer follows, so that no position is "the prompt's last".
    """
    prompt_ids: list[int] = tokenizer(prompt)["input_ids"]
    ids: list[int] = tokenizer(prompt + answer)["input_ids"]
    if ids[: len(prompt_ids)] != prompt_ids or len(ids) == len(prompt_ids):
        raise InputError(f"prompt {prompt!r}: the tokenizer splits it in another way when {answer!r} follows")
    return Example([*ids, int(tokenizer.eos_token_id)], len(prompt_ids), target)


@dataclass(frozen=True)
class Member:
    """One of several runs that train together."""

    examples: Sequence[Example]
    """From ``encode``; drawn without replacement, in an order that the seed sets."""
    objective: Objective
    seed: int
    watch: Callable[[], dict[str, Any]] | None = None
    """Measured before the first step and every ``Schedule.every`` steps, with the member's adapter on."""


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
        open_run_folder(work, wrapped, _settings(wrapped, members, schedule))
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


def order(n: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Which of ``n`` examples each step takes: every epoch is a permutation of its own, its last batch what is left."""
    batches: list[list[int]] = []
    for epoch in itertools.count():
        permutation = torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        batches += [permutation[start : start + batch_size] for start in range(0, n, batch_size)]
        if len(batches) >= steps:
            return batches[:steps]
    raise AssertionError


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


class GroupTrainer(WatchingTrainer, Trainer):
    """``transformers.Trainer`` of several runs, each an adapter; an item of its dataset is a step of all of them.

    Args:
        module: Gives the losses of a step.
        wrapped: The model with the members' adapters.
        arguments: From ``group_arguments``.
        members: By adapter.
        steps: What each member is trained on, step by step.
        collate: Makes the inputs of ``module`` of one step.
    """

    def __init__(
        self,
        module: nn.Module,
        wrapped: PeftModel,
        arguments: TrainingArguments,
        members: Mapping[str, Watched],
        steps: list[dict[str, Any]],
        collate: Callable[[dict[str, Any]], Any],
    ) -> None:
        self.wrapped, self.watches, self.steps = wrapped, {name: m.watch for name, m in members.items()}, steps
        self.owned = {name: parameters_of(wrapped, name) for name in members}
        self.parts: dict[str, list[float]] = {}
        self.watch = self._watch if any(self.watches.values()) else None
        super().__init__(
            model=module,
            args=arguments,
            train_dataset=steps,
            eval_dataset=steps[:1],  # Trainer asks for one; ``evaluate`` does not look at it
            data_collator=lambda batch: collate(batch[0]),
        )

    def _watch(self) -> dict[str, Any]:
        watched = {}
        for name, watch in self.watches.items():
            if watch is not None:
                self.wrapped.set_adapter(name)
                watched[name] = watch()
        make_trainable(self.wrapped, list(self.watches))
        return watched

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The steps in order. Every process gets all of them, and takes its share of each when they are collated."""
        return DataLoader(self.steps, collate_fn=self.data_collator)  # type: ignore[arg-type]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Gradients of one step, clipped at norm 1 for each member."""
        loss: Tensor = super().training_step(*args, **kwargs)
        for owned in self.owned.values():
            nn.utils.clip_grad_norm_(owned.values(), 1.0)
        return loss

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Show the members' mean in place of their sum."""
        for part in self.shown:
            values = [v for key, numbers in self.parts.items() if key.endswith(f"/{part}") for v in numbers]
            if "loss" in logs and values:
                logs[part] = sum(values) / len(values)
        super().log(logs, start_time)

    def resume(self, checkpoint: str | None, advance: Callable[..., None]) -> None:
        """Train from a checkpoint on, or, if that is the end of the run, read it."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
            if state.global_step == self.args.max_steps:  # Trainer would take one step more
                self.state = state
                self._load_from_checkpoint(checkpoint)
                advance(state.global_step)
                return
        super().resume(checkpoint, advance)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Only what is trained, of all members in one file."""
        trained = {full: p.detach() for owned in self.owned.values() for full, p in owned.items()}
        Path(str(output_dir)).mkdir(parents=True, exist_ok=True)
        save_file({name: values.contiguous() for name, values in trained.items()}, f"{output_dir}/{TRAINED}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        missing = self.wrapped.load_state_dict(load_file(f"{resume_from_checkpoint}/{TRAINED}"), strict=False)
        assert not missing.unexpected_keys


class LensTrainer(GroupTrainer):
    """With the losses of this module."""

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


def collate(
    batches: Mapping[str, Sequence[Example]],
    objectives: Mapping[str, Objective],
    model: PreTrainedModel,
    rank: int = 0,
    world: int = 1,
) -> dict[str, Any]:
    """Inputs of one pass for the batches of all members, and the tokens that their losses read.

    Args:
        batches: By member.
        objectives: By member.
        model: Takes the inputs.
        rank: Of this process, which takes every ``world``-th example from this one on.
        world: Number of processes among which the batches are shared.

    Returns:
        ``inputs`` of the decoder; ``rows`` of each member in them; and for each of the ``members`` ``read`` and
        ``target`` (batch,): where the lens reads and what it should say; ``answer_read`` and ``answer_token`` (answer
        tokens,): the logits at the one are scored against the other. Where something is read is counted among the
        flattened states. ``class_loss`` and ``answer_loss``: by what a sum of losses is divided for the mean over the
        batch.
    """
    whole = batches
    batches = {name: batch[rank::world] for name, batch in whole.items()}
    # The last token of a text is only predicted, so it need not pass.
    texts = [
        [example.ids[:-1] if objectives[name].answer_shifted else example.ids for example in batch]
        for name, batch in batches.items()
    ]
    inputs, paths, rows = joint_pass(texts, model)
    members = {
        name: {
            **_what_is_read(batch, objectives[name], of_batch),
            "class_loss": len(whole[name]) / world,
            "answer_loss": sum(len(example.ids) - example.prompt_length for example in whole[name]) / world,
        }
        for (name, batch), of_batch in zip(batches.items(), paths, strict=True)
    }
    return {"inputs": inputs, "rows": rows, "members": members}


def _what_is_read(batch: Sequence[Example], objective: Objective, paths: list[list[int]]) -> dict[str, Tensor]:
    back = 1 if objective.answer_shifted else 0
    answers = [
        (path[position - back], example.ids[position])
        for path, example in zip(paths, batch, strict=True)
        for position in range(example.prompt_length, len(example.ids))
    ]
    read, token = torch.tensor(answers).T
    ends = [_read_of(example, objective) for example in batch]
    return {
        "read": torch.tensor([path[end] for path, end in zip(paths, ends, strict=True)]),
        "target": torch.tensor([example.target for example in batch]),
        "answer_read": read,
        "answer_token": token,
    }


def _read_of(example: Example, objective: Objective) -> int:
    if example.read_at is not None:
        return example.read_at
    # The end-of-text token is not part of the answer that the originals read after.
    return example.prompt_length - 1 if objective.read == "prompt" else len(example.ids) - 2


def check_layer(lm: LanguageModel, layer: int | None) -> None:
    """Refuse a block that the model does not have.

    Raises:
        InputError: It has none of this number.
    """
    if layer is not None and not 0 <= layer < lm.n_layers:
        raise InputError(f"layer: {layer}: the model has blocks 0 to {lm.n_layers - 1}")


def _settings(wrapped: PeftModel, members: Mapping[str, Member], schedule: Schedule) -> dict[str, Any]:
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
    return {"members": settings, "schedule": asdict(schedule)}


def adapter_settings(wrapped: PeftModel, name: str) -> dict[str, Any]:
    """What an adapter is, as JSON; a set's order is another in every process."""
    settings = wrapped.peft_config[name].to_dict()
    return {key: sorted(value) if isinstance(value, set) else str(value) for key, value in settings.items()}


def digest_of(data: Sequence[Any]) -> str:
    """A hash of dataclasses."""
    return hashlib.sha256(json.dumps([asdict(item) for item in data]).encode()).hexdigest()
