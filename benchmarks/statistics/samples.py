"""Several samples per prompt: unbiased estimators."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .crossed import mean
from .records import BestOfNKL, FloatArray, SampleEstimate
from .tables import Clusters, finite


def pass_at_k(
    n: npt.ArrayLike, c: npt.ArrayLike, k: int, *, clusters: Clusters = None, level: float = 0.95
) -> SampleEstimate:
    """Probability that k fresh samples contain a correct one, unbiased, from c correct among n samples.

    1 - C(n - c, k) / C(n, k) = 1 - Π_{j < k} (n - c - j)/(n - j). Unlike 1 - (1 - c/n)^k it has no bias.

    Args:
        n: samples, a number or an array over prompts.
        c: correct samples, likewise.
        k: at most the smallest n.
        clusters: one label per prompt, as in `mean`.
        level: of the two-sided interval.

    Returns:
        The mean over prompts with its error over prompts (one run); `values_N` is a row of `y_SN` for `mean`.

    Source:
        Chen et al. 2021 (arXiv:2107.03374).

    >>> pass_at_k(4, 2, 2).estimate, pass_at_k(4, [0, 1, 4], 1).values_N.tolist()
    (0.8333333333333334, [0.0, 0.25, 1.0])
    """
    n, c = np.broadcast_arrays(finite("n", n), finite("c", c))
    if not 1 <= k <= n.min():
        raise ValueError(f"k = {k}, smallest n = {n.min():g}: k must be between 1 and n (more samples are needed)")
    if (c < 0).any() or (c > n).any():
        raise ValueError("c, the correct samples, must be between 0 and n")
    miss = np.ones(n.shape)
    for j in range(k):
        miss = miss * np.maximum(0, n - c - j) / (n - j)
    return _over_prompts(1 - miss, clusters, level)


def best_of_n(
    proxy: npt.ArrayLike, gold: npt.ArrayLike, n: int, *, clusters: Clusters = None, level: float = 0.95
) -> SampleEstimate:
    """Expected gold reward of the sample that the proxy likes best among n, unbiased, from N >= n samples.

    C(N, n)^-1 Σ_{i=n..N} C(i-1, n-1) gold_(i), with gold sorted by proxy: the mean over all subsets of size n. Samples
    that the proxy cannot tell apart share their mean gold, which is a tie broken by chance. Give gold twice for the
    largest reward itself.

    Args:
        proxy: (N,) for one prompt, or (prompts, N).
        gold: of the same samples.
        n: samples to choose from, at most N.
        clusters: one label per prompt, as in `mean`.
        level: of the two-sided interval.

    Returns:
        The mean over prompts with its error over prompts (one run); `values_N` is a row of `y_SN` for `mean`.

    Source:
        Nakano et al. 2021 (arXiv:2112.09332), used by Gao, Schulman & Hilton 2022 (arXiv:2210.10760).

    >>> round(best_of_n(proxy=[0.1, 0.9, 0.5], gold=[1.0, 2.0, 6.0], n=2).estimate, 4)  # (2 + 6 + 2) / 3
    3.3333
    """
    proxy, gold = finite("proxy", proxy), finite("gold", gold)
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

    pairs = zip(np.atleast_2d(proxy), np.atleast_2d(gold), strict=True)
    return _over_prompts(np.array([one_prompt(proxy_N, gold_N) for proxy_N, gold_N in pairs]), clusters, level)


def kl_best_of_n(n: int) -> BestOfNKL:
    """KL divergence of best-of-n from the policy it samples, in nats per completion: log n - (n - 1)/n.

    Exact for a continuous score; an upper bound where scores tie.

    Args:
        n: number of samples.

    Source:
        Stiennon et al. 2020 (arXiv:2009.01325); the bound: Beirami et al. 2024 (arXiv:2401.01879).

    >>> kl_best_of_n(1).estimate, round(kl_best_of_n(16).estimate, 4)
    (0.0, 1.8351)
    """
    if n < 1:
        raise ValueError(f"n = {n:g}: best-of-n needs at least one sample")
    return BestOfNKL(math.log(n) - (n - 1) / n, n)


def _over_prompts(values: FloatArray, clusters: Clusters, level: float) -> SampleEstimate:
    values_N = np.atleast_1d(values)
    if len(values_N) == 1:
        return SampleEstimate(float(values_N[0]), None, None, None, level, values_N, 1, 1)
    over = mean(values_N, clusters=clusters, level=level)
    return SampleEstimate(over.estimate, over.se, over.ci, over.df, level, values_N, over.n_prompts, over.n_clusters)
