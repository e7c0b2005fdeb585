"""Permutation tests for language models scored on probes that share dialogues. Arrays in, numbers out.

The probes of a dialogue share a text, so the *unit* that is exchanged is the dialogue (or, where the same
situation is there in two languages, the pair of dialogues). Two runs on the same units are compared by flipping
signs, two different sets of units by exchanging them, one run with chance by the answer keys.

p-values are exact (the whole null distribution, by convolution or enumeration) or Monte Carlo: then the observed
arrangement counts as one of the draws, p = (k + 1) / (n + 1), so that p is valid for every n (Phipson and Smyth 2010).

Every test takes `ties`, the weight of outcomes exactly as extreme as the observed one. It is 1: P(T >= t). With a
uniform random number instead, p is exactly uniform under the null, which is how benchmarks/calibration.py proves it.
"""

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist

import numpy as np

ENUMERATED = 12  # up to so many units, all 2^units sign flips are tried instead of random ones
BLOCK = 500_000  # elements of a block of draws: it stays in the cache, and memory stays under some 20 MB
WIDEST = 20_000  # the widest distribution that is still convolved
ROUNDING = 1e-10  # two sums this close, relative to their size, are equal: one sum in two orders differs by rounding


# The same units under two runs: sign flips


def binomial(n: int, p: float) -> np.ndarray:
    """P(k successes in n trials), k = 0 ... n, by repeated squaring of (1 - p, p): sums of positive terms only."""
    pmf = np.ones(1)
    for bit in f"{n:b}":
        pmf = np.convolve(pmf, pmf)
        if bit == "1":
            pmf = np.convolve(pmf, [1 - p, p])
    return pmf


def flip_distribution(d: np.ndarray, up: float = 0.5) -> np.ndarray:
    """The exact distribution of S = sum s_i |d_i| for independent signs with P(s_i = +1) = up, by convolution.

    d: (units,) integers. Returns pmf with pmf[v] = P(S = 2 v - W), v = 0 ... W, where W = sum |d_i|. Units of one
    size k together give k times a binomial; the sizes are convolved. up = 1/2 is the null, others are for power.
    """
    pmf = np.ones(1)
    for size, count in zip(*np.unique(np.abs(d[d != 0]), return_counts=True)):
        stretched = np.zeros(size * count + 1)
        stretched[::size] = binomial(count, up)
        pmf = np.convolve(pmf, stretched)
    return pmf


def _distances(pmf: np.ndarray) -> np.ndarray:
    """|S| at each place of flip_distribution."""
    return np.abs(2 * np.arange(len(pmf)) - (len(pmf) - 1))


def sign_flip(d: np.ndarray, ties: float = 1.0) -> float:
    """Two-sided p-value of the paired test, P(|S| >= |sum d|): exact for any number of units.

    d: (units,) integers, each unit's difference between runs A and B (sum over its probes of correct_B - correct_A).
    Null: within every unit A and B are exchangeable. Exchanged: the two runs' names in a unit, which flips the sign
    of d_i. With one probe a unit this is McNemar's exact test. Fisher (1935), The Design of Experiments, section 21.
    """
    pmf, observed = flip_distribution(d), abs(int(d.sum()))
    distances = _distances(pmf)
    return min(1.0, pmf[distances > observed].sum() + ties * pmf[distances == observed].sum())


def on_lattice(z: np.ndarray, denominator: int) -> np.ndarray | None:
    """Fractions z with a common denominator as the smallest integers in the same proportions, for sign_flip.

    None where their sum is so large that the convolution would take seconds.
    """
    if denominator * np.abs(z).sum() > 2**40:
        return None
    whole = np.rint(z * denominator).astype(np.int64)
    whole //= max(1, np.gcd.reduce(whole))
    return whole if np.abs(whole).sum() <= WIDEST else None


