"""No import runs upwards, none in a circle, and nothing imports a stage."""

from collections.abc import Iterable
from pathlib import Path

import networkx as nx

from experiments.pipeline.dependencies import ROOT, imports

LIBRARY, EXPERIMENTS = ROOT / "src" / "classifier_emergence", ROOT / "experiments"
BASE = (
    "errors", "extras", "interrupts", "manifest", "numbers", "processes", "progress", "results", "statistics", "trace",
)  # fmt: skip
FLOORS = [
    BASE,
    ("reading",),
    ("models",),
    ("tasks",),
    ("training",),
    ("mixtures",),
    ("instruments",),
    ("cli", "__main__"),
]
"""Of the library, from below."""
STAGES = Path("experiments", "stages")
ABOVE = [("params",), ("shared",), ("stages", "report", "pipeline")]
"""Of the experiments, on top of all floors of the library."""

EDGES = {
    (one, other)
    for folder in (LIBRARY, EXPERIMENTS)
    for file in folder.rglob("*.py")
    for one, other in ((file.relative_to(ROOT), imported.relative_to(ROOT)) for imported in imports(file))
    if "__init__.py" not in (one.name, other.name)  # of the library: names what is public, from every floor
}


def floor(file: Path) -> int:
    """Number of a file's floor, from below."""
    experiments = file.parts[0] == "experiments"
    name = file.parts[1 if experiments else 2].removesuffix(".py")
    floors = ABOVE if experiments else FLOORS
    return next(i for i, names in enumerate(floors) if name in names) + (len(FLOORS) if experiments else 0)


def told(edges: Iterable[tuple[Path, Path]]) -> list[str]:
    return sorted(f"{one} imports {other}" for one, other in edges)


def test_no_import_runs_upwards() -> None:
    assert told(edge for edge in EDGES if floor(edge[0]) < floor(edge[1])) == []


def test_no_import_runs_in_a_circle() -> None:
    circles = [part for part in nx.strongly_connected_components(nx.DiGraph(EDGES)) if len(part) > 1]
    assert told(edge for edge in EDGES for part in circles if part.issuperset(edge)) == []


def test_nothing_imports_a_stage() -> None:
    assert told(edge for edge in EDGES if edge[1].parent == STAGES) == []
