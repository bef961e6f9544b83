"""Many claims at once, and what may be said of a pair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from .records import Difference, Equivalence, Estimate, FloatArray, LowerBounds, Verdict
from .tables import p_values_of, tail


def holm(p_values: npt.ArrayLike) -> FloatArray:
    """Holm's adjusted p-values: reject where they are below 5 %, and a false claim in the family is a 5 % event.

    p~_(k) = max_{j <= k} min(1, (K - j + 1) p_(j)). Valid under any dependence; for the declared claims of a study.

    Args:
        p_values: (K,), in any order.

    Returns:
        (K,), in that order.

    Source:
        Holm 1979.

    >>> [round(p, 4) for p in holm([0.01, 0.04, 0.03]).tolist()]
    [0.03, 0.06, 0.06]
    """
    p_K = p_values_of(p_values)
    order_K = np.argsort(p_K, kind="stable")
    adjusted_K = np.empty_like(p_K)
    adjusted_K[order_K] = np.minimum(1, np.maximum.accumulate((len(p_K) - np.arange(len(p_K))) * p_K[order_K]))
    return adjusted_K


def benjamini_hochberg(p_values: npt.ArrayLike) -> FloatArray:
    """Benjamini and Hochberg's q-values, for exploration: of findings with q < 5 %, at most 5 % are false on average.

    q_(k) = min_{j >= k} min(1, K p_(j) / j). Valid under independence and positive dependence.

    Args:
        p_values: (K,), in any order.

    Returns:
        (K,), in that order.

    Source:
        Benjamini & Hochberg 1995.

    >>> [round(q, 4) for q in benjamini_hochberg([0.01, 0.04, 0.03]).tolist()]
    [0.03, 0.04, 0.04]
    """
    p_K = p_values_of(p_values)
    return stats.false_discovery_control(p_K, method="bh") if len(p_K) else p_K


def holm_lower_bounds(
    estimates: Sequence[Estimate | Difference], null: float = 0.5, *, level: float = 0.95, step_down: bool = True
) -> LowerBounds:
    """Lower bounds that all hold at once with probability 1 - α, α = (1 - level)/2, and agree with Holm's test.

    Let R be what Holm's one-sided test of `mean <= null` rejects at α. Then
    low_k = null                                    for k in R (proven above it, and `exceeds_K` is True),
    low_k = mean_k - t(1 - α/(K - |R|), df_k) se_k  otherwise (never above null);
    if R is the whole family, low_k = max(null, mean_k - t(1 - α/K, df_k) se_k).

    The power of stepping down is paid for with numbers: while some members fail, the others are known to be above the
    null, but not by how much. For numbers declare `step_down=False` beforehand (Bonferroni: mean_k - t(1 - α/K, df_k)
    se_k for all); choosing after seeing both has no guarantee. For a family of one, the bound is the lower end of the
    two-sided interval at `level`.

    Args:
        estimates: the family (differences: null=0).
        null: the value to exceed: 0.5 for judgements against the start.
        level: of the two-sided intervals whose lower half these bounds are.
        step_down: Holm if true, Bonferroni if false.

    Source:
        Strassburger & Bretz 2008; Guilbaud 2008 (bounds compatible with step-down tests).

    >>> from prefzoo.benchmarks.statistics import mean
    >>> y_SN = np.random.default_rng(0).normal(0.5, 0.3, (5, 400))
    >>> bounds = holm_lower_bounds([mean(y_SN), mean(y_SN + 0.1)])
    >>> bounds.exceeds_K.tolist(), [round(low, 3) for low in bounds.low_K.tolist()]
    ([False, True], [0.47, 0.5])
    """
    alpha = tail(level)
    mean_K, se_K, df_K = (
        np.array([getattr(e, field) for e in estimates], dtype=float) for field in ("estimate", "se", "df")
    )

    def low_K(members: int) -> FloatArray:
        return mean_K - stats.t.isf(alpha / max(1, members), df_K) * se_K

    if not step_down:
        bonferroni_K = low_K(len(mean_K))
        return LowerBounds(bonferroni_K, bonferroni_K > null, null, level)
    with np.errstate(divide="ignore", invalid="ignore"):
        t_K = np.where(mean_K == null, 0.0, (mean_K - null) / se_K)
    exceeds_K = holm(stats.t.sf(t_K, df_K)) < alpha
    remaining = int((~exceeds_K).sum())
    bound_K = np.where(exceeds_K, null, low_K(remaining)) if remaining else np.maximum(null, low_K(len(mean_K)))
    return LowerBounds(bound_K, exceeds_K, null, level)


def equivalence(gap: Difference, margin: float = 0.02, alpha: float = 0.05) -> Equivalence:
    """Whether A and B differ by less than the margin, by two one-sided t-tests (TOST).

    p = P(T(df) > (margin - |estimate|)/se); equivalent where p < α, that is where the 1 - 2α interval lies inside
    ±margin. A difference that is not significant is *not* thereby equivalence: that is what this test is for.

    Args:
        gap: from `difference`.
        margin: the largest difference that does not matter (0.02: two points of win rate).
        alpha: level of each of the two tests.

    Source:
        Schuirmann 1987.

    >>> from prefzoo.benchmarks.statistics import difference
    >>> a_SN, b_SN = np.random.default_rng(0).normal(0.5, 0.1, (2, 5, 800))
    >>> [equivalence(difference(a_SN, other_SN, paired_seeds=False)).equivalent for other_SN in (b_SN, b_SN + 0.1)]
    [True, False]
    """
    if not margin > 0:
        raise ValueError(f"margin = {margin}: the largest difference that does not matter must be positive")
    room, half = margin - abs(gap.estimate), float(stats.t.isf(alpha, gap.df)) * gap.se
    p = float(stats.t.sf(room / gap.se, gap.df)) if gap.se else float(room <= 0)
    return Equivalence(
        estimate=gap.estimate, se=gap.se, df=gap.df, ci=(gap.estimate - half, gap.estimate + half), level=1 - 2 * alpha,
        p=p, margin=margin, alpha=alpha, equivalent=p < alpha,
    )  # fmt: skip


def verdict(gap: Difference, p_holm: float, *, margin: float = 0.02, alpha: float = 0.05) -> Verdict:
    """What may be said of A against B: better, worse, equivalent (within ±margin), or undecided.

    A significant difference is named as such even where it is smaller than the margin. Beside "undecided" print
    `gap.smallest_detectable`.

    Args:
        gap: from `difference`.
        p_holm: its p after `holm` over the declared family.
        margin: the largest difference that does not matter.
        alpha: level of the family, and of each equivalence test.

    >>> from prefzoo.benchmarks.statistics import difference
    >>> gap = difference([[0.9, 0.8, 0.7, 0.9]], [[0.1, 0.2, 0.2, 0.0]], paired_seeds=False)
    >>> verdict(gap, p_holm=0.01), verdict(gap, p_holm=0.2)
    ('better', 'undecided')
    """
    if not 0 <= p_holm <= 1:
        raise ValueError(f"p_holm = {p_holm} is not a p-value")
    if p_holm < alpha and gap.estimate != 0:
        return "better" if gap.estimate > 0 else "worse"
    return "equivalent" if equivalence(gap, margin, alpha).equivalent else "undecided"
