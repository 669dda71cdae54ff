"""GRPO of several low-rank adapters at once: each is, within rounding, what ``train_grpo`` makes of it alone.

A step streams the frozen weights once for all: completions of all members are drawn in one batch, and one pass gives
what their losses read. What the divergence is measured from passes once for all that start alike. The loss is that of
``trainer``, with the statistics of ``run.STATISTICS``.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainingArguments

from classifier_emergence.errors import InputError
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.readout import Readout
from classifier_emergence.reading.residuals import outputs_of, stopping_after
from classifier_emergence.reading.tree import batches, joint_pass, last_states, one_pass
from classifier_emergence.training.adapters import copy_adapter, each_its_own, make_trainable, parameters_of
from classifier_emergence.training.group_trainer import (
    GroupTrainer,
    Schedule,
    adapter_settings,
    digest_of,
    group_arguments,
    model_settings,
)
from classifier_emergence.training.rl.rewards import Reward, checked, name_of
from classifier_emergence.training.rl.rollouts import (
    Draws,
    draw_completions,
    generator_of,
    token_log_probs,
)
from classifier_emergence.training.rl.run import STATISTICS, GrpoRun, borrowed, check_run
from classifier_emergence.training.rl.trainer import PolicyObjective, PolicyTask, Sampling
from classifier_emergence.training.run_folder import fingerprint, open_run_folder

UNTRAINED = ""
"""What the divergence is measured from where an adapter does nothing yet: the model without it. No adapter has it."""


@dataclass(frozen=True)
class PolicyMember:
    """One of several runs that train together."""

    tasks: Sequence[PolicyTask]
    """In the order in which they are taken, ``Schedule.batch_size`` a step."""
    objective: PolicyObjective
    """Without the flaws of the originals, which ``train_grpo`` has."""
    seed: int
    """Of what is drawn."""
    learning_rate: float | None = None
    """In place of that of the schedule."""
    watch: Callable[[], dict[str, Any]] | None = None
    """Measured as by ``train_grpo``, with the member's adapter on."""


def train_grpo_together(
    lm: LanguageModel,
    wrapped: PeftModel,
    members: Mapping[str, PolicyMember],
    reward: Reward,
    sampling: Sampling,
    schedule: Schedule,
    *,
    work: Path,
    checkpoint_every: int | None = None,
    description: str | None = None,
) -> dict[str, GrpoRun]:
    """Train; resume from the last checkpoint in ``work``, which holds all members, if it belongs to these very runs.

    Args:
        lm: The model; its layers must go by a mask (see ``tree.takes_trees``).
        wrapped: It with the members' adapters, from ``adapted_together``; the divergence is from what they are now.
        members: By the names of their adapters.
        reward: Of completions, of all members.
        sampling: How completions are drawn, of all members.
        schedule: Of all; its seed is not used.
        work: Folder for checkpoints; what lies there from other runs is deleted.
        checkpoint_every: Steps between checkpoints, ``schedule.every`` if None.
        description: Shown with the progress bar.

    Raises:
        InputError: As ``train_grpo``; an objective has a flaw that this does not know; or see ``draw_completions``.
    """
    for name, member in members.items():
        check_run(lm, member.tasks, member.objective, sampling, schedule)
        if member.objective.signed_kl or member.objective.entropy_bonus:
            raise InputError(f"objective of {name}: signed_kl and entropy_bonus are of runs by themselves: train_grpo")
    make_trainable(wrapped, list(members))
    open_run_folder(work, wrapped, _settings(lm, wrapped, members, reward, sampling, schedule))
    arguments = group_arguments(
        wrapped, members, schedule, work, logging_steps=1, save_steps=checkpoint_every or schedule.every
    )
    with borrowed(lm, wrapped), kept_starts(wrapped, members) as starts:
        trainer = PolicyTrainer(lm, wrapped, arguments, members, reward, sampling, schedule, starts)
        log, watched, _ = trainer.run(description)
    return {
        name: GrpoRun(
            [{part: entry[key] for part in STATISTICS.values() if (key := _key(name, part)) in entry} for entry in log],
            [{"step": entry["step"], **entry[name]} for entry in watched if name in entry],
            sum(parameter.numel() for parameter in parameters_of(wrapped, name).values()),
        )
        for name in members
    }


