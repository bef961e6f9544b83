"""Win rates as if both answers were equally long: our fit with honest errors, and AlpacaEval's own number beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from .columns import columns, is_frame, names_of
from .fits import Coefficient, coefficient, fractional_logit, separated, share
from .frames import read
from .inference import satterthwaite
from .records import FloatArray, Record
from .tables import Clusters, Groups, finite, judgements, stream, table

BATCH = 2_000_000  # numbers of a resampled design held at once


@dataclass(frozen=True)
class LengthControlled(Record):
    """The win rate at equal length, with errors of the whole fit; `raw` is the win rate as judged.

    `length`: log odds gained by the *shorter* answer as tanh(dlen/sd) goes from 0 to 1; negative where longer answers
    win. `se_prompts` and `se_seeds` are the bootstrap's one-way errors.
    """

    estimate: float
    se: float
    ci: tuple[float, float]
    df: float
    level: float
    raw: float
    length: Coefficient
    difficulty: float | None
    constant: float
    se_prompts: float
    se_seeds: float | None
    n_prompts: int
    n_clusters: int
    n_seeds: int
    this_run_only: bool
    resamples: int


@dataclass(frozen=True)
class Gamed:
    """AlpacaEval's regularising rows: the baseline asked to be concise and verbose, judged against itself.

    A logistic loss uses their judgements only through two sums, over all rows, of y tanh(dlen/sd) and of y difficulty.
    """

    lengths: tuple[npt.ArrayLike, ...]
    sum_tanh: float
    sum_difficulty: float
    weight: float = 0.1


@dataclass(frozen=True)
class AlpacaEval(Record):
    """AlpacaEval's own numbers, in per cent. `se` leaves out that the weights were fitted: it is far too small."""

    estimate: float
    se: float
    win_rate: float
    standard_error: float
    discrete_win_rate: float
    length: float
    difficulty: float
    constant: float
    n_prompts: int


