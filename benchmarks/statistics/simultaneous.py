"""Many pairs at once when methods share prompts: step-down max-t, sharper than Holm, and simultaneous intervals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy import stats

from .crossed import difference, variance_over_seeds
from .frames import Table, TableLike, read_methods
from .records import FloatArray, MaxT
from .tables import Clusters, centred, contrast, over_seeds, probability, stream


def max_t(
    methods: Mapping[str, TableLike] | TableLike,
    *,
    paired_seeds: bool,
    pairs: Sequence[tuple[str, str]] | Literal["all"] = "all",
    clusters: Clusters = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    unparsed: float | None = None,
    **names: str,
) -> MaxT:
    """Differences of a family of pairs with p-values and intervals adjusted by the joint distribution of their errors.

    All d_k = mean(A_k) - mean(B_k) are redrawn together, one weight per cluster of prompts for all pairs, and one per
    seed (of each method, or of all methods where seeds are shared):
    d*_k = Σ_g w_g D_kg + Σ_s v_s λ E_ks, with D the prompts' and E the seeds' deviations of d_k, w and v normal, and
    λ² = 1 - V_cells/V_seeds, so that var(d*_k) is the SE² of `difference`. With p*_k = 2 Φ(-|d*_k|/SE_k):
    p~_(k) = max_{j <= k} P(min over (j) ... (K) of p* <= p_(j)),
    and every interval is d_k ± t(1 - c/2, df_k) SE_k, with c the 1 - level quantile of the smallest p* of all.

    The smallest p stands for the largest |t| because the pairs may have different degrees of freedom.

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
    smallest_RK = _joint_p(tables, chosen, paired_seeds, resamples, seed)
    p_K = np.array([gap.p for gap in gaps])
    order_K = np.argsort(p_K, kind="stable")
    adjusted_K = np.empty_like(p_K)
    least_RK = np.minimum.accumulate(smallest_RK[:, order_K[::-1]], axis=1)[:, ::-1]  # over this member and the later
    hits_K = (least_RK <= p_K[order_K]).sum(0)
    adjusted_K[order_K] = np.maximum.accumulate((1 + hits_K) / (1 + resamples))
    adjusted_K = np.maximum(adjusted_K, p_K)  # what the draws are too few to show
    critical = float(np.quantile(least_RK[:, 0], 1 - probability("level", level)))
    half_K = [float(stats.t.isf(critical / 2, gap.df)) * gap.se for gap in gaps]
    return MaxT(
        pairs=tuple(chosen), differences=gaps, p_adjusted=tuple(adjusted_K.tolist()),
        ci=tuple((gap.estimate - half, gap.estimate + half) for gap, half in zip(gaps, half_K, strict=True)),
        level=level, critical_p=critical, resamples=resamples,
    )  # fmt: skip


def _joint_p(
    tables: Mapping[str, Table], pairs: Sequence[tuple[str, str]], paired_seeds: bool, resamples: int, seed: int
) -> FloatArray:
    """p-values (R, K) of the pairs in joint draws around no difference; 1 for pairs without any error."""
    groups = next(iter(tables.values())).groups
    names = sorted({name for pair in pairs for name in pair})
    seeds = {name: len(tables[name].y_SN) for name in names}
    at = dict(zip(names, np.cumsum([0, *seeds.values()]).tolist(), strict=False))
    n_weights = seeds[names[0]] if paired_seeds else sum(seeds.values())
    prompts_KG = np.zeros((len(pairs), groups.n_clusters))
    seeds_KW = np.zeros((len(pairs), n_weights))
    for k, (a, b) in enumerate(pairs):
        a_SN, b_SN = tables[a].y_SN, tables[b].y_SN
        d_SN = contrast(a_SN, b_SN, paired_seeds)
        correction = groups.n_clusters / (groups.n_clusters - 1)
        prompts_KG[k] = np.sqrt(correction) * groups.sums(centred(over_seeds(d_SN))[None])[0] / d_SN.shape[1]
        parts = [(0, 1.0, d_SN)] if paired_seeds else [(at[a], 1.0, a_SN), (at[b], -1.0, b_SN)]
        for start, sign, y_SN in parts:
            if len(y_SN) > 1:
                total, cells = variance_over_seeds(y_SN, groups)
                share = max(0.0, 1 - cells / total) if total else 0.0
                scale = np.sqrt(share / (len(y_SN) * (len(y_SN) - 1)))
                seeds_KW[k, start : start + len(y_SN)] = sign * scale * centred(y_SN.mean(1))
    factor_KF = np.concatenate([prompts_KG, seeds_KW], axis=1)
    covariance_KK = factor_KF @ factor_KF.T
    se_K = np.sqrt(np.diag(covariance_KK))
    values_K, vectors_KK = np.linalg.eigh(covariance_KK / np.outer(se_K, se_K).clip(min=1e-300))
    root_KK = vectors_KK * np.sqrt(values_K.clip(min=0))
    # Normal weights on clusters and seeds: the draws are normal with this correlation, whatever their number.
    z_RK = stream(seed, "max_t").standard_normal((resamples, len(pairs))) @ root_KK.T
    return np.where(se_K > 0, 2 * stats.norm.sf(np.abs(z_RK)), 1.0)
