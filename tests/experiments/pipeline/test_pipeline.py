"""The pipeline as declared: complete dependencies, one stage for every generated file, staleness that is noticed."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import dpath
import pytest
import tiny
import yaml
from dvc.repo import Repo

from classifier_emergence.cli.app import run
from classifier_emergence.errors import InputError
from classifier_emergence.results import read_result, write_result
from experiments.params import AT_SIZE
from experiments.pipeline.__main__ import NAME, app
from experiments.pipeline.dependencies import differing
from experiments.pipeline.graph import reasons, select, stale
from experiments.shared import stage

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # in DVC

ROOT = Path(__file__).resolve().parents[3]
PIPELINE: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES: dict[str, Any] = PIPELINE["stages"]
VARS: dict[str, Any] = {name: value for entry in PIPELINE["vars"] for name, value in entry.items()}


PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())


def models_of(name: str) -> list[str]:
    """The models of a stage; some are written out in dvc.yaml."""
    each = STAGES[name].get("foreach", "${models}")
    return list(each if isinstance(each, dict) else {**PARAMS, **VARS}[each.strip("${}")])


def body(name: str) -> dict[str, Any]:
    return STAGES[name].get("do", STAGES[name])


def test_a_stage_depends_on_every_module_that_it_imports_and_no_other() -> None:
    assert differing((ROOT / "dvc.yaml").read_text()) == {}  # if not: python -m experiments.pipeline dependencies


def test_the_table_of_stages_says_which_run_on_which_models_and_in_which_order() -> None:
    declared = {name: models_of(name) for name, entry in STAGES.items() if "foreach" in entry}
    assert list(declared.items()) == [(name, PARAMS[models]) for name, models in stage.STAGES.items()]
    assert [name for name in STAGES if name not in declared] == list(stage.ENDING)


def test_fetch_depends_on_its_own_entry_of_the_registry() -> None:
    for key, parameter in STAGES["fetch"]["foreach"].items():
        assert parameter == f"registry.{key.replace('.', '?')}"
        assert dpath.get(PARAMS, parameter, separator=".") == PARAMS["registry"][key]  # as dvc looks it up
    assert body("fetch")["params"] == ["${item}"]


def test_a_stage_that_runs_at_several_sizes_depends_on_its_own_entry_alone() -> None:
    for key, parameter in (VARS["sized"] | VARS["replicated"]).items():
        assert parameter == f"at_size.{key.replace('.', '?')}"
        assert dpath.get(PARAMS, parameter, separator=".") == PARAMS["at_size"][key]
    sized = {name for name in STAGES if STAGES[name].get("foreach") in ("${sized}", "${replicated}")}
    assert sized == set(AT_SIZE)
    assert all("${item}" in body(name)["params"] for name in sized)
    for name in set(STAGES) - sized:  # what reads their sections is of models whose keys have no dot
        if set(AT_SIZE) & set(body(name).get("params", [])):
            assert "at_size.${item}" in body(name)["params"], name
            assert not any("." in key for key in models_of(name)), name


def test_the_table_of_stages_says_which_train() -> None:
    trains = {name for name in stage.STAGES if "${src}/training/supervised.py" in body(name)["deps"]}
    assert trains == set(stage.TRAINING)


@pytest.mark.filterwarnings("ignore:.* found in sys.modules")
@pytest.mark.parametrize("name", STAGES)
def test_a_command_names_a_module_that_takes_its_options(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python, flag, module, *options = (
        body(name)["cmd"].replace("${item}", "tiny-llama").replace("${key}", "tiny-llama").split()
    )
    assert (python, flag) == ("python", "-m")
    monkeypatch.chdir(tmp_path)  # where there are neither parameters nor a paper: that, and no option, is refused
    monkeypatch.setattr(sys, "argv", [module, *options])
    with pytest.raises(SystemExit) as exited:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert exited.value.code == 2
    assert re.match(r"error: (params.yaml|paper/)", capsys.readouterr().err)


def test_the_paper_depends_on_every_source_that_it_is_made_of() -> None:
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "paper").glob("*.typ")}
    assert sources <= set(body("paper")["deps"])


def test_a_tiny_run_has_every_file_that_the_paper_reads_and_no_stage_writes() -> None:
    texts = [path.read_text() for path in (ROOT / "paper").rglob("*.typ")]
    found = {file for text in texts for file in re.findall(r'\b(?:json|yaml|toml|csv|read)\("/([^"]+[^/"])"', text)}
    outs = {next(iter(out)) if isinstance(out, dict) else out for name in STAGES for out in body(name)["outs"]}
    given = {file for file in found if not file.startswith("paper/") and file not in outs}
    assert given - {"params.yaml"} == {*tiny.SHOWN}


def test_every_parameter_that_a_stage_names_exists() -> None:
    named = {key.split(".")[0] for name in STAGES for key in body(name).get("params", [])}
    assert named - {"${item}"} <= set(PARAMS)


def test_every_generated_file_is_the_output_of_one_stage() -> None:
    outs = []
    for name, entry in STAGES.items():
        for out in body(name)["outs"]:
            path = next(iter(out)) if isinstance(out, dict) else out
            each = PARAMS["models"] if "foreach" in entry else [""]
            outs += [path.replace("${item}", model).replace("${key}", model) for model in each]
    assert len(outs) == len(set(outs))
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    generated = [
        file for file in listed.stdout.split()
        if (file.startswith(("results/", "paper/tables/", "paper/figures/")) or file == "paper/paper.pdf")
        and not file.startswith("results/benchmarks/")  # of this machine, by benchmarks/
        and not file.endswith("/.gitkeep")  # the folder of a stage that runs for no model, so far
    ]  # fmt: skip
    assert generated
    orphans = [file for file in generated if not any(file == out or file.startswith(f"{out}/") for out in outs)]
    assert not orphans


def test_every_stage_has_minutes_for_every_model_of_the_paper() -> None:
    for name in STAGES:
        models = models_of(name)
        minutes = body(name)["meta"]["minutes"]
        assert isinstance(minutes, int | float) or set(minutes) == set(models)


@pytest.fixture(scope="module")
def has_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of two stages that has run."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    stages = {
        "copy": {"cmd": "cp in.txt out.txt", "deps": ["in.txt"], "params": ["x"], "outs": ["out.txt"]},
        "count": {"cmd": "wc out.txt >n.txt", "deps": ["out.txt"], "outs": [{"n.txt": {"cache": False}}]},
    }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (folder / "params.yaml").write_text("x: 1\n")
    (folder / "in.txt").write_text("a")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=folder, check=True)
    return folder


@pytest.fixture
def pipeline(has_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the current folder."""
    copied = shutil.copytree(has_run, tmp_path / "copy")
    monkeypatch.chdir(copied)
    return copied


