import gc
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from network import network, pytest_configure  # noqa: F401
from number_snapshots import NumbersExtension, TinyNumbersExtension
from syrupy.assertion import SnapshotAssertion
from transformers import MixtralConfig, MixtralForCausalLM

from classifier_emergence.models.loading import load
from classifier_emergence.reading.model import LanguageModel

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="module")
def _libraries_are_no_garbage() -> None:
    """Every training collects garbage, which would go through all that the libraries hold: seconds in each test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def committed() -> Iterator[Path]:
    """A folder with the committed results; those of the tree may have been regenerated on another processor."""
    from experiments.pipeline.reproduce import results_in_git  # not before the network is guarded

    folder = results_in_git()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def numbers(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    """Snapshot that compares floats within the tolerance of their kind and everything else exactly."""
    return snapshot.use_extension(NumbersExtension)


@pytest.fixture
def tiny_numbers(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    """The same for numbers of models that the test itself trained."""
    return snapshot.use_extension(TinyNumbersExtension)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the tiny models, built once a session."""
    folder = tmp_path_factory.mktemp("models")
    tiny.build(folder)
    return folder


@pytest.fixture(scope="session", params=["tiny-llama", "tiny-gemma"])
def lm(tiny_models: Path, request: pytest.FixtureRequest) -> LanguageModel:
    """Each tiny model: untied without BOS; tied with BOS and sandwich norms."""
    return load(str(tiny_models / request.param), {})


@pytest.fixture(params=[True, False], ids=["tree", "padded"])
def as_tree(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways in which texts pass: whether as a tree, else padded."""
    if not request.param:
        monkeypatch.setattr("classifier_emergence.reading.tree.LARGEST_TREE", 0)
    return bool(request.param)


class HubServer(BaseHTTPRequestHandler):
    """Stands for the hub: serves a folder as ``REPO`` at ``REVISION`` and counts the bytes of files that it sends."""

    REPO, REVISION = "org/moe", "0" * 40
    folder = Path()
    sent = 0

    def do_GET(self) -> None:
        path, name, body = self.path.partition("?")[0], self.path.rpartition("/")[2], b"{}"
        status = 200
        if path == f"/api/models/{self.REPO}/revision/{self.REVISION}":
            body = json.dumps({"id": self.REPO, "sha": self.REVISION}).encode()
        elif path == f"/api/models/{self.REPO}/tree/{self.REVISION}":
            files = [(file.name, file.stat().st_size) for file in self.folder.iterdir()]
            body = json.dumps([{"type": "file", "path": name, "size": n, "oid": ""} for name, n in files]).encode()
        elif path == f"/{self.REPO}/resolve/{self.REVISION}/{name}" and (self.folder / name).is_file():
            body = (self.folder / name).read_bytes()
            if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                status, body = 206, body[int(asked[1]) : int(asked[2]) + 1]
            type(self).sent += len(body)
        else:
            status = 404
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[HubServer]]:
    """A hub on this machine; set ``folder`` to what it shall serve."""
    HubServer.folder, HubServer.sent = tmp_path, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), HubServer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield HubServer
        server.shutdown()


@pytest.fixture
def seeded() -> Callable[..., torch.Tensor]:
    """Normal random tensors from an explicit seed."""
    return lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def mixture(tiny_models: Path, tmp_path: Path) -> Path:
    """A tiny mixture of experts with a tokenizer beside it."""
    torch.manual_seed(0)
    size = json.loads((tiny_models / "tiny-llama" / "config.json").read_text())["vocab_size"]
    config = MixtralConfig(
        vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_models / "tiny-llama" / name, tmp_path / "moe")
    return tmp_path / "moe"
