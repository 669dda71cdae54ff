"""Reinforcement learning on short answers (GRPO), alone or with a loss that reads the logit lens at a middle layer.

``loss = (1 - w) * GRPO + w * CE(lens at layer L, word)``, the lens read at the last token of the prompt. The policy
term, its divergence from the reference and its statistics are those of ``trl.GRPOTrainer``; w = 0 is that trainer.
A prompt passes through the model once for all completions that answer it, in sampling and in training.

Source: GRPO, Shao et al. (2024), arXiv:2402.03300; the divergence k3, Schulman (2020), Approximating KL divergence.
Prompts that a group shares pass once in Prefix Grouper, Liu et al. (2025), arXiv:2506.05433.
"""

import copy
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOConfig, GRPOTrainer
from trl.kernels import ChunkedLogProbFunction

from classifier_emergence.errors import InputError
from classifier_emergence.progress import progress
from classifier_emergence.readout import Readout, decoder_blocks, find_readout
from classifier_emergence.results import write_text_atomic
from classifier_emergence.rewards import Reward, checked
from classifier_emergence.training import Schedule, _last_checkpoint

BLOCK_TOKENS = 4096  # vocabulary rows whose logits are held at once: they stay in cache


@dataclass(frozen=True)
class Task:
    """A prompt to answer, and the class that the lens should name at its end."""

    prompt: str
    answer: str
    target: int
    """Token id of the class's word."""


@dataclass(frozen=True)
class PolicyObjective:
    """What is minimised; see the top of this module."""

    kl_weight: float
    """beta: weight of the mean k3 divergence from the model at the start, a token. 0 keeps no reference."""
    class_weight: float = 0.0
    """w, within [0, 1]."""
    layer: int | None = None
    """0-based block after which the lens reads; may be None if w is 0."""
    signed_kl: bool = False
    """A flaw of the originals: in place of k3 add ``log pi - log pi_ref``, summed over prompt and response. It has a
    sign and, on prompts, which the policy did not draw, no lower bound: minimising it lowers their probability. With
    an adapter ``pi_ref`` is the model without it."""
    entropy_bonus: float = 0.0
    """Subtract so much of the entropy of the batch's mean lens distribution from the loss on the lens."""

    def __post_init__(self) -> None:
        if not 0 <= self.class_weight <= 1:
            raise InputError(f"class_weight: {self.class_weight} is not within [0, 1]")
        if self.class_weight and self.layer is None:
            raise InputError("layer: none given, but class_weight is not 0; say which layer the lens reads")
        if self.kl_weight < 0:
            raise InputError(f"kl_weight: {self.kl_weight} is negative; pass 0 or more")


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    group: int
    """Completions of each prompt; advantages are relative to their mean."""
    temperature: float
    new_tokens: int
    """Completions end here if no line break or end of text came before."""


@dataclass(frozen=True)
class Grpo:
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


