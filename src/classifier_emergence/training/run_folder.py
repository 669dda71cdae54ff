"""What all training shares: a folder for checkpoints that belongs to one run, a progress bar, and what is watched.

A run that was cut short goes on from its last checkpoint and ends with the numbers of an unbroken one.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from classifier_emergence.processes import is_first
from classifier_emergence.progress import progress
from classifier_emergence.results import write_text_atomic


def open_run_folder(work: Path, model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Make ``work`` the folder of this very run: delete what a run with another start or other settings left.

    Args:
        work: For checkpoints; ``run.json`` in it says whose they are.
        model: Its trainable parameters are the start.
        settings: Whatever else decides the run; JSON.
    """
    start = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            start.update(name.encode())
            start.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    text = json.dumps({"start": start.hexdigest(), **settings}, indent=1, sort_keys=True)
    stamp = work / "run.json"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == text:
        return
    shutil.rmtree(work, ignore_errors=True)
    write_text_atomic(stamp, text)


def last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that was written to its end; its state is written last. Others are deleted."""
    for folder in sorted(work.glob("checkpoint-*"), key=lambda path: -int(path.name.partition("-")[2])):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(folder)
            continue
        return str(folder)
    return None


class ProgressBar(TrainerCallback):
    """Moves the progress bar and shows running numbers.

    Args:
        advance: From ``progress.progress``.
        shown: Names in the log -> what the bar calls them.
    """

    def __init__(self, advance: Callable[..., None], shown: Mapping[str, str]) -> None:
        self.advance = advance
        self.shown = shown
        self.seen = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move on."""
        self.advance(state.global_step - self.seen)
        self.seen = state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show what is shown."""
        logs = kwargs["logs"]
        texts = [f"{label} {logs[name]:.3f}" for name, label in self.shown.items() if name in logs]
        if texts:
            self.advance(0, "  ".join(texts))


class WatchingTrainer:
    """Mixed into a ``Trainer``: it logs the parts of its loss and, instead of a loss on a dataset, what is watched."""

    model: Any
    control: Any
    args: Any
    state: Any
    callback_handler: Any
    add_callback: Any
    remove_callback: Any
    train: Any
    watch: Callable[[], dict[str, Any]] | None
    parts: dict[str, list[float]]
    """Of the loss, one number a step since the last entry of the log."""
    shown: ClassVar[Mapping[str, str]]
    """Names in the log -> what the progress bar calls them."""
    bar: ClassVar[type[ProgressBar]] = ProgressBar

    def run(self, description: str | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
        """Train, from the last checkpoint if there is one.

        Returns:
            The entries of the log that have a loss; ``step`` and what was watched, from step 0 on; and the number of
            trained parameters.
        """
        for callback in (PrinterCallback, ProgressCallback):  # they print
            self.remove_callback(callback)
        with torch.no_grad():  # the checkpoint is not loaded yet: on resuming, too, this is where the run started
            watched = [] if self.watch is None else [{"step": 0, **self.watch()}]
        with progress(description if is_first() else None, total=self.args.max_steps) as advance:
            self.add_callback(self.bar(advance, self.shown))
            with self.args.main_process_first(local=False):
                checkpoint = last_checkpoint(Path(self.args.output_dir))
            self.resume(checkpoint, advance)
        history = self.state.log_history
        watched += [{"step": entry["step"], **entry["watched"]} for entry in history if "watched" in entry]
        self.model.eval()
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return [entry for entry in history if "loss" in entry], watched, trained

    def resume(self, checkpoint: str | None, advance: Callable[..., None]) -> None:
        """Train from a checkpoint on; ``advance`` is for whoever overrides this and takes no steps."""
        self.train(resume_from_checkpoint=checkpoint)

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Add the parts of the loss, averaged since the last entry."""
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self.parts.items()}
            self.parts.clear()
        super().log(logs, start_time)  # type: ignore[misc]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Log what is watched."""
        metrics: dict[str, Any] = {}
        if self.watch is not None:
            self.model.eval()
            metrics = {"watched": self.watch()}
            self.model.train()
            self.log(metrics)
        # Says that it is done; else Trainer asks again where an epoch ends at this step.
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
