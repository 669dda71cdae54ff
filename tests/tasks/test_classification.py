"""Tasks: what their prompts give away and what they must not, and files of strangers."""

import csv
import io
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classifier_emergence.errors import InputError
from classifier_emergence.tasks.arithmetic import prompt_bank
from classifier_emergence.tasks.classification import TASKS, Item, Task, balanced, get_task, load_task
from classifier_emergence.tasks.splits import rotations
from experiments.params import load_params

SHIPPED = {name: get_task(name) for name in TASKS}
tasks = pytest.mark.parametrize("task", SHIPPED.values(), ids=SHIPPED)
FRAMES = [re.escape(item.prompt).replace("Paris", "(.+)") for item in SHIPPED["places"].items[:8]]
quick = settings(deadline=None, max_examples=50)


def subject(task: Task, item: Item) -> str:
    """What an item is about: its operands in their order, or its name."""
    if task.name == "arithmetic":
        found = re.search(r"(\d+) ?[-+*/] ?(\d+)", item.prompt)
        assert found is not None
        return f"{found[1]} {found[2]}"
    if task.name == "comparison":
        return " ".join(re.findall(r"\d+", item.prompt)[:2])
    found = re.fullmatch(FRAMES[item.template], item.prompt)
    assert found is not None
    return found[1]


@tasks
def test_a_task_is_large_balanced_and_without_repeats(task: Task) -> None:
    assert task.name in TASKS
    assert len(task.items) >= 400
    assert len({item.prompt for item in task.items}) == len(task.items)
    assert len({item.template for item in task.items}) >= 6
    cells = Counter((item.label, item.template) for item in task.items)
    assert {label for label, _ in cells} == set(range(len(task.classes)))
    assert len(set(cells.values())) == 1
    assert len(cells) == len(task.classes) * len({item.template for item in task.items})


@tasks
def test_a_group_says_nothing_about_the_class(task: Task) -> None:
    by_group = defaultdict(Counter)
    for item in task.items:
        by_group[item.group][item.label] += 1
    for counts in by_group.values():
        assert set(counts) == set(range(len(task.classes)))
        assert len(set(counts.values())) == 1


@tasks
def test_what_an_item_is_about_stays_in_its_group(task: Task) -> None:
    groups = defaultdict(set)
    for item in task.items:
        groups[subject(task, item)].add(item.group)
    assert all(len(found) == 1 for found in groups.values())
    if task.name != "places":  # the other order of a pair, too
        pairs = {frozenset(pair.split()): found for pair, found in groups.items()}
        assert all(groups[pair] == pairs[frozenset(pair.split())] for pair in groups)


@tasks
def test_no_split_by_group_sees_a_subject_twice(task: Task) -> None:
    about = [subject(task, item) for item in task.items]
    for split in rotations([item.group for item in task.items], 4, seed=0):
        parts = [{about[i] for i in part} for part in (split.train, split.validation, split.test)]
        assert sum(map(len, parts)) == len(set(about))


@tasks
def test_no_prompt_holds_a_class_word(task: Task) -> None:
    assert len(set(task.words)) == len(task.classes)
    assert not [i.prompt for i in task.items if any(word in i.prompt.lower() for word in (*task.words, *task.classes))]


@tasks
def test_prompts_of_a_template_end_alike_whatever_the_class(task: Task) -> None:
    endings = defaultdict(set)
    for item in task.items:
        endings[item.template].add(item.prompt.rpartition(subject(task, item).split()[-1])[2])
    if task.name != "arithmetic":
        assert all(len(found) == 1 for found in endings.values())
    assert all(item.prompt == item.prompt.rstrip() for item in task.items)
    assert len({item.prompt[-1] for item in task.items if item.template == 0}) == 1


@tasks
def test_answers_have_their_leading_space_and_are_no_class_word(task: Task) -> None:
    for item in task.items:
        assert item.answer is not None
        assert re.fullmatch(r" \S.*", item.answer)
        assert item.answer.strip() not in task.words


