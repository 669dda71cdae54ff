import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp

from classifier_emergence.errors import InputError
from classifier_emergence.statistics import (
    Proportion,
    bootstrap_mean,
    clustered_wilson,
    cohens_d,
    expected_max_cosine,
    holm,
    newcombe_difference,
    permutation_p,
    student_interval,
    wilson,
)

quick = settings(deadline=None, max_examples=50)
TALLIES = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
LEVELS = st.floats(0.5, 0.999)


@given(TALLIES, LEVELS)
@quick
def test_wilson_is_that_of_scipy_and_holds_the_estimate(tally, confidence):
    k, n = tally
    low, high = wilson(k, n, confidence=confidence)
    peer = binomtest(k, n).proportion_ci(confidence, method="wilson")
    assert (low, high) == pytest.approx((peer.low, peer.high), abs=1e-12)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high


@given(TALLIES, LEVELS)
@quick
def test_wilson_is_symmetric_under_complement(tally, confidence):
    k, n = tally
    low, high = wilson(k, n, confidence=confidence)
    assert wilson(n - k, n, confidence=confidence) == pytest.approx((1 - high, 1 - low), abs=1e-12)


@given(TALLIES, LEVELS, LEVELS)
@quick
def test_wilson_grows_with_confidence_and_successes_and_shrinks_with_n(tally, a, b):
    k, n = tally
    (low, high), (lower, higher) = (wilson(k, n, confidence=c) for c in sorted((a, b)))
    assert lower <= low <= high <= higher
    more = wilson(min(k + 1, n), n, confidence=a)
    assert all(x >= y for x, y in zip(more, wilson(k, n, confidence=a), strict=True))
    wide, narrow = (np.ptp(wilson(k * f, n * f, confidence=a)) for f in (1, 4))
    assert narrow < wide


def test_wilson_covers_the_truth_as_often_as_it_says():
    n, confidence = 200, 0.95
    for truth in (0.05, 0.5, 0.81):
        chances = [math.comb(n, k) * truth**k * (1 - truth) ** (n - k) for k in range(n + 1)]
        intervals = [wilson(k, n, confidence=confidence) for k in range(n + 1)]
        covered = sum(p for p, (low, high) in zip(chances, intervals, strict=True) if low <= truth <= high)
        assert covered == pytest.approx(confidence, abs=0.02)


def test_thirteen_of_sixteen():
    # The interval around the sources' 81.2 %.
    assert wilson(13, 16, confidence=0.95) == pytest.approx((0.5699, 0.9341), abs=1e-4)


@pytest.mark.parametrize(
    ("k", "n", "confidence", "named"),
    [
        (0, 0, 0.95, "n: "),
        (5, 4, 0.95, "successes: 5"),
        (-1, 4, 0.95, "successes: -1"),
        (1, 4, 95, "confidence: 95"),
    ],
)
def test_wilson_refuses_by_name(k, n, confidence, named):
    with pytest.raises(InputError, match=f"^{named}"):
        wilson(k, n, confidence=confidence)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=2, max_size=9))
def test_a_clustered_interval_holds_the_estimate_and_is_no_narrower(clusters):
    hits = [hit for cluster in clusters for hit in cluster]
    labels = [i for i, cluster in enumerate(clusters) for _ in cluster]
    low, high = clustered_wilson(hits, labels, confidence=0.9)
    narrow = wilson(sum(hits), len(hits), confidence=0.9)
    assert 0 <= low <= sum(hits) / len(hits) <= high <= 1
    assert high - low >= np.ptp(narrow) - 1e-12
    # Labels are names: no order, no values.
    assert clustered_wilson(hits[::-1], [-i for i in labels[::-1]], confidence=0.9) == pytest.approx((low, high))


def test_examples_that_stand_alone_are_wilsons():
    hits = [True, True, False, True]
    assert clustered_wilson(hits, range(4), confidence=0.95) == pytest.approx(wilson(3, 4, confidence=0.95))


def test_a_cluster_that_agrees_with_itself_counts_as_one():
    assert clustered_wilson([True] * 480, np.arange(480) % 8, confidence=0.95) == wilson(8, 8, confidence=0.95)
    low, high = clustered_wilson(np.repeat([1, 1, 1, 0] * 5, 24), np.repeat(np.arange(20), 24), confidence=0.95)
    near = wilson(15, 20, confidence=0.95)  # but for Student's quantile, and 19 for 20 in the variance
    assert (low, high) == pytest.approx(near, abs=0.03)
    assert high - low > np.ptp(near)


