"""The paper's tables as the page shows them."""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from classifier_emergence.errors import InputError
from experiments.report.tables.table import FOLDER


@dataclass(frozen=True)
class Shown:
    """A table with its caption."""

    name: str
    caption: str
    columns: list[str]
    rows: list[list[str]]


def shown() -> list[Shown]:
    """Every table that has rows, by name, with its caption from the Markdown beside it.

    Raises:
        InputError: There is no table, or one has no caption.
    """
    files = sorted(FOLDER.glob("*.csv"))
    if not files:
        raise InputError(f"{FOLDER}: no table there; run the stage that writes them: dvc repro tables")
    tables = [_read(file) for file in files]
    return [table for table in tables if table.rows]


def _read(file: Path) -> Shown:
    with file.open(encoding="utf-8", newline="") as text:
        columns, *rows = [[_bare(cell) for cell in row] for row in csv.reader(text)]
    try:
        first = file.with_suffix(".md").read_text(encoding="utf-8").partition("\n")[0]
    except OSError as error:
        raise InputError(
            f"{file.with_suffix('.md')}: missing; run the stage that writes it: dvc repro tables"
        ) from error
    return Shown(file.stem, re.sub(r"\\(.)", r"\1", first.removeprefix("Table: ")), columns, rows)


def _bare(cell: str) -> str:
    """A cell without the apostrophe that keeps a spreadsheet from taking it for a formula."""
    return cell[1:] if re.match("'+[=+@-]", cell) else cell
