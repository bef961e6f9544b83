"""Many pairs at once when methods share prompts: step-down max-t, sharper than Holm, and simultaneous intervals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import special

from .crossed import difference, variance_over_seeds
from .frames import Table, TableLike, read_methods
from .records import Difference, FloatArray, MaxT
from .tables import Clusters, centred, contrast, over_seeds, probability, stream


def max_t(
    methods: Mapping[str, TableLike] | TableLike,
    *,
    paired_seeds: bool,
    pairs: Sequence[tuple[str, str]] | Literal["all"] = "all",
    clusters: Clusters = None,
    level: float = 0.95,
    resamples: int = 20_000,
    seed: int = 0,
    unparsed: float | None = None,
    **names: str,
) -> MaxT:
    """Differences of a family of pairs with p-values and intervals adjusted by the joint distribution of their errors.

    All d_k = mean(A_k) - mean(B_k) are redrawn together around 0, with one normal weight per cluster of prompts for all
    pairs, and one per seed: d*_k = Σ_g w_g D_kg + Σ_s v_s λ_k E_ks, with D the prompts' and E the seeds' deviations of
    d_k, and λ² = 1 - V_cells/V_seeds, so that var(d*_k) is the SE² of `difference`. Independent seeds have weights per
    method, and d*_k is stretched to the tails of t(df_k). Shared seeds have one set of weights, and the spread of
    so few seeds is redrawn, too: V_seeds ν/χ²_ν for V_seeds, ν = S - 1. With p*_k = P(|d*_k| larger still),
    p~_(k) = max_{j <= k} P(min over (j) ... (K) of p* <= p_(j)), and the intervals are d_k ± the 1 - c quantile of
    |d*_k|, with c the 1 - level quantile of the smallest p* of all. Never below the p of `difference`.

    The smallest p stands for the largest |t| because the pairs may have different degrees of freedom. On null tables of
    500 prompts, 4 methods, 5 or 10 seeds and seed spreads up to 3 points, the intervals hold all at once in 93 to 98 %.
    Holm's test with 5 shared seeds errs in 6 % where seeds dominate: Satterthwaite's df are too many in far tails.

    Args:
        methods: name -> table, an array or a frame as in `mean`; or one frame with a column method.
        paired_seeds: whether row s of all methods shares its seed.
        pairs: of names; or "all".
        clusters: one label per prompt, as in `mean`.
        level: of the simultaneous intervals.
        resamples: joint draws.
        seed: random seed of the draws.
        unparsed, names: as in `mean`.

    Raises:
        ValueError: for a pair of an unknown method.

    Source:
        Romano & Wolf 2005; Westfall & Young 1993 (smallest p); the two-way bootstrap with normal weights as in
        Chernozhukov, Chetverikov & Kato 2013 (arXiv:1212.6906).

    >>> y_SN = np.random.default_rng(0).normal(0.5, 0.3, (5, 400))
    >>> found = max_t({"a": y_SN, "b": y_SN + 0.001, "c": y_SN[:, ::-1] + 0.1}, paired_seeds=False)
    >>> [(*pair, bool(p < 0.05)) for pair, p in zip(found.pairs, found.p_adjusted)]
    [('a', 'b', False), ('a', 'c', True), ('b', 'c', True)]
    """
    tables = read_methods(methods, clusters, unparsed, names)
    chosen = list(itertools.combinations(tables, 2)) if pairs == "all" else [(a, b) for a, b in pairs]
    for name in itertools.chain.from_iterable(chosen):
        if name not in tables:
            raise ValueError(f"pairs: no method {name!r}; there are {', '.join(tables)}")
    if not chosen:
        raise ValueError("pairs is empty: a family needs at least one pair")
    gaps = tuple(difference(tables[a], tables[b], paired_seeds=paired_seeds, level=level) for a, b in chosen)
    size_RK = np.abs(_joint_draws(tables, chosen, gaps, paired_seeds, stream(seed, "max_t"), resamples))
    rank_RK = size_RK.argsort(0).argsort(0)
    tail_RK = np.where(size_RK > 0, 1 - rank_RK / resamples, 1.0)  # p*; a pair without error is never the smallest
    p_K = (1 + (size_RK >= [abs(gap.estimate) for gap in gaps]).sum(0)) / (1 + resamples)
    order_K = np.argsort(p_K, kind="stable")
    least_RK = np.minimum.accumulate(tail_RK[:, order_K[::-1]], axis=1)[:, ::-1]  # over this member and the later
    adjusted_K = np.empty_like(p_K)
    adjusted_K[order_K] = np.maximum.accumulate((1 + (least_RK <= p_K[order_K]).sum(0)) / (1 + resamples))
    adjusted_K = np.maximum(adjusted_K, [gap.p for gap in gaps])
    critical = float(np.quantile(least_RK[:, 0], 1 - probability("level", level)))
    half_K = np.quantile(size_RK, 1 - critical, axis=0).tolist()
    return MaxT(
        pairs=tuple(chosen), differences=gaps, p_adjusted=tuple(np.minimum(adjusted_K, 1).tolist()),
        ci=tuple((gap.estimate - half, gap.estimate + half) for gap, half in zip(gaps, half_K, strict=True)),
        level=level, critical_p=critical, resamples=resamples,
    )  # fmt: skip


def _joint_draws(
    tables: Mapping[str, Table],
    pairs: Sequence[tuple[str, str]],
    gaps: Sequence[Difference],
    paired_seeds: bool,
    random: np.random.Generator,
    resamples: int,
) -> FloatArray:
    """Joint draws (R, K) of the errors of the differences."""
    groups = next(iter(tables.values())).groups
    contrasts = [contrast(tables[a].y_SN, tables[b].y_SN, paired_seeds) for a, b in pairs]
    deviation_KG = np.stack([groups.sums(centred(over_seeds(d_SN))[None])[0] / d_SN.shape[1] for d_SN in contrasts])
    covariance_KK = groups.n_clusters / (groups.n_clusters - 1) * deviation_KG @ deviation_KG.T
    # Normal weights on clusters give normal draws of this covariance, however many clusters there are.
    values_K, vectors_KK = np.linalg.eigh(covariance_KK)
    d_RK = (random.standard_normal((resamples, len(pairs))) * np.sqrt(values_K.clip(min=0))) @ vectors_KK.T

    def seeds_R(y_SN: FloatArray, weight_RS: FloatArray, chi2_R: FloatArray | float) -> FloatArray:
        total, cells = variance_over_seeds(y_SN, groups)
        if not total:
            return np.zeros(resamples)
        scale_R = np.sqrt(np.maximum(0, (len(y_SN) - 1) / chi2_R - cells / total))
        return scale_R * (weight_RS @ centred(y_SN.mean(1))) / np.sqrt(len(y_SN) * (len(y_SN) - 1))

    n_seeds = {name: len(one.y_SN) for name, one in tables.items()}
    if paired_seeds:
        shared = n_seeds[pairs[0][0]]
        if shared > 1:
            weight_RS, chi2_R = random.standard_normal((resamples, shared)), random.chisquare(shared - 1, resamples)
            d_RK += np.stack([seeds_R(d_SN, weight_RS, chi2_R) for d_SN in contrasts], axis=1)
        return d_RK
    by_method = {
        name: seeds_R(tables[name].y_SN, random.standard_normal((resamples, n)), n - 1.0)
        for name, n in n_seeds.items()
        if n > 1
    }
    for k, (a, b) in enumerate(pairs):
        d_RK[:, k] += by_method.get(a, 0.0) - by_method.get(b, 0.0)
    se_K, df_K = np.array([(gap.se, gap.df) for gap in gaps]).T
    spread_K = np.where(se_K > 0, d_RK.std(0), 1.0)
    return se_K * special.stdtrit(df_K, special.ndtr(d_RK / np.where(spread_K > 0, spread_K, 1.0)))