def test_clustered_intervals_cover_the_truth_where_wilsons_does_not():
    random, truth, held, naive = np.random.default_rng(0), 0.7, 0, 0
    for _ in range(400):
        rates = random.beta(3.5, 1.5, size=12)  # of mean 0.7: templates differ
        hits = random.random((12, 40)) < rates[:, None]
        low, high = clustered_wilson(hits.ravel(), np.repeat(np.arange(12), 40), confidence=0.95)
        held += low <= truth <= high
        low, high = wilson(int(hits.sum()), hits.size, confidence=0.95)
        naive += low <= truth <= high
    assert held / 400 == pytest.approx(0.95, abs=0.03)
    assert naive / 400 < 0.7


def test_one_cluster_has_no_spread():
    with pytest.raises(InputError, match=r"^clusters: all examples are in one cluster"):
        clustered_wilson([True, False], [0, 0], confidence=0.95)
    with pytest.raises(InputError, match=r"^hits: "):
        clustered_wilson([], [], confidence=0.95)


def test_a_proportion_comes_from_predictions():
    proportion = Proportion.of(["add", "add", "divide", "add"], ["add", "add", "add", "add"], confidence=0.9)
    assert proportion == Proportion(0.75, 4, wilson(3, 4, confidence=0.9))
    with pytest.raises(InputError, match=r"^predicted: shape \(2,\) against \(3,\)"):
        Proportion.of([1, 2], [1, 2, 3], confidence=0.9)
    with pytest.raises(InputError, match=r"^n: "):
        Proportion.of([], [], confidence=0.9)


def interval(values, **options):
    return bootstrap_mean(values, **{"confidence": 0.95, "resamples": 500, "seed": 0} | options)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
@quick
def test_a_bootstrap_interval_lies_within_the_values(values):
    low, high = interval(values)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), st.floats(-10, 10), st.floats(0.01, 10))
@quick
def test_a_bootstrap_interval_moves_and_scales_with_the_values(values, shift, scale):
    low, high = interval(values)
    moved = interval(np.array(values) * scale + shift)
    assert moved == pytest.approx((low * scale + shift, high * scale + shift), abs=1e-6)


def test_rows_share_their_draws_and_pass_in_pieces(monkeypatch):
    values = np.random.default_rng(0).normal(size=(3, 5, 40))
    low, high = interval(values)
    assert low.shape == high.shape == (3, 5)
    assert (low[1, 2], high[1, 2]) == pytest.approx(interval(values[1, 2]))
    monkeypatch.setattr("classifier_emergence.statistics._CELLS", 1000)
    for whole, piece in zip((low, high), interval(values), strict=True):
        np.testing.assert_allclose(piece, whole)


def test_the_bootstrap_covers_a_mean_as_often_as_it_says():
    values = np.random.default_rng(0).exponential(size=(1000, 60))
    low, high = interval(values, confidence=0.9)
    assert np.mean((low <= 1) & (high >= 1)) == pytest.approx(0.9, abs=0.04)


def test_the_bootstrap_covers_the_mean_of_eight_frames_as_often_as_it_says():
    # Plain percentiles would hold it in 89 %.
    clusters, random = np.repeat(np.arange(8), 4), np.random.default_rng(0)
    values = np.repeat(random.normal(size=(4000, 8)), 4, axis=1) + random.normal(size=(4000, 32))
    low, high = interval(values, clusters=clusters, resamples=1000)
    assert np.mean((low <= 0) & (high >= 0)) == pytest.approx(0.95, abs=0.02)


def test_the_same_seed_gives_the_same_interval_and_another_does_not():
    values = np.random.default_rng(0).normal(size=50)
    assert interval(values, seed=3) == interval(values, seed=3)
    assert interval(values, seed=3) != interval(values, seed=4)


def test_clusters_of_one_are_examples_and_copies_add_no_certainty():
    values = np.random.default_rng(0).normal(size=40)
    assert interval(values, clusters=np.arange(40)) == pytest.approx(interval(values))
    # Each example five times, in mixed order: the cluster bootstrap still sees 40.
    copies, order = np.tile(values, 5), np.random.default_rng(1).permutation(200)
    labels = np.tile(np.arange(40), 5)
    clustered = interval(copies[order], clusters=labels[order])
    assert clustered == pytest.approx(interval(values))
    assert np.ptp(interval(copies)) < 0.7 * np.ptp(clustered)


def test_clusters_of_different_sizes_weigh_their_examples():
    # Two clusters, one of them drawn alone in half of the resamples: the ends are their means.
    low, high = interval([0.0, 0.0, 0.0, 1.0], clusters=["a", "a", "a", "b"])
    assert (low, high) == (0.0, 1.0)
    values = np.arange(6.0)
    assert interval(values, clusters=[0] * 6) == (2.5, 2.5)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, r"^values: shape \(0,\) holds nothing"),
        (1.0, {}, r"^values: shape \(\) holds nothing"),
        ([[1.0, math.nan]], {}, r"^values: nan at \[0, 1\]"),
        ([1.0], {"resamples": 0}, "^resamples: 0"),
        ([1.0], {"confidence": 1.0}, "^confidence: 1.0"),
        ([1.0, 2.0], {"clusters": [1]}, r"^clusters: shape \(1,\)"),
    ],
)
def test_the_bootstrap_refuses_by_name(values, options, message):
    with pytest.raises(InputError, match=message):
        interval(values, **options)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(-1, 6))
