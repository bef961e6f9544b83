"""One method, two methods: means with errors that cover prompts and training seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .frames import TableLike, read, read_two
from .inference import Error, detectable, interval, satterthwaite, t_test
from .records import Difference, Estimate, FloatArray, Sensitivity
from .tables import Clusters, Groups, centred, contrast, judgements, mean_of, over_seeds, stream

BOOTSTRAP_TOLERANCE = 0.20  # relative disagreement of the two standard errors that is worth a look


def mean(
    y_SN: TableLike,
    *,
    clusters: Clusters = None,
    level: float = 0.95,
    null: float | None = None,
    unparsed: float | None = None,
    **names: str,
) -> Estimate:
    """Mean of a method over prompts and training seeds, with the error of the crossed random-effects model.

    SE² = max(V_prompts + V_seeds - V_cells, V_prompts, V_seeds) with
    V_prompts = MS_prompt/(nS), V_seeds = MS_seed/(nS), V_cells = MS_residual/(nS); and by Satterthwaite
    df = SE⁴ / [V_prompts²/(G-1) + V_seeds²/(S-1)]. V_cells is subtracted because both other terms contain it.

    With clusters V_prompts = G/(G-1) Σ_g (Σ_{i in g} (ȳ_i - ȳ))²/n², and V_cells likewise within each seed; clusters
    of one prompt give the formulas above. One seed shows only V_prompts, and the record is stamped `this_run_only`.

    Where all of y is one number the error is 0, and any other null gets p = 0: with few prompts read `wilson` instead.

    Args:
        y_SN: one value per training seed and prompt, (S, N), or of one run (N,). Or a data frame (pandas, pyarrow) with
            columns y and prompt, and where they exist seed, sample, order and cluster: samples and judging orders are
            averaged within a prompt first, and every seed must have every prompt.
        clusters: one hashable label per prompt; prompts of one label (paraphrases, a shared passage) are dependent.
        level: of the two-sided interval.
        null: value to test against, two-sided (0.5 for judgements); None for no test.
        unparsed: what NaN counts as, 0.5, 0 or 1; they are counted in `n_unparsed`. Without it NaN is refused.
        names: a frame's columns that are called otherwise, by role: `y="gold_wins", cluster="passage"`.

    Raises:
        ValueError: for a missing (seed, prompt), for NaN, for one prompt or one cluster, with the place.

    Source:
        The moment (ANOVA) estimator, equal to REML on balanced tables with positive variances; Satterthwaite 1946;
        clusters as in Miller 2024 (arXiv:2411.00640), crossed with seeds as in Cameron, Gelbach & Miller 2011.

    >>> method = mean([[1.0, 0.5, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]], null=0.5)
    >>> method.estimate, round(method.se, 4), method.this_run_only
    (0.6875, 0.2366, False)
    """
    table = read(y_SN, clusters, unparsed, names)
    y_SN, groups = table.y_SN, table.groups
    estimate, error = mean_of(y_SN), crossed_error(over_seeds(y_SN), [y_SN], groups)
    t, p = (None, None) if null is None else t_test(estimate - null, error)
    n_seeds, n_prompts = y_SN.shape
    return Estimate(
        estimate=estimate, se=error.se, df=error.df, ci=interval(estimate, error, level), level=level,
        se_prompts=error.se_prompts, se_seeds=error.se_seeds,
        n_prompts=n_prompts, n_clusters=groups.n_clusters, n_seeds=n_seeds, n_unparsed=table.n_unparsed,
        this_run_only=n_seeds == 1, null=null, t=t, p=p,
    )  # fmt: skip


def win_rate(
    y_SN: TableLike,
    *,
    clusters: Clusters = None,
    level: float = 0.95,
    null: float = 0.5,
    unparsed: float | None = None,
    **names: str,
) -> Estimate:
    """Win rate of a method with its error: `mean` of judgements, tested against one half.

    Args:
        y_SN: judgements in [0, 1], an array or a frame as in `mean`: 1 the method's answer is better, 0.5 a
            tie, 0 worse.
        clusters: as in `mean`.
        level: of the two-sided interval.
        null: value to test against, two-sided.
        unparsed: what an unparsed judgement (NaN) counts as; see `sensitivity` for what it could change.
        names: columns of a frame, as in `mean`.

    Raises:
        ValueError: for values outside [0, 1], which are scores: turn them into judgements with `win`.

    Source:
        As `mean`.

    >>> wins = win_rate([[1.0, 1.0, 0.5, 1.0], [1.0, 0.5, 0.5, 1.0]])
    >>> wins.estimate, round(wins.p, 3)
    (0.8125, 0.098)
    """
    table = read(y_SN, clusters, unparsed, names)
    judgements("y_SN", table.y_SN)
    return mean(table, level=level, null=null)


def sensitivity(
    y_SN: TableLike, *, clusters: Clusters = None, level: float = 0.95, null: float = 0.5, **names: str
) -> Sensitivity:
    """Win rates with unparsed judgements (NaN) scored one half, all against the method, and all for it.

    Whatever the judge would have said, the win rate lies between the last two.

    Args:
        y_SN: judgements with NaN where the judge could not be understood; as in `win_rate`.
        clusters, level, null, names: as in `win_rate`.

    >>> wins = sensitivity([[1.0, 1.0, float("nan"), 0.0]])
    >>> wins.half.estimate, wins.worst.estimate, wins.best.estimate, wins.n_unparsed
    (0.625, 0.5, 0.75, 1)
    """
    half, worst, best = (
        win_rate(y_SN, clusters=clusters, level=level, null=null, unparsed=value, **names) for value in (0.5, 0, 1)
    )
    return Sensitivity(half, worst, best, half.n_unparsed)


def difference(
    a_SN: TableLike,
    b_SN: TableLike,
    *,
    paired_seeds: bool,
    clusters: Clusters = None,
    level: float = 0.95,
    bootstrap: int = 0,
    unparsed: float | None = None,
    **names: str,
) -> Difference:
    """Mean of A minus mean of B on the same prompts, with an error that covers prompts and training seeds.

    Independent seeds (`paired_seeds=False`), with d̄_i = ȳ_A,i - ȳ_B,i and m running over A and B:
    SE² = var(d̄)/n + Σ_m max(0, V_seeds,m - V_cells,m), not below Σ_m V_seeds,m;
    df = SE⁴ / [(var(d̄)/n)²/(G-1) + Σ_m V_seeds,m²/(S_m-1)]. A and B may have different numbers of seeds.

    Shared seeds (`paired_seeds=True`: seed s fixes data order and sampling for both): `mean` of d = a - b.

    With clusters var(d̄)/n is the clustered variance of `mean`. A run without siblings (S = 1) contributes no seed
    term, and the record is stamped `this_run_only`. A model that is fixed rather than trained (the start of a suite)
    has the same answers under every seed: repeat its row S times, and no stamp is due.

    `smallest_detectable` is the true difference that a 5 % two-sided t-test with this SE and df finds with 80 %
    probability, from the noncentral t. Unlike p, it tells a small difference from a small study.

    Args:
        a_SN: one value per seed and prompt, an array or a frame as in `mean`.
        b_SN: the same for B, on the same prompts: of arrays in the same order, of frames found by their labels.
        paired_seeds: whether row s of A and of B share their seed. No default: the two answers can differ a lot.
        clusters: one label per prompt, as in `mean`.
        level: of the two-sided interval.
        bootstrap: resamples for `bootstrap_se` (2000 is enough); 0 leaves it out. `bootstrap_disagrees` where it is
            more than 20 % away from se: look for few or very unequal clusters.
        unparsed, names: as in `mean`.

    Raises:
        ValueError: where the prompts (or, paired, the seeds) of A and B are not the same, with the missing one.

    Source:
        As `mean`; the pairing by prompt as in Miller 2024 (arXiv:2411.00640).

    >>> gap = difference([[1.0, 0.5, 1.0, 0.0]], [[0.5, 0.5, 0.0, 0.0]], paired_seeds=False)
    >>> gap.estimate, round(gap.p, 3), gap.this_run_only
    (0.375, 0.215, True)
    """
    a, b = read_two(a_SN, b_SN, paired_seeds, clusters, unparsed, names)
    a_SN, b_SN, groups = a.y_SN, b.y_SN, a.groups
    d_SN = contrast(a_SN, b_SN, paired_seeds)
    estimate = mean_of(d_SN)
    error = crossed_error(over_seeds(d_SN), [d_SN] if paired_seeds else [a_SN, b_SN], groups)
    t, p = t_test(estimate, error)
    bootstrap_se = None
    if bootstrap:
        signed = [(1.0, d_SN)] if paired_seeds else [(1.0, a_SN), (-1.0, b_SN)]
        bootstrap_se = _bootstrap_se(signed, groups, bootstrap, seed=0)
    return Difference(
        estimate=estimate, mean_a=mean_of(a_SN), mean_b=mean_of(b_SN), se=error.se, df=error.df,
        ci=interval(estimate, error, level), level=level,
        t=t, p=p, se_prompts=error.se_prompts, se_seeds=error.se_seeds,
        n_prompts=a_SN.shape[1], n_clusters=groups.n_clusters, n_seeds_a=len(a_SN), n_seeds_b=len(b_SN),
        n_unparsed=a.n_unparsed + b.n_unparsed, paired_seeds=paired_seeds, this_run_only=min(len(a_SN), len(b_SN)) == 1,
        smallest_detectable=detectable(error, power=0.8, level=0.95),
        bootstrap_se=bootstrap_se,
        bootstrap_disagrees=None if bootstrap_se is None
        else abs(bootstrap_se - error.se) > BOOTSTRAP_TOLERANCE * error.se,
    )  # fmt: skip


def two_way_bootstrap_se(
    d_SN: TableLike,
    clusters: Clusters = None,
    resamples: int = 2000,
    seed: int = 0,
    *,
    minus_SN: TableLike | None = None,
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
    >>> bool(abs(two_way_bootstrap_se(y_SN) / mean(y_SN).se - 1) < 0.1)
    True
    """
    if minus_SN is None:
        first, signed = read(d_SN, clusters), []
    else:
        first, minus = read_two(d_SN, minus_SN, False, clusters)
        signed = [(-1.0, minus.y_SN)]
    return _bootstrap_se([(1.0, first.y_SN), *signed], first.groups, resamples, seed)


