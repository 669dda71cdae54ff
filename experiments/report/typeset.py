r"""Text and numbers for print: tokens in characters that the fonts have, tables in three formats.

Tokens are set in DejaVu Sans Mono, in figures (matplotlib ships it) and in the paper (Typst holds it). What
it cannot draw would come out as an empty box without any warning, so it is written as ``\u{4f60}``.
"""

import csv
import io
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.glyphs import _SPACE, visible
from classifier_emergence.numbers import number
from classifier_emergence.results import write_text_atomic

_Row = Sequence[str]


def write_table(
    stem: Path,
    columns: Sequence[str],
    rows: Sequence[Sequence[str | int | None]],
    *,
    caption: str,
    tokens: Collection[str] = (),
) -> None:
    """Write a table as ``stem.csv``, ``stem.md`` and ``stem.tex`` (booktabs).

    Every cell passes through ``visible``, so any text is safe in all three. In the CSV, a cell that a
    spreadsheet would take for a formula gets an apostrophe in front, and so does one that already looks so
    guarded: taking one apostrophe from cells that match ``^'+[=+@-]`` gives the text back.

    Args:
        stem: Path without the ending; its name becomes the LaTeX label ``tab:name``.
        columns: Titles.
        rows: Cells as text (see ``number``, ``percent``, ``interval_text``), integers or None.
        caption: One sentence; not in the CSV.
        tokens: Titles of columns that hold vocabulary tokens, set in typewriter in LaTeX.

    Raises:
        InputError: A row has more or fewer cells than there are columns, a cell is neither text nor integer,
            or ``tokens`` names no column.
    """
    if unknown := sorted(set(tokens) - set(columns)):
        raise InputError(f"table {stem.name}: no column {unknown[0]!r}; there is: {', '.join(columns)}")
    header = [visible(title) for title in columns]
    body = [_cells(stem.name, i, columns, row) for i, row in enumerate(rows)]
    verbatim = [title in tokens for title in columns]
    numeric = [_numeric([row[i] for row in body]) and not verbatim[i] for i in range(len(columns))]
    latex = [
        [rf"\texttt{{{_latex_text(x)}}}" if t else _latex_text(x) for x, t in zip(row, verbatim, strict=True)]
        for row in body
    ]
    for ending, text in (
        ("csv", _csv([header, *body])),
        ("md", _markdown(header, body, numeric, visible(caption))),
        ("tex", _latex([[*map(_latex_text, header)], *latex], numeric, visible(caption), stem.name)),
    ):
        write_text_atomic(stem.parent / f"{stem.name}.{ending}", text)


def _cells(table: str, i: int, columns: Sequence[str], row: Sequence[str | int | None]) -> list[str]:
    where = f"table {table}: row {i}"
    if len(row) != len(columns):
        raise InputError(f"{where} has {len(row)} cells for {len(columns)} columns; give one for each")
    for title, cell in zip(columns, row, strict=True):
        if not isinstance(cell, str | int | None):
            raise InputError(f"{where}: {title!r} is {cell!r}; format it as text, for instance with number()")
    return [visible(cell) if isinstance(cell, str) else number(cell) for cell in row]


def _numeric(cells: Sequence[str]) -> bool:
    return bool(cells) and all(re.match(r"[-−<>\[]*\d|n/a$", cell) for cell in cells)


def _csv(rows: Sequence[_Row]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([map(_guarded, row) for row in rows])
    return text.getvalue()


def _guarded(cell: str) -> str:
    formula = re.match(r"'*[=+@-]", cell) and not re.fullmatch(r"[+-]?\d+(\.\d+)?", cell)
    return f"'{cell}" if formula else cell


def _markdown(header: _Row, body: Sequence[_Row], numeric: Sequence[bool], caption: str) -> str:
    rule = "|".join("---:" if right else "---" for right in numeric)
    lines = [f"| {' | '.join(map(_markdown_text, row))} |" for row in (header, *body)]
    return "\n".join([f"Table: {_markdown_text(caption)}", "", lines[0], f"|{rule}|", *lines[1:], ""])


def _markdown_text(text: str) -> str:
    return re.sub(r"([\\`*_<>\[\]#~&|$])", r"\\\1", text)


_LATEX = {
    **{char: f"\\{char}" for char in "{}$&#%_"},
    **{raised: rf"\textsuperscript{{{digit}}}" for digit, raised in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    "\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}", "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}", _SPACE: r"\textvisiblespace{}", "−": r"\textminus{}", "×": r"\texttimes{}",
    "⁻": r"\textsuperscript{\textminus}",
}  # fmt: skip


def _latex(body: Sequence[_Row], numeric: Sequence[bool], caption: str, label: str) -> str:
    """Of rows that are LaTeX already, the header first."""
    # {}: a bracket or a star at the start of a row would be an argument of the command before it.
    header, *rows = [f"{{}}{' & '.join(row)} \\\\" for row in body]
    lines = [
        "% Needs booktabs, and XeLaTeX or LuaLaTeX with DejaVu Sans Mono where tokens are not ASCII.",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_latex_text(caption)}}}",
        rf"\label{{tab:{label}}}",
        rf"\begin{{tabular}}{{{''.join('r' if right else 'l' for right in numeric)}}}",
        *(r"\toprule", header, r"\midrule", *rows, r"\bottomrule"),
        r"\end{tabular}",
        r"\end{table}",
        "",
    ]
    return "\n".join(lines)


def _latex_text(text: str) -> str:
    # -- and ,, are ligatures.
    return re.sub(r"([-,])(?=\1)", r"\1{}", "".join(_LATEX.get(char, char) for char in text))
