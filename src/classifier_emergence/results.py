"""Result files: numbers written so that git shows what changed, read so that a mistake names itself.

A result is a JSON object with sorted keys, finite numbers of ten significant digits, and lists of scalars on
one line. It holds nothing of the machine or the moment, so the same run gives the same bytes.
"""

import dataclasses
import hashlib
import json
import math
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from classifier_emergence.errors import InputError

DIGITS = 10
"""Significant digits of a stored float: more than float32 holds, without the last bits of float64."""


class ResultError(RuntimeError):
    """A stage made something that a result file cannot hold. The message names its dotted key."""


def plain(value: Any, *, key: str = "") -> Any:
    """The same tree in JSON's own types: dict, list, str, int, float, bool and None. Nothing is rounded.

    Args:
        value: Mappings with text keys, lists and tuples, dataclasses, NumPy and PyTorch scalars and arrays.
        key: Dotted name of ``value``, for messages.

    Raises:
        ResultError: A number is NaN or infinite, a key is not text, text is not valid Unicode, or a type has
            no JSON form (a set has no order; a path belongs to one machine).
    """
    where = key or "the result"
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ResultError(f"{where}: {value} is not a finite number; store null and say why in a key beside it")
        return float(value)
    if isinstance(value, str):
        return _text(value, where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Not asdict(): it deep-copies, which tensors with a gradient refuse.
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_key(name, where): plain(item, key=_join(key, name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, key=_join(key, i)) for i, item in enumerate(value)]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), key=key)
    raise ResultError(f"{where}: {type(value).__name__} has no JSON form; convert it to numbers, text or lists")


def write_result(path: str | Path, payload: Any) -> None:
    """Write a result (a mapping or a dataclass) as JSON, atomically; see the top of this module for the form.

    Raises:
        ResultError: See ``plain``; also if the payload is neither a mapping nor a dataclass. Nothing is
            written then.
    """
    tree = plain(payload)
    if not isinstance(tree, dict):
        raise ResultError(f"{path}: a result is an object with names, not {type(payload).__name__}")
    write_text_atomic(path, _render(tree, 0) + "\n")


def read_result(path: str | Path) -> dict[str, Any]:
    """Read a result.

    Raises:
        InputError: The file is missing, is not JSON, holds NaN or infinity, or is not an object.
    """
    path = Path(path)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such result; run the stage that writes it: dvc repro") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name one result file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a valid result ({error}); restore it from git or rerun: dvc repro") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: not a result (an object with names), but {_describe(tree)}; rerun: dvc repro")
    return tree


def digest(result: Any) -> str:
    """The sha256 of a result, the same before it is written and after it is read."""
    return hashlib.sha256(_render(plain(result), 0).encode()).hexdigest()


def lookup(result: Any, dotted: str) -> Any:
    """The value at a dotted key such as ``layers.0.accuracy``; a number (also negative) indexes a list.

    A key that itself contains a dot cannot be reached: models, whose names do, have one file each instead.

    Raises:
        InputError: A part does not exist; the message names it and lists what exists there.
    """
    node, walked = result, ""
    for part in dotted.split("."):
        here = walked or "the result"
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and part.removeprefix("-").isdecimal() and -len(node) <= int(part) < len(node):
            node = node[int(part)]
        else:
            raise InputError(f"{dotted}: no {part!r} in {here}, which is {_describe(node)}; correct the key")
        walked = _join(walked, part)
    return node


def script_json(tree: Any) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write text as UTF-8 with the line ends that it has; see ``write_bytes_atomic``."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: str | Path, data: bytes) -> None:
    """Write a file so that a reader finds the old or the new content, never a part; folders are created.

    A failure or an interrupt leaves the old file and no temporary one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, as only a rename within one file system is atomic; opened plainly (not tempfile), so
    # that the file gets the permissions of any other.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _render(value: Any, depth: int) -> str:
    pad, end = " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict) and value:
        lines = [f"{pad}{json.dumps(k, ensure_ascii=False)}: {_render(value[k], depth + 1)}" for k in sorted(value)]
        return "{\n" + ",\n".join(lines) + end + "}"
    if isinstance(value, list):
        if any(isinstance(item, dict | list) for item in value):
            return "[\n" + ",\n".join(pad + _render(item, depth + 1) for item in value) + end + "]"
        return "[" + ", ".join(_render(item, depth + 1) for item in value) + "]"
    if isinstance(value, float):
        short = float(f"{value:.{DIGITS}g}")
        # Rounding the largest float gives infinity. + 0.0: the sign of a zero would flip between machines.
        return json.dumps((short if math.isfinite(short) else value) + 0.0, allow_nan=False)
    return json.dumps(value, ensure_ascii=False)


def _join(key: str, part: object) -> str:
    return f"{key}.{part}" if key else str(part)


def _key(name: object, where: str) -> str:
    if not isinstance(name, str):
        # JSON would turn 1 into "1", and what is read back would not equal what was written.
        raise ResultError(f"{where}: the key {name!r} is not text; write str({name!r})")
    return _text(name, f"a key of {where}")


def _text(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ResultError(f"{where}: {text!a} is not valid Unicode; pass it through typeset.visible") from error
    return str(text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}")


def _describe(node: Any) -> str:
    if isinstance(node, dict):
        return f"an object with {', '.join(sorted(node)) or 'nothing in it'}"
    if isinstance(node, list):
        return f"a list of {len(node)}"
    return f"the value {json.dumps(node)}"