def test_an_untouched_pipeline_is_not_stale_also_without_its_cache(pipeline: Path) -> None:
    assert stale(["copy", "count"]) == {}
    shutil.rmtree(pipeline / ".dvc" / "cache")
    (pipeline / "out.txt").unlink()
    assert stale(["copy", "count"]) == {}


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("in.txt", "b", "in.txt modified"),
        ("params.yaml", "x: 2\n", "parameter x modified"),
        ("out.txt", "edited", "its result out.txt modified"),
    ],
)
def test_what_a_changed_input_parameter_or_result_makes_stale(pipeline: Path, file: str, text: str, why: str) -> None:
    (pipeline / file).write_text(text)
    found = stale(["copy", "count"])
    assert found["copy"] == [why]
    assert found["count"][-1] == "needs copy, which is stale"


def test_a_committed_result_that_is_missing_is_stale(pipeline: Path) -> None:
    (pipeline / "n.txt").unlink()
    assert stale(["copy", "count"]) == {"count": ["its result n.txt deleted"]}


def test_status_answers_with_its_exit_code(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("status", "--json", "s.json") == 0
    assert capsys.readouterr().out.startswith("nothing is stale:")
    (pipeline / "in.txt").write_text("b")
    assert command("status", "copy", "--json", "s.json") == 1
    assert "copy\tin.txt modified\n" in capsys.readouterr().out
    assert json.loads((pipeline / "s.json").read_text()) == {"stale": {"copy": ["in.txt modified"]}, "stages": ["copy"]}


def test_what_dvc_cannot_read_is_one_line(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pipeline / "dvc.yaml").write_text("stages: {copy: {deps: [in.txt]}}")
    assert command("status") == 2
    assert re.fullmatch("error: dvc.yaml: DVC cannot use it .*\n", capsys.readouterr().err)


def test_every_kind_of_change_has_its_words() -> None:
    changes = [
        {"changed deps": {"params.yaml": {"probing.C": "modified"}, "src/a.py": "modified"}},
        {"changed outs": {"results/x.json": "deleted"}},
        "changed command",
    ]
    assert reasons(changes, set()) == [
        "parameter probing.C modified", "src/a.py modified", "its result results/x.json deleted", "its command changed",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def read() -> Iterator[Repo]:
    """The paper's pipeline, which takes seconds to read."""
    with Repo(str(ROOT)) as repo:
        yield repo


@pytest.fixture
def ours(read: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages are picked of the paper's pipeline, which is read once."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("experiments.pipeline.graph._repository", lambda: nullcontext(read))


@pytest.mark.usefixtures("ours")
def test_reproduce_picks_what_is_needed_and_ends_in_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    key = "smollm2-135m-instruct"
    assert command("reproduce", "--list", f"probing@{key}") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [f"fetch@{key}", f"residuals@{key}", f"probing@{key}", *stage.ENDING]


@pytest.mark.usefixtures("ours")
def test_stages_and_models_together_are_these_stages_of_these_models() -> None:
    small, base = "smollm2-135m-instruct", "gemma-3-270m"
    both = [name for name in select([small, "probing", "logit_lens"]) if name not in stage.ENDING]
    assert both == [f"{kind}@{small}" for kind in ("fetch", "residuals", "probing", "logit_lens")]
    assert {*select([small, "probing", f"grpo@{small}"])} == {*select([f"probing@{small}", f"grpo@{small}"])}
    assert {f"probing@{small}", f"probing@{base}"} < {*select(["probing"])}
    assert {f"grpo@{small}", f"staged@{small}"} < {*select([small])}
    with pytest.raises(InputError, match=r"^tuning smollm2-135m-instruct: none of these stages runs on"):
        select(["tuning", small])


def test_routers_of_a_model_too_large_to_load_need_no_other_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(text.replace("\nmoe_models:\n", "\nmoe_models:\n  - gpt-oss-20b\n"))
    monkeypatch.chdir(tmp_path)
    assert list(select(["gpt-oss-20b"])) == ["moe_routers@gpt-oss-20b", *stage.ENDING]


@pytest.mark.usefixtures("ours")
def test_the_nearest_stage_is_named() -> None:
    with pytest.raises(InputError, match=r"^'probng': no such stage or model; did you mean 'probing'\?$"):
        select(["probng"])


def test_compare_answers_with_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / f"{name}.json") for name in ("a", "b", "c")]
    for file, accuracy in zip(files, (0.5, 0.51, 0.6), strict=True):
        write_result(file, {"accuracy": accuracy, "n": 100})
    assert command("compare", *files[:2], "--json", str(tmp_path / "close.json")) == 0
    assert "2 values, 0 differences; largest deviation 0.5 of its tolerance, at accuracy" in capsys.readouterr().out
    assert read_result(tmp_path / "close.json") == {
        "values": 2, "differences": [], "worst": pytest.approx(0.5), "worst_path": "accuracy",
    }  # fmt: skip
    assert command("compare", files[0], files[2]) == 1
    assert capsys.readouterr().out.startswith("$.accuracy: 0.5 != 0.6 (tolerance 0.02, accuracy)\n")


@pytest.mark.parametrize("words", [["nonsense"], ["compare", "one.json"], ["compare", "a.json", "b.json"]])
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch("error: .*\n", err)


def command(*arguments: str) -> int:
    return run(arguments, app, NAME)
