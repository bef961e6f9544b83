"""Ratings of many methods: Bradley-Terry with errors clustered by prompt, and online Elo beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from scipy import special

from .battles import Design, Fit, bootstrap_covariance, goodness_of_fit, maximum, read_battles, refuse_where_infinite
from .families import holm
from .fits import Coefficient, coefficient
from .records import FloatArray, Record
from .tables import Clusters, stream

ELO = 400 / math.log(10)  # points per unit of log odds: 400 points are odds of 10
CENTRE = 1000.0


@dataclass(frozen=True)
class Rating(Record):
    """One method's rating in Elo points; its rank lies between `best_rank` and `worst_rank` by the adjusted tests."""

    name: str
    estimate: float
    se: float
    ci: tuple[float, float]
    best_rank: int
    worst_rank: int
    n_battles: int


@dataclass(frozen=True)
class Contrast(Record):
    """Rating of a minus rating of b, with Holm's p over all pairs; the win rate of a as seen and as fitted."""

    a: str
    b: str
    estimate: float
    se: float
    ci: tuple[float, float]
    p: float | None
    p_holm: float
    n_battles: int
    observed: float | None
    expected: float


@dataclass(frozen=True)
class BradleyTerry(Record):
    """Ratings from the best to the worst, all pairwise contrasts, position and tie terms, and how well they fit."""

    ratings: tuple[Rating, ...]
    contrasts: tuple[Contrast, ...]
    position: Coefficient | None
    log_tie: Coefficient | None
    fit: Fit | None
    ties: str
    anchor: str | None
    error: Literal["sandwich", "bootstrap"]
    failed_resamples: int
    df: int
    level: float
    n_battles: int
    n_clusters: int

    def __getitem__(self, name: str) -> Rating:
        return next(rating for rating in self.ratings if rating.name == name)


@dataclass(frozen=True)
class EloRating(Record):
    """Online Elo of one method: in the given order, and over random orders of the same battles."""

    name: str
    as_given: float
    estimate: float
    order_sd: float
    order_range: tuple[float, float]


@dataclass(frozen=True)
class Elo(Record):
    """Online Elo ratings from the best to the worst on average over orders; `order_sd` is the order's effect alone."""

    ratings: tuple[EloRating, ...]
    k: float
    orders: int
    n_battles: int

    def __getitem__(self, name: str) -> EloRating:
        return next(rating for rating in self.ratings if rating.name == name)


