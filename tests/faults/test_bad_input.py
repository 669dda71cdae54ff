"""Whatever is put in, it is taken or refused in one line: no traceback, no terminal escape, no half-written file.

A few cases of each kind, or with ``FAULTS=whole`` ten thousand in all.
"""

import contextlib
import copy
import csv
import io
import json
import os
import re
import shutil
import tempfile
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from classifier_emergence.cli.app import app, run
from classifier_emergence.errors import InputError
from classifier_emergence.models.registry import read_registry
from classifier_emergence.results import ResultError, read_result, write_result
from classifier_emergence.tasks.files import load_prompts, load_task
from experiments.params import load_params
from experiments.report.typeset import write_table
from tests.faults.damage import WHOLE, files_of, tried

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = [
    "", " ", "\n", "a\r\nb", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "[bold]x[/bold]", "=cmd|' calc'!A0", "+1", "@x",
    "\u202eevil", "שלום", "👩‍🔬", "x" * 3000, "\ud800", "\x00", "\x9b31m", "{}", "%s", "\u2028",
    "<script>alert(1)<|script>", "--", "-1", "nan", "NaN", "inf", "1e999", "None", ".", "..",
    "~", "*", "null", "L99", "emb", "after:x", "all",
]  # fmt: skip
# A slash would lead out of the folder that the test may write to.
texts = st.sampled_from(HOSTILE) | st.text(max_size=12).map(lambda text: text.replace("/", "|"))
likely = st.sampled_from(["multiply", "add", "7 * 8 =", "a|b", "=1+1", "<b>", "[red]"])
some = likely | likely | likely | texts
numbers = st.sampled_from(["-1", "0", "1", "2", "1.5", "nan", "inf", "1e-9", "\u0661"])
trees = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def cases(few: int, many: int) -> Any:
    return settings(
        max_examples=many if WHOLE else few, deadline=None, derandomize=not WHOLE, database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink) if WHOLE else (Phase.explicit, Phase.generate),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No hub: a text with a slash is the name of a model there."""

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)


def refused(call: Callable[[], object], kind: str) -> None:
    """It goes on, or one line says why not."""
    outcome = "taken"
    try:
        call()
    except InputError:
        outcome = "one line"
    tried[kind, "bad input", outcome] += 1


def told(words: list[str], folder: Path, kind: str) -> int:
    """The exit code of a command line, after a look at all that it said and wrote."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = run(words)
    said = out.getvalue() + err.getvalue()
    errors = [line for line in err.getvalue().splitlines() if line.lstrip("\u2068").startswith("error: ")]
    assert code in (0, 1, 2), (words, said)
    assert len(errors) == (code == 2 and not out.getvalue().startswith("Usage")), (words, said)
    assert "Traceback" not in said, words
    assert "unexpected error" not in said, (words, said)
    steering = [c for c in said if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cs")]
    assert not steering, (words, steering)
    for name in files_of(folder):
        parsed(folder / name)
    tried[kind, "bad input", f"exit code {code}"] += 1
    return code


def parsed(file: Path) -> None:
    """Whatever was written can be read, and is no part of a file."""
    assert not file.name.endswith(".tmp"), file
    if file.suffix == ".json":
        json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt") as tensors:
            assert tensors.keys()
    elif file.suffix == ".html":
        assert file.read_text(encoding="utf-8").rstrip().endswith("</html>")
        assert "<script>alert(1)" not in file.read_text(encoding="utf-8")
    elif file.suffix == ".csv":
        with file.open(encoding="utf-8", newline="") as text:
            cells = [cell for row in csv.reader(text, strict=True) for cell in row]
        assert not [c for c in cells if c[:1] in tuple("=+-@\t\r") and not re.fullmatch(r"[+-]?\d+(\.\d+)?", c)]
    elif file.suffix == ".svg":
        ElementTree.parse(file)
    elif file.suffix == ".png":
        assert file.read_bytes().endswith(b"IEND\xaeB`\x82")


# --- Prompts, words, labels and flags of the command line ---


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands(typer.main.get_command(app)))


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    """A command with options of its own, of which each may have any value."""
    path = draw(st.sampled_from(sorted(COMMANDS)))
    flags = [
        (parameter.opts[-1], parameter.is_flag) for parameter in COMMANDS[path].params if hasattr(parameter, "is_flag")
    ]
    words = list(path)
    if any(name == "--model" for name, _ in flags):
        words += ["--model", draw(st.sampled_from(["MODEL"] * 5) | texts)]
    for name, is_flag in draw(st.lists(st.sampled_from(flags), max_size=3)) if flags else []:
        if name != "--model":
            words += [name] if is_flag else [name, draw(texts | numbers)]
    words += draw(st.lists(texts, max_size=2))
    # Ends soon, should it begin.
    return words + (["--steps", "1", "--rank", "1"] if any(name == "--steps" for name, _ in flags) else [])


