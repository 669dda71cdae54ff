"""Text, tables and small curves on the terminal; plain tab-separated lines where the output is piped.

Prompts, labels and tokens are hostile text: nothing of them is taken as markup or as a control sequence.
"""

import math
import sys
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from classifier_emergence.reading.positions import Fed

_BARS = " ▁▂▃▄▅▆▇█"
_WORD = 30  # characters that are not broken over lines
_CELL = 10  # columns of a cell in a map
_DARK = 0.75  # the share from which text is light
_FULL = (8, 81, 156)  # the colour of a share of one
_NOTICES = 5  # of each command; more are in its JSON file
_WIDEST = 200  # characters of one cell: a prompt may be a book


def printable(text: str) -> str:
    r"""One line that is safe to print; letters of every script and emoji stay.

    Control, format and unassigned characters, line ends and unusual spaces become ``\u{hex}``. Text with right-to-left
    letters is wrapped in isolates (Unicode Standard Annex 9), so that it does not reorder its neighbours.
    """
    shown = "".join(c if c == " " or unicodedata.category(c)[0] not in "CZ" else f"\\u{{{ord(c):x}}}" for c in text)
    rtl = any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in shown)
    return f"\u2068{shown}\u2069" if rtl else shown


def shortened(text: str) -> str:
    """``printable``, cut where a table's cell would grow too wide."""
    return printable(text) if len(text) <= _WIDEST else f"{printable(text[: _WIDEST - 1])}…"


def spark(values: Sequence[float]) -> str:
    """Probabilities as one line of block characters, ``▁▃█``, a step a decade: blank below 10⁻⁷, full from 0.3 on."""
    top = len(_BARS) - 1
    return "".join(_BARS[0 if v <= 0 else max(0, min(top, top + round(math.log10(v))))] for v in values)


def spread(n: int, most: int = 6) -> Sequence[int]:
    """At most ``most`` of the numbers below n, evenly from the first to the last: columns where all are too many."""
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def bar(value: float, width: int = 20) -> str:
    """A horizontal bar of a share: ``██████▌``."""
    eighths = round(max(0.0, min(1.0, value)) * width * 8)
    return "█" * (eighths // 8) + ("▏▎▍▌▋▊▉"[eighths % 8 - 1] if eighths % 8 else "")


def say(text: str = "") -> None:
    """One line of our own words on standard output."""
    sys.stdout.write(f"{text}\n")


def complain(text: str) -> None:
    """One line on standard error, if there is room for it where that goes."""
    with suppress(OSError):
        sys.stderr.write(f"{printable(' '.join(text.split()))}\n")
        sys.stderr.flush()


def notify(notices: Sequence[str]) -> None:
    """What was special about prompts, on standard error."""
    for notice in notices[:_NOTICES]:
        complain(f"notice: {notice}")
    if len(notices) > _NOTICES:
        complain(f"notice: {len(notices) - _NOTICES} more in other prompts; --json has them all")


def report_fed(fed: Sequence["Fed"], tokens: bool, *, first: int = 1) -> None:
    """Notices; and the tokens, if wanted, those that are read in brackets. Prompts are numbered from ``first`` on."""
    numbered = list(enumerate(fed, start=first))
    notify([f"prompt {i}: {notice.partition(': ')[2]}" for i, one in numbered for notice in one.notices])
    for i, one in numbered if tokens else ():
        shown = [f"[{t}]" if k in one.read else t for k, t in enumerate(map(printable, one.tokens))]
        say(f"tokens of prompt {i}: {'|'.join(shown)}")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """A table on the terminal; tab-separated lines with a header, nothing cut, where the output is piped."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            say("\t".join(printable(cell) for cell in row))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    grid = Table(box=SIMPLE_HEAD, pad_edge=False)
    shown = [[shortened(cell) for cell in row] for row in rows]
    between = 3 * len(columns) - 1
    for column, width in zip(columns, _widths([columns, *shown], console.width - between), strict=True):
        grid.add_column(Text(column), overflow="fold", width=width)
    for row in shown:
        grid.add_row(*map(Text, row))
    if title:
        console.print(Text(title))
    console.print(grid)


def shaded(
    columns: Sequence[str],
    rows: Sequence[str],
    cells: Sequence[Sequence[str]],
    values: Sequence[Sequence[str]],
    shades: Sequence[Sequence[float]],
    *,
    title: str,
) -> None:
    """A map of cells whose background is darker where a share is larger, in as many blocks as the columns need.

    Args:
        columns: Their headers.
        rows: Their labels.
        cells: (rows, columns) texts, which are cut to their column.
        values: (rows, columns) what the colours stand for, beside the texts where there are no colours.
        shades: (rows, columns) within [0, 1].
        title: Above.
    """
    if not sys.stdout.isatty():
        told = [[f"{c} {v}" for c, v in zip(*pair, strict=True)] for pair in zip(cells, values, strict=True)]
        table(["", *columns], [[label, *row] for label, row in zip(rows, told, strict=True)])
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    margin = max(map(len, rows)) + 1
    at_once = max(1, (console.width - margin) // _CELL)
    console.print(Text(title))
    few = console.color_system in (None, "standard")  # no shades among sixteen colours
    for start in range(0, len(columns), at_once):
        part = slice(start, start + at_once)
        console.print(Text(" " * margin + "".join(map(_cell, columns[part]))))
        for label, row, shade in zip(rows, cells, shades, strict=True):
            line = Text(label.ljust(margin))
            for text, value in zip(row[part], shade[part], strict=True):
                line.append(_cell(text), style=("reverse" if value > _DARK else "") if few else _shade(value))
            console.print(line)
        console.print()


def _cell(text: str) -> str:
    from rich.cells import set_cell_size

    shown = printable(text)
    return set_cell_size(f" {shown}" if len(shown) < _CELL else f" {shown[: _CELL - 2]}…", _CELL)


def _shade(value: float) -> str:
    red, green, blue = (round(255 + (full - 255) * value) for full in _FULL)
    return f"{'white' if value > _DARK else 'black'} on rgb({red},{green},{blue})"


def _widths(rows: Sequence[Sequence[str]], room: int) -> Sequence[int | None]:
    """Widths of columns that fit: cells wrap between words, and words stay whole; None where that does not fit."""
    from rich.cells import cell_len

    columns = list(zip(*rows, strict=True))
    widths = [max(map(cell_len, column)) for column in columns]
    least = [min(_WORD, max(cell_len(word) for cell in column for word in cell.split() or [""])) for column in columns]
    if sum(least) > room:
        return [None] * len(columns)
    while sum(widths) > room:  # the widest of those that can be narrower
        i = max((i for i in range(len(widths)) if widths[i] > least[i]), key=widths.__getitem__)
        widths[i] -= 1
    return widths
