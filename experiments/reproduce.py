"""Run stages again from the weights and compare what they make with what is committed.

Without arguments every stage runs. An argument is a stage (probing), a stage of one model
(probing@smollm2-135m-instruct) or a model; what it needs runs before it, and the claims, tables, figures and the paper
after it. Ends with a table "committed against regenerated" and exit code 0 if they agree within tolerance, else 1.
"""

import argparse
import difflib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import networkx as nx
from dvc.repo import Repo
from dvc.stage import PipelineStage
from rich.console import Console
from rich.table import Table

from classifier_emergence.compare import Comparison, compare_files
from classifier_emergence.errors import InputError
from classifier_emergence.params import load_params
from experiments.stage import RESULTS, exit_on_bad_input

ENDING = ("claims", "tables", "figures", "paper")
console = Console(highlight=False)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picks", nargs="*", metavar="STAGE|MODEL", help="what to run; default: everything")
    parser.add_argument("--list", action="store_true", help="list the stages that would run, and their minutes")
    arguments = parser.parse_args()
    exit_on_bad_input(lambda: sys.exit(reproduce(arguments.picks, list_only=arguments.list)))


def reproduce(picks: list[str], *, list_only: bool = False) -> int:
    """Run and compare; 0 if everything agrees."""
    stages = select(picks)
    minutes = {name: minutes_of(name, stage) for name, stage in stages.items()}
    if list_only:
        for name in stages:
            console.print(f"{name}  about {minutes[name]:g} min", markup=False)
        return 0
    committed = results_in_git()
    started = time.monotonic()
    for i, name in enumerate(stages):
        left = sum(list(minutes.values())[i:])
        done = sum(list(minutes.values())[:i])
        elapsed = (time.monotonic() - started) / 60
        # The table of minutes is for one machine; after the first stages this machine's own pace corrects it.
        pace = elapsed / done if done >= 1 else 1.0
        console.rule(f"[{i + 1}/{len(stages)}] {name}: {elapsed:.0f} min gone, about {left * pace:.0f} min left")
        command = [sys.executable, "-m", "dvc", "repro", "--quiet", "--force", "--single-item", name]
        if code := subprocess.run(command, check=False).returncode:
            raise InputError(f"stage {name} failed (exit code {code}, its message is above); mend it and run again")
    console.rule("committed against regenerated")
    return report(committed, regenerated_by(stages))


def select(picks: list[str]) -> dict[str, PipelineStage]:
    """The stages to run, in order: the picked ones, what they need, and what ends in the paper."""
    with Repo() as repo:
        graph = repo.index.graph  # an edge leads from a stage to one that it needs
        order = {stage.addressing: stage for stage in reversed(list(nx.topological_sort(graph)))}
        wanted: set[str] = set()
        for pick in picks or order:
            named = [name for name in order if pick in (name, *name.split("@"))]
            if not named:
                known = sorted({part for name in order for part in (name, *name.split("@"))})
                near = difflib.get_close_matches(pick, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise InputError(f"{pick!r}: no such stage or model; {hint}")
            for name in named:
                # Of the ending only itself: what it needs from other models is committed.
                needed = set() if name in ENDING else nx.descendants(graph, order[name])
                wanted |= {name, *(stage.addressing for stage in needed)}
        wanted |= set(ENDING)
        # Model by model, in the order of the parameters: one model's answer does not wait for the others.
        params = load_params()
        models = [*params.models, *params.moe_models]
        rank = {name: models.index(name.partition("@")[2]) if "@" in name else len(models) for name in wanted}
        return {name: order[name] for name in sorted(order, key=lambda name: rank.get(name, 0)) if name in wanted}


def minutes_of(name: str, stage: PipelineStage) -> float:
    """What a stage takes on two cores, from its ``meta`` in dvc.yaml."""
    minutes = (stage.meta or {}).get("minutes", 1.0)
    return float(minutes.get(name.partition("@")[2], 2.0) if isinstance(minutes, dict) else minutes)


def regenerated_by(stages: dict[str, PipelineStage]) -> list[Path]:
    """Result files among the outputs of the stages."""
    outs = (Path(out.fspath).relative_to(Path.cwd()) for stage in stages.values() for out in stage.outs)
    return sorted(path for path in outs if path.suffix == ".json" and path.is_relative_to(RESULTS))


def results_in_git() -> Path:
    """A folder with the committed results; as they lie there, where this is no git checkout."""
    folder = Path(tempfile.mkdtemp(prefix="committed-"))
    archive = ["git", "archive", "--format=tar", "HEAD", str(RESULTS)]
    packed = subprocess.run(archive, capture_output=True, check=False)
    if packed.returncode:
        packed = subprocess.run(["tar", "-cf", "-", str(RESULTS)], capture_output=True, check=True)
    subprocess.run(["tar", "-xf", "-", "-C", str(folder)], input=packed.stdout, check=True)
    return folder


def report(committed: Path, files: Iterable[Path]) -> int:
    """Print the comparison; 0 if every value agrees within the tolerance of its kind."""
    table = Table("result", "values", "differences", "largest deviation / tolerance", "agrees")
    comparisons: list[Comparison] = []
    for file in files:
        if not (committed / file).exists():
            table.add_row(str(file), "", "", "not committed", "no")
            comparisons.append(Comparison(str(file), 0, (), float("inf"), ""))
            continue
        comparison = compare_files(committed / file, file)
        comparisons.append(comparison)
        worst = f"{comparison.worst:.2g}  {comparison.worst_path}" if comparison.worst else "0 (identical)"
        agrees = "no" if comparison.differences else "yes"
        table.add_row(str(file), str(comparison.values), str(len(comparison.differences)), worst, agrees)
    console.print(table)
    for comparison in comparisons:
        for difference in comparison.differences[:10]:
            console.print(f"{Path(comparison.file).name} {difference}", markup=False)
    bad = sum(comparison.worst > 1 for comparison in comparisons)
    if bad:
        console.print(f"NO: {bad} of {len(comparisons)} results differ from the committed ones by more than tolerance.")
        return 1
    console.print(f"YES: all {len(comparisons)} regenerated results agree with the committed ones within tolerance.")
    return 0


if __name__ == "__main__":
    main()