def bradley_terry(
    a: Any,
    b: Any = "b",
    y: Any = "y",
    *,
    first: Any = None,
    clusters: Clusters | str = None,
    ties: Literal["halves", "davidson"] = "halves",
    anchor: str | None = None,
    level: float = 0.95,
    resamples: int = 0,
    seed: int = 0,
) -> BradleyTerry:
    """Bradley-Terry ratings of methods that met in pairs, with errors that know which battles share a prompt.

    logit P(a beats b) = θ_a - θ_b + γ (2 first - 1), by maximum likelihood; rating = 1000 + 400/ln 10 (θ - mean θ).
    A tie is half a win for both. With `ties="davidson"`, P(tie) ∝ ν and P(a), P(b) ∝ exp(± logit/2) instead.

    Cov(θ) = G/(G-1) H⁻¹ (Σ_g s_g s_gᵀ) H⁻¹ with s_g the score of a cluster's battles (CR0 sandwich), intervals by
    t(G-1). Battles on one prompt are dependent: errors by battle are then about half of what they should be.

    Ranks come from the pairwise contrasts at Holm-adjusted level: 1 + the number of methods that are proven better, to
    K - the number proven worse. `fit` compares with a free probability for each pair (and place): a cycle, such as a
    beats b beats c beats a, or a method that only beats one other, shows there. Its p takes the deviance as Σ λ χ²₁ by
    Satterthwaite, with the λ from the clusters (Rao & Scott), so dependent and probabilistic judgements are covered.

    Args:
        a: names of the first methods, one per battle; or a frame with columns a, b, y.
        b: names of their rivals, or the column's name.
        y: judgements in [0, 1]: 1 = a is better, 0.5 = tie; or the column's name.
        first: whether a stood first (0.5: both orders averaged); adds the position term γ. Or the column's name.
        clusters: one label per battle, its prompt; None takes all battles as independent. Or the column's name.
        ties: "halves", or "davidson" for judgements that are 0, 0.5 or 1.
        anchor: method with rating exactly 1000; None: the mean is 1000.
        level: of the intervals.
        resamples: above 0, errors by so many resamples of whole clusters with refits, not by the sandwich. Those where
            the ratings do not exist are left out and counted in `failed_resamples`.
        seed: random seed of the resamples.

    Raises:
        ValueError: where a group of methods never beat the rest (ratings differ by infinity: the groups are named), or
            the position or tie term is infinite or cannot be told from the ratings.

    Source:
        Bradley & Terry 1952; Ford 1957 (existence); Davidson 1970 (ties, and 1977 for order); Chiang et al. 2024
        (arXiv:2403.04132) for the sandwich; Rao & Scott 1984.

    >>> battles = [("dpo", "sft", 1), ("dpo", "sft", 1), ("dpo", "sft", 0), ("dpo", "ipo", 0.5), ("ipo", "sft", 1)]
    >>> result = bradley_terry(*zip(*battles, ("ipo", "sft", 0), ("ipo", "dpo", 0)), anchor="sft")
    >>> [(r.name, round(r.estimate), r.best_rank, r.worst_rank) for r in result.ratings]
    [('dpo', 1138, 1, 3), ('sft', 1000, 1, 3), ('ipo', 977, 1, 3)]
    """
    names, battles = read_battles(a, b, y, first, clusters)
    if ties not in ("halves", "davidson"):
        raise ValueError(f'ties = {ties!r}: expected "halves" or "davidson"')
    if anchor is not None and anchor not in names:
        raise ValueError(f"anchor = {anchor!r} is none of the methods: {', '.join(names)}")
    design = Design.of(battles, len(names), ties == "davidson")
    count_CO = design.counts(np.ones(len(battles.y_B)))
    refuse_where_infinite(names, design, count_CO)
    beta_P, inverse_PP, chance_CO = maximum(design, count_CO)
    residual_GQ = design.residuals(chance_CO, battles.groups)
    n_clusters, failed = battles.groups.n_clusters, 0
    correction = n_clusters / (n_clusters - 1)
    if resamples:
        covariance_PP, failed = bootstrap_covariance(design, battles.groups, beta_P, resamples, seed)
    else:
        score_GP = residual_GQ @ design.t_COP.reshape(residual_GQ.shape[1], -1)
        covariance_PP = correction * inverse_PP @ (score_GP.T @ score_GP) @ inverse_PP

    df, n_methods = n_clusters - 1, len(names)

    def combined(weight_P: FloatArray, scale: float, null: float | None = None) -> Coefficient:
        variance = max(0.0, float(weight_P @ covariance_PP @ weight_P))
        return coefficient(scale * float(weight_P @ beta_P), scale * math.sqrt(variance), df, level, null)

    unit_PP, mean_P = np.eye(len(beta_P)), np.zeros(len(beta_P))
    mean_P[:n_methods] = 1 / n_methods
    origin_P = mean_P if anchor is None else unit_PP[names.index(anchor)]
    pairs = list(combinations(sorted(range(n_methods), key=lambda k: -beta_P[k]), 2))  # the better one first
    gaps = [combined(unit_PP[i] - unit_PP[j], ELO, null=0.0) for i, j in pairs]
    p_holm_P = holm(np.array([gap.p for gap in gaps], dtype=float))
    wins_KK, met_KK = battles.table(n_methods)
    contrasts = tuple(
        Contrast(
            names[i], names[j], gap.estimate, gap.se, gap.ci, gap.p, float(p_holm),
            n_battles=int(met_KK[i, j]),
            observed=float(wins_KK[i, j] / met_KK[i, j]) if met_KK[i, j] else None,
            expected=float(special.expit(beta_P[i] - beta_P[j])) if ties == "halves"
            else _davidson_win_rate(beta_P[i] - beta_P[j], beta_P[-1]),
        )
        for (i, j), gap, p_holm in zip(pairs, gaps, p_holm_P, strict=True)
    )  # fmt: skip
    proven = [(c.a, c.b) for c in contrasts if c.p_holm < 1 - level]
    ratings = []
    for k in sorted(range(n_methods), key=lambda k: -beta_P[k]):
        own = combined(unit_PP[k] - origin_P, ELO)
        ratings.append(
            Rating(
                names[k], CENTRE + own.estimate, own.se, (CENTRE + own.ci[0], CENTRE + own.ci[1]),
                best_rank=1 + sum(worse == names[k] for _, worse in proven),
                worst_rank=n_methods - sum(better == names[k] for better, _ in proven),
                n_battles=int(met_KK[k].sum()),
            )
        )  # fmt: skip
    return BradleyTerry(
        ratings=tuple(ratings), contrasts=contrasts,
        position=None if first is None else combined(unit_PP[n_methods], 1.0, null=0.0),
        log_tie=combined(unit_PP[-1], 1.0) if ties == "davidson" else None,
        fit=goodness_of_fit(design, count_CO, chance_CO, inverse_PP, residual_GQ, correction),
        ties=ties, anchor=anchor, error="bootstrap" if resamples else "sandwich", failed_resamples=failed,
        df=df, level=level, n_battles=len(battles.y_B), n_clusters=n_clusters,
    )  # fmt: skip