@contextmanager
def whole(model: PreTrainedModel, *, dtype: torch.dtype = torch.float32) -> Iterator[PreTrainedModel]:
    """The model with every weight trainable; its weights are put back at the end.

    Args:
        model: Frozen.
        dtype: Of the weights. With half precision they are updated in place, a flaw of the originals: a step
            smaller than half the distance to the next number is lost.
    """
    before = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    cast(model, dtype)
    model.requires_grad_(True)
    try:
        yield model
    finally:
        for parameter, values in before:
            parameter.data = values
            parameter.grad = None
        model.requires_grad_(False).eval()


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert the weights, but not the buffers: positions are no weights, and rounding them cannot be undone."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def train_grpo(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    reward: Reward,
    objective: PolicyObjective,
    sampling: Sampling,
    schedule: Schedule,
    *,
    work: Path,
    watch: Callable[[], dict[str, Any]] | None = None,
    checkpoint_every: int | None = None,
    description: str | None = None,
) -> Grpo:
    """Train; resume from the last checkpoint in ``work`` if it belongs to this very run.

    Args:
        model: From ``whole`` or ``training.adapted``: what requires a gradient is trained, in place. The reference of
            the divergence is the model as it was loaded, or with the adapter that it comes with.
        tokenizer: Of the model.
        tasks: In the order in which they are taken, ``schedule.batch_size`` a step.
        reward: Of completions; what it does wrong stops the run (see ``rewards.checked``).
        objective: What is minimised.
        sampling: How completions are drawn.
        schedule: How long and how fast; one step is one draw of completions and one update.
        work: Folder for checkpoints; what lies there from a run with other settings is deleted.
        watch: Measured before the first step, every ``schedule.every`` steps and after the last.
        checkpoint_every: Steps between checkpoints, ``schedule.every`` if None; one of a whole model is three times
            the model's size.
        description: Shown with the progress bar.

    Raises:
        InputError: The tasks are too many or too few, the model has no such layer, ``reward`` fails, or the loss is
            not finite.
    """
    needed = schedule.steps * schedule.batch_size
    if len(tasks) != needed:
        raise InputError(f"tasks: {len(tasks)} given, {schedule.steps} steps of {schedule.batch_size} take {needed}")
    if sampling.group < 2:
        raise InputError(f"group: {sampling.group} completion has nothing to be compared with; take 2 or more")
    base = _base(model)
    if objective.layer is not None and not 0 <= objective.layer < len(decoder_blocks(base)):
        raise InputError(f"layer: {objective.layer}: the model has blocks 0 to {len(decoder_blocks(base)) - 1}")
    _claim(work, model, tasks, objective, sampling, schedule)
    with borrowed(model, tokenizer):
        settings = arguments(objective, sampling, schedule, work, checkpoint_every)
        trainer = GrpoWithLens(model, settings, tasks, reward, objective, tokenizer, watch)
        with torch.no_grad():  # the checkpoint is not loaded yet: on resuming, too, this is where the run started
            before = [] if watch is None else [{"step": 0, **watch()}]
        with progress(description, total=schedule.steps) as advance:
            trainer.add_callback(_Steps(advance))
            trainer.train(resume_from_checkpoint=_last_checkpoint(work))
        history: list[dict[str, Any]] = trainer.state.log_history
    steps = [{ours: e[name] for name, ours in STATISTICS.items() if name in e} for e in history if "loss" in e]
    watched = [{"step": entry["step"], **entry["watched"]} for entry in history if "watched" in entry]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.eval()
    return Grpo(steps, before + watched, trained)


def arguments(
    objective: PolicyObjective, sampling: Sampling, schedule: Schedule, work: Path, checkpoint_every: int | None = None
) -> GRPOConfig:
    """Every setting of the trainer that matters, none left at a default that a release may change."""
    return GRPOConfig(
        output_dir=str(work),
        # One update for each draw of completions: the policy that is trained is the one that drew them, its ratio to
        # itself is 1, and no pass is needed for old log-probabilities.
        per_device_train_batch_size=schedule.batch_size * sampling.group,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_iterations=1,
        num_generations=sampling.group,
        per_device_eval_batch_size=sampling.group,
        max_steps=schedule.steps,
        shuffle_dataset=False,
        # Loss.
        beta=0.0 if objective.signed_kl else objective.kl_weight,
        loss_type="grpo",
        scale_rewards="group",
        epsilon=0.2,
        importance_sampling_level="token",
        mask_truncated_completions=False,
        entropy_coef=0.0,
        disable_dropout=True,
        # Sampling.
        use_vllm=False,
        max_completion_length=sampling.new_tokens,
        temperature=sampling.temperature,
        top_p=1.0,
        top_k=0,
        min_p=None,
        repetition_penalty=1.0,
        # Optimiser and arithmetic.
        learning_rate=schedule.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        activation_checkpointing=False,
        bf16=False,
        fp16=False,
        use_cpu=not torch.cuda.is_available(),
        seed=schedule.seed,
        data_seed=schedule.seed,
        # Log and checkpoints.
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=schedule.every,
        save_steps=checkpoint_every or schedule.every,
        save_total_limit=1,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )


class GrpoWithLens(GRPOTrainer):  # type: ignore[misc]
    """``trl.GRPOTrainer`` with a loss on the lens; sends nothing to anyone."""

    share_prompts = True
    """Whether a prompt passes once for all its completions; else everything is left to ``GRPOTrainer``."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        arguments: GRPOConfig,
        tasks: Sequence[Task],
        reward: Reward,
        objective: PolicyObjective,
        tokenizer: PreTrainedTokenizerBase,
        watch: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self.objective = objective
        self.watch = watch
        self.parts: dict[str, float] = {}
        base = _base(model)
        self.block = None if objective.layer is None else decoder_blocks(base)[objective.layer]
        self.reference: PreTrainedModel | None = None
        if objective.signed_kl and base is model:
            self.reference = copy.deepcopy(base).requires_grad_(False)
        guarded = checked(reward)

        def answer_reward(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
            return list(guarded(prompts, completions, answer))

        dataset = Dataset.from_list([asdict(task) for task in tasks])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using 'rollout_func'", UserWarning)  # the version is pinned
            super().__init__(
                model=model,
                reward_funcs=answer_reward,
                args=arguments,
                train_dataset=dataset,
                eval_dataset=dataset.select([0]),  # Trainer asks for one; ``evaluate`` below does not look at it
                processing_class=tokenizer,
                rollout_func=self._rollout if self.share_prompts else None,
            )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of one batch; see ``PolicyObjective``."""
        objective, weight = self.objective, self.objective.class_weight
        kept: list[Tensor] = []
        with nullcontext() if not weight else _kept(self.block, kept):
            loss: Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if objective.signed_kl:
            loss = loss + objective.kl_weight * self._signed_kl(inputs)
        if weight:
            # Left padding ends all prompts at one position. Only the first pass is over prompts.
            states = kept[0][:, inputs["prompt_ids"].shape[1] - 1]
            if self.share_prompts:
                states = states[_distinct(inputs["prompt_ids"], inputs["prompt_mask"])[2]]
            class_loss = self._class_loss(states, inputs["target"])
            self.parts["class_loss"] = class_loss.item()
            loss = (1 - weight) * loss + weight * class_loss
        if not loss.isfinite():
            raise InputError(
                f"learning_rate: the loss at step {self.state.global_step + 1} is not finite (learning rate "
                f"{self.args.learning_rate:g}); choose a smaller one and run again"
            )
        return loss

    def _class_loss(self, states: Tensor, target: Tensor) -> Tensor:
        readout = _live_readout(_base(self.model))
        normed = readout.norm(states)
        loss = -_log_probs(normed, readout, target)[0].mean()
        if self.objective.entropy_bonus:
            logits = replace(readout, softcap=None).unembed(normed).float()
            if readout.softcap is not None:
                logits = readout.softcap * (logits / readout.softcap).tanh()
            mean = logits.softmax(-1).mean(0)
            loss = loss + self.objective.entropy_bonus * torch.special.xlogy(mean, mean).sum()
        return loss

    def _signed_kl(self, inputs: dict[str, Tensor]) -> Tensor:
        """Mean of the originals' term over sequences; logs it, and k3 on the responses beside it."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        policy = sequence_log_probs(_base(self.model), ids, mask)
        adapter_off = self.model.disable_adapter() if self.reference is None else nullcontext()
        with torch.no_grad(), adapter_off:
            reference = sequence_log_probs(self.reference or _base(self.model), ids, mask)
        signed = (policy - reference).sum(-1).mean()
        width = inputs["completion_ids"].shape[1]
        gap = (reference - policy).detach()[:, -width:]
        self.parts["signed_kl"] = signed.item()
        self.parts["kl"] = float((gap.exp() - gap - 1).sum() / inputs["completion_mask"].sum())
        return signed

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Targets travel with their completions through whatever order the trainer makes."""
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        batch["target"] = torch.tensor([task["target"] for task in inputs], device=batch["prompt_ids"].device)
        return batch

    def _rollout(self, prompts: list[str], _: Any) -> dict[str, Any]:
        distinct = list(dict.fromkeys(prompts))
        encoded: list[list[int]] = self.processing_class(distinct)["input_ids"]
        rows = [distinct.index(prompt) for prompt in prompts]
        completions = sample(
            _base(self.model),
            encoded,
            rows,
            new_tokens=self.args.max_completion_length,
            temperature=self.args.temperature,
            stop=self.eos_token_ids,
        )
        return {"prompt_ids": [encoded[row] for row in rows], "completion_ids": completions, "logprobs": None}

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The same numbers as the method that it overrides, from fewer tokens."""
        if not self.share_prompts:
            return super()._get_per_token_logps_and_entropies(  # type: ignore[no-any-return]
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        base, start = _base(model), input_ids.shape[1] - logits_to_keep
        states = _completion_states(base, input_ids, attention_mask, start)
        asked = attention_mask[:, start:] == 1
        readout = _live_readout(base)
        found = _log_probs(states[asked], readout, input_ids[:, start:][asked], temperature=self.temperature)
        log_probs, entropy = (torch.zeros(asked.shape, device=x.device).masked_scatter(asked, x) for x in found)
        return log_probs, entropy, None

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add the parts of the loss."""
        if "loss" in logs:
            logs |= self.parts
            self.parts.clear()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What is watched, instead of a loss on a dataset."""
        metrics: dict[str, Any] = {}
        if self.watch is not None:
            self.model.eval()
            metrics = {"watched": self.watch()}
            self.log(metrics)
            self.model.train()
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoints are scratch."""

    def _send_telemetry(self) -> None:
        """Training here is nobody's business."""


