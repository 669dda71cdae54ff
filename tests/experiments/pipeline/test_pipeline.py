"""The pipeline as declared: complete dependencies, one stage for every generated file, staleness that is noticed."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def body(stage: str) -> dict[str, Any]:
    return STAGES[stage].get("do", STAGES[stage])


def module_file(name: str) -> Path | None:
    for base in (ROOT / "src", ROOT):
        path = base.joinpath(*name.split("."))
        for file in (path.with_suffix(".py"), path / "__main__.py"):
            if file.exists():
                return file
    return None


def imported(file: Path, seen: set[Path]) -> set[Path]:
    """The file and everything of ours that it imports, directly or not."""
    if file in seen:
        return seen
    seen.add(file)
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.split(".")[0] in ("classifier_emergence", "experiments") and (path := module_file(name)):
                imported(path, seen)
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_every_module_that_it_imports(stage: str) -> None:
    command = body(stage)["cmd"].split()
    assert command[:2] == ["python", "-m"]
    script = module_file(command[2])
    assert script is not None
    wanted = {str(path.relative_to(ROOT)) for path in imported(script, set())}
    declared = {dep for dep in body(stage)["deps"] if dep.endswith(".py")}
    assert declared == wanted


def test_the_paper_depends_on_every_source_that_it_is_made_of() -> None:
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "paper").glob("*.typ")}
    assert sources <= set(body("paper")["deps"])


def test_every_parameter_that_a_stage_names_exists() -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    named = {name.split(".")[0] for stage in STAGES for name in body(stage).get("params", [])}
    assert named <= set(params)


def test_every_generated_file_is_the_output_of_one_stage() -> None:
    models = yaml.safe_load((ROOT / "params.yaml").read_text())["models"]
    outs = []
    for stage, entry in STAGES.items():
        for out in body(stage)["outs"]:
            path = next(iter(out)) if isinstance(out, dict) else out
            outs += [path.replace("${item}", model) for model in models] if "foreach" in entry else [path]
    assert len(outs) == len(set(outs))
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    generated = [
        file for file in listed.stdout.split()
        if (file.startswith(("results/", "paper/tables/", "paper/figures/")) or file == "paper/paper.pdf")
        and not file.endswith("/.gitkeep")  # the folder of a stage that runs for no model, so far
    ]  # fmt: skip
    assert generated
    orphans = [file for file in generated if not any(file == out or file.startswith(f"{out}/") for out in outs)]
    assert not orphans


def test_every_stage_has_minutes_for_every_model_of_the_paper() -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage in STAGES:
        models = params[STAGES[stage].get("foreach", "${models}").strip("${}")]
        minutes = body(stage)["meta"]["minutes"]
        assert isinstance(minutes, int | float) or set(minutes) == set(models)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline of one stage with the project's checker beside it."""
    for name in ("dvc.yaml", "experiments/pipeline/fresh.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "experiments" / "pipeline" / "fresh.py", tmp_path / "experiments" / "pipeline")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    stages = {"copy": {"cmd": "cp in.txt out.txt", "deps": ["in.txt"], "params": ["x"], "outs": ["out.txt"]}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    (tmp_path / "params.yaml").write_text("x: 1\n")
    (tmp_path / "in.txt").write_text("a")
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def fresh(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.pipeline.fresh"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_an_untouched_pipeline_is_fresh_also_without_its_cache(pipeline: Path) -> None:
    assert fresh(pipeline).returncode == 0
    shutil.rmtree(pipeline / ".dvc" / "cache")
    (pipeline / "out.txt").unlink()
    assert fresh(pipeline).returncode == 0


@pytest.mark.parametrize(("file", "text"), [("in.txt", "b"), ("params.yaml", "x: 2\n"), ("out.txt", "edited")])
def test_a_changed_input_parameter_or_result_is_stale(pipeline: Path, file: str, text: str) -> None:
    (pipeline / file).write_text(text)
    done = fresh(pipeline)
    assert done.returncode == 1
    assert "copy" in done.stderr or "dvc itself failed" in done.stderr


def test_reproduce_picks_what_is_needed_and_ends_in_the_paper() -> None:
    command = [sys.executable, "-m", "experiments.pipeline.reproduce", "--list", "probing@smollm2-135m-instruct"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = [line.split()[0] for line in done.stdout.splitlines()]
    key = "smollm2-135m-instruct"
    assert names[:3] == [f"fetch@{key}", f"residuals@{key}", f"probing@{key}"]
    assert set(names[3:]) == {"claims", "tables", "figures", "paper"}
    assert names[-1] == "paper"


def test_routers_of_a_model_too_large_to_load_need_no_other_stage(tmp_path: Path) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    no_scm = true\n")
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(text.replace("\nmoe_models:\n", "\nmoe_models:\n  - gpt-oss-20b\n"))
    command = [sys.executable, "-m", "experiments.pipeline.reproduce", "--list", "gpt-oss-20b"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert (names[0], names[-1]) == ("moe_routers@gpt-oss-20b", "paper")
    assert set(names[1:]) == {"claims", "tables", "figures", "paper"}


def test_reproduce_names_the_nearest_stage() -> None:
    command = [sys.executable, "-m", "experiments.pipeline.reproduce", "probng"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: 'probng': no such stage or model; did you mean 'probing'?\n"
