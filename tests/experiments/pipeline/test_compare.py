import copy
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classifier_emergence.errors import InputError
from classifier_emergence.results import lookup, write_result
from experiments.pipeline.compare import RULES, Difference, Rule, compare_files, differences

KEYS = ["accuracy", "n", "rank", "log_p", "x", "interval"]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "a"])
)
TREES = st.recursive(
    LEAVES,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.sampled_from(KEYS), children, max_size=4),
    max_leaves=10,
)


@given(TREES)
@settings(deadline=None, max_examples=50)
def test_a_tree_equals_its_copy(tree):
    assert differences(tree, copy.deepcopy(tree)) == []


@given(TREES, TREES)
@settings(deadline=None, max_examples=50)
def test_agreement_does_not_hide_another_shape(a, b):
    def shape(tree):
        if isinstance(tree, dict):
            return {key: shape(item) for key, item in tree.items()}
        return [shape(item) for item in tree] if isinstance(tree, list) else type(tree)

    if shape(a) != shape(b):
        assert differences(a, b)


def kind(tree) -> list[str]:
    """Kinds by which the leaves of a tree are compared, in order, found by making every leaf wrong."""

    def wrong(node):
        if isinstance(node, dict):
            return {key: wrong(item) for key, item in node.items()}
        return [wrong(item) for item in node] if isinstance(node, list) else node + type(node)(1e6)

    return [difference.reason for difference in differences(tree, wrong(tree))]


@pytest.mark.parametrize(
    ("tree", "kinds"),
    [
        ({"accuracy": 0.5}, ["accuracy"]),
        ({"accuracy": {"L3": 0.5, "interval": [0.4, 0.6]}}, ["accuracy"] * 3),
        ({"test": {"interval": [0.4, 0.6], "chance": 0.25}}, ["accuracy"] * 3),
        ({"accuracy": {"median_rank": 3.0}}, ["rank"]),
        ({"rank": {"add": 3, "seed": 1, "n_prompts": 5, "layer": 7}}, ["rank", "exact", "exact", "exact"]),
        ({"lora_rank": 8}, ["exact"]),
        ({"correct": 7}, ["accuracy"]),
        ({"log_alignment": [[-1.0]]}, ["log-probability"]),
        (
            {"logits": [1.0], "logit_lens": 1.0, "logprob": 1.0},
            ["other", "log-probability", "log-probability"],
        ),
        ({"mean_cosine": {"value": 0.1, "interval": [0.0, 0.2]}}, ["cosine"] * 3),
        ({"alignment": {"multiply": 0.1}, "top_probability": 0.5}, ["probability"] * 2),
        ({"probing": 0.5, "parameter": 0.5}, ["other"] * 2),
        (
            {"contrast_p": 0.5, "p": 0.5, "p_value": [0.5], "top": 0.5},
            ["p-value", "p-value", "p-value", "other"],
        ),
        ({"alignment": 0.1, "by_operation": {"add": [0.1]}, "std": 0.1}, ["probability"] * 3),
        ({"train_loss": [0.5]}, ["loss"]),
        ({"entropy": 0.5, "top_id": 5}, ["other", "exact"]),
    ],
)
def test_the_kind_is_that_of_the_nearest_name_that_has_one(tree, kinds):
    assert kind(tree) == kinds


def agree(key, expected, actual, **beside):
    return not differences({key: expected, **beside}, {key: actual, **beside})


@pytest.mark.parametrize(
    ("key", "expected", "inside", "outside"),
    [
        ("best_rank", 20000, 20400, 20401),
        ("best_rank", 1, 3, 4),
        ("log_probability", -5.0, -5.001, -5.0011),
        ("p", 0.02, 0.03, 0.031),
        ("p", 0.8, 0.84, 0.841),
        ("train_loss", 2.0, 2.02, 2.021),
        ("cosine", 0.09, 0.0901, 0.09011),
        ("accuracy", 0.5, 0.52, 0.521),
        ("probability", 0.5, 0.51, 0.5101),
        ("probability", 1e-7, 1e-5, 1.1e-5),
        ("entropy", 2.0, 2.002, 2.0021),
        ("entropy", 0.0, 1e-6, 1.1e-6),
    ],
)
def test_tolerance_of_each_kind(key, expected, inside, outside):
    assert agree(key, expected, inside)
    assert agree(key, -expected, -inside)
    assert not agree(key, expected, outside)


@given(st.integers(3, 5000), st.data())
@settings(deadline=None, max_examples=50)
def test_two_of_n_examples_may_flip_and_not_three(n, data):
    successes = data.draw(st.integers(0, n - 3))

    def stored(k):
        return float(f"{k / n:.10g}")

    assert agree("accuracy", stored(successes), stored(successes + 2), n=n)
    assert not agree("accuracy", stored(successes), stored(successes + 3), n=n)
    assert agree("correct", successes, successes + 2, n=n)
    assert not agree("correct", successes, successes + 3, n=n)


