"""The lists of modules in dvc.yaml: every file that a stage's module imports, directly or not, with its data files.

DVC runs a stage again when one of its dependencies changes. A module that is missing from the list leaves results
behind that are older than their code; one too many costs hours of training for nothing. So no hand writes these lists.
"""

import ast
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "src/classifier_emergence/"
SHORT = "${src}/"
"""What dvc.yaml writes for it."""
CODE = ("experiments/", LIBRARY, SHORT)
"""What lies there is listed by this tool; all other dependencies are written by hand."""
NOT_READ = "registry.yaml"
"""In a clone the registry of params.yaml is read in its place."""
WIDTH = 120


def rewritten(text: str) -> str:
    """dvc.yaml with every list of modules as the imports say; other dependencies, and all else, stay as they are."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    for _, stage in reversed(_child(root, "stages").value):  # from the end: what comes before keeps its position
        body = _child(stage, "do") or stage
        deps = _child(body, "deps")
        others = [item.value for item in deps.value if not item.value.startswith(CODE)]
        listed = _flow_list(others, modules(_child(body, "cmd").value), indent=body.start_mark.column + 2)
        text = text[: deps.start_mark.index] + listed + text[deps.end_mark.index :]
    return text


def differing(text: str) -> dict[str, list[str]]:
    """Stages whose list is not what the imports say -> ``+`` each missing module, ``-`` each that is not imported."""
    found = {}
    for name, stage in yaml.safe_load(text)["stages"].items():
        body = stage.get("do", stage)
        listed = {item.replace(SHORT, LIBRARY) for item in body["deps"] if item.startswith(CODE)}
        imported = set(modules(body["cmd"]))
        if listed != imported:
            found[name] = [f"+{m}" for m in sorted(imported - listed)] + [f"-{m}" for m in sorted(listed - imported)]
    return found


def modules(command: str) -> list[str]:
    """Files that ``python -m module ...`` runs, imports and reads beside them, from the repository's root, sorted."""
    name = command.split()[2]
    waiting = [source(f"{name}.__main__") or source(name)]
    seen: set[Path] = set()
    while waiting:
        file = waiting.pop()
        if file is not None and file not in seen:
            seen.add(file)
            waiting += imports(file)
    return sorted(file.relative_to(ROOT).as_posix() for file in seen.union(*map(data_files, seen)))


@cache
def imports(file: Path) -> frozenset[Path]:
    """Files of this repository that one file imports, in functions too."""
    names: list[tuple[str, ...]] = []  # of each import, what it may name: a module in a package, or what a module holds
    for node in ast.walk(_parsed(file)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [(alias.name,) for alias in node.names]
    found = (next(filter(None, map(source, choices)), None) for choices in names)
    return frozenset(path for path in found if path)


@cache
def data_files(file: Path) -> frozenset[Path]:
    """Files that are no modules, lie beside one, and that its source names, as ``tasks/prompts.py`` does."""
    texts = {node.value for node in ast.walk(_parsed(file)) if isinstance(node, ast.Constant)} - {NOT_READ}
    return frozenset(path for path in file.parent.glob("*.*") if path.suffix != ".py" and path.name in texts)


@cache
def source(name: str) -> Path | None:
    """File of a module of this repository; that of a package is its ``__init__.py``, if that holds more than words."""
    for base in (ROOT / "src", ROOT):
        path = base.joinpath(*name.split("."))
        if path.with_suffix(".py").exists():
            return path.with_suffix(".py")
        init = path / "__init__.py"
        if init.exists() and any(not isinstance(node, ast.Expr) for node in _parsed(init).body):
            return init
    return None


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _child(node: Any, key: str) -> Any:
    return next((value for name, value in node.value if name.value == key), None)


def _flow_list(others: list[str], listed: list[str], *, indent: int) -> str:
    pad = " " * indent
    wrap = textwrap.TextWrapper(WIDTH - 1, initial_indent=pad, subsequent_indent=pad, break_on_hyphens=False)
    groups = [others, [item.replace(LIBRARY, SHORT) for item in listed]]
    quoted = [[f'"{item}"' if "${" in item else item for item in items] for items in groups if items]
    return "[\n" + ",\n".join(wrap.fill(", ".join(items)) for items in quoted) + "]"
