"""Statistics of the comparison harness: errors that cover prompts *and* training seeds, verdicts that keep their level.

Every function takes plain arrays, already averaged over samples and judging orders within a prompt, and returns plain
numbers, arrays or frozen records of them. The same functions serve judgements in [0, 1], gold reward, KL and length.
The model behind the errors is crossed and random, `y[s, i] = mean + seed[s] + prompt[i] + cell[s, i]`, because a claim
is about the method (other seeds) on prompts like these (other prompts), not about the runs and prompts at hand.

Legend: **S** training seeds, **N** prompts, **G** clusters of prompts, **K** members of a family of claims, **U** units
that a permutation moves, **R** resamples.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

FloatArray = npt.NDArray[np.float64]
Clusters = Sequence[Hashable] | npt.NDArray[Any] | None
Verdict = Literal["better", "worse", "equivalent", "undecided"]

BOOTSTRAP_TOLERANCE = 0.20  # relative disagreement of the two standard errors that is worth a look
MAX_EXACT = 20_000  # relabellings that are enumerated; beyond this they are drawn


# ---- records


@dataclass(frozen=True)
class _Record:
    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold: arrays become lists, an infinite t becomes None."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Estimate(_Record):
    """A mean with its error. `se_prompts**2 + se_seeds**2 == se**2`; `se_seeds` is None where one seed cannot tell."""

    mean: float
    se: float
    df: float
    low: float
    high: float
    level: float
    se_prompts: float
    se_seeds: float | None
    n_prompts: int
    n_clusters: int
    n_seeds: int
    this_run_only: bool
    null: float | None
    t: float | None
    p: float | None


@dataclass(frozen=True)
class Difference(_Record):
    """The mean of A minus the mean of B with its error; `this_run_only` where A or B is a single training run."""

    mean: float
    mean_a: float
    mean_b: float
    se: float
    df: float
    low: float
    high: float
    level: float
    t: float
    p: float
    se_prompts: float
    se_seeds: float | None
    n_prompts: int
    n_clusters: int
    n_seeds_a: int
    n_seeds_b: int
    paired_seeds: bool
    this_run_only: bool
    smallest_detectable: float
    bootstrap_se: float | None
    bootstrap_disagrees: bool | None


@dataclass(frozen=True)
class LowerBounds(_Record):
    """Lower bounds that hold for a whole family at once; `exceeds_K`: which members are proven above the null."""

    low_K: FloatArray
    exceeds_K: npt.NDArray[np.bool_]
    null: float
    level: float


@dataclass(frozen=True)
class PermutationTest(_Record):
    """A two-sided permutation p-value; what was permuted, how often, and whether these are all the relabellings."""

    mean: float
    p: float
    unit: Literal["prompts", "seeds"]
    relabellings: int
    exact: bool


@dataclass(frozen=True)
class McNemar(_Record):
    """Prompts that only A solved, prompts that only B solved, and the exact two-sided p-value."""

    only_a: int
    only_b: int
    n_prompts: int
    p: float


@dataclass(frozen=True)
class Proportion(_Record):
    """A share of successes with its interval."""

    share: float
    low: float
    high: float
    n: int


# ---- from answers to y


def win(a: npt.ArrayLike, b: npt.ArrayLike) -> FloatArray:
    """1 where a is larger, 0.5 on a tie, 0 where b is larger.

    Args:
        a: scores, of any shape.
        b: scores of the same answers' rivals, of that shape.

    Returns:
        Judgements of that shape.

    >>> win([2.0, 1.0, 0.0], [1.0, 1.0, 1.0]).tolist()
    [1.0, 0.5, 0.0]
    """
    a, b = _finite("a", a), _finite("b", b)
    if a.shape != b.shape:
        raise ValueError(f"a has shape {a.shape} and b has shape {b.shape}: they must score the same answers")
    return (a > b) + 0.5 * (a == b)


# ---- one method, two methods


def estimate(
    y_SN: npt.ArrayLike, *, clusters: Clusters = None, level: float = 0.95, null: float | None = None
) -> Estimate:
    """Mean of a method over prompts and training seeds, with the error of the crossed random-effects model.

    SE² = max(V_prompts + V_seeds - V_cells, V_prompts, V_seeds) with
    V_prompts = MS_prompt/(nS), V_seeds = MS_seed/(nS), V_cells = MS_residual/(nS); and by Satterthwaite
    df = SE⁴ / [V_prompts²/(G-1) + V_seeds²/(S-1)]. V_cells is subtracted because both other terms contain it.

    With clusters V_prompts = G/(G-1) Σ_g (Σ_{i in g} (ȳ_i - ȳ))²/n², and V_cells likewise within each seed; clusters
    of one prompt give the formulas above. One seed shows only V_prompts, and the record is stamped `this_run_only`.

    Where all of y is one number the error is 0, and any other null gets p = 0: with few prompts read `wilson` instead.

    Args:
        y_SN: one value per training seed and prompt.
        clusters: one hashable label per prompt; prompts of one label (paraphrases, a shared passage) are dependent.
        level: of the two-sided interval.
        null: value to test against, two-sided (0.5 for judgements); None for no test.

    Source:
        The moment (ANOVA) estimator, equal to REML on balanced tables with positive variances; Satterthwaite 1946;
        clusters as in Miller 2024 (arXiv:2411.00640), crossed with seeds as in Cameron, Gelbach & Miller 2011.

    >>> method = estimate([[1.0, 0.5, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]], null=0.5)
    >>> method.mean, round(method.se, 4), method.this_run_only
    (0.6875, 0.2366, False)
    """
    y_SN = _table("y_SN", y_SN)
    groups = _Groups.of(clusters, y_SN.shape[1])
    mean, error = _mean(y_SN), _error(_over_seeds(y_SN), [y_SN], groups)
    low, high = _interval(mean, error, level)
    t, p = (None, None) if null is None else _t_test(mean - null, error)
    n_seeds, n_prompts = y_SN.shape
    return Estimate(
        mean=mean, se=error.se, df=error.df, low=low, high=high, level=level,
        se_prompts=error.se_prompts, se_seeds=error.se_seeds,
        n_prompts=n_prompts, n_clusters=groups.n_clusters, n_seeds=n_seeds, this_run_only=n_seeds == 1,
        null=null, t=t, p=p,
    )  # fmt: skip


def difference(
    a_SN: npt.ArrayLike,
    b_SN: npt.ArrayLike,
    *,
    paired_seeds: bool,
    clusters: Clusters = None,
    level: float = 0.95,
    bootstrap: int = 0,
) -> Difference:
    """Mean of A minus mean of B on the same prompts, with an error that covers prompts and training seeds.

    Independent seeds (`paired_seeds=False`), with d̄_i = ȳ_A,i - ȳ_B,i and m running over A and B:
    SE² = var(d̄)/n + Σ_m max(0, V_seeds,m - V_cells,m), not below Σ_m V_seeds,m;
    df = SE⁴ / [(var(d̄)/n)²/(G-1) + Σ_m V_seeds,m²/(S_m-1)]. A and B may have different numbers of seeds.

    Shared seeds (`paired_seeds=True`: seed s fixes data order and sampling for both): `estimate` of d = a - b.

    With clusters var(d̄)/n is the clustered variance of `estimate`. A run without siblings (S = 1) contributes no seed
    term, and the record is stamped `this_run_only`. A model that is fixed rather than trained (the start of a suite)
    has the same answers under every seed: repeat its row S times, and no stamp is due.

    `smallest_detectable` is the true difference that a 5 % two-sided t-test with this SE and df finds with 80 %
    probability, from the noncentral t. Unlike p, it tells a small difference from a small study.

    Args:
        a_SN: one value per seed and prompt.
        b_SN: the same for B; its columns must be the same prompts.
        paired_seeds: whether row s of A and of B share their seed. No default: the two answers can differ a lot.
        clusters: one label per prompt, as in `estimate`.
        level: of the two-sided interval.
        bootstrap: resamples for `bootstrap_se` (2000 is enough); 0 leaves it out. `bootstrap_disagrees` where it is
            more than 20 % away from se: look for few or very unequal clusters.

    Source:
        As `estimate`; the pairing by prompt as in Miller 2024 (arXiv:2411.00640).

    >>> gap = difference([[1.0, 0.5, 1.0, 0.0]], [[0.5, 0.5, 0.0, 0.0]], paired_seeds=False)
    >>> gap.mean, round(gap.p, 3), gap.this_run_only
    (0.375, 0.215, True)
    """
    a_SN, b_SN = _two_tables(a_SN, b_SN, paired_seeds)
    groups = _Groups.of(clusters, a_SN.shape[1])
    d_SN = _contrast(a_SN, b_SN, paired_seeds)
    mean = _mean(d_SN)
    error = _error(_over_seeds(d_SN), [d_SN] if paired_seeds else [a_SN, b_SN], groups)
    low, high = _interval(mean, error, level)
    t, p = _t_test(mean, error)
    bootstrap_se = None
    if bootstrap:
        first_SN, minus_SN = (d_SN, None) if paired_seeds else (a_SN, b_SN)
        bootstrap_se = two_way_bootstrap_se(first_SN, clusters, bootstrap, minus_SN=minus_SN)
    return Difference(
        mean=mean, mean_a=_mean(a_SN), mean_b=_mean(b_SN), se=error.se, df=error.df, low=low, high=high, level=level,
        t=t, p=p, se_prompts=error.se_prompts, se_seeds=error.se_seeds,
        n_prompts=a_SN.shape[1], n_clusters=groups.n_clusters, n_seeds_a=len(a_SN), n_seeds_b=len(b_SN),
        paired_seeds=paired_seeds, this_run_only=min(len(a_SN), len(b_SN)) == 1,
        smallest_detectable=_detectable(error, power=0.8, level=0.95),
        bootstrap_se=bootstrap_se,
        bootstrap_disagrees=None if bootstrap_se is None
        else abs(bootstrap_se - error.se) > BOOTSTRAP_TOLERANCE * error.se,
    )  # fmt: skip


def two_way_bootstrap_se(
    d_SN: npt.ArrayLike,
    clusters: Clusters = None,
    resamples: int = 2000,
    seed: int = 0,
    *,
    minus_SN: npt.ArrayLike | None = None,
) -> float:
    """Standard error of a mean by resampling seeds and clusters of prompts, whole rows and whole columns at a time.

    SE² = max(2 (V*_seeds + V*_prompts) - V*_both, V*_seeds, V*_prompts), where V* is the variance of the resampled
    mean when seeds, clusters, or both are drawn. Drawing both (the pigeonhole bootstrap) counts the cell noise three
    times, and alone would overstate SE by up to √3 where seeds matter little; each one-way variance has it once, so
    this combination counts it once. S-1 of S seeds and G-1 of G clusters are drawn, with replacement, because S of S
    would shrink the variance by 1 - 1/S.

    Args:
        d_SN: one value per seed and prompt (a difference a - b where the seeds are shared).
        clusters: one label per prompt.
        resamples: how many.
        seed: random seed of the resamples.
        minus_SN: second table on the same prompts, with seeds of its own; the mean is then mean(d) - mean(minus).

    Source:
        Owen 2007 (The pigeonhole bootstrap) for the factor three; McCullagh 2000 (Resampling and exchangeable
        arrays): no plain resampling of rows and columns is unbiased; Rao & Wu 1988 for drawing one less.

    >>> y_SN = np.random.default_rng(0).random((5, 200))
    >>> bool(abs(two_way_bootstrap_se(y_SN) / estimate(y_SN).se - 1) < 0.1)
    True
    """
    tables = [(1.0, _table("d_SN", d_SN))]
    if minus_SN is not None:
        tables.append((-1.0, _two_tables(d_SN, minus_SN, paired_seeds=False)[1]))
    groups = _Groups.of(clusters, tables[0][1].shape[1])
    if resamples < 2:
        raise ValueError(f"resamples = {resamples}: a standard error needs at least 2")
    random = _stream(seed, "bootstrap")

    def draw(n_units: int) -> FloatArray:
        if n_units == 1:  # a single run has no siblings to draw
            return np.ones((resamples, 1))
        return random.multinomial(n_units - 1, np.full(n_units, 1 / n_units), size=resamples) / (n_units - 1)

    clusters_RG = draw(groups.n_clusters)
    prompts_R = clusters_RG @ groups.sizes_G
    by_seeds_R, by_prompts_R, by_both_R = np.zeros((3, resamples))
    for sign, y_SN in tables:
        seeds_RS, sums_SG = draw(len(y_SN)), groups.sums(y_SN)
        by_seeds_R += sign * (seeds_RS @ y_SN.mean(1))
        by_prompts_R += sign * (clusters_RG @ sums_SG.mean(0)) / prompts_R
        by_both_R += sign * ((seeds_RS @ sums_SG) * clusters_RG).sum(1) / prompts_R
    seeds, prompts, both = (float(means_R.var(ddof=1)) for means_R in (by_seeds_R, by_prompts_R, by_both_R))
    return math.sqrt(max(2 * (seeds + prompts) - both, seeds, prompts))


@dataclass(frozen=True)
class _Groups:
    """Prompts by cluster: `ids_N` are cluster numbers 0 ... G-1, `sizes_G` their prompts."""

    ids_N: npt.NDArray[np.intp]
    sizes_G: npt.NDArray[np.intp]

    @classmethod
    def of(cls, clusters: Clusters, n_prompts: int) -> _Groups:
        if clusters is None:
            return cls(np.arange(n_prompts), np.ones(n_prompts, dtype=np.intp))
        labels = clusters.tolist() if isinstance(clusters, np.ndarray) else list(clusters)
        if len(labels) != n_prompts:
            raise ValueError(f"{len(labels)} cluster labels for {n_prompts} prompts: give one label per prompt")
        number: dict[Hashable, int] = {}
        ids_N = np.array([number.setdefault(label, len(number)) for label in labels], dtype=np.intp)
        if len(number) == 1:
            raise ValueError(f"all {n_prompts} prompts are in one cluster: an error needs at least two clusters")
        return cls(ids_N, np.bincount(ids_N))

    @property
    def n_clusters(self) -> int:
        return len(self.sizes_G)

    def sums(self, y_SN: FloatArray) -> FloatArray:
        """Sum over the prompts of each cluster, (S, N) -> (S, G)."""
        return np.stack([np.bincount(self.ids_N, weights=row_N) for row_N in y_SN])

    def variance_of_mean(self, y_SN: FloatArray) -> float:
        """Variance of a mean over prompts, clustered, for deviations y that sum to zero; summed over the rows."""
        n_prompts = len(self.ids_N)
        return self.n_clusters / (self.n_clusters - 1) * float((self.sums(y_SN) ** 2).sum()) / n_prompts**2


@dataclass(frozen=True)
class _Error:
    se: float
    df: float
    se_prompts: float
    se_seeds: float | None


def _error(mean_N: FloatArray, tables: Sequence[FloatArray], groups: _Groups) -> _Error:
    """Error of mean(mean_N): prompt noise from mean_N, seed noise from each table (S, N) that entered it."""
    from_prompts = groups.variance_of_mean(_centred(mean_N)[None])
    runs = [(_variance_over_seeds(y_SN, groups), len(y_SN) - 1) for y_SN in tables if len(y_SN) > 1]
    added_by_seeds = sum(max(0.0, seeds - cells) for (seeds, cells), _ in runs)
    # The floor only matters when estimates are noisy: the expectation of the first argument is never below the second.
    variance = max(from_prompts + added_by_seeds, sum(seeds for (seeds, _), _ in runs))
    parts = [(from_prompts, groups.n_clusters - 1)] + [(seeds, df) for (seeds, _), df in runs]
    return _Error(
        se=math.sqrt(variance),
        df=_satterthwaite(variance, parts),
        se_prompts=math.sqrt(from_prompts),
        se_seeds=math.sqrt(variance - from_prompts) if runs else None,
    )


def _variance_over_seeds(y_SN: FloatArray, groups: _Groups) -> tuple[float, float]:
    """MS_seed/(nS), the variance of the mean as its seeds show it, and MS_residual/(nS), the cell noise inside it."""
    n_seeds = len(y_SN)
    seed_S, prompt_N = _centred(y_SN.mean(1)), _centred(_over_seeds(y_SN))
    cell_SN = y_SN - _mean(y_SN) - seed_S[:, None] - prompt_N
    pairs = n_seeds * (n_seeds - 1)
    return float((seed_S**2).sum()) / pairs, groups.variance_of_mean(cell_SN) / pairs


def _satterthwaite(variance: float, parts: Sequence[tuple[float, int]]) -> float:
    """df = V² / Σ_k V_k²/df_k, written with the shares V_k/V, which cannot underflow."""
    if variance == 0:
        return float(parts[0][1])
    return 1 / math.fsum((part / variance) ** 2 / df for part, df in parts)  # fsum: the same after swapping A and B


def _interval(mean: float, error: _Error, level: float) -> tuple[float, float]:
    half = float(stats.t.isf(_tail(level), error.df)) * error.se
    return mean - half, mean + half


def _t_test(effect: float, error: _Error) -> tuple[float, float]:
    """t and its two-sided p; with an error of 0 the limits: t = 0, p = 1 for no effect, else t = ±inf, p = 0."""
    if error.se == 0:
        return (math.copysign(math.inf, effect), 0.0) if effect else (0.0, 1.0)
    t = effect / error.se
    return t, 2 * float(stats.t.sf(abs(t), error.df))


# ---- families of claims


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
    p_K = _p_values(p_values)
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
    p_K = _p_values(p_values)
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

    >>> y_SN = np.random.default_rng(0).normal(0.5, 0.3, (5, 400))
    >>> bounds = holm_lower_bounds([estimate(y_SN), estimate(y_SN + 0.1)])
    >>> bounds.exceeds_K.tolist(), [round(low, 3) for low in bounds.low_K.tolist()]
    ([False, True], [0.47, 0.5])
    """
    alpha = _tail(level)
    mean_K, se_K, df_K = (
        np.array([getattr(e, field) for e in estimates], dtype=float) for field in ("mean", "se", "df")
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


def equivalence(gap: Difference, margin: float = 0.02, alpha: float = 0.05) -> bool:
    """Whether A and B differ by less than the margin, by two one-sided t-tests (TOST).

    True where (margin - |mean|)/se > t(1 - α, df), that is where the 1 - 2α interval lies inside ±margin. A difference
    that is not significant is *not* thereby equivalence: that is what this test is for.

    Args:
        gap: from `difference`.
        margin: the largest difference that does not matter (0.02: two points of win rate).
        alpha: level of each of the two tests.

    Source:
        Schuirmann 1987.

    >>> a_SN, b_SN = np.random.default_rng(0).normal(0.5, 0.1, (2, 5, 800))
    >>> [equivalence(difference(a_SN, other_SN, paired_seeds=False)) for other_SN in (b_SN, b_SN + 0.1)]
    [True, False]
    """
    if not margin > 0:
        raise ValueError(f"margin = {margin}: the largest difference that does not matter must be positive")
    return abs(gap.mean) + float(stats.t.isf(alpha, gap.df)) * gap.se < margin


def verdict(gap: Difference, p_holm: float, *, margin: float = 0.02, alpha: float = 0.05) -> Verdict:
    """What may be said of A against B: better, worse, equivalent (within ±margin), or undecided.

    A significant difference is named as such even where it is smaller than the margin. Beside "undecided" print
    `gap.smallest_detectable`.

    Args:
        gap: from `difference`.
        p_holm: its p after `holm` over the declared family.
        margin: the largest difference that does not matter.
        alpha: level of the family, and of each equivalence test.

    >>> gap = difference([[0.9, 0.8, 0.7, 0.9]], [[0.1, 0.2, 0.2, 0.0]], paired_seeds=False)
    >>> verdict(gap, p_holm=0.01), verdict(gap, p_holm=0.2)
    ('better', 'undecided')
    """
    if not 0 <= p_holm <= 1:
        raise ValueError(f"p_holm = {p_holm} is not a p-value")
    if p_holm < alpha and gap.mean != 0:
        return "better" if gap.mean > 0 else "worse"
    return "equivalent" if equivalence(gap, margin, alpha) else "undecided"


# ---- exact and robust companions


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
        clusters: one label per prompt, as in `estimate`.
        max_relabellings: as above.
        seed: random seed of the draws.

    Source:
        Fisher 1935; the two ones from Phipson & Smyth 2010.

    >>> a_SN, b_SN = [[0.6, 0.7], [0.7, 0.8], [0.7, 0.7]], [[0.1, 0.2], [0.3, 0.2], [0.2, 0.2]]
    >>> permutation_test(a_SN, b_SN, paired_seeds=False).p
    0.1
    """
    a_SN, b_SN = _two_tables(a_SN, b_SN, paired_seeds)
    groups = _Groups.of(clusters, a_SN.shape[1])
    d_SN = _contrast(a_SN, b_SN, paired_seeds)
    observed = _mean(d_SN)
    random = _stream(seed, "permutation")
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
    a_N, b_N = _binary("a_N", a_N), _binary("b_N", b_N)
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
    >>> round(perfect.low, 3), perfect.high
    (0.722, 1.0)
    """
    if n < 1 or not 0 <= successes <= n or int(successes) != successes:
        raise ValueError(f"{successes} successes of {n}: need whole numbers with 0 <= successes <= n and n >= 1")
    z, share = float(stats.norm.isf(_tail(level))), successes / n
    centre, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
    return Proportion(share, max(0.0, low) if successes else 0.0, min(1.0, high) if successes < n else 1.0, int(n))


# ---- several samples per prompt


def pass_at_k(n: npt.ArrayLike, c: npt.ArrayLike, k: int) -> FloatArray | float:
    """Probability that k fresh samples contain a correct one, unbiased, from c correct among n samples.

    1 - C(n - c, k) / C(n, k) = 1 - Π_{j < k} (n - c - j)/(n - j). Unlike 1 - (1 - c/n)^k it has no bias.

    Args:
        n: samples, a number or an array over prompts.
        c: correct samples, likewise.
        k: at most the smallest n.

    Returns:
        A float, or an array over prompts (a row of `y_SN`).

    Source:
        Chen et al. 2021 (arXiv:2107.03374).

    >>> pass_at_k(4, 2, 2), pass_at_k(4, [0, 1, 4], 1).tolist()
    (0.8333333333333334, [0.0, 0.25, 1.0])
    """
    n, c = np.broadcast_arrays(_finite("n", n), _finite("c", c))
    if not 1 <= k <= n.min():
        raise ValueError(f"k = {k}, smallest n = {n.min():g}: k must be between 1 and n (more samples are needed)")
    if (c < 0).any() or (c > n).any():
        raise ValueError("c, the correct samples, must be between 0 and n")
    miss = np.ones(n.shape)
    for j in range(k):
        miss = miss * np.maximum(0, n - c - j) / (n - j)
    return _scalar(1 - miss)


def best_of_n_reward(proxy: npt.ArrayLike, gold: npt.ArrayLike, n: int) -> FloatArray | float:
    """Expected gold reward of the sample that the proxy likes best among n, unbiased, from N >= n samples.

    C(N, n)^-1 Σ_{i=n..N} C(i-1, n-1) gold_(i), with gold sorted by proxy: the mean over all subsets of size n. Samples
    that the proxy cannot tell apart share their mean gold, which is a tie broken by chance. Give gold twice for the
    largest reward itself.

    Args:
        proxy: (N,) for one prompt, or (prompts, N).
        gold: of the same samples.
        n: samples to choose from, at most N.

    Returns:
        A float, or one value per prompt (a row of `y_SN`).

    Source:
        Nakano et al. 2021 (arXiv:2112.09332), used by Gao, Schulman & Hilton 2022 (arXiv:2210.10760).

    >>> round(best_of_n_reward(proxy=[0.1, 0.9, 0.5], gold=[1.0, 2.0, 6.0], n=2), 4)  # (2 + 6 + 2) / 3
    3.3333
    """
    proxy, gold = _finite("proxy", proxy), _finite("gold", gold)
    if proxy.shape != gold.shape or proxy.ndim not in (1, 2):
        raise ValueError(f"proxy has shape {proxy.shape}, gold has shape {gold.shape}: both (N,) or both (prompts, N)")
    samples = proxy.shape[-1]
    if not 1 <= n <= samples:
        raise ValueError(f"n = {n}, but there are {samples} samples per prompt: n must be between 1 and that")
    weight_N = np.zeros(samples)  # C(i-1, n-1)/C(N, n) from the top, w_N = n/N and w_i = w_{i+1} (i-n+1)/i: no overflow
    rank_N = np.arange(samples - 1, n - 1, -1)
    weight_N[n - 1 :] = np.cumprod(np.concatenate([[n / samples], (rank_N - n + 1) / rank_N]))[::-1]

    def one_prompt(proxy_N: FloatArray, gold_N: FloatArray) -> float:
        _, tied_N, size_T = np.unique(proxy_N, return_inverse=True, return_counts=True)
        shared_N = (np.bincount(tied_N, weights=gold_N) / size_T)[tied_N]
        return float(weight_N @ shared_N[np.argsort(tied_N)])

    if proxy.ndim == 1:
        return one_prompt(proxy, gold)
    return np.array([one_prompt(proxy_N, gold_N) for proxy_N, gold_N in zip(proxy, gold, strict=True)])


def best_of_n_kl(n: npt.ArrayLike) -> FloatArray | float:
    """KL divergence of best-of-n from the policy it samples, in nats per completion: log n - (n - 1)/n.

    Exact for a continuous score; an upper bound where scores tie.

    Args:
        n: number of samples, or an array of them.

    Source:
        Stiennon et al. 2020 (arXiv:2009.01325); the bound: Beirami et al. 2024 (arXiv:2401.01879).

    >>> best_of_n_kl(1), round(best_of_n_kl(16), 4)
    (0.0, 1.8351)
    """
    n = _finite("n", n)
    if (n < 1).any():
        raise ValueError(f"n = {n.min():g}: best-of-n needs at least one sample")
    return _scalar(np.log(n) - (n - 1) / n)


# ---- power


def prompts_needed(p: float, power: float = 0.8, level: float = 0.95) -> int:
    """Prompts for one run with true win rate p to be told from 50 %, decided judgements, two-sided.

    n = ((z_{α/2} / 2 + z_β √(p(1-p))) / (p - 1/2))², rounded up. It leaves out the training seeds, which no number
    of prompts replaces: see `smallest_detectable`.

    Args:
        p: true win rate, not 0.5.
        power: probability of finding it.
        level: 1 minus the two-sided level of the test.

    Source:
        The normal approximation of the test of one proportion.

    >>> prompts_needed(0.55), prompts_needed(0.55, power=0.9), prompts_needed(0.52)
    (783, 1047, 4904)
    """
    if not 0 < p < 1 or p == 0.5:
        raise ValueError(f"p = {p}: need a win rate between 0 and 1, and not 0.5, which no number of prompts can tell")
    z_alpha, z_beta = float(stats.norm.isf(_tail(level))), float(stats.norm.ppf(_probability("power", power)))
    return math.ceil(((z_alpha / 2 + z_beta * math.sqrt(p * (1 - p))) / (p - 0.5)) ** 2)


def smallest_detectable(
    seed_sd: float,
    n_prompts: int,
    n_seeds: int,
    *,
    interaction_sd: float = 0.3,
    residual_sd: float = math.sqrt(0.08),
    power: float = 0.8,
    level: float = 0.95,
) -> float:
    """Smallest true difference of two methods (independent seeds, same prompts) that a planned study finds.

    SE² = (σ²_interaction + 2 σ²_residual/S)/n + 2 σ²_seed/S, whose last term does not shrink with the prompts. With df
    by Satterthwaite from the expected mean squares, the answer is δ SE where P(t(df, δ) > t(1 - α/2, df)) = power and
    t(df, δ) is noncentral.

    Args:
        seed_sd: standard deviation of a method's mean over training seeds (0.02: two points of win rate).
        n_prompts: prompts.
        n_seeds: seeds per method, at least 2.
        interaction_sd: of the true difference of the two methods over prompts.
        residual_sd: of one run's value for one prompt, given both. The two defaults give the difference of two single
            runs a standard deviation of 0.5 per prompt: a cautious guess, published pairs of good models show 0.4.
        power: probability of finding the difference.
        level: 1 minus the two-sided level of the test.

    Source:
        Satterthwaite 1946; the power of the t-test by the noncentral t.

    >>> [round(100 * smallest_detectable(0.02, 805, n_seeds), 1) for n_seeds in (3, 5, 10, 20)]
    [6.9, 5.2, 4.1, 3.6]
    """
    if n_seeds < 2:
        raise ValueError("n_seeds must be at least 2: one run per method cannot show the spread over seeds")
    if n_prompts < 2:
        raise ValueError("n_prompts must be at least 2")
    if min(seed_sd, interaction_sd, residual_sd) < 0:
        raise ValueError("standard deviations must not be negative")
    from_prompts = (interaction_sd**2 + 2 * residual_sd**2 / n_seeds) / n_prompts
    from_seeds = seed_sd**2 / n_seeds + residual_sd**2 / (n_prompts * n_seeds)  # of one method: E[MS_seed]/(nS)
    variance = from_prompts + 2 * seed_sd**2 / n_seeds
    df = _satterthwaite(variance, [(from_prompts, n_prompts - 1), (from_seeds, n_seeds - 1), (from_seeds, n_seeds - 1)])
    return _detectable(_Error(math.sqrt(variance), df, math.sqrt(from_prompts), None), power, level)


def _detectable(error: _Error, power: float, level: float) -> float:
    if error.se == 0:
        return 0.0
    critical = float(stats.t.isf(_tail(level), error.df))
    guess = critical + float(stats.t.ppf(_probability("power", power), error.df))  # a little below the answer

    def surplus(delta: float) -> float:
        return float(stats.nct.sf(critical, error.df, delta)) - power

    return error.se * float(optimize.brentq(surplus, 0.0, 3 * guess))


# ---- small helpers


def _stream(seed: int, purpose: str) -> np.random.Generator:
    """A stream of its own: data simulated from `default_rng(seed)` must not be resampled by the same random bits."""
    return np.random.default_rng([seed, *purpose.encode()])


def _mean(y: FloatArray) -> float:
    first = y.flat[0]  # as an offset it keeps the mean of equal numbers exact, so that their error is exactly 0
    return float(first + (y - first).mean())


def _over_seeds(y_SN: FloatArray) -> FloatArray:
    """Mean over seeds, (S, N) -> (N,), exact where the seeds agree."""
    return y_SN[0] + (y_SN - y_SN[0]).mean(0)


def _centred(y: FloatArray) -> FloatArray:
    return y - _mean(y)


def _scalar(value: FloatArray) -> FloatArray | float:
    return float(value) if value.ndim == 0 else value


def _table(name: str, y_SN: npt.ArrayLike) -> FloatArray:
    y_SN = np.asarray(y_SN, dtype=np.float64)
    if y_SN.ndim != 2 or y_SN.size == 0:
        raise ValueError(f"{name} has shape {y_SN.shape}, expected (seeds, prompts); for a single run pass y_N[None]")
    bad = np.argwhere(~np.isfinite(y_SN))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"{name}: seed row {row}, prompt {column} is {y_SN[row, column]} ({len(bad)} such values in all); "
            "score failures explicitly (an unparsed judgement is 0.5), never leave them out"
        )
    if y_SN.shape[1] == 1:
        raise ValueError(f"{name} has a single prompt: an error over prompts needs at least two")
    return y_SN


