"""Options that several commands share, and how their answers are written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from classifier_emergence.errors import InputError

if TYPE_CHECKING:
    from classifier_emergence.instruments.base import Reading
    from classifier_emergence.tasks.classification import Task

EXAMPLE = "\b\nExample:\n  "
"""Starts the last paragraph of a help text; the mark in front keeps its lines from being wrapped."""


def example(line: str) -> str:
    """The last paragraph of a help text: a command line, without the program's name."""
    return f"{EXAMPLE}classifier-emergence {line}"


Model = Annotated[
    str,
    typer.Option("-m", "--model", metavar="MODEL", help="Registry key, hub id (owner/name[@commit]), folder or .gguf."),
]
Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps or balanced (also the disk).")
]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="DTYPE", help="auto, float32, bfloat16 or float16. auto: float32 on a CPU.")
]
AdapterFolder = Annotated[
    list[Path] | None,
    typer.Option("--adapter", metavar="FOLDER", help="A PEFT adapter of that model; repeat for one trained on top."),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", dir_okay=False, help="Write the whole result here.")
]
PlotFile = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", dir_okay=False, help="Draw it: .png, .svg, .pdf or .html.")
]
Layers = Annotated[
    list[str] | None, typer.Option("--layer", metavar="LAYER", help="L16, 16 or emb; may be repeated. Default: all.")
]
Classes = Annotated[
    list[str] | None,
    typer.Option("--class", metavar="NAME:PROMPT|PROMPT", help="A class and its prompts; repeat for each class."),
]
PromptFile = Annotated[
    Path | None,
    typer.Option(
        "--file", metavar="FILE", help="CSV, TSV, JSON, JSONL, Parquet: columns prompt, label [, word, group, answer]."
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--columns", metavar="OURS=THEIRS", help="What a column of the file is called; may be repeated."),
]
TaskName = Annotated[str | None, typer.Option("--task", metavar="NAME", help="A task of the library.")]
Position = Annotated[
    str, typer.Option("--position", metavar="POSITION", help="Token to read: last, a number, or after:TEXT.")
]
Chat = Annotated[bool, typer.Option("--chat", help="Pass prompts through the model's own chat template.")]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="What the system says in the chat.")]
Site = Annotated[
    str, typer.Option("--site", metavar="SITE", help="In each block: resid (after it), resid_mid, attn_out, mlp_out.")
]
ShowTokens = Annotated[
    bool, typer.Option("--tokens", help="Show the tokens that the model is fed; the one that is read in brackets.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of everything random.")]


def labelled_prompts(
    classes: Sequence[str] | None, file: Path | None, task: str | None, columns: Sequence[str] | None = None
) -> "Task":
    """The task that ``--class``, ``--file`` (with ``--columns``) or ``--task`` gives.

    Raises:
        InputError: None or several of them are given, or what they give cannot be read.
    """
    from classifier_emergence.tasks.classification import get_task
    from classifier_emergence.tasks.files import load_task

    if sum(map(bool, (classes, file, task))) != 1:
        raise InputError("prompts: give exactly one of --class (repeated), --file and --task")
    if columns and not file:
        raise InputError("--columns: of a --file; give one")
    if task:
        return get_task(task)
    return load_task(file, renamed(columns or [])) if file else _from_flags(classes or [])


def renamed(pairs: Sequence[str]) -> dict[str, str]:
    """What ``--columns`` says: our name of a column -> the file's.

    Raises:
        InputError: A pair has no equals sign, or nothing at one side of it.
    """
    split = [pair.partition("=") for pair in pairs]
    if bad := next((pair for pair, (ours, _, theirs) in zip(pairs, split, strict=True) if not (ours and theirs)), None):
        raise InputError(f"--columns {bad!r}: write OURS=THEIRS, such as prompt=text")
    return {ours: theirs for ours, _, theirs in split}


def texts_and_labels(task: "Task") -> tuple[list[str], list[str]]:
    """The prompts of a task and the name of each one's class."""
    return [item.prompt for item in task.items], [task.classes[item.label] for item in task.items]


def _from_flags(classes: Sequence[str]) -> "Task":
    from classifier_emergence.tasks.classification import Item, Task

    prompts: dict[str, list[str]] = {}
    for text in classes:
        name, colon, rest = text.partition(":")
        found = [prompt.strip() for prompt in rest.split("|")]
        if not colon or not name.strip() or not all(found):
            raise InputError(f"--class {text!r}: write NAME:PROMPT|PROMPT; prompts that hold a | go into a --file")
        prompts.setdefault(name.strip(), []).extend(found)
    pairs = [(prompt, label) for label, found in enumerate(prompts.values()) for prompt in found]
    items = tuple(Item(prompt, label, group, 0, None) for group, (prompt, label) in enumerate(pairs))
    return Task("prompts of the command line", tuple(prompts), tuple(prompts), items)


def check_outputs(json: Path | None, plot: Path | None) -> None:
    """Refuse files that could not be written, before the work is done.

    Raises:
        InputError: A folder is missing or not writable, or the plot's ending is unknown.
    """
    if plot is not None:
        from classifier_emergence.instruments.drawing import check_ending

        check_ending(plot)
    for option, file in (("--json", json), ("--plot", plot)):
        if file is not None:
            with _writing(option, file):
                file.parent.mkdir(parents=True, exist_ok=True)
                if file.is_dir():
                    raise IsADirectoryError(None, "it is a folder")


def write_json(file: Path | None, result: Any) -> None:
    """Write ``--json``; nothing without a file."""
    if file is None:
        return
    from classifier_emergence.results import ResultError, write_result

    try:
        with _writing("--json", file):
            write_result(file, result)
    except ResultError as error:
        raise InputError(f"--json {str(file)!r}: {error}") from error


def write_outputs(reading: "Reading", json: Path | None, plot: Path | None, **how: Any) -> None:
    """Write ``--json`` and ``--plot`` of a reading, each atomically; ``how`` is for its ``plot``."""
    write_json(json, reading.to_dict() if json is not None else None)
    if plot is not None:
        with _writing("--plot", plot):
            reading.save(plot, **how)


@contextmanager
def _writing(option: str, file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{option} {str(file)!r}: cannot be written ({reason}); free space or name another") from error
