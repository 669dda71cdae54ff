"""Numbers in texts as people and models write them, and reward functions that go wrong."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from classifier_emergence.errors import InputError
from classifier_emergence.training.rl.rewards import MOST_DIGITS, checked, exact, parse_answer, parse_reported

MINUS = "-−‐‑‒–﹣－"
SEPARATORS = ",'’_\u00a0\u202f\u2009"
ZEROS = "0٠०๐０𝟎"  # ASCII, Arabic-Indic, Devanagari, Thai, full-width, mathematical bold
words = st.text(alphabet=st.characters(categories=["Lu", "Ll", "Zs"]), max_size=12)
# Something that cannot belong to a number, so that what stands before or after is text.
before = st.sampled_from(["", " ", "The answer is ", "answer: ", "= ", "$", "(", "**", "\n \n", "'", "≈"])
after = st.sampled_from(
    ["", ".", " apples", "apples", "!", ")", " (of course)", "\nNext: 5 + 5 = 10", ", or so", " 99"]
)


def grouped(digits: str, separator: str) -> str:
    first = len(digits) % 3 or 3
    return separator.join([digits[:first], *(digits[i : i + 3] for i in range(first, len(digits), 3))])


@given(
    value=st.integers(0, 10**12),
    sign=st.sampled_from(["", "+", "＋", *MINUS]),
    space=st.sampled_from(["", " "]),
    zeros=st.integers(0, 3),
    zero=st.sampled_from(ZEROS),
    separator=st.sampled_from(["", *SEPARATORS]),
    decimals=st.sampled_from(["", ".0", ".00"]),
    lead=before,
    tail=after,
)
@example(value=56, sign="", space="", zeros=0, zero="0", separator="", decimals="", lead=" ", tail="\n")
def test_a_number_is_found_however_it_is_written(
    value: int, sign: str, space: str, zeros: int, zero: str, separator: str, decimals: str, lead: str, tail: str
) -> None:
    digits = "0" * zeros + str(value)
    if separator:
        digits = grouped(digits, separator)
    digits = "".join(chr(ord(zero) + int(c)) if c.isascii() and c.isdigit() else c for c in digits)
    text = lead + (sign + space if sign else "") + digits + decimals + tail
    assert parse_answer(text) == (-value if sign and sign in MINUS else value)


@given(words)
def test_text_without_digits_has_no_answer(text: str) -> None:
    assert parse_answer(text) is None
    assert parse_reported(text) is None


@given(st.text())
@example("9" * 5000)
@example("1" + ",000" * 2000)
@example("0." + "0" * 5000)
@example("-" * 5000 + "=")
@example("7 * " * 2000)
def test_no_text_breaks_the_parsers(text: str) -> None:
    for parse in (parse_answer, parse_reported):
        found = parse(text)
        assert found is None or abs(found) < 10**MOST_DIGITS


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 7 * 8 = 56", 56),  # the problem restated
        ("7 × 8 = 56, as 8 × 7 = 56", 56),
        ("x = -5", -5),
        ("56 or 57", 56),  # the first one counts
        ("56, 57", 56),
        ("Not 54 but 56", 54),
        ("\n\n56\n57", 56),
        ("-7", -7),
        ("0", 0),
        ("-0", 0),
        ("5²", 5),  # a superscript is no digit
        ("½", None),
        ("56.5", None),
        ("1/2", None),
        ("7 * 8", None),
        ("56-57", None),
        ("5e3", None),
        ("12,34", None),
        ("1,2345", None),
        ("1,234'567", None),
        ("1.234,5", None),
        (".5", None),
        ("x2", None),
        ("", None),
        ("\n", None),
        ("three", None),
    ],
)
def test_the_rule_on_cases_that_could_be_read_in_two_ways(text: str, answer: int | None) -> None:
    assert parse_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("56 is right", 56),
        ("7 * 8 = 56 and it is 57", 7),  # the start comes before =
        ("so: 55 = 56", 56),  # = before :
        ("it is 56: 57", 56),  # is before :
        ("we get: -3 or so", -3),
        ("surely 56", 56),
        ("surely 56 or more", None),
        ("- 5", 5),
        ("1,234", 1),
    ],
)
def test_the_originals_rule_takes_the_first_pattern_that_occurs(text: str, answer: int | None) -> None:
    assert parse_reported(text) == answer


@given(st.integers(-999, 999), st.integers(-999, 999))
def test_the_reward_is_one_for_the_answer_only(value: int, answer: int) -> None:
    for parse in (parse_answer, parse_reported):
        assert list(exact(parse)(["p"], [f"{value}\n"], [str(answer)])) == [float(value == answer)]


PROMPTS, COMPLETIONS, ANSWERS = ["1 + 1 =", "2 + 2 =", "3 + 3 ="], ["2", "x", "7"], ["2", "4", "6"]


def test_a_sound_reward_passes_unchanged() -> None:
    reward = exact(parse_answer)
    assert checked(reward)(PROMPTS, COMPLETIONS, ANSWERS) == reward(PROMPTS, COMPLETIONS, ANSWERS) == [1.0, 0.0, 0.0]


def raises(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    return [float(text) for text in completions]


def raises_together(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    if len(prompts) > 1:
        raise RuntimeError("too\nmany")
    return [0.0]


def constant(*values: Any) -> Callable[..., Any]:
    return lambda *_: list(values)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (raises, ["'2 + 2 ='", "'x'", "ValueError"]),
        (raises_together, ["'1 + 1 ='", "too many"]),
        (constant(1.0, math.nan, 0.0), ["'2 + 2 ='", "nan"]),
        (constant(1.0, 0.0, math.inf), ["'3 + 3 ='", "inf"]),
        (constant(None, 0.0, 0.0), ["'1 + 1 ='", "None"]),
        (constant("1", 0.0, 0.0), ["'1 + 1 ='", "'1'"]),
        (constant(1.0, 0.0), ["2 rewards for 3", "'1 + 1 ='"]),
        (constant(1.0, 0.0, 0.0, 0.0), ["4 rewards for 3"]),
        (lambda *_: 1.0, ["'1 + 1 ='", "TypeError"]),
    ],
)
def test_a_reward_that_goes_wrong_names_the_prompt_in_one_line(reward: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        checked(reward)(PROMPTS, COMPLETIONS, ANSWERS)
    message = str(error.value)
    assert message.startswith("reward: ")
    assert "\n" not in message
    assert all(word in message for word in words)
