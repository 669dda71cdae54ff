"""Registered models: where the weights of each come from, and their pins."""

import difflib
from collections.abc import Iterable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from classifier_emergence.errors import InputError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Source(BaseModel):
    # strict: "4" is not 4 and 4.0 is not 4; a misspelt key is an error, never silently the default.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class WheelSource(_Source):
    """GGUF weights inside PyPI wheels, joined in order."""

    source: Literal["wheel"]
    packages: list[str] = Field(min_length=1)
    """Pinned requirements; ``name1..4==1.0`` stands for ``name1==1.0`` to ``name4==1.0``."""
    sha256: Sha256
    """Of the joined GGUF file."""
    licence: str


class HubSource(_Source):
    """A Hugging Face repository at one commit."""

    source: Literal["hub"]
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    licence: str


class PathSource(_Source):
    """A local folder in the Hugging Face layout (config, tokenizer, safetensors)."""

    source: Literal["path"]
    path: str
    licence: str = "unknown"


ModelSource = Annotated[WheelSource | HubSource | PathSource, Field(discriminator="source")]


def source_of(key: str, registry: dict[str, ModelSource], *, parameter: str = "model") -> ModelSource:
    """The registry entry of a model.

    Raises:
        InputError: The key is not in the registry; the message lists the nearest key or all of them.

    Example:
        >>> source_of("small", {"small": PathSource(source="path", path="models/small")}).path
        'models/small'
    """
    if key in registry:
        return registry[key]
    raise InputError(f"{parameter}: unknown key {key!r}; {_nearest(key, registry)}")


def read_registry(file: Path | Traversable, section: str | None = "registry") -> dict[str, ModelSource]:
    """Models by key, each entry checked: a section of a YAML file, or all of it.

    Raises:
        InputError: The file cannot be read, is not YAML or has no such section, or an entry is not valid; one line that
            names its dotted key.

    Example:
        >>> read_registry(Path("params.yaml"))["gemma-3-270m"].source
        'wheel'
    """
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); restore it from git") from error
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
    if section:
        if not isinstance(entries, dict) or section not in entries:
            raise InputError(f"{file}: no section {section}; restore it from git")
        entries = entries[section]
    try:
        known: dict[str, ModelSource] = TypeAdapter(dict[str, ModelSource]).validate_python(entries)
    except ValidationError as error:
        raise InputError(f"{file}: {_problem(error)}") from error
    return known


def _problem(error: ValidationError) -> str:
    # A misspelt key is also a missing one; that it is unknown says more.
    problem = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    # pydantic puts the kind of the source into the place; it is no part of the dotted name.
    name = ".".join(["registry", *(str(part) for i, part in enumerate(problem["loc"]) if i != 1)])
    if problem["type"] == "extra_forbidden":
        fields = {*WheelSource.model_fields, *HubSource.model_fields, *PathSource.model_fields}
        return f"{name}: unknown parameter; {_nearest(str(problem['loc'][-1]), fields)}"
    found = f" (found {problem['input']!r})" if isinstance(problem["input"], str | int | float | None) else ""
    return f"{name}: {problem['msg'][:1].lower() + problem['msg'][1:]}{found}"


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known := sorted(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
