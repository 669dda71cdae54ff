"""Several processes that train one model, as ``torchrun`` and ``accelerate launch`` start them: who writes, who waits.

Each takes its share of every batch; gradients are summed by the wrapper that accelerate puts around the loss.
"""

import os

from classifier_emergence.errors import InputError


def count() -> int:
    """Number of processes of this job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process, from 0 on."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Whether this process writes results, checkpoints and progress."""
    return rank() == 0


def check_alone(what: str) -> None:
    """Refuse what would train another model in every process.

    Raises:
        InputError: There are several processes.
    """
    if count() > 1:
        raise InputError(f"processes: {what} runs in one process, not in {count()}; start it without a launcher")
