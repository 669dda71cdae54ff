"""Supervised training of LoRA adapters, with an objective that may read the logit lens at a middle layer.

One family covers every study: ``loss = w * CE(lens at layer L, word) + (1 - w) * CE(answer)``. Dual reward is w = 0.4
on V and O; plain fine-tuning, on whatever text follows the prompt, is w = 0. Only the positions that a loss reads pass
through the unembedding.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerState, TrainingArguments

from classifier_emergence.errors import InputError
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import outputs_of
from classifier_emergence.reading.tree import DECODER_INPUTS, last_states, one_pass
from classifier_emergence.training.cross_entropy import cross_entropy
from classifier_emergence.training.run_folder import WatchingTrainer, open_run_folder

VO, QK = ("v_proj", "o_proj"), ("q_proj", "k_proj")
QKVO = (*QK, *VO)
MLP = ("gate_proj", "up_proj", "down_proj")
HEAD = "classifier_head"
EXPLODED = 10.0
"""Training has diverged once the loss exceeds this multiple of ``ln(vocabulary)``, the loss of a uniform guess."""


@dataclass(frozen=True)
class Adapter:
    """Which linear maps get a low-rank update, ``W + (alpha / rank) B A``, B starting at zero.

    Source: Hu et al. (2021), LoRA, arXiv:2106.09685.
    """

    modules: tuple[str, ...]
    rank: int
    scale: float
    """alpha / rank."""
    layers: tuple[int, ...]
    """0-based blocks."""


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


@dataclass(frozen=True)
class Example:
    """One training text: ids of prompt and answer, and the class that the lens should name at the prompt's end."""

    ids: list[int]
    prompt_length: int
    target: int
    """Token id of the class's word, or number of the class for a head."""


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
    first_loss: float | None = None
    """Of step 1, before anything was trained."""


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


@contextmanager
def adapted(lm: LanguageModel, adapter: Adapter, *, seed: int, classes: int | None = None) -> Iterator[PeftModel]:
    """The model with a fresh adapter, taken off again at the end; the base weights are never touched.

    Args:
        lm: Frozen.
        adapter: Where the update goes.
        seed: Of the initial A (and head).
        classes: Also add a trainable linear head, zero at first, under the name ``classifier_head``.

    Raises:
        InputError: The model has no such layers, or one of them has no linear map of one of these names.
    """
    model, blocks = lm.model, lm.blocks
    for layer in adapter.layers or (-1,):  # peft takes no layers for all of them, and is content if any map is found
        if not 0 <= layer < len(blocks):
            raise InputError(f"layers: {adapter.layers}: the model has blocks 0 to {len(blocks) - 1}")
        missing = set(adapter.modules) - {name.rpartition(".")[2] for name, _ in blocks[layer].named_modules()}
        if missing:
            raise InputError(f"modules: {', '.join(sorted(missing))}: not found in block {layer} of the model")
    torch.manual_seed(seed)
    save = None
    if classes is not None:
        width = lm.readout.weight.shape[1]
        head = nn.Linear(width, classes, device=model.device, dtype=model.dtype)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        model.add_module(HEAD, head)
        save = [HEAD]
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=round(adapter.scale * adapter.rank),
        target_modules=list(adapter.modules),
        layers_to_transform=list(adapter.layers),
        lora_dropout=0.0,
        modules_to_save=save,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    try:
        yield wrapped
    finally:
        wrapped.unload()
        if classes is not None:
            delattr(model, HEAD)
        model.requires_grad_(False).eval()


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
    _check_fits(lm, objective)
    open_run_folder(work, wrapped, _settings(wrapped, examples, objective, schedule))
    arguments = TrainingArguments(
        **common_arguments(schedule, work),
        per_device_train_batch_size=schedule.batch_size,
        optim="adamw_torch",
        logging_steps=schedule.every,
        eval_strategy="no" if watch is None else "steps",
        save_steps=schedule.every,
        use_cpu=wrapped.device.type == "cpu",
    )
    trainer = LensTrainer(lm, wrapped, arguments, list(examples), objective, watch)
    log, watched, parameters = trainer.run(description)
    losses = [{k: entry[k] for k in ("step", *LensTrainer.shown) if k in entry} for entry in log]
    return Trained(losses, watched, parameters, trainer.first_loss)


