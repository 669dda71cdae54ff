import csv
import io
import itertools
import json
import re
import unicodedata
from pathlib import Path

import pytest
import typst
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.glyphs import _charmap, has_glyph, visible
from classifier_emergence.numbers import ends_text, interval_text, number, percent
from experiments.report.typeset import write_table

HOSTILE = [
    *[
        "",
        " ",
        "  a  b ",
        "=cmd|' /C calc'!A0",
        "+1-2",
        "-",
        "-5",
        "--",
        "@x",
        "'=",
        "''+",
        "'tis",
        "\t=1",
        "\r\n",
    ],
    *[
        "a|b",
        "\\|",
        "\\",
        "\\\\",
        "`",
        "``x`",
        "**b**",
        "_i_",
        "<b>",
        "&amp;",
        "[a](b)",
        "# h",
        "$x$",
        "~~s~~",
        "%",
        '"',
    ],
    *[
        "{",
        "}",
        "\\end{tabular}",
        "[1ex]",
        "*",
        "?`",
        "<<",
        ",,",
        "\\u{41}",
        "\\u",
        "␣",
        "Ġmultiply",
        "▁12",
        "×",
        "−",
    ],
    *[
        "你好",
        "한국",
        "🧮",
        "é",
        "e\u0301",
        "\u202eabc",
        "\u200b",
        "שלום",
        "سلام",
        "\ud800",
        "\x00",
        "\ufffc",
        "\ufffd",
        "\u3164",
    ],
]
# Mostly characters that mean something somewhere, among any others, lone surrogates too.
SPECIAL = st.sampled_from("=+-@'\"\\|`*_<>[]{}#~&$%^,; \t\n\ru4{}␣−×⁻é你א\u202e\ud800")
TEXT = st.text(SPECIAL | st.characters(), max_size=12)
quick = settings(deadline=None, max_examples=60)


def examples(test):
    for text in HOSTILE:
        test = example(text)(test)
    return test


def original(shown: str) -> str:
    """The inverse of ``visible``."""
    return re.sub(r"\\u\{([0-9a-f]+)\}", lambda match: chr(int(match[1], 16)), shown.replace("␣", " "))


@given(TEXT)
@examples
@quick
def test_visible_text_shows_on_one_line_and_stays_itself(text):
    shown = visible(text)
    assert original(shown) == text
    assert all(has_glyph(char) and unicodedata.category(char)[0] not in "CM" for char in shown)
    assert shown.splitlines() in ([shown], [])
    assert shown == shown.strip()
    assert "  " not in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("multiply", "multiply"),
        (" times ", "␣times␣"),
        ("a b  c", "a b␣␣c"),
        ("Ġé×Ж\ufffd", "Ġé×Ж\ufffd"),
        ("\n\t", "\\u{a}\\u{9}"),
        ("你", "\\u{4f60}"),
        ("🧮", "\\u{1f9ee}"),
        ("\u202e", "\\u{202e}"),
        ("\u00a0", "\\u{a0}"),
        ("\ud800", "\\u{d800}"),
        ("\\n", "\\n"),
        ("\\u{41}", "\\u{5c}u{41}"),
        ("␣", "\\u{2423}"),
        ("א", "\\u{5d0}"),
    ],
)
def test_visible_by_example(text, shown):
    assert visible(text) == shown


def test_typst_draws_every_character_that_visible_lets_through(tmp_path):
    shown = [c for c in sorted(_charmap()) if visible(chr(c)) == chr(c)]
    assert len(shown) > 2800
    (tmp_path / "codes.json").write_text(json.dumps([ord("你"), *shown]))
    (tmp_path / "main.typ").write_text(
        '#set page(width: auto, height: auto)\n#set text(font: "DejaVu Sans Mono", fallback: false)\n'
        '#for code in json("codes.json") [#str.from-unicode(code)#linebreak()]'
    )
    svg = typst.compile(str(tmp_path / "main.typ"), format="svg", ignore_system_fonts=True)
    drawn = re.findall(r'<use xlink:href="#(\w+)"', svg.decode())
    assert len(drawn) == 1 + len(shown)
    assert drawn[0] not in drawn[1:], "drawn as the empty box that stands for 你"


