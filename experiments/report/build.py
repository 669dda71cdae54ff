"""Stage paper: paper/paper.pdf from paper/main.typ, which reads results, tables and figures itself.

What may go wrong on the way becomes one line that says what to do.
"""

import re
from pathlib import Path

import typst

from classifier_emergence.errors import InputError
from classifier_emergence.results import write_bytes_atomic
from experiments.shared.stage import exit_on_bad_input


def build(main: Path, output: Path, *, root: Path) -> None:
    """Compile ``main`` to the PDF ``output``: always the same bytes, no network, no fonts but those in Typst.

    The PDF is accessible (PDF/UA-1). This also makes Typst refuse what it would otherwise let pass: images
    and equations without words to read out, and characters that no font has, also in figures. Those print as
    empty boxes, which text extraction does not show.

    Args:
        main: The Typst source.
        output: Written atomically, and only if every check passes.
        root: Folder that paths like ``/results/claims.json`` in the source start from.

    Raises:
        InputError: A result, table or figure is missing (names the stage to run), or Typst reports an error
            or a warning (names file and line).
    """
    root = root.resolve()
    if not main.is_file():
        raise InputError(f"{main}: no such Typst source; run from the repository root")
    try:
        pdf, warnings = typst.compile_with_warnings(
            str(main.resolve()),
            root=str(root),
            format="pdf",
            pdf_standards="ua-1",
            ignore_system_fonts=True,
            timestamp=0,
        )
    except typst.TypstError as error:
        raise InputError(_problem(error, main, root)) from error
    if warnings:
        raise InputError(_problem(warnings[0], main, root))
    write_bytes_atomic(output, pdf)


def _problem(diagnosed: typst.TypstError | typst.TypstWarning, main: Path, root: Path) -> str:
    place = re.search(r"┌─ (.+):(\d+):\d+", diagnosed.diagnostic)  # of the working folder, not of the root
    where = f"{_within(Path(place[1]), root)}:{place[2]}" if place else str(_within(main, root))
    message = diagnosed.message.replace(f"{root}/", "")
    if absent := re.search(r"file not found \(searched at (.+)\)", message):
        return f"{where}: {absent[1]} is missing; {_remedy(Path(absent[1]))}"
    if "could not be displayed with" in message:
        return f"{where}: {message}; write the character as its code point"
    return "; ".join([f"{where}: {' '.join(message.split())}", *diagnosed.hints])


def _within(path: Path, root: Path) -> Path:
    path = path.resolve()
    return path.relative_to(root) if path.is_relative_to(root) else path


def _remedy(path: Path) -> str:
    match path.parts:
        case ("results", experiment, model):
            stage = f"{experiment}@{Path(model).stem}"
        case ("results", "predictions.json"):
            stage = "claims"
        case ("results", ledger):
            stage = Path(ledger).stem
        case ("paper", "tables" | "figures" as stage, _):
            pass
        case _:
            return "restore it from git"
    return f"run the stage that writes it: dvc repro {stage}"


def run() -> None:
    """Build the paper."""
    build(Path("paper/main.typ"), Path("paper/paper.pdf"), root=Path())


if __name__ == "__main__":
    exit_on_bad_input(run)
