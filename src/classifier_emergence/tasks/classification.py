"""Tasks: classes, the words that name them, and prompts whose class is known; shipped ones and those from a file.

The shipped tasks never say a class's word in a prompt, end alike for every class, and ask for an answer that is not
the word: what a probe, the lens or training finds about the class is then not merely read off the text.
"""

import csv
import difflib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from classifier_emergence.errors import InputError
from classifier_emergence.tasks.arithmetic import OPERATIONS, Bank, prompt_bank
from classifier_emergence.tasks.problems import Problem


@dataclass(frozen=True)
class Item:
    """One prompt with what a sound split must know about it. The read position is the prompt's last token."""

    prompt: str
    label: int
    """Index of the class."""
    group: int
    """Items that share what they are about (operands, a country): they go to training or to test together."""
    template: int
    """Index of the surface frame."""
    answer: str | None
    """What should follow the prompt, with its leading space: ``" 56"``; None if the task has no answers."""


@dataclass(frozen=True)
class Task:
    """A classification task on prompts."""

    name: str
    classes: tuple[str, ...]
    words: tuple[str, ...]
    """The word that the vocabulary should say for each class."""
    items: tuple[Item, ...]


def arithmetic() -> Task:
    """The operation of ``7 * 8 =``: the paper's bank of symbol prompts, operands alike for every operation."""
    bank = prompt_bank("symbol", Bank(seed=0, pairs=120, smallest=2, largest=13))
    pairs = list(dict.fromkeys(prompt.pair for prompt in bank))
    items = [
        Item(
            prompt.text,
            OPERATIONS.index(prompt.operation),
            pairs.index(prompt.pair),
            prompt.template,
            f" {Problem(prompt.operation, *prompt.pair).answer}",
        )
        for prompt in bank
    ]
    return Task("arithmetic", OPERATIONS, OPERATIONS, tuple(items))


_COMPARISON_FRAMES = (
    "max({a}, {b}) =",
    "The maximum of {a} and {b} is",
    "Bids: {a} and {b}. The highest was",
    "Q: maximum of {a} and {b}? A:",
    "Ann has {a}, Ben {b}. The winner has",
    "{a} or {b}, whichever is the most:",
    "sorted([{a}, {b}])[-1] =",
    "Monday {a}, Tuesday {b}, peak:",
)


def comparison() -> Task:
    """How the first number compares with the second, in prompts that ask for the maximum.

    A group is a pair of numbers in both orders, and its lower number twice: in whatever template, the tokens of
    "larger" and "smaller" are the same. Gaps (2 to 17) are small against the range (10 to 98), so that the size of one
    number says little.
    """
    items = []
    for group, low in enumerate(range(10, 82)):
        high = low + 2 + 5 * low % 16
        for label, (a, b) in enumerate([(high, low), (low, high), (low, low)]):
            for template, frame in enumerate(_COMPARISON_FRAMES):
                items.append(Item(frame.format(a=a, b=b), label, group, template, f" {max(a, b)}"))
    classes = ("larger", "smaller", "equal")
    return Task("comparison", classes, classes, tuple(items))


_PLACES_FRAMES = (
    "{x} is on the continent of",
    "The continent of {x} is",
    "Topic: {x}. Continent:",
    "Q: On which continent is {x}? A:",
    "Quiz: {x}. Which continent?",
    "Atlas, entry {x}, part of the world:",
    "Turn the globe to {x}. This part of the world is",
    "Write the continent after the name. {x} =",
)

_PLACES = {
    "Europe": """
        Paris, France, Loire; Berlin, Germany, Rhine; Rome, Italy, Tiber; Madrid, Spain, Ebro; Lisbon, Portugal, Tagus;
        Vienna, Austria, Danube; Budapest, Hungary, Tisza; Belgrade, Serbia, Drina; Bucharest, Romania, Prut;
        Sofia, Bulgaria, Maritsa; Warsaw, Poland, Vistula; Prague, Czechia, Vltava; Bern, Switzerland, Aare;
        Brussels, Belgium, Scheldt; Amsterdam, Netherlands, Meuse; London, England, Thames; Edinburgh, Scotland, Clyde;
        Cardiff, Wales, Severn; Dublin, Ireland, Shannon; Kyiv, Ukraine, Dnieper; Minsk, Belarus, Berezina;
        Vilnius, Lithuania, Neman; Riga, Latvia, Daugava; Oslo, Norway, Glomma; Zagreb, Croatia, Sava""",
    "Asia": """
        Beijing, China, Yangtze; New Delhi, India, Ganges; Tokyo, Japan, Shinano; Hanoi, Vietnam, Mekong;
        Bangkok, Thailand, Chao Phraya; Naypyidaw, Myanmar, Irrawaddy; Baghdad, Iraq, Tigris;
        Damascus, Syria, Euphrates; Tehran, Iran, Karun; Islamabad, Pakistan, Indus; Dhaka, Bangladesh, Meghna;
        Kathmandu, Nepal, Gandaki; Kabul, Afghanistan, Helmand; Ulaanbaatar, Mongolia, Orkhon; Beirut, Lebanon, Litani;
        Jakarta, Indonesia, Kapuas; Kuala Lumpur, Malaysia, Rajang; Astana, Kazakhstan, Irtysh""",
    "Africa": """
        Cairo, Egypt, Nile; Addis Ababa, Ethiopia, Awash; Nairobi, Kenya, Tana; Accra, Ghana, Volta;
        Abuja, Nigeria, Benue; Lusaka, Zambia, Zambezi; Harare, Zimbabwe, Limpopo; Gaborone, Botswana, Okavango;
        Dodoma, Tanzania, Rufiji; Mogadishu, Somalia, Shebelle; Rabat, Morocco, Moulouya; Tunis, Tunisia, Medjerda;
        Luanda, Angola, Cuanza; Windhoek, Namibia, Kunene""",
    "South America": """
        Brasilia, Brazil, Amazon; Lima, Peru, Ucayali; Bogota, Colombia, Magdalena; Caracas, Venezuela, Orinoco;
        Santiago, Chile, Biobio; Buenos Aires, Argentina, Salado; Georgetown, Guyana, Essequibo""",
}
"""Continent -> capital, country, river; "; " between countries."""


