"""Intervals over two crossed samples, and what compares scores, against scikit-learn and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap, spearmanr
from sklearn.metrics import roc_auc_score

from ssah.evaluate.stats import Estimate, auroc, crossed_mean, rank_correlation


def crossed(rng: np.random.Generator, rows: float, columns: float, rest: float) -> np.ndarray:
    """30 rows and 30 columns about a mean of 2, with effects of these sizes."""
    values = 2 + rest * rng.normal(size=(30, 30))
    return values + rows * rng.normal(size=(30, 1)) + columns * rng.normal(size=(1, 30))


def by_rows(values: np.ndarray) -> float:
    """Width of an interval that takes the columns as given."""
    found = bootstrap(
        (values.mean(1),), np.mean, method="percentile", n_resamples=1000,
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return found.high - found.low


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = [crossed_mean(crossed(rng, 1.0, 0.7, 0.5)) for _ in range(200)]
    assert 0.88 <= np.mean([e.low <= 2 <= e.high for e in draws]) <= 0.99
    # As wide as the spread of means over samples: neither cautious nor bold.
    spread = np.sqrt((1.0**2 + 0.7**2 + 0.5**2 / 30) / 30)
    width = np.mean([e.high - e.low for e in draws])
    assert width == pytest.approx(2 * 1.96 * spread, rel=0.1)


def test_columns_that_vary_widen_the_interval():
    """Resampling queries alone would take eight openings for all that there are."""
    values = crossed(np.random.default_rng(1), 0.3, 1.0, 0.2)
    estimate = crossed_mean(values)
    assert estimate.high - estimate.low > 2 * by_rows(values)
    rows_only = crossed(np.random.default_rng(1), 1.0, 0.0, 0.0)
    estimate = crossed_mean(rows_only)
    assert estimate.high - estimate.low == pytest.approx(by_rows(rows_only), rel=0.1)


def test_either_side_counts_alike():
    values = crossed(np.random.default_rng(2), 0.4, 0.9, 0.1)
    there, back = crossed_mean(values), crossed_mean(values.T)
    assert there.value == pytest.approx(back.value)
    assert there.high - there.low == pytest.approx(back.high - back.low, rel=0.1)


def test_what_does_not_vary_has_no_width():
    for shape in ((5, 4), (1, 3), (3, 1)):
        estimate = crossed_mean(np.full(shape, 0.25))
        assert [estimate.value, estimate.low, estimate.high] == pytest.approx([0.25] * 3)
        assert estimate.n == shape[0]


def test_the_value_is_the_mean_and_the_interval_is_seeded():
    values = np.random.default_rng(3).normal(size=(7, 5))
    estimate = crossed_mean(values)
    assert estimate.value == pytest.approx(values.sum() / 35)
    assert estimate.low < estimate.value < estimate.high
    assert crossed_mean(values) == estimate


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_that_of_scikit_learn(ties):
    rng = np.random.default_rng(4)
    for shift in (-1.0, 0.0, 0.7, 2.0):
        positive, negative = rng.normal(shift, 1, 40), rng.normal(0, 1, 25)
        if ties:
            positive, negative = positive.round(), negative.round()
            assert len(set(positive) & set(negative)) > 1
        labels = [True] * 40 + [False] * 25
        expected = roc_auc_score(labels, np.concatenate([positive, negative]))
        estimate = auroc(positive, negative)
        assert estimate.value == pytest.approx(expected)
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
        assert auroc(negative, positive).value == pytest.approx(1 - expected)


def test_auroc_at_its_ends():
    assert auroc(np.array([2, 3]), np.array([0, 1])) == Estimate(1, 1, 1, 2)
    assert auroc(np.array([0, 1]), np.array([2, 3])) == Estimate(0, 0, 0, 2)
    assert auroc(np.array([1, 1]), np.array([1, 1, 1])) == Estimate(0.5, 0.5, 0.5, 2)


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_that_of_scipy(ties):
    rng = np.random.default_rng(5)
    first = rng.normal(size=60)
    second = np.exp(first + rng.normal(size=60))
    if ties:
        first, second = first.round(), second.round()
    estimate = rank_correlation(first, second)
    assert estimate.value == pytest.approx(spearmanr(first, second).statistic)
    found = bootstrap(
        (first, second), lambda a, b: spearmanr(a, b).statistic, method="percentile",
        paired=True, vectorized=False, n_resamples=1000, rng=np.random.default_rng(6),
    ).confidence_interval  # fmt: skip
    assert [estimate.low, estimate.high] == pytest.approx([found.low, found.high], abs=0.04)
    assert estimate.n == 60
    assert rank_correlation(first, -second).value == pytest.approx(-estimate.value)


def test_rank_correlation_needs_order_only():
    values = np.array([0.1, 0.5, 0.2, 9.0, 3.0])
    assert rank_correlation(values, values**3).value == pytest.approx(1)


def test_what_does_not_vary_is_correlated_with_nothing():
    for pair in ((np.ones(8), np.arange(8)), (np.arange(8), np.ones(8)), (np.ones(8), np.ones(8))):
        assert rank_correlation(*pair) == Estimate(0.0, -1.0, 1.0, 8)
