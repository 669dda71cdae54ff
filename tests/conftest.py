import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from number_snapshots import NumbersExtension, TinyNumbersExtension
from syrupy.assertion import SnapshotAssertion
from transformers import MixtralConfig, MixtralForCausalLM

from classifier_emergence.models.loading import load
from classifier_emergence.reading.model import LanguageModel
from experiments.pipeline import tiny

ROOT = Path(__file__).resolve().parents[1]


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


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    """A file system in memory. All of them share one store, so it is emptied."""
    found = MemoryFileSystem()
    yield found
    found.store.clear()
    found.pseudo_dirs[:] = [""]


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
