"""Battles between methods, the likelihood of their ratings as a table of cells, and whether it has a maximum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse, special, stats
from scipy.sparse import csgraph

from .columns import columns
from .fits import separated
from .records import FloatArray, Record
from .tables import Groups, finite, stream


@dataclass(frozen=True)
class Fit(Record):
    """Deviance from the model with one free probability per pair; a small p: no ratings describe these battles."""

    deviance: float
    df: int
    p: float


@dataclass(frozen=True)
class Battles:
    """i < j are the methods' numbers, y the judgement of i, place in [-1, 1] is 1 where i stood first."""

    i_B: npt.NDArray[np.intp]
    j_B: npt.NDArray[np.intp]
    y_B: FloatArray
    place_B: FloatArray | None
    groups: Groups

    def table(self, n_methods: int) -> tuple[FloatArray, FloatArray]:
        """Wins of the row over the column, and battles between them."""
        wins_KK, met_KK = np.zeros((2, n_methods, n_methods))
        np.add.at(wins_KK, (self.i_B, self.j_B), self.y_B)
        np.add.at(wins_KK, (self.j_B, self.i_B), 1 - self.y_B)
        np.add.at(met_KK, (self.i_B, self.j_B), 1)
        return wins_KK, met_KK + met_KK.T


def read_battles(a: Any, b: Any, y: Any, first: Any, clusters: Any) -> tuple[list[str], Battles]:
    a, b, y, first, clusters = columns(a, "a", b=b, y=y, first=first, clusters=clusters)
    a_B, b_B, y_B = [str(name) for name in a], [str(name) for name in b], finite("y", y)
    if not len(a_B) == len(b_B) == len(y_B) > 0:
        raise ValueError(f"a, b, y have {len(a_B)}, {len(b_B)}, {len(y_B)} entries: give one each per battle")
    if (y_B < 0).any() or (y_B > 1).any():
        raise ValueError(f"y ranges from {y_B.min():g} to {y_B.max():g}: judgements lie in [0, 1], 1 = a is better")
    own = next((name for name, rival in zip(a_B, b_B, strict=True) if name == rival), None)
    if own is not None:
        raise ValueError(f"a battle of {own!r} against itself says nothing of ratings: leave it out")
    names = sorted({*a_B, *b_B})
    number = {name: k for k, name in enumerate(names)}
    a_id, b_id = (np.array([number[name] for name in side]) for side in (a_B, b_B))
    swap_B = a_id > b_id
    place_B = None
    if first is not None:
        place_B = 2 * finite("first", first) - 1
        if len(place_B) != len(y_B) or (np.abs(place_B) > 1).any():
            raise ValueError("first must be one value in [0, 1] per battle: 1 where a stood first, 0 where b did")
        place_B = np.where(swap_B, -place_B, place_B)
    return names, Battles(
        np.minimum(a_id, b_id), np.maximum(a_id, b_id), np.where(swap_B, 1 - y_B, y_B), place_B,
        Groups.of(clusters, len(y_B)),
    )  # fmt: skip