def length_controlled(
    y: Any,
    len_method: Any = "len_method",
    len_baseline: Any = "len_baseline",
    *,
    difficulty: Any = None,
    clusters: Clusters | str = None,
    level: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
) -> LengthControlled:
    """Win rate of a method if its answers were as long as the baseline's, with an error that includes the fit.

    logit E y_si = w_len tanh(dlen_si / sd(dlen)) + w_diff difficulty_i + w_0, dlen = len_baseline - len_method, without
    any penalty; estimate = mean_i σ(w_diff difficulty_i + w_0).

    SE² = max(2 (V*_seeds + V*_prompts) - V*_both, V*_seeds, V*_prompts): the bootstrap of `two_way_bootstrap_se`, with
    sd and weights fitted anew to every resample. The interval is Wilson's for the number of judgements with this error.

    It answers "if length alone had been different", by a regression: a method that is better *because* it says more is
    corrected downwards as well. Show `raw` beside it.

    Args:
        y: judgements in [0, 1], (N,) or (S, N); or a frame of one run with columns y and those named by the other
            arguments; or a frame with columns seed and prompt as well, as `mean` takes it.
        len_method: lengths of the method's answers, in characters or tokens, shaped as y.
        len_baseline: lengths of the baseline's answers, shaped as y or (N,).
        difficulty: (N,) log odds that prompts give to any method, from `prompt_difficulty` of the *other* methods; None
            leaves the term out.
        clusters: one label per prompt.
        level: of the interval.
        resamples: bootstrap resamples, at least 2.
        seed: random seed of the resamples.

    Raises:
        ValueError: where the weights are infinite, because length, difficulty or constant decide every judgement.

    Source:
        Dubois et al. 2024 (arXiv:2404.04475), without the penalty; fractional responses: Papke & Wooldridge 1996.

    >>> random = np.random.default_rng(0)
    >>> longer = random.normal(0, 300, 800)  # judges like length: +1 sd of it is worth about as much as the method
    >>> y = (random.random(800) < special.expit(0.4 + np.tanh(longer / 300))).astype(float)
    >>> result = length_controlled(y, 1000 + longer + 200, np.full(800, 1000), resamples=100)
    >>> result.length.estimate < 0, result.estimate < result.raw
    (True, True)
    """
    if is_frame(y) and "seed" in names_of(y):
        frame, roles = y, {"cluster": str(clusters)} if clusters is not None else {}
        groups = read(frame, names=roles).groups
        y, len_method, len_baseline, difficulty = (
            name if name is None else read(frame, names={"y": name, **roles}, argument=name).y_SN
            for name in ("y", len_method, len_baseline, difficulty)
        )
    else:
        y, len_method, len_baseline, difficulty, clusters = columns(
            y, "y", len_method=len_method, len_baseline=len_baseline, difficulty=difficulty, clusters=clusters
        )
        y = np.atleast_2d(np.asarray(y, dtype=float))
        groups = Groups.of(clusters, y.shape[1])
    y_SN = judgements("y", table("y", y))
    n_seeds, n_prompts = y_SN.shape
    dlen_SN = _like("len_baseline", len_baseline, y_SN) - _like("len_method", len_method, y_SN)
    features_SNP = np.ones((n_seeds, n_prompts, 2 if difficulty is None else 3))
    if difficulty is not None:
        features_SNP[..., 1] = _like("difficulty", difficulty, y_SN)
    if resamples < 2:
        raise ValueError(f"resamples = {resamples}: a standard error needs at least 2")

    def fit(seeds_RS: FloatArray, clusters_RG: FloatArray, start_P: FloatArray) -> tuple[FloatArray, FloatArray]:
        prompt_RN = clusters_RG[:, groups.ids_N]
        weight_RSN = seeds_RS[:, :, None] * prompt_RN[:, None]
        x_RSNP = np.repeat(features_SNP[None], len(weight_RSN), axis=0)
        x_RSNP[..., 0] = _tanh(dlen_SN, weight_RSN)
        flat = (len(weight_RSN), y_SN.size)
        beta_RP = fractional_logit(x_RSNP.reshape(*flat, -1), y_SN.ravel(), weight_RSN.reshape(flat), start_P)
        equal_RN = special.expit(beta_RP[:, 1:] @ features_SNP[0, :, 1:].T)
        first_R = equal_RN[:, 0]  # as an offset it keeps the mean of equal numbers exact
        return first_R + (prompt_RN * (equal_RN - first_R[:, None])).sum(1) / prompt_RN.sum(1), beta_RP

    one_S, one_G = np.ones((1, n_seeds)), np.ones((1, groups.n_clusters))
    features_SNP[..., 0] = _tanh(dlen_SN, np.ones((1, *y_SN.shape)))[0]
    _refuse_where_infinite(features_SNP.reshape(y_SN.size, -1), y_SN.ravel())
    value_R, beta_RP = fit(one_S, one_G, np.zeros(features_SNP.shape[-1]))
    estimate, beta_P = float(value_R[0]), beta_RP[0]
    random = stream(seed, "length control")

    def variances(seeds: bool, prompts: bool) -> FloatArray:
        """Of the win rate and of the weight of length."""
        seeds_RS = _draw(random, resamples, n_seeds) if seeds else np.repeat(one_S, resamples, 0)
        clusters_RG = _draw(random, resamples, groups.n_clusters) if prompts else np.repeat(one_G, resamples, 0)
        size = max(1, BATCH // features_SNP.size)
        batches = [fit(seeds_RS[i : i + size], clusters_RG[i : i + size], beta_P) for i in range(0, resamples, size)]
        draws_2R = np.concatenate([np.stack([value_R, beta_RP[:, 0]]) for value_R, beta_RP in batches], axis=1)
        return draws_2R.var(axis=1, ddof=1)

    v_prompts = v_2 = variances(False, True)
    v_seeds = np.zeros(2)
    if n_seeds > 1:
        v_seeds, v_both = variances(True, False), variances(True, True)
        v_2 = np.maximum(2 * (v_seeds + v_prompts) - v_both, np.maximum(v_seeds, v_prompts))
    parts = [(float(v_prompts[0]), groups.n_clusters - 1)] + [(float(v_seeds[0]), n_seeds - 1)] * (n_seeds > 1)
    df = satterthwaite(float(v_2[0]), parts)
    interval = share(estimate, math.sqrt(v_2[0]), y_SN.size, df, level)
    return LengthControlled(
        estimate=estimate, se=interval.se, ci=interval.ci, df=df, level=level, raw=float(y_SN.mean()),
        length=coefficient(beta_P[0], math.sqrt(v_2[1]), df, level, null=0.0),
        difficulty=None if difficulty is None else float(beta_P[1]), constant=float(beta_P[-1]),
        se_prompts=math.sqrt(v_prompts[0]), se_seeds=math.sqrt(v_seeds[0]) if n_seeds > 1 else None,
        n_prompts=n_prompts, n_clusters=groups.n_clusters, n_seeds=n_seeds, this_run_only=n_seeds == 1,
        resamples=resamples,
    )  # fmt: skip


def prompt_difficulty(y_MN: npt.ArrayLike, *, ridge: float = 1.0) -> FloatArray:
    """Log odds that a prompt gives to any method against the baseline, from judgements of the other methods.

    logit E y_mi = a_m + γ_i, by maximum likelihood with penalty ridge/2 (Σ γ² + Σ a²): γ shrinks to 0 where few methods
    speak. Pass the *other* methods only: with its own data in it, the term would explain the method's own luck.

    Args:
        y_MN: judgements in [0, 1] of M methods (or M methods' means over seeds) on N prompts.
        ridge: inverse variance of the prior of γ; 1 takes prompts to differ by about a factor e of odds.

    Returns:
        γ, (N,): high where methods win easily.

    Source:
        A prompt effect as in Dubois et al. 2024 (arXiv:2404.04475), who fit it once over many models.

    >>> prompt_difficulty([[1.0, 0.5, 0.0], [1.0, 0.5, 0.0]]).round(3).tolist()
    [0.675, 0.0, -0.675]
    """
    y_MN = judgements("y_MN", np.atleast_2d(finite("y_MN", y_MN)))
    n_methods = len(y_MN)
    if not ridge > 0:
        raise ValueError(f"ridge = {ridge}: must be positive, or a prompt that all methods win would be infinite")

    def loss(effect: FloatArray) -> tuple[float, FloatArray]:
        eta_MN = effect[:n_methods, None] + effect[n_methods:]
        residual_MN = special.expit(eta_MN) - y_MN
        value = (np.logaddexp(0, eta_MN) - y_MN * eta_MN).sum() + ridge / 2 * (effect**2).sum()
        return float(value), np.concatenate([residual_MN.sum(1), residual_MN.sum(0)]) + ridge * effect

    start = np.zeros(n_methods + y_MN.shape[1])
    return optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}).x[
        n_methods:
    ]


