"""A classification task from a file of prompts and labels: CSV with a header, or JSON lines."""

import csv
import difflib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from classifier_emergence.errors import InputError
from classifier_emergence.tasks.classification import Item, Task

_REQUIRED, _NUMBERED = ("prompt", "label"), ("label", "group", "template")
_COLUMNS = (*_REQUIRED, "word", "group", "template", "answer")


def load_task(path: str | Path) -> Task:
    """A task from a CSV file with a header, or from JSON lines; UTF-8, and text is kept as it stands.

    Columns (keys) are ``prompt``, ``label`` (the class's name) and, if wanted, ``word`` (what the vocabulary should
    say for the class; default its name), ``group`` and ``template`` (any names, see ``Item``) and ``answer`` (what
    should follow the prompt, with its leading space). Without ``group`` only equal prompts are a group; without
    ``template`` all have the same. Classes, groups and templates are numbered in order of appearance.

    Raises:
        InputError: The file cannot be read, a row does not fit, a prompt has two labels or groups, a class two words,
            two classes the same word, or there are fewer than two classes. One line with file and line number.
    """
    path = Path(path)
    words: dict[str, str] = {}
    labels, groups, templates = _Numbers(), _Numbers(), _Numbers()
    first: dict[str, tuple[str, Item]] = {}
    items: list[Item] = []
    columns: set[str] = set()
    for where, row in _rows(path):
        split = {"group", "template"} & row.keys()
        if items and split != columns:
            name = min(split ^ columns)
            raise InputError(f"{where}: {name}: given in some rows only; give it in all of them or in none")
        columns = split
        label, prompt = row["label"], row["prompt"]
        word = row.get("word", words.get(label, ""))
        if word and words.setdefault(label, word) != word:
            raise InputError(f"{where}: word: {_shown(word)} for class {_shown(label)}, {_shown(words[label])} above")
        group, template = groups[row.get("group", prompt)], templates[row.get("template", "")]
        item = Item(prompt, labels[label], group, template, row.get("answer"))
        before, other = first.setdefault(prompt, (where, item))
        if (other.label, other.group) != (item.label, item.group):
            what = "label" if other.label != item.label else "group"
            raise InputError(f"{where}: {what}: the same prompt has another one at {before}; keep one of the two")
        items.append(item)
    if len(labels) < 2:
        raise InputError(f"{path}: label: {len(labels)} classes; a task needs at least two")
    chosen = {label: words.get(label, label) for label in labels}
    _check_words(chosen, path)
    return Task(path.stem, tuple(labels), tuple(chosen.values()), tuple(items))


class _Numbers(dict[str, int]):
    """Numbers names in order of appearance."""

    def __missing__(self, name: str) -> int:
        self[name] = len(self)
        return self[name]


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and filled cells of every row, prompt and label among them."""
    read = {".csv": _csv_rows, ".jsonl": _jsonl_rows}.get(path.suffix.lower())
    if read is None:
        raise InputError(f"{path}: unknown kind of file; name it .csv or .jsonl after what it holds")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # spreadsheets put a byte order mark in front
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a .csv or .jsonl file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    for where, row in read(path, text):
        for name in _REQUIRED:
            if not row.get(name, "").strip():
                raise InputError(f"{where}: {name}: empty; every row needs one")
        if "word" in row and not row["word"].strip():
            raise InputError(f"{where}: word: only white space; give a word or leave it out")
        yield where, row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        _check_columns(header, f"{path}:1")
        missing = [name for name in _REQUIRED if name not in header]
        if missing or len(set(header)) < len(header):
            problem = f"no column {missing[0]!r}" if missing else "two columns of one name"
            raise InputError(f"{path}:1: {problem}; the first line names the columns: prompt,label,...")
        for row in filter(None, reader):
            where = f"{path}:{reader.line_num}"
            if len(row) != len(header):
                raise InputError(f"{where}: {len(row)} cells in {len(header)} columns; quote cells that hold commas")
            yield where, {name: cell for name, cell in zip(header, row, strict=True) if cell}
    except csv.Error as error:
        where = f"{path}:{reader.line_num}"
        raise InputError(f"{where}: not valid CSV ({error}); quote cells as spreadsheets do") from error


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    # Not splitlines(): JSON text may hold characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise InputError(f"{where}: not valid JSON ({reason}); write one object a line") from error
        if not isinstance(row, dict):
            raise InputError(f"{where}: not an object; write one object a line")
        _check_columns(list(row), where)
        yield where, {name: _cell(name, value, where) for name, value in row.items() if value not in (None, "")}


def _cell(name: str, value: Any, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and name in _NUMBERED:
        return str(value)
    if not isinstance(value, str):
        kinds = "text or a whole number" if name in _NUMBERED else "text"
        raise InputError(f"{where}: {name}: {type(value).__name__}; write {kinds}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {name}: half of a surrogate pair is no text; correct the escape") from error
    return value


def _check_columns(names: Sequence[str], where: str) -> None:
    for name in names:
        if name not in _COLUMNS:
            near = difflib.get_close_matches(name, _COLUMNS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_COLUMNS)}"
            raise InputError(f"{where}: column {_shown(name)}: unknown; {hint}")


def _check_words(words: dict[str, str], path: Path) -> None:
    of: dict[str, str] = {}
    for label, word in words.items():
        if of.setdefault(word, label) != label:
            pair = f"{_shown(of[word])} and {_shown(label)}"
            raise InputError(f"{path}: word: {_shown(word)} stands for both {pair}; give each class its own")


def _shown(text: str) -> str:
    """Text of a stranger in a message: quoted, escaped, not too long."""
    return repr(text if len(text) <= 40 else f"{text[:39]}…")
