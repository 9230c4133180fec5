"""Intervals and tests against numbers worked out elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st

from ssah.evaluate.stats import (
    Estimate,
    adjusted,
    average,
    corrected,
    detectable,
    over_repetitions,
    p_value_of,
    paired_difference,
    paired_p_value,
    perplexity,
    pool,
    proportion,
)


def outcomes(hits: int, n: int) -> list[bool]:
    return [True] * hits + [False] * (n - hits)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 100, 0.0, 0.0370),
        (100, 100, 0.9630, 1.0),
        (50, 100, 0.4038, 0.5962),
        (10, 100, 0.0552, 0.1744),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998 (a), method 3
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(hits, n, low, high):
    estimate = proportion(outcomes(hits, n))
    assert estimate.value == hits / n
    assert estimate.n == n
    assert estimate.low == pytest.approx(low, abs=1e-4)
    assert estimate.high == pytest.approx(high, abs=1e-4)


def test_a_proportion_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no outcomes"):
        proportion([])


def test_paired_difference_by_hand():
    # 10 items gained and 2 lost of 20: Bonett and Price add one to both and two to n.
    first = [True] * 10 + [False] * 2 + [True] * 5 + [False] * 3
    second = [False] * 10 + [True] * 2 + [True] * 5 + [False] * 3
    estimate = paired_difference(first, second)
    centre, variance = 8 / 22, (14 / 22 - (8 / 22) ** 2) / 22
    assert estimate.value == pytest.approx(8 / 20)
    assert estimate.low == pytest.approx(centre - 1.959964 * math.sqrt(variance))
    assert estimate.high == pytest.approx(centre + 1.959964 * math.sqrt(variance))
    assert estimate.n == 20


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=120))
def test_paired_differences_stay_in_bounds_and_change_sign_with_their_order(pairs):
    first, second = [list(column) for column in zip(*pairs, strict=True)]
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert -1 <= there.low <= there.value <= there.high <= 1
    assert (there.value, there.low) == pytest.approx((-back.value, -back.high))
    assert there.high > there.low, "no sample is so small or so clear that nothing is uncertain"


def test_equal_arms_differ_by_nothing_within_an_interval():
    estimate = paired_difference([True] * 100, [True] * 100)
    assert estimate.value == 0
    assert -0.05 < estimate.low < 0 < estimate.high < 0.05


@pytest.mark.parametrize("compare", [paired_difference, paired_p_value])
def test_arms_of_different_length_are_refused(compare):
    with pytest.raises(ValueError, match="same items"):
        compare([True], [True, False])


def test_averages_of_tasks_combine_half_widths_in_quadrature():
    mean = average([Estimate(40, 34, 43, 10), Estimate(60, 52, 64, 30)])
    assert mean == Estimate(50, 50 - 10 / 2, 50 + 5 / 2, 40)


def test_mcnemar_by_hand():
    # 20 prompts, 12 discordant, 2 of them the other way: 2 (1 + 12 + 66) / 2^12.
    first = [True] * 10 + [False] * 2 + [True] * 5 + [False] * 3
    second = [False] * 10 + [True] * 2 + [True] * 5 + [False] * 3
    assert paired_p_value(first, second) == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert paired_p_value(second, first) == pytest.approx(2 * (1 + 12 + 66) / 4096)


def test_mcnemar_of_equal_arms_is_one():
    assert paired_p_value([True, False, True], [True, False, True]) == 1.0
    assert paired_p_value([True, False], [False, True]) == 1.0


def test_mcnemar_of_one_sided_disagreement():
    assert paired_p_value([True] * 6, [False] * 6) == pytest.approx(2 / 2**6)


def test_perplexity_weights_tokens_not_texts():
    # 3 tokens of 1/8 and 1 token of 1/2: the geometric mean of 8, 8, 8 and 2.
    estimate = perplexity([3, 1], [3 * math.log(8), math.log(2)])
    assert estimate.value == pytest.approx((8 * 8 * 8 * 2) ** (1 / 4))
    assert estimate.n == 2


def test_perplexity_of_equal_losses_has_no_width():
    estimate = perplexity([4] * 10, [4 * math.log(7)] * 10)
    assert [estimate.value, estimate.low, estimate.high] == pytest.approx([7, 7, 7])


def test_perplexity_of_one_text_is_a_point():
    assert perplexity([2], [2 * math.log(5)]).low == pytest.approx(5)


def test_perplexity_interval_is_that_of_the_bootstrap():
    rng = np.random.default_rng(1)
    losses = rng.normal(2, 0.5, size=400)
    estimate = perplexity([1] * 400, losses.tolist())
    half = 1.96 * losses.std() / 20
    assert math.log(estimate.low) == pytest.approx(losses.mean() - half, abs=0.015)
    assert math.log(estimate.high) == pytest.approx(losses.mean() + half, abs=0.015)
    assert perplexity([1] * 400, losses.tolist()) == estimate, "the bootstrap is seeded"


def test_pooling_averages_and_does_not_narrow():
    pooled = pool([Estimate(10, 5, 20, 100), Estimate(20, 15, 40, 100)])
    assert pooled == Estimate(15, 10, 30, 100)
    assert pool([pooled]) == pooled


def test_seeds_that_agree_keep_the_items_interval():
    one = Estimate(10, 5, 20, 100)
    assert over_repetitions([one]) == one
    assert over_repetitions([one, one, one]) == one


def test_seeds_that_differ_widen_the_interval():
    """Half-widths of items and of Student's interval of the seeds' mean, in quadrature."""
    found = over_repetitions([Estimate(v, v - 3, v + 4, 50) for v in (10, 20)])
    student = 12.7062 * 5  # t at one degree of freedom; the standard error of 10 and 20
    assert found.value == 15
    assert found.low == pytest.approx(15 - math.hypot(3, student), abs=1e-3)
    assert found.high == pytest.approx(15 + math.hypot(4, student), abs=1e-3)


def test_an_interval_over_seeds_and_items_covers_the_truth():
    """Three seeds of one set of 100 prompts: each seed and each prompt shifts what comes out."""
    rng, inside, runs = np.random.default_rng(0), 0, 400
    for _ in range(runs):
        seeds, prompts = rng.normal(0, 0.6, (3, 1)), rng.normal(0, 1.5, 100)
        outcomes = rng.random((3, 100)) < 1 / (1 + np.exp(-(seeds + prompts)))
        found = over_repetitions([proportion(row.tolist()) for row in outcomes])
        inside += found.low <= 0.5 <= found.high
    assert inside / runs > 0.94


def test_what_could_have_been_found():
    error = 2.0
    estimate = Estimate(1, 1 - 1.96 * error, 1 + 1.96 * error, 9)
    assert detectable(estimate) == pytest.approx((1.96 + 0.8416) * error, rel=1e-3)


def test_p_values_off_intervals():
    estimate = Estimate(5, 5 - 1.96, 5 + 2 * 1.96, 9)
    assert p_value_of(estimate, 3) == pytest.approx(0.0455, abs=1e-4), "two errors of the low side"
    assert p_value_of(estimate, 7) == pytest.approx(0.3173, abs=1e-4), "one of the high side"
    counted = Estimate(2, 2, 2, 9)
    assert (p_value_of(counted, 2), p_value_of(counted, 3)) == (1, 0)


def test_p_values_over_seeds_have_the_tails_of_student():
    """Seeds alone: the one-sample t test; items alone: the normal; both: above either, and below
    0.05 where the limit lies outside the interval."""
    values = (10.0, 20.0, 24.0)
    found = over_repetitions([Estimate(v, v, v, 50) for v in values])
    for limit in (0.0, 12.0):
        wanted = scipy.stats.ttest_1samp(values, limit).pvalue
        assert p_value_of(found, limit) == pytest.approx(wanted, rel=1e-6)
        scaled = p_value_of(found.scaled(100), 100 * limit)
        assert scaled == pytest.approx(wanted, rel=1e-6)
    both = over_repetitions([Estimate(v, v - 6, v + 6, 50) for v in values])
    assert both.low < 0 < p_value_of(found, 0) < 0.05 < p_value_of(both, 0)
    assert p_value_of(both, both.low) == pytest.approx(0.05)
    assert p_value_of(both, both.high) == pytest.approx(0.05)
    alike = over_repetitions([Estimate(18, 12, 24, 50)] * 3)
    assert p_value_of(alike, 0) == pytest.approx(2 * scipy.stats.norm.sf(3 * 1.96), rel=1e-3)


def test_p_values_are_adjusted_together():
    assert adjusted([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert adjusted([]) == []


def test_scaling():
    assert Estimate(0.5, 0.25, 0.75, 8).scaled(100) == Estimate(50, 25, 75, 8)


def test_a_share_is_corrected_for_the_judges_errors():
    """By hand: 0.45 are called answered; 0.9 of answers are and 0.1 of the rest: 0.35 / 0.8."""
    outcomes = [True] * 45 + [False] * 55
    caught, spared = [True] * 90 + [False] * 10, [True] * 180 + [False] * 20
    e = corrected(outcomes, caught, spared)
    assert e.value == pytest.approx(0.35 / 0.8)
    assert e.n == 100
    known = corrected(outcomes, [True] * 90_000 + [False] * 10_000, spared * 500)
    assert e.low < known.low < known.value < known.high < e.high, "labels are a sample, too"
    wilson = proportion(outcomes)
    assert known.high - known.low == pytest.approx((wilson.high - wilson.low) / 0.8, rel=0.03)


def test_a_correction_stays_between_none_and_all():
    caught, spared = [True] * 9 + [False], [True] * 9 + [False]
    none, every = (corrected([answer] * 50, caught, spared) for answer in (False, True))
    assert (none.value, none.low, every.value, every.high) == (0, 0, 1, 1)
    assert none.high < 0.2
    with pytest.raises(ValueError, match="labels of both kinds"):
        corrected([True], caught, [])
