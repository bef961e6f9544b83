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
    if isinstance(value, dict):  # a record within a record
        return {key: _plain(item) for key, item in value.items()}
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
    n_unparsed: int
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
    n_unparsed: int
    paired_seeds: bool
    this_run_only: bool
    smallest_detectable: float
    bootstrap_se: float | None
    bootstrap_disagrees: bool | None


@dataclass(frozen=True)
class Sensitivity(Record):
    """Win rates with the unparsed judgements scored 0.5, 0 and 1."""

    half: Estimate
    worst: Estimate
    best: Estimate
    n_unparsed: int


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
    """Share solved by A minus share solved by B, the prompts that one alone solved, and the exact two-sided p-value."""

    estimate: float
    only_a: int
    only_b: int
    n_prompts: int
    p: float


@dataclass(frozen=True)
class SignTest(Record):
    """Share of decided prompts that speak for A, with Wilson's interval; p of the exact binomial test against 1/2."""

    estimate: float
    ci: tuple[float, float]
    level: float
    p: float
    plus: int
    minus: int
    ties: int


@dataclass(frozen=True)
class Wilcoxon(Record):
    """Signed-rank test: rank sums for A and for B; the share of rank for A; two-sided p."""

    estimate: float
    p: float
    rank_a: float
    rank_b: float
    ties: int
    n_prompts: int


@dataclass(frozen=True)
class CochranQ(Record):
    """Whether K methods solve the same share of prompts: Q, chi-squared with K - 1 degrees of freedom."""

    methods: tuple[str, ...]
    shares: tuple[float, ...]
    q: float
    df: int
    p: float
    n_prompts: int
    n_discordant: int


@dataclass(frozen=True)
class Equivalence(Record):
    """Two one-sided tests: `equivalent` where the 1 - 2α interval `ci` lies inside ±margin, that is where p < α."""

    estimate: float
    se: float
    df: float
    ci: tuple[float, float]
    level: float
    p: float
    margin: float
    alpha: float
    equivalent: bool


@dataclass(frozen=True)
class MaxT(Record):
    """Differences of pairs, p-values adjusted over the family, and intervals that hold all at once."""

    pairs: tuple[tuple[str, str], ...]
    differences: tuple[Difference, ...]
    p_adjusted: tuple[float, ...]
    ci: tuple[tuple[float, float], ...]
    level: float
    critical_p: float
    resamples: int


@dataclass(frozen=True)
class SampleEstimate(Record):
    """Mean over prompts of an unbiased estimate from several samples; without an error where there is one prompt."""

    estimate: float
    se: float | None
    ci: tuple[float, float] | None
    df: float | None
    level: float
    values_N: FloatArray
    n_prompts: int
    n_clusters: int


@dataclass(frozen=True)
class BestOfNKL(Record):
    """KL divergence of best-of-n from the policy that it samples, exact, or an upper bound with tied scores."""

    estimate: float
    n: int


@dataclass(frozen=True)
class Noise(Record):
    """Standard deviations of a comparison, as shares (0.02: two points of win rate).

    `seed_sd`: of a method's mean over training seeds; `interaction_sd`: of the true difference of two methods over
    prompts; `residual_sd`: of one run's value for one prompt, given both. The last two defaults give the difference of
    two single runs a standard deviation of 0.5 per prompt, a cautious guess: published pairs of good models show 0.4.
    """

    seed_sd: float = 0.02
    interaction_sd: float = 0.3
    residual_sd: float = math.sqrt(0.08)


@dataclass(frozen=True)
class Power(Record):
    """Probability (`estimate`) that a planned study finds the difference `delta`, and what it finds with `wanted`."""

    estimate: float
    delta: float
    n_prompts: int
    n_seeds: int
    se: float
    df: float
    smallest_detectable: float
    wanted: float
    level: float
    noise: Noise


@dataclass(frozen=True)
class Plan(Record):
    """Smallest detectable differences, prompts × seeds, and what finding `delta` needs; None: out of reach."""

    delta: float
    noise: Noise
    power: float
    level: float
    prompts: tuple[int, ...]
    seeds: tuple[int, ...]
    smallest_detectable: tuple[tuple[float, ...], ...]
    seeds_needed: tuple[int | None, ...]
    prompts_needed: tuple[int | None, ...]
    most_seeds: int

    def to_text(self) -> str:
        """The table in points, one line per number of prompts."""
        head = (
            f"Smallest detectable difference, points (power {100 * self.power:g} %, two-sided "
            f"{100 * (1 - self.level):.3g} %; SD over seeds {100 * self.noise.seed_sd:.1f} points):"
        )
        titles = " prompts" + "".join(f"  {n} seeds" for n in self.seeds) + f"   seeds for {100 * self.delta:.1f}"
        lines = [head, titles]
        for n_prompts, found, needed in zip(self.prompts, self.smallest_detectable, self.seeds_needed, strict=True):
            cells = (f"{100 * x:{len(f'  {n} seeds')}.1f}" for n, x in zip(self.seeds, found, strict=True))
            last = f"> {self.most_seeds}" if needed is None else str(needed)
            lines.append(f"{n_prompts:8d}" + "".join(cells) + f"{last:>{len(f'   seeds for {100 * self.delta:.1f}')}}")
        needs = (
            f"{n} seeds: {'out of reach' if needed is None else f'{needed:,}'}"
            for n, needed in zip(self.seeds, self.prompts_needed, strict=True)
        )
        return "\n".join([*lines, f"prompts for {100 * self.delta:.1f} points: {', '.join(needs)}"])


@dataclass(frozen=True)
class Proportion(Record):
    """A share of successes with its interval."""

    estimate: float
    ci: tuple[float, float]
    level: float
    n: int


@dataclass(frozen=True)
class Aggregate(Record):
    """One number over runs and tasks with its error over whole runs."""

    estimate: float
    se: float
    ci: tuple[float, float]
    df: float
    p: float | None
    level: float
    n_seeds: int
    n_seeds_b: int | None
    n_tasks: int


@dataclass(frozen=True)
class Profile(Record):
    """Share of scores above each threshold, with pointwise intervals `ci_K2`."""

    thresholds_K: FloatArray
    estimate_K: FloatArray
    se_K: FloatArray
    ci_K2: FloatArray
    df: int
    level: float
    n_seeds: int
    n_tasks: int
