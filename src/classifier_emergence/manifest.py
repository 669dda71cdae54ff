"""Folders and files that are known by their hashes: whether one is as it was written.

The manifest is written last. So a folder without one was not written to its end, and one whose files differ from it is
damaged, whatever damaged it. A file alone has its hash beside it, in the format of sha256sum.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from classifier_emergence.results import write_text_atomic

MANIFEST = "manifest.json"


def seal(folder: Path, **facts: Any) -> None:
    """Write the manifest of a folder: size and sha256 of every file, which are on the disk by then, and ``facts``.

    Raises:
        OSError: A file cannot be read, or the manifest not be written.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the manifest and not the file
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_text_atomic(folder / MANIFEST, json.dumps({**facts, "files": files}, indent=2))


def damage(folder: Path, *, verify: bool = True) -> str | None:
    """What is wrong with a folder that was sealed; None if nothing is.

    Args:
        folder: It.
        verify: Compare hashes, not only sizes.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes, not {expected['size']}"
            if verify and sha256(folder / name) != expected["sha256"]:
                return f"{name} has another sha256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def seal_file(partial: Path, file: Path) -> None:
    """Move what was written to its place, and write its hash beside it.

    Raises:
        OSError: Either cannot be written.
    """
    text = f"{sha256(partial)}  {file.name}\n"
    _beside(file).unlink(missing_ok=True)  # a run that ends here leaves a file without a hash, not with another's
    partial.replace(file)
    write_text_atomic(_beside(file), text)


def file_damage(file: Path) -> str | None:
    """What is wrong with a file that was sealed; None if nothing is, or if it has no hash beside it.

    Raises:
        OSError: It or its hash cannot be read.
    """
    beside = _beside(file)
    if not beside.exists() or beside.read_bytes() == f"{sha256(file)}  {file.name}\n".encode():
        return None
    return f"it has another sha256 than {beside.name} says"


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def sha256(file: Path) -> str:
    """Of the content of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
