"""Uncertainty: intervals for proportions and means, p-values, and the maximum that chance gives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from classifier_emergence.errors import InputError

Floats = NDArray[np.float64]

# Means of resamples that are held at once: 64 MiB of float64.
_CELLS = 2**23


def wilson(successes: int, n: int, *, confidence: float) -> tuple[float, float]:
    """Wilson score interval of a proportion.

    With p = successes / n and z the normal quantile of (1 + confidence) / 2, its ends are
    ``(p + z²/2n ± sqrt(z²/n (p(1 - p) + z²/4n))) / (1 + z²/n)``: the proportions that a score test keeps.
    Unlike p ± z·s it stays within [0, 1] and has a width at 0 and at n successes.

    Raises:
        InputError: ``n`` is not positive, ``successes`` not within 0..n, or ``confidence`` not within (0, 1).

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference, JASA 22.
    """
    _check_confidence(confidence)
    if n < 1:
        raise InputError(f"n: a proportion of {n} examples is not defined; pass at least one")
    if not 0 <= successes <= n:
        raise InputError(f"successes: {successes} is not within 0..{n}; pass a count of the n examples")
    # Closed, as scipy.stats takes longer to import than many a stage needs; a test compares the two.
    return _score_interval(successes / n, n, confidence)


def clustered_wilson(hits: ArrayLike, clusters: ArrayLike, *, confidence: float) -> tuple[float, float]:
    """Wilson interval of a proportion whose examples come in clusters (prompts of one template, of one operand pair).

    With n examples in G clusters of sizes m_g with h_g hits, and p the proportion, the interval is ``wilson``'s for an
    effective number of examples: that of independent ones with the same variance,
    ``n* = p(1 - p) / v``, ``v = G / (G - 1) * sum_g (h_g - m_g p)^2 / n^2``, times ``(z / t)^2`` (t of G - 1 degrees of
    freedom) as few clusters know their own spread badly; never more than n. Where all examples agree no spread is seen:
    then a cluster counts as one example, n* = G.

    Args:
        hits: (n,) booleans.
        clusters: (n,) labels.
        confidence: Of the two-sided interval, within (0, 1).

    Raises:
        InputError: There is no example, or one cluster only, or ``clusters`` has another length.

    Example:
        >>> hits, template = [True] * 9 + [False] * 3, [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
        >>> clustered_wilson(hits, template, confidence=0.95)
        (0.130..., 0.983...)
        >>> wilson(9, 12, confidence=0.95)
        (0.467..., 0.911...)

    Source: Kish (1965), Survey sampling, section 8.2; Korn and Graubard (1998), Confidence intervals for proportions
    with small expected number of positive counts estimated from survey data, Survey Methodology 24.
    """
    _check_confidence(confidence)
    array = np.asarray(hits, dtype=np.float64)
    if array.size == 0:
        raise InputError("hits: there is no example; pass at least one")
    sums, sizes = _sums(array[None], np.asarray(clusters))
    n, groups, p = array.size, len(sizes), float(array.mean())
    if groups < 2:
        raise InputError("clusters: all examples are in one cluster, whose spread cannot be known; pass at least two")
    if groups == n:
        return _score_interval(p, n, confidence)
    variance = groups / (groups - 1) * float(np.sum((sums[0] - sizes * p) ** 2)) / n**2
    if p in (0.0, 1.0):
        return _score_interval(p, groups, confidence)
    from scipy.special import stdtrit  # late: it takes longer to import than many a command needs

    ends = (1 + confidence) / 2
    worth = p * (1 - p) / variance if variance else math.inf
    few = NormalDist().inv_cdf(ends) / float(stdtrit(groups - 1, ends))
    return _score_interval(p, min(n, worth * few**2), confidence)


def _score_interval(p: float, n: float, confidence: float) -> tuple[float, float]:
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2 / n
    centre, half = p + z2 / 2, math.sqrt(z2 * (p * (1 - p) + z2 / 4))
    return (centre - half) / (1 + z2) if p > 0 else 0.0, (centre + half) / (1 + z2) if p < 1 else 1.0


@dataclass(frozen=True)
class Proportion:
    """Accuracy with what is needed to judge it.

    Attributes:
        accuracy: Correct answers as a fraction of ``n``.
        n: Number of examples.
        interval: Wilson interval of ``accuracy``.
    """

    accuracy: float
    n: int
    interval: tuple[float, float]

    @classmethod
    def of(cls, predicted: ArrayLike, truth: ArrayLike, *, confidence: float) -> "Proportion":
        """How often ``predicted`` (n,) equals ``truth`` (n,): class numbers or labels.

        Raises:
            InputError: The two differ in shape, or there are no examples.
        """
        predicted, truth = np.asarray(predicted), np.asarray(truth)
        if predicted.shape != truth.shape:
            raise InputError(f"predicted: shape {predicted.shape} against {truth.shape} of truth; pass one for each")
        correct, n = int(np.sum(predicted == truth)), predicted.size
        interval = wilson(correct, n, confidence=confidence)
        return cls(correct / n, n, interval)


def bootstrap_mean(
    values: ArrayLike, *, confidence: float, resamples: int, seed: int, clusters: ArrayLike | None = None
) -> tuple[Floats, Floats]:
    """Expanded percentile bootstrap interval of the mean over the last axis.

    The percentiles of resampled means alone are too narrow for few groups (of eight they hold the mean in 89 % of
    cases, not 95). With G groups the tails are therefore not ``(1 - confidence) / 2`` but
    ``Phi(-sqrt(G / (G - 1)) t)``, where t is that quantile of Student's distribution with G - 1 degrees of freedom:
    this gives back about the coverage of Student's interval (95 % there).

    Every row is resampled with the same draws, so intervals of rows (layers, words) are comparable. A
    resample is a vector of counts that is multinomial over the groups; its mean is
    ``sum(counts * sums) / sum(counts * sizes)`` with one group an example, or one a cluster.

    Args:
        values: (..., n).
        confidence: Of the two-sided interval, within (0, 1).
        resamples: Number of resamples.
        seed: Of the draws.
        clusters: (n,) labels of examples that belong together (an operand pair), drawn as a whole.

    Returns:
        Lower and upper ends, each (...).

    Raises:
        InputError: No values, NaN or infinity among them, no resamples, or ``clusters`` of another length.

    Source: Hesterberg (2015), What teachers should know about the bootstrap, The American Statistician 69, section
    3.2 (expanded percentiles); for clusters Davison and Hinkley (1997), Bootstrap methods and their application,
    section 3.8.
    """
    _check_confidence(confidence)
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] == 0:
        raise InputError(f"values: shape {array.shape} holds nothing to resample; pass (..., n) with n at least 1")
    _check_finite("values", array)
    if resamples < 1:
        raise InputError(f"resamples: {resamples} gives no interval; pass at least 1, better 1000")
    n = array.shape[-1]
    rows = array.reshape(-1, n)
    sizes = np.ones(n)
    if clusters is not None:
        rows, sizes = _sums(rows, np.asarray(clusters))
    groups = len(sizes)
    random = np.random.default_rng(seed)
    counts = random.multinomial(groups, np.full(groups, 1 / groups), size=resamples).astype(np.float64)
    weights = counts / (counts @ sizes)[:, None]
    tail = _expanded_tail(groups, confidence)
    ends = (tail, 1 - tail)
    step = max(1, _CELLS // resamples)
    parts = [np.quantile(rows[i : i + step] @ weights.T, ends, axis=1) for i in range(0, len(rows), step)]
    low, high = np.concatenate(parts, axis=1).reshape(2, *array.shape[:-1])
    return low, high


def _expanded_tail(groups: int, confidence: float) -> float:
    """Of one side; of a single group, whose resamples are all alike, any would do."""
    tail = (1 - confidence) / 2
    if groups == 1:
        return tail
    from scipy.special import stdtrit

    return NormalDist().cdf(math.sqrt(groups / (groups - 1)) * float(stdtrit(groups - 1, tail)))


def permutation_p(observed: ArrayLike, null: ArrayLike) -> Floats:
    """One-sided permutation p-value ``(1 + #{null >= observed}) / (1 + N)``; small if ``observed`` is large.

    The 1 counts the observed arrangement itself, so that p is never 0 and the test keeps its level.

    Args:
        observed: (...) statistics.
        null: (..., N) statistics under the null, or (N,) for all of ``observed``.

    Raises:
        InputError: No null statistics, or NaN in either.

    Source: Phipson and Smyth (2010), Permutation p-values should never be zero, SAGMB 9 (1).
    """
    observed, null = np.asarray(observed, dtype=np.float64), np.asarray(null, dtype=np.float64)
    if null.ndim == 0 or null.shape[-1] == 0:
        raise InputError(f"null: shape {null.shape} holds no statistics; pass (..., N) with N at least 1")
    _check_finite("observed", observed)
    _check_finite("null", null)
    reached = np.sum(null >= observed[..., None], axis=-1)
    return np.asarray((1 + reached) / (1 + null.shape[-1]))


def newcombe_difference(
    a: float, a_interval: Sequence[float], b: float, b_interval: Sequence[float]
) -> tuple[float, float]:
    """Interval of a difference ``a - b`` of two proportions or means, made of their intervals.

    Its ends are ``d - sqrt((a - a_low)^2 + (b_high - b)^2)`` and ``d + sqrt((a_high - a)^2 + (b - b_low)^2)`` with
    d = a - b, which takes the two as independent. Of the same examples, positively correlated, it is too wide rather
    than too narrow.

    Args:
        a: One number.
        a_interval: Its lower and upper end.
        b: The number that is taken from it.
        b_interval: Its lower and upper end.

    Example:
        >>> newcombe_difference(0.8, wilson(56, 70, confidence=0.95), 0.6, wilson(48, 80, confidence=0.95))
        (0.0524..., 0.3338...)

    Source: Newcombe (1998), Interval estimation for the difference between independent proportions, method 10.
    """
    (a_low, a_high), (b_low, b_high) = a_interval, b_interval
    return a - b - math.hypot(a - a_low, b_high - b), a - b + math.hypot(a_high - a, b - b_low)


def holm(p: ArrayLike) -> Floats:
    """p-values adjusted for how many tests there are, by Holm's step-down rule.

    With p sorted, the i-th of m becomes ``max over j <= i of min(1, (m - j + 1) p_j)``. Calling significant what is
    at most alpha then errs anywhere among the m with a probability of at most alpha, whatever their dependence.

    Args:
        p: (m,) p-values; m may be 0.

    Raises:
        InputError: NaN among them.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        array([0.03, 0.06, 0.06])

    Source: Holm (1979), A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6.
    """
    values = np.asarray(p, dtype=np.float64)
    _check_finite("p", values)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)), 1)
    return adjusted


def student_interval(values: ArrayLike, *, confidence: float) -> tuple[float, float]:
    """Interval of the mean of few values, such as one a seed: ``mean ± t s / sqrt(n)`` with n - 1 degrees of freedom.

    Raises:
        InputError: Fewer than two values, or NaN or infinity among them.

    Example:
        >>> student_interval([0.1, 0.2, 0.3], confidence=0.95)
        (-0.0484..., 0.4484...)

    Source: Student (1908), The probable error of a mean, Biometrika 6.
    """
    _check_confidence(confidence)
    array = np.asarray(values, dtype=np.float64)
    if array.size < 2:
        raise InputError(f"values: {array.size} of them have no spread; pass at least 2")
    _check_finite("values", array)
    from scipy.special import stdtrit  # late: it takes longer to import than many a command needs

    half = float(stdtrit(array.size - 1, (1 + confidence) / 2) * array.std(ddof=1) / math.sqrt(array.size))
    return float(array.mean()) - half, float(array.mean()) + half


def cohens_d(after: ArrayLike, before: ArrayLike) -> float | None:
    """Difference of two means in units of the pooled standard deviation, ``sqrt((s1^2 + s2^2) / 2)``.

    Args:
        after: (n,) numbers, n at least 2.
        before: (m,) numbers that they are compared with, m at least 2.

    Returns:
        ``(mean(after) - mean(before)) / s``; None if nothing varies but the means differ, as it is infinite then.

    Raises:
        InputError: One of the two has fewer than two numbers, or NaN or infinity among them.

    Source: Cohen (1988), Statistical power analysis for the behavioral sciences, section 2.2.
    """
    one, other = np.asarray(after, dtype=np.float64), np.asarray(before, dtype=np.float64)
    for name, array in (("after", one), ("before", other)):
        if array.size < 2:
            raise InputError(f"{name}: {array.size} numbers have no standard deviation; pass at least 2")
        _check_finite(name, array)
    difference = float(one.mean() - other.mean())
    pooled = math.sqrt((one.var(ddof=1) + other.var(ddof=1)) / 2)
    return difference / pooled if pooled > 0 else None if difference else 0.0


def expected_max_cosine(vocabulary: int, dimension: int) -> float:
    """What chance gives for the largest cosine between one direction and a vocabulary of random directions.

    A cosine in d dimensions is about normal with variance 1/d, and the maximum of V normals is about
    ``sqrt(2 ln V)`` deviations: ``sqrt(2 ln V / d)``. It holds for d much larger than ln V, and is a little
    too high for finite V.

    Raises:
        InputError: One of the two is not positive.

    Source: Cramér (1946), Mathematical methods of statistics, section 28.6.
    """
    if vocabulary < 1 or dimension < 1:
        raise InputError(f"vocabulary, dimension: {vocabulary}, {dimension}: both must be at least 1")
    return math.sqrt(2 * math.log(vocabulary) / dimension)


def _sums(rows: Floats, clusters: NDArray[np.generic]) -> tuple[Floats, Floats]:
    """Sums over clusters (rows, clusters) and sizes of clusters (clusters,)."""
    if clusters.shape != rows.shape[-1:]:
        raise InputError(f"clusters: shape {clusters.shape}; pass one label for each of the {rows.shape[-1]} examples")
    _, members, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    in_order = rows[:, np.argsort(members, kind="stable")]
    return np.add.reduceat(in_order, np.cumsum(sizes) - sizes, axis=1), sizes.astype(np.float64)


def _check_finite(name: str, array: Floats) -> None:
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InputError(f"{name}: {array[where]} at {list(where)} is not a finite number; leave such examples out")


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InputError(f"confidence: {confidence} is not within (0, 1); pass for instance 0.95")
