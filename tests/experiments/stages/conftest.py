"""What tests of several stages need."""

import shutil
from pathlib import Path

import pytest

from experiments.params import Params, load_params

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def params(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """Tiny parameters, in a folder of their own with the tiny models: a stage runs there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(tiny_models)
    shutil.copy(ROOT / "params.tiny.yaml", tmp_path / "params.yaml")
    return load_params()
