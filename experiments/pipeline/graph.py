"""What there is to run, what is stale and why, and running it: the pipeline as DVC sees it, in words.

``python -m experiments.pipeline.graph list|status|run|compare``; ``classifier-emergence experiments`` is the same.
"""

import argparse
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import networkx as nx
from dvc.repo import Repo

from classifier_emergence.cli.terminal import printable, say, table
from classifier_emergence.results import write_result
from experiments.pipeline.compare import compare_files
from experiments.pipeline.reproduce import minutes_of, report, results_in_git, select
from experiments.shared.stage import RESULTS, exit_on_bad_input


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("picks", nargs="*", metavar="STAGE|MODEL", help="default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the answer here, too")
    arguments = parser.parse_args()
    exit_on_bad_input(lambda: sys.exit(COMMANDS[arguments.what](arguments.picks, arguments.json)))


def list_stages(picks: list[str], json: Path | None) -> int:
    """Show every stage: its models and what it does."""
    found: dict[str, dict[str, Any]] = {}
    for name, stage in select(picks).items():
        kind, _, model = name.partition("@")
        entry = found.setdefault(kind, {"does": stage.desc or "", "minutes": 0.0, "models": []})
        entry["models"] += [model] if model else []
        entry["minutes"] += minutes_of(name, stage)
    rows = [[kind, " ".join(e["models"]), f"{e['minutes']:g}", e["does"]] for kind, e in found.items()]
    table(["stage", "models", "minutes", "what it does"], rows)
    return _answer(0, json, found)


def status(picks: list[str], json: Path | None) -> int:
    """Show stale stages and why; 1 if there are any."""
    names = list(select(picks))
    found = stale(names)
    if found:
        table(["stale", "why"], [[name, reason] for name, why in found.items() for reason in why])
    else:
        say(f"nothing is stale: the results of {len(names)} stages belong to the code and parameters")
    return _answer(1 if found else 0, json, {"stale": found, "stages": names})


def run(picks: list[str], json: Path | None) -> int:
    """``dvc repro`` of what is picked, with what it needs and what ends in the paper."""
    return subprocess.run([sys.executable, "-m", "dvc", "repro", *select(picks)], check=False).returncode


def compare(picks: list[str], json: Path | None) -> int:
    """Compare two result files, or the results that are committed with those in the tree; 1 if they differ."""
    if picks:
        return _compare_two(Path(picks[0]), Path(picks[1]), json)
    committed = results_in_git()
    files = sorted(path.relative_to(committed) for path in (committed / RESULTS).rglob("*.json"))
    found = {}
    for file in files if json else ():
        comparison = compare_files(committed / file, file)
        found[str(file)] = [str(difference) for difference in comparison.differences]
    return _answer(report(committed, files), json, {"differences": found})


def _compare_two(expected: Path, actual: Path, json: Path | None) -> int:
    found = compare_files(expected, actual)
    for difference in found.differences:
        say(printable(str(difference)))
    worst = f"; largest deviation {found.worst:.2g} of its tolerance, at {printable(found.worst_path)}"
    say(f"{found.values} values, {len(found.differences)} differences{worst if found.worst else ', identical'}")
    answer = {
        "values": found.values,
        "differences": [str(difference) for difference in found.differences],
        "worst": None if found.worst == float("inf") else found.worst,
        "worst_path": found.worst_path,
    }
    return _answer(1 if found.differences else 0, json, answer)


def _answer(code: int, json: Path | None, answer: Any) -> int:
    if json is not None:
        write_result(json, answer)
    return code


COMMANDS = {"list": list_stages, "status": status, "run": run, "compare": compare}


def stale(names: list[str]) -> dict[str, list[str]]:
    """Of these stages those that ``dvc repro`` would run, and why."""
    with Repo() as repo:
        changes = repo.status(names)
        graph = repo.index.graph  # an edge leads from a stage to one that it needs
        needs = {stage.addressing: {other.addressing for other in nx.descendants(graph, stage)} for stage in graph}
        cached = {out.def_path for stage in graph for out in stage.outs if out.use_cache}
        new = {stage.addressing for stage in graph if not any(out.hash_info for out in stage.outs)}
    own = {name: why for name in names if (why := reasons(changes.get(name, []), cached))}
    own |= {name: ["never run"] for name in own if name in new}
    found = {}
    for name in names:
        above = [other for other in own if other in needs[name]]
        if name in own or above:
            found[name] = [*own.get(name, []), *(f"needs {other}, which is stale" for other in above)]
    return found


def reasons(changes: list[Any], cached: Collection[str]) -> list[str]:
    """DVC's account of one stage in words; empty if nothing in it makes results stale.

    Args:
        changes: What ``dvc status --json`` gives for the stage.
        cached: Outputs that DVC keeps outside git: where one is merely absent, it is made when something needs it.
    """
    found = []
    for change in changes:
        if isinstance(change, str):
            found.append({"changed command": "its command changed"}.get(change, change))
            continue
        for kind in ("changed deps", "changed outs"):
            for path, how in change.get(kind, {}).items():
                if isinstance(how, dict):  # a parameter file: key -> what happened to it
                    found += [f"parameter {key} {what}" for key, what in how.items()]
                elif how == "modified" or path not in cached:
                    found.append(f"{'its result ' if kind == 'changed outs' else ''}{path} {how}")
    return found


if __name__ == "__main__":
    main()
