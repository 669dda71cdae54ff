"""Tokens in characters that the fonts have."""

import functools
import re
import unicodedata
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font

_SPACE = "␣"


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
