"""Several runs that train together, each an adapter: their trainer, and the settings that all trainings share."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState, TrainingArguments

from classifier_emergence.errors import InputError
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.training.adapters import make_trainable, parameters_of
from classifier_emergence.training.run_folder import WatchingTrainer

TRAINED = "trained.safetensors"
EXPLODED = 10.0
"""Training has diverged once the loss exceeds this multiple of ``ln(vocabulary)``, the loss of a uniform guess."""


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
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
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


def check_layer(lm: LanguageModel, layer: int | None) -> None:
    """Refuse a block that the model does not have.

    Raises:
        InputError: It has none of this number.
    """
    if layer is not None and not 0 <= layer < lm.n_layers:
        raise InputError(f"layer: {layer}: the model has blocks 0 to {lm.n_layers - 1}")


def model_settings(lm: LanguageModel) -> dict[str, str]:
    """What an adapter's run rests on, as JSON: the start that is hashed holds only what is trained."""
    return {"model": lm.key, "precision": str(lm.model.dtype)}


def adapter_settings(wrapped: PeftModel, name: str) -> dict[str, Any]:
    """What an adapter is, as JSON; a set's order is another in every process."""
    settings = wrapped.peft_config[name].to_dict()
    return {key: sorted(value) if isinstance(value, set) else str(value) for key, value in settings.items()}


def digest_of(data: Sequence[Any]) -> str:
    """A hash of dataclasses."""
    return hashlib.sha256(json.dumps([asdict(item) for item in data]).encode()).hexdigest()
