"""Nothing but this machine is reached: a hook and a fixture of conftest.py, apart from what takes long to import."""

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

GUARD = Path(__file__).parent / "guard" / "sitecustomize.py"


def pytest_configure(config: pytest.Config) -> None:
    """Guard the network, before anything is imported that could use it."""
    descriptor, notes = tempfile.mkstemp(prefix="network-")
    os.close(descriptor)
    config.add_cleanup(Path(notes).unlink)
    os.environ["CLASSIFIER_EMERGENCE_TESTS_NETWORK"] = notes
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(GUARD.parent), os.environ.get("PYTHONPATH")]))
    spec = importlib.util.spec_from_file_location("network_guard", GUARD)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.fixture(autouse=True)
def network() -> Iterator[Path]:
    """Fails a test that asked something of another machine; the file of what was asked, for a test of this."""
    notes = Path(os.environ["CLASSIFIER_EMERGENCE_TESTS_NETWORK"])
    yield notes
    asked = notes.read_text()
    notes.write_text("")
    assert not asked, f"not on this machine: {asked}"