class _Steps(TrainerCallback):
    """Moves the progress bar and shows reward and losses."""

    def __init__(self, advance: Callable[..., None]) -> None:
        self.advance = advance
        self.seen = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.advance(state.global_step - self.seen)
        self.seen = state.global_step
        # A checkpoint of the last step could not be resumed from: Trainer would take one step more.
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        shown = [f"{STATISTICS[name]} {logs[name]:.3f}" for name in ("reward", "kl", "class_loss") if name in logs]
        if shown:
            self.advance(0, "  ".join(shown))


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    rows: Sequence[int],
    *,
    new_tokens: int,
    temperature: float,
    stop: Sequence[int],
) -> list[list[int]]:
    """Draw completions, several of a prompt from one pass over it.

    Args:
        model: Base model; the adapter that it carries, if any, is on.
        prompts: Token ids.
        rows: For each completion the prompt that it answers.
        new_tokens: Completions end here at the latest.
        temperature: Logits are divided by it.
        stop: Tokens that end a completion; they are part of it.

    Returns:
        Token ids of each completion, drawn with torch's global generator.

    Raises:
        InputError: The model's logits are not finite.
    """
    decoder, readout, device = model.get_decoder(), find_readout(model), model.device
    width, at = max(map(len, prompts)), torch.tensor(rows, device=device)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    seen = _decode(decoder, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))
    cache = seen.past_key_values
    cache.batch_select_indices(at)
    state, mask, position = seen.last_hidden_state[at, -1], mask[at], mask.sum(-1, keepdim=True)[at]
    ends = torch.tensor(list(stop), device=device)
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    drawn: list[Tensor] = []
    while True:
        logits = readout.unembed(state).float() / temperature
        if not logits.isfinite().all():
            raise InputError("model: its logits are not finite; if it is in training, choose a smaller learning_rate")
        token = torch.multinomial(logits.softmax(-1), 1)
        drawn.append(token)
        done |= torch.isin(token[:, 0], ends)
        if done.all() or len(drawn) == new_tokens:
            break
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        state = _decode(decoder, token, mask, position, cache).last_hidden_state[:, -1]
        position = position + 1
    texts: list[list[int]] = torch.cat(drawn, dim=1).tolist()
    return [text[: next((i + 1 for i, t in enumerate(text) if t in set(stop)), len(text))] for text in texts]


def line_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that hold a line break, as byte-level, SentencePiece and byte-fallback vocabularies spell it."""
    return sorted(i for token, i in tokenizer.get_vocab().items() if "\n" in token or "Ċ" in token or token == "<0x0A>")


def sequence_log_probs(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """(rows, width - 1) log-probability of every token given those before, 0 for padding and the first token."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model.get_decoder()(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    asked = (mask[:, 1:] == 1) & (mask[:, :-1] == 1)
    states = output.last_hidden_state[:, :-1][asked]
    found, _ = _log_probs(states, _live_readout(model), ids[:, 1:][asked])
    return torch.zeros(asked.shape, device=found.device).masked_scatter(asked, found)


