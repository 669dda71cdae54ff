import json
import math
from pathlib import Path

import pytest
from number_snapshots import NumbersExtension

from classifier_emergence.results import ResultError

pytest_plugins = ["pytester"]

STORED = {
    "probe": {"accuracy": 0.81, "n": 200, "layers": ["L0", "L1"]},
    "lens": {"probability": [0.5, 0.25], "rank": 1000, "found": True, "p": None},
    "loss": 1.0,
}


def extension() -> NumbersExtension:
    return NumbersExtension()


def changed(where: str, value: object) -> dict:
    tree = json.loads(json.dumps(STORED))
    *path, last = where.split(".")
    node = tree
    for part in path:
        node = node[part]
    node[last] = value
    return tree


def matches(actual: object) -> bool:
    numbers = extension()
    return numbers.matches(serialized_data=numbers.serialize(actual), snapshot_data=numbers.serialize(STORED))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("probe.accuracy", 0.82),
        ("probe.accuracy", 0.80),
        ("lens.rank", 1020),
        ("lens.probability", [0.51, 0.245]),
        ("loss", 1.01),
    ],
)
def test_values_within_tolerance_match(where, value):
    assert matches(changed(where, value))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("probe.accuracy", 0.821),
        ("probe.accuracy", 0.799),
        ("probe.n", 201),
        ("probe.n", 200.0),
        ("probe.layers", ["L0"]),
        ("probe.layers", ["L0", "L2"]),
        ("probe.new", 1),
        ("lens.rank", 1021),
        ("lens.rank", 1000.0),
        ("lens.probability", [0.5, 0.2]),
        ("lens.found", 1),
        ("lens.found", False),
        ("lens.p", 0.0),
        ("loss", 1),
        ("loss", 1.02),
        ("loss", None),
    ],
)
def test_everything_else_differs(where, value):
    assert not matches(changed(where, value))


def test_a_dropped_key_differs():
    assert not matches({key: value for key, value in STORED.items() if key != "loss"})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_refused_by_its_key(value):
    with pytest.raises(ResultError, match=r"^probe\.accuracy: "):
        extension().serialize(changed("probe.accuracy", value))


def test_nan_in_a_stored_file_never_matches():
    text = '{"loss": NaN}'
    assert not extension().matches(serialized_data=text, snapshot_data=text)


def test_a_line_holds_what_stands_together_with_types_and_six_digits():
    small = {"int": 1, "float": 1.0, "none": None, "third": 1 / 3, "tiny": 1.23456789e-30}
    text = extension().serialize({"deep": {"small": small, "x": {"y": {"z": [[1], [2]]}}}, "wide": {"a": "a" * 160}})
    assert text.splitlines() == [
        "{",
        ' "deep.small": {"float": 1.0, "int": 1, "none": null, "third": 0.333333, "tiny": 1.23457e-30},',
        ' "deep.x.y": {"z": [[1], [2]]},',
        f' "wide.a": "{"a" * 160}"',
        "}",
    ]


def test_the_kind_of_a_number_comes_from_the_keys_above_it():
    numbers = extension()
    texts = [numbers.serialize({"a": {"accuracy": {"x": {"L0": value}}}}) for value in (0.5, 0.51, 0.53)]
    assert numbers.matches(serialized_data=texts[1], snapshot_data=texts[0])
    assert not numbers.matches(serialized_data=texts[2], snapshot_data=texts[0])


def test_the_difference_names_path_values_and_tolerance():
    numbers = extension()
    lines = numbers.diff_lines(numbers.serialize(changed("probe.accuracy", 0.9)), numbers.serialize(STORED))
    assert list(lines) == ["$.probe.accuracy: 0.81 != 0.9 (tolerance 0.01, accuracy)"]


PROJECT = """
import pytest
from number_snapshots import NumbersExtension

@pytest.fixture
def numbers(snapshot):
    return snapshot.use_extension(NumbersExtension)

def test_it(numbers):
    assert {"probe": {"accuracy": VALUE, "n": 200}} == numbers
"""


@pytest.fixture
def project(pytester):
    pytester.syspathinsert(Path(__file__).parent)

    def run(value: str, *args: str) -> tuple[pytest.RunResult, str]:
        pytester.makepyfile(test_sub=PROJECT.replace("VALUE", value))
        result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:hypothesispytest", *args)
        stored = pytester.path / "__snapshots__" / "test_sub" / "test_it.json"
        return result, stored.read_text() if stored.exists() else ""

    return run


def test_an_update_rewrites_only_what_left_its_tolerance(project):
    result, written = project("0.81", "--snapshot-update")
    assert result.ret == 0
    result, kept = project("0.815", "--snapshot-update")
    assert result.ret == 0
    assert kept == written
    result, rewritten = project("0.9", "--snapshot-update")
    assert result.ret == 0
    assert json.loads(rewritten)["probe"]["accuracy"] == 0.9


def test_a_failure_shows_the_path_and_a_missing_snapshot_fails(project):
    result, _ = project("0.81")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*Snapshot 'test_it' does not exist!*"])
    project("0.81", "--snapshot-update")
    result, _ = project("0.9")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*$.probe.accuracy: 0.81 != 0.9 (tolerance 0.01, accuracy)*"])
    result, _ = project("float('nan')")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*probe.accuracy: nan is not a finite number*"])