@pytest.mark.parametrize(
    ("x", "digits", "text"),
    [
        (None, 2, "n/a"),
        (0, 2, "0"),
        (-1234567, 2, "−1,234,567"),
        (0.0, 2, "0.00"),
        (-0.0, 2, "0.00"),
        (1234.5, 2, "1,234.50"),
        (-1.005, 2, "−1.00"),
        (2.675, 2, "2.68"),
        (0.5, 0, "0.5"),
        (1.5, 0, "2"),
        (-0.0041, 2, "−0.004"),
        (3.21e-7, 3, "3.2 × 10⁻⁷"),
        (1e20, 1, "1.0 × 10²⁰"),
    ],
)
def test_number(x, digits, text):
    assert number(x, digits) == text


@pytest.mark.parametrize(
    ("x", "digits", "text"),
    [
        (None, 1, "n/a"),
        (0.8125, 1, "81.2 %"),
        (0.145, 0, "14 %"),
        (1.0, 1, "100.0 %"),
        (1, 0, "100 %"),
        (0.0, 1, "0.0 %"),
        (1e-9, 1, "<0.1 %"),
        (1e-12, 7, "<0.0000001 %"),
        (0.99999, 1, ">99.9 %"),
        (-0.2, 1, "−20.0 %"),
        (-1e-9, 1, "0.0 %"),
        (1.25, 0, "125 %"),
    ],
)
def test_percent(x, digits, text):
    assert percent(x, digits) == text


def test_interval():
    assert interval_text((0.5699, 0.9341)) == "[57.0, 93.4]"
    assert interval_text((-1.5, 1200.0), 0, scale=1) == "[−2, 1,200]"
    assert interval_text(None) == "n/a"
    assert ends_text((0.000017, 0.004)) == "[1.7 × 10⁻⁵, 0.004]"
    assert ends_text(None) == ""


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(0, 6))
@quick
def test_numbers_are_near_what_they_say_and_never_a_negative_zero(x, digits):
    text = number(x, digits)
    assert not re.fullmatch(r"−[0.,]*", text)
    assert "-" not in text
    plain = text.replace(",", "").replace("−", "-")
    if "×" not in plain:
        assert abs(float(plain) - x) <= 0.5 * 10**-digits * (1 + 1e-6)