@contextmanager
def kept_starts(wrapped: PeftModel, members: Mapping[str, PolicyMember]) -> Iterator[dict[str, list[str]]]:
    """What the members are now, in adapters of their own, taken off at the end; members that start alike share one.

    Yields:
        Adapter -> the members whose divergence is measured from it; ``UNTRAINED`` is no adapter.
    """
    alike: dict[str, list[str]] = {}
    for name, member in members.items():
        if member.objective.kl_weight and member.objective.draws:
            weights = {full.replace(f".{name}.", "."): p for full, p in parameters_of(wrapped, name).items()}
            idle = not any(bool(p.any()) for full, p in weights.items() if "lora_B" in full)
            key = UNTRAINED if idle else fingerprint(weights) + json.dumps(adapter_settings(wrapped, name))
            alike.setdefault(key, []).append(name)
    starts = {UNTRAINED if key == UNTRAINED else f"start_of_{names[0]}": names for key, names in alike.items()}
    copies = {start: names[0] for start, names in starts.items() if start != UNTRAINED}
    for start, name in copies.items():
        wrapped.add_adapter(start, wrapped.peft_config[name])
        copy_adapter(wrapped, name, [start])
    make_trainable(wrapped, list(members))
    try:
        yield starts
    finally:
        for start in copies:
            wrapped.delete_adapter(start)