def test_arithmetic_is_the_bank_of_the_paper_with_right_answers() -> None:
    items = SHIPPED["arithmetic"].items
    assert [item.prompt for item in items] == [prompt.text for prompt in prompt_bank("symbol", load_params().bank)]
    for item in items:
        problem = re.search(r"\d+ ?[-+*/] ?\d+", item.prompt)
        assert problem is not None
        assert eval(problem[0]) == int(str(item.answer))


def test_comparison_is_labelled_and_answered_right() -> None:
    task = SHIPPED["comparison"]
    for item in task.items:
        a, b = map(int, subject(task, item).split())
        assert task.classes[item.label] == ("larger" if a > b else "smaller" if a < b else "equal")
        assert item.answer == f" {max(a, b)}"


def test_larger_and_smaller_have_the_same_characters() -> None:
    by_cell = {(item.group, item.template, item.label): item.prompt for item in SHIPPED["comparison"].items}
    for (group, template, label), prompt in by_cell.items():
        if label == 0:
            assert sorted(prompt) == sorted(by_cell[group, template, 1])


def test_one_number_says_little_about_a_comparison() -> None:
    task = SHIPPED["comparison"]
    items = [item for item in task.items if item.label < 2 and item.template == 0]
    first = np.array([int(subject(task, item).split()[0]) for item in items])
    larger = np.array([item.label == 0 for item in items])
    best = max(np.mean((first > threshold) == larger) for threshold in range(100))
    assert best < 0.65