def alpaca_eval(
    y: Any,
    len_method: Any = "len_method",
    len_baseline: Any = "len_baseline",
    difficulty: Any = "difficulty",
    *,
    gamed: Gamed | None = None,
    penalty: float = 0.0,
) -> AlpacaEval:
    """The numbers that AlpacaEval 2 prints for one run of one method, for comparison with published tables.

    win_rate = 100 mean(y), standard_error = 100 sd(y)/√n. The length-controlled win rate minimises
    penalty Σ|w| + Σ loss_i(w) + weight Σ_g loss_g(w) over the weights of tanh(dlen/sd), difficulty and constant, where
    the gamed rows g have no constant; estimate = 100 mean_i σ(w_diff difficulty_i + w_0), se = 100 sd_i(σ)/√n.

    Args:
        y: judgements, (N,); or a frame with the columns named.
        len_method: characters of the method's answers.
        len_baseline: characters of the baseline's answers.
        difficulty: AlpacaEval's instruction difficulties.
        gamed: the regularising rows; None leaves them out.
        penalty: 1/C of the L1 penalty. AlpacaEval chooses C anew for every model by cross-validation, often 2.78 or
            21.5; 0 for none.

    Source:
        Dubois et al. 2024 (arXiv:2404.04475); the code of alpaca_eval.

    >>> result = alpaca_eval([1.0, 0.0, 0.7, 0.4], [900, 100, 800, 300], [500] * 4, [0.5, -0.5, 0.0, 0.1], penalty=0.1)
    >>> round(result.win_rate, 2), round(result.standard_error, 2)
    (52.5, 21.36)
    """
    y, len_method, len_baseline, difficulty = columns(
        y, "y", len_method=len_method, len_baseline=len_baseline, difficulty=difficulty
    )
    y_SN = judgements("y", table("y", np.atleast_2d(np.asarray(y, dtype=float))))
    if len(y_SN) > 1:
        raise ValueError(f"AlpacaEval judges one run, y has {len(y_SN)}: pass one row, or use `length_controlled`")
    y_N, n = y_SN[0], y_SN.shape[1]
    baseline_N, difficulty_N = _like("len_baseline", len_baseline, y_SN)[0], _like("difficulty", difficulty, y_SN)[0]

    def tanh_N(length: npt.ArrayLike, name: str) -> FloatArray:
        return _tanh(baseline_N[None] - _like(name, length, y_SN), np.ones((1, 1, n)))[0, 0]

    x_NP = np.stack([tanh_N(len_method, "len_method"), difficulty_N, np.ones(n)], axis=1)
    gamed = gamed or Gamed((), 0.0, 0.0)
    weight, sums_P = gamed.weight, np.array([gamed.sum_tanh, gamed.sum_difficulty, 0.0])
    rows = [np.stack([tanh_N(length, "gamed"), difficulty_N, np.zeros(n)], axis=1) for length in gamed.lengths]
    all_MP = np.concatenate([x_NP, *rows])
    weight_M = np.repeat([1.0, weight], [n, len(all_MP) - n])
    if penalty == 0:
        _refuse_where_infinite(x_NP, y_N)

    def loss(
        halves_2P: FloatArray,
    ) -> tuple[float, FloatArray]:  # w = positive - negative part: |w| is linear
        w_P = halves_2P[:3] - halves_2P[3:]
        eta_M = all_MP @ w_P
        pull_P = y_N @ x_NP + weight * sums_P
        slope_P = (weight_M * special.expit(eta_M)) @ all_MP - pull_P
        value = weight_M @ np.logaddexp(0, eta_M) - pull_P @ w_P + penalty * halves_2P.sum()
        return float(value), np.concatenate([slope_P, -slope_P]) + penalty

    fit = optimize.minimize(
        loss, np.zeros(6), jac=True, method="L-BFGS-B", bounds=[(0, None)] * 6,
        options={"ftol": 1e-16, "gtol": 1e-9, "maxiter": 10_000, "maxfun": 100_000},
    )  # fmt: skip
    w_P = fit.x[:3] - fit.x[3:]
    equal_N = special.expit(x_NP[:, 1:] @ w_P[1:])
    return AlpacaEval(
        estimate=100 * float(equal_N.mean()), se=100 * float(equal_N.std(ddof=1)) / math.sqrt(n),
        win_rate=100 * float(y_N.mean()), standard_error=100 * float(y_N.std(ddof=1)) / math.sqrt(n),
        discrete_win_rate=100 * float(np.where(y_N == 0.5, 0.5, y_N > 0.5).mean()),
        length=float(w_P[0]), difficulty=float(w_P[1]), constant=float(w_P[2]), n_prompts=n,
    )  # fmt: skip


