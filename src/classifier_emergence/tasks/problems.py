"""Arithmetic problems with answers, for training: split so that held-out operands are held out for every operation."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from classifier_emergence.errors import InputError
from classifier_emergence.tasks.arithmetic import N_TEMPLATES, SIGNS, frames
from classifier_emergence.tasks.prompts import PROMPTS

COMPUTE = {"multiply": int.__mul__, "add": int.__add__, "subtract": int.__sub__, "divide": int.__floordiv__}

COT_REPORTED: tuple[str, ...] = tuple(PROMPTS["chain_of_thought"])
"""The nine problems of the chain-of-thought write-up, in its order."""

NEUTRAL: tuple[str, ...] = tuple(PROMPTS["neutral"])
"""Sentences without numbers or operation words, on which training for arithmetic should change nothing."""


@dataclass(frozen=True)
class Problem:
    """One problem ``a op b``."""

    operation: str
    a: int
    b: int

    @property
    def symbol(self) -> str:
        """``7 * 8 =``."""
        return f"{self.a} {SIGNS[self.operation]} {self.b} ="

    @property
    def answer(self) -> str:
        """``56``."""
        return str(COMPUTE[self.operation](self.a, self.b))

    @property
    def operands(self) -> frozenset[int]:
        """The operand pair, whatever its order."""
        return frozenset((self.a, self.b))

    def prompt(self, style: str, template: int) -> str:
        """The problem in a style and template of ``tasks``."""
        return frames(style, self.operation)[template % N_TEMPLATES].format(a=self.a, b=self.b)

    @classmethod
    def parse(cls, text: str) -> "Problem":
        """From ``7 * 8`` or ``7 * 8 =``."""
        a, sign, b = text.removesuffix("=").split()
        return cls({s: operation for operation, s in SIGNS.items()}[sign], int(a), int(b))


@dataclass(frozen=True)
class ProblemSplit:
    """Problems to train on (all that are allowed) and to test on; no operand pair occurs in both."""

    train: dict[str, list[Problem]]
    test: list[Problem]


def split(
    ranges: Mapping[str, Sequence[int]], n_test: Mapping[str, int], *, seed: int, reserved: Collection[Problem] = ()
) -> ProblemSplit:
    """All problems within ranges, ``n_test[operation]`` of them held out with their operands.

    An operand pair that is tested with one operation is trained with none. Test problems come operation by operation
    in turn, so that any leading part of them is balanced.

    Args:
        ranges: Operation -> least and largest operand; for division of divisor and quotient, so that it is exact; a
            difference is never negative.
        n_test: Operation -> how many test problems.
        seed: Of the choice.
        reserved: Problems whose operand pairs may not be trained on either (the originals' prompts).

    Raises:
        InputError: An operation has too few problems.
    """
    random = np.random.default_rng(seed)
    candidates = {operation: _within(operation, *ends) for operation, ends in ranges.items()}
    kept_out = {problem.operands for problem in reserved}
    chosen: dict[str, list[Problem]] = {}
    for operation, problems in candidates.items():
        free = [problem for problem in problems if problem.operands not in kept_out]
        if len(free) <= n_test[operation]:
            raise InputError(f"operands.{operation}: {len(free)} problems, {n_test[operation]} of them to test on")
        chosen[operation] = [free[i] for i in random.permutation(len(free))[: n_test[operation]]]
    kept_out |= {problem.operands for problems in chosen.values() for problem in problems}
    train = {op: [problem for problem in ps if problem.operands not in kept_out] for op, ps in candidates.items()}
    for operation, problems in train.items():
        if not problems:
            raise InputError(f"operands.{operation}: nothing is left to train on; widen the range or test on fewer")
    most = max(map(len, chosen.values()))
    test = [problems[i] for i in range(most) for problems in chosen.values() if i < len(problems)]
    return ProblemSplit(train, test)


def sample(train: Mapping[str, Sequence[Problem]], n: int, *, seed: int) -> list[Problem]:
    """``n`` training problems: the operation uniform, then the problem uniform among that operation's."""
    random = np.random.default_rng(seed)
    operations = list(train)
    drawn = [operations[i] for i in random.integers(len(operations), size=n)]
    return [train[operation][int(random.integers(len(train[operation])))] for operation in drawn]


def _within(operation: str, low: int, high: int) -> list[Problem]:
    values = range(low, high + 1)
    if operation == "divide":
        return [Problem(operation, b * q, b) for b in values for q in values]
    pairs = ((a, b) for a in values for b in values if operation != "subtract" or a >= b)
    return [Problem(operation, a, b) for a, b in pairs]