@cases(40, 2500)
@given(words=lines())
def test_any_command_line(words: list[str], tiny_models: Path) -> None:
    with empty_folder() as folder:
        told([str(tiny_models / "tiny-llama") if word == "MODEL" else word for word in words], folder, "flags")


@cases(12, 200)
@given(
    prompts=st.lists(some, max_size=2),
    words=st.lists(some, max_size=2),
    ending=st.sampled_from(["html", "png", "svg"]),
)
def test_any_prompt_and_word(prompts: list[str], words: list[str], ending: str, tiny_models: Path) -> None:
    targets = [part for word in words for part in ("--target", word)]
    asked = ["lens", "-m", str(tiny_models / "tiny-llama"), *targets, "--json", "o.json", "--plot", f"o.{ending}", "--"]
    with empty_folder() as folder:
        if told([*asked, *prompts], folder, "prompts and words") == 0:
            assert files_of(folder) == sorted(["o.json", f"o.{ending}"])


@cases(10, 200)
@given(
    names=st.lists(some, min_size=2, max_size=2, unique=True),
    prompts=st.lists(some, min_size=2, max_size=4),
    asked=st.sampled_from([["probe", "--shuffles", "1"], ["dual-reward", "--steps", "1", "--rank", "1"]]),
)
def test_any_label(names: list[str], prompts: list[str], asked: list[str], tiny_models: Path) -> None:
    rows = [
        {"label": name, "prompt": f"{name} {i} {prompt}", "answer": prompt}
        for name in names for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    with empty_folder() as folder:
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        model = ["-m", str(tiny_models / "tiny-llama")]
        code = told([*asked, *model, "--file", "rows.jsonl", "--json", "o.json", "--output", "kept"], folder, "labels")
        assert (code == 0) == (folder / "o.json").exists() == (folder / "kept").exists(), (names, prompts)


# --- Files ---


@cases(60, 5500)
@given(
    content=st.binary(max_size=40) | st.lists(trees, max_size=3).map(lambda rows: json.dumps(rows).encode())
    | st.lists(st.dictionaries(st.sampled_from(["prompt", "label", "word", "group"]), trees), max_size=4).map(
        lambda rows: "\n".join(map(json.dumps, rows)).encode()
    )
    | st.lists(st.lists(texts, min_size=2, max_size=2).map(",".join), max_size=4).map(
        lambda rows: "\n".join(["prompt,label", *rows]).encode(errors="surrogatepass")
    ),
    ending=st.sampled_from(["csv", "tsv", "json", "jsonl", "parquet", "txt"]),
)  # fmt: skip
def test_any_file(content: bytes, ending: str) -> None:
    with empty_folder() as folder:
        (folder / f"rows.{ending}").write_bytes(content)
        refused(lambda: load_task(f"rows.{ending}"), f"{ending} files")
        refused(lambda: list(load_prompts(f"rows.{ending}")), f"{ending} files")


# --- Registries and parameters ---


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """The tree, with something else at one place of it or one place less."""
    tree = node = copy.deepcopy(tree)
    while True:
        key = draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        if not (isinstance(node[key], dict | list) and node[key]) or draw(st.integers(0, 3)) == 0:
            break
        node = node[key]
    if isinstance(node, dict) and draw(st.booleans()):
        node[draw(texts)] = node.pop(key)
    else:
        node[key] = draw(trees)
    return tree


PARAMS = yaml.safe_load((ROOT / "params.tiny.yaml").read_text())
REGISTRY = {"registry": yaml.safe_load((ROOT / "params.yaml").read_text())["registry"]}


@cases(40, 1800)
@given(
    content=changed(REGISTRY).map(lambda tree: json.dumps(tree).encode())
    | st.binary(max_size=30)
    | st.sampled_from(
        [b"registry: 2026-99-99", b"? [a]\n: b", b"&a [*a]", b"&a {b: *a}", b"[" * 3000, b"!!int x", b"!!float _"]
    )
)
def test_any_registry(content: bytes) -> None:
    with empty_folder() as folder:
        (folder / "registry.yaml").write_bytes(content)
        refused(lambda: read_registry(folder / "registry.yaml"), "registries")


@cases(8, 600)
@given(tree=changed(PARAMS))
def test_any_parameter(tree: Any) -> None:
    with empty_folder() as folder:
        (folder / "params.yaml").write_text(json.dumps(tree))
        refused(lambda: load_params("params.yaml"), "parameters")


# --- What is written of any text and number ---


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[list[Any]]]:
    columns = draw(st.lists(texts, min_size=1, max_size=3))
    row = st.lists(some | st.none() | st.integers(), min_size=len(columns), max_size=len(columns))
    return columns, draw(st.lists(row, max_size=3))