@dataclass(frozen=True)
class Design:
    """A multinomial logit, P(o | c) ∝ exp(t_co · β): C cells of equal pair and place, O outcomes, P parameters.

    `cell_B` says which cell a battle is in, `outcome_BO` what came of it: (y, 1 - y), or one of win, tie, loss.
    """

    t_COP: FloatArray
    cell_B: npt.NDArray[np.intp]
    outcome_BO: FloatArray
    pair_C2: npt.NDArray[np.intp]

    @classmethod
    def of(cls, battles: Battles, n_methods: int, davidson: bool) -> Design:
        place_B = np.zeros(len(battles.y_B)) if battles.place_B is None else battles.place_B
        cell_C3, cell_B = np.unique(np.stack([battles.i_B, battles.j_B, place_B], axis=1), axis=0, return_inverse=True)
        pair_C2, cells = cell_C3[:, :2].astype(np.intp), np.arange(len(cell_C3))
        x_CP = np.zeros((len(cells), n_methods + (battles.place_B is not None)))
        x_CP[cells, pair_C2[:, 0]], x_CP[cells, pair_C2[:, 1]] = 1, -1
        if battles.place_B is not None:
            x_CP[:, -1] = cell_C3[:, 2]
        y_B = battles.y_B
        if not davidson:
            return cls(x_CP[:, None] * np.array([[1.0], [0.0]]), cell_B.ravel(), np.stack([y_B, 1 - y_B], 1), pair_C2)
        if not np.isin(y_B, (0, 0.5, 1)).all():
            raise ValueError('ties="davidson" needs judgements that are 0, 0.5 or 1; use ties="halves" for shares')
        side_CO = x_CP[:, None] * np.array([[0.5], [0.0], [-0.5]])
        tie_CO = np.broadcast_to(np.array([[0.0], [1.0], [0.0]]), (len(cells), 3, 1))
        outcome_BO = (y_B[:, None] == np.array([1, 0.5, 0])).astype(float)
        return cls(np.concatenate([side_CO, tie_CO], axis=2), cell_B.ravel(), outcome_BO, pair_C2)

    def counts(self, weight_B: FloatArray) -> FloatArray:
        n_cells = len(self.t_COP)
        return np.stack(
            [np.bincount(self.cell_B, weight_B * outcome_B, n_cells) for outcome_B in self.outcome_BO.T], axis=1
        )

    def residuals(self, chance_CO: FloatArray, groups: Groups) -> sparse.csr_matrix:
        """Observed minus expected, summed by cluster: (G, C O), mostly empty."""
        n_outcomes = self.outcome_BO.shape[1]
        rows = np.repeat(groups.ids_N, n_outcomes)
        places = (self.cell_B[:, None] * n_outcomes + np.arange(n_outcomes)).ravel()
        residual = (self.outcome_BO - chance_CO[self.cell_B]).ravel()
        return sparse.csr_matrix((residual, (rows, places)), shape=(groups.n_clusters, chance_CO.size))


