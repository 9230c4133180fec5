"""Intervals and paired tests; all from statsmodels and scipy."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy  # its parts are imported when they are used


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval and the size of the sample behind it."""

    value: float
    low: float
    high: float
    n: int
    #: Seeds (or draws) that it is a mean over, and the standard error of that mean by how much
    #: they differ.
    repetitions: int = field(default=1, compare=False)
    error: float = field(default=0.0, compare=False)

    def scaled(self, factor: float) -> Estimate:
        bounds = self.value * factor, self.low * factor, self.high * factor
        return Estimate(*bounds, self.n, self.repetitions, self.error * factor)


def proportion(outcomes: Sequence[bool]) -> Estimate:
    """Share of true outcomes with its Wilson 95 % interval."""
    n, k = len(outcomes), int(sum(outcomes))
    if n == 0:
        raise ValueError("A proportion of no outcomes is undefined.")
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(k, n, method="wilson")
    return Estimate(k / n, low, high, n)


def corrected(outcomes: Sequence[bool], caught: Sequence[bool], spared: Sequence[bool]) -> Estimate:
    """Share of true outcomes as a judge without errors would find it (Rogan and Gladen 1978).

    ``caught``: for labelled items that are true, whether the judge says so; ``spared``: for those
    that are not, whether it says that. The 95 % interval covers the items, and both samples of
    labels: quantiles over draws from the Jeffreys posteriors of the three rates.
    """
    rng = np.random.default_rng(0)
    counts = [(sum(x), len(x)) for x in (outcomes, caught, spared)]
    if min(n for _, n in counts) == 0:
        raise ValueError("A correction needs outcomes, and labels of both kinds.")

    def truth(rate: np.ndarray, sensitivity: np.ndarray, specificity: np.ndarray) -> np.ndarray:
        return ((rate + specificity - 1) / (sensitivity + specificity - 1)).clip(0, 1)

    value = truth(*(np.array(k / n) for k, n in counts))
    draws = truth(*(rng.beta(k + 0.5, n - k + 0.5, 20_000) for k, n in counts))
    low, high = np.quantile(draws, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high), len(outcomes))


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> Estimate:
    """``first - second``: the difference of two proportions on the same items.

    The 95 % interval is Bonett and Price's (2012) adjusted Wald interval for paired proportions,
    which stays sensible when few or no items differ.
    """
    a, b = _paired(first, second)
    n, gained, lost = len(a), int((a & ~b).sum()), int((~a & b).sum())
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    centre = up - down
    half = scipy.stats.norm.ppf(0.975) * np.sqrt((up + down - centre**2) / (n + 2))
    value = (gained - lost) / n
    return Estimate(value, max(-1.0, centre - half), min(1.0, centre + half), n)


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of independent estimates (tasks): half-widths combine in quadrature."""
    values = np.array([[e.value, e.value - e.low, e.high - e.value] for e in estimates])
    value = float(values[:, 0].mean())
    down, up = np.sqrt((values[:, 1:] ** 2).sum(0)) / len(values)
    return Estimate(value, value - float(down), value + float(up), sum(e.n for e in estimates))


def pool(estimates: Sequence[Estimate]) -> Estimate:
    """One estimate for several conditions of the same items: the mean value and the mean bounds,
    since the items are the same ones and do not narrow the interval."""
    columns = [(e.value, e.low, e.high) for e in estimates]
    value, low, high = np.asarray(columns, float).mean(0).tolist()
    return Estimate(value, low, high, estimates[0].n)


def over_repetitions(estimates: Sequence[Estimate]) -> Estimate:
    """One estimate for several seeds (or random draws); its 95 % interval covers items and seeds.

    What the items leave open does not shrink with more seeds, since they are the same ones for
    each: the mean distance of the bounds. What the seeds leave open is Student's t interval of
    their mean; the two combine in quadrature. Three seeds are too few to be resampled: a bootstrap
    over them would be a third too narrow.
    """
    items = pool(estimates)
    if len(estimates) == 1:
        return items
    values = np.array([e.value for e in estimates])
    error = values.std(ddof=1) / np.sqrt(len(values))
    seeds = scipy.stats.t.ppf(0.975, len(values) - 1) * error
    low, high = (np.hypot(items.value - bound, seeds) for bound in (items.low, items.high))
    bounds = items.value, float(items.value - low), float(items.value + high)
    return Estimate(*bounds, items.n, len(values), float(error))


def detectable(estimate: Estimate) -> float:
    """The smallest true difference that a comparison with this interval would have found with a
    power of 80 %, at a two-sided level of 5 %."""
    quantile = scipy.stats.norm.ppf
    half = (estimate.high - estimate.low) / 2
    return float(half * (1 + quantile(0.8) / quantile(0.975)))


def p_value_of(estimate: Estimate, limit: float) -> float:
    """Two-sided p of the hypothesis that the true value is ``limit``; 0 or 1 for a number that is
    counted.

    It is the level at which an interval like this one (:func:`over_repetitions`: a normal one for
    the items, Student's for the seeds, in quadrature) would end at the limit.
    """
    bound = estimate.low if estimate.value > limit else estimate.high
    half, distance = abs(estimate.value - bound), abs(estimate.value - limit)
    freedom = max(estimate.repetitions - 1, 1)
    seeds = scipy.stats.t.isf(0.025, freedom) * estimate.error
    items = np.sqrt(max(half**2 - seeds**2, 0.0)) / scipy.stats.norm.isf(0.025)
    if half == 0 or distance == 0:
        return float(distance == 0)

    def beyond(exponent: float) -> float:
        tail = 10**exponent / 2
        student = scipy.stats.t.isf(tail, freedom) * estimate.error
        return np.hypot(scipy.stats.norm.isf(tail) * items, student) - distance

    smallest = -300.0
    if beyond(smallest) < 0:
        return 0.0
    return float(10 ** scipy.optimize.brentq(beyond, smallest, 0.0))


def adjusted(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's adjusted p-values: as many as these are tested together."""
    from statsmodels.stats.multitest import multipletests

    return multipletests(p_values, method="fdr_bh")[1].tolist() if len(p_values) else []


def perplexity(token_counts: Sequence[int], losses: Sequence[float]) -> Estimate:
    """exp of the mean token loss; the interval is a bootstrap over texts.

    ``losses`` are sums of negative log-likelihood (nats) over each text's ``token_counts``.
    """
    counts, sums = np.asarray(token_counts, float), np.asarray(losses, float)

    def statistic(index: np.ndarray, axis: int = -1) -> np.ndarray:
        return sums[index].sum(axis) / counts[index].sum(axis)

    value = float(np.exp(sums.sum() / counts.sum()))
    if len(sums) < 2:
        return Estimate(value, value, value, len(sums))
    index = np.arange(len(sums))
    found = scipy.stats.bootstrap(
        (index,), statistic, n_resamples=1000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Estimate(value, float(np.exp(found.low)), float(np.exp(found.high)), len(sums))


def crossed_mean(values: np.ndarray) -> Estimate:
    """Mean of ``[rows, columns]``; the interval (bootstrap) resamples both, each on its own.

    For every query with every opening, or every harmful query against every harmless one.
    """
    values = np.asarray(values, float)
    rows, columns = _resampled(*values.shape)
    low, high = np.quantile(((rows @ values) * columns).sum(1), (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high), len(values))


@functools.cache
def _resampled(*lengths: int) -> tuple[np.ndarray, ...]:
    """The weight of each of so many items in 1000 bootstrap samples, ``[1000, length]`` each."""
    rng = np.random.default_rng(0)
    return tuple(rng.multinomial(n, np.full(n, 1 / n), 1000) / n for n in lengths)


def auroc(positive: np.ndarray, negative: np.ndarray) -> Estimate:
    """Probability that a positive's score is above a negative's (ties count half)."""
    a, b = np.asarray(positive, float)[:, None], np.asarray(negative, float)[None]
    return crossed_mean((a > b) + 0.5 * (a == b))


def rank_correlation(first: np.ndarray, second: np.ndarray) -> Estimate:
    """Spearman's, with a bootstrap interval over items; 0 where one side does not vary."""
    a, b = np.asarray(first, float), np.asarray(second, float)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return Estimate(0.0, -1.0, 1.0, len(a))
    rng, n = np.random.default_rng(0), len(a)
    resampled = rng.integers(n, size=(1000, n))
    ranks = [scipy.stats.rankdata(x[resampled], axis=1) for x in (a, b)]
    centred = [r - r.mean(1, keepdims=True) for r in ranks]
    norms = [np.sqrt((c**2).sum(1)).clip(1e-12) for c in centred]
    low, high = np.quantile(
        (centred[0] * centred[1]).sum(1) / (norms[0] * norms[1]), (0.025, 0.975)
    )
    return Estimate(float(scipy.stats.spearmanr(a, b).statistic), float(low), float(high), n)


def paired_p_value(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact McNemar test of two arms on the same prompts (two-sided p)."""
    from statsmodels.stats.contingency_tables import mcnemar

    a, b = _paired(first, second)
    table = [[int((a & b).sum()), int((a & ~b).sum())], [int((~a & b).sum()), int((~a & ~b).sum())]]
    return float(mcnemar(table, exact=True).pvalue)


def _paired(first: Sequence[bool], second: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    if len(first) != len(second):
        raise ValueError("A paired comparison needs both arms on the same items.")
    return np.asarray(first, bool), np.asarray(second, bool)