def _two_tables(a_SN: npt.ArrayLike, b_SN: npt.ArrayLike, paired_seeds: bool) -> tuple[FloatArray, FloatArray]:
    a_SN, b_SN = _table("a_SN", a_SN), _table("b_SN", b_SN)
    shapes = f"a_SN has shape {a_SN.shape} and b_SN has shape {b_SN.shape}"
    if a_SN.shape[1] != b_SN.shape[1]:
        raise ValueError(f"{shapes}: both must hold the same prompts")
    if paired_seeds and len(a_SN) != len(b_SN):
        raise ValueError(f"{shapes}: paired seeds need one row per seed in both; else pass paired_seeds=False")
    return a_SN, b_SN


def _contrast(a_SN: FloatArray, b_SN: FloatArray, paired_seeds: bool) -> FloatArray:
    """a - b by seed where seeds are shared (S, N), else of the means over seeds (1, N)."""
    return a_SN - b_SN if paired_seeds else (_over_seeds(a_SN) - _over_seeds(b_SN))[None]


def _finite(name: str, values: npt.ArrayLike) -> FloatArray:
    values = np.asarray(values, dtype=np.float64)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise ValueError(f"{name}: entry {tuple(bad[0].tolist())} is not a finite number ({len(bad)} such in all)")
    return values


def _binary(name: str, values: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    values = _finite(name, values)
    if values.ndim != 1 or not np.isin(values, (0, 1)).all():
        raise ValueError(f"{name} must be one 0 or 1 per prompt; for graded outcomes use `difference`")
    return values.astype(bool)


def _p_values(p_values: npt.ArrayLike) -> FloatArray:
    p_K = _finite("p_values", p_values)
    if p_K.ndim != 1 or (p_K < 0).any() or (p_K > 1).any():
        raise ValueError("p_values must be a list of numbers between 0 and 1")
    return p_K


def _probability(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"{name} = {value} must be between 0 and 1 (0.95 for 95 %)")
    return value


def _tail(level: float) -> float:
    return (1 - _probability("level", level)) / 2
