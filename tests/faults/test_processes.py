"""Processes that are ended from outside at any moment, short of room, or two at once: the same command goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.faults.damage import SEED, WHOLE, files_of, tried

ROOT = Path(__file__).resolve().parents[2]
MOMENTS = 20 if WHOLE else 2
OUTPUT = "adapter"
TRAINED = ["--file", "prompts.csv", "--output", OUTPUT, "--json", "a.json"]
PROMPTS = "".join(f"{a} * 3 =,multiply, {a * 3}\n{a} + 3 =,add, {a + 3}\n" for a in range(2, 6))
ALL = {
    "dual-reward": [*TRAINED, "--steps", "45", "--batch-size", "1"],
    "grpo": [*TRAINED, "--steps", "3", "--batch-size", "2", "--shots", "0", "--new-tokens", "3"],
    "lens": ["7 * 8 =", "--json", "a.json", "--plot", "a.png"],
}
COMMANDS = ALL if WHOLE else {"dual-reward": ALL["dual-reward"]}


class Zygote:
    """Starts commands on the tiny model."""

    def __init__(self, model: str) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        self.model = model
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, **wanted: Any) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(wanted) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, command: str, folder: Path, size: int | None = None) -> int:
        folder.mkdir(exist_ok=True)
        (folder / "err").unlink(missing_ok=True)
        (folder / "prompts.csv").write_text(f"prompt,label,answer\n{PROMPTS}")
        return self.ask(args=[command, "-m", self.model, *COMMANDS[command]], folder=str(folder), size=size)

    def wait(self, process: int) -> int:
        return self.ask(wait=process)


@pytest.fixture(scope="module")
def zygote(tiny_models: Path) -> Iterator[Zygote]:
    made = Zygote(str(tiny_models / "tiny-llama"))
    made.wait(0)  # it has imported everything
    yield made
    made.process.communicate()


def product(folder: Path) -> dict[str, Any]:
    """What the command is for, without what says where it ran."""
    found: dict[str, Any] = {"json": (folder / "a.json").read_text() if (folder / "a.json").exists() else ""}
    if (folder / OUTPUT).exists():
        weights = load_file(folder / OUTPUT / "adapter_model.safetensors")
        found["adapter"] = {name: value.tolist() for name, value in weights.items()}
    return found


def lines(folder: Path) -> list[str]:
    """What was told on standard error, without what libraries warn of and what names a task."""
    told = (folder / "err").read_text().splitlines()
    return [line for line in told if line.startswith(("error", "interrupted", "Traceback"))]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_process_that_is_ended_at_any_moment_goes_on_or_starts_anew(
    command: str, zygote: Zygote, tmp_path: Path
) -> None:
    start = time.monotonic()
    assert zygote.wait(zygote.start(command, tmp_path / "whole")) == 0, (tmp_path / "whole" / "err").read_text()
    lasts, whole = time.monotonic() - start, product(tmp_path / "whole")
    written = files_of(tmp_path / "whole")
    chance = random.Random(f"{SEED} {command}")
    for ending, codes in ((signal.SIGKILL, {-9}), (signal.SIGINT, {130}), (signal.SIGTERM, {-15})):
        for moment in range(MOMENTS):
            folder = tmp_path / f"{ending.name}-{moment}"
            process = zygote.start(command, folder)
            time.sleep(chance.uniform(0, lasts))
            os.kill(process, ending)
            code = zygote.wait(process)
            assert code in codes | {0}
            assert lines(folder) == ([] if code != 130 else ["interrupted; no result was written"])
            outcome = "was done"
            if code:
                assert not list(folder.rglob("*.tmp")) or ending == signal.SIGKILL
                outcome = "heals" if zygote.wait(zygote.start(command, folder)) == 0 else "one line"
            if outcome == "one line":  # it ended between its two results
                assert f"error: output {OUTPUT}: exists already" in "".join(lines(folder))
                assert product(folder)["adapter"] == whole["adapter"]
            else:
                assert product(folder) == whole
                assert set(files_of(folder)) >= set(written)
            tried[command, ending.name, outcome] += 1


@pytest.mark.parametrize("command", COMMANDS)
def test_no_room_is_one_line_and_the_same_command_goes_on(command: str, zygote: Zygote, tmp_path: Path) -> None:
    assert zygote.wait(zygote.start(command, tmp_path / "whole")) == 0
    whole = product(tmp_path / "whole")
    sizes = sorted({(tmp_path / "whole" / name).stat().st_size for name in files_of(tmp_path / "whole")} - {0})
    for size in sizes if WHOLE else sizes[-2:]:
        folder = tmp_path / f"full-{size}"
        assert zygote.wait(zygote.start(command, folder, size=size - 1)) == 2
        assert [line.split(":")[0] for line in lines(folder)] == ["error"]
        assert zygote.wait(zygote.start(command, folder)) == 0
        assert product(folder) == whole
        tried[command, "no space", "one line, heals"] += 1


def test_two_at_once_are_told_and_do_no_harm(zygote: Zygote, tmp_path: Path) -> None:
    first, second = (zygote.start("dual-reward", tmp_path / "both") for _ in range(2))
    codes = [zygote.wait(first), zygote.wait(second)]
    assert sorted(codes) in ([0, 2], [0, 0])
    assert len(lines(tmp_path / "both")) == codes.count(2)
    assert not (tmp_path / "both" / "adapter.partial").exists()
    tried["dual-reward", "two at once", "one line"] += 1
