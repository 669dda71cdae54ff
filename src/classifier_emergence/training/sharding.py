"""Launchers that cut a model's weights into shards, one a process: nothing here trains that way."""

import os

from classifier_emergence.errors import InputError

_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}  # fmt: skip
"""What ``accelerate launch`` sets for its workers -> what it is."""


def check_whole() -> None:
    """Refuse to train on shards: adapters, the lens in the loss and checkpoints are read from whole weights.

    Raises:
        InputError: The launcher asks for shards.
    """
    for variable, name in _SHARDING.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise InputError(
                f"processes: {name} cuts the weights into shards, which are not trained here; launch without it, "
                "with a copy of the model in each process"
            )
