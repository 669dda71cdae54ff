"""Run stages again from the weights and compare what they make with what is committed."""

import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from classifier_emergence.errors import InputError
from classifier_emergence.results import read_result
from experiments.pipeline.compare import STRUCTURE, Difference, apart_over_seeds, compare_files
from experiments.pipeline.graph import minutes_of, select
from experiments.report.page.reproducing import expected
from experiments.shared.stage import RESULTS, TRAINING

APART_BY_CHANCE = 2 / math.comb(6, 3)
"""Three seeds and three others of the same distribution lie wholly apart so often."""
console = Console(highlight=False)


def reproduce(picks: Collection[str]) -> bool:
    """Run what ``graph.select`` gives and compare; whether everything agrees.

    Raises:
        InputError: A stage failed, or there is no such stage.
    """
    stages = select(picks)
    minutes = [minutes_of(stage) for stage in stages.values()]
    committed = results_in_git()
    started = time.monotonic()
    for i, name in enumerate(stages):
        done, left = sum(minutes[:i]), sum(minutes[i:])
        elapsed = (time.monotonic() - started) / 60
        left *= pace(elapsed, done)
        console.rule(f"[{i + 1}/{len(stages)}] {name}: {elapsed:.0f} min gone, about {left:.0f} min left")
        dvc_repro("--quiet", "--force", "--single-item", name, what=f"stage {name}")
    console.rule("committed against regenerated")
    outs = (Path(out.fspath).relative_to(Path.cwd()) for stage in stages.values() for out in stage.outs)
    return report(committed, sorted(out for out in outs if out.suffix == ".json" and out.is_relative_to(RESULTS)))


def pace(elapsed: float, planned: float) -> float:
    """How much longer this machine takes than the table of minutes says, by what ran so far.

    ``(elapsed + 10) / (planned + 10)``, in minutes: a slow download at the start is no forecast of what is to come.
    """
    return (elapsed + 10) / (planned + 10)


def dvc_repro(*arguments: str, what: str = "dvc repro") -> None:
    """Run ``dvc repro`` on this terminal; an ``InputError`` says that ``what`` failed."""
    if code := subprocess.run([sys.executable, "-m", "dvc", "repro", *arguments], check=False).returncode:
        raise InputError(f"{what} failed (exit code {code}, its message is above); fix it and run again")


def results_in_git() -> Path:
    """A folder with the committed results; as they lie there, where this is no git checkout."""
    folder = Path(tempfile.mkdtemp(prefix="committed-"))
    packed = subprocess.run(["git", "archive", "--format=tar", "HEAD", RESULTS], capture_output=True, check=False)
    if packed.returncode:
        shutil.copytree(RESULTS, folder / RESULTS)
    else:
        subprocess.run(["tar", "-xf", "-", "-C", folder], input=packed.stdout, check=True)
    return folder


def report(committed: Path, files: Collection[Path]) -> bool:
    """Print the comparison; whether all results agree.

    Training multiplies the rounding of another processor until it is as large as what another seed changes. So results
    of training agree, too, if nothing is missing and intervals over seeds overlap the committed ones (all but as many
    as lie apart by chance), and the claims if every headline is the same and no state is turned into its contrary.
    """
    table = Table(Column("result", overflow="fold"), "values", "differences", "largest deviation / tolerance", "agrees")
    said: list[str] = []
    agrees: Counter[str] = Counter()
    for file in files:
        name = str(file.relative_to(RESULTS).with_suffix(""))
        if not (committed / file).exists():
            table.add_row(name, "", "", "not committed", "no")
            agrees["no"] += 1
            continue
        found = compare_files(committed / file, file)
        bad, how = found.differences, "yes"
        if bad and file.parent.name in TRAINING:
            bad, how = _over_seeds(committed / file, file, bad)
        agrees["no" if bad else "over seeds" if found.differences else "yes"] += 1
        worst = f"{found.worst:.2g}  {found.worst_path}" if found.worst else "0"
        table.add_row(name, str(found.values), str(len(found.differences)), worst, "no" if bad else how)
        said += [f"{name} {difference}" for difference in bad[:10]]
    console.print(table)
    for line in said:
        console.print(line, markup=False)
    _primary_numbers(committed, {str(file) for file in files})
    console.print(_verdict(agrees))
    return not agrees["no"]


def _primary_numbers(committed: Path, files: Collection[str]) -> None:
    """The table of docs/REPRODUCING.md beside what was regenerated, of those files alone."""
    ledger = RESULTS / "claims.json"
    if not (ledger.exists() and (committed / ledger).exists()):
        return
    before, after = ({(row.claim, row.stage): row for row in expected(read_result(folder / ledger))}
                     for folder in (committed, Path()))  # fmt: skip
    head = (
        "claim",
        Column("stage", overflow="fold"),
        Column("key", overflow="fold"),
        "committed",
        "regenerated",
        "verdict",
    )
    table = Table(*head)
    for (claim, stage), row in before.items():
        if f"{RESULTS}/{stage.replace('@', '/')}.json" not in files:
            continue
        again = after.get((claim, stage))
        verdict = again.headline if again and again.headline != row.headline else "same"
        table.add_row(claim, stage, row.key, row.value, again.value if again else "none", verdict)
    if table.row_count:
        console.print(table)


def _over_seeds(committed: Path, file: Path, differences: list[Difference]) -> tuple[list[Difference], str]:
    """What speaks against a result of training, and how it agrees if nothing does."""
    apart, compared = apart_over_seeds(read_result(committed), read_result(file))
    bad = [difference for difference in differences if difference.reason in STRUCTURE]
    bad += apart if len(apart) > APART_BY_CHANCE * compared else []
    return bad, f"{compared - len(apart)} of {compared} over seeds"


def _verdict(agrees: Counter[str]) -> str:
    total, seeds = agrees.total(), agrees["over seeds"]
    if agrees["no"]:
        return f"NO: {agrees['no']} of {total} results differ from the committed ones by more than tolerance."
    if not seeds:
        return f"YES: all {total} regenerated results agree with the committed ones within tolerance."
    most = f"{agrees['yes']} of {total} regenerated results agree with the committed ones within tolerance"
    return f"YES: {most}; the other {seeds}, of training, over seeds, as they do on another kind of processor."
