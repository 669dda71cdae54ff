"""Numbers with their uncertainty, and over seeds, as results hold them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from classifier_emergence.statistics import (
    bootstrap_mean,
    clustered_wilson,
    newcombe_difference,
    student_interval,
    wilson,
)


def share_of(hits: ArrayLike, confidence: float, *, clusters: ArrayLike | None = None) -> dict[str, Any]:
    """Accuracy with its Wilson interval, which takes as many examples as the clusters are worth if there are any."""
    array = np.asarray(hits, dtype=bool)
    number = {"accuracy": float(array.mean()), "n": array.size}
    if clusters is None:
        return {**number, "interval": wilson(int(array.sum()), array.size, confidence=confidence)}
    ends = clustered_wilson(array, clusters, confidence=confidence)
    return {**number, "interval": ends, "clusters": len(np.unique(clusters))}


def accuracy_curve(correct: ArrayLike, confidence: float, *, clusters: ArrayLike | None = None) -> dict[str, Any]:
    """Accuracy over the last axis of ``correct`` (layers, n) with the interval of every layer; see ``share_of``."""
    shares = [share_of(row, confidence, clusters=clusters) for row in np.asarray(correct, dtype=bool)]
    curve: dict[str, Any] = {name: [share[name] for share in shares] for name in ("accuracy", "interval")}
    return {**curve, **{key: shares[0][key] for key in ("n", "clusters") if key in shares[0]}}


def mean_of(
    values: ArrayLike, confidence: float, resamples: int, *, clusters: ArrayLike | None = None, seed: int = 0
) -> dict[str, Any]:
    """Mean over the last axis with its bootstrap interval, which resamples whole clusters if there are any."""
    array = np.asarray(values, dtype=np.float64)
    ends = bootstrap_mean(array, confidence=confidence, resamples=resamples, seed=seed, clusters=clusters)
    beside = {} if clusters is None else {"clusters": len(np.unique(clusters))}
    return {"mean": array.mean(-1), "interval": np.stack(ends, axis=-1), "n": array.shape[-1], **beside}


def paired(after: ArrayLike, before: ArrayLike, confidence: float, clusters: Sequence[object]) -> dict[str, Any]:
    """Mean difference over the last axis of two measures of the same examples, with an interval over clusters.

    With G clusters of sizes m_g that sum to n, and differences that sum to s_g in a cluster and have the mean d, it is
    ``d ± t sqrt(G / (G - 1) sum_g (s_g - m_g d)^2) / n``, t of G - 1 degrees of freedom: of eight frames a bootstrap
    would be too sure. Where clusters do not differ at all it reaches as far as none of G clusters establish (Wilson).

    Args:
        after: (..., n).
        before: (..., n) or (n,), taken from it.
        confidence: Of the two-sided interval.
        clusters: (n,) labels of examples that belong together.
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    _, members, sizes = np.unique([str(label) for label in clusters], return_inverse=True, return_counts=True)
    n, groups, mean = len(members), len(sizes), difference.mean(-1)
    sums = difference @ np.eye(groups)[members]
    spread = np.square(sums - sizes * mean[..., None]).sum(-1)
    half = stdtrit(groups - 1, (1 + confidence) / 2) * np.sqrt(groups / (groups - 1) * spread) / n
    half = np.where(spread > 1e-9, half, wilson(0, groups, confidence=confidence)[1])
    interval = np.stack([mean - half, mean + half], axis=-1)
    return {"mean": mean, "interval": interval, "n": n, "clusters": groups}


def over_seeds_and_clusters(
    changes: Sequence[ArrayLike], clusters: Sequence[object], confidence: float
) -> dict[str, Any]:
    """Mean of changes of the same examples after several trainings, with an interval of other seeds and other examples.

    Two half-widths are added in quadrature: Student's over the seeds' means, and that of ``paired`` over clusters of
    the examples' means. Their squares estimate two parts of the mean's variance; what a seed makes of an example is in
    both, so the interval is rather too wide. Unlike a union of the seeds' intervals, it narrows
    with more seeds.

    Args:
        changes: (seeds, n), at least two seeds.
        clusters: (n,) labels of examples that belong together.
        confidence: Of the two-sided interval.

    Source: two-way clustering, Cameron, Gelbach and Miller (2011), Journal of Business & Economic Statistics 29.
    """
    array = np.asarray(changes, dtype=np.float64)
    by_seed, of_examples = array.mean(1), paired(array.mean(0), 0.0, confidence, clusters)
    low, high = student_interval(by_seed, confidence=confidence)
    mean, half = of_examples["mean"], np.hypot(high - low, np.ptp(of_examples["interval"])) / 2
    return {
        "value": mean,
        "least": by_seed.min(),
        "largest": by_seed.max(),
        "by_seed": by_seed,
        "interval": [mean - half, mean + half],
        "n": of_examples["n"],
        "clusters": of_examples["clusters"],
    }


def value_of(number: Mapping[str, Any]) -> float:
    """An accuracy or a mean, of what comes with an interval."""
    value: float = number["accuracy"] if "accuracy" in number else number["mean"]
    return value


def difference(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Difference of two accuracies or means of other examples, with Newcombe's interval.

    Of the same examples, ``Study.paired`` knows more. See ``statistics.newcombe_difference``.
    """
    a, b = value_of(after), value_of(before)
    return {
        "mean": a - b,
        "interval": newcombe_difference(a, after["interval"], b, before["interval"]),
        "n": after["n"],
    }


def over_seeds(runs: Sequence[Mapping[str, Any]], path: str) -> dict[str, Any]:
    """A number of every seed's run, at a dotted path: mean, least and largest.

    Where the number is an accuracy or a mean with an interval, ``interval`` is the union of the seeds' intervals: as
    wide as the seeds and the prompts of the worst and best seed make it, so what it clears every seed clears by itself.
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