def elo(a: Any, b: Any = "b", y: Any = "y", *, k: float = 4.0, orders: int = 200, seed: int = 0) -> Elo:
    """Online Elo ratings, and how much of them is the order in which the same battles are replayed.

    r_a += k (y - 1/(1 + 10^((r_b - r_a)/400))), r_b the opposite, from 1000 each, battle after battle.

    Elo is made for players who change. Models do not, so the order of the battles is noise: use `bradley_terry`, and
    show this beside it. `order_sd` is not a standard error: the same battles give it without any sampling.

    Args:
        a: names of the first methods, one per battle; or a frame with columns a, b, y.
        b: names of their rivals, or the column's name.
        y: judgements in [0, 1]: 1 = a is better; or the column's name.
        k: step size in points.
        orders: random orders, at least 2.
        seed: random seed of the orders.

    Source:
        Elo 1978; its order effect on models: Boubdir et al. 2023 (arXiv:2311.17295).

    >>> result = elo(["dpo"] * 3 + ["sft"], ["sft"] * 3 + ["dpo"], [1, 1, 0, 1], k=32)
    >>> [(r.name, round(r.as_given), round(r.estimate)) for r in result.ratings]
    [('sft', 1005, 1000), ('dpo', 995, 1000)]
    """
    names, battles = read_battles(a, b, y, None, None)
    if orders < 2 or not k > 0:
        raise ValueError(f"orders = {orders}, k = {k}: need at least 2 orders and a positive step")
    random, n_battles = stream(seed, "elo"), len(battles.y_B)
    order_RB = np.stack([np.arange(n_battles)] + [random.permutation(n_battles) for _ in range(orders)])
    rating_RK, every_R = np.full((orders + 1, len(names)), CENTRE), np.arange(orders + 1)
    for battle_R in order_RB.T:
        i_R, j_R = battles.i_B[battle_R], battles.j_B[battle_R]
        expected_R = special.expit((rating_RK[every_R, i_R] - rating_RK[every_R, j_R]) / ELO)
        step_R = k * (battles.y_B[battle_R] - expected_R)
        rating_RK[every_R, i_R] += step_R
        rating_RK[every_R, j_R] -= step_R
    given_K, shuffled_RK = rating_RK[0], rating_RK[1:]
    ratings = [
        EloRating(
            name, float(given), float(column_R.mean()), float(column_R.std(ddof=1)),
            (float(column_R.min()), float(column_R.max())),
        )
        for name, given, column_R in zip(names, given_K, shuffled_RK.T, strict=True)
    ]  # fmt: skip
    return Elo(tuple(sorted(ratings, key=lambda rating: -rating.estimate)), k, orders, n_battles)


def _davidson_win_rate(gap: float, log_tie: float) -> float:
    """Chance of a win plus half of a tie."""
    win, tie, _ = special.softmax([gap / 2, log_tie, -gap / 2])
    return float(win + tie / 2)
