"""Commands about the repository's results: experiments, claims, compare. They need a clone of the repository."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from classifier_emergence.cli.options import JsonFile, check_outputs, example, write_json
from classifier_emergence.cli.terminal import printable, say, table
from classifier_emergence.errors import InputError

if TYPE_CHECKING:
    from classifier_emergence.trace import Origin

experiments = typer.Typer(help="List, check and run the paper's experiments.")
Picks = Annotated[
    list[str] | None, typer.Argument(metavar="STAGE|MODEL...", help="probing, probing@MODEL or MODEL. Default: all.")
]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(experiments, name="experiments", no_args_is_help=True)
    app.command("claims", epilog=example("claims C09"))(claims)
    app.command("compare", epilog=example("compare committed.json regenerated.json"))(compare)


@experiments.command("list", epilog=example("experiments list"))
def list_experiments(json: JsonFile = None) -> None:
    """List the stages, their models and minutes."""
    _pipeline("list", json=json)


@experiments.command(epilog=example("experiments status"))
def status(picks: Picks = None, json: JsonFile = None) -> None:
    """Show what is stale and why.

    Exit code 1 if anything is.
    """
    _pipeline("status", picks, json=json)


@experiments.command(epilog=example("experiments run probing@smollm2-135m-instruct"))
def run(picks: Picks = None) -> None:
    """Run stages that are stale, with what they need (dvc repro)."""
    _pipeline("run", picks)


@experiments.command(epilog=example("experiments reproduce gemma-3-270m"))
def reproduce(
    picks: Picks = None,
    list_only: Annotated[bool, typer.Option("--list", help="Only list what would run, and its minutes.")] = False,
) -> None:
    """Run stages again, stale or not, and compare with the committed results.

    Exit code 1 if they differ by more than tolerance.
    """
    _pipeline("reproduce", [*(picks or []), *(["--list"] if list_only else [])])


@experiments.command(epilog=example("experiments submit probing --set slurm_partition=cpu"))
def submit(
    picks: Picks = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="KIND", help="slurm or local. Default: slurm where there is one.")
    ] = None,
    at_once: Annotated[int | None, typer.Option(metavar="N", min=1, help="Most jobs at once. Default: all.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter of submitit; may be repeated.")
    ] = None,
) -> None:
    """Run stages that are stale, with what they need, as jobs of a cluster.

    Waits for all and names the log of what failed; the same command goes on. Exit code 1 if a job failed.
    """
    words = [f"--cluster={cluster}"] if cluster else []
    words += [f"--at-once={at_once}"] if at_once else []
    _pipeline("submit", [*(picks or []), *words, *(f"--set={option}" for option in options or [])])


def compare(
    expected: Annotated[Path | None, typer.Argument(metavar="[EXPECTED]", help="A result file.")] = None,
    actual: Annotated[Path | None, typer.Argument(metavar="[ACTUAL]", help="Another version of it.")] = None,
    json: JsonFile = None,
) -> None:
    """Compare results within tolerances.

    Of two files, or, without any, of what is committed and what is in the tree. Exit code 1 if they differ.
    """
    _pipeline("compare", [str(file.absolute()) for file in (expected, actual) if file is not None], json=json)


def _pipeline(command: str, arguments: list[str] | None = None, *, json: Path | None = None) -> None:
    """``python -m experiments.pipeline`` with the clone's code; exits with its code if that is not 0."""
    check_outputs(json, None)
    root = _root()
    import_module("dvc")  # said here, the lack of it is one line that names the extra
    path = os.pathsep.join([str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "DVC_NO_ANALYTICS": "1"}
    words = [command, *(arguments or []), *(["--json", str(json.absolute())] if json else [])]
    done = subprocess.run([sys.executable, "-m", "experiments.pipeline", *words], cwd=root, env=env, check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)


def _root() -> Path:
    from classifier_emergence.models.names import repository_root

    root = repository_root()
    if root is None:
        raise InputError(f"{Path.cwd()}: not in a clone of the repository; change into one")
    return root


def claims(
    claim: Annotated[
        str | None,
        typer.Argument(metavar="[CLAIM]", help="Such as C01, or P01 of our predictions; default: the table."),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Show the verdicts, or the evidence for one and where each of its numbers comes from.

    A claim's verdict is that of its primary test; what the other tests and flawed protocols give is shown beside it.
    Of every number: file and key, what is committed there, the stage that made it and the function that measures it,
    the line of the ledger.
    """
    check_outputs(json, None)
    from classifier_emergence.trace import judged, origins

    root = _root()
    ledgers = judged(root)
    home = {key: ledger for ledger, items in ledgers.items() for key in items}
    if claim is None:
        both = {key: ledgers[ledger][key] for key, ledger in home.items()}
        rows = [[key, i["headline"], str(len(i["primary"])), _others(i), i["reproduced"], i["claim"]]
                for key, i in both.items()]  # fmt: skip
        table(["claim", "verdict", "models", "other tests", "reproduced", "what is claimed"], rows)
        write_json(json, both)
        return
    key = claim.upper()
    if key not in home:
        there = " and ".join(f"{min(items)} to {max(items)}" for items in ledgers.values() if items)
        raise InputError(f"claim {claim!r}: no such claim; there are {there}")
    item = ledgers[home[key]][key]
    said = {"claims": "reported", "predictions": "expected"}[home[key]]
    say(f"{key}: {printable(item['claim'])}")
    say(f"source: {printable(item['source'])}; {said}: {printable(item['reported'])}")
    others = f"other tests, without flaws switched on: {_others(item)}"
    say(f"verdict: {item['headline']} ({_count(len(item['primary']), 'model')}; {others})")
    say(f"reported number reproduced: {item['reproduced']}" + (f"; needs {item['needs']}" if item["needs"] else ""))
    if item["criterion"]:
        say("primary: " + printable("{what}; {expected} (write-up: {theirs}): {why}".format(**item["criterion"])))
    chain = origins(root, home[key], {key: item})[key]
    if item["evidence"]:
        _show(item["evidence"], chain)
    pieces = [{**piece, "origin": vars(origin)} for piece, origin in zip(item["evidence"], chain, strict=True)]
    write_json(json, {key: {**item, "evidence": pieces}})


def _others(item: dict[str, Any]) -> str:
    return ", ".join(f"{count} {state}" for state, count in item["others"].items()) or "–"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _show(evidence: list[dict[str, Any]], chain: "list[Origin]") -> None:
    from classifier_emergence.numbers import ends_text, number

    tests: dict[tuple[str, ...], list[tuple[list[str], Origin]]] = {}
    for e, origin in zip(evidence, chain, strict=True):
        n = "" if e["n"] is None else str(e["n"])
        row = [e["model"], number(e["value"], 3), ends_text(e["interval"]), n, e["state"]]
        tests.setdefault(("primary" if e["primary"] else e["protocol"], e["what"], e["expected"]), []).append(
            (row, origin)
        )
    columns = ["model", "value", "interval", "n", "state"]
    if not sys.stdout.isatty():
        rows = [[*test, *row, *vars(origin).values()] for test, found in tests.items() for row, origin in found]
        table(["protocol", "what", "claim says", *columns, *vars(chain[0])], rows)
        return
    for (protocol, what, expected), found in tests.items():  # one wide table would be unreadable
        say()
        table(columns, [row for row, _ in found], title=f"{protocol}: {what}; claimed: {expected}")
        for _, origin in found:
            say(printable(origin.told()))
