"""Run stages again from the weights and compare what they make with what is committed.

Without arguments every stage runs. An argument is a stage (probing), a stage of one model
(probing@smollm2-135m-instruct) or a model; what it needs runs before it, and the claims, tables, figures and the paper
after it. Ends with a table "committed against regenerated" and exit code 0 if they agree, else 1: within tolerance, or
(results of training, on another kind of processor) over seeds.
"""

import argparse
import difflib
import math
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
from rich.table import Column, Table

from classifier_emergence.errors import InputError
from classifier_emergence.results import read_result
from experiments.params import load_params
from experiments.pipeline.compare import RULES, STRUCTURE, Rule, apart_over_seeds, compare_files
from experiments.report.judge import REINFORCED, TRAINED
from experiments.shared.stage import RESULTS, exit_on_bad_input

ENDING = ("claims", "tables", "figures", "paper")
TRAINING = (*TRAINED, *REINFORCED, "other_tasks", "moe_routers")
APART_BY_CHANCE = 2 / math.comb(6, 3)
"""Three seeds and three others of the same distribution lie wholly apart so often."""
JUDGED = (Rule("evidence", "^(value|interval|key)$", absolute=math.inf, types=(int, float, str)), *RULES)
"""Of the claims. A number there stands in the result that it is taken from, too, and is compared there."""
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
    """Print the comparison; 0 if all results agree.

    Training multiplies the rounding of another processor until it is as large as what another seed changes. So results
    of training agree, too, if nothing is missing and intervals over seeds overlap the committed ones (all but as many
    as lie apart by chance), and the claims if verdicts, and what meets its criterion, are the same.
    """
    table = Table(Column("result", overflow="fold"), "values", "differences", "largest deviation / tolerance", "agrees")
    said: list[str] = []
    counts = dict.fromkeys(("yes", "no", "over seeds"), 0)
    for file in files:
        name = str(file.relative_to(RESULTS).with_suffix(""))
        if not (committed / file).exists():
            table.add_row(name, "", "", "not committed", "no")
            counts["no"] += 1
            continue
        judged = file == RESULTS / "claims.json"
        found = compare_files(committed / file, file, rules=JUDGED if judged else RULES)
        bad, how = list(found.differences), "yes"
        if bad and file.parent.name in TRAINING:
            apart, compared = apart_over_seeds(read_result(committed / file), read_result(file))
            bad = [difference for difference in bad if difference.reason in STRUCTURE]
            bad += apart if len(apart) > APART_BY_CHANCE * compared else []
            how = f"{compared - len(apart)} of {compared} over seeds"
        counts["no" if bad else "over seeds" if found.differences else "yes"] += 1
        worst = (
            f"{found.worst:.2g}  {found.worst_path}" if found.worst else f"0 ({'verdicts' if judged else 'identical'})"
        )
        table.add_row(name, str(found.values), str(len(found.differences)), worst, "no" if bad else how)
        said += [f"{name} {difference}" for difference in bad[:10]]
    console.print(table)
    for line in said:
        console.print(line, markup=False)
    total = sum(counts.values())
    if counts["no"]:
        console.print(f"NO: {counts['no']} of {total} results differ from the committed ones by more than tolerance.")
        return 1
    if counts["over seeds"]:
        console.print(
            f"YES: {counts['yes']} of {total} regenerated results agree with the committed ones within tolerance; the "
            f"other {counts['over seeds']}, of training, over seeds, as they do on another kind of processor."
        )
    else:
        console.print(f"YES: all {total} regenerated results agree with the committed ones within tolerance.")
    return 0


if __name__ == "__main__":
    main()