def maximum(
    design: Design, count_CO: FloatArray, start_P: FloatArray | None = None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """β, the inverse information on Σ θ = 0, and the fitted chances, by Newton's method with halved steps."""
    t_COP, n_C = design.t_COP, count_CO.sum(1)
    n_methods = int(design.pair_C2.max()) + 1
    free_PP = np.zeros((t_COP.shape[2],) * 2)
    free_PP[:n_methods, :n_methods] = 1.0  # the likelihood does not see a common shift; scores are orthogonal to it
    beta_P = np.zeros(t_COP.shape[2]) if start_P is None else start_P

    def value(beta_P: FloatArray) -> tuple[FloatArray, float]:
        eta_CO = t_COP @ beta_P
        return eta_CO, float((count_CO * (eta_CO - special.logsumexp(eta_CO, axis=1, keepdims=True))).sum())

    eta_CO, best = value(beta_P)
    for _ in range(100):
        chance_CO = special.softmax(eta_CO, axis=1)
        gradient_P = np.einsum("co,cop->p", count_CO - n_C[:, None] * chance_CO, t_COP)
        centred_COP = t_COP - np.einsum("co,cop->cp", chance_CO, t_COP)[:, None]
        weighted_COP = (n_C[:, None] * chance_CO)[..., None] * centred_COP
        information_PP = np.einsum("cop,coq->pq", weighted_COP, centred_COP) + free_PP
        step_P = np.linalg.solve(information_PP, gradient_P)
        if np.abs(step_P).max() < 1e-11:
            break
        eta_CO, new = value(beta_P + step_P)
        while new < best - 1e-9 * (1 + abs(best)):
            step_P = step_P / 2
            eta_CO, new = value(beta_P + step_P)
        beta_P, best = beta_P + step_P, new
    return beta_P, np.linalg.inv(information_PP), chance_CO


def bootstrap_covariance(
    design: Design, groups: Groups, beta_P: FloatArray, resamples: int, seed: int
) -> tuple[FloatArray, int]:
    random, n_clusters, refits = stream(seed, "battles"), groups.n_clusters, []
    if resamples < 2:
        raise ValueError(f"resamples = {resamples}: a standard error needs at least 2")
    for _ in range(resamples):  # one cluster less than there are: G of G would shrink the variance by 1 - 1/G
        weight_G = random.multinomial(n_clusters - 1, np.full(n_clusters, 1 / n_clusters)).astype(float)
        count_CO = design.counts(weight_G[groups.ids_N])
        if separated(_contrasts(design.t_COP, count_CO)) is None and _told_apart(design.t_COP, count_CO):
            refits.append(maximum(design, count_CO, beta_P)[0])
    if len(refits) < max(2, resamples / 2):
        raise ValueError(
            f"the ratings exist in only {len(refits)} of {resamples} resamples: there are too few battles or clusters "
            "for a bootstrap; use the sandwich (resamples=0)"
        )
    return np.cov(np.array(refits).T), resamples - len(refits)


# ---- does the maximum exist?


def _contrasts(t_COP: FloatArray, count_CO: FloatArray) -> FloatArray:
    """t(observed outcome) - t(another outcome of the cell), for all of them."""
    rows = [
        t_COP[count_CO[:, seen] > 0, seen] - t_COP[count_CO[:, seen] > 0, other]
        for seen in range(t_COP.shape[1])
        for other in range(t_COP.shape[1])
        if seen != other
    ]
    return np.concatenate(rows)


def _told_apart(t_COP: FloatArray, count_CO: FloatArray) -> bool:
    seen_COP = t_COP[count_CO.sum(1) > 0]
    contrast_JP = (seen_COP - seen_COP[:, :1])[:, 1:].reshape(-1, t_COP.shape[2])
    return bool(np.linalg.matrix_rank(contrast_JP) == t_COP.shape[2] - 1)  # one less: only differences of θ matter


def refuse_where_infinite(names: list[str], design: Design, count_CO: FloatArray) -> None:
    half = np.linspace(1, 0, count_CO.shape[1])  # a tie is half a win
    edges = np.zeros((len(names), len(names)))
    np.add.at(edges, tuple(design.pair_C2.T), count_CO @ half)
    np.add.at(edges, tuple(design.pair_C2.T[::-1]), count_CO @ (1 - half))
    n_groups, group_K = csgraph.connected_components(sparse.csr_matrix(edges > 0), connection="strong")
    if n_groups > 1:
        groups = [", ".join(name for name, g in zip(names, group_K, strict=True) if g == k) for k in range(n_groups)]
        raise ValueError(
            f"ratings do not exist: {n_groups} groups of methods are not joined by wins in both directions "
            f"({' | '.join(groups)}). Some group never beat, or never met, the others, so a rating would be infinite: "
            "add battles between the groups, or rate each group alone"
        )
    if not _told_apart(design.t_COP, count_CO):
        raise ValueError(
            "the position term cannot be told from the ratings: let some pair of methods meet in both places, or leave "
            "out `first`"
        )
    direction_P = separated(_contrasts(design.t_COP, count_CO))
    if direction_P is not None:
        raise ValueError(
            "ratings do not exist: the position or tie term is infinite, because a place always wins, or there are no "
            'ties, or nothing else; leave out `first`, or use ties="halves"'
        )


# ---- how well it fits


def goodness_of_fit(
    design: Design,
    count_CO: FloatArray,
    chance_CO: FloatArray,
    inverse_PP: FloatArray,
    residual_GQ: sparse.csr_matrix,
    correction: float,
) -> Fit | None:
    n_cells, n_outcomes, n_parameters = design.t_COP.shape
    df = n_cells * (n_outcomes - 1) - (n_parameters - 1)
    if df == 0:
        return None  # as many parameters as pairs: any data fit
    expected_CO = count_CO.sum(1, keepdims=True) * chance_CO
    deviance = 2 * float((special.xlogy(count_CO, count_CO) - special.xlogy(count_CO, expected_CO)).sum())
    # Residuals at the maximum are e - W t H⁻¹ tᵀ e, where e are those at the truth and W is their covariance if all
    # battles were independent; the deviance is close to Σ residual²/expected, a quadratic form in them.
    mean_CP = np.einsum("co,cop->cp", chance_CO, design.t_COP)
    spread_QP = (expected_CO[..., None] * (design.t_COP - mean_CP[:, None])).reshape(-1, n_parameters)
    score_PG = (residual_GQ @ design.t_COP.reshape(-1, n_parameters)).T
    projected_QG = residual_GQ.T.toarray() - spread_QP @ (inverse_PP @ score_PG)
    whitened_QG = projected_QG / np.sqrt(expected_CO.reshape(-1, 1))
    gram = whitened_QG @ whitened_QG.T if whitened_QG.shape[0] < whitened_QG.shape[1] else whitened_QG.T @ whitened_QG
    trace, trace_of_square = correction * float(np.trace(gram)), correction**2 * float((gram**2).sum())
    if trace == 0:
        return Fit(0.0, df, 1.0)
    p = float(stats.chi2.sf(deviance * trace / trace_of_square, trace**2 / trace_of_square))
    return Fit(max(0.0, deviance), df, p)
