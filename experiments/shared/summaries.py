"""Numbers with their uncertainty, and over seeds, as results hold them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from classifier_emergence.statistics import Proportion, bootstrap_mean, newcombe_difference


def share_of(hits: ArrayLike, confidence: float) -> Proportion:
    """Accuracy with its Wilson interval."""
    array = np.asarray(hits, dtype=bool)
    return Proportion.of(array, np.ones_like(array), confidence=confidence)


def accuracy_curve(correct: ArrayLike, confidence: float) -> dict[str, Any]:
    """Accuracy over the last axis of ``correct`` (layers, n) with the Wilson interval of every layer."""
    rows = np.asarray(correct, dtype=bool)
    shares = [share_of(row, confidence) for row in rows]
    return {
        "n": rows.shape[-1],
        "accuracy": [share.accuracy for share in shares],
        "interval": [share.interval for share in shares],
    }


def mean_of(
    values: ArrayLike, confidence: float, resamples: int, *, clusters: ArrayLike | None = None, seed: int = 0
) -> dict[str, Any]:
    """Mean over the last axis with its bootstrap interval, which resamples whole clusters if there are any."""
    array = np.asarray(values, dtype=np.float64)
    ends = bootstrap_mean(array, confidence=confidence, resamples=resamples, seed=seed, clusters=clusters)
    return {"mean": array.mean(-1), "interval": np.stack(ends, axis=-1), "n": array.shape[-1]}


def value_of(number: Mapping[str, Any]) -> float:
    """An accuracy or a mean, of what comes with an interval."""
    value: float = number["accuracy"] if "accuracy" in number else number["mean"]
    return value


def difference(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Difference of two accuracies or means with Newcombe's interval; see ``statistics.newcombe_difference``."""
    a, b = value_of(after), value_of(before)
    return {
        "mean": a - b,
        "interval": newcombe_difference(a, after["interval"], b, before["interval"]),
        "n": after["n"],
    }


def over_seeds(runs: Sequence[Mapping[str, Any]], path: str) -> dict[str, Any]:
    """A number of every seed's run, at a dotted path: mean, least and largest.

    Where the number is an accuracy or a mean with an interval, ``interval`` runs from the lowest lower end to the
    highest upper end: as wide as the seeds and the prompts of the worst and best seed make it.
    """
    return over([_at(run, path) for run in runs])


def over(numbers: Sequence[Any]) -> dict[str, Any]:
    """The same of the numbers themselves, one a seed."""
    values, ends = list(numbers), {}
    if isinstance(numbers[0], dict):
        values = [value_of(number) for number in numbers]
        lows, highs = zip(*(number["interval"] for number in numbers), strict=True)
        ends = {"interval": [min(lows), max(highs)], "n": numbers[0]["n"]}
    return {"value": float(np.mean(values)), "least": min(values), "largest": max(values), "by_seed": values, **ends}


def summary_over_seeds(runs: Sequence[Mapping[str, Any]], paths: Iterable[str]) -> dict[str, Any]:
    """Numbers of every seed's run under the keys that they have there; see ``over_seeds``."""
    summary: dict[str, Any] = {}
    for path in paths:
        *parts, last = path.split(".")
        node = summary
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = over_seeds(runs, path)
    return summary


def _at(node: Any, path: str) -> Any:
    for part in path.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node
