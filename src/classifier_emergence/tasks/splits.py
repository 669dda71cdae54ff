"""Held-out groups: splits in which no group of items (operands, templates) stands in two parts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rotation:
    """Indices of one rotation of held-out groups; no group (operand pair or template) occurs in two parts."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def rotations(groups: Sequence[object], folds: int, *, seed: int) -> Iterator[Rotation]:
    """Rotate held-out groups: fold k is the test set once, fold k+1 the validation set, the others train.

    Groups are dealt into folds at random, so over all rotations every item is tested exactly once.

    Args:
        groups: The group of each item; items of one group stay together.
        folds: Number of folds, at least 3 and at most the number of groups.
        seed: Of the deal.
    """
    names = sorted(set(groups), key=repr)
    order = np.random.default_rng(seed).permutation(len(names))
    fold_of = {names[j]: position % folds for position, j in enumerate(order)}
    fold = np.array([fold_of[group] for group in groups])
    for k in range(folds):
        test, validation = fold == k, fold == (k + 1) % folds
        yield Rotation(np.flatnonzero(~test & ~validation), np.flatnonzero(validation), np.flatnonzero(test))
