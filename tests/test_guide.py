"""The guide works as it stands: its commands and snippets run on the tiny model in a fresh folder."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from classifier_emergence.cli.app import run

ROOT = Path(__file__).resolve().parents[1]
MODEL = "smollm2-135m-instruct"
MIXTURE = "olmoe-1b-7b"


def blocks(file: str) -> list[tuple[str, str]]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


BLOCKS = blocks("docs/guide.md")
SETUP = ("python3 -m venv .venv && . .venv/bin/activate", 'pip install -c constraints.txt ".[rl,wheels,plot]"')
"""What only an installation can run."""


def commands(found: list[tuple[str, str]] = BLOCKS) -> list[str]:
    text = "".join(body for kind, body in found if kind == "sh").replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip()]


def short(text: str) -> str:
    """The same with few steps of training: how many there are changes nothing but what is learnt."""
    return re.sub(r"(--steps |\bsteps=)\d+", r"\g<1>3", text)


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
    chat_model = shutil.copytree(tiny_models / "tiny-llama", tmp_path / "chat" / "tiny-llama")
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    (chat_model / "chat_template.jinja").write_text(template)
    ours = {MODEL: str(chat_model), MIXTURE: str(mixture), "./mixture": str(mixture)}
    for line in map(short, commands()[2:]):
        words = [ours.get(word, word) for word in shlex.split(line)[1:]]
        code = run(words)
        captured = capsys.readouterr()
        assert code == 0, f"{line}\n{captured.err}"
        for option in ("--json", "--plot", "--output"):
            if option in words:
                assert (tmp_path / words[words.index(option) + 1]).exists(), line


def test_every_picture_of_the_gallery_has_its_command() -> None:
    text = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    shown = re.findall(r"^!\[[^\]]+\]\(gallery/([\w.]+)\)$", text, re.MULTILINE)
    drawn = {
        words[words.index("--plot") + 1]: words[1 + (words[1] == "routers")]
        for line in commands()[2:]
        if "--plot" in (words := shlex.split(line))
    }
    assert set(shown) <= set(drawn)
    assert {drawn[name] for name in shown} == {"probe", "lens", "direction", "dual-reward", "grpo", "trace"}
    assert sorted(shown) == sorted(path.name for path in (ROOT / "docs" / "gallery").iterdir())
    for name in shown:
        assert (ROOT / "docs" / "gallery" / name).read_bytes().startswith(b"\x89PNG")


def test_every_command_and_snippet_of_the_readme_runs(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = commands(blocks("README.md"))
    assert SETUP[1] in lines
    for line in map(short, lines):
        if not line.startswith("classifier-emergence "):
            continue  # setting up, and nox
        words = [str(tiny_models / "tiny-llama") if word == MODEL else word for word in shlex.split(line)[1:]]
        monkeypatch.chdir(ROOT if words[0] == "claims" else tmp_path)
        code = run(words)
        assert code == 0, f"{line}\n{capsys.readouterr().err}"
    monkeypatch.chdir(tmp_path)
    for kind, body in blocks("README.md"):
        if kind == "python":
            exec(short(body).replace(MODEL, str(tiny_models / "tiny-llama")), {})
    assert (tmp_path / "rewarded" / "adapter_model.safetensors").is_file()


def test_every_snippet_of_the_guide_runs_in_order(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for body in (body for kind, body in BLOCKS if kind == "python"):
        exec(short(body).replace(MODEL, str(tiny_models / "tiny-llama")), names)
    assert (tmp_path / "taught" / "adapter_model.safetensors").is_file()
    assert "p = " in capsys.readouterr().out