class LensTrainer(WatchingTrainer, Trainer):
    """``transformers.Trainer`` with the loss of this module."""

    shown: ClassVar[dict[str, str]] = {"loss": "loss", "class_loss": "class", "answer_loss": "answer"}

    def __init__(
        self,
        lm: LanguageModel,
        wrapped: PeftModel,
        arguments: TrainingArguments,
        examples: list[Example],
        objective: Objective,
        watch: Callable[[], dict[str, Any]] | None,
    ) -> None:
        self.objective: Objective = objective
        self.watch = watch
        self.lm, self.readout = lm, lm.readout
        self.block = None if objective.layer is None else lm.blocks[objective.layer]
        self.head = getattr(lm.model, HEAD, None)
        self.limit = EXPLODED * torch.tensor(len(self.readout.weight)).log().item()
        self.parts: dict[str, list[float]] = {}
        super().__init__(
            model=wrapped,
            args=arguments,
            train_dataset=examples,
            eval_dataset=examples[:1],  # Trainer asks for one; ``evaluate`` below does not look at it
            data_collator=lambda batch: collate(batch, objective, lm.model),
        )

    def resume(self, checkpoint: str | None, advance: Callable[..., None]) -> None:
        """Train from a checkpoint on, or, if that is the end of the run, read it."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
            if state.global_step == self.args.max_steps:  # Trainer would take one step more
                self.state = state
                set_peft_model_state_dict(self.model, load_peft_weights(checkpoint, device=str(self.model.device)))
                advance(state.global_step)
                return
        super().resume(checkpoint, advance)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss of one batch; see ``Objective``."""
        weight = self.objective.class_weight
        with outputs_of(self.block if weight else None) as outputs:
            normed = last_states({name: inputs[name] for name in DECODER_INPUTS if name in inputs}, self.lm.model)
        states, tokens, losses = [], [], {}
        if weight and self.head is None:
            states.append(self.readout.norm(outputs[0].flatten(0, 1)[inputs["read"]]))
            tokens.append(inputs["target"])
        if weight < 1:
            states.append(normed[inputs["answer_read"]])
            tokens.append(inputs["answer_token"])
        if weight and self.head is not None:
            losses["class_loss"] = self._head_loss(outputs[0], inputs)
        if states:
            parts = cross_entropy(torch.cat(states), self.readout, torch.cat(tokens)).split([len(t) for t in tokens])
            if weight and self.head is None:
                losses["class_loss"] = parts[0].mean()
            if weight < 1:
                losses["answer_loss"] = parts[-1].mean()
        shares = {"class_loss": weight, "answer_loss": 1 - weight}
        loss = torch.stack([shares[name] * part for name, part in losses.items()]).sum()
        self._check(loss)
        for name, part in losses.items():
            self.parts.setdefault(name, []).append(part.item())
        return loss

    def _head_loss(self, states: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        assert self.head is not None
        normed = self.readout.norm(states.flatten(0, 1)[inputs["read"]])
        return functional.cross_entropy(self.head(normed), inputs["target"])

    def _check(self, loss: Tensor) -> None:
        if not loss.isfinite() or loss > self.limit:
            step = self.state.global_step + 1
            raise InputError(
                f"learning_rate: training diverged at step {step} (loss {loss.item():.4g}, learning rate "
                f"{self.args.learning_rate:g}); choose a smaller one and run again"
            )


def collate(batch: Sequence[Example], objective: Objective, model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs of one pass and the tokens that the losses read.

    Returns:
        The decoder's inputs; ``read`` and ``target`` (batch,): where the lens reads and what it should say;
        ``answer_read`` and ``answer_token`` (answer tokens,): the logits at the one are scored against the other. Where
        something is read is counted among the flattened states.
    """
    # The last token of a text is only predicted, so it need not pass.
    texts = [example.ids[:-1] if objective.answer_shifted else example.ids for example in batch]
    inputs, paths = one_pass(texts, model)
    back = 1 if objective.answer_shifted else 0
    answers = [
        (path[position - back], example.ids[position])
        for path, example in zip(paths, batch, strict=True)
        for position in range(example.prompt_length, len(example.ids))
    ]
    read, token = torch.tensor(answers).T
    # The end-of-text token is not part of the answer that the originals read after.
    ends = [example.prompt_length - 1 if objective.read == "prompt" else len(example.ids) - 2 for example in batch]
    return {
        **inputs,
        "read": torch.tensor([path[end] for path, end in zip(paths, ends, strict=True)]),
        "target": torch.tensor([example.target for example in batch]),
        "answer_read": read,
        "answer_token": token,
    }


def check_layer(lm: LanguageModel, layer: int | None) -> None:
    """Refuse a block that the model does not have.

    Raises:
        InputError: It has none of this number.
    """
    if layer is not None and not 0 <= layer < lm.n_layers:
        raise InputError(f"layer: {layer}: the model has blocks 0 to {lm.n_layers - 1}")


def _check_fits(lm: LanguageModel, objective: Objective) -> None:
    check_layer(lm, objective.layer)
    if (objective.classes is None) != (getattr(lm.model, HEAD, None) is None):
        raise InputError(f"classes: {objective.classes} in the objective; give adapted() the same")


def _settings(
    wrapped: PeftModel, examples: Sequence[Example], objective: Objective, schedule: Schedule
) -> dict[str, Any]:
    """Whatever decides a run beside its start."""
    adapter = {
        k: sorted(v) if isinstance(v, set) else str(v)  # a set's order is another in every process
        for k, v in wrapped.peft_config["default"].to_dict().items()
    }
    texts = hashlib.sha256(json.dumps([asdict(example) for example in examples]).encode()).hexdigest()
    return {"adapter": adapter, "objective": asdict(objective), "schedule": asdict(schedule), "examples": texts}