def test_n_comes_from_the_nearest_object_around():
    tree = {"n": 1000, "accuracy": {"L0": 0.5, "few": {"accuracy": 0.5, "n": 10}}}
    other = {"n": 1000, "accuracy": {"L0": 0.502, "few": {"accuracy": 0.7, "n": 10}}}
    assert differences(tree, other) == []
    other["accuracy"]["L0"] = 0.503
    assert [str(d) for d in differences(tree, other)] == ["$.accuracy.L0: 0.5 != 0.503 (tolerance 0.002, accuracy)"]


@pytest.mark.parametrize("a", [1, 1.0, True, "1", None, [1], {"a": 1}, 0, False])
@pytest.mark.parametrize("b", [1, 1.0, True, "1", None, [1], {"a": 1}, 0, False])
def test_types_are_strict(a, b):
    same = type(a) is type(b) and a == b
    assert (differences({"accuracy": a}, {"accuracy": b}) == []) == (same or {type(a), type(b)} == {int})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_differs_even_from_itself(value):
    for pair in ((value, value), (1.0, value), (value, 1.0)):
        assert [d.reason for d in differences({"x": [pair[0]]}, {"x": [pair[1]]})] == ["not finite"]


def test_what_is_missing_new_or_of_another_length_is_named():
    found = differences({"a": [1, 2], "b": None, "c": "é"}, {"a": [1], "c": 2, "d": {"e": 1}})
    assert [str(d) for d in found] == [
        "$.a: 2 != 1 (length)",
        "$.b: None != nothing (missing)",
        "$.c: 'é' != 2 (type)",
        "$.d: nothing != {'e': 1} (new)",
    ]


def test_a_callers_rule_comes_first():
    expected = {"selected": {"layer": 3, "label": "L3"}, "accuracy": 0.5}
    actual = {"selected": {"layer": 4, "label": "L4"}, "accuracy": 0.6}
    assert [d.path for d in differences(expected, actual)] == ["accuracy", "selected.label", "selected.layer"]
    flips = Rule("choice", r"^(layer|label)$", absolute=math.inf, types=(int, str))
    assert [d.path for d in differences(expected, actual, rules=[flips, *RULES])] == ["accuracy"]
    actual["selected"]["layer"] = 4.0
    assert "selected.layer" in [d.path for d in differences(expected, actual, rules=[flips, *RULES])]


def test_paths_are_those_of_lookup():
    tree = {"a": [{"b": [1.0, 2.0]}]}
    (found,) = differences(tree, {"a": [{"b": [1.0, 3.0]}]})
    assert found == Difference("a.0.b.1", 2.0, 3.0, "other", 2e-3, 500.0)
    assert lookup(tree, found.path) == 2.0


def test_files(tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    write_result(a, {"accuracy": [0.5, 0.6], "n": 100, "token": "x"})
    write_result(b, {"accuracy": [0.5, 0.61], "n": 100, "token": "x"})
    close = compare_files(a, b)
    assert (close.values, close.differences, close.worst_path) == (4, [], "accuracy.1")
    assert close.worst == pytest.approx(0.5)
    same = compare_files(a, a)
    assert (same.worst, same.worst_path) == (0.0, "")
    write_result(b, {"accuracy": [0.5, 0.7], "n": 100, "token": "y"})
    far = compare_files(a, b)
    assert [d.path for d in far.differences] == ["accuracy.1", "token"]
    assert (far.worst, far.worst_path) == (math.inf, "token")
    with pytest.raises(InputError, match="no such result"):
        compare_files(a, tmp_path / "c.json")


@pytest.mark.parametrize(
    ("tokens", "agree"),
    [
        (["b", "a", "c", "d", "e"], True),  # near ties changed places
        (["a", "b", "c", "d", "f"], True),  # and one with what came next
        (["a", "b", "c", "g", "f"], False),
        (["a", "b", "c", "d"], False),
    ],
)
def test_top_tokens_may_change_places_and_a_fifth_of_them(tokens: list[str], agree: bool) -> None:
    found = differences({"top_tokens": [["a", "b", "c", "d", "e"]]}, {"top_tokens": [tokens]})
    assert (found == []) == agree


def test_what_an_unconverged_solver_left_is_compared_by_type_and_length_alone() -> None:
    def of(score: list[Any], tokens: list[str]) -> dict[str, Any]:
        return {"directions": {"reported": {"score": score, "top_tokens": tokens}}}

    expected = of([0.5, 1.0], ["a", "b"])
    assert differences(expected, of([0.9, -1.0], ["c", "d"])) == []
    assert [d.reason for d in differences(expected, of([0.5, 1], ["a", "b"]))] == ["type"]
    assert [d.reason for d in differences(expected, of([0.5], ["a", "b", "c"]))] == ["length", "length"]
    assert differences({"reported": {"score": 0.5}}, {"reported": {"score": 0.9}})  # of any other score nothing changes


def test_a_reply_may_be_worded_otherwise_but_not_become_wrong() -> None:
    expected = {"replies": [{"request": "Is it so?", "reply": "Yes.", "right": True}]}
    assert differences(expected, {"replies": [{"request": "Is it so?", "reply": "Yes, it is.", "right": True}]}) == []
    assert differences(expected, {"replies": [{"request": "Is it so?", "reply": "Yes.", "right": False}]})
    assert differences(expected, {"replies": [{"request": "Is it not?", "reply": "Yes.", "right": True}]})
