"""The terminal: whatever a prompt holds, it is printed as one harmless line."""

import io
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from classifier_emergence.cli.terminal import bar, printable, shortened, spark, table

HOSTILE = [
    "", "a\nb\r\nc", "\x1b[31mred", "[bold]x[/bold]", "=cmd|' /C calc'!A0", "#|\t|", "\u202eevil", "שלום 12", "👩‍🔬",
    "x" * 5000, "\ud800", "\x00", "{}", "%s", "\u2028",
]  # fmt: skip
texts = st.text(max_size=80) | st.sampled_from(HOSTILE)


@settings(max_examples=50, deadline=None)
@given(texts)
def test_printable_text_is_one_line_without_control_or_format_characters(text: str) -> None:
    shown = printable(text)
    kept = shown.removeprefix("\u2068").removesuffix("\u2069")
    assert not [c for c in kept if c != " " and unicodedata.category(c)[0] in "CZ"]
    assert shown.count("\u2068") == shown.count("\u2069") <= 1
    assert len(shown.splitlines()) <= 1


def test_letters_of_every_script_and_emoji_stay() -> None:
    text = "größer 你好 привет नमस्ते 😀"
    assert printable(text) == text


def test_right_to_left_text_is_isolated_from_its_neighbours() -> None:
    assert printable("שלום 12") == "\u2068שלום 12\u2069"
    assert "\u202e" not in printable("\u202eevil")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(texts, texts), max_size=4))
def test_a_piped_table_has_a_line_a_row_and_a_tab_between_cells(rows: list[tuple[str, str]]) -> None:
    captured = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", captured)
        table(["a", "b"], rows)
    lines = captured.getvalue().split("\n")
    assert len(lines) == len(rows) + 2
    assert all(line.count("\t") == 1 for line in lines[:-1])


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@settings(max_examples=30, deadline=None)
@given(texts)
def test_markup_and_escapes_are_shown_not_obeyed_on_a_terminal(text: str) -> None:
    captured = _Terminal()
    wanted = shortened(text).strip(" ")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", captured)
        patch.setenv("COLUMNS", "400")
        patch.setenv("NO_COLOR", "1")
        patch.setattr(Console, "is_terminal", False)
        table(["cell"], [[text]], title="[bold]title")
    shown = captured.getvalue()
    assert "[bold]title" in shown
    assert wanted in shown
    assert not [c for c in shown if c not in "\n" and unicodedata.category(c) == "Cc"]


def test_long_cells_are_cut_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = io.StringIO()
    monkeypatch.setattr(sys, "stdout", captured)
    table(["cell"], [["x" * 500]])
    assert "x" * 500 in captured.getvalue()
    assert shortened("x" * 500) == "x" * 199 + "…"


def test_curves_are_monotone_in_their_values() -> None:
    steps = spark([0.0, 1e-12, 1e-6, 1e-4, 1e-2, 0.5, 1.0])
    assert steps == "".join(sorted(steps))
    assert steps[0] == " "
    assert steps[-1] == "█"
    lengths = [len(bar(x / 20)) for x in range(21)]
    assert lengths == sorted(lengths)
    assert (bar(0.0), bar(1.0)) == ("", "█" * 20)
