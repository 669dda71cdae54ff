"""What can happen to a file, and the table of what was tried."""

import ctypes
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WHOLE = os.environ.get("FAULTS") == "whole"
"""All cells, not a sample of them."""
SEED = int(os.environ.get("FAULTS_SEED", "0"))

Damage = Callable[[Path, random.Random], None]


def truncated(file: Path, chance: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: chance.randrange(max(1, file.stat().st_size))])


def empty(file: Path, chance: random.Random) -> None:
    file.write_bytes(b"")


def flipped(file: Path, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def missing(file: Path, chance: random.Random) -> None:
    file.unlink()


def swapped(file: Path, chance: random.Random) -> None:
    others = [path for path in sorted(file.parent.iterdir()) if path.is_file() and path != file]
    if others:
        shutil.copyfile(chance.choice(others), file)


def a_folder(file: Path, chance: random.Random) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: tuple[Damage, ...] = (truncated, empty, flipped, missing, swapped, a_folder)


@contextmanager
def unprivileged() -> Iterator[None]:
    """This thread may do what the owner of its files may: to root, too, a folder is read-only then. On Linux."""
    held, libc = (ctypes.c_uint32 * 6)(), ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # third version of capabilities; this thread
    libc.capget(header, held)
    # Twice effective, permitted and inheritable: what is permitted comes back.
    libc.capset(header, (ctypes.c_uint32 * 6)(0, held[1], held[2], 0, held[4], held[5]))
    try:
        yield
    finally:
        libc.capset(header, held)


tried: Counter[tuple[str, str, str]] = Counter()
"""(what was damaged, how, what came of it) -> cells."""


def files_of(folder: Path) -> list[str]:
    """Whatever a run wrote, by its path; nobody has to list it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def cells(names: list[str], key: str) -> list[tuple[str, Damage, random.Random]]:
    """Every file with every damage; of a short session every file with two damages, drawn by the seed."""
    found = []
    for name in names:
        chance = random.Random(f"{SEED} {key} {name}")
        chosen = DAMAGES if WHOLE else chance.sample(DAMAGES, 2)
        found += [(name, damage, random.Random(f"{SEED} {key} {name} {damage.__name__}")) for damage in chosen]
    return found
