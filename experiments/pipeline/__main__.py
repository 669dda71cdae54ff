"""The command line ``python -m experiments.pipeline``; ``classifier-emergence experiments`` is the same.

Exit codes: 0; 1 where the answer is no; 2 after one line on standard error about bad input; 130 after an interrupt.
"""

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from classifier_emergence.cli.app import run as run_line
from classifier_emergence.cli.options import EXAMPLE, JsonFile, write_json
from classifier_emergence.cli.terminal import printable, say, table
from classifier_emergence.errors import InputError
from experiments.pipeline.compare import compare_files
from experiments.pipeline.dependencies import differing, rewritten
from experiments.pipeline.graph import minutes_of, select, stale
from experiments.pipeline.reproduce import dvc_repro, report, reproduce, results_in_git
from experiments.shared.stage import RESULTS

NAME = "python -m experiments.pipeline"
SHOW = f"{EXAMPLE}{NAME} "
PIPELINE = Path("dvc.yaml")

app = typer.Typer(
    help="List, check, run and compare the stages of dvc.yaml, from the weights to the paper.",
    epilog=f"{SHOW}status probing@smollm2-135m-instruct",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
WHICH = "Stages, models (both: these stages of these models), STAGE@MODEL, what they need and the paper. None: all."
Picks = Annotated[list[str] | None, typer.Argument(metavar="[STAGE|MODEL]...", help=WHICH)]


@app.command("list", epilog=f"{SHOW}list smollm2-135m-instruct")
def list_stages(picks: Picks = None, json: JsonFile = None) -> None:
    """List the stages, their models, minutes and what they do."""
    found: dict[str, dict[str, Any]] = {}
    for name, stage in select(picks or []).items():
        base, _, model = name.partition("@")
        entry = found.setdefault(base, {"does": stage.desc or "", "minutes": 0.0, "models": []})
        entry["models"] += [model] if model else []
        entry["minutes"] += minutes_of(stage)
    rows = [[base, " ".join(e["models"]), f"{e['minutes']:g}", e["does"]] for base, e in found.items()]
    table(["stage", "models", "minutes", "what it does"], rows)
    write_json(json, found)


@app.command(epilog=f"{SHOW}status probing")
def status(picks: Picks = None, json: JsonFile = None) -> None:
    """Show which results are older than code, parameters or inputs, and why.

    Exit code 1 if any is. Outputs outside git that are merely absent do not count.
    """
    names = list(select(picks or []))
    found = stale(names)
    if found:
        table(["stale", "why"], [[name, reason] for name, why in found.items() for reason in why])
        say(f"{len(found)} of {len(names)} stages are stale: run `dvc repro`, then commit the results with dvc.lock")
    else:
        say(f"nothing is stale: the results of {len(names)} stages belong to the code and parameters")
    _answer(not found, json, {"stale": found, "stages": names})


@app.command(epilog=f"{SHOW}run dual_reward@gemma-3-270m")
def run(picks: Picks = None) -> None:
    """Run what is stale, with what it needs (dvc repro)."""
    dvc_repro(*select(picks or []))


@app.command("reproduce", epilog=f"{SHOW}reproduce smollm2-135m-instruct probing logit_lens")
def reproduce_stages(
    picks: Picks = None,
    list_only: Annotated[bool, typer.Option("--list", help="Only list what would run, and its minutes.")] = False,
) -> None:
    """Run again from the weights, stale or not, and compare with what is committed.

    Ends with a table and exit code 0 if the results agree, else 1: within tolerance, or (results of training, on
    another kind of processor) over seeds.
    """
    if not list_only:
        _answer(reproduce(picks or []))
        return
    for name, stage in select(picks or []).items():
        say(f"{name}  about {minutes_of(stage):g} min")


@app.command("submit", epilog=f"{SHOW}submit probing --cluster slurm --set slurm_partition=cpu --set cpus_per_task=4")
def submit_stages(
    picks: Picks = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="KIND", help="slurm or local. Default: slurm where there is one.")
    ] = None,
    at_once: Annotated[int | None, typer.Option(metavar="N", min=1, help="Most jobs at once. Default: all.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter of submitit; may be repeated.")
    ] = None,
) -> None:
    """Run what is stale, with what it needs, as jobs of a cluster: each stage of each model is one.

    Waits for all and names the log of what failed. The same command goes on: with what is still stale, and with jobs
    that are still with Slurm. Outputs outside git come from DVC's default remote and go there, if there is one.
    Exit code 1 if a job failed.
    """
    try:
        from experiments.pipeline.cluster import submit
    except ModuleNotFoundError as error:
        raise InputError(f'{error.name}: not installed; pip install "classifier-emergence[cluster]"') from error

    pairs = [option.partition("=") for option in options or []]
    if bad := [name for name, sign, _ in pairs if not (name and sign)]:
        raise InputError(f"--set {bad[0]}: not NAME=VALUE, such as slurm_partition=cpu")
    done, failed = submit(picks or [], cluster, at_once, {name: yaml.safe_load(value) for name, _, value in pairs})
    say(f"{len(done)} of {len(done) + len(failed)} stages done" if done or failed else "nothing is stale")
    if failed:
        say(f"failed, or waiting for what failed: {', '.join(failed)}; fix it and run the same command again")
    _answer(not failed)


