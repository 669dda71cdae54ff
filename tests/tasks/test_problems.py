"""Problems: answers against Python's arithmetic, and splits that no operand pair crosses."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classifier_emergence.errors import InputError
from classifier_emergence.tasks.arithmetic import N_TEMPLATES, OPERATIONS, STYLES
from classifier_emergence.tasks.problems import COT_REPORTED, Problem, sample, split

RANGES = {"multiply": (2, 12), "add": (5, 30), "subtract": (5, 30), "divide": (2, 12)}
N_TEST = dict.fromkeys(OPERATIONS, 10)
RESERVED = [Problem.parse(text) for text in COT_REPORTED]
seeds = st.integers(0, 2**32 - 1)
quick = settings(deadline=None, max_examples=50)


@quick
@given(seeds)
def test_no_operand_pair_is_trained_on_and_tested(seed: int) -> None:
    found = split(RANGES, N_TEST, seed=seed)
    tested = {frozenset((problem.a, problem.b)) for problem in found.test}
    for problems in found.train.values():
        assert tested.isdisjoint(frozenset((problem.a, problem.b)) for problem in problems)


@quick
@given(seeds)
def test_reserved_pairs_are_in_neither_part(seed: int) -> None:
    found = split(RANGES, N_TEST, seed=seed, reserved=RESERVED)
    reserved = {frozenset((problem.a, problem.b)) for problem in RESERVED}
    every = [*found.test, *(problem for problems in found.train.values() for problem in problems)]
    assert reserved.isdisjoint(frozenset((problem.a, problem.b)) for problem in every)


@quick
@given(seeds, st.integers(1, 10))
def test_any_leading_rounds_of_the_test_problems_are_balanced(seed: int, rounds: int) -> None:
    leading = split(RANGES, N_TEST, seed=seed).test[: rounds * len(OPERATIONS)]
    assert Counter(problem.operation for problem in leading) == dict.fromkeys(OPERATIONS, rounds)


def test_each_operation_gets_the_number_of_test_problems_asked_for() -> None:
    wanted = {"multiply": 3, "add": 0, "subtract": 7, "divide": 1}
    found = split(RANGES, wanted, seed=0).test
    assert len(set(found)) == len(found)
    assert Counter(problem.operation for problem in found) == Counter(wanted)


def test_no_problem_is_lost_but_for_held_out_pairs() -> None:
    found = split(RANGES, N_TEST, seed=0, reserved=RESERVED)
    held_out = {frozenset((problem.a, problem.b)) for problem in [*found.test, *RESERVED]}
    expected = {(a, b) for a in range(5, 31) for b in range(5, 31) if a >= b and frozenset((a, b)) not in held_out}
    assert [(problem.a, problem.b) for problem in found.train["subtract"]] == sorted(expected)


@quick
@given(seeds)
def test_answers_are_right_exact_and_never_negative(seed: int) -> None:
    found = split(RANGES, N_TEST, seed=seed)
    for problem in [*found.test, *sample(found.train, 50, seed=seed)]:
        a, b, answer = problem.a, problem.b, int(problem.answer)
        assert answer >= 0
        assert problem.answer == str(answer)
        if problem.operation == "divide":
            assert answer * b == a
            assert {b, answer} <= set(range(2, 13))
        else:
            assert answer == eval(problem.symbol.removesuffix("="))
            low, high = RANGES[problem.operation]
            assert low <= min(a, b) <= max(a, b) <= high


@quick
@given(seeds)
def test_the_same_seed_gives_the_same_split_and_sample(seed: int) -> None:
    first, second = split(RANGES, N_TEST, seed=seed), split(RANGES, N_TEST, seed=seed)
    assert first == second
    assert sample(first.train, 20, seed=seed) == sample(second.train, 20, seed=seed)


def test_another_seed_gives_another_split_and_sample() -> None:
    first, second = split(RANGES, N_TEST, seed=0), split(RANGES, N_TEST, seed=1)
    assert first.test != second.test
    assert sample(first.train, 20, seed=0) != sample(first.train, 20, seed=1)


def test_operations_are_sampled_alike_however_many_problems_they_have() -> None:
    train = split(RANGES, N_TEST, seed=0).train
    drawn = Counter(problem.operation for problem in sample(train, 4000, seed=0))
    assert len(train["add"]) > 4 * len(train["multiply"])
    assert all(900 < drawn[operation] < 1100 for operation in OPERATIONS)


@pytest.mark.parametrize(("n", "operation"), [(1, "divide"), (5, "multiply")])
def test_too_few_problems_are_refused_by_name(n: int, operation: str) -> None:
    ranges = {operation: (3, 4) if operation == "multiply" else (3, 3), "add": (5, 30)}
    with pytest.raises(InputError, match=rf"^operands\.{operation}: "):
        split(ranges, {operation: n, "add": 1}, seed=0)


def test_nothing_left_to_train_on_is_refused_by_name() -> None:
    # One of four products is tested; the sums that are tested take the operands of the others.
    ranges = {"multiply": (3, 4), "add": (2, 5)}
    with pytest.raises(InputError, match=r"^operands\.multiply: nothing is left"):
        split(ranges, {"add": 15, "multiply": 1}, seed=0)


@quick
@given(st.sampled_from(OPERATIONS), st.integers(0, 200), st.integers(1, 200))
def test_a_problem_is_read_back_from_its_symbol(operation: str, a: int, b: int) -> None:
    problem = Problem(operation, a, b)
    assert Problem.parse(problem.symbol) == Problem.parse(problem.symbol.removesuffix(" =")) == problem


@pytest.mark.parametrize("text", COT_REPORTED)
def test_every_reported_problem_is_read(text: str) -> None:
    problem = Problem.parse(text)
    assert problem.symbol == f"{text} ="
    assert problem.answer == str(eval(text))


@pytest.mark.parametrize("style", STYLES)
def test_a_prompt_names_both_operands_and_templates_differ(style: str) -> None:
    problem = Problem("subtract", 89, 34)
    prompts = [problem.prompt(style, template) for template in range(N_TEMPLATES)]
    assert all("89" in prompt and "34" in prompt for prompt in prompts)
    assert len(set(prompts)) == N_TEMPLATES
    assert problem.prompt(style, N_TEMPLATES) == prompts[0]
