from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from number_snapshots import NumbersExtension
from syrupy.assertion import SnapshotAssertion

from classifier_emergence.models import LanguageModel, load
from experiments import tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def numbers(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    """Snapshot that compares floats within the tolerance of their kind and everything else exactly."""
    return snapshot.use_extension(NumbersExtension)


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


@pytest.fixture
def seeded() -> Callable[..., torch.Tensor]:
    """Normal random tensors from an explicit seed."""
    return lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
