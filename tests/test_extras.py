"""What the base installation can do, and how it says which extra is missing: in a process that hides the extras."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from classifier_emergence.extras import _EXTRAS, missing_extras_named

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = sorted({package for packages in _EXTRAS.values() for package in packages} - {"networkx"})  # torch needs that
HIDE = f"""
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {HIDDEN} else PathFinder.find_spec(name, path, target)

sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""


def in_base(code: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HIDE + code, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_extras_are_those_of_the_package() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = {
        extra: tuple(
            sorted(re.split(r"\W", need, maxsplit=1)[0] for need in needs if "classifier-emergence" not in need)
        )
        for extra, needs in declared["optional-dependencies"].items()
    }
    own.pop("dev")
    assert own.pop("cluster") == ("submitit",)  # of one command of experiments.pipeline, which names it
    assert own == _EXTRAS
    assert not {need for need in declared["dependencies"] if re.split(r"\W", need)[0] in HIDDEN}


def test_what_is_no_extra_stays_what_it_was() -> None:
    with pytest.raises(ModuleNotFoundError, match="nothing_of_ours"), missing_extras_named():
        import nothing_of_ours  # type: ignore[import-not-found]  # noqa: F401


def test_the_base_reads_models_and_names_the_extra_that_is_missing(tiny_models: Path, tmp_path: Path) -> None:
    code = """
import os
from importlib import import_module

os.environ["CLASSIFIER_EMERGENCE_CACHE"] = "cache"  # what was converted before needs no converter
for name in ("numbers", "cli.app", "models.names", "models.sources", "mixtures.words", "mixtures.routing",
             "reading.estimator", *(f"instruments.{x}" for x in ("lens", "probe", "direction", "routing"))):
    import_module(f"classifier_emergence.{name}")

import classifier_emergence
from classifier_emergence.cli.app import run

model = sys.argv[1]
assert run(["lens", "-m", model, "7 * 8 =", "--target", "multiply", "--null-words", "5"]) == 0
assert run(["probe", "-m", model, "--class", "a:1|2", "--class", "b:3|4", "--shuffles", "2"]) == 0
for line in (["dual-reward"], ["sft"], ["lens", "x", "--adapter", "."], ["lens", "x", "--plot", "a.png"]):
    assert run([line[0], "-m", model, *line[1:]]) == 2
assert run(["models", "fetch", "smollm2-135m-instruct"]) == 2

reading = classifier_emergence.lens(classifier_emergence.open_model(model), ["x"])
for use in (reading.plot, lambda: classifier_emergence.grpo):
    try:
        use()
    except classifier_emergence.errors.InputError as error:
        print("error:", error, file=sys.stderr)
"""
    done = in_base(code, str(tiny_models / "tiny-llama"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    error = (
        r"^error: (\w+): not installed; it comes with the extra '(\w+)': pip install \"classifier-emergence\[\2\]\"$"
    )
    assert re.findall(error, done.stderr, re.MULTILINE) == [
        *[("peft", "train")] * 3,
        ("matplotlib", "plot"),
        ("pip", "wheels"),
        ("matplotlib", "plot"),
        ("peft", "train"),
    ]
    assert done.stderr.count("error") == 7
    assert not list(tmp_path.glob("*.png"))


def test_the_experiments_without_the_pipelines_packages_name_their_extra() -> None:
    code = """
from classifier_emergence.cli.app import run

for line in (["experiments", "list"], ["experiments", "run", "probing"], ["compare"]):
    assert run(line) == 2
"""
    done = in_base(code)
    assert done.returncode == 0, done.stderr
    advice = "error: dvc: not installed; it comes with the extra 'paper': pip install \"classifier-emergence[paper]\"\n"
    assert done.stderr == 3 * advice
    assert not done.stdout
