"""What the functions take: tables of seeds and prompts, clusters of prompts, and the checks of both."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .records import FloatArray

Clusters = Sequence[Hashable] | npt.NDArray[Any] | None


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
    a, b = finite("a", a), finite("b", b)
    if a.shape != b.shape:
        raise ValueError(f"a has shape {a.shape} and b has shape {b.shape}: they must score the same answers")
    return (a > b) + 0.5 * (a == b)


@dataclass(frozen=True)
class Groups:
    """Prompts by cluster: `ids_N` are cluster numbers 0 ... G-1, `sizes_G` their prompts."""

    ids_N: npt.NDArray[np.intp]
    sizes_G: npt.NDArray[np.intp]

    @classmethod
    def of(cls, clusters: Clusters, n_prompts: int) -> Groups:
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


def stream(seed: int, purpose: str) -> np.random.Generator:
    """A stream of its own: data simulated from `default_rng(seed)` must not be resampled by the same random bits."""
    return np.random.default_rng([seed, *purpose.encode()])


def mean_of(y: FloatArray) -> float:
    first = y.flat[0]  # as an offset it keeps the mean of equal numbers exact, so that their error is exactly 0
    return float(first + (y - first).mean())


def over_seeds(y_SN: FloatArray) -> FloatArray:
    """Mean over seeds, (S, N) -> (N,), exact where the seeds agree."""
    return y_SN[0] + (y_SN - y_SN[0]).mean(0)


def centred(y: FloatArray) -> FloatArray:
    return y - mean_of(y)


def table(name: str, y_SN: npt.ArrayLike) -> FloatArray:
    y_SN = np.asarray(y_SN, dtype=np.float64)
    if y_SN.ndim != 2 or y_SN.size == 0:
        raise ValueError(f"{name} has shape {y_SN.shape}, expected (seeds, prompts) or (prompts,)")
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


def contrast(a_SN: FloatArray, b_SN: FloatArray, paired_seeds: bool) -> FloatArray:
    """a - b by seed where seeds are shared (S, N), else of the means over seeds (1, N)."""
    return a_SN - b_SN if paired_seeds else (over_seeds(a_SN) - over_seeds(b_SN))[None]


def finite(name: str, values: npt.ArrayLike) -> FloatArray:
    values = np.asarray(values, dtype=np.float64)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise ValueError(f"{name}: entry {tuple(bad[0].tolist())} is not a finite number ({len(bad)} such in all)")
    return values


def binary(name: str, values: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    values = finite(name, values)
    if values.ndim != 1 or not np.isin(values, (0, 1)).all():
        raise ValueError(f"{name} must be one 0 or 1 per prompt; for graded outcomes use `difference`")
    return values.astype(bool)


def judgements(name: str, y_SN: FloatArray) -> FloatArray:
    bad = np.argwhere((y_SN < 0) | (y_SN > 1))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"{name}: seed row {row}, prompt {column} is {y_SN[row, column]:g}, a judgement lies in [0, 1] "
            f"({len(bad)} outside in all); turn scores into judgements with `win`, or use `mean`"
        )
    return y_SN


def p_values_of(p_values: npt.ArrayLike) -> FloatArray:
    p_K = finite("p_values", p_values)
    if p_K.ndim != 1 or (p_K < 0).any() or (p_K > 1).any():
        raise ValueError("p_values must be a list of numbers between 0 and 1")
    return p_K


def probability(name: str, value: float) -> float:
    if not 0 < value < 1:
        raise ValueError(f"{name} = {value} must be between 0 and 1 (0.95 for 95 %)")
    return value


def tail(level: float) -> float:
    return (1 - probability("level", level)) / 2
