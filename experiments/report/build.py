"""The paper: Typst source to PDF, and the checks that a compiler does not make.

Typst reads results, tables and figures itself. This module turns what may go wrong on the way into one line,
and finds what Typst lets pass: numbers typed by hand.
"""

import re
from pathlib import Path

import typst

from classifier_emergence.errors import InputError
from classifier_emergence.results import write_bytes_atomic


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
        case ("results", ledger):
            stage = Path(ledger).stem
        case ("paper", "tables" | "figures" as stage, _):
            pass
        case _:
            return "restore it from git"
    return f"run the stage that writes it: dvc repro {stage}"


# --- Numbers typed by hand ---

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


class _Scanner:
    """Splits Typst source into prose and code of the same length, blanks where the other is."""

    _KEYWORDS = re.compile(r"(?:let|set|show|import|include|if|for|while|return|context)\b")
    _SKIPPED = re.compile(r"(?<!:)//[^\n]*|/\*.*?\*/|``(?!`)|(`+)(?!`).*?\1", re.DOTALL)
    _IDENTIFIER = re.compile(r"[^\W\d][\w-]*")
    _STRING = re.compile(r'"(?:\\.|[^"\\])*"', re.DOTALL)

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
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