def _bootstrap_se(signed: Sequence[tuple[float, FloatArray]], groups: Groups, resamples: int, seed: int) -> float:
    if resamples < 2:
        raise ValueError(f"resamples = {resamples}: a standard error needs at least 2")
    random = stream(seed, "bootstrap")

    def draw(n_units: int) -> FloatArray:
        if n_units == 1:  # a single run has no siblings to draw
            return np.ones((resamples, 1))
        return random.multinomial(n_units - 1, np.full(n_units, 1 / n_units), size=resamples) / (n_units - 1)

    clusters_RG = draw(groups.n_clusters)
    prompts_R = clusters_RG @ groups.sizes_G
    by_seeds_R, by_prompts_R, by_both_R = np.zeros((3, resamples))
    for sign, y_SN in signed:
        seeds_RS, sums_SG = draw(len(y_SN)), groups.sums(y_SN)
        by_seeds_R += sign * (seeds_RS @ y_SN.mean(1))
        by_prompts_R += sign * (clusters_RG @ sums_SG.mean(0)) / prompts_R
        by_both_R += sign * ((seeds_RS @ sums_SG) * clusters_RG).sum(1) / prompts_R
    seeds, prompts, both = (float(means_R.var(ddof=1)) for means_R in (by_seeds_R, by_prompts_R, by_both_R))
    return math.sqrt(max(2 * (seeds + prompts) - both, seeds, prompts))


