"""Reward against distance from the start: KL with errors, Gao's curves with their peaks, the frontier and its area."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from .crossed import mean
from .fits import Coefficient, coefficient
from .records import Estimate, FloatArray, Record
from .tables import Clusters, Groups, finite, mean_of, stream, tail

Form = Literal["best_of_n", "rl"]


@dataclass(frozen=True)
class KL(Record):
    """KL divergence in nats, of whole answers and per token, over prompts and training seeds."""

    sequence: Estimate
    per_token: Estimate | None
    estimator: str


@dataclass(frozen=True)
class Peak(Record):
    """Where the fitted curve is highest, in √KL; its upper end is infinite where the data show no fall."""

    estimate: float
    ci: tuple[float, float]
    level: float
    kl: float
    gold: float
    inside_data: bool


@dataclass(frozen=True)
class GaoFit(Record):
    """Gold reward as a function of √KL. `peak` is None where the fitted curve never falls."""

    alpha: Coefficient
    beta: Coefficient
    peak: Peak | None
    form: Form
    residual_sd: float
    n_points: int
    n_units: int | None
    n_clusters: int | None


@dataclass(frozen=True)
class Frontier(Record):
    """Points that no other one beats in both: at least as much gold for no more KL."""

    sqrt_kl_P: FloatArray
    gold_P: FloatArray
    on_front_P: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class FrontierArea(Record):
    """Mean over √KL, up to a common bound, of the best gold that is reached within it; errors over whole runs."""

    estimate: float
    se: float | None
    ci: tuple[float, float] | None
    df: int
    level: float
    up_to_kl: float
    n_points: int
    n_runs: int


def kl(
    log_ratio: Any,
    *,
    by_token: bool = False,
    tokens: npt.ArrayLike | None = None,
    estimator: Literal["k1", "k3"] = "k1",
    clusters: Clusters = None,
    level: float = 0.95,
) -> KL:
    """KL(π || π_ref) from log-ratios of answers that π sampled, per answer and per token, with errors by prompt.

    k1 = log(π/π_ref); k3 = r - 1 - log r, r = π_ref/π, of whatever has a ratio of its own: tokens, or else answers.
    Per token it is Σ KL / Σ tokens, with the error of a ratio. Both are unbiased for a policy's own samples at
    temperature 1; k3 is never negative, and for whole answers often useless, because r is then rarely large but huge.

    Args:
        log_ratio: log π - log π_ref in nats: one sum per answer, (N,) or (S, N).
        by_token: log_ratio is a list of N answers of one run, each with one entry per token.
        tokens: of each answer, shaped as the sums; by token they are counted.
        estimator: "k1" or "k3".
        clusters: one label per prompt.
        level: of the intervals.

    Source:
        Schulman 2020, Approximating KL divergence; errors as in `mean`.

    >>> result = kl([[0.1, 0.3], [0.2], [-0.1, 0.4, 0.3]], by_token=True)
    >>> round(result.sequence.estimate, 3), round(result.per_token.estimate, 3)
    (0.4, 0.2)
    """
    if estimator not in ("k1", "k3"):
        raise ValueError(f'estimator = {estimator!r}: expected "k1" or "k3"')

    def terms(values: npt.ArrayLike) -> FloatArray:
        ratio = finite("log_ratio", values)
        return ratio if estimator == "k1" else np.expm1(-ratio) + ratio

    if by_token:
        answers = [terms(answer) for answer in log_ratio]
        tokens = [len(answer) for answer in answers]
        kl_SN = np.array([[answer.sum() for answer in answers]])
    else:
        kl_SN = np.atleast_2d(terms(log_ratio))
    per_token = None
    if tokens is not None:
        tokens_SN = np.atleast_2d(finite("tokens", tokens))
        if tokens_SN.shape != kl_SN.shape or not (tokens_SN > 0).all():
            raise ValueError(f"tokens: expected positive counts of shape {kl_SN.shape}, got shape {tokens_SN.shape}")
        per_token = ratio_of_means(kl_SN, tokens_SN, clusters, level)
    return KL(mean(kl_SN, clusters=clusters, level=level), per_token, estimator)


def ratio_of_means(
    top_SN: FloatArray, bottom_SN: FloatArray, clusters: Clusters, level: float, null: float | None = None
) -> Estimate:
    """Σ top / Σ bottom with the error of its linearisation, ρ + (top - ρ bottom)/mean(bottom)."""
    rho = mean_of(top_SN) / mean_of(bottom_SN)
    return mean(rho + (top_SN - rho * bottom_SN) / mean_of(bottom_SN), clusters=clusters, level=level, null=null)


def gao_fit(
    kl: npt.ArrayLike, gold: npt.ArrayLike, *, form: Form = "rl", clusters: Clusters = None, level: float = 0.95
) -> GaoFit:
    """Gao's curve of gold reward against d = √KL by least squares, with intervals of its parameters and its peak.

    best_of_n: R(d) = d (α - β d), peak d* = α/(2β); rl: R(d) = d (α - β log d), peak d* = exp(α/β - 1). R(0) = 0.

    Both are linear in α and β, so with gold by unit (prompt or run) each unit has parameters of its own, and the error
    is that of their mean, whatever the dependence of the points. Without units it is that of the residuals. The peak's
    interval is Fieller's for α/β: where β is not clearly positive it has no upper end.

    Args:
        kl: (K,) in nats, positive: checkpoints, strengths of the KL term, or sizes of n.
        gold: less that of the start, which is what R(0) = 0 means: (K,) means, or (U, K) by unit.
        form: "best_of_n" or "rl".
        clusters: one label per unit.
        level: of the intervals.

    Source:
        Gao, Schulman & Hilton 2022 (arXiv:2210.10760); Fieller 1954.

    >>> d = np.array([0.5, 1.0, 2.0, 3.0, 4.0])
    >>> fit = gao_fit(d**2, d * (1.0 - 0.2 * d), form="best_of_n")
    >>> round(fit.alpha.estimate, 6), round(fit.beta.estimate, 6), round(fit.peak.estimate, 6), fit.peak.inside_data
    (1.0, 0.2, 2.5, True)
    """
    kl_K, gold_UK = finite("kl", kl), np.atleast_2d(finite("gold", gold))
    if form not in ("best_of_n", "rl"):
        raise ValueError(f'form = {form!r}: expected "best_of_n" or "rl"')
    if kl_K.ndim != 1 or gold_UK.shape[1] != len(kl_K) or not (kl_K > 0).all() or len(np.unique(kl_K)) < 3:
        raise ValueError(
            f"kl has shape {kl_K.shape}, gold has shape {gold_UK.shape}: need the gold reward at three or more "
            "different, positive KL; the start itself (KL 0) is in the curve already"
        )
    d_K = np.sqrt(kl_K)
    bend_K = d_K**2 if form == "best_of_n" else d_K * np.log(d_K)
    x_K2 = np.stack([d_K, -bend_K], axis=1)
    solve_2K = np.linalg.pinv(x_K2)
    theta_2 = solve_2K @ gold_UK.mean(0)
    residual_K = gold_UK.mean(0) - x_K2 @ theta_2
    residual_sd = math.sqrt(float(residual_K @ residual_K) / (len(kl_K) - 2))
    groups = Groups.of(clusters, len(gold_UK)) if len(gold_UK) > 1 else None
    if groups is None:
        covariance_22, df = residual_sd**2 * np.linalg.inv(x_K2.T @ x_K2), len(kl_K) - 2
    else:
        sums_2G = groups.sums(solve_2K @ (gold_UK - gold_UK.mean(0)).T)
        df = groups.n_clusters - 1
        covariance_22 = groups.n_clusters / df * sums_2G @ sums_2G.T / len(gold_UK) ** 2
    se_2 = np.sqrt(np.diag(covariance_22))
    alpha, beta = (coefficient(value, se, df, level, null=0.0) for value, se in zip(theta_2, se_2, strict=True))
    return GaoFit(
        alpha=alpha, beta=beta, peak=_peak(theta_2, covariance_22, df, level, form, d_K),
        form=form, residual_sd=residual_sd, n_points=len(kl_K),
        n_units=None if groups is None else len(gold_UK), n_clusters=None if groups is None else groups.n_clusters,
    )  # fmt: skip


def frontier(kl: npt.ArrayLike, gold: npt.ArrayLike) -> Frontier:
    """Which points are on the frontier of gold reward against √KL.

    Point p is on it if no point q has KL_q <= KL_p and gold_q >= gold_p, one of them strictly.

    Args:
        kl: (P,) in nats; a negative estimate, which is noise around 0, counts as 0.
        gold: (P,).

    Source:
        The frontier view of Rafailov et al. 2023 (arXiv:2305.18290), figure 2.

    >>> frontier(kl=[1.0, 4.0, 9.0], gold=[0.5, 0.4, 0.9]).on_front_P.tolist()
    [True, False, True]
    """
    d_P, gold_P = np.sqrt(np.maximum(0, finite("kl", kl))), finite("gold", gold)
    if d_P.shape != gold_P.shape or d_P.ndim != 1 or not len(d_P):
        raise ValueError(f"kl has shape {d_P.shape}, gold has shape {gold_P.shape}: one value each per point")
    no_worse_PP = (d_P[:, None] <= d_P) & (gold_P[:, None] >= gold_P)
    better_PP = (d_P[:, None] < d_P) | (gold_P[:, None] > gold_P)
    return Frontier(d_P, gold_P, ~np.any(no_worse_PP & better_PP, axis=0))


def frontier_area(
    kl: npt.ArrayLike,
    gold: npt.ArrayLike,
    *,
    up_to_kl: float,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> FrontierArea:
    """Mean height of a method's frontier up to a common KL, with an error from resampling whole runs.

    area = 1/D ∫_0^D G(d) dd, D = √up_to_kl, G(d) = max(0, max{gold_k : √KL_k <= d}), with KL_k and gold_k means over
    runs; the start, gold 0 at KL 0, is always within reach. Runs are drawn with all their points, S - 1 of S; t(S - 1).

    Take the same D for all methods. A maximum over noisy points is too high: the same number of points for all, please.

    Args:
        kl: (S, K) nats by run and point; (K,) for one run, which has no error.
        gold: less that of the start, likewise.
        up_to_kl: the common bound.
        level: of the interval.
        resamples: of the runs.
        seed: random seed of the resamples.

    Source:
        Whole-run resampling as in Agarwal et al. 2021 (arXiv:2108.13264).

    >>> round(frontier_area(kl=[1.0, 4.0, 9.0], gold=[1.0, 3.0, 2.0], up_to_kl=9.0).estimate, 4)  # (0 + 1 + 3)/3
    1.3333
    """
    kl_SK, gold_SK = np.atleast_2d(finite("kl", kl)), np.atleast_2d(finite("gold", gold))
    if kl_SK.shape != gold_SK.shape or kl_SK.ndim != 2 or not up_to_kl > 0 or resamples < 2:
        raise ValueError(
            f"kl has shape {kl_SK.shape}, gold {gold_SK.shape}, up_to_kl = {up_to_kl}, resamples = {resamples}: "
            "expected (runs, points) twice, a positive bound, and at least 2 resamples"
        )
    n_runs, n_points = kl_SK.shape

    def area_R(weight_RS: FloatArray) -> FloatArray:
        d_RK = np.minimum(np.sqrt(np.maximum(0, weight_RS @ kl_SK)), math.sqrt(up_to_kl))
        order_RK = np.argsort(d_RK, axis=1, kind="stable")
        d_RK = np.take_along_axis(d_RK, order_RK, 1)
        best_RK = np.maximum(0, np.maximum.accumulate(np.take_along_axis(weight_RS @ gold_SK, order_RK, 1), axis=1))
        width_RK = np.diff(d_RK, axis=1, append=math.sqrt(up_to_kl))  # points beyond the bound have no width
        return (best_RK * width_RK).sum(1) / math.sqrt(up_to_kl)

    estimate, df = float(area_R(np.full((1, n_runs), 1 / n_runs))[0]), n_runs - 1
    if n_runs == 1:
        return FrontierArea(estimate, None, None, df, level, up_to_kl, n_points, n_runs)
    drawn_RS = stream(seed, "frontier").multinomial(n_runs - 1, np.full(n_runs, 1 / n_runs), size=resamples)
    found = coefficient(estimate, float(area_R(drawn_RS / (n_runs - 1)).std(ddof=1)), df, level)
    return FrontierArea(estimate, found.se, found.ci, df, level, up_to_kl, n_points, n_runs)


def _peak(
    theta_2: FloatArray, covariance_22: FloatArray, df: float, level: float, form: Form, d_K: FloatArray
) -> Peak | None:
    alpha, beta = theta_2
    if beta <= 0 or (form == "best_of_n" and alpha <= 0):
        return None
    low, high = _fieller(theta_2, covariance_22, float(stats.t.isf(tail(level), df)))
    if form == "best_of_n":
        d, ci, gold = alpha / (2 * beta), (max(0.0, low / 2), high / 2), alpha**2 / (4 * beta)
    else:
        with np.errstate(over="ignore"):
            d, *ends = (float(np.exp(value - 1)) for value in (alpha / beta, low, high))
        ci, gold = (ends[0], ends[1]), beta * d
    return Peak(float(d), ci, level, float(d**2), float(gold), bool(d_K.min() <= d <= d_K.max()))


def _fieller(theta_2: FloatArray, covariance_22: FloatArray, t: float) -> tuple[float, float]:
    """Interval of α/β: where |α - θ β| is within t of its errors; without upper end where β may be 0."""
    (alpha, beta), (v_alpha, v_beta), v_both = theta_2, np.diag(covariance_22), covariance_22[0, 1]
    a, b, c = beta**2 - t**2 * v_beta, alpha * beta - t**2 * v_both, alpha**2 - t**2 * v_alpha
    root = math.sqrt(max(0.0, b**2 - a * c))
    if a > 0:
        return (b - root) / a, (b + root) / a
    low = (b - root) / a if a < 0 and b**2 > a * c else -math.inf
    return (low if low <= alpha / beta else -math.inf), math.inf
