r"""Text and numbers for print: tokens in characters that the fonts have, tables in three formats.

Tokens are set in DejaVu Sans Mono, in figures (matplotlib ships it) and in the paper (Typst holds it). What
it cannot draw would come out as an empty box without any warning, so it is written as ``\u{4f60}``.
"""

import csv
import functools
import io
import math
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.ft2font import FT2Font

from classifier_emergence.errors import InputError
from classifier_emergence.results import write_text_atomic

NONE = "n/a"
"""How a missing value is printed."""
_Row = Sequence[str]
_SPACE = "␣"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def has_glyph(char: str) -> bool:
    """Whether DejaVu Sans Mono draws a character."""
    return ord(char) in _charmap()


def visible(text: str) -> str:
    r"""Text as one line of characters that show; different texts stay different.

    Written as ``\u{hex}``: control, format and unassigned characters, lone surrogates, line ends, unusual
    spaces, combining marks (they would change their neighbour), right-to-left characters (they would reorder
    their neighbours), all that the font lacks, and a backslash that would otherwise look like such an escape.
    Spaces at the ends and double spaces, which typesetters drop, become ``␣``.
    """
    text = re.sub(r"\\(?=u\{)|[^ -~]", lambda match: _escaped(match[0]), text)
    return re.sub(r"^ +| +$| {2,}", lambda match: _SPACE * len(match[0]), text)


def number(x: float | None, digits: int = 2) -> str:
    """A number with fixed decimals, a true minus and thousands separated: ``−1,234.50``. Integers stay whole.

    What would round to zero without being zero keeps one digit, ``0.004``, and below a thousandth (or from
    10¹⁵ up) is written as ``3.2 × 10⁻⁷``. Ties go to the even digit, decided on the decimal form that a
    result file holds. None is ``n/a``.

    Raises:
        InputError: ``x`` is NaN or infinite.
    """
    if x is None:
        return NONE
    if isinstance(x, int):
        return f"{x:,}".replace("-", "−")
    vanishes = _rounded(x, digits) == 0 and x != 0
    if vanishes and abs(x) >= 0.001:
        return f"{Decimal(f'{x:.1g}'):f}".replace("-", "−")
    if vanishes or abs(x) >= 1e15:
        mantissa, exponent = f"{x:.1e}".split("e")
        return f"{mantissa.replace('-', '−')} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    return _fixed(x, digits)


def percent(x: float | None, digits: int = 1) -> str:
    """A share as a percentage: 0.8125 is ``81.2 %``; what is neither none nor all never looks so: ``<0.1 %``.

    Raises:
        InputError: ``x`` is NaN or infinite.
    """
    if x is None:
        return NONE
    rounded, step = _rounded(x, digits, scale=100), Decimal(1).scaleb(-digits)
    if x > 0 and rounded == 0:
        return f"<{step:f} %"
    if x < 1 and rounded == 100:
        return f">{100 - step:f} %"
    return f"{_fixed(x, digits, scale=100)} %"


def interval_text(interval: Sequence[float] | None, digits: int = 1, *, scale: int = 100) -> str:
    """An interval, of shares in percent: ``[57.0, 93.4]``; ``scale=1`` for other quantities. None is ``n/a``.

    Raises:
        InputError: An end is NaN or infinite.
    """
    if interval is None:
        return NONE
    low, high = interval
    return f"[{_fixed(low, digits, scale=scale)}, {_fixed(high, digits, scale=scale)}]"


def accuracy_text(tally: Mapping[str, Any], at: int | None = None) -> str:
    """An accuracy with its interval: ``81.2 % [57.0, 93.4]``; ``at`` picks a row of arrays over layers."""
    value, interval = tally["accuracy"], tally["interval"]
    if at is not None:
        value, interval = value[at], interval[at]
    return f"{percent(value)} {interval_text(interval)}"


def small_share(share: float) -> str:
    """A share over many orders of magnitude: percent where that reads well, else a power of ten."""
    if share >= 0.0005 or share == 0:
        return percent(share, 2)
    return number(share, 1)


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
    written = {
        "csv": _csv([header, *body]),
        "md": _markdown(header, body, numeric, visible(caption)),
        "tex": _latex([[*map(_latex_text, header)], *latex], numeric, visible(caption), stem.name),
    }
    for ending, text in written.items():
        write_text_atomic(stem.parent / f"{stem.name}.{ending}", text)


@functools.cache
def _charmap() -> frozenset[int]:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
    return frozenset(FT2Font(str(path)).get_charmap())


def _escaped(char: str) -> str:
    shows = (
        has_glyph(char)
        and unicodedata.category(char)[0] not in "CMZ"
        and unicodedata.bidirectional(char) not in {"R", "AL", "AN"}
        # Comes here only before u{; would look like a space; has an empty glyph; is a mark to the shaper.
        and char not in ("\\", _SPACE, "\ufffc", "\u0eb3")
    )
    return char if shows else f"\\u{{{ord(char):x}}}"


def _rounded(x: float, digits: int, *, scale: int = 1) -> Decimal:
    if not math.isfinite(x):
        raise InputError(f"{x}: not a finite number; pass None for a value that does not exist")
    # Through the shortest decimal form, which is what a result holds: 2.675 is a tie there, not a hair less.
    exact = Decimal(repr(float(x))) * scale
    return exact if abs(exact) >= 10**15 else exact.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_EVEN)


def _fixed(x: float, digits: int, *, scale: int = 1) -> str:
    # + 0 drops the sign of a zero.
    return f"{_rounded(x, digits, scale=scale) + 0:,.{digits}f}".replace("-", "−")


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


_LATEX = (
    {char: f"\\{char}" for char in "{}$&#%_"}
    | {
        "\\": r"\textbackslash{}",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "'": r"\textquotesingle{}",
        "`": r"\textasciigrave{}",
        _SPACE: r"\textvisiblespace{}",
        "−": r"\textminus{}",
        "×": r"\texttimes{}",
        "⁻": r"\textsuperscript{\textminus}",
    }
    | {raised: rf"\textsuperscript{{{digit}}}" for digit, raised in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
)


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
