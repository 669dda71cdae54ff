"""What is released: one version everywhere, and a wheel that works where there is no clone."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import classifier_emergence

ROOT = Path(__file__).resolve().parents[1]
FILES = ("pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY_NOTICES.md")
DATA = {f"classifier_emergence/{name}" for name in
        ("instruments/lens_map.html", "models/registry.yaml", "tasks/prompts.yaml", "py.typed")}  # fmt: skip


def test_the_version_is_the_same_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+), (\S+)$", changes, re.MULTILINE)
    assert newest is not None
    assert newest.groups() == (classifier_emergence.__version__, str(cited["date-released"]))
    assert cited["version"] == classifier_emergence.__version__


def test_every_model_has_its_licence_in_the_notices() -> None:
    notices = (ROOT / "THIRD_PARTY_NOTICES.md").read_text(encoding="utf-8")
    registry = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["registry"]
    packages = [
        re.split(r"\d*\.\.|==", package)[0] for source in registry.values() for package in source.get("packages", [])
    ]
    assert [package for package in packages if package not in notices] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as building leaves files behind, and from nothing that is not here."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    pip(folder, "wheel", "--no-build-isolation", ".")
    (found,) = folder.glob("*.whl")
    return found


def pip(folder: Path, *words: str) -> None:
    command = [sys.executable, "-m", "pip", words[0], "--quiet", "--no-deps", "--no-index", *words[1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_wheel_holds_every_module_its_data_and_its_notices(wheel: Path) -> None:
    assert wheel.name == f"classifier_emergence-{classifier_emergence.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= DATA
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {Path(name).name for name in names if "/licenses/" in name} == {"LICENSE", "THIRD_PARTY_NOTICES.md"}


def test_the_wheel_reads_a_model_outside_a_clone(wheel: Path, tiny_models: Path, tmp_path: Path) -> None:
    pip(tmp_path, "install", "--target", "site", str(wheel))
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    (tmp_path / "elsewhere").mkdir()

    def ran(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path / "elsewhere", env={**os.environ, "PYTHONPATH": path},
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = ran(sys.executable, "-c", "import classifier_emergence; print(classifier_emergence.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path / "site")
    script = [sys.executable, str(tmp_path / "site" / "bin" / "classifier-emergence")]
    assert ran(*script, "--version").strip() == classifier_emergence.__version__
    assert "gemma-3-270m" in ran(*script, "models", "list")
    model = str(tiny_models / "tiny-llama")
    words = ("--target", "multiply", "--null-words", "5", "--position", "all", "--plot", "map.html")
    assert "multiply" in ran(*script, "lens", "-m", model, "7 * 8 =", *words)
    assert "Bokeh" in (tmp_path / "elsewhere" / "map.html").read_text(encoding="utf-8")