def _completion_states(model: PreTrainedModel, ids: Tensor, mask: Tensor, start: int) -> Tensor:
    """(rows, completion width, d) normed states that predict the completions' tokens."""
    prompts, seen, rows = _distinct(ids[:, :start], mask[:, :start])
    decoder = model.get_decoder()
    output = _decode(decoder, prompts, seen, (seen.cumsum(-1) - 1).clamp(min=0))
    last: Tensor = output.last_hidden_state[rows, -1:]
    if ids.shape[1] - start == 1:
        return last
    cache = output.past_key_values
    cache.batch_select_indices(rows)
    positions = seen.sum(-1)[rows, None] + torch.arange(ids.shape[1] - start - 1, device=ids.device)
    later = _decode(decoder, ids[:, start:-1], mask[:, :-1], positions, cache).last_hidden_state
    return torch.cat([last, later], dim=1)


def _decode(decoder: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any = None) -> Any:
    return decoder(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)


def _distinct(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask of the distinct rows, and for each row its number among them."""
    both, rows = torch.cat([ids, mask], dim=1).unique(dim=0, return_inverse=True)
    return both[:, : ids.shape[1]], both[:, ids.shape[1] :], rows


def _log_probs(normed: Tensor, readout: Readout, target: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of target tokens and entropy of the distribution, (rows,) each, in nats."""
    log_probs, entropy, *_ = ChunkedLogProbFunction.apply(
        normed,
        readout.weight,
        readout.bias,
        target,
        temperature,
        BLOCK_TOKENS,
        readout.softcap,
        1 / readout.divisor,
        ("entropy",),
    )
    return log_probs, entropy


def _live_readout(model: PreTrainedModel) -> Readout:
    """The readout, its unembedding with the gradient that ``find_readout`` cuts off."""
    head: Any = model.get_output_embeddings()
    return replace(find_readout(model), weight=head.weight, bias=getattr(head, "bias", None))


def _base(model: Any) -> PreTrainedModel:
    found: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base: PreTrainedModel = found
    return base


@contextmanager
def _kept(block: nn.Module | None, kept: list[Tensor]) -> Iterator[None]:
    """Collect the outputs of a block."""
    assert block is not None
    handle = block.register_forward_hook(
        lambda _, __, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def borrowed(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """A model to give to a trainer: completions end at line breaks; what the trainer leaves on it is taken off."""
    base: Any = _base(model)
    config = base.config.get_text_config()
    forward, generation, pad = vars(base).get("forward"), base.generation_config, config.pad_token_id
    base.generation_config = copy.deepcopy(generation)
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    base.generation_config.eos_token_id = [*(i for i in ends if i is not None), *line_ends(tokenizer)]
    try:
        yield
    finally:
        base.generation_config, config.pad_token_id = generation, pad
        if forward is None:
            vars(base).pop("forward", None)
        else:
            base.forward = forward
        if isinstance(model, PeftModel) and "ref" in model.peft_config:
            model.delete_adapter("ref")


def _claim(
    work: Path,
    model: nn.Module,
    tasks: Sequence[Task],
    objective: PolicyObjective,
    sampling: Sampling,
    schedule: Schedule,
) -> None:
    """Make ``work`` this run's own: delete what another run left."""
    start = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            start.update(name.encode())
            start.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    settings = {
        "start": start.hexdigest(),
        "tasks": hashlib.sha256(json.dumps([asdict(task) for task in tasks]).encode()).hexdigest(),
        "objective": asdict(objective),
        "sampling": asdict(sampling),
        "schedule": asdict(schedule),
    }
    text = json.dumps(settings, indent=1, sort_keys=True)
    stamp = work / "run.json"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == text:
        return
    shutil.rmtree(work, ignore_errors=True)
    write_text_atomic(stamp, text)
