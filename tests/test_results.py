import dataclasses
import json
import math
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from classifier_emergence import results
from classifier_emergence.errors import InputError
from classifier_emergence.results import ResultError, lookup, plain, read_result, write_result

# Text without surrogates, which UTF-8 cannot hold.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(TEXT, children, max_size=4),
    max_leaves=12,
)


@dataclasses.dataclass(frozen=True)
class Curve:
    accuracy: torch.Tensor
    labels: tuple[str, ...]


def rounded(tree):
    if isinstance(tree, float):
        short = float(f"{tree:.10g}")
        return short if math.isfinite(short) else tree
    if isinstance(tree, list):
        return [rounded(item) for item in tree]
    if isinstance(tree, dict):
        return {key: rounded(item) for key, item in tree.items()}
    return tree


def types(tree):
    if isinstance(tree, list):
        return [types(item) for item in tree]
    if isinstance(tree, dict):
        return {key: types(item) for key, item in tree.items()}
    return type(tree)


@given(st.dictionaries(TEXT, TREES, max_size=4))
@settings(deadline=None, max_examples=40)
def test_what_is_written_is_read_back_to_ten_digits_with_its_types(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("r") / "x.json"
    write_result(path, tree)
    assert read_result(path) == rounded(tree)
    assert types(read_result(path)) == types(tree)
    first = path.read_bytes()
    write_result(path, read_result(path))
    assert path.read_bytes() == first


def test_the_form_of_a_file(tmp_path):
    path = tmp_path / "deep" / "er" / "x.json"
    write_result(path, {"b": [1, 0.1 + 0.2, None], "a": {"z": -0.0, "grid": [[1.0], []]}, "token": "Ġ 你"})
    lines = ["{", ' "a": {', '  "grid": [', "   [1.0],", "   []", "  ],", '  "z": 0.0', " },"]
    lines += [' "b": [1, 0.3, null],', ' "token": "Ġ 你"', "}", ""]
    assert path.read_bytes().decode() == "\n".join(lines)


def test_arrays_scalars_and_dataclasses_become_plain():
    curve = Curve(torch.tensor([0.5, 1.0], requires_grad=True), ("emb", "L0"))
    tree = plain(
        {
            "curve": curve,
            "scalars": (np.float32(0.5), np.int64(3), np.bool_(True), np.str_("x"), torch.tensor(2)),
            "array": np.array([[1, 2], [3, 4]]),
            "half": torch.tensor([0.5], dtype=torch.bfloat16),
        }
    )
    assert tree == {
        "curve": {"accuracy": [0.5, 1.0], "labels": ["emb", "L0"]},
        "scalars": [0.5, 3, True, "x", 2],
        "array": [[1, 2], [3, 4]],
        "half": [0.5],
    }
    assert [type(item) for item in tree["scalars"]] == [float, int, bool, str, int]


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"a": {"b": [1.0, math.nan]}}, r"^a\.b\.1: nan is not a finite number"),
        ({"a": np.array([[0.0, np.inf]])}, r"^a\.0\.1: inf is not a finite number"),
        ({"a": torch.tensor(float("-inf"))}, r"^a: -inf is not a finite number"),
        ({"a": {1: 2}}, r"^a: the key 1 is not text"),
        ({"a": {"b"}}, r"^a: set has no JSON form"),
        ({"a": Path("b")}, r"^a: PosixPath has no JSON form"),
        ({"a": 1j}, r"^a: complex has no JSON form"),
        ({"a": "\ud800"}, r"^a: '\\ud800' is not valid Unicode"),
        ({"\ud800": 1}, r"^a key of the result: '\\ud800' is not valid Unicode"),
        ([1], r"a result is an object with names, not list"),
    ],
)
def test_what_a_result_cannot_hold_is_named_and_nothing_is_written(tmp_path, payload, message):
    with pytest.raises(ResultError, match=message) as caught:
        write_result(tmp_path / "x.json", payload)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, error):
    path = tmp_path / "x.json"
    write_result(path, {"a": 1})

    def fail(*_):
        raise error

    monkeypatch.setattr(*{"fsync": (results.os, "fsync"), "replace": (Path, "replace")}[step], fail)
    with pytest.raises(error):
        write_result(path, {"a": 2})
    monkeypatch.undo()
    assert read_result(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_result_has_the_permissions_of_any_file_and_replaces_a_link(tmp_path):
    target, path, other = tmp_path / "target", tmp_path / "x.json", tmp_path / "other"
    target.write_text("old")
    path.symlink_to(target)
    write_result(path, {"a": 1})
    other.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    assert target.read_text() == "old"
    assert not path.is_symlink()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such result; run the stage that writes it: dvc repro"),
        (b"<<<<<<< HEAD", "not a valid result"),
        (b'{"a": NaN}', "it holds NaN"),
        (b"[1]", "but a list of 1; rerun: dvc repro"),
        (b"\xff", "not a valid result"),
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_result(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_result(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_result(tmp_path)


RESULT = {"layers": [{"accuracy": 0.5}, {"accuracy": 0.75}], "n": 4, "0": "zero"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers.1.accuracy", 0.75),
        ("layers.-2.accuracy", 0.5),
        ("n", 4),
        ("0", "zero"),
        ("layers.0", {"accuracy": 0.5}),
    ],
)
def test_lookup(key, value):
    assert lookup(RESULT, key) == value


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("layer", "layer: no 'layer' in the result, which is an object with 0, layers, n; correct the key"),
        ("layers.2.accuracy", "layers.2.accuracy: no '2' in layers, which is a list of 2; correct the key"),
        ("layers.first", "layers.first: no 'first' in layers, which is a list of 2; correct the key"),
        ("n.0", "n.0: no '0' in n, which is the value 4; correct the key"),
        ("", ": no '' in the result, which is an object with 0, layers, n; correct the key"),
    ],
)
def test_lookup_names_the_missing_part_and_what_exists(key, message):
    with pytest.raises(InputError) as caught:
        lookup(RESULT, key)
    assert str(caught.value) == message


def test_bytes_are_written_as_they_are(tmp_path):
    results.write_bytes_atomic(tmp_path / "x", b"a\r\n\x00")
    results.write_text_atomic(tmp_path / "y", "é\r\n")
    assert (tmp_path / "x").read_bytes() == b"a\r\n\x00"
    assert (tmp_path / "y").read_bytes() == b"\xc3\xa9\r\n"
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y"}


def test_a_written_result_is_strict_json(tmp_path):
    write_result(tmp_path / "x.json", {"a": 1e300, "b": 1e-300, "c": 10**30})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1e300, "b": 1e-300, "c": 10**30}
