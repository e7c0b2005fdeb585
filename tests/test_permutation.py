"""The tests themselves, each against scipy, statsmodels, or the definition written out."""

import itertools
import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.api import OLS
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import normal_power
from statsmodels.stats.proportion import proportion_effectsize

from eicap import permutation as tests

TINY = 1e-12


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def signs(units: int) -> np.ndarray:
    """All sign vectors, (2^units, units)."""
    return np.array(list(itertools.product([-1, 1], repeat=units)))


def by_enumeration(d: np.ndarray) -> float:
    return (np.abs(signs(len(d)) @ d) >= abs(d.sum()) - 1e-9).mean()


# Sign flips


@pytest.mark.parametrize("n, p", [(0, 0.5), (1, 0.3), (7, 0.5), (600, 0.25), (3001, 0.5)])
def test_binomial_equals_scipy(n, p):
    expected = scipy_stats.binom.pmf(np.arange(n + 1), n, p)
    np.testing.assert_allclose(tests.binomial(n, p), expected, rtol=1e-9, atol=1e-300)


def test_flip_distribution_equals_enumeration_with_biased_signs():
    d, up = np.array([3, -1, 0, 2, 2, -5, 1, 1]), 0.3
    expected = np.zeros(16)
    for s in signs(len(d)):
        expected[(s @ np.abs(d) + 15) // 2] += np.prod(np.where(s > 0, up, 1 - up))
    np.testing.assert_allclose(tests.flip_distribution(d, up), expected, atol=TINY)


def test_sign_flip_equals_full_enumeration(rng):
    for _ in range(30):
        d = rng.integers(-4, 5, rng.integers(1, 12))
        assert tests.sign_flip(d) == pytest.approx(by_enumeration(d), abs=TINY)


def test_sign_flip_equals_scipy_permutation_test(rng):
    for _ in range(5):
        a, b = rng.binomial(5, 0.4, (2, 10))
        exact = scipy_stats.permutation_test(
            (a, b), lambda a, b, axis: np.sum(b - a, axis=axis), permutation_type="samples", vectorized=True
        )
        assert tests.sign_flip(b - a) == pytest.approx(exact.pvalue, abs=TINY)


@pytest.mark.parametrize("units", [10, 150, 3000])
def test_one_probe_a_dialogue_is_mcnemars_exact_test(rng, units):
    a, b = rng.random((2, units)) < [[0.5], [0.55]]
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    p = tests.sign_flip(b.astype(int) - a)
    assert p == pytest.approx(mcnemar(table, exact=True).pvalue, abs=TINY)
    assert p == pytest.approx(scipy_stats.binomtest(int((b & ~a).sum()), int((a ^ b).sum())).pvalue, abs=TINY)


def test_many_units_equal_whole_number_arithmetic(rng):
    """The number of sign vectors for each sum, counted in integers of any length."""
    d = rng.integers(-3, 4, 900)
    ways = {0: 1}
    for size in np.abs(d).tolist():
        grown: dict[int, int] = {}
        for total, count in ways.items():
            for there in (total - size, total + size):
                grown[there] = grown.get(there, 0) + count
        ways = grown
    extreme = sum(count for total, count in ways.items() if abs(total) >= abs(d.sum()))
    assert tests.sign_flip(d) == pytest.approx(float(Fraction(extreme, 2 ** len(d))), abs=TINY)


@pytest.mark.parametrize("d", [np.zeros(8, int), np.zeros(0, int), np.array([2, -2]), np.array([3])])
def test_nothing_to_tell_the_runs_apart_gives_one(d):
    assert tests.sign_flip(d) == 1


def test_randomised_ties_lie_between_more_extreme_and_as_extreme(rng):
    d = rng.integers(-2, 3, 10)
    more = (np.abs(signs(10) @ d) > abs(d.sum())).mean()
    assert tests.sign_flip(d, ties=0) == pytest.approx(more, abs=TINY)
    assert tests.sign_flip(d, ties=0.25) == pytest.approx(0.75 * more + 0.25 * by_enumeration(d), abs=TINY)


def test_real_differences_of_few_units_are_enumerated(rng):
    d = rng.normal(0.4, 1, (12, 3))
    p, error = tests.random_flips(d, 99, rng)
    np.testing.assert_allclose(p, [by_enumeration(column) for column in d.T], atol=TINY)
    assert not error.any()


def test_equal_sums_in_another_order_are_equal(rng):
    """0.1 + 0.2 - 0.3 is 5.6e-17 in floating point, not 0."""
    d = np.array([0.1, 0.2, -0.3, 0.1, 0.2, 0.6, -0.7])
    p, _ = tests.random_flips(d[:, None], 9, rng)
    assert p[0] == by_enumeration(np.rint(d * 10).astype(int))


def test_random_flips_agree_with_scipy_within_their_standard_error(rng):
    d = rng.normal(0.15, 1, (80, 2))
    p, error = tests.random_flips(d, 50_000, rng)
    np.testing.assert_allclose(error, np.sqrt(p * (1 - p) / 50_001))
    for column, value, se in zip(d.T, p, error):
        theirs = scipy_stats.permutation_test(
            (column,), lambda x, axis: np.sum(x, axis=axis), permutation_type="samples", vectorized=True,
            n_resamples=50_000, rng=1,
        )  # fmt: skip
        assert value == pytest.approx(theirs.pvalue, abs=5 * se)


def test_random_flips_of_integers_agree_with_the_convolution(rng):
    d = rng.integers(-2, 3, (300, 4))
    d[:30, 1] += 1
    p, error = tests.random_flips(d, 100_000, rng)
    for column, value, se in zip(d.T, p, error):
        assert tests.sign_flip(column) == pytest.approx(value, abs=4 * se)


def test_the_observed_arrangement_counts_as_a_draw(rng):
    p, _ = tests.random_flips(np.ones((40, 1)), 999, rng)
    assert p[0] == 1 / 1000


def test_the_same_seed_gives_the_same_p():
    d = np.random.default_rng(1).normal(0.2, 1, (50, 2))
    first = tests.random_flips(d, 5000, np.random.default_rng(3))[0]
    assert (first == tests.random_flips(d, 5000, np.random.default_rng(3))[0]).all()
    assert (first != tests.random_flips(d, 5000, np.random.default_rng(4))[0]).any()


def test_a_contrast_becomes_the_smallest_integers():
    assert tests.on_lattice(np.array([0.2, -0.4, 0.0, 0.6]), 10).tolist() == [1, -2, 0, 3]
    assert tests.on_lattice(np.zeros(3), 7).tolist() == [0, 0, 0]
    assert tests.on_lattice(np.full(100, 1 / 3), 3 * 7919 * 7907).tolist() == [1] * 100
    assert tests.on_lattice(np.array([1.0, 1 / 99_991]), 99_991) is None
    assert tests.on_lattice(np.ones(3), 10**30) is None


# Exchange


def test_ratio_mean_and_cluster_error_equal_statsmodels(rng):
    n = rng.integers(1, 8, 40)
    cluster = np.repeat(np.arange(40), n)
    x = (rng.normal(size=40)[cluster] + rng.normal(size=len(cluster)) > 0).astype(float)
    fit = OLS(x, np.ones_like(x)).fit(cov_type="cluster", cov_kwds={"groups": cluster})
    mean, error = tests.ratio_mean(np.bincount(cluster, x), n)
    assert (mean, error) == pytest.approx((fit.params[0], fit.bse[0]), abs=1e-12)


def test_exchange_agrees_with_scipy_on_welchs_statistic(rng):
    """Units of one probe: the studentised difference is Welch's t."""
    a, b = rng.normal(0, 1, 8), rng.normal(1.2, 2, 6)

    def welch(a, b, axis):
        return scipy_stats.ttest_ind(b, a, equal_var=False, axis=axis).statistic

    exact = scipy_stats.permutation_test(
        (a, b), lambda a, b, axis: np.abs(welch(a, b, axis)), alternative="greater", vectorized=True
    )
    p, error = tests.exchange(np.concatenate([a, b]), np.ones(14), np.arange(14) >= 8, 20_000, rng)
    assert p == pytest.approx(exact.pvalue, abs=4 * error) and 0 < error < 0.005


def test_exchange_equals_the_definition_for_units_of_many_probes(rng):
    y, n, is_b = np.array([1, 4, 0, 2, 5, 3, 2]), np.array([3, 4, 2, 6, 5, 3, 4]), np.arange(7) >= 4

    def t(is_b):
        r, v = [], []
        for side in (~is_b, is_b):
            mean, g = y[side].sum() / n[side].sum(), side.sum()
            r.append(mean)
            v.append(g / (g - 1) * ((y[side] - mean * n[side]) ** 2).sum() / n[side].sum() ** 2)
        return abs(r[1] - r[0]) / math.sqrt(sum(v))

    every = [t(np.isin(np.arange(7), chosen)) for chosen in itertools.combinations(range(7), 3)]
    expected = np.mean([value >= t(is_b) - 1e-9 for value in every])
    p, error = tests.exchange(y, n, is_b, 40_000, rng)
    assert p == pytest.approx(expected, abs=4 * error)


@pytest.mark.parametrize("y_b, expected", [([2, 2, 2], 1.0), ([0, 0, 0], 0.1)])
def test_exchange_without_any_spread_is_no_error(rng, y_b, expected):
    y, n = np.array([2, 2, 2, *y_b]), np.full(6, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p, error = tests.exchange(y, n, np.arange(6) >= 3, 20_000, rng)
    assert p == pytest.approx(expected, abs=4 * error + TINY)


def test_equal_shares_have_no_spread_whatever_the_rounding():
    n = np.array([41, 82, 123])
    for hits in range(1, 41):
        assert tests.ratio_mean(n // 41 * hits, n) == pytest.approx((hits / 41, 0), abs=1e-7)


def test_exchange_counts_the_observed_arrangement_as_a_draw(rng):
    y, is_b = np.concatenate([rng.normal(0, 1, 40), rng.normal(9, 1, 40)]), np.arange(80) >= 40
    assert tests.exchange(y, np.ones(80), is_b, 99, rng)[0] == 1 / 100


# Chance


@pytest.mark.parametrize("options", [2, 4, 5])
def test_above_chance_equals_the_binomial_test(rng, options):
    correct = rng.random(200) < 1.2 / options
    expected = scipy_stats.binomtest(int(correct.sum()), 200, 1 / options, alternative="greater").pvalue
    assert tests.above_chance(correct, np.full(200, 1 / options)) == pytest.approx(expected, abs=TINY)


def test_above_chance_with_different_numbers_of_options_equals_enumeration():
    correct, chance = np.array([1, 0, 1, 1, 0, 1, 0, 1], bool), 1 / np.array([2, 2, 3, 4, 4, 4, 5, 26])
    expected = sum(
        np.prod(np.where(hits, chance, 1 - chance))
        for hits in itertools.product([False, True], repeat=8)
        if sum(hits) >= correct.sum()
    )
    assert tests.above_chance(correct, chance) == pytest.approx(expected, abs=TINY)
    assert tests.above_chance(np.zeros(8, bool), chance) == 1


# Many tests


def test_holm_and_benjamini_hochberg_equal_statsmodels(rng):
    for m in (1, 2, 5, 24, 100):
        p = np.round(rng.random(m) ** 3, 2)  # with ties, zeros and ones
        np.testing.assert_allclose(tests.holm(p), multipletests(p, method="holm")[1], atol=TINY)
        np.testing.assert_allclose(tests.benjamini_hochberg(p), multipletests(p, method="fdr_bh")[1], atol=TINY)


def step_down_by_definition(d: np.ndarray) -> np.ndarray:
    """Step-down max-T, row after row, over all sign vectors."""
    root = np.sqrt((d**2).sum(0))
    t = np.array([[abs(column @ s) / r if r else 0 for column, r in zip(d.T, root)] for s in signs(len(d))])
    observed = t[-1]  # all signs kept
    ranked = sorted(range(d.shape[1]), key=lambda g: -observed[g])
    adjusted, before = np.empty(d.shape[1]), 0.0
    for k, g in enumerate(ranked):
        before = max(before, (t[:, ranked[k:]].max(1) >= observed[g] - 1e-9).mean())
        adjusted[g] = before
    return adjusted


def test_max_t_equals_the_definition_for_twelve_units_or_fewer(rng):
    for _ in range(20):
        d = rng.integers(-2, 3, (rng.integers(2, 11), 4))
        d[:, 3] *= rng.random() < 0.7  # sometimes a row without any difference
        adjusted, error = tests.max_t(d, 99, rng)
        np.testing.assert_allclose(adjusted, step_down_by_definition(d), atol=TINY)
        assert not error.any()


def test_max_t_by_random_flips_agrees_with_the_definition(rng):
    for d in (rng.integers(-1, 3, (14, 4)), rng.normal(0.3, 1, (13, 3))):
        adjusted, error = tests.max_t(d, 40_000, rng)
        np.testing.assert_allclose(adjusted, step_down_by_definition(d), atol=4 * error.max() + TINY)
        assert error.max() > 0


def test_max_t_of_one_row_is_the_sign_flip_test(rng):
    d = rng.integers(-2, 3, (60, 1))
    adjusted, error = tests.max_t(d, 100_000, rng)
    assert adjusted[0] == pytest.approx(tests.sign_flip(d[:, 0]), abs=4 * error[0] + TINY)


def test_max_t_does_not_drown_a_sparse_row(rng):
    d = rng.integers(-3, 4, (500, 5))
    d[:, 0] = 0
    d[:14, 0] = 1  # 14 differences, all one way
    assert tests.max_t(d, 20_000, rng)[0][0] < 0.01


# Size


def test_cohens_h_equals_statsmodels():
    assert tests.cohens_h(0.3, 0.55) == pytest.approx(proportion_effectsize(0.55, 0.3))
    assert tests.cohens_h(1.0, 0.0) == pytest.approx(-math.pi)


@pytest.mark.parametrize("most", [1, 9])
def test_bootstrap_agrees_with_scipy(rng, most):
    """With one probe there are three kinds of units, with up to nine nearly as many as units."""
    n = rng.integers(1, most + 1, 60)
    d = rng.binomial(n, 0.6) - rng.binomial(n, 0.4)
    theirs = scipy_stats.bootstrap(
        (d, n), lambda d, n, axis: d.sum(axis) / n.sum(axis), paired=True, vectorized=True, method="percentile",
        n_resamples=40_000, rng=1,
    ).confidence_interval  # fmt: skip
    draws = tests.bootstrap(np.stack([d, 0 * d], 1), np.stack([n, n], 1), 40_000, rng)
    assert draws.shape == (40_000, 2) and not draws[:, 1].any()
    assert np.quantile(draws[:, 0], [0.025, 0.975]) == pytest.approx([theirs.low, theirs.high], abs=0.004)


def power_by_definition(units: int, rate: float, difference: float, alpha: float) -> float:
    """Of McNemar's exact test: a sum over all numbers of discordant units and of wins."""
    rate = min(1, max(rate + difference**2, difference))
    power = 0
    for discordant in range(units + 1):
        wins = np.arange(discordant + 1)
        p = np.minimum(1, 2 * scipy_stats.binom.cdf(np.minimum(wins, discordant - wins), discordant, 0.5))
        chances = scipy_stats.binom.pmf(wins, discordant, (1 + difference / rate) / 2)
        power += scipy_stats.binom.pmf(discordant, units, rate) * chances[p <= alpha].sum()
    return power


@pytest.mark.parametrize("units, discordant, alpha", [(60, 20, 0.05), (60, 0, 0.05), (40, 40, 0.01), (8, 1, 0.05)])
def test_detectable_with_one_probe_has_the_power_it_promises(units, discordant, alpha):
    d = np.where(np.arange(units) < discordant, np.where(np.arange(units) % 2, 1, -1), 0)
    found = tests.detectable(d, np.ones(units, int), alpha)
    rate = discordant / units
    assert power_by_definition(units, rate, found, alpha) >= 0.8 - 1e-9
    assert power_by_definition(units, rate, found - 2e-4, alpha) < 0.8


def test_detectable_with_many_probes_has_the_power_it_promises():
    """Signs biased until 80 % of the outcomes, weighted, are significant; then the difference comes on top."""
    d, n, alpha = np.array([1, -2, 1, 1, -1, 2, -1, 3, -1, 1, 0, 0]), np.full(12, 5), 0.1
    all_signs, sizes = signs(10), np.abs(d[:10])
    sums = all_signs @ sizes
    p = np.array([(np.abs(sums) >= abs(s)).mean() for s in sums])

    def power(bias):
        return np.prod(np.where(all_signs > 0, (1 + bias) / 2, (1 - bias) / 2), axis=1)[p <= alpha].sum()

    found = tests.detectable(d, n, alpha)
    mean = 60 * found / 12  # of a unit; its square is the share r of the mean square, which it has grown
    r = mean**2 / (mean**2 + (d**2).sum() / 12)
    bias = math.sqrt(12 * r * (d**2).sum()) / sizes.sum()
    assert power(bias) >= 0.8 - 1e-9 and power(bias - 3e-4) < 0.8


@pytest.mark.parametrize("probes", [1, 3])
def test_detectable_says_where_no_difference_would_do(probes):
    for units, alpha, possible in ((5, 0.05, False), (6, 0.05, True), (7, 0.01, False), (8, 0.01, True)):
        found = tests.detectable(np.zeros(units, int), np.full(units, probes), alpha)
        assert math.isfinite(found) == possible and (not possible or 0 < found <= 1)


def test_detectable_of_units_that_hardly_disagree_changes_one_probe_of_each(rng):
    d = np.zeros(60, int)
    d[:3] = [1, -2, 1]
    one = tests.detectable(np.sign(d), np.ones(60, int), 0.05)
    assert tests.detectable(d, np.full(60, 4), 0.05) == pytest.approx(one / 4)
    d[:5] = 1  # still one unit too few
    assert tests.detectable(d, np.full(60, 4), 0.05) < 0.05


def test_detectable_shrinks_with_the_sample_and_grows_with_the_family(rng):
    d = rng.integers(-2, 3, 800)
    n = np.full(800, 4)
    assert tests.detectable(d, n, 0.05) < tests.detectable(d, n, 0.01) < tests.detectable(d[:200], n[:200], 0.01)


def test_detectable_normal_equals_statsmodels():
    power = normal_power(tests.detectable_normal(0.02, 0.05) / 0.02, 1, 0.05, alternative="larger")
    assert normal_power(tests.detectable_normal(0.02, 0.05) / 0.02, 1, 0.05) == pytest.approx(0.8, abs=1e-4)
    assert power > 0.8


def test_detectable_for_real_scores_is_found_in_four_of_five_samples(rng):
    n, found = np.ones(60, int), 0
    for _ in range(400):
        difference = tests.detectable_real(rng.normal(size=60), n, 0.05)
        found += tests.random_flips(rng.normal(difference, 1, (60, 1)), 400, rng)[0][0] <= 0.05
    assert found / 400 == pytest.approx(0.8, abs=0.06)
