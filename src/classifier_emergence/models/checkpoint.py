"""Tensors of a checkpoint by byte ranges, in a folder or on the hub: only what is asked for is read or downloaded.

A safetensors file is eight bytes with the length of a JSON header, the header, and the data. It is read here with plain
reads and not by ``safetensors.safe_open``, which maps whole files: a file larger than the memory that a machine lets a
process map cannot be opened so, mapped pages count as the process's memory, and nothing can be mapped over HTTP. One
code path serves local files and ranged requests, through fsspec.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfFileSystem
from torch import Tensor

from classifier_emergence.errors import InputError
from classifier_emergence.models.registry import HubSource

INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library. A damaged or hostile file must not make us ask for more."""

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


_ADVICE = "check permissions and, for a hub, the connection, the pinned revision and HF_TOKEN"


@dataclass(frozen=True)
class _Entry:
    """One tensor of a header; its bytes are ``start`` to ``stop`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @classmethod
    def of(cls, entry: dict[str, Any], base: int) -> "_Entry":
        """Checked: whatever a header says, it must not make us read anything but the tensor's own bytes."""
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        counts = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
        if not counts or start > stop or not isinstance(dtype, str):
            raise ValueError("shape or offsets are no counts")
        if dtype in _DTYPES and stop - start != math.prod(shape) * _DTYPES[dtype].itemsize:
            raise ValueError("offsets do not fit the shape")
        return cls(dtype, shape, base + start, base + stop)


