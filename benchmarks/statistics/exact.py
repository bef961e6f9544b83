"""Exact and robust companions, free of normal distributions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy import stats

from .records import FloatArray, McNemar, PermutationTest, Proportion
from .tables import Clusters, Groups, binary, contrast, mean_of, stream, tail, two_tables

MAX_EXACT = 20_000  # relabellings that are enumerated; beyond this they are drawn


def permutation_test(
    a_SN: npt.ArrayLike,
    b_SN: npt.ArrayLike,
    *,
    paired_seeds: bool,
    clusters: Clusters = None,
    max_relabellings: int = MAX_EXACT,
    seed: int = 0,
) -> PermutationTest:
    """Two-sided permutation test of "A and B are the same", free of any distribution.

    One run each: the sign of each cluster's difference is flipped (2^G ways); a statement about these two runs.
    Independent seeds: the runs are dealt anew to A and B, C(S_A + S_B, S_A) ways. Shared seeds: the sign of each seed's
    difference is flipped, 2^S ways. The last two are statements about the methods on *these* prompts, and few seeds
    cannot give a small p: at least 0.1 for 3 + 3 independent runs, 0.008 for 5 + 5, but 0.0625 for 5 shared seeds.

    p = share of relabellings with |mean| at least as large as observed; all of them where they are at most
    `max_relabellings`, else that many are drawn and p = (1 + hits)/(1 + drawn).

    Args:
        a_SN: one value per seed and prompt.
        b_SN: the same for B, on the same prompts.
        paired_seeds: whether row s of A and of B share their seed.
        clusters: one label per prompt, as in `mean`.
        max_relabellings: as above.
        seed: random seed of the draws.

    Source:
        Fisher 1935; the two ones from Phipson & Smyth 2010.

    >>> a_SN, b_SN = [[0.6, 0.7], [0.7, 0.8], [0.7, 0.7]], [[0.1, 0.2], [0.3, 0.2], [0.2, 0.2]]
    >>> permutation_test(a_SN, b_SN, paired_seeds=False).p
    0.1
    """
    a_SN, b_SN = two_tables(a_SN, b_SN, paired_seeds)
    groups = Groups.of(clusters, a_SN.shape[1])
    d_SN = contrast(a_SN, b_SN, paired_seeds)
    observed = mean_of(d_SN)
    random = stream(seed, "permutation")
    one_run_each = len(a_SN) == len(b_SN) == 1
    if one_run_each or paired_seeds:
        values_U = groups.sums(d_SN)[0] / d_SN.size if one_run_each else d_SN.mean(1) / len(d_SN)
        values_U = values_U[values_U != 0]  # flipping a zero changes nothing
        total = 2 ** len(values_U)
        means = _flipped(values_U, min(total, max_relabellings), total <= max_relabellings, random)
    else:
        values_U = np.concatenate([a_SN.mean(1), b_SN.mean(1)])
        total = math.comb(len(values_U), len(a_SN))
        means = _dealt(values_U, len(a_SN), min(total, max_relabellings), total <= max_relabellings, random)
    exact = total <= max_relabellings
    threshold = abs(observed) - 1e-12 * float(np.abs(values_U).sum())  # equal up to rounding is equal
    hits, count = 0, 0
    for chunk_R in means:
        hits, count = hits + int((np.abs(chunk_R) >= threshold).sum()), count + len(chunk_R)
    p = hits / count if exact else (1 + hits) / (1 + count)
    return PermutationTest(observed, p, "prompts" if one_run_each else "seeds", count, exact)


def _flipped(values_U: FloatArray, count: int, exact: bool, random: np.random.Generator) -> Iterator[FloatArray]:
    for start in range(0, count, 1000):  # in chunks: the signs of 20,000 resamples of 10,000 prompts would not fit
        size = min(1000, count - start)
        if exact:
            flip_RU = (np.arange(start, start + size)[:, None] >> np.arange(len(values_U))) & 1
        else:
            flip_RU = random.integers(0, 2, (size, len(values_U)), dtype=np.int8)
        yield values_U.sum() - 2 * (flip_RU @ values_U)


def _dealt(
    values_U: FloatArray, size_a: int, count: int, exact: bool, random: np.random.Generator
) -> Iterator[FloatArray]:
    every_U = range(len(values_U))
    if exact:
        to_a_RU = np.array(list(itertools.combinations(every_U, size_a)))
    else:
        to_a_RU = random.permuted(np.tile(every_U, (count, 1)), axis=1)[:, :size_a]
    sum_a_R = values_U[to_a_RU].sum(1)
    yield sum_a_R / size_a - (values_U.sum() - sum_a_R) / (len(values_U) - size_a)


def mcnemar(a_N: npt.ArrayLike, b_N: npt.ArrayLike) -> McNemar:
    """Exact McNemar test for right-or-wrong outcomes of two runs on the same prompts.

    p = P(|X - m/2| >= |only_a - m/2|), X ~ Binomial(m, 1/2), over the m = only_a + only_b prompts that one run alone
    solved; p = 1 where there are none. Like every test of single runs it says nothing about other training seeds.

    Args:
        a_N: 0/1 or booleans, one per prompt.
        b_N: the same for B.

    Source:
        McNemar 1947, in its exact form.

    >>> mcnemar([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]).p
    0.03125
    """
    a_N, b_N = binary("a_N", a_N), binary("b_N", b_N)
    if a_N.shape != b_N.shape:
        raise ValueError(f"a_N has shape {a_N.shape} and b_N has shape {b_N.shape}: they must be the same prompts")
    only_a, only_b = int((a_N & ~b_N).sum()), int((b_N & ~a_N).sum())
    discordant = only_a + only_b
    p = float(stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0
    return McNemar(only_a, only_b, len(a_N), p)


def wilson(successes: int, n: int, level: float = 0.95) -> Proportion:
    """Wilson's interval of a share: honest for few trials and for shares near 0 or 1, where mean ± 2 SE is not.

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n). For wins among decided prompts n = wins + losses, and the ties
    are reported beside it.

    Args:
        successes: a whole number.
        n: independent trials.
        level: of the two-sided interval.

    Source:
        Wilson 1927.

    >>> perfect = wilson(10, 10)
    >>> perfect.estimate, round(perfect.ci[0], 3), perfect.ci[1]
    (1.0, 0.722, 1.0)
    """
    if n < 1 or not 0 <= successes <= n or int(successes) != successes:
        raise ValueError(f"{successes} successes of {n}: need whole numbers with 0 <= successes <= n and n >= 1")
    z, share = float(stats.norm.isf(tail(level))), successes / n
    centre, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
    ci = (max(0.0, low) if successes else 0.0, min(1.0, high) if successes < n else 1.0)
    return Proportion(share, ci, level, int(n))