@quick
def test_a_permutation_p_is_a_rank(null, observed):
    p = float(permutation_p(observed, null))
    assert 1 / (len(null) + 1) <= p <= 1
    assert p >= float(permutation_p(observed + 1, null))
    assert p == (1 + len([x for x in null if x >= observed])) / (1 + len(null))


def test_permutation_p_is_vectorised():
    observed, null = np.array([0.0, 2.5, 9.0]), np.arange(4.0)
    assert permutation_p(observed, null).tolist() == [1.0, 0.4, 0.2]
    assert permutation_p(observed, np.stack([null, null + 5, null + 9])).tolist() == [1.0, 1.0, 1.0]


def test_a_permutation_p_keeps_its_level():
    # Observed and null from one distribution: p <= 0.05 in 5 % of cases.
    draws = np.random.default_rng(0).normal(size=(4000, 100))
    assert np.mean(permutation_p(draws[:, 0], draws[:, 1:]) <= 0.05) == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize(
    ("observed", "null", "message"),
    [
        (1.0, [], "^null: shape"),
        (math.nan, [1.0], "^observed: nan"),
        (1.0, [1.0, math.nan], r"^null: nan at \[1\]"),
    ],
)
def test_permutation_p_refuses_by_name(observed, null, message):
    with pytest.raises(InputError, match=message):
        permutation_p(observed, null)


def test_expected_max_cosine_is_what_random_directions_give():
    assert expected_max_cosine(201_088, 2880) == pytest.approx(0.092, abs=5e-4)
    assert expected_max_cosine(1, 10) == 0
    directions = np.random.default_rng(0).normal(size=(20_000, 200))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    found = (directions[:20] @ directions[20:].T).max(axis=1).mean()
    assert found == pytest.approx(expected_max_cosine(20_000, 200), rel=0.15)
    assert found < expected_max_cosine(20_000, 200)
    with pytest.raises(InputError, match=r"^vocabulary, dimension: 0, 5"):
        expected_max_cosine(0, 5)


def test_the_interval_of_a_difference_is_newcombes():
    a, b = (wilson(k, n, confidence=0.95) for k, n in ((56, 70), (48, 80)))
    found = newcombe_difference(56 / 70, a, 48 / 80, b)
    assert found == pytest.approx((0.0524, 0.3339), abs=5e-5)  # his table II, first example, method 10
    assert newcombe_difference(2.0, (1.0, 4.0), 2.0, (1.0, 4.0)) == pytest.approx((-(5**0.5), 5**0.5))


@given(TALLIES, TALLIES)
@quick
def test_the_interval_of_a_difference_holds_it_and_turns_with_its_sign(one, other):
    (a, ends_a), (b, ends_b) = ((k / n, wilson(k, n, confidence=0.95)) for k, n in (one, other))
    low, high = newcombe_difference(a, ends_a, b, ends_b)
    assert low <= a - b <= high
    assert newcombe_difference(b, ends_b, a, ends_a) == pytest.approx((-high, -low))


def test_cohens_d_is_a_difference_in_standard_deviations():
    x = np.array([0.4, 0.5, 0.6])
    assert cohens_d(x + 0.2, x) == pytest.approx(2.0)
    assert cohens_d(x, x + 0.2) == pytest.approx(-2.0)
    assert cohens_d(np.ones(3), np.ones(3)) == 0
    assert cohens_d(np.ones(3), 2 * np.ones(3)) is None
    with pytest.raises(InputError, match=r"^before: 1 numbers have no standard deviation"):
        cohens_d(x, [1.0])


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.001, 0.2))
@quick
def test_holm_rejects_what_stepping_down_rejects(p, alpha):
    adjusted, left = holm(p), len(p)
    for i in sorted(range(len(p)), key=p.__getitem__):
        if p[i] * left > alpha:
            break
        assert adjusted[i] <= alpha
        left -= 1
    assert sum(adjusted <= alpha) == len(p) - left


def test_holm_refuses_what_is_no_number():
    with pytest.raises(InputError, match="p: nan"):
        holm([0.1, math.nan])


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6).filter(lambda x: np.std(x) > 1e-3), LEVELS)
@quick
def test_students_interval_is_that_of_scipy(values, confidence):
    peer = ttest_1samp(values, 0).confidence_interval(confidence)
    assert student_interval(values, confidence=confidence) == pytest.approx((peer.low, peer.high))


def test_one_value_has_no_interval():
    with pytest.raises(InputError, match="values: 1 of them"):
        student_interval([0.5], confidence=0.95)