def test_places_have_one_continent_a_country_and_as_many_of_each_kind() -> None:
    task = SHIPPED["places"]
    of: dict[str, Item] = {}
    for item in task.items:
        other = of.setdefault(subject(task, item), item)
        assert (item.group, item.label, item.answer) == (other.group, other.label, other.answer)
    assert Counter(item.label for item in of.values()) == dict.fromkeys(range(3), len(of) // 3)
    expected = {
        "Paris": ("capital", " Europe"),
        "Kenya": ("country", " Africa"),
        "Ganges": ("river", " Asia"),
        "Kuala Lumpur": ("capital", " Asia"),
        "Essequibo": ("river", " South America"),
    }
    assert {name: (task.classes[of[name].label], of[name].answer) for name in expected} == expected
    assert of["Paris"].group == of["France"].group == of["Loire"].group


@pytest.mark.parametrize(
    ("name", "hint"), [("comparson", "did you mean 'comparison'?"), ("x\n\x1b", "choose one of arithmetic, ")]
)
def test_an_unknown_task_is_refused_in_one_line(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=re.escape(hint)) as caught:
        get_task(name)
    assert str(caught.value).isprintable()


@quick
@given(st.sampled_from(TASKS), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_balanced_draw_is_balanced_in_every_leading_part(name: str, n: int, seed: int) -> None:
    task = SHIPPED[name]
    drawn = balanced(task.items, n, seed=seed)
    assert drawn == balanced(task.items, n, seed=seed)
    assert len(set(drawn)) == len(drawn) == n * len(task.classes)
    assert set(drawn) <= set(task.items)
    templates = len({item.template for item in task.items})
    for rounds in range(1, n + 1):
        leading = drawn[: rounds * len(task.classes)]
        assert Counter(item.label for item in leading) == dict.fromkeys(range(len(task.classes)), rounds)
        cells = Counter((item.label, item.template) for item in leading)
        assert max(cells.values()) <= -(-rounds // templates)


def test_another_seed_draws_others() -> None:
    items = SHIPPED["places"].items
    assert set(balanced(items, 20, seed=0)) != set(balanced(items, 20, seed=1))


def test_a_draw_of_more_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match=r"^n: 121 items of every class, but class 0 has 120; "):
        balanced(SHIPPED["arithmetic"].items, 121, seed=0)


# --- Files ---

COLUMNS = ("prompt", "label", "word", "group", "template", "answer")


def written(folder: Path, rows: list[dict[str, str]], ending: str) -> Path:
    path = folder / f"mine.{ending}"
    if ending == "csv":
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        path.write_bytes(buffer.getvalue().encode())
    else:
        path.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    return path


def rows_of(task: Task) -> list[dict[str, str]]:
    return [
        {
            "prompt": item.prompt,
            "label": task.classes[item.label],
            "word": task.words[item.label],
            "group": f"g{item.group}",
            "template": f"t{item.template}",
            "answer": item.answer or "",
        }
        for item in task.items
    ]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@tasks
def test_a_shipped_task_survives_its_way_through_a_file(task: Task, ending: str, tmp_path: Path) -> None:
    loaded = load_task(written(tmp_path, rows_of(task), ending))
    assert loaded.name == "mine"
    assert (loaded.classes, loaded.words) == (task.classes, task.words)
    for item, other in zip(loaded.items, task.items, strict=True):
        assert (item.prompt, item.label, item.answer) == (other.prompt, other.label, other.answer)
    for what in ("group", "template"):
        pairs = {
            (getattr(item, what), getattr(other, what)) for item, other in zip(loaded.items, task.items, strict=True)
        }
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


HOSTILE = ["=cmd|' /C calc'!A0", "a,b\"c'", "line\nbreak\r\nand \u2028\x85\x0b", "\x00\x1b[2J", "\u202eevil", "\ufeff",
           "# | *", "👩‍👩‍👧 é e\u0301", "x" * 100_000]  # fmt: skip
texts = st.text(min_size=1, max_size=20).filter(lambda text: bool(text.strip()))


def check_kept(found: list[tuple[str, str]], folder: Path) -> None:
    """Prompts and classes come back as they were, from both kinds of file."""
    rows = [{"prompt": prompt, "label": label} for prompt, label in found]
    for ending in ("csv", "jsonl"):
        task = load_task(written(folder, rows, ending))
        assert [(item.prompt, task.classes[item.label]) for item in task.items] == found
        assert task.words == task.classes
        assert [item.group for item in task.items] == list(range(len(found)))
        assert {(item.template, item.answer) for item in task.items} == {(0, None)}


def test_hostile_prompts_are_kept_as_they_stand(tmp_path: Path) -> None:
    check_kept([(text, f"class {i % 2}") for i, text in enumerate(HOSTILE)], tmp_path)


@quick
@given(st.lists(texts, min_size=2, unique=True), st.lists(texts, min_size=2, max_size=3, unique=True))
def test_any_text_is_kept_as_it_stands(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], labels: list[str]
) -> None:
    found = [(prompt, labels[i % 2]) for i, prompt in enumerate(prompts)]
    check_kept(found, tmp_path_factory.mktemp("files"))


def test_equal_prompts_are_one_group_unless_said_otherwise(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,label\nx,one\ny,two\nx,one\n")
    assert [item.group for item in load_task(tmp_path / "a.csv").items] == [0, 1, 0]


def test_a_byte_order_mark_and_blank_lines_are_no_content(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("\ufeffprompt,label\r\nx,one\r\n\r\ny,two\r\n".encode())
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"prompt": "x", "label": "one"}\r\n\r\n{"prompt": "y", "label": "two"}\n'
    )
    assert load_task(tmp_path / "a.csv") == load_task(tmp_path / "a.jsonl")


def test_numbers_may_be_numbers_in_json(tmp_path: Path) -> None:
    lines = [{"prompt": p, "label": label, "group": 7, "template": "b"} for p, label in (("x", 0), ("y", 1))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = load_task(tmp_path / "a.jsonl")
    assert task.classes == ("0", "1")
    assert [item.group for item in task.items] == [0, 0]


def test_a_word_need_be_given_once_a_class(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,label,word\nx,one,\ny,two,second\nz,one,first\nv,two,\n")
    task = load_task(tmp_path / "a.csv")
    assert (task.classes, task.words) == (("one", "two"), ("first", "second"))


GOOD = '{"prompt": "x", "label": "one"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "unknown kind of file"),
        ("a.csv", b"", ":1: no column 'prompt'"),
        ("a.csv", b"prompt,label\n", "label: 0 classes; a task needs at least two"),
        ("a.csv", b"prompt,label\nx,one\n", "label: 1 classes"),
        ("a.csv", b"prompt\nx\n", ":1: no column 'label'"),
        ("a.csv", b"prompt,label,label\n", ":1: two columns of one name"),
        ("a.csv", b"prompt,lable\nx,one\n", ":1: column 'lable': unknown; did you mean 'label'?"),
        ("a.csv", b"prompt,label,=cmd\x1b\n", r":1: column '=cmd\x1b': unknown; known: prompt, label"),
        ("a.csv", b"prompt,label\nx,one\ny,two,three\n", ":3: 3 cells in 2 columns"),
        ("a.csv", b"prompt,label\nx\n", ":2: 1 cells in 2 columns"),
        ("a.csv", b'prompt,label\n"x" y,one\n', ":2: not valid CSV"),
        ("a.csv", b'prompt,label\nx,"one\n', ":2: not valid CSV"),
        ("a.csv", b"prompt,label\n" + b"x" * 200_000 + b",one\n", ":2: not valid CSV"),
        ("a.csv", b"prompt,label\n ,one\n", ":2: prompt: empty"),
        ("a.csv", b"prompt,label\nx,\n", ":2: label: empty"),
        ("a.csv", b"prompt,label\n\xff,one\n", "not UTF-8 at byte 13"),
        ("a.csv", b"prompt,label,word\nx,one, \n", ":2: word: only white space"),
        ("a.csv", b"prompt,label,word\nx,one,a\ny,one,b\n", ":3: word: 'b' for class 'one', 'a' above"),
        ("a.csv", b"prompt,label,word\nx,one,a\ny,two,a\n", "word: 'a' stands for both 'one' and 'two'"),
        ("a.csv", b"prompt,label,word\nx,one,two\ny,two,\n", "word: 'two' stands for both 'one' and 'two'"),
        ("a.csv", b"prompt,label\nx,one\nx,two\n", ":3: label: the same prompt has another one at "),
        ("a.csv", b"prompt,label,group\nx,one,1\nx,one,2\n", ":3: group: the same prompt has another one at "),
        ("a.csv", b"prompt,label,group\nx,one,1\ny,one,\n", ":3: group: given in some rows only"),
        ("a.jsonl", b"{", ":1: not valid JSON"),
        ("a.jsonl", GOOD.encode() + b"[1]", ":2: not an object"),
        ("a.jsonl", b"[" * 100_000, ":1: not valid JSON"),
        ("a.jsonl", b"9" * 10_000, ":1: not valid JSON"),
        ("a.jsonl", b'{"prompt": "x"}', ":1: label: empty"),
        ("a.jsonl", b'{"prompt": "x", "label": "a", "grop": 1}', ":1: column 'grop': unknown; did you mean 'group'?"),
        ("a.jsonl", b'{"prompt": 3, "label": "a"}', ":1: prompt: int; write text"),
        ("a.jsonl", b'{"prompt": "x", "label": true}', ":1: label: bool; write text or a whole number"),
        ("a.jsonl", b'{"prompt": "x", "label": NaN}', ":1: label: float; write text or a whole number"),
        ("a.jsonl", b'{"prompt": "x", "label": "a", "answer": ["b"]}', ":1: answer: list; write text"),
        ("a.jsonl", b'{"prompt": "\\ud800", "label": "a"}', ":1: prompt: half of a surrogate pair"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_task(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_missing_file_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv: cannot be read \(No such file"):
        load_task(tmp_path / "none.csv")