def crossed_error(mean_N: FloatArray, tables: Sequence[FloatArray], groups: Groups) -> Error:
    """Error of mean(mean_N): prompt noise from mean_N, seed noise from each table (S, N) that entered it."""
    from_prompts = groups.variance_of_mean(centred(mean_N)[None])
    runs = [(variance_over_seeds(y_SN, groups), len(y_SN) - 1) for y_SN in tables if len(y_SN) > 1]
    added_by_seeds = sum(max(0.0, seeds - cells) for (seeds, cells), _ in runs)
    # The floor only matters when estimates are noisy: the expectation of the first argument is never below the second.
    variance = max(from_prompts + added_by_seeds, sum(seeds for (seeds, _), _ in runs))
    parts = [(from_prompts, groups.n_clusters - 1)] + [(seeds, df) for (seeds, _), df in runs]
    return Error(
        se=math.sqrt(variance),
        df=satterthwaite(variance, parts),
        se_prompts=math.sqrt(from_prompts),
        se_seeds=math.sqrt(variance - from_prompts) if runs else None,
    )


def variance_over_seeds(y_SN: FloatArray, groups: Groups) -> tuple[float, float]:
    """MS_seed/(nS), the variance of the mean as its seeds show it, and MS_residual/(nS), the cell noise inside it."""
    n_seeds = len(y_SN)
    seed_S, prompt_N = centred(y_SN.mean(1)), centred(over_seeds(y_SN))
    cell_SN = y_SN - mean_of(y_SN) - seed_S[:, None] - prompt_N
    pairs = n_seeds * (n_seeds - 1)
    return float((seed_S**2).sum()) / pairs, groups.variance_of_mean(cell_SN) / pairs
