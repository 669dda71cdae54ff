"""What all training shares: a folder for checkpoints that belongs to one run, a progress bar, and what is watched.

A run that was cut short goes on from its last checkpoint and ends with the numbers of an unbroken one.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from classifier_emergence.errors import InputError, first_line
from classifier_emergence.manifest import damage, seal
from classifier_emergence.processes import is_first
from classifier_emergence.progress import notice, progress
from classifier_emergence.results import write_text_atomic


def open_run_folder(work: Path, model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Make ``work`` the folder of this very run: delete what a run with another start or other settings left.

    Args:
        work: For checkpoints, readable by its owner alone; ``run.json`` in it says whose they are.
        model: Its trainable parameters are the start.
        settings: Whatever else decides the run; JSON.

    Raises:
        InputError: The folder cannot be written.
    """
    start = fingerprint({name: p for name, p in model.named_parameters() if p.requires_grad})
    text = json.dumps({"start": start, **settings}, indent=1, sort_keys=True)
    stamp = work / "run.json"
    with _writing(work):
        if stamp.is_file() and stamp.read_bytes() == text.encode():
            return
        if _checkpoints(work):
            notice(f"{work}: its checkpoints are of another run, or run.json is damaged; starting from step 0")
        _remove(work)
        work.mkdir(mode=0o700, parents=True)
        write_text_atomic(stamp, text)


def fingerprint(parameters: Mapping[str, Tensor]) -> str:
    """A hash of names and values."""
    found = hashlib.sha256()
    for name, parameter in parameters.items():
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that is as it was written. Those after it are deleted, with a line about each."""
    for folder in reversed(_checkpoints(work)):
        if (found := damage(folder)) is None:
            return str(folder)
        notice(f"{folder}: set aside, as {found}; going on from what was written before")
        with _writing(work):
            _remove(folder)
    return None


def _checkpoints(work: Path) -> list[Path]:
    """By step."""
    found = [(int(path.name[11:]), path) for path in work.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return [path for _, path in sorted(found)]


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Tells in one line what cannot be written."""
    try:
        yield
    except Exception as error:  # of any type: torch raises RuntimeError, safetensors its own, tokenizers Exception
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(
            f"{place}: cannot be written ({reason}); free space or make it writable, and give the same command again: "
            "it goes on from what was written before"
        ) from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
    accelerator: Any
    train: Any
    watch: Callable[[], dict[str, Any]] | None
    parts: dict[str, list[float]]
    """Of the loss, one number a step since the last entry of the log."""
    shown: ClassVar[Mapping[str, str]]
    """Names in the log -> what the progress bar calls them."""
    bar: ClassVar[type[ProgressBar]] = ProgressBar
    kept: ClassVar[int] = 2
    """Checkpoints; the second is for when the first turns out to be damaged."""

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
        with self.args.main_process_first(local=False):
            checkpoint = last_checkpoint(Path(self.args.output_dir))
        with progress(description if is_first() else None, total=self.args.max_steps) as advance:
            self.add_callback(self.bar(advance, self.shown))
            self.resume(checkpoint, advance)
        history = self.state.log_history
        watched += [{"step": entry["step"], **entry["watched"]} for entry in history if "watched" in entry]
        self.model.eval()
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        return [entry for entry in history if "loss" in entry], watched, trained

    def resume(self, checkpoint: str | None, advance: Callable[..., None]) -> None:
        """Train from a checkpoint on; ``advance`` is for whoever overrides this and takes no steps."""
        self.train(resume_from_checkpoint=checkpoint)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint and seal it; only then go those that are no longer needed. A failed one goes at once."""
        work = Path(self.args.output_dir)
        folder = work / f"checkpoint-{self.state.global_step}"
        with _writing(folder):
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                self.accelerator.wait_for_everyone()
                if is_first():
                    seal(folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            for old in _checkpoints(work)[: -self.kept] if is_first() else []:
                _remove(old)

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