@cases(20, 600)
@given(table=tables(), caption=texts)
def test_any_table(table: tuple[list[str], list[list[Any]]], caption: str) -> None:
    columns, rows = table
    with empty_folder() as folder:
        refused(lambda: write_table(folder / "t", columns, rows, caption=caption, tokens=columns[:1]), "tables")
        assert files_of(folder) == ["t.csv", "t.md", "t.tex"]
        parsed(folder / "t.csv")
        _, _, *lines, end = (folder / "t.md").read_text(encoding="utf-8").split("\n")
        parts = [re.sub(r"\\.", "", line).count("|") for line in lines]
        assert (parts, end) == ([len(columns) + 1] * (len(rows) + 2), "")
        tex = re.sub(r"\\[{}&\\]", "", (folder / "t.tex").read_text(encoding="utf-8"))
        assert tex.count("{") == tex.count("}")
        assert tex.count("&") == (len(columns) - 1) * (len(rows) + 1)


@cases(20, 600)
@given(tree=trees)
def test_any_result(tree: Any) -> None:
    with empty_folder() as folder:
        try:
            write_result(folder / "r.json", {"x": tree})
        except ResultError:
            assert files_of(folder) == []
            tried["results", "bad input", "one line"] += 1
        else:
            parsed(folder / "r.json")
            assert list(read_result(folder / "r.json")) == ["x"]
            tried["results", "bad input", "taken"] += 1


# --- Adapters and kept probes ---


@pytest.fixture(scope="module")
def made(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter and a kept probe, as the command line writes them."""
    folder, model = tmp_path_factory.mktemp("made"), ["-m", str(tiny_models / "tiny-llama")]
    assert run(["dual-reward", *model, "--steps", "1", "--output", str(folder / "adapter")]) == 0
    assert (
        run(
            [
                "probe",
                *model,
                "--task",
                "arithmetic",
                "--shuffles",
                "1",
                "--output",
                str(folder / "kept"),
            ]
        )
        == 0
    )
    return folder


@cases(16, 200)
@given(data=st.data(), what=st.sampled_from([("adapter", "adapter_config.json"), ("kept", "card.json")]))
def test_any_adapter_and_probe(data: st.DataObject, what: tuple[str, str], made: Path, tiny_models: Path) -> None:
    name, file = what
    with empty_folder() as folder:
        given = Path(shutil.copytree(made / name, folder / "given"))
        tree = data.draw(changed(json.loads((given / file).read_text())))
        (given / file).write_text(json.dumps(tree))
        asked = ["lens", "--adapter", "given"] if name == "adapter" else ["predict", "given"]
        (folder / "out").mkdir()
        told([*asked, "-m", str(tiny_models / "tiny-llama"), "7 * 8 ="], folder / "out", name)
