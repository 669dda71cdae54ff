"""Intervals of means over seeds and problems."""

import numpy as np
import pytest

from classifier_emergence.statistics import student_interval
from experiments.shared.summaries import over_seeds_and_clusters, paired


def changes(random: np.random.Generator, seeds: int, clusters: int, *, seed_sd: float, problem_sd: float) -> np.ndarray:
    """Two problems a cluster; every seed and cluster moves its numbers, and each number has noise of its own."""
    of_seed, of_cluster = random.normal(0, seed_sd, (seeds, 1)), random.normal(0, problem_sd, clusters)
    return of_seed + np.repeat(of_cluster, 2) + random.normal(0, 0.2, (seeds, 2 * clusters))


@pytest.mark.parametrize(("seed_sd", "problem_sd"), [(0.5, 1.0), (1.0, 0.1), (0.0, 1.0)])
def test_an_interval_over_seeds_and_problems_covers_the_mean(seed_sd: float, problem_sd: float) -> None:
    random, labels, covered = np.random.default_rng(0), np.repeat(np.arange(20), 2), 0
    for _ in range(400):
        found = over_seeds_and_clusters(
            changes(random, 10, 20, seed_sd=seed_sd, problem_sd=problem_sd), labels.tolist(), 0.95
        )
        low, high = found["interval"]
        covered += low <= 0 <= high
    assert covered / 400 >= 0.93  # three standard errors below 95 % of 400 are 92 %


def test_one_source_of_variance_alone_gives_its_own_interval() -> None:
    labels = [str(i) for i in range(12)]
    seeds = np.random.default_rng(1).normal(size=(8, 1)) + np.zeros((8, 12))
    none_between = paired(np.zeros(12), 0.0, 0.95, labels)["interval"][1]
    low, high = over_seeds_and_clusters(seeds, labels, 0.95)["interval"]
    alone = np.ptp(student_interval(seeds[:, 0], confidence=0.95)) / 2
    assert (high - low) / 2 == pytest.approx(np.hypot(alone, none_between))
    problems = np.random.default_rng(2).normal(size=12) + np.zeros((8, 1))
    found = over_seeds_and_clusters(problems, labels, 0.95)
    assert found["interval"] == pytest.approx(paired(problems[0], 0.0, 0.95, labels)["interval"])


def test_more_seeds_make_it_narrower() -> None:
    labels = np.repeat(np.arange(20), 2).tolist()
    of_all = changes(np.random.default_rng(3), 40, 20, seed_sd=1.0, problem_sd=0.1)
    few, many = (np.ptp(over_seeds_and_clusters(of_all[:n], labels, 0.95)["interval"]) for n in (5, 40))
    assert many < few / 2
