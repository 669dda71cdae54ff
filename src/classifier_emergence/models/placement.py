"""Where a model is put, in which precision, and whether it fits: decided before anything is loaded."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from classifier_emergence.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """A device and a precision, both decided.

    Example:
        >>> place("cpu", "auto", "bfloat16")
        Placement(device='cpu', dtype=torch.float32)
    """

    device: str
    """``cpu``, ``mps``, ``cuda:1``, or ``balanced``: accelerators first, then memory, then disk (accelerate)."""
    dtype: torch.dtype


def place(device: str, dtype: str, stored: str | None) -> Placement:
    """Decide what ``auto`` means here.

    Args:
        device: ``auto`` (CUDA, else MPS, else the CPU), ``balanced``, or a device of torch.
        dtype: ``auto`` (float32 on a CPU, elsewhere the checkpoint's own half precision, if it has one), ``float32``,
            ``bfloat16`` or ``float16``.
        stored: Name of the checkpoint's own precision.

    Raises:
        InputError: torch sees no such device, or the precision is none of these.
    """
    if dtype not in ("auto", *DTYPES):
        raise InputError(f"dtype {dtype!r}: choose auto, {', '.join(DTYPES)}")
    here = devices()
    if device == "auto":
        device = here[0]
    elif device != "balanced" and device not in here and not (device == "cuda" and torch.cuda.is_available()):
        raise InputError(f"device {device!r}: torch sees {', '.join(here)} here; choose one, or auto or balanced")
    if dtype == "auto":
        on_cpu = device == "cpu" or (device == "balanced" and here == ["cpu"])
        dtype = stored if stored in DTYPES and not on_cpu else "float32"
    return Placement(device, DTYPES[dtype])


def devices() -> list[str]:
    """Devices of this machine, the fastest first."""
    accelerators = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        accelerators.append("mps")
    return [*accelerators, "cpu"]


def check_fits(key: str, values: int, fixed: int, placement: Placement) -> None:
    """Compare the memory of the weights with what is free.

    Args:
        key: Of the model.
        values: How many numbers are held in the placement's precision.
        fixed: Bytes of what is held as it is stored.
        placement: Where they go.

    Raises:
        InputError: It is too little; says how much is missing and which options would do.
    """
    free = free_memory(placement.device)
    needed = values * placement.dtype.itemsize + fixed
    if free is None or needed <= free:
        return
    options = []
    if placement.dtype is torch.float32 and values * 2 + fixed <= free:
        options.append(f"--dtype bfloat16 needs {_size(values * 2 + fixed)}")
    others = [device for device in devices() if device != placement.device and placement.device != "balanced"]
    options += [
        f"--device {device} has {_size(room)}" for device in others if (room := free_memory(device) or 0) > needed
    ]
    if placement.device != "balanced" and (room := free_memory("balanced") or 0) > needed:
        options.append(f"--device balanced has {_size(room)}, including disk")
    advice = "; ".join(options) or "no option would do; choose a smaller model"
    raise InputError(
        f"{key}: its weights need {_size(needed)} in {str(placement.dtype).removeprefix('torch.')}, and "
        f"{placement.device} has {_size(free)} free, short by {_size(needed - free)} ({advice})"
    )


def free_memory(device: str) -> int | None:
    """Bytes that are free on a device; of ``balanced`` on all of them and the disk; None where that is not known."""
    if device == "balanced":
        rooms = [free_memory(each) for each in devices()]
        return sum(room or 0 for room in rooms) + shutil.disk_usage(tempfile.gettempdir()).free
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    if device == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return _free_ram()


def _free_ram(proc: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the system, and the container if there is one, can still give."""
    try:
        lines = dict(line.split(":") for line in proc.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["file"]
        free = min(free, limit - used + int(cached))
    except (OSError, KeyError, ValueError):  # no container, or one without a limit ("max")
        pass
    return free


def _size(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 5e7 else f"{n / 1e6:.2f} MB"
