"""What a model may be called: a key of the registry, an id of the Hugging Face hub or a folder, and an adapter on it.

In a clone of the repository the registry is that of its ``params.yaml``, elsewhere the copy that ships with us.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classifier_emergence.errors import InputError
from classifier_emergence.extras import missing_extras_named
from classifier_emergence.models.registry import (
    HubSource,
    ModelSource,
    PathSource,
    read_registry,
    source_of,
)

if TYPE_CHECKING:
    from classifier_emergence.reading.model import LanguageModel

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


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
        return read_registry(resources.files("classifier_emergence.models") / "registry.yaml", section=None)
    known = read_registry(root / "params.yaml")
    for key, source in known.items():
        if isinstance(source, PathSource):
            known[key] = source.model_copy(update={"path": str(root / Path(source.path).expanduser())})
    return known


def resolve(name: str, known: dict[str, ModelSource] | None = None) -> tuple[str, ModelSource]:
    """What a model's name means: its key, and where its weights are.

    The first of: a key of ``known``; a folder that is there; ``owner/name`` or ``owner/name@revision`` on the hub; any
    other path. A hub id without a full commit means the commit in the local hub cache if there is one (so that a result
    does not change under one's hands), else the newest on the hub. A hub that cannot be asked does not matter if the
    cache holds exactly one complete snapshot and no revision is asked for; a notice says which it is.

    Args:
        name: A key, a hub id or a folder.
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
    path = Path(name).expanduser()
    if path.is_dir() or ("/" in name and hub_id is None):
        return path.resolve().name, PathSource(source="path", path=str(path))
    if hub_id is None:
        try:
            return name, source_of(name, known)
        except InputError as error:
            raise InputError(f"{error} (write a model of the hub as owner/name, a folder as a path)") from None
    revision = hub_id["revision"] or ""
    commit = revision if _COMMIT.fullmatch(revision) else _commit(hub_id["repo"], revision)
    return name, HubSource(source="hub", repo=hub_id["repo"], revision=commit, licence="unknown")


def _commit(repo: str, revision: str) -> str:
    """The commit of a revision; none is given as an empty text."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    cached = try_to_load_from_cache(repo, "config.json", revision=revision or "main")
    if isinstance(cached, str):
        return Path(cached).parent.name  # .../snapshots/<commit>/config.json
    try:
        return str(HfApi().model_info(repo, revision=revision or "main", timeout=10).sha)
    except Exception as error:  # whatever the HTTP library raises, there is no commit
        if not revision and not isinstance(error, RepositoryNotFoundError):
            from classifier_emergence.models.sources import only_snapshot

            if commit := only_snapshot(repo):
                return commit
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"model {repo!r}: neither a folder nor a registered key, and the hub does not answer for it ({reason}); "
            "correct the name, or run where the hub is reachable"
        ) from error


def open_model(name: str, *, adapter: str | Path | Sequence[str | Path] = ()) -> "LanguageModel":
    """Load what ``name`` and ``adapter`` mean: float32, in evaluation mode, frozen.

    Args:
        name: A key of ``registry()``, ``owner/name[@revision]`` on the hub, or a local folder.
        adapter: Folder of a PEFT adapter (``adapter_config.json``, ``adapter_model.safetensors``) that was trained on
            this model; or several, each trained on the model with those before it. They are merged into the weights, so
            that training can go on from there.

    Raises:
        InputError: See ``models.load``; or the adapter is no such folder, or does not fit the model tensor by tensor.
    """
    from classifier_emergence.models.loading import load

    key, source = resolve(name)
    lm = load(key, {key: source})
    for folder in [adapter] if isinstance(adapter, str | Path) else adapter:
        lm = _adapted(lm, Path(folder).expanduser())
    return lm


def _adapted(lm: "LanguageModel", folder: Path) -> "LanguageModel":
    with missing_extras_named():
        from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    from classifier_emergence.reading.lens import check_lens

    for file in _ADAPTER_FILES:
        if not (folder / file).is_file():  # peft would take a pickle instead, or ask the hub
            raise InputError(f"adapter {folder}: no {file}; give a folder that PEFT's save_pretrained wrote")
    try:
        stored = set(load_file(folder / _ADAPTER_FILES[1]))
        with warnings.catch_warnings():
            # Said again below, as an error.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            wrapped: Any = PeftModel.from_pretrained(lm.model, str(folder))
        # peft leaves out, without an error, tensors for layers that the model does not have.
        fits = stored == set(get_peft_model_state_dict(wrapped)) and not wrapped.active_peft_config.is_prompt_learning
        model = wrapped.merge_and_unload() if fits else None
    except Exception as error:  # a damaged or foreign adapter makes peft stumble in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"adapter {folder}: cannot be put on {lm.key} ({reason}); give one trained on it") from error
    if model is None:
        raise InputError(f"adapter {folder}: its tensors do not fit {lm.key}; give a LoRA adapter trained on it")
    model.requires_grad_(False).eval()
    adapted = replace(lm, model=model, key=f"{lm.key}+{folder.resolve().name}")
    check_lens(adapted)
    return adapted


def describe(lm: "LanguageModel") -> dict[str, Any]:
    """What one should know of a loaded model before measuring it; ``lens_log_gap`` as ``lens.check_lens`` gives it."""
    from classifier_emergence.reading.lens import check_lens

    vocabulary, width = lm.readout.weight.shape
    return {
        "model": lm.key,
        "architecture": type(lm.model).__name__,
        "n_layers": lm.n_layers,
        "d_model": width,
        "vocabulary": vocabulary,
        "tokenizer_vocabulary": len(lm.tokenizer),
        "parameters": sum(parameter.numel() for parameter in lm.model.parameters()),
        "tied_embeddings": lm.model.get_input_embeddings().weight is lm.model.get_output_embeddings().weight,
        "adds_bos": lm.tokenizer("=")["input_ids"][:1] == [lm.tokenizer.bos_token_id],
        "lens_log_gap": check_lens(lm),
    }
