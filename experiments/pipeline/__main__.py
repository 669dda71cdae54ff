"""The command line ``python -m experiments.pipeline``; ``classifier-emergence experiments`` is the same.

Exit codes: 0; 1 where the answer is no; 2 after one line on standard error about bad input; 130 after an interrupt.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from classifier_emergence.cli.options import EXAMPLE, JsonFile, write_json
from classifier_emergence.cli.terminal import printable, say, table
from classifier_emergence.errors import InputError
from experiments.pipeline.compare import compare_files
from experiments.pipeline.dependencies import differing, rewritten
from experiments.pipeline.graph import minutes_of, overview, select, stale
from experiments.pipeline.reproduce import report, reproduce, results_in_git
from experiments.shared.stage import RESULTS, exit_on_bad_input

NAME = "python -m experiments.pipeline"
SHOW = f"{EXAMPLE}{NAME} "
PIPELINE = Path("dvc.yaml")

app = typer.Typer(
    name=NAME,
    help="List, check, run and compare the stages of dvc.yaml, from the weights to the paper.",
    epilog=f"{SHOW}status probing@smollm2-135m-instruct",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Picks = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[STAGE|MODEL]...",
        help="probing, probing@MODEL or MODEL, with what it needs and what ends in the paper. Default: all.",
    ),
]


@app.command("list", epilog=f"{SHOW}list smollm2-135m-instruct")
def list_stages(picks: Picks = None, json: JsonFile = None) -> None:
    """List the stages, their models, minutes and what they do."""
    found = overview(picks or [])
    rows = [[stage, " ".join(e["models"]), f"{e['minutes']:g}", e["does"]] for stage, e in found.items()]
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
    command = [sys.executable, "-m", "dvc", "repro", *select(picks or [])]
    if code := subprocess.run(command, check=False).returncode:
        raise InputError(f"dvc repro failed (exit code {code}, its message is above); mend it and run again")


@app.command("reproduce", epilog=f"{SHOW}reproduce probing@smollm2-135m-instruct")
def reproduce_stages(
    picks: Picks = None,
    list_only: Annotated[bool, typer.Option("--list", help="Only list what would run, and its minutes.")] = False,
) -> None:
    """Run again from the weights, stale or not, and compare with what is committed.

    Ends with a table and exit code 0 if the results agree, else 1: within tolerance, or (results of training, on
    another kind of processor) over seeds.
    """
    if list_only:
        for name, stage in select(picks or []).items():
            say(f"{name}  about {minutes_of(stage):g} min")
        return
    _answer(reproduce(picks or []), None, None)


@app.command(epilog=f"{SHOW}compare committed.json regenerated.json")
def compare(
    expected: Annotated[Path | None, typer.Argument(metavar="[EXPECTED]", help="A result file.")] = None,
    actual: Annotated[Path | None, typer.Argument(metavar="[ACTUAL]", help="Another version of it.")] = None,
    json: JsonFile = None,
) -> None:
    """Compare two result files within tolerances or, without any, what is committed with what is in the tree.

    Exit code 1 if they differ.
    """
    if expected is not None:
        if actual is None:
            raise InputError("ACTUAL: missing; give two result files, or none to compare the committed results")
        _compare_two(expected, actual, json)
        return
    committed = results_in_git()
    files = sorted(path.relative_to(committed) for path in (committed / RESULTS).rglob("*.json"))
    found = {}
    for file in files if json else ():
        found[str(file)] = [str(difference) for difference in compare_files(committed / file, file).differences]
    _answer(report(committed, files), json, {"differences": found})


def _compare_two(expected: Path, actual: Path, json: Path | None) -> None:
    found = compare_files(expected, actual)
    differences = [str(difference) for difference in found.differences]
    for difference in differences:
        say(printable(difference))
    worst = f"; largest deviation {found.worst:.2g} of its tolerance, at {printable(found.worst_path)}"
    say(f"{found.values} values, {len(differences)} differences{worst if found.worst else ', identical'}")
    answer = {
        "values": found.values,
        "differences": differences,
        "worst": None if found.worst == float("inf") else found.worst,
        "worst_path": found.worst_path,
    }
    _answer(not differences, json, answer)


@app.command(epilog=f"{SHOW}dependencies --check")
def dependencies(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 if a list is not right.")] = False,
) -> None:
    """Write the lists of modules in dvc.yaml from what the stages import.

    Everything else in the file stays as it is.
    """
    text = PIPELINE.read_text(encoding="utf-8")
    found = differing(text)
    for name, changes in found.items():
        say(f"{name}: {' '.join(changes)}")
    if check:
        _answer(not found, None, None)
        return
    PIPELINE.write_text(rewritten(text), encoding="utf-8")


def _answer(yes: bool, json: Path | None, answer: Any) -> None:
    write_json(json, answer)
    if not yes:
        raise typer.Exit(1)


def main() -> None:
    """Entry point."""

    def go() -> None:
        try:
            code = typer.main.get_command(app).main(prog_name=NAME, standalone_mode=False)
        except TyperException as error:
            message = error.format_message()
            if "\n" not in message.strip():
                raise InputError(f"{message} Try --help.") from error
            say(message)  # the help, where a command is missing
            code = 2
        if code == 130:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)

    exit_on_bad_input(go)


if __name__ == "__main__":
    main()