@app.command(epilog=f"{SHOW}originals granite-3.1-2b gpt-oss-20b")
def originals(
    picks: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="Models of the profile.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Only list what is left, with estimates.")] = False,
    profile: Annotated[Path, typer.Option(metavar="FILE", help="The profile.")] = Path("params.originals.yaml"),
) -> None:
    """Run the stages on the originals' models, from the Hugging Face hub, and judge their claims.

    What has a result is not run again. Results lie beside those of the paper's models; the verdicts, over all of
    them, are written to results/claims.originals.json. Exit code 1 if a stage failed.
    """
    # Late: the ledger brings scipy, which the other commands need not wait for.
    from experiments.pipeline.originals import judge_originals, left, load_profile, run_originals

    chosen = load_profile(profile, picks or [])
    if list_only:
        head = ["model", "left", "GB", "minutes (2 CPU cores)", "minutes (GPU)"]
        rows = [[key, " ".join(left(key, e)), f"{e.memory_gb:g}", *(f"{e.minutes[d]:g}" for d in ("cpu", "gpu"))]
                for key, e in chosen.models.items()]  # fmt: skip
        table(head, rows)
        say("memory and minutes are estimates, for all stages of a model in float32")
        return
    failed = run_originals(chosen)
    found = judge_originals(load_profile(profile, []))
    named = {key: claim for key, claim in found.items() if claim["needs"]}
    table(["claim", "verdict", "what it says"], [[key, c["headline"], c["claim"]] for key, c in named.items()])
    if failed:
        say(f"failed, with its message above: {', '.join(failed)}; fix it and run the same command again")
    _answer(not failed)


@app.command(epilog=f"{SHOW}compare committed.json regenerated.json")
def compare(
    expected: Annotated[Path | None, typer.Argument(metavar="[EXPECTED]", help="A result file.")] = None,
    actual: Annotated[Path | None, typer.Argument(metavar="[ACTUAL]", help="Another version of it.")] = None,
    json: JsonFile = None,
) -> None:
    """Compare two result files within tolerances or, without any, what is committed with what is in the tree.

    Exit code 1 if they differ.
    """
    if expected is None:
        committed = results_in_git()
        files = sorted(path.relative_to(committed) for path in (committed / RESULTS).rglob("*.json"))
        found = {file: compare_files(committed / file, file).differences for file in files} if json else {}
        said = {str(file): [str(difference) for difference in differences] for file, differences in found.items()}
        _answer(report(committed, files), json, {"differences": said})
        return
    if actual is None:
        raise InputError("ACTUAL: missing; give two result files, or none to compare the committed results")
    both = compare_files(expected, actual)
    lines = [str(difference) for difference in both.differences]
    for line in lines:
        say(printable(line))
    worst = f"; largest deviation {both.worst:.2g} of its tolerance, at {printable(both.worst_path)}"
    say(f"{both.values} values, {len(lines)} differences{worst if both.worst else ', identical'}")
    finite = both.worst if math.isfinite(both.worst) else None
    _answer(not lines, json, {**vars(both), "differences": lines, "worst": finite})


@app.command(epilog=f"{SHOW}dependencies --check")
def dependencies(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 if a list is not right.")] = False,
) -> None:
    """Write the lists of modules in dvc.yaml from what the stages import; nothing else in the file changes."""
    text = PIPELINE.read_text(encoding="utf-8")
    found = differing(text)
    for name, changes in found.items():
        say(f"{name}: {' '.join(changes)}")
    if not check:
        PIPELINE.write_text(rewritten(text), encoding="utf-8")
    _answer(not (check and found))


def _answer(yes: bool, json: Path | None = None, answer: Any = None) -> None:
    write_json(json, answer)
    if not yes:
        raise typer.Exit(1)


if __name__ == "__main__":
    sys.exit(run_line(sys.argv[1:], app, NAME))