def flips(units: int, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Sign flips in blocks (block, units) of 1 = kept and 0 = flipped, the observed arrangement (all kept) among them.

    All 2^units of them for 12 units or fewer, else the observed one and `draws` random ones.
    """
    if units <= ENUMERATED:
        yield (np.arange(2**units)[:, None] >> np.arange(units) & 1).astype(np.uint8)
        return
    yield np.ones((1, units), np.uint8)
    size = max(1, BLOCK // units)
    for start in range(0, draws, size):
        block = min(size, draws - start)
        random = rng.integers(0, 256, (block, -(-units // 8)), dtype=np.uint8)
        yield np.unpackbits(random, axis=1, count=units)


def flipped_sums(d: np.ndarray, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """sum_i s_i d_ig in blocks (block, rows), one sign vector for all rows: s = 2 kept - 1, one matrix product.

    d: (units, rows), without the units that differ in no row: their signs change nothing.
    """
    whole = np.issubdtype(d.dtype, np.integer) and np.abs(d).sum(0).max(initial=0) < 2**24
    d = d.astype(np.float32 if whole else np.float64)  # float32 holds integers below 2^24 exactly
    for kept in flips(len(d), draws, rng):
        yield 2 * (kept.astype(d.dtype) @ d) - d.sum(0)


def _shares(counts: np.ndarray, units: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts among all arrangements tried -> p-values and their standard errors (0 where all there are were tried)."""
    total = 2**units if units <= ENUMERATED else draws + 1
    p = counts / total
    return p, np.zeros_like(p) if units <= ENUMERATED else np.sqrt(p * (1 - p) / total)


def random_flips(
    d: np.ndarray, draws: int, rng: np.random.Generator, ties: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The sign-flip test for real differences, each column of d (units, rows) by itself: p-values, standard errors.

    Null and exchange as in sign_flip. Exact by enumeration for 12 units or fewer, else Monte Carlo.

    A *contrast* (one layer's improvement minus the mean of the others', Arabic's minus English's) is tested by
    passing z_i = sum_g w_g d_ig / n_g. That is exact where A and B are exchangeable. Where they differ, but equally in
    all rows, signs are not strictly exchangeable any more and the test is asymptotic: sum z_i then has mean zero, is
    nearly normal over many units, and the flips' variance sum z_i^2 is, if anything, larger than its own.
    """
    d = d[d.any(axis=1)]
    observed, slack = np.abs(d.sum(0)), ROUNDING * np.abs(d).sum(0)
    counts = np.zeros(d.shape[1])
    for sums in flipped_sums(d, draws, rng):
        more = (np.abs(sums) > observed + slack).sum(0)
        counts += more + ties * ((np.abs(sums) >= observed - slack).sum(0) - more)
    return _shares(counts, len(d), draws)


# Two different sets of units: exchange


def ratio_moments(sums: np.ndarray, units: int) -> tuple[np.ndarray, np.ndarray]:
    """Ratio mean r = sum y / sum n and its cluster variance, G / (G - 1) * sum (y - r n)^2 / (sum n)^2.

    sums: (..., 5), the sums over units of y, n, y^2, y n, n^2. Cochran (1977), Sampling Techniques, chapter 6.
    """
    y, n, yy, yn, nn = np.moveaxis(sums, -1, 0)
    r = y / n
    squares = np.maximum(yy - 2 * r * yn + r * r * nn, 0)  # rounding can give -1e-16
    return r, units / (units - 1) * squares / n**2


def ratio_mean(y: np.ndarray, n: np.ndarray) -> tuple[float, float]:
    """Ratio mean sum y / sum n over units, and its cluster standard error."""
    sums = np.array([y.sum(), n.sum(), (y * y).sum(), (y * n).sum(), (n * n).sum()], dtype=float)
    r, variance = ratio_moments(sums, len(y))
    return float(r), math.sqrt(variance)


def _studentised(b: np.ndarray, total: np.ndarray, units_b: int, units: int) -> np.ndarray:
    """(r_B - r_A) / its standard error; 0 where nothing differs, infinite where only the standard error is 0."""
    r_b, v_b = ratio_moments(b, units_b)
    r_a, v_a = ratio_moments(total - b, units - units_b)
    difference = np.where(np.abs(r_b - r_a) <= ROUNDING, 0, r_b - r_a)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0, difference / np.sqrt(v_a + v_b))


def exchange(
    y: np.ndarray, n: np.ndarray, is_b: np.ndarray, draws: int, rng: np.random.Generator, ties: float = 1.0
) -> tuple[float, float]:
    """Two-sided p-value of the unpaired test, and its Monte Carlo standard error.

    y, n: (units,) each unit's score and number of probes; is_b: which units are B's, at least two a side.
    Null: the units of A and B are drawn alike, so any of them may belong to either side; exchanged: the units.
    The statistic is studentised, which keeps the level asymptotically even where only the *means* are equal and sizes
    or variances are not, as the plain difference does not. Janssen (1997); Chung and Romano (2013), Ann. Stat. 41(2).
    """
    moments = np.stack([y, n, y * y, y * n, n * n], axis=1).astype(float)
    total, units, units_b = moments.sum(0), len(y), int(is_b.sum())
    observed = abs(_studentised(is_b @ moments, total, units_b, units))
    low, high = observed * (1 - ROUNDING), observed * (1 + ROUNDING)
    count, size = ties, max(1, BLOCK // units)  # the observed arrangement ties with itself
    for start in range(0, draws, size):
        sides = np.tile(is_b, (min(size, draws - start), 1))
        drawn = np.abs(_studentised(rng.permuted(sides, axis=1) @ moments, total, units_b, units))
        more = (drawn > high).sum()
        count += more + ties * ((drawn >= low).sum() - more)
    p = count / (draws + 1)
    return float(p), math.sqrt(p * (1 - p) / (draws + 1))


# One run against chance


def above_chance(correct: np.ndarray, chance: np.ndarray, ties: float = 1.0) -> float:
    """One-sided p-value that a run knows more than nothing, P(X >= sum correct): exact, by convolution.

    correct: (probes,) booleans; chance: (probes,) 1 / number of options.
    Null: each probe's key is uniform over its options, independent of other keys and of the predictions. Then each
    prediction is right with probability `chance` whatever made it, a taste for some letter or a text shared by
    many probes included: it is the keys that are exchanged, not the predictions. That rests on the bench. Keys that
    stand more often in one place can be met by a favourite letter (not by predictions averaged over rotations, where
    every option has stood in every place), and keys that are often the longest option by a taste for long ones.
    """
    pmf = np.ones(1)
    for p, count in zip(*np.unique(chance, return_counts=True)):
        pmf = np.convolve(pmf, binomial(count, p))
    hits = int(correct.sum())
    return min(1.0, pmf[hits + 1 :].sum() + ties * pmf[hits])


# Many tests at once


def holm(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values that control the chance of even one false positive, whatever the tests' dependence.

    Holm (1979), Scand. J. Stat. 6: the k-th smallest of m times m - k + 1, made monotone.
    """
    order, m = np.argsort(p), len(p)
    adjusted = np.empty(m)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(m, 0, -1)))
    return adjusted


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values that control the expected share of false positives among the positives.

    Benjamini and Hochberg (1995), JRSS B 57: the k-th smallest of m times m / k, made monotone from above.
    Valid for independent or positively dependent tests.
    """
    order, m = np.argsort(p)[::-1], len(p)
    adjusted = np.empty(m)
    adjusted[order] = np.minimum(1, np.minimum.accumulate(p[order] * m / np.arange(m, 0, -1)))
    return adjusted


def max_t(d: np.ndarray, draws: int, rng: np.random.Generator, ties: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Step-down max-T: adjusted p-values and their standard errors for the columns of d (units, rows).

    T_g = |sum_i d_ig| / sqrt(sum_i d_ig^2). One sign a unit for all rows keeps how the rows hang together; the root,
    which no flip changes, keeps a sparse row from drowning in the others' spread. The largest T is compared with the
    flips' largest over all rows, the second with their largest over all rows but the first, and so on. Controls the
    chance of even one false positive. Exact by enumeration for 12 units or fewer, else Monte Carlo.
    Westfall and Young (1993), Resampling-Based Multiple Testing, algorithm 4.1.

    Where the columns are several pairs of runs, common signs give each column its exact distribution and all of them
    the right covariances, but not their exact joint distribution: the adjustment is then asymptotic.
    """
    d = d[d.any(axis=1)]
    root = np.sqrt((d.astype(float) ** 2).sum(0))
    root[root == 0] = 1  # a row without any difference has T = 0, and p = 1
    observed = np.abs(d.sum(0)) / root
    order = np.argsort(observed)  # smallest first: a row is compared with the largest of itself and those before it
    low, high = observed[order] - ROUNDING, observed[order] + ROUNDING  # T is of order 1
    counts = np.zeros(d.shape[1])
    for sums in flipped_sums(d, draws, rng):
        largest = np.maximum.accumulate((np.abs(sums) / root)[:, order], axis=1)
        more = (largest > high).sum(0)
        counts += more + ties * ((largest >= low).sum(0) - more)
    p, error = _shares(counts, len(d), draws)
    p = np.maximum.accumulate(p[::-1])[::-1]  # no row below one with a larger T
    adjusted, errors = np.empty_like(p), np.empty_like(p)
    adjusted[order], errors[order] = p, error
    return adjusted, errors


