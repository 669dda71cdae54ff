"""Checkpoints: the same tensors from a folder and from a hub, only the bytes asked for, hostile headers refused.

What a damaged folder says is tested in ``mixtures/test_routers.py``.
"""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from classifier_emergence.errors import InputError
from classifier_emergence.models.checkpoint import Checkpoint
from classifier_emergence.models.registry import HubSource, PathSource
from classifier_emergence.models.sources import checkpoint_of

TENSORS = {
    "wide": torch.randn(20, 3, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(6).to(torch.bfloat16),
    "junk": torch.zeros(10**6, dtype=torch.uint8),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files with an index."""
    made = tmp_path / "moe"
    made.mkdir()
    parts = {"a.safetensors": ["wide"], "b.safetensors": ["half", "junk"]}
    for file, names in parts.items():
        save_file({name: TENSORS[name] for name in names}, made / file)
    places = {name: file for file, names in parts.items() for name in names}
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return made


def on_hub(revision: str = "0" * 40) -> HubSource:
    return HubSource(source="hub", repo="org/moe", revision=revision, licence="none")


@pytest.fixture(params=["folder", "hub"])
def place(request: pytest.FixtureRequest, folder: Path, hub_server: Any) -> Path | HubSource:
    """The folder, or a hub that serves it."""
    hub_server.folder = folder
    return folder if request.param == "folder" else on_hub()


def test_rows_are_read_in_their_dtype_and_counted(place: Path | HubSource, folder: Path) -> None:
    checkpoint = Checkpoint(place)
    assert set(checkpoint.names) == set(TENSORS)
    assert checkpoint.shape("wide") == (20, 3)
    assert checkpoint.bytes_read == 0
    assert checkpoint.total_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for name in ("wide", "half"):
        for rows in (slice(None), slice(2, 5), slice(3, 10**6), slice(-2, None), slice(4, 4), slice(5, 3)):
            assert torch.equal(checkpoint.read(name, rows), TENSORS[name][rows])
    before = checkpoint.bytes_read
    assert checkpoint.read("wide", slice(2, 5)).dtype == torch.float32
    assert checkpoint.bytes_read - before == 3 * 3 * 4
    with pytest.raises(InputError, match=r"junk is U8; give weights in F32, F16, BF16"):
        checkpoint.read("junk")
    with pytest.raises(InputError, match="no tensor lost"):
        checkpoint.shape("lost")
    with pytest.raises(InputError, match=r"no config.json"):
        checkpoint.json("config.json")


def test_of_a_hub_only_the_wanted_ranges_are_sent(folder: Path, hub_server: Any) -> None:
    hub_server.folder = folder
    checkpoint = Checkpoint(on_hub())
    opened = hub_server.sent
    assert opened < 250_000 < checkpoint.total_bytes  # huggingface_hub asks for 100 kB of each file
    checkpoint.read("wide", slice(1, 3))
    assert hub_server.sent - opened == checkpoint.bytes_read == 2 * 3 * 4


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]},
        {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": ["2", 2], "data_offsets": [0, 16]},
        {"dtype": ["F32"], "shape": [2, 2], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16, 32]},
        {"dtype": "F32", "shape": [2, 2]},
        [],
        None,
    ],
    ids=str,
)
def test_hostile_headers_are_one_clear_line(entry: Any, place: Path | HubSource, folder: Path) -> None:
    header = json.dumps({"wide": entry}).encode()
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    with pytest.raises(InputError, match=r"a.safetensors cannot be read .*download it again") as raised:
        Checkpoint(place)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 8, b"\xff" * 100, struct.pack("<Q", 2) + b"[]"])
def test_what_is_no_safetensors_file_is_one_clear_line(content: bytes, place: Path | HubSource, folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"a.safetensors cannot be read ") as raised:
        Checkpoint(place)
    assert "\n" not in str(raised.value)


def test_a_file_that_ends_early_is_refused_when_opened(place: Path | HubSource, folder: Path) -> None:
    file = folder / "a.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"a.safetensors cannot be read .*not what its header says"):
        Checkpoint(place)


def test_a_file_that_shrinks_afterwards_is_refused_when_read(place: Path | HubSource, folder: Path) -> None:
    file, opened = folder / "a.safetensors", Checkpoint(place)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"a.safetensors: wide cannot be read"):
        opened.read("wide")


def test_a_hub_checkpoint_is_that_of_its_pinned_commit(folder: Path, hub_server: Any) -> None:
    hub_server.folder = folder
    assert checkpoint_of("moe", on_hub()).root == f"org/moe@{'0' * 40}"
    with pytest.raises(InputError, match=r"org/moe@1{40} cannot be read"):
        checkpoint_of("moe", on_hub("1" * 40))


def test_a_folder_needs_no_tokenizer_and_a_cached_hub_model_no_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkpoint_of("moe", PathSource(source="path", path=str(folder))).root == str(folder)
    monkeypatch.setattr("classifier_emergence.models.sources.snapshot_download", lambda *_, **__: str(folder))
    assert checkpoint_of("moe", on_hub()).root == str(folder)
