"""Exact and robust companions of the t-tests: permutations, signs, ranks, right-or-wrong outcomes, shares."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from scipy import stats

from .frames import TableLike, one_run, read_methods, read_two
from .records import CochranQ, FloatArray, McNemar, PermutationTest, Proportion, SignTest, Wilcoxon
from .tables import Clusters, binary, contrast, mean_of, stream, tail

MAX_EXACT = 20_000  # relabellings that are enumerated; beyond this they are drawn


def permutation_test(
    a_SN: TableLike,
    b_SN: TableLike,
    *,
    paired_seeds: bool,
    clusters: Clusters = None,
    max_relabellings: int = MAX_EXACT,
    seed: int = 0,
    unparsed: float | None = None,
    **names: str,
) -> PermutationTest:
    """Two-sided permutation test of "A and B are the same", free of any distribution.

    One run each: the sign of each cluster's difference is flipped (2^G ways); a statement about these two runs.
    Independent seeds: the runs are dealt anew to A and B, C(S_A + S_B, S_A) ways. Shared seeds: the sign of each seed's
    difference is flipped, 2^S ways. The last two are statements about the methods on *these* prompts, and few seeds
    cannot give a small p: at least 0.1 for 3 + 3 independent runs, 0.008 for 5 + 5, but 0.0625 for 5 shared seeds.

    p = share of relabellings with |mean| at least as large as observed; all of them where they are at most
    `max_relabellings`, else that many are drawn and p = (1 + hits)/(1 + drawn).

    Args:
        a_SN: one value per seed and prompt, an array or a frame as in `mean`.
        b_SN: the same for B, on the same prompts.
        paired_seeds: whether row s of A and of B share their seed.
        clusters: one label per prompt, as in `mean`.
        max_relabellings: as above.
        seed: random seed of the draws.
        unparsed, names: as in `mean`.

    Source:
        Fisher 1935; the two ones from Phipson & Smyth 2010.

    >>> a_SN, b_SN = [[0.6, 0.7], [0.7, 0.8], [0.7, 0.7]], [[0.1, 0.2], [0.3, 0.2], [0.2, 0.2]]
    >>> permutation_test(a_SN, b_SN, paired_seeds=False).p
    0.1
    """
    a, b = read_two(a_SN, b_SN, paired_seeds, clusters, unparsed, names)
    a_SN, b_SN, groups = a.y_SN, b.y_SN, a.groups
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


def sign_flip(
    d_N: TableLike,
    *,
    clusters: Clusters = None,
    max_relabellings: int = MAX_EXACT,
    seed: int = 0,
    unparsed: float | None = None,
    **names: str,
) -> PermutationTest:
    """Two-sided sign-flip test that the values of one run are symmetric around 0: `permutation_test` against zeros.

    Args:
        d_N: one value per prompt, such as y - 0.5, an array or a frame as in `mean`.
        clusters, max_relabellings, seed: as in `permutation_test`.
        unparsed, names: as in `mean`.

    Source:
        Fisher 1935.

    >>> sign_flip([0.5, 0.5, 0.0, 0.5, 0.5]).p
    0.125
    """
    d = one_run(d_N, clusters, unparsed, names, "d_N")
    zero = replace(d, y_SN=np.zeros_like(d.y_SN), n_unparsed=0)
    return permutation_test(d, zero, paired_seeds=False, max_relabellings=max_relabellings, seed=seed)


def sign_test(a_N: TableLike, b_N: TableLike, *, level: float = 0.95, **names: str) -> SignTest:
    """Exact sign test of two runs on the same prompts: does A win more often than B among the prompts that differ?

    p = P(|X - m/2| >= |plus - m/2|), X ~ Binomial(m, 1/2), m = plus + minus; ties are shown and not counted.

    For *discrete* judgements only. With a judge that gives probabilities a difference of 1e-6 counts as much as one
    of 1, and the answer is to another question: on a real pair of models 3.6 points apart the paired t-test gives
    p = 2e-5 and the sign test 1e-20. Use `difference` there.

    Args:
        a_N: one value per prompt, an array or a frame as in `mean`.
        b_N: the same for B.
        level: of Wilson's interval of the share of decided prompts that A wins.
        names: columns of a frame, as in `mean`.

    Source:
        Arbuthnott 1710; Dixon & Mood 1946.

    >>> sign_test([1, 1, 1, 1, 0.5], [0, 0, 0.5, 0, 0.5]).p
    0.125
    """
    d_N = _run_difference(a_N, b_N, names)
    plus, minus = int((d_N > 0).sum()), int((d_N < 0).sum())
    ties, decided = len(d_N) - plus - minus, plus + minus
    if not decided:
        return SignTest(0.5, (0.0, 1.0), level, 1.0, 0, 0, ties)
    share = wilson(plus, decided, level)
    return SignTest(share.estimate, share.ci, level, float(stats.binomtest(plus, decided).pvalue), plus, minus, ties)


def wilcoxon(a_N: TableLike, b_N: TableLike, **names: str) -> Wilcoxon:
    """Wilcoxon's signed-rank test of two runs on the same prompts, with Pratt's treatment of ties.

    Ranks of |d|, zeros included, are summed by the sign of d; Pratt ranks the zeros and then leaves them out, so that
    ties count against a difference. Normal approximation. For ordinal verdicts such as d in {-1, -½, 0, ½, 1};
    for probabilities the same warning as in `sign_test`.

    Args:
        a_N: one value per prompt, an array or a frame as in `mean`.
        b_N: the same for B.
        names: columns of a frame, as in `mean`.

    Source:
        Wilcoxon 1945; Pratt 1959.

    >>> test = wilcoxon([1, 1, 0.5, 1, 1, 0.5], [0, 0.5, 0.5, 0, 0.5, 1])
    >>> test.rank_a, test.rank_b, round(test.p, 3)
    (17.0, 3.0, 0.134)
    """
    d_N = _run_difference(a_N, b_N, names)
    rank_N, ties = stats.rankdata(np.abs(d_N)), int((d_N == 0).sum())
    rank_a, rank_b = float(rank_N[d_N > 0].sum()), float(rank_N[d_N < 0].sum())
    if ties == len(d_N):
        return Wilcoxon(0.5, 1.0, 0.0, 0.0, ties, len(d_N))
    p = float(stats.wilcoxon(d_N, zero_method="pratt", correction=False, method="approx").pvalue)
    return Wilcoxon(rank_a / (rank_a + rank_b), p, rank_a, rank_b, ties, len(d_N))


def mcnemar(a_N: TableLike, b_N: TableLike, **names: str) -> McNemar:
    """Exact McNemar test for right-or-wrong outcomes of two runs on the same prompts.

    p = P(|X - m/2| >= |only_a - m/2|), X ~ Binomial(m, 1/2), over the m = only_a + only_b prompts that one run alone
    solved; p = 1 where there are none. Like every test of single runs it says nothing about other training seeds.

    Args:
        a_N: 0/1 or booleans, one per prompt, an array or a frame as in `mean`.
        b_N: the same for B.
        names: columns of a frame, as in `mean`.

    Source:
        McNemar 1947, in its exact form.

    >>> mcnemar([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]).p
    0.03125
    """
    a, b = read_two(a_N, b_N, False, names=names)
    a_N, b_N = (binary(name, one_run(x, argument=name).y_SN[0]) for name, x in (("a_N", a), ("b_N", b)))
    only_a, only_b = int((a_N & ~b_N).sum()), int((b_N & ~a_N).sum())
    discordant = only_a + only_b
    p = float(stats.binomtest(only_a, discordant).pvalue) if discordant else 1.0
    return McNemar((only_a - only_b) / len(a_N), only_a, only_b, len(a_N), p)


def cochran_q(methods: Mapping[str, TableLike] | TableLike, **names: str) -> CochranQ:
    """Cochran's Q: do K runs solve the same share of the prompts? For right-or-wrong outcomes; McNemar for K = 2.

    Q = (K - 1) [K Σ_k C_k² - T²] / [K T - Σ_i R_i²], with C_k solved by method k, R_i methods that solved prompt i and
    T = Σ C_k; chi-squared with K - 1 degrees of freedom. Prompts that all or none solved do not count.

    Args:
        methods: name -> 0/1 per prompt, an array or a frame; or one frame with a column method.
        names: columns of a frame, as in `mean`.

    Source:
        Cochran 1950.

    >>> test = cochran_q({"a": [1, 1, 1, 1, 0, 1], "b": [0, 1, 0, 0, 0, 1], "c": [0, 0, 0, 1, 0, 1]})
    >>> test.q, test.df, round(test.p, 3), test.n_discordant
    (4.5, 2, 0.105, 4)
    """
    found = read_methods(methods, names=names)
    solved_KN = np.stack([binary(name, one_run(one, argument=name).y_SN[0]) for name, one in found.items()]).astype(int)
    n_methods, n_prompts = solved_KN.shape
    by_method_K, by_prompt_N = solved_KN.sum(1), solved_KN.sum(0)
    total = int(solved_KN.sum())
    spread = n_methods * total - int((by_prompt_N**2).sum())
    q = (n_methods - 1) * (n_methods * int((by_method_K**2).sum()) - total**2) / spread if spread else 0.0
    return CochranQ(
        tuple(found), tuple((by_method_K / n_prompts).tolist()), q, n_methods - 1,
        float(stats.chi2.sf(q, n_methods - 1)), n_prompts, int(((by_prompt_N > 0) & (by_prompt_N < n_methods)).sum()),
    )  # fmt: skip


def _run_difference(a_N: TableLike, b_N: TableLike, names: Mapping[str, str]) -> FloatArray:
    a, b = read_two(a_N, b_N, False, names=names)
    return one_run(a, argument="a_N").y_SN[0] - one_run(b, argument="b_N").y_SN[0]


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
