"""Measurements that the guide shows: kept as JSON under ``results/benchmarks``, and tables of them in the guide."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from classifier_emergence.results import read_result, write_result

FOLDER, GUIDE = Path("results/benchmarks"), Path("docs/guide.md")


def kept(name: str) -> dict[str, Any]:
    """What was measured so far, by model."""
    file = FOLDER / f"{name}.json"
    return read_result(file) if file.exists() else {}


def keep(name: str, model: str, found: Any) -> dict[str, Any]:
    """Put what was measured on a model in the place of what is kept of it; all that is kept then."""
    write_result(FOLDER / f"{name}.json", kept(name) | {model: found})
    return kept(name)  # in the order of the file


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def shown(name: str, text: str) -> str:
    """The guide with ``text`` between its marks of that name."""
    start, end = f"<!-- {name}, written by python -m benchmarks.{name} -->", f"<!-- end of {name} -->"
    guide = GUIDE.read_text(encoding="utf-8")
    return re.sub(f"({start}\n).*?({end})", lambda m: f"{m[1]}\n{text}\n\n{m[2]}", guide, flags=re.DOTALL)


def show(name: str, text: str) -> None:
    """Write that guide."""
    GUIDE.write_text(shown(name, text), encoding="utf-8")