# Size, not only significance


def cohens_h(a: float, b: float) -> float:
    """Cohen's h, 2 asin sqrt b - 2 asin sqrt a: 0.2 is called small, 0.5 medium, 0.8 large. Cohen (1988), chapter 6."""
    return 2 * math.asin(math.sqrt(b)) - 2 * math.asin(math.sqrt(a))


def bootstrap(d: np.ndarray, n: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Ratios sum d / sum n over units drawn with replacement: (draws, rows). d, n: (units, rows).

    One drawing serves all rows, so that differences between rows can be taken draw by draw. Quantiles of a column
    are the percentile interval. Efron and Tibshirani (1993), An Introduction to the Bootstrap, chapter 13.
    """
    (units, rows), both = d.shape, np.hstack([d, n]).astype(float)
    kinds, times = np.unique(both, axis=0, return_counts=True)
    alike = 4 * len(kinds) < units  # then units that are alike are drawn together
    found, size = [], max(1, BLOCK // units)
    for start in range(0, draws, size):
        block = min(size, draws - start)
        if alike:
            sums = rng.multinomial(units, times / units, block).astype(float) @ kinds
        else:
            chosen = rng.integers(0, units, (block, units), dtype=np.int32)
            chosen += units * np.arange(block, dtype=np.int32)[:, None]
            drawn = np.bincount(chosen.ravel(), minlength=block * units).reshape(block, units)
            sums = drawn.astype(float) @ both
        found.append(sums[:, :rows] / np.maximum(sums[:, rows:], 1))
    return np.concatenate(found)


def detectable(d: np.ndarray, n: np.ndarray, alpha: float, power: float = 0.8) -> float:
    """The smallest true difference in accuracy that sign_flip would find at `alpha` with this power; inf where none.

    d, n: (units,) integers, differences and numbers of probes. The runs are taken to disagree as often as they were
    seen to, or, where winning every disagreement would not do, as often as is needed. One probe a unit: exact over
    the binomial number of disagreements. More: the convolution of sign_flip with biased signs, at the sizes |d_i|
    that were seen; of units that hardly ever disagree, at most one probe is taken to change.
    """
    d, n = d[n > 0], n[n > 0]
    needed = 1 + math.ceil(math.log2(1 / alpha))  # p = 2^(1 - units) where all differ, and one way
    seen = np.count_nonzero(d)
    if n.max() == 1 or seen < needed:
        changed = _smallest(lambda x: _power_one_probe(len(d), seen / len(d), x, alpha), power)
        return changed * len(d) / n.sum()
    reached = _rejected(flip_distribution(d), alpha)
    bias = _smallest(lambda x: flip_distribution(d, (1 + x) / 2)[reached].sum(), power)
    return _on_top(bias * np.abs(d).sum() / n.sum(), d, n)


def detectable_real(d: np.ndarray, n: np.ndarray, alpha: float, power: float = 0.8) -> float:
    """`detectable` for real differences, by the normal approximation."""
    return _on_top(detectable_normal(math.sqrt((d * d).sum()) / n.sum(), alpha, power), d, n)


def detectable_normal(error: float, alpha: float, power: float = 0.8) -> float:
    """The smallest true difference that a test finds whose statistic is nearly normal with this standard error."""
    z = NormalDist().inv_cdf
    return (z(1 - alpha / 2) + z(power)) * error


def _on_top(difference: float, d: np.ndarray, n: np.ndarray) -> float:
    """A true difference comes on top of the units' spread, and so adds to the sum of d^2 that a flip test weighs it by.

    The flips say which share r of a unit's mean square must be its squared mean. With the spread as it was
    seen, that takes a difference larger by 1 / sqrt(1 - r).
    """
    units = np.count_nonzero(n)
    r = units * (difference * n.sum() / units) ** 2 / max((d * d).sum(), 1e-300)
    found = difference / math.sqrt(1 - r) if r < 1 else math.inf
    return found if found <= 1 or not np.issubdtype(d.dtype, np.integer) else math.inf


def _smallest(power_at: Callable[[float], float], power: float) -> float:
    """The smallest x in [0, 1] with power_at(x) >= power, to 1e-4, by bisection; inf where not even 1 will do."""
    if power_at(1.0) < power:
        return math.inf
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if power_at(middle) >= power else (middle, high)
    return high


def _rejected(null: np.ndarray, alpha: float) -> np.ndarray:
    """Which outcomes of flip_distribution have p <= alpha."""
    distances = _distances(null)
    by_distance = np.bincount(distances, null)
    p = np.cumsum(by_distance[::-1])[::-1]  # P(|S| >= distance)
    return p[distances] <= alpha


def _power_one_probe(units: int, rate: float, difference: float, alpha: float) -> float:
    """P(p <= alpha) of McNemar's exact test: over the number D of discordant units, and over the wins among them.

    A difference comes on top of the spread here too: the rate of discordant units is then rate + difference^2.
    """
    rate = min(1.0, max(rate + difference**2, difference))
    if rate == 0:
        return 0.0
    spread = 8 * math.sqrt(units * rate * (1 - rate)) + 8  # beyond: less than 1e-14
    first, last = max(0, int(units * rate - spread)), min(units, int(units * rate + spread))
    D = np.arange(first, last + 1)[:, None]
    wins = (D + 1) // 2 + np.arange(min(last // 2, int(3 * math.sqrt(last))) + 1)  # of the side with more, to 6 sigma
    log_ways = _log_ways(D, wins) - (2 * wins == D) * math.log(2)  # a draw is one outcome, not two

    def pmf(log_ways, k, n, p):
        return np.exp(log_ways + k * math.log(max(p, 1e-300)) + (n - k) * math.log(max(1 - p, 1e-300)))

    null = 2 * pmf(log_ways, wins, D, 0.5)
    kept = 1 - np.cumsum(null, axis=1) + null > alpha  # P(|S| >= 2 wins - D)
    up = (1 + difference / rate) / 2
    found = pmf(log_ways, wins, D, up) + pmf(log_ways, wins, D, 1 - up)
    weights = pmf(_log_ways(units, D[:, 0]), D[:, 0], units, rate)
    return 1 - float(weights @ np.where(kept, found, 0).sum(1))


def _log_ways(n, k) -> np.ndarray:
    """log of n choose k; -inf where k > n."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, np.max(n) + 1)))])
    ways = log_factorial[n] - log_factorial[np.minimum(k, n)] - log_factorial[np.maximum(n - k, 0)]
    return np.where(k > n, -np.inf, ways)
