"""Tasks from files of strangers: text is kept as it stands, and what does not fit is refused in one line."""

import csv
import io
import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from classifier_emergence.errors import InputError
from classifier_emergence.tasks.classification import TASKS, Task, get_task
from classifier_emergence.tasks.files import load_task

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
@pytest.mark.parametrize("name", TASKS)
def test_a_shipped_task_survives_its_way_through_a_file(name: str, ending: str, tmp_path: Path) -> None:
    task = get_task(name)
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


@settings(deadline=None, max_examples=50)
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
        (
            "a.csv",
            b"prompt,=cmd\x1b\nx,one\n",
            r":1: no column 'label'; name it with --columns label=THEIRS; there are",
        ),
        ("a.csv", b"prompt;label\nx;one\ny;two;three\n", ":3: 3 cells in 2 columns; quote cells that hold semicolons"),
        ("a.tsv", b"prompt\tlabel\nx\tone\ty\n", ":2: 3 cells in 2 columns; quote cells that hold tabs"),
        ("a.json", b'{"prompt": "x"}', "not an array of objects"),
        ("a.json", b'[{"prompt": "x", "label": 1}, 3]', ":2: not an object"),
        ("a.parquet", b"PAR1", "cannot be read as Parquet"),
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
        ("a.jsonl", b'{"prompt": "x"}', ":1: no column 'label'"),
        ("a.jsonl", b'{"prompt": "x", "label": "a", "grop": 1}', ":1: column 'grop': unknown; did you mean 'group'?"),
        ("a.jsonl", b'{"prompt": 3, "label": "a"}', ":1: prompt: int; write text"),
        ("a.jsonl", GOOD.encode() + b'{"prompt": "y"}', ":2: label: empty"),
        ("a.jsonl", b'{"prompt": "x", "label": NaN}', ":1: label: float; write text, a whole number or a truth value"),
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


ROWS = [{"id": 7, "text": "x", "class": True, "answer": 56}, {"id": 8, "text": "y", "class": False, "answer": 3}]


@pytest.mark.parametrize("kind", ["csv", "semicolons", "tabs", "tsv", "json", "jsonl", "parquet", "dataset", "splits"])
def test_files_as_people_have_them(kind: str, tmp_path: Path) -> None:
    path = tmp_path / {"semicolons": "a.csv", "tabs": "a.csv", "dataset": "a", "splits": "a"}.get(kind, f"a.{kind}")
    if delimiter := {"csv": ",", "semicolons": ";", "tabs": "\t", "tsv": "\t"}.get(kind):
        lines = [["", "text", "class", "answer"], ["0", "x", "true", " 56"], ["1", "y", "false", " 3"]]
        path.write_text("".join(f"{delimiter.join(line)}\n" for line in lines))
    elif kind.startswith("json"):
        path.write_text(json.dumps(ROWS) if kind == "json" else "\n".join(map(json.dumps, ROWS)))
    elif kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        named = Dataset.from_list([{**row, "class": int(row["class"])} for row in ROWS])
        named = named.cast_column("class", ClassLabel(names=["false", "true"]))
        (DatasetDict({"train": named}) if kind == "splits" else named).save_to_disk(path)
    task = load_task(path)
    assert [(item.prompt, task.classes[item.label], item.answer) for item in task.items] == [
        ("x", "true", " 56"),
        ("y", "false", " 3"),
    ]


def test_columns_of_other_names_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,kind,label\nx,one,1\ny,two,2\n")
    task = load_task(tmp_path / "a.csv", {"prompt": "question", "label": "kind"})
    assert (task.classes, [item.prompt for item in task.items]) == (("one", "two"), ["x", "y"])
    for columns, message in (
        ({"prompt": "nowhere"}, ":1: no column 'nowhere', given for prompt; there are 'question', 'kind', 'label'"),
        ({"promt": "question"}, "columns: 'promt' is not a column we know"),
    ):
        with pytest.raises(InputError, match=message):
            load_task(tmp_path / "a.csv", columns)


def test_a_dataset_of_several_splits_is_not_guessed_at(tmp_path: Path) -> None:
    data = Dataset.from_list(ROWS)
    DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "a")
    with pytest.raises(InputError, match=r"a: splits train, test; name the folder of one, such as .*a/train"):
        load_task(tmp_path / "a")
    assert len(load_task(tmp_path / "a" / "train").items) == 2
    with pytest.raises(InputError, match="not a folder that datasets' save_to_disk wrote"):
        load_task(tmp_path)
