"""Classification tasks: classes, the words that name them, prompts whose class is known; and the shipped ones.

The shipped tasks never say a class's word in a prompt, end alike for every class, and ask for an answer that is not
the word: what a probe, the lens or training finds about the class is then not merely read off the text.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from classifier_emergence.errors import InputError, did_you_mean
from classifier_emergence.tasks.arithmetic import OPERATIONS, Bank, prompt_bank
from classifier_emergence.tasks.problems import Problem
from classifier_emergence.tasks.prompts import PROMPTS


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
    items = []
    for prompt in bank:
        label, answer = OPERATIONS.index(prompt.operation), Problem(prompt.operation, *prompt.pair).answer
        items.append(Item(prompt.text, label, pairs.index(prompt.pair), prompt.template, f" {answer}"))
    return Task("arithmetic", OPERATIONS, OPERATIONS, tuple(items))


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
            for template, frame in enumerate(PROMPTS["comparison"]["frames"]):
                items.append(Item(frame.format(a=a, b=b), label, group, template, f" {max(a, b)}"))
    classes = ("larger", "smaller", "equal")
    return Task("comparison", classes, classes, tuple(items))


def places() -> Task:
    """What kind of place a name is, in prompts that ask for its continent.

    A group is a country with its capital and a river; the answer, its continent, says nothing about the class.
    """
    continents = PROMPTS["places"]["continents"]
    countries = [(names, continent) for continent, group in continents.items() for names in group]
    items = [
        Item(frame.format(x=name), label, group, template, f" {continent}")
        for group, (names, continent) in enumerate(countries)
        for (label, name), (template, frame) in product(enumerate(names), enumerate(PROMPTS["places"]["frames"]))
    ]
    classes = ("capital", "country", "river")
    return Task("places", classes, classes, tuple(items))


_SHIPPED = {"arithmetic": arithmetic, "comparison": comparison, "places": places}
TASKS = tuple(_SHIPPED)
"""Names of the shipped tasks."""


def get_task(name: str) -> Task:
    """A shipped task by name.

    Raises:
        InputError: There is none of this name.
    """
    if name not in _SHIPPED:
        hint = did_you_mean(name, TASKS, "choose one of {}, or give a file")
        raise InputError(f"task {name!r}: no such task; {hint}")
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
        seen: Counter[int] = Counter()
        turns = []
        for item in mine:
            turns.append(seen[item.template])
            seen[item.template] += 1
        chosen.append([mine[i] for i in np.argsort(turns, kind="stable")[:n]])
    return [item for row in zip(*chosen, strict=True) for item in row]
