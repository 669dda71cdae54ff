"""The guide works as it stands: its commands and snippets run on the tiny model in a fresh folder."""

import re
import shlex
from pathlib import Path

import pytest

from classifier_emergence.cli import run

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "guide.md"
MODEL = "smollm2-135m-instruct"
MIXTURE = "olmoe-1b-7b"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
SETUP = ("python3 -m venv .venv && . .venv/bin/activate", "pip install -c constraints.txt .")
"""What only an installation can run; CI installs the package by the second."""


def commands() -> list[str]:
    text = "".join(body for kind, body in BLOCKS if kind == "sh").replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip()]


def test_the_guide_has_commands_and_snippets_and_no_other_blocks() -> None:
    assert {kind for kind, _ in BLOCKS} == {"sh", "python"}
    assert tuple(commands()[:2]) == SETUP
    assert all(line.startswith("classifier-emergence ") for line in commands()[2:])


def test_a_newcomer_needs_five_commands_to_a_curve() -> None:
    assert "classifier-emergence probe" in commands()[3]


def test_every_command_of_the_guide_runs(
    tiny_models: Path,
    mixture: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    ours = {MODEL: str(tiny_models / "tiny-llama"), MIXTURE: str(mixture)}
    for line in commands()[2:]:
        words = [ours.get(word, word) for word in shlex.split(line)[1:]]
        code = run(words)
        captured = capsys.readouterr()
        assert code == 0, f"{line}\n{captured.err}"
        for option in ("--json", "--plot", "--output"):
            if option in words:
                assert (tmp_path / words[words.index(option) + 1]).exists(), line


def test_every_snippet_of_the_guide_runs_in_order(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for body in (body for kind, body in BLOCKS if kind == "python"):
        exec(body.replace(MODEL, str(tiny_models / "tiny-llama")), names)
    assert (tmp_path / "taught" / "adapter_model.safetensors").is_file()
    assert "p = " in capsys.readouterr().out
