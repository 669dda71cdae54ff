"""Finds what Typst lets pass: numbers that someone typed into a paper, and semicolons that it takes for code."""

import re
from pathlib import Path

_NUMBER = re.compile(
    r"(?<!\w)(?<!\w[-.])"  # not part of a name: Qwen2.5-Coder-1.5B
    r"(?:\d[\d,]*\.\d+(?!\w|\.\d)"  # 0.81; but neither 1.1B nor version 1.2.3
    r"|\d[\d.,]*[\s~]*(?:%|per\s?cent\b)"  # 81 %
    r"|\d+e-?\d+(?!\w))"  # 1e-9
)
_LITERAL = re.compile(r"(?<![\w-])(?:num|pct|ci|acc|sci)\(\s*\(?\s*[-+−]?[\d.]+\s*[,)]")
NAMES = ("Llama 3.2", "Granite 3.1", "Granite 3.0")
"""Names that hold a number of their own."""


def prose_numbers(source: Path) -> list[tuple[int, str]]:
    """Numbers that someone typed into the text of a Typst file, as (line, text).

    Such are decimals, percentages and powers of ten in prose, in mathematics and in strings (alternative
    texts), and a literal handed to a number function, ``num(0.81)``, the same in disguise. Free are whole
    numbers, lengths and settings in code, raw text (prompts), comments, citations and names of models.
    """
    text = source.read_text(encoding="utf-8")
    prose, code = _Scanner(text).split()
    for name in NAMES:
        prose = prose.replace(name, " " * len(name)).replace(name.replace(" ", "~"), " " * len(name))
    matches = [*_NUMBER.finditer(prose), *_LITERAL.finditer(code)]
    return sorted((text.count("\n", 0, match.start()) + 1, match[0]) for match in matches)


def lost_semicolons(source: Path) -> list[int]:
    """Lines where a semicolon ends a call in prose: Typst takes it for the call's end and does not print it."""
    text = source.read_text(encoding="utf-8")
    scanner = _Scanner(text)
    scanner.split()
    return [text.count("\n", 0, at) + 1 for at in scanner.lost]


class _Scanner:
    """Splits Typst source into prose and code of the same length, blanks where the other is."""

    _KEYWORDS = re.compile(r"(?:let|set|show|import|include|if|for|while|return|context)\b")
    _SKIPPED = re.compile(r"(?<!:)//[^\n]*|/\*.*?\*/|``(?!`)|(`+)(?!`).*?\1", re.DOTALL)
    _IDENTIFIER = re.compile(r"[^\W\d][\w-]*")
    _STRING = re.compile(r'"(?:\\.|[^"\\])*"', re.DOTALL)

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lost: list[int] = []
        self.prose = [c if c == "\n" else " " for c in text]
        self.code = list(self.prose)

    def split(self) -> tuple[str, str]:
        self._markup(end=None)
        return "".join(self.prose), "".join(self.code)

    def _take(self, length: int, into: list[str] | None) -> None:
        if into is not None:
            into[self.at : self.at + length] = self.text[self.at : self.at + length]
        self.at += length

    def _skip(self) -> bool:
        match = self._SKIPPED.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return match is not None

    def _markup(self, end: str | None) -> None:
        while self.at < len(self.text) and self.text[self.at] != end:
            if self._skip():
                continue
            if self.text[self.at] == "#":
                self._take(1, None)
                self._expression()
                if self.text.startswith(";", self.at):
                    self.lost.append(self.at)
            elif self.text[self.at] == "\\":  # the next character stands for itself
                self._take(1, None)
                self._take(1, self.prose)
            elif self.text[self.at] == "[" and end:  # brackets of prose inside content nest
                self._take(1, self.prose)
                self._markup("]")
                self._take(1, self.prose)
            else:
                self._take(1, self.prose)

    def _expression(self) -> None:
        if self._KEYWORDS.match(self.text, self.at):
            self._code(end="\n")
        elif self.text.startswith(("(", "{", "["), self.at):
            self._bracket()
        elif self.text.startswith('"', self.at):
            self._string()
        else:
            self._take_identifier()
            while self.text.startswith(("(", "[", "."), self.at):
                if self.text[self.at] != ".":
                    self._bracket()
                elif self._IDENTIFIER.match(self.text, self.at + 1):
                    self._take(1, self.code)
                    self._take_identifier()
                else:  # the full stop of a sentence
                    return

    def _take_identifier(self) -> None:
        match = self._IDENTIFIER.match(self.text, self.at)
        self._take(len(match[0]) if match else 0, self.code)

    def _bracket(self) -> None:
        opening = self.text[self.at]
        self._take(1, None if opening == "[" else self.code)
        if opening == "[":
            self._markup("]")
        else:
            self._code(end=")" if opening == "(" else "}")
        self._take(1, None if opening == "[" else self.code)

    def _string(self) -> None:
        match = self._STRING.match(self.text, self.at)
        self._take(len(match[0]) if match else 1, self.prose)

    def _code(self, end: str) -> None:
        # A closing bracket always ends it: those inside are taken with their opening ones.
        while self.at < len(self.text) and self.text[self.at] not in (end, *")}]"):
            if self.text[self.at] in "({[":
                self._bracket()
            elif self.text[self.at] == '"':
                self._string()
            elif not self._skip():
                self._take(1, self.code)