@pytest.mark.parametrize("x", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(x):
    for text in (number, percent, lambda x: interval_text((0.0, x))):
        with pytest.raises(InputError, match="not a finite number"):
            text(x)


def written(folder: Path, columns, rows, **options) -> dict[str, str]:
    write_table(folder / "t.v1", columns, rows, **{"caption": "About."} | options)
    return {ending: (folder / f"t.v1.{ending}").read_text() for ending in ("csv", "md", "tex")}


def test_a_table_by_example(tmp_path):
    rows = [["Ġ_x", percent(0.8125), 3, None], ["=", "[1.0, 2.0]", -4, "a|b"]]
    table = written(tmp_path, ["token", "share", "n", "note"], rows, tokens=["token"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.v1.csv", "t.v1.md", "t.v1.tex"]
    assert table["csv"] == 'token,share,n,note\nĠ_x,81.2 %,3,n/a\n\'=,"[1.0, 2.0]",−4,a|b\n'
    assert table["md"].splitlines() == [
        "Table: About.",
        "",
        "| token | share | n | note |",
        "|---|---:|---:|---|",
        r"| Ġ\_x | 81.2 % | 3 | n/a |",
        r"| = | \[1.0, 2.0\] | −4 | a\|b |",
    ]
    assert table["tex"].splitlines()[3:] == [
        r"\caption{About.}",
        r"\label{tab:t.v1}",
        r"\begin{tabular}{lrrl}",
        r"\toprule",
        r"{}token & share & n & note \\",
        r"\midrule",
        r"{}\texttt{Ġ\_x} & 81.2 \% & 3 & n/a \\",
        r"{}\texttt{=} & [1.0, 2.0] & \textminus{}4 & a\textbar{}b \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def unguarded(cell: str) -> str:
    return re.sub(r"^'('*[=+@-])", r"\1", cell)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
@example([(text, text) for text in HOSTILE])
@quick
def test_any_text_is_a_cell_in_every_format(tmp_path_factory, rows):
    table = written(tmp_path_factory.mktemp("t"), ["a", "b"], rows, tokens=["a"], caption=rows[0][0])
    shown = [[visible(cell) for cell in row] for row in rows]

    _, *cells = csv.reader(io.StringIO(table["csv"]))
    assert [[unguarded(cell) for cell in row] for row in cells] == shown
    for cell in (cell for row in cells for cell in row):
        assert not re.match(r"[=+@\t\r-]", cell) or re.fullmatch(r"[+-]?\d+(\.\d+)?", cell)

    assert markdown_cells(table["md"]) == [["a", "b"], *shown]

    lines = table["tex"].splitlines()
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert len(body) == len(rows)
    for line in body:
        assert_sound_latex(line.removesuffix(r" \\"), separators=1)
    assert_sound_latex(lines[3], separators=0)


def markdown_cells(text: str) -> list[list[str]]:
    tokens = MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(text)
    rows: list[list[str]] = []
    for before, token in itertools.pairwise(tokens):
        if before.type == "tr_open":
            rows.append([])
        if before.type in ("th_open", "td_open"):
            # Text alone: no emphasis, code, link or HTML came out of it.
            assert {child.type for child in token.children} <= {"text", "text_special"}
            rows[-1].append("".join(child.content for child in token.children))
    return rows


def assert_sound_latex(line: str, *, separators: int) -> None:
    # What is left after known commands and escapes must have no special character but braces and separators.
    rest = re.sub(r"\\(?:text[a-z]+|caption)\b|\\[{}$&#%_]", "", line)
    assert not re.search(r"[\\$#%_^~<>|\"'`]|--|,,", rest)
    assert rest.count("&") == separators
    depth = 0
    for char in rest:
        depth += {"{": 1, "}": -1}.get(char, 0)
        assert depth >= 0
    assert depth == 0


def test_typst_reads_the_csv_back(tmp_path):
    rows = [[text, "x"] for text in HOSTILE]
    write_table(tmp_path / "t", ["token", "x"], rows, caption="c", tokens=["token"])
    (tmp_path / "shown.json").write_text(json.dumps([visible(text) for text in HOSTILE]))
    (tmp_path / "main.typ").write_text(
        """
        #let unguarded(cell) = cell.replace(regex("^'('*[=+@-])"), m => m.captures.first())
        #let (header, ..rows) = csv("t.csv")
        #assert.eq(rows.map(row => unguarded(row.first())), json("shown.json"))
        #set text(font: "DejaVu Sans Mono", fallback: false)
        #table(columns: 2, ..header, ..rows.flatten())
        """
    )
    _, warnings = typst.compile_with_warnings(str(tmp_path / "main.typ"), format="pdf", ignore_system_fonts=True)
    assert warnings == []


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([["a", "b"], ["a"]], {}, "table t.v1: row 1 has 1 cells for 2 columns; give one for each"),
        ([["a", 0.5]], {}, "table t.v1: row 0: 'y' is 0.5; format it as text, for instance with number()"),
        ([], {"tokens": ["z"]}, "table t.v1: no column 'z'; there is: x, y"),
    ],
)
def test_a_wrong_table_is_named_and_not_written(tmp_path, rows, options, message):
    with pytest.raises(InputError) as caught:
        written(tmp_path, ["x", "y"], rows, **options)
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


def test_a_table_may_have_no_rows(tmp_path):
    assert written(tmp_path, ["x"], [])["csv"] == "x\n"
