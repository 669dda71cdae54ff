"""A classification task from a file of prompts and labels: CSV, TSV, JSON, JSON lines, Parquet, a saved dataset."""

import csv
import difflib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from classifier_emergence.errors import InputError, first_line
from classifier_emergence.extras import missing_extras_named
from classifier_emergence.tasks.classification import Item, Task

_Row = tuple[str, dict[str, Any]]
_REQUIRED, _NUMBERED = ("prompt", "label"), ("label", "group", "template", "answer")
_COLUMNS = (*_REQUIRED, "word", "group", "template", "answer")
_ALIASES = {"prompt": ("text",), "label": ("class",)}


def load_task(path: str | Path, columns: Mapping[str, str] | None = None) -> Task:
    """A task from a file, or from a folder of ``datasets``; UTF-8, and text is kept as it stands.

    The file is CSV with a header (its cells parted by commas, semicolons or tabs), TSV, JSON (an array of objects),
    JSON lines or Parquet.

    Columns (keys) are ``prompt``, ``label`` (the class's name) and, if wanted, ``word`` (what the vocabulary should
    say for the class; default its name), ``group`` and ``template`` (any names, see ``Item``) and ``answer`` (what
    should follow the prompt, with its leading space). Without ``group`` only equal prompts are a group; without
    ``template`` all have the same. Classes, groups and templates are numbered in order of appearance. ``text`` and
    ``class`` stand for ``prompt`` and ``label`` where those are missing; other columns are left alone. Labels, groups,
    templates and answers may be numbers or truth values; such an answer gets its leading space.

    Args:
        path: The file or folder.
        columns: Our name of a column -> the file's, where they differ.

    Raises:
        InputError: The file cannot be read, a row does not fit, a prompt has two labels or groups, a class two words,
            two classes the same word, or there are fewer than two classes. One line with file and line number.
    """
    path, columns = Path(path), columns or {}
    if unknown := set(columns) - set(_COLUMNS):
        raise InputError(
            f"columns: {_shown(min(unknown))} is not a column we know; known columns: {', '.join(_COLUMNS)}"
        )
    words: dict[str, str] = {}
    labels, groups, templates = _Numbers(), _Numbers(), _Numbers()
    first: dict[str, tuple[str, Item]] = {}
    items: list[Item] = []
    given: set[str] = set()
    for where, row in _rows(path, columns):
        split = {"group", "template"} & row.keys()
        if items and split != given:
            name = min(split ^ given)
            raise InputError(f"{where}: {name}: given in some rows only; give it in all of them or in none")
        given = split
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


def load_prompts(path: str | Path, columns: Mapping[str, str] | None = None) -> Iterator[str]:
    """The prompts of a file, one after the other; see ``load_task``, but nothing else is needed of a row.

    Raises:
        InputError: The file cannot be read, or a row has no prompt.
    """
    for _, row in _rows(Path(path), columns or {}, ("prompt",)):
        yield row["prompt"]


class _Numbers(dict[str, int]):
    """Numbers names in order of appearance."""

    def __missing__(self, name: str) -> int:
        self[name] = len(self)
        return self[name]


