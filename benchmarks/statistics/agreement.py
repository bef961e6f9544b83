"""How far raters agree, and how good a judge is: accuracy, kappa, alpha, position and length bias, flips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .columns import columns, is_frame, names_of
from .fits import Coefficient, coefficient, fractional_logit, jackknife, separated, share
from .records import FloatArray, Record
from .tables import Clusters, Groups, finite

MOST_CATEGORIES = 50  # tables of categories × categories are kept for every item
Scale = Literal["nominal", "ordinal", "interval"]


@dataclass(frozen=True)
class Agreement(Record):
    """Agreement of raters. A coefficient is None where all labels, with or without one cluster, are the same.

    `accuracy` is the share of pairs of labels of one item that are equal; `cohen` is by pair of raters.
    """

    accuracy: Coefficient
    cohen: dict[str, Coefficient | None]
    fleiss: Coefficient | None
    alpha: Coefficient | None
    scale: str
    categories: tuple[Any, ...]
    n_items: int
    n_clusters: int
    n_raters: int
    n_labels: int


@dataclass(frozen=True)
class JudgeQuality(Record):
    """A judge against the truth. A coefficient is None where the data cannot tell: one order only, no lengths, ..."""

    accuracy: Coefficient
    kappa: Coefficient | None
    alpha: Coefficient | None
    position_bias: Coefficient | None
    flip_rate: Coefficient | None
    length_bias: Coefficient | None
    length_slope: Coefficient | None
    unparsed: float
    ties: float
    n: int
    n_clusters: int


def agreement(
    labels: Any,
    *,
    scale: Scale = "nominal",
    clusters: Clusters | str = None,
    raters: Sequence[str] | None = None,
    level: float = 0.95,
) -> Agreement:
    """Agreement of two or more raters: observed, and corrected for chance by Cohen, Fleiss and Krippendorff.

    All are 1 - D_observed/D_chance for the disagreement δ(c, k): 0 if equal, else 1 (nominal), the distance of ranks
    (ordinal; alpha: (Σ_{g=c..k} n_g - (n_c + n_k)/2)²), or (c - k)² (interval). They differ in D_chance: Cohen gives
    each rater his own shares of categories, Fleiss and alpha pool them, and alpha draws without replacement.
    Fleiss' kappa is nominal always.

    Errors by the jackknife over clusters of items, intervals by t(G-1), not above 1; Wilson's for accuracy.

    Args:
        labels: (N, R), one column per rater, NaN or None where he gave none; or a frame of such columns.
        scale: of the categories; ordinal and interval need numbers.
        clusters: one label per item; or the column's name.
        raters: names of the columns; with a frame, which columns to use (default: all but clusters).
        level: of the intervals.

    Source:
        Cohen 1960, 1968 (weighted: linear for ordinal, quadratic for interval); Fleiss 1971; Krippendorff 2011.

    >>> result = agreement([[1, 1], [1, 1], [2, 2], [1, 2], [2, 2]], raters=["judge", "human"])
    >>> result.accuracy.estimate, round(result.cohen["judge-human"].estimate, 3), round(result.alpha.estimate, 3)
    (0.8, 0.615, 0.64)
    """
    if scale not in ("nominal", "ordinal", "interval"):
        raise ValueError(f'scale = {scale!r}: expected "nominal", "ordinal" or "interval"')
    names, categories, code_NR, groups = _labels(labels, raters, clusters)
    if scale != "nominal" and not all(isinstance(c, int | float) for c in categories):
        raise ValueError(f'scale = "{scale}" needs numbers, labels are {", ".join(map(repr, categories[:5]))}')
    n_categories, pairs = len(categories), list(combinations(range(len(names)), 2))
    if n_categories > MOST_CATEGORIES:
        raise ValueError(
            f"{n_categories} different labels: kappa and alpha are for at most {MOST_CATEGORIES} categories; round the "
            "scores to a scale, or correlate them"
        )
    one_hot_NRC = (code_NR[..., None] == np.arange(n_categories)).astype(float)
    count_NC = one_hot_NRC.sum(1)
    n_N = count_NC.sum(1)
    pairable_N = n_N > 1
    if not pairable_N.any():
        raise ValueError("no item has labels of two raters: agreement needs at least one, better hundreds")
    tables_NPCC = np.stack([one_hot_NRC[:, r, :, None] * one_hot_NRC[:, s, None] for r, s in pairs], axis=1)
    same_NCC = count_NC[:, :, None] * (count_NC[:, None] - np.eye(n_categories))  # ordered pairs of labels of one item
    coincidence_NCC = same_NCC / np.maximum(1, n_N - 1)[:, None, None]
    matched_N = np.trace(same_NCC, axis1=1, axis2=2)
    per_item = [
        tables_NPCC, coincidence_NCC, np.where(pairable_N[:, None], count_NC, 0), pairable_N,
        matched_N / np.maximum(1, n_N * (n_N - 1)), matched_N, n_N * (n_N - 1),
    ]  # fmt: skip
    widths = np.cumsum([values[0].size for values in per_item])[:-1]
    flat_NF = np.concatenate([np.reshape(values, (len(n_N), -1)) for values in per_item], axis=1)
    sums_GF = np.stack([np.bincount(groups.ids_N, weights=column_N) for column_N in flat_NF.T], axis=1)
    value_C = np.array(categories, dtype=float) if scale == "interval" else np.arange(n_categories, dtype=float)
    distance_CC = np.abs(value_C[:, None] - value_C)
    apart_CC = {"nominal": distance_CC > 0, "ordinal": distance_CC, "interval": distance_CC**2}[scale]

    def statistic(sums_RF: FloatArray) -> FloatArray:
        tables, coincidence, count_RC, items, shares, matched, comparisons = np.split(sums_RF, widths, axis=1)
        shape = (len(sums_RF), -1, n_categories, n_categories)
        tables_RPCC, coincidence_RCC = tables.reshape(shape), coincidence.reshape(shape)[:, 0]
        margins_RPCC = tables_RPCC.sum(3)[..., None] * tables_RPCC.sum(2)[..., None, :]
        n_R11 = np.maximum(1, tables_RPCC.sum((2, 3)))[..., None, None]
        cohen_RP = _ratio((tables_RPCC * apart_CC).sum((2, 3)), (margins_RPCC / n_R11 * apart_CC).sum((2, 3)))
        pooled_RC = count_RC / np.maximum(1, count_RC.sum(1, keepdims=True))
        fleiss_R1 = _ratio(1 - shares / np.maximum(1, items), 1 - (pooled_RC**2).sum(1, keepdims=True))
        total_RC = coincidence_RCC.sum(2)
        chance_RCC = total_RC[:, :, None] * total_RC[:, None] / (total_RC.sum(1) - 1)[:, None, None]
        delta_RCC = _ordinal(total_RC) if scale == "ordinal" else apart_CC
        alpha_R = _ratio((coincidence_RCC * delta_RCC).sum((1, 2)), (chance_RCC * delta_RCC).sum((1, 2)))
        return np.concatenate([matched / np.maximum(1, comparisons), cohen_RP, fleiss_R1, alpha_R[:, None]], axis=1)

    value_K, covariance_KK = jackknife(statistic, sums_GF.astype(np.float64))
    df = groups.n_clusters - 1

    def chance_corrected(k: int) -> Coefficient | None:
        if not math.isfinite(value_K[k]) or not math.isfinite(covariance_KK[k, k]):
            return None
        found = coefficient(value_K[k], math.sqrt(covariance_KK[k, k]), df, level)
        return Coefficient(found.estimate, found.se, (found.ci[0], min(1.0, found.ci[1])), df, level)

    return Agreement(
        accuracy=share(float(value_K[0]), math.sqrt(covariance_KK[0, 0]), int(pairable_N.sum()), df, level),
        cohen={f"{names[r]}-{names[s]}": chance_corrected(1 + p) for p, (r, s) in enumerate(pairs)},
        fleiss=chance_corrected(-2), alpha=chance_corrected(-1), scale=scale, categories=categories,
        n_items=len(n_N), n_clusters=groups.n_clusters, n_raters=len(names), n_labels=int(n_N.sum()),
    )  # fmt: skip


def judge_quality(
    forward: Any,
    truth: Any = "truth",
    *,
    backward: Any = None,
    len_a: Any = None,
    len_b: Any = None,
    clusters: Clusters | str = None,
    level: float = 0.95,
) -> JudgeQuality:
    """A pairwise judge against gold or human labels: accuracy, kappa, alpha, its biases, and how often it flips.

    y = (forward + backward)/2, an unparsed verdict being 0.5; its class is a (y > 0.5), tie, or b.
    accuracy = mean(1 - |class - truth|) with classes 1, 0.5, 0: a tie on one side is half right. kappa and alpha are
    `agreement` of the three classes.
    position_bias = mean((forward + 1 - backward)/2) - 0.5, the mean verdict for the first place, less one half.
    flip_rate: share of the items parsed in both orders whose class differs between them.
    length_bias = mean over answers of unequal length of (y - truth) for the longer one.
    length_slope: β of logit E y = β tanh((len_a - len_b)/sd) + c (2 truth - 1), the truth held fixed.

    Errors are clustered; the tests are of no bias. None where an input is not given, or a fit is infinite.

    Args:
        forward: (N,) P(a is better) with a shown first, NaN unparsed; or a frame with a column of this name.
        truth: (N,) 1 = a is better, 0.5 = tie, 0 = b is better; or the column's name.
        backward: the same verdict, *for a*, with a shown second.
        len_a: lengths of the answers a.
        len_b: of the answers b.
        clusters: one label per item.
        level: of the intervals.

    Source:
        Zheng et al. 2023 (arXiv:2306.05685) for both orders; Dubois et al. 2024 (arXiv:2404.04475) for tanh.

    >>> verdicts = [1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    >>> result = judge_quality(verdicts, [1, 1, 0, 0, 0, 1], backward=[1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    >>> round(result.accuracy.estimate, 3), round(result.position_bias.estimate, 3), round(result.flip_rate.estimate, 3)
    (0.833, 0.167, 0.333)
    """
    forward, truth, backward, len_a, len_b, clusters = columns(
        forward, "forward", truth=truth, backward=backward, len_a=len_a, len_b=len_b, clusters=clusters
    )
    truth_N = finite("truth", truth)
    if truth_N.ndim != 1 or not np.isin(truth_N, (0, 0.5, 1)).all():
        raise ValueError("truth must be 1 (a is better), 0.5 (tie) or 0 (b is better) for each item")
    orders = {"forward": forward} if backward is None else {"forward": forward, "backward": backward}
    orders_ON = np.stack([_verdicts(name, verdicts, len(truth_N)) for name, verdicts in orders.items()])
    groups = Groups.of(clusters, len(truth_N))
    df = groups.n_clusters - 1
    parsed_ON = ~np.isnan(orders_ON)
    scored_ON = np.where(parsed_ON, orders_ON, 0.5)
    y_N = scored_ON.mean(0)
    class_N = _classes(y_N)
    labels = agreement(np.stack([class_N, truth_N], axis=1), clusters=clusters, level=level)
    right_N = 1 - np.abs(class_N - truth_N)
    position = flips = None
    if len(orders_ON) == 2:
        position = _mean(scored_ON[0] / 2 + (1 - scored_ON[1]) / 2 - 0.5, np.ones_like(y_N), groups, level, null=0.0)
        both_N = parsed_ON.all(0).astype(float)
        if both_N.any():
            flip_N = (_classes(scored_ON[0]) != _classes(scored_ON[1])).astype(float)
            found = _mean(flip_N, both_N, groups, level)
            flips = share(found.estimate, found.se, int(both_N.sum()), df, level)
    bias = slope = None
    if len_a is not None and len_b is not None:
        longer_N = np.sign(finite("len_a", len_a) - finite("len_b", len_b))
        if longer_N.any():
            bias = _mean(longer_N * (y_N - truth_N), np.abs(longer_N), groups, level, null=0.0)
            dlen_N = np.asarray(len_a, dtype=float) - np.asarray(len_b, dtype=float)
            x_NP = np.stack([np.tanh(dlen_N / dlen_N.std(ddof=1)), 2 * truth_N - 1], axis=1)
            slope = _slope(x_NP, y_N, groups, level)
    accuracy = _mean(right_N, np.ones_like(y_N), groups, level)
    return JudgeQuality(
        accuracy=share(accuracy.estimate, accuracy.se, len(y_N), df, level),
        kappa=next(iter(labels.cohen.values())), alpha=labels.alpha,
        position_bias=position, flip_rate=flips, length_bias=bias, length_slope=slope,
        unparsed=float(1 - parsed_ON.mean()), ties=float((class_N == 0.5).mean()),
        n=len(y_N), n_clusters=groups.n_clusters,
    )  # fmt: skip


def _labels(
    labels: Any, raters: Sequence[str] | None, clusters: Any
) -> tuple[list[str], tuple[Any, ...], npt.NDArray[np.intp], Groups]:
    """Raters, sorted categories, the category's number of each label (-1: missing), clusters."""
    if is_frame(labels):
        raters = list(raters) if raters is not None else [name for name in names_of(labels) if name != clusters]
        *given, clusters = columns(labels, raters[0], **{name: name for name in raters[1:]}, clusters=clusters)
        labels = np.stack([np.asarray(column, dtype=object) for column in given], axis=1)
    table = np.asarray(labels, dtype=object)
    if table.ndim != 2 or table.shape[1] < 2 or not len(table):
        raise ValueError(f"labels have shape {table.shape}, expected (items, raters) with at least two raters")
    names = list(raters) if raters is not None else [str(r + 1) for r in range(table.shape[1])]
    if len(names) != table.shape[1]:
        raise ValueError(f"{len(names)} names for {table.shape[1]} raters")
    plain = [[value.item() if isinstance(value, np.generic) else value for value in row] for row in table]
    missing = [[value is None or value != value for value in row] for row in plain]
    seen = {
        value for row, gone in zip(plain, missing, strict=True) for value, no in zip(row, gone, strict=True) if not no
    }
    try:
        categories = tuple(sorted(seen))
    except TypeError:
        raise ValueError("labels mix numbers and words: use one kind") from None
    number = {value: k for k, value in enumerate(categories)}
    code_NR = [
        [-1 if no else number[v] for v, no in zip(*both, strict=True)] for both in zip(plain, missing, strict=True)
    ]
    return names, categories, np.array(code_NR, dtype=np.intp), Groups.of(clusters, len(table))


def _ratio(observed: FloatArray, chance: FloatArray) -> FloatArray:
    """1 - observed/chance, NaN where nothing could disagree."""
    return 1 - np.divide(observed, chance, out=np.full_like(observed, np.nan), where=chance > 0)


def _ordinal(total_RC: FloatArray) -> FloatArray:
    """Krippendorff's ordinal metric: how many labels lie between two categories, with half of their own, squared."""
    middle_RC = np.cumsum(total_RC, axis=1) - total_RC / 2
    return (middle_RC[:, :, None] - middle_RC[:, None]) ** 2


def _verdicts(name: str, values: npt.ArrayLike, n: int) -> FloatArray:
    values = np.asarray(values, dtype=float)
    if values.shape != (n,) or (values < 0).any() or (values > 1).any():
        raise ValueError(f"{name} must be {n} verdicts in [0, 1], NaN where unparsed; its shape is {values.shape}")
    return values


def _classes(y_N: FloatArray) -> FloatArray:
    return 0.5 + np.sign(y_N - 0.5) / 2


def _mean(
    value_N: FloatArray, weight_N: FloatArray, groups: Groups, level: float, null: float | None = None
) -> Coefficient:
    """Weighted mean with its clustered error."""
    estimate = float((weight_N * value_N).sum() / weight_N.sum())
    score_G = np.bincount(groups.ids_N, weights=weight_N * (value_N - estimate))
    variance = groups.n_clusters / (groups.n_clusters - 1) * float((score_G**2).sum()) / weight_N.sum() ** 2
    return coefficient(estimate, math.sqrt(variance), groups.n_clusters - 1, level, null)


def _slope(x_NP: FloatArray, y_N: FloatArray, groups: Groups, level: float) -> Coefficient | None:
    """First weight of a fractional logistic fit with the clustered sandwich; None where it is infinite."""
    informative_P = x_NP.std(0) > 0
    if not informative_P[0] or separated(np.concatenate([x_NP[y_N > 0], -x_NP[y_N < 1]])) is not None:
        return None
    x_NP = x_NP[:, np.abs(x_NP).any(0)]
    beta_P = fractional_logit(x_NP[None], y_N, np.ones((1, len(y_N))), np.zeros(x_NP.shape[1]))[0]
    chance_N = 1 / (1 + np.exp(-x_NP @ beta_P))
    inverse_PP = np.linalg.inv(x_NP.T @ (x_NP * (chance_N * (1 - chance_N))[:, None]))
    score_GP = np.stack([np.bincount(groups.ids_N, weights=(y_N - chance_N) * x_N) for x_N in x_NP.T], axis=1)
    covariance_PP = inverse_PP @ score_GP.T @ score_GP @ inverse_PP * groups.n_clusters / (groups.n_clusters - 1)
    return coefficient(beta_P[0], math.sqrt(covariance_PP[0, 0]), groups.n_clusters - 1, level, null=0.0)