def places() -> Task:
    """What kind of place a name is, in prompts that ask for its continent.

    A group is a country with its capital and a river; the answer, its continent, says nothing about the class.
    """
    countries = [(group.split(","), place) for place, text in _PLACES.items() for group in text.split(";")]
    items = [
        Item(frame.format(x=name.strip()), label, group, template, f" {continent}")
        for group, (names, continent) in enumerate(countries)
        for (label, name), (template, frame) in product(enumerate(names), enumerate(_PLACES_FRAMES))
    ]
    classes = ("capital", "country", "river")
    return Task("places", classes, classes, tuple(items))


_SHIPPED: dict[str, Callable[[], Task]] = {"arithmetic": arithmetic, "comparison": comparison, "places": places}
TASKS = tuple(_SHIPPED)
"""Names of the shipped tasks."""


def get_task(name: str) -> Task:
    """A shipped task by name.

    Raises:
        InputError: There is none of this name.
    """
    if name not in _SHIPPED:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(TASKS)}, or give a file"
        raise InputError(f"task {_shown(name)}: no such task; {hint}")
    return _SHIPPED[name]()


def balanced(items: Sequence[Item], n: int, *, seed: int) -> list[Item]:
    """``n`` items of every class, drawn at random, templates as evenly as can be; classes in turn.

    Any leading part is balanced, too.

    Raises:
        InputError: A class has fewer than ``n`` items.
    """
    random = np.random.default_rng(seed)
    chosen = []
    for label in sorted({item.label for item in items}):
        mine = [items[i] for i in random.permutation(len(items)) if items[i].label == label]
        if len(mine) < n:
            raise InputError(f"n: {n} items of every class, but class {label} has {len(mine)}; ask for at most that")
        seen: dict[int, int] = {}
        turns = []
        for item in mine:
            turns.append(seen.get(item.template, 0))
            seen[item.template] = turns[-1] + 1
        chosen.append([mine[i] for i in np.argsort(turns, kind="stable")[:n]])
    return [item for row in zip(*chosen, strict=True) for item in row]


# --- Tasks from files ---

_REQUIRED, _OPTIONAL = ("prompt", "label"), ("word", "group", "template", "answer")
_NUMBERED = ("label", "group", "template")


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
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: unknown kind of file; name it .csv or .jsonl after what it holds")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # spreadsheets put a byte order mark in front
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a .csv or .jsonl file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error

    words: dict[str, str] = {}
    labels, groups, templates = _Numbers(), _Numbers(), _Numbers()
    first: dict[str, tuple[str, Item]] = {}
    items: list[Item] = []
    columns: set[str] = set()
    for where, row in readers[path.suffix.lower()](path, text):
        _check(row, where)
        split = {"group", "template"} & row.keys()
        if items and split != columns:
            name = min(split ^ columns)
            raise InputError(f"{where}: {name}: given in some rows only; give it in all of them or in none")
        columns = split
        label, prompt = row["label"], row["prompt"]
        word = row.get("word", words.get(label, ""))
        if word and words.setdefault(label, word) != word:
            raise InputError(f"{where}: word: {_shown(word)} for class {_shown(label)}, {_shown(words[label])} above")
        item = Item(
            prompt,
            labels[label],
            groups[row.get("group", prompt)],
            templates[row.get("template", "")],
            row.get("answer"),
        )
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


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Place and filled cells of every row."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        _check_columns(header, f"{path}:1")
        missing = [name for name in _REQUIRED if name not in header]
        if missing or len(set(header)) < len(header):
            problem = f"no column {missing[0]!r}" if missing else "two columns of one name"
            raise InputError(f"{path}:1: {problem}; the first line names the columns: prompt,label,...")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if row and len(row) != len(header):
                raise InputError(f"{where}: {len(row)} cells in {len(header)} columns; quote cells that hold commas")
            if row:
                yield where, {name: cell for name, cell in zip(header, row, strict=True) if cell}
    except csv.Error as error:
        raise InputError(
            f"{path}:{reader.line_num}: not valid CSV ({error}); quote cells as spreadsheets do"
        ) from error


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
    known = (*_REQUIRED, *_OPTIONAL)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise InputError(f"{where}: column {_shown(name)}: unknown; {hint}")


def _check(row: dict[str, str], where: str) -> None:
    for name in _REQUIRED:
        if not row.get(name, "").strip():
            raise InputError(f"{where}: {name}: empty; every row needs one")
    if not row.get("word", row["label"]).strip():
        raise InputError(f"{where}: word: only white space; give a word or leave it out")


def _check_words(words: dict[str, str], path: Path) -> None:
    of: dict[str, str] = {}
    for label, word in words.items():
        if of.setdefault(word, label) != label:
            pair = f"{_shown(of[word])} and {_shown(label)}"
            raise InputError(f"{path}: word: {_shown(word)} stands for both {pair}; give each class its own")


def _shown(text: str) -> str:
    """Text of a stranger in a message: quoted, escaped, not too long."""
    return repr(text if len(text) <= 40 else f"{text[:39]}…")
