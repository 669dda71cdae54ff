"""What a model may be called: a key of the registry, an id of the Hugging Face hub, a folder or a GGUF file.

In a clone of the repository the registry is that of its ``params.yaml``, elsewhere the copy that ships with us.
"""

import re
from importlib import resources
from pathlib import Path

from classifier_emergence.errors import InputError
from classifier_emergence.models.registry import (
    HubSource,
    ModelSource,
    PathSource,
    local_path,
    read_registry,
    source_of,
)

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def repository_root() -> Path | None:
    """The clone of this project's repository that the working directory lies in, if any.

    Example:
        >>> repository_root() is None  # outside a clone
        True
    """
    here = Path.cwd()
    marks = ("params.yaml", "paper/claims.yaml", "experiments/params.py")
    return next((folder for folder in (here, *here.parents) if all((folder / mark).is_file() for mark in marks)), None)


def registry() -> dict[str, ModelSource]:
    """Models by key; folders of a clone's registry are relative to the clone.

    Raises:
        InputError: The clone's ``params.yaml`` is not valid.

    Example:
        >>> registry()["gemma-3-270m"].licence
        'Gemma'
    """
    root = repository_root()
    if root is None:
        return read_registry(resources.files("classifier_emergence.models") / "registry.yaml")
    known = read_registry(root / "params.yaml")
    for key, source in known.items():
        if isinstance(source, PathSource):
            known[key] = source.model_copy(update={"path": str(root / local_path(source.path))})
    return known


def resolve(name: str, known: dict[str, ModelSource] | None = None) -> tuple[str, ModelSource]:
    """What a model's name means: its key, and where its weights are.

    The first of: a key of ``known``; a ``*.gguf`` file; a folder that is there; ``owner/name`` or
    ``owner/name@revision`` on the hub; any other path. A hub id without a full commit means the commit in the local hub
    cache if there is one (so that a result does not change under one's hands), else the newest on the hub. A hub that
    cannot be asked does not matter if the cache holds exactly one complete snapshot and no revision is asked for; a
    notice says which it is.

    Args:
        name: A key, a hub id, a folder or a GGUF file.
        known: Models by key; default ``registry()``.

    Raises:
        InputError: The name is nothing of these (the message has the nearest key), or the hub cannot say which commit
            is meant.

    Example:
        >>> resolve("gemma-3-270m")[1].source
        'wheel'
    """
    known = registry() if known is None else known
    if name in known:
        return name, known[name]
    hub_id = _HUB_ID.fullmatch(name)
    path = local_path(name)
    if path.suffix == ".gguf":
        return path.stem, PathSource(source="path", path=str(path))
    if path.is_dir() or ("/" in name and hub_id is None):
        return path.resolve().name, PathSource(source="path", path=str(path))
    if hub_id is None:
        try:
            return name, source_of(name, known)
        except InputError as error:
            raise InputError(f"{error} (write a model of the hub as owner/name, a folder as a path)") from None
    repo, commit = hub_id["repo"], hub_id["revision"] or ""
    if not _COMMIT.fullmatch(commit):
        from classifier_emergence.models.sources import commit_of  # late: it imports transformers

        commit = commit_of(repo, commit)
    return name, HubSource(source="hub", repo=repo, revision=commit, licence="unknown")
