"""What the functions return: frozen records that turn into plain JSON."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Verdict = Literal["better", "worse", "equivalent", "undecided"]


@dataclass(frozen=True)
class Record:
    """What the functions return: `estimate`, `se`, `ci`, `df` and `p` where they apply, and the sizes of the data."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON can hold: arrays and tuples become lists, an infinite t becomes None."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Estimate(Record):
    """A mean with its error. `se_prompts**2 + se_seeds**2 == se**2`; `se_seeds` is None where one seed cannot tell."""

    estimate: float
    se: float
    df: float
    ci: tuple[float, float]
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
class Difference(Record):
    """The mean of A minus the mean of B with its error; `this_run_only` where A or B is a single training run."""

    estimate: float
    mean_a: float
    mean_b: float
    se: float
    df: float
    ci: tuple[float, float]
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
class LowerBounds(Record):
    """Lower bounds that hold for a whole family at once; `exceeds_K`: which members are proven above the null."""

    low_K: FloatArray
    exceeds_K: npt.NDArray[np.bool_]
    null: float
    level: float


@dataclass(frozen=True)
class PermutationTest(Record):
    """A two-sided permutation p-value; what was permuted, how often, and whether these are all the relabellings."""

    estimate: float
    p: float
    unit: Literal["prompts", "seeds"]
    relabellings: int
    exact: bool


@dataclass(frozen=True)
class McNemar(Record):
    """Prompts that only A solved, prompts that only B solved, and the exact two-sided p-value."""

    only_a: int
    only_b: int
    n_prompts: int
    p: float


@dataclass(frozen=True)
class Proportion(Record):
    """A share of successes with its interval."""

    estimate: float
    ci: tuple[float, float]
    level: float
    n: int