def _like(name: str, values: npt.ArrayLike, y_SN: FloatArray) -> FloatArray:
    values = finite(name, values)
    if values.shape not in (y_SN.shape, y_SN.shape[1:]):
        raise ValueError(f"{name} has shape {values.shape}, judgements have {y_SN.shape}: give one value per judgement")
    return np.broadcast_to(values, y_SN.shape)


def _tanh(dlen_SN: FloatArray, weight_RSN: FloatArray) -> FloatArray:
    """tanh(dlen / sd), with the standard deviation of each weighted resample; 0 where all are of one length."""
    total_R = weight_RSN.sum((1, 2))
    mean_R = (weight_RSN * dlen_SN).sum((1, 2)) / total_R
    variance_R = (weight_RSN * (dlen_SN - mean_R[:, None, None]) ** 2).sum((1, 2)) / np.maximum(1, total_R - 1)
    sd_R = np.sqrt(variance_R)[:, None, None]
    return np.tanh(np.divide(dlen_SN, sd_R, out=np.zeros_like(weight_RSN), where=sd_R > 0))


def _draw(random: np.random.Generator, resamples: int, n_units: int) -> FloatArray:
    """Weights of resampled units; one less is drawn than there are, or the variance would shrink by 1 - 1/n."""
    drawn = random.multinomial(n_units - 1, np.full(n_units, 1 / n_units), size=resamples)
    return np.asarray(drawn * (n_units / (n_units - 1)), dtype=np.float64)


def _refuse_where_infinite(x_MP: FloatArray, y_M: FloatArray) -> None:
    if separated(np.concatenate([x_MP[y_M > 0], -x_MP[y_M < 1]])) is not None:
        raise ValueError(
            "the length-controlled fit is infinite: length, difficulty or the constant decides every judgement (all "
            "won, all lost, or the longer one always won); read the raw win rate and its Wilson interval instead"
        )