def _rows(
    path: Path, columns: Mapping[str, str], required: Sequence[str] = _REQUIRED
) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and filled cells of every row by our names, the required ones among them."""
    kind = "folder" if path.is_dir() else path.suffix.lower()
    if kind not in _READERS:
        kinds = ", ".join(ending for ending in _READERS if ending.startswith("."))
        raise InputError(f"{path}: unknown kind of file; name it after what it holds ({kinds}), or give a folder")
    ours: dict[str, str] = {}
    names: list[str] = []
    for where, row in _READERS[kind](path):
        if list(row) != names:
            first, names = not names, list(row)
            header = f"{path}:1" if kind in (".csv", ".tsv") else where
            ours = _ours(names, columns, header)
            if missing := first and next((name for name in required if name not in ours.values()), None):
                hint = f"name it with --columns {missing}=THEIRS; there are {_listed(names)}"
                raise InputError(f"{header}: no column {missing!r}; {hint}")
        cells = {ours[name]: _cell(ours[name], value, where) for name, value in row.items()
                 if name in ours and value is not None and value != ""}  # fmt: skip
        for name in required:
            if not cells.get(name, "").strip():
                raise InputError(f"{where}: {name}: empty; every row needs one")
        if "word" in cells and not cells["word"].strip():
            raise InputError(f"{where}: word: only white space; give a word or leave it out")
        yield where, cells


def _ours(names: Sequence[str], columns: Mapping[str, str], where: str) -> dict[str, str]:
    """Which column of a file is which of ours; others are left alone, but for what looks misspelt."""
    found: dict[str, str] = {}
    for name, theirs in columns.items():
        if theirs not in names:
            raise InputError(f"{where}: no column {_shown(theirs)}, given for {name}; there are {_listed(names)}")
        found[theirs] = name
    for name in _COLUMNS:
        candidates = (name, *_ALIASES.get(name, ()))
        free = [theirs for theirs in candidates if theirs in names and theirs not in found]
        if free and name not in found.values():
            found[free[0]] = name
    for theirs in names:
        near = difflib.get_close_matches(theirs, set(_COLUMNS) - set(found.values()), n=1, cutoff=0.8)
        if theirs not in found and near:
            hint = f"did you mean {near[0]!r}? If not, say --columns {near[0]}=NAME"
            raise InputError(f"{where}: column {_shown(theirs)}: unknown; {hint}")
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(_shown, names[:12])) or "none"


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # spreadsheets put a byte order mark in front
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a file that is there") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error


def _csv_rows(path: Path) -> Iterator[_Row]:
    text = _text(path)
    first = text.partition("\n")[0]
    # Spreadsheets write semicolons where the comma is the decimal sign.
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise InputError(f"{path}:1: two columns of one name; the first line names the columns: prompt,label,...")
        if not header:
            raise InputError(f"{path}:1: no column 'prompt'; the first line names the columns: prompt,label,...")
        for row in filter(None, reader):
            where = f"{path}:{reader.line_num}"
            if len(row) != len(header):
                what = {",": "commas", ";": "semicolons", "\t": "tabs"}[delimiter]
                raise InputError(f"{where}: {len(row)} cells in {len(header)} columns; quote cells that hold {what}")
            yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        where = f"{path}:{reader.line_num}"
        raise InputError(f"{where}: not valid CSV ({error}); quote cells as spreadsheets do") from error


def _jsonl_rows(path: Path) -> Iterator[_Row]:
    # Not splitlines(): JSON text may hold characters that it takes for line ends.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _object(_parsed(line, where), where)


def _json_rows(path: Path) -> Iterator[_Row]:
    """Of an array of objects, counted from 1."""
    rows = _parsed(_text(path), str(path))
    if not isinstance(rows, list):
        raise InputError(f"{path}: not an array of objects; write [{{...}}, ...], or name JSON lines .jsonl")
    for number, row in enumerate(rows, start=1):
        yield f"{path}:{number}", _object(row, f"{path}:{number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{where}: not valid JSON ({reason}); write one object a line, or an array of them") from error


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: not an object; write one object a line")
    return row


def _parquet_rows(path: Path) -> Iterator[_Row]:
    with missing_extras_named():
        from pyarrow import ArrowException, parquet
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet ({first_line(error)}); save it again") from error
    yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, start=1))


def _dataset_rows(path: Path) -> Iterator[_Row]:
    """Of a folder that ``datasets`` saved; numbers of classes become their names."""
    with missing_extras_named():
        from datasets import ClassLabel, DatasetDict, load_from_disk
    try:
        data = load_from_disk(str(path))
    except Exception as error:  # a folder of anything makes datasets stumble in any way
        reason = first_line(error)
        raise InputError(f"{path}: not a folder that datasets' save_to_disk wrote ({reason}); give one") from error
    if isinstance(data, DatasetDict):
        if len(data) > 1:
            raise InputError(
                f"{path}: splits {', '.join(data)}; name the folder of one, such as {path / next(iter(data))}"
            )
        (data,) = data.values()
    named = {name: kind for name, kind in data.features.items() if isinstance(kind, ClassLabel)}
    for number, row in enumerate(data, start=1):
        yield f"{path}:{number}", {name: named[name].int2str(value) if name in named and value is not None else value
                                   for name, value in row.items()}  # fmt: skip


_READERS: dict[str, Callable[[Path], Iterator[_Row]]] = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    "folder": _dataset_rows,
}


def _cell(name: str, value: Any, where: str) -> str:
    if isinstance(value, float) and value.is_integer():  # pandas makes them of numbers with gaps
        value = int(value)
    if isinstance(value, int) and name in _NUMBERED:
        text = str(value).lower() if isinstance(value, bool) else str(value)  # true, as JSON writes it
        return f" {text}" if name == "answer" else text
    if not isinstance(value, str):
        kinds = "text, a whole number or a truth value" if name in _NUMBERED else "text"
        raise InputError(f"{where}: {name}: {type(value).__name__}; write {kinds}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {name}: half of a surrogate pair is no text; correct the escape") from error
    return value


def _check_words(words: dict[str, str], path: Path) -> None:
    of: dict[str, str] = {}
    for label, word in words.items():
        if of.setdefault(word, label) != label:
            pair = f"{_shown(of[word])} and {_shown(label)}"
            raise InputError(f"{path}: word: {_shown(word)} stands for both {pair}; give each class its own")


def _shown(text: str) -> str:
    """Text of a stranger in a message: quoted, escaped, not too long."""
    return repr(text if len(text) <= 40 else f"{text[:39]}…")
