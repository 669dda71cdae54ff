"""Tensors of a checkpoint by name, in a folder or on the hub: only what is asked for is read or downloaded.

huggingface_hub reads the headers of safetensors files, here and there; the bytes of tensors come through fsspec, which
hides where they lie. ``safetensors.safe_open`` is not used for them: without mapping, its slices read the whole tensor
each time, and the pages of a mapped file count as memory of the process.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import HfApi, HfFileSystem, parse_local_safetensors_file_metadata
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from torch import Tensor

from classifier_emergence.errors import InputError, first_line
from classifier_emergence.models.registry import HubSource

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint:
    """Tensors of safetensors files by name; counts what is read. Pickles are never opened.

    Example:
        >>> checkpoint = Checkpoint("models/olmoe-1b-7b")
        >>> checkpoint.read("lm_head.weight", slice(0, 100)).shape
        torch.Size([100, 2048])
    """

    def __init__(self, place: str | Path | HubSource) -> None:
        """A checkpoint in the Hugging Face layout: headers now, tensors when they are read.

        Args:
            place: A folder, or a hub repository at its pinned commit.

        Raises:
            InputError: A file is missing, truncated, damaged or pickled, or the index disagrees with the files.
        """
        self._hub = place if isinstance(place, HubSource) else None
        self._files: AbstractFileSystem = HfFileSystem() if self._hub else LocalFileSystem()
        self.root = f"{self._hub.repo}@{self._hub.revision}" if self._hub else str(place)
        self.bytes_read = 0
        """Bytes of tensor data read so far, without headers (a few hundred a tensor)."""
        try:
            listed: list[Any] = self._files.ls(self.root, detail=True)
        except Exception as error:  # whatever the file system raises, there is no checkpoint
            raise _unreadable(self.root, error) from error
        self._sizes = {item["name"].rpartition("/")[2]: int(item["size"]) for item in listed}
        if SAFETENSORS_SINGLE_FILE in self._sizes:
            held = {SAFETENSORS_SINGLE_FILE: self._header(SAFETENSORS_SINGLE_FILE)}
            places = dict.fromkeys(held[SAFETENSORS_SINGLE_FILE], SAFETENSORS_SINGLE_FILE)
        else:
            places = self._index()
            held = {file: self._header(file) for file in sorted(set(places.values()))}
        for name, file in places.items():
            if name not in held[file]:
                raise InputError(f"{self.root}: the index places {name} in {file}, which lacks it; download both again")
        self._tensors = {name: (f"{self.root}/{file}", *held[file][name]) for name, file in places.items()}
        self.total_bytes = sum(self._sizes[file] for file in held)
        """Size of all weight files."""

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def sizes(self) -> tuple[int, int]:
        """How many numbers are held in whatever precision one loads with, and the bytes of what is not.

        Weights in four or eight bits with a scale (MXFP4, FP8) count as the numbers that they stand for, as they are
        dequantised; whole numbers of other methods stay as they are.
        """
        values = fixed = 0
        for name, (_, _, info) in self._tensors.items():
            start, stop = info.data_offsets
            if info.dtype in _FLOATS:
                values += math.prod(info.shape)
            elif name.endswith("_blocks"):
                values += 2 * (stop - start)
            elif not name.endswith("_scales"):
                fixed += stop - start
        return values, fixed

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the checkpoint, such as ``config.json``.

        Raises:
            InputError: It is missing, cannot be read, or holds no object.
        """
        if name not in self._sizes:
            raise InputError(f"{self.root}: no {name}; give a folder of a checkpoint")
        try:
            content = json.loads(self._files.cat_file(f"{self.root}/{name}"))
        except Exception as error:
            raise _unreadable(f"{self.root}: {name}", error) from error
        if not isinstance(content, dict):
            raise InputError(f"{self.root}: {name} is no JSON object; download it again")
        return content

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; reads no data.

        Raises:
            InputError: There is no such tensor.
        """
        if name not in self._tensors:
            raise InputError(f"{self.root}: no tensor {name}; give a complete checkpoint")
        return tuple(self._tensors[name][2].shape)

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of a tensor, (rows, ...) in its stored dtype: float32, float16 or bfloat16.

        Raises:
            InputError: There is no such tensor, it is quantised or of another dtype, or it cannot be read.
        """
        (length, *rest), (path, start, info) = self.shape(name), self._tensors[name]
        if info.dtype not in _DTYPES:
            raise InputError(f"{self.root}: {name} is {info.dtype}; give weights in {', '.join(_DTYPES)}")
        first, stop, _ = rows.indices(length)
        found = torch.empty(max(stop - first, 0), *rest, dtype=_DTYPES[info.dtype])
        if found.nbytes:
            start += first * math.prod(rest) * found.itemsize
            try:
                data = self._bytes(path, start, start + found.nbytes)
                found = torch.frombuffer(data, dtype=found.dtype).view(found.shape)
            except Exception as error:
                raise _unreadable(f"{path}: {name}", error) from error
        self.bytes_read += found.nbytes
        return found

    def _index(self) -> dict[str, str]:
        """File of every tensor."""
        if SAFETENSORS_INDEX_FILE in self._sizes:
            places = self.json(SAFETENSORS_INDEX_FILE).get("weight_map")
            if isinstance(places, dict) and places and all(isinstance(file, str) for file in places.values()):
                return places
            raise InputError(f"{self.root}: {SAFETENSORS_INDEX_FILE} holds no weight_map; download it again")
        pickles = sorted(file for file in self._sizes if file.endswith((".bin", ".pt", ".pth")))
        found = (
            f"only pickled weights ({pickles[0]}), which are never read"
            if pickles
            else "no model.safetensors nor an index of parts"
        )
        raise InputError(f"{self.root}: {found}; give a folder with *.safetensors")

    def _header(self, file: str) -> dict[str, tuple[int, Any]]:
        """First byte and description of every tensor of a file, checked: we ask for a tensor's own bytes only."""
        if file not in self._sizes:
            raise InputError(f"{self.root}: {file} is missing; complete the download")
        path, end = f"{self.root}/{file}", 0
        try:
            if self._hub:
                header = HfApi().parse_safetensors_file_metadata(self._hub.repo, file, revision=self._hub.revision)
            else:
                header = parse_local_safetensors_file_metadata(path)
            base = 8 + int.from_bytes(self._bytes(path, 0, 8), "little")
            for name, info in header.tensors.items():
                start, stop = info.data_offsets
                size = math.prod(info.shape) * _DTYPES[info.dtype].itemsize if info.dtype in _DTYPES else stop - start
                if min(start, *info.shape, 0) < 0 or stop - start != size:
                    raise ValueError(f"offsets of {name} do not fit its shape")
                end = max(end, stop)
            if base + end != self._sizes[file]:
                raise ValueError(f"{self._sizes[file]} bytes are not what its header says")
        except Exception as error:
            raise _unreadable(path, error) from error
        return {name: (base + info.data_offsets[0], info) for name, info in header.tensors.items()}

    def _bytes(self, path: str, start: int, stop: int) -> bytearray:
        # No cache: a read-ahead of megabytes would be downloaded for every router of kilobytes.
        data = bytearray(stop - start)
        with self._files.open(path, "rb", cache_type="none") as stream:
            stream.seek(start)
            if stream.readinto(data) != len(data):
                raise ValueError("it ends early")
        return data


def _unreadable(what: str, error: Exception) -> InputError:
    advice = "download it again, check permissions and, for a hub, the connection, the pinned revision and HF_TOKEN"
    return InputError(f"{what} cannot be read ({first_line(error)}); {advice}")
