"""What ratings, length control and judge quality share: fractional logistic fits, the jackknife, and their records."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special, stats

from .records import FloatArray, Record
from .tables import tail


@dataclass(frozen=True)
class Coefficient(Record):
    """A number with its error and interval; `p` where it is tested, `df` those of the t interval."""

    estimate: float
    se: float
    ci: tuple[float, float]
    df: float
    level: float
    p: float | None = None


def coefficient(estimate: float, se: float, df: float, level: float, null: float | None = None) -> Coefficient:
    """estimate ± t(df) se, and the two-sided t-test of `null`."""
    half = float(stats.t.isf(tail(level), df)) * se
    p = None
    if null is not None:
        p = float(estimate == null) if se == 0 else 2 * float(stats.t.sf(abs(estimate - null) / se, df))
    return Coefficient(float(estimate), float(se), (float(estimate - half), float(estimate + half)), df, level, p)


def share(estimate: float, se: float, n: int, df: float, level: float) -> Coefficient:
    """A share with Wilson's interval for the n that would give this error: p(1 - p)/se², or n where all are alike."""
    z = float(stats.t.isf(tail(level), df))
    effective = estimate * (1 - estimate) / se**2 if se > 0 else n
    centre, shrink = estimate + z**2 / (2 * effective), 1 + z**2 / effective
    half = z * math.sqrt(estimate * (1 - estimate) / effective + (z / (2 * effective)) ** 2)
    low, high = max(0.0, (centre - half) / shrink), min(1.0, (centre + half) / shrink)
    return Coefficient(float(estimate), float(se), (min(low, estimate), max(high, estimate)), df, level)


def jackknife(statistic: Callable[[FloatArray], FloatArray], sums_GF: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Values (K,) and covariance (K, K) of statistics of sums over clusters, each cluster left out once.

    cov = (G-1)/G Σ_g (θ_(g) - θ_(.)) (θ_(g) - θ_(.))ᵀ. `statistic` maps rows of sums (R, F) to rows of values (R, K).
    No random numbers, and for smooth statistics as good as the bootstrap (Efron & Tibshirani 1993, chapter 11).
    """
    n_clusters, total_F = len(sums_GF), sums_GF.sum(0)
    without_GK = statistic(total_F - sums_GF)
    deviation_GK = without_GK - without_GK.mean(0)
    return statistic(total_F[None])[0], (n_clusters - 1) / n_clusters * deviation_GK.T @ deviation_GK


def fractional_logit(x_RMP: FloatArray, y_M: FloatArray, weight_RM: FloatArray, start_P: FloatArray) -> FloatArray:
    """Maximise Σ_m weight (y x·β - log(1 + exp x·β)) over β for R sets of rows and weights at once: (R, P).

    Newton's method with halved steps. y may be any share in [0, 1] (Papke & Wooldridge 1996).
    """
    beta_RP = np.broadcast_to(start_P, (len(weight_RM), x_RMP.shape[-1])).copy()
    curb = 1e-10 * np.eye(x_RMP.shape[-1])  # keeps a resample without spread solvable; it does not move the solution

    def loss(beta_RP: FloatArray) -> tuple[FloatArray, FloatArray]:
        eta_RM = np.matmul(x_RMP, beta_RP[..., None])[..., 0]
        return eta_RM, (weight_RM * (np.logaddexp(0, eta_RM) - y_M * eta_RM)).sum(-1)

    eta_RM, loss_R = loss(beta_RP)
    for _ in range(60):
        chance_RM = special.expit(eta_RM)
        gradient_RP = np.matmul((weight_RM * (y_M - chance_RM))[:, None, :], x_RMP)[:, 0]
        weighted_RMP = (weight_RM * chance_RM * (1 - chance_RM))[..., None] * x_RMP
        hessian_RPP = np.matmul(np.swapaxes(weighted_RMP, -1, -2), x_RMP)
        step_RP = np.linalg.solve(hessian_RPP + curb, gradient_RP[..., None])[..., 0]
        for _ in range(30):
            eta_RM, new_R = loss(beta_RP + step_RP)
            worse_R = new_R > loss_R + 1e-9 * (1 + np.abs(loss_R))
            if not worse_R.any():
                break
            step_RP[worse_R] /= 2
        beta_RP, loss_R = beta_RP + step_RP, new_R
        if np.abs(step_RP).max() < 1e-10 or np.abs(gradient_RP).max() < 1e-12:
            break
    return beta_RP


def separated(difference_JP: FloatArray) -> FloatArray | None:
    """A direction of β along which the likelihood never falls and somewhere rises, or None: then the fit exists.

    Rows are x(observed outcome) - x(another outcome) of a logistic model; the direction has d·row >= 0 for all of them
    and > 0 for some (Albert & Anderson 1984; found by linear programming, Konis 2007).
    """
    result = optimize.linprog(
        -difference_JP.sum(0), A_ub=-difference_JP, b_ub=np.zeros(len(difference_JP)), bounds=(-1, 1), method="highs"
    )
    return result.x if -result.fun > 1e-7 else None