class Checkpoint:
    """Tensors of safetensors files by name; counts what is read. Pickles are never opened."""

    def __init__(self, root: str | Path, files: AbstractFileSystem | None = None) -> None:
        """A checkpoint in the Hugging Face layout.

        Args:
            root: Its folder in ``files``.
            files: Where the folder is; default this machine.

        Raises:
            InputError: A file is missing, truncated, damaged or pickled, or the index disagrees with the files.
        """
        self.root = str(root)
        self.bytes_read = 0
        """Bytes of tensor data read so far, without headers (8 bytes and a few hundred a tensor)."""
        self._fs = files if files is not None else LocalFileSystem()
        self._headers: dict[str, dict[str, _Entry]] = {}
        self._places = self._index()
        names = sorted(set(self._places.values()))
        sizes = {name: self._size(name) for name in names}
        if missing := [name for name, size in sizes.items() if size is None]:
            raise InputError(f"{self.root}: {missing[0]} is missing; complete the download")
        self.total_bytes = sum(size or 0 for size in sizes.values())
        """Size of all weight files."""
        for file in names:
            held = self._header(file)
            if lost := sorted(name for name, its in self._places.items() if its == file and name not in held):
                raise InputError(
                    f"{self.root}: the index places {lost[0]} in {file}, which lacks it; download both again"
                )

    @classmethod
    def on_hub(cls, source: HubSource) -> "Checkpoint":
        """A hub repository at its pinned commit; headers now, tensors when they are read."""
        return cls(f"{source.repo}@{source.revision}", HfFileSystem())

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._places)

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the checkpoint, such as ``config.json``."""
        size = self._size(name)
        if size is None:
            raise InputError(f"{self.root}: no {name}; give a folder of a checkpoint")
        try:
            content = json.loads(self._bytes(name, 0, size))
        except ValueError as error:
            raise InputError(f"{self.root}: {name} cannot be read; download it again") from error
        if not isinstance(content, dict):
            raise InputError(f"{self.root}: {name} is no JSON object; download it again")
        return content

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; reads no data."""
        return self._entry(name)[1].shape

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of a tensor in its stored dtype: float32, float16 or bfloat16.

        Raises:
            InputError: There is no such tensor, it is quantised or of another dtype, or it cannot be read.
        """
        file, entry = self._entry(name)
        if entry.dtype not in _DTYPES:
            raise InputError(f"{self.root}: {name} is {entry.dtype}; give weights in {', '.join(_DTYPES)}")
        start, stop, _ = rows.indices(entry.shape[0])
        count, dtype = max(stop - start, 0), _DTYPES[entry.dtype]
        row = math.prod(entry.shape[1:]) * dtype.itemsize
        shape = (count, *entry.shape[1:])
        if not count * row:
            return torch.empty(shape, dtype=dtype)
        data = self._bytes(file, entry.start + start * row, entry.start + (start + count) * row)
        self.bytes_read += len(data)
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def _entry(self, name: str) -> tuple[str, _Entry]:
        if name not in self._places:
            raise InputError(f"{self.root}: no tensor {name}; give a complete checkpoint")
        file = self._places[name]
        return file, self._header(file)[name]

    def _index(self) -> dict[str, str]:
        """File of every tensor: of model.safetensors, else of its index."""
        if self._size("model.safetensors") is not None:
            return dict.fromkeys(self._header("model.safetensors"), "model.safetensors")
        if self._size(INDEX) is not None:
            files = self.json(INDEX).get("weight_map")
            if (
                isinstance(files, dict)
                and files
                and all(isinstance(f, str) and Path(f).name == f for f in files.values())
            ):
                return files
            raise InputError(f"{self.root}: {INDEX} holds no weight_map of tensors to files; download it again")
        try:
            found = [str(path).rpartition("/")[2] for path in self._fs.ls(self.root, detail=False)]
        except Exception as error:
            raise InputError(
                f"{self.root}: cannot be listed ({_reason(error)}); give a folder of a checkpoint"
            ) from error
        if pickles := sorted(file for file in found if file.endswith((".bin", ".pt", ".pth"))):
            raise InputError(
                f"{self.root}: only pickled weights ({pickles[0]}), which are never read; give *.safetensors"
            )
        raise InputError(f"{self.root}: neither model.safetensors nor {INDEX}; give a folder of a checkpoint")

    def _header(self, file: str) -> dict[str, _Entry]:
        if file not in self._headers:
            self._headers[file] = self._read_header(file)
        return self._headers[file]

    def _read_header(self, file: str) -> dict[str, _Entry]:
        size = self._size(file) or 0
        length = int.from_bytes(self._bytes(file, 0, 8), "little") if size >= 8 else LARGEST_HEADER + 1
        if length > min(LARGEST_HEADER, size - 8):
            raise InputError(f"{self.root}/{file}: cannot be read (no safetensors header); download it again")
        try:
            header = json.loads(self._bytes(file, 8, 8 + length))
            header.pop("__metadata__", None)
            entries = {name: _Entry.of(entry, 8 + length) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{self.root}/{file}: cannot be read (damaged header); download it again") from error
        if max((entry.stop for entry in entries.values()), default=8 + length) != size:
            raise InputError(
                f"{self.root}/{file}: cannot be read ({size} bytes are not what its header says); download it again"
            )
        return entries

    def _size(self, name: str) -> int | None:
        path = f"{self.root}/{name}"
        try:
            found = self._fs.info(path)
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever the file system under fsspec raises, there is no file
            raise InputError(f"{path}: cannot be reached ({_reason(error)}); {_ADVICE}") from error
        return int(found["size"]) if found["type"] == "file" else None

    def _bytes(self, name: str, start: int, stop: int) -> bytearray:
        path, data = f"{self.root}/{name}", bytearray(stop - start)
        try:
            # No cache: a read-ahead of megabytes would be downloaded for every router of kilobytes.
            with self._fs.open(path, "rb", cache_type="none") as stream:
                stream.seek(start)
                got = stream.readinto(data)
        except Exception as error:  # see _size
            raise InputError(f"{path}: cannot be read ({_reason(error)}); {_ADVICE}") from error
        if got != len(data):
            raise InputError(f"{path}: cannot be read (it ends at byte {start + (got or 0)}); download it again")
        return data


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
