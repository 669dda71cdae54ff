"""Rewards for arithmetic: the number that a text answers with, and a guard around anyone's reward function."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from classifier_emergence.errors import InputError

Reward = Callable[[Sequence[str], Sequence[str], Sequence[str]], Sequence[float]]
"""``reward(prompts, completions, answers)``: one number for each completion."""

MOST_DIGITS = 1000
"""A longer run of digits is no answer to anything here, and Python refuses to convert one of more than 4300."""

_MINUS = (
    "-\N{MINUS SIGN}\N{HYPHEN}\N{NON-BREAKING HYPHEN}\N{FIGURE DASH}\N{EN DASH}"
    "\N{SMALL HYPHEN-MINUS}\N{FULLWIDTH HYPHEN-MINUS}"
)
_PLUS = "+\N{FULLWIDTH PLUS SIGN}"
_OPERATORS = _MINUS + _PLUS + "*/×·÷∗⋅∕xX^"
# One separator a number, and not the plain space: "12 345" may well be two numbers.
_SEPARATORS = ",'’_\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}"
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>[{_MINUS}{_PLUS}]\s?)?"
    rf"(?P<whole>\d{{1,3}}(?:(?P<separator>[{_SEPARATORS}])\d{{3}}(?:(?P=separator)\d{{3}})*)(?!\d)|\d+)"
    rf"(?P<rest>[.{_SEPARATORS}]\d+|[eE][+-]?\d+)?"
)
_RESTATED = re.compile(rf"[\s\d().{re.escape(_OPERATORS)}]*=")
_GOES_ON = re.compile(rf"\s*[{re.escape(_OPERATORS)}%]\s*\d")


def parse_answer(text: str) -> int | None:
    """The whole number that a text gives as its answer, or None.

    The rule: of the first line that is not blank, the first number, after the problem if the line restates it
    (``7 * 8 = 56``). What follows the number does not matter, further numbers included: the first one counts.

    * Digits of any script count, superscripts and fractions do not; leading zeros change nothing.
    * A sign stands before the number, with a space at most between: ``-``, ``+``, the minus sign and the dashes and
      full-width forms that people and models write for them.
    * Thousands may be set apart by commas, apostrophes, underscores or the narrow spaces of typesetting, if all of
      them are by the same: ``1,234,567``. Digits grouped in another way (``12,34``) are no number.
    * Decimals are whole if only zeros follow the point: ``56.0`` is 56, and 56.5 is no answer. Nor is a number in
      scientific notation, one that is part of a word (``x2``), or an expression (``7 * 8``, ``1/2``).
    """
    line = next((line for line in text.splitlines() if line.strip()), "")
    restated = _RESTATED.match(line)
    number = _NUMBER.search(line, restated.end() if restated else 0)
    if number is None or _GOES_ON.match(line, number.end()):
        return None
    rest = number["rest"] or ""
    if rest and not (rest[0] == "." and all(int(digit) == 0 for digit in rest[1:])):
        return None
    digits = re.sub(r"\D", "", number["whole"])
    if len(digits) > MOST_DIGITS:
        return None
    return -int(digits) if (number["sign"] or "")[:1] in tuple(_MINUS) else int(digits)


_REPORTED = (r"^(-?\d+)", r"=\s*(-?\d+)", r"is\s+(-?\d+)", r":\s*(-?\d+)", r"(-?\d+)\s*$")


def parse_reported(text: str) -> int | None:
    """The number that the originals' reward reads: the first of these patterns that occurs, its first occurrence.

    A number at the start; after ``=``; after ``is``; after ``:``; at the end.
    """
    for pattern in _REPORTED:
        number = re.search(pattern, text.strip())
        if number and len(number[1]) <= MOST_DIGITS:
            return int(number[1])
    return None


def exact(parse: Callable[[str], int | None]) -> Reward:
    """1 where the parsed number is the answer, else 0."""

    def reward(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [float(parse(text) == int(answer)) for text, answer in zip(completions, answers, strict=True)]

    reward.__qualname__ = f"exact({parse.__qualname__})"
    return reward


def name_of(reward: Reward) -> str:
    """What tells a reward from another in every process; of an object without a name it is its type's."""
    named: Any = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}.{named.__qualname__}"


def checked(reward: Reward) -> Reward:
    """The same reward function, whose mistakes name the prompt that caused them.

    Raises:
        InputError: From the returned function: ``reward`` raises, gives another number of rewards than there are
            completions, or gives something that is not a finite number.
    """

    def guarded(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        try:
            rewards = list(reward(prompts, completions, answers))
        except Exception as error:
            where = _culprit(reward, prompts, completions, answers)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"reward: raised for {where} ({reason}); fix the function") from error
        if len(rewards) != len(completions):
            where = f"prompt {prompts[0]!r} and those drawn with it"
            raise InputError(
                f"reward: gave {len(rewards)} rewards for {len(completions)} completions of {where}; give one for each"
            )
        for prompt, completion, value in zip(prompts, completions, rewards, strict=True):
            if not _is_finite(value):
                where = f"prompt {prompt!r} with completion {completion!r}"
                raise InputError(f"reward: {value!r} for {where} is not a finite number; give one, such as 0.0")
        return [float(value) for value in rewards]

    return guarded


def _is_finite(value: object) -> bool:
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        return False


def _culprit(reward: Reward, prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> str:
    """The first prompt for which the function raises also when asked alone."""
    for prompt, completion, answer in zip(prompts, completions, answers, strict=True):
        try:
            reward([prompt], [completion], [answer])
        except Exception:
            return f"prompt {prompt!r} with completion {completion!r}"
    return f"prompt {prompts[0]!r} and those drawn with it, though for none of them alone"
