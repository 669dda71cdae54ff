"""The tool that writes the lists of modules in dvc.yaml."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from experiments.pipeline import dependencies
from experiments.pipeline.dependencies import differing, modules, rewritten

TEXT = """\
# kept
stages:
  one:
    foreach: ${models}
    do:
      cmd: python -m experiments.one --model ${item}
      deps: ["data/${item}.bin", experiments/gone.py]
      outs: [out]  # kept, too
  two:
    cmd: python -m experiments.two
    deps: [data]
"""
FILES = {
    "experiments/__init__.py": '"""Words alone are no code."""\n',
    "experiments/one.py": "from classifier_emergence.a import f\nimport classifier_emergence.deep.b\nimport json\n",
    "experiments/two/__init__.py": "from experiments import one as x\n",
    "experiments/two/__main__.py": "from experiments.two import x\n\ndef late():\n    import classifier_emergence.a\n",
    "src/classifier_emergence/__init__.py": "",
    "src/classifier_emergence/a.py": "f = open('words.yaml'), open('registry.yaml')\n",
    "src/classifier_emergence/words.yaml": "",
    "src/classifier_emergence/others.yaml": "",
    "src/classifier_emergence/registry.yaml": "",
    "src/classifier_emergence/deep/b.py": "from classifier_emergence.deep import c\n",
    "src/classifier_emergence/deep/c.py": "from classifier_emergence.deep import b\n",
}
A, B, C, WORDS = (f"src/classifier_emergence/{name}" for name in ("a.py", "deep/b.py", "deep/c.py", "words.yaml"))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package roots lie in a folder of the test's own."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(dependencies, "ROOT", tmp_path)
    dependencies.source.cache_clear()
    yield
    dependencies.source.cache_clear()


@pytest.mark.usefixtures("tree")
def test_modules_are_all_that_is_imported_with_its_data_and_nothing_else() -> None:
    assert modules("python -m experiments.one --model m") == ["experiments/one.py", A, B, C, WORDS]
    main, init = "experiments/two/__main__.py", "experiments/two/__init__.py"
    assert modules("python -m experiments.two") == ["experiments/one.py", init, main, A, B, C, WORDS]


@pytest.mark.usefixtures("tree")
def test_only_lists_of_modules_are_rewritten() -> None:
    missing = ["experiments/one.py", A, B, C, WORDS]
    assert differing(TEXT)["one"] == [f"+{name}" for name in missing] + ["-experiments/gone.py"]
    text = rewritten(TEXT)
    assert differing(text) == {}
    assert rewritten(text) == text
    before, after = yaml.safe_load(TEXT), yaml.safe_load(text)
    assert after["stages"]["one"]["do"].pop("deps") == [
        "data/${item}.bin", "experiments/one.py", "${src}/a.py", "${src}/deep/b.py", "${src}/deep/c.py",
        "${src}/words.yaml",
    ]  # fmt: skip
    assert after["stages"]["two"].pop("deps")[0] == "data"
    del before["stages"]["one"]["do"]["deps"], before["stages"]["two"]["deps"]
    assert after == before
    assert text.count("kept") == 2