@dataclass(frozen=True)
class Batch:
    """What a member's loss of one step reads."""

    prompts: list[list[int]]
    """Token ids, one of each task."""
    targets: Tensor
    """(tasks,) what the lens should say of each prompt."""
    back: list[int]
    """How many tokens before the last one of each it should say so."""
    rows: list[int]
    """For each completion its prompt."""
    completions: list[list[int]]
    advantages: Tensor
    """(completions,)"""

    @property
    def texts(self) -> list[list[int]]:
        """What passes, without last tokens, which are only predicted; prompts by themselves if nothing was drawn."""
        if not self.rows:
            return self.prompts
        return [self.prompts[row] + ids[:-1] for row, ids in zip(self.rows, self.completions, strict=True)]

    def read(self, completion: int, path: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Where each token of a completion is predicted, given the nodes of its text; and the token."""
        start = len(self.prompts[self.rows[completion]]) - 1
        return zip(path[start:], self.completions[completion], strict=True)

    def lens_nodes(self, paths: Sequence[list[int]]) -> list[int]:
        """The node of every prompt that the lens reads, given the nodes of each text."""
        of = [paths[self.rows.index(i)] if self.rows else paths[i] for i in range(len(self.prompts))]
        return [path[len(prompt) - 1 - n] for path, prompt, n in zip(of, self.prompts, self.back, strict=True)]


class PolicyLoss(nn.Module):
    """What the losses of a step read, of all members.

    Args:
        lm: The model.
        wrapped: It with adapters.
        objectives: By adapter.
        temperature: Of the policy.
    """

    def __init__(
        self, lm: LanguageModel, wrapped: PeftModel, objectives: Mapping[str, PolicyObjective], temperature: float
    ) -> None:
        super().__init__()
        self.wrapped, self.lm, self.objectives, self.temperature = wrapped, lm, objectives, temperature

    def forward(self, drawn: Mapping[str, Batch]) -> dict[str, dict[str, Tensor]]:
        """Of each member ``log_prob`` and ``entropy`` (completions' tokens,) and ``class_loss`` (tasks,), in nats."""
        readout = self.lm.readout
        layers = {name: o.layer for name, o in self.objectives.items() if o.class_weight and o.layer is not None}
        inputs, paths, counts = joint_pass([batch.texts for batch in drawn.values()], self.lm.model)
        owners = [name for name, count in zip(drawn, counts, strict=True) for _ in range(count)]
        drawing = {name: (batch, p) for (name, batch), p in zip(drawn.items(), paths, strict=True) if batch.rows}
        with ExitStack() as stack:
            outputs = {at: stack.enter_context(outputs_of(self.lm.blocks[at])) for at in set(layers.values())}
            stack.enter_context(each_its_own(self.wrapped, owners))
            if not drawing:
                stack.enter_context(stopping_after(self.lm.blocks[max(layers.values())]))
            states = last_states(inputs, self.lm.model)
        found: dict[str, dict[str, Tensor]] = {name: {} for name in drawn}
        for (name, batch), nodes in zip(drawn.items(), paths, strict=True):
            if name in layers:
                read = readout.norm(outputs[layers[name]][0].flatten(0, 1)[batch.lens_nodes(nodes)])
                found[name]["class_loss"] = -token_log_probs(read, readout, batch.targets)[0]
        if drawing:
            pairs = [[pair for i in range(len(b.rows)) for pair in b.read(i, p[i])] for b, p in drawing.values()]
            scores = pair_log_probs(states, list(itertools.chain(*pairs)), readout, self.temperature)
            split = [values.split([len(own) for own in pairs]) for values in scores]
            for name, log_prob, entropy in zip(drawing, *split, strict=True):
                found[name] |= {"log_prob": log_prob, "entropy": entropy}
        return found


def pair_log_probs(
    states: Tensor, pairs: Sequence[tuple[int, int]], readout: Readout, temperature: float
) -> tuple[Tensor, Tensor]:
    """(pairs,) log-probability of a token after a node, and entropy there; what several texts share is scored once."""
    index = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
    nodes, tokens = torch.tensor(list(index), device=states.device).T
    scores = token_log_probs(states[nodes], readout, tokens, temperature=temperature)
    of = torch.tensor([index[pair] for pair in pairs], device=states.device)
    return scores[0][of], scores[1][of]


class PolicyTrainer(GroupTrainer):
    """Draws, rewards and trains, a step of all members at a time."""

    shown: ClassVar[dict[str, str]] = {"reward": "reward", "kl": "kl", "class_loss": "class_loss"}

    def __init__(
        self,
        lm: LanguageModel,
        wrapped: PeftModel,
        arguments: TrainingArguments,
        members: Mapping[str, PolicyMember],
        reward: Reward,
        sampling: Sampling,
        schedule: Schedule,
        starts: Mapping[str, list[str]],
    ) -> None:
        self.lm, self.members, self.sampling, self.starts, self.reward = lm, members, sampling, starts, checked(reward)
        size = schedule.batch_size
        steps = [
            {name: list(member.tasks[at : at + size]) for name, member in members.items()}
            for at in range(0, schedule.steps * size, size)
        ]
        objectives = {name: member.objective for name, member in members.items()}
        module = PolicyLoss(lm, wrapped, objectives, sampling.temperature)
        super().__init__(module, wrapped, arguments, members, steps, lambda step: step)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Every member has its own learning rate."""
        if self.optimizer is None:
            rates = {name: member.learning_rate for name, member in self.members.items()}
            groups = [
                {"params": list(self.owned[name].values()), "lr": self.args.learning_rate if rate is None else rate}
                for name, rate in rates.items()
            ]
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.AdamW(
                groups, betas=betas, eps=self.args.adam_epsilon, weight_decay=0.0, fused=True
            )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The sum of the members' losses on completions that are drawn now; see ``PolicyObjective``."""
        model.eval()  # as trl, without dropout
        drawn = self._drawn(inputs)
        reference = self._reference(drawn)
        total = []
        for name, found in model(drawn).items():
            batch, objective = drawn[name], self.members[name].objective
            loss = torch.zeros((), device=batch.targets.device)
            parts: dict[str, Tensor] = {}
            if batch.rows:
                loss, parts = _policy_loss(batch, objective.kl_weight, found, reference.get(name))
            if "class_loss" in found:
                parts["class_loss"] = found["class_loss"].mean()
                loss = (1 - objective.class_weight) * loss + objective.class_weight * parts["class_loss"]
            self._check(name, loss)
            for part, value in {"loss": loss, **parts}.items():
                self._keep(name, part, value.item())
            total.append(loss)
        return torch.stack(total).sum()

    def _drawn(self, tasks: Mapping[str, list[PolicyTask]]) -> dict[str, Batch]:
        device, tokenizer = self.lm.model.device, self.lm.tokenizer
        encoded: dict[str, list[list[int]]] = {
            name: tokenizer([task.prompt for task in own])["input_ids"] for name, own in tasks.items()
        }
        rows = [row for row in range(len(next(iter(tasks.values())))) for _ in range(self.sampling.group)]
        drawing = {
            name: Draws(
                encoded[name], rows, generator_of(self.members[name].seed, self.state.global_step, device), name
            )
            for name in tasks if self.members[name].objective.draws
        }  # fmt: skip
        stop = self.lm.model.generation_config.eos_token_id
        completions: dict[str, list[list[int]]] = {}
        if drawing:
            found = draw_completions(
                self.lm, list(drawing.values()), new_tokens=self.sampling.new_tokens,
                temperature=self.sampling.temperature, stop=stop, wrapped=self.wrapped,
            )  # fmt: skip
            completions = dict(zip(drawing, found, strict=True))
        batches = {}
        for name, own in tasks.items():
            targets = torch.tensor([task.target for task in own], device=device)
            ids = completions.get(name, [])
            advantages = self._advantages(name, [own[row] for row in rows], ids).to(device) if ids else torch.empty(0)
            back = [task.back for task in own]
            batches[name] = Batch(encoded[name], targets, back, rows if ids else [], ids, advantages)
        return batches

    def _advantages(self, name: str, tasks: Sequence[PolicyTask], completions: list[list[int]]) -> Tensor:
        """(completions,) rewards in units of their group's standard deviation, from its mean."""
        texts = self.lm.tokenizer.batch_decode(completions, skip_special_tokens=True)
        rewards = self.reward([task.prompt for task in tasks], texts, [task.answer for task in tasks])
        grouped = torch.tensor(rewards, dtype=torch.float32).view(-1, self.sampling.group)
        spread = grouped.std(1, keepdim=True)
        ends = {*self.lm.model.generation_config.eos_token_id, self.lm.tokenizer.pad_token_id}
        self._keep(name, "reward", grouped.mean().item())
        self._keep(name, "zero_variance", torch.isclose(spread, torch.zeros_like(spread)).float().mean().item())
        self._keep(name, "truncated", sum(ids[-1] not in ends for ids in completions) / len(completions))
        return ((grouped - grouped.mean(1, keepdim=True)) / (spread + 1e-4)).flatten()

    @torch.no_grad()
    def _reference(self, drawn: Mapping[str, Batch]) -> dict[str, Tensor]:
        """(completions' tokens,) log-probabilities of what was drawn, by what each member started from."""
        found: dict[str, list[Tensor]] = {}
        for start, names in self.starts.items():
            places = [(name, i) for name in names for i in range(len(drawn[name].rows))]
            texts = [text for name in names for text in drawn[name].texts]
            found |= {name: [torch.empty(0)] * len(drawn[name].rows) for name in names}
            for chosen in batches(texts):
                inputs, paths = one_pass([texts[i] for i in chosen], self.lm.model)
                with each_its_own(self.wrapped, [start] * len(inputs["input_ids"])):
                    states = last_states(inputs, self.lm.model)
                pairs = [[*drawn[places[i][0]].read(places[i][1], p)] for i, p in zip(chosen, paths, strict=True)]
                flat = list(itertools.chain(*pairs))
                scores = pair_log_probs(states, flat, self.lm.readout, self.sampling.temperature)[0]
                for i, values in zip(chosen, scores.split([len(own) for own in pairs]), strict=True):
                    name, completion = places[i]
                    found[name][completion] = values
        return {name: torch.cat(values) for name, values in found.items()}

    def _keep(self, name: str, part: str, value: float) -> None:
        self.parts.setdefault(_key(name, part), []).append(value)

    def _check(self, name: str, loss: Tensor) -> None:
        if not loss.isfinite():
            raise InputError(
                f"learning_rate: the loss of {name} at step {self.state.global_step + 1} is not finite; choose a "
                "smaller one and run again"
            )


def _policy_loss(
    batch: Batch, kl_weight: float, found: Mapping[str, Tensor], reference: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """GRPO's loss, a mean over the tokens of each completion and then over completions; and its statistics.

    The policy that is trained is the one that drew, so its ratio to itself is 1 and nothing is clipped.
    """
    log_prob = found["log_prob"]
    sizes = torch.tensor([len(ids) for ids in batch.completions], device=log_prob.device)
    values = -(log_prob - log_prob.detach()).exp() * batch.advantages.repeat_interleave(sizes)
    parts = {"entropy": found["entropy"].detach().mean()}
    if reference is not None:
        gap = reference - log_prob
        k3 = gap.exp() - gap - 1
        values, parts["kl"] = values + kl_weight * k3, k3.detach().mean()
    share = (1 / sizes / len(sizes)).repeat_interleave(sizes)
    return (share * values).sum(), parts


def _key(name: str, part: str) -> str:
    return part if part == "step" else f"{name}/{part}"


def _settings(
    lm: LanguageModel,
    wrapped: PeftModel,
    members: Mapping[str, PolicyMember],
    reward: Reward,
    sampling: Sampling,
    schedule: Schedule,
) -> dict[str, Any]:
    """Whatever decides the runs beside their starts."""
    settings = {
        name: {
            "adapter": adapter_settings(wrapped, name),
            "objective": asdict(member.objective),
            "seed": member.seed,
            "learning_rate": member.learning_rate,
            "tasks": digest_of(member.tasks),
        }
        for name, member in members.items()
    }
    return {
        **model_settings(lm),
        "members": settings,
        "reward": name_of(reward),
        "sampling": asdict(sampling),
        "schedule": asdict(schedule),
    }
