"""Before the study: how many prompts and seeds, and what a study of a given size finds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from .crossed import variance_over_seeds
from .frames import TableLike, read_methods
from .inference import Error, detectable, satterthwaite
from .records import Noise, Plan, Power
from .tables import Clusters, centred, over_seeds, probability, tail

MOST_PROMPTS = 1_000_000


def prompts_needed(p: float, power: float = 0.8, level: float = 0.95) -> int:
    """Prompts for one run with true win rate p to be told from 50 %, decided judgements, two-sided.

    n = ((z_{α/2} / 2 + z_β √(p(1-p))) / (p - 1/2))², rounded up. It leaves out the training seeds, which no number
    of prompts replaces: see `smallest_detectable`.

    Args:
        p: true win rate, not 0.5.
        power: probability of finding it.
        level: 1 minus the two-sided level of the test.

    Source:
        The normal approximation of the test of one proportion.

    >>> prompts_needed(0.55), prompts_needed(0.55, power=0.9), prompts_needed(0.52)
    (783, 1047, 4904)
    """
    if not 0 < p < 1 or p == 0.5:
        raise ValueError(f"p = {p}: need a win rate between 0 and 1, and not 0.5, which no number of prompts can tell")
    z_alpha, z_beta = float(stats.norm.isf(tail(level))), float(stats.norm.ppf(probability("power", power)))
    return math.ceil(((z_alpha / 2 + z_beta * math.sqrt(p * (1 - p))) / (p - 0.5)) ** 2)


def prompts_needed_paired(delta: float, sd: float, power: float = 0.8, level: float = 0.95) -> int:
    """Prompts for a paired t-test of two runs, n = ((z_{α/2} + z_β) sd/δ)², rounded up; without training seeds.

    Args:
        delta: true difference (0.05: five points).
        sd: standard deviation of the difference over prompts; 0.3 to 0.5 for win rates.
        power: probability of finding it.
        level: 1 minus the two-sided level of the test.

    >>> [prompts_needed_paired(0.05, sd) for sd in (0.3, 0.4, 0.5)]
    [283, 503, 785]
    """
    _positive(delta=delta, sd=sd)
    z_alpha, z_beta = float(stats.norm.isf(tail(level))), float(stats.norm.ppf(probability("power", power)))
    return math.ceil(((z_alpha + z_beta) * sd / delta) ** 2)


def prompts_needed_mcnemar(delta: float, discordant: float, power: float = 0.8, level: float = 0.95) -> int:
    """Prompts for McNemar's test of two runs: n = (z_{α/2} √D + z_β √(D - δ²))²/δ², rounded up; without seeds.

    Args:
        delta: true difference of the shares solved.
        discordant: D, the share of prompts that exactly one of the two solves; 0.07 to 0.29 seen.
        power: probability of finding it.
        level: 1 minus the two-sided level of the test.

    Source:
        Connor 1987.

    >>> prompts_needed_mcnemar(0.05, 0.2), prompts_needed_mcnemar(0.03, 0.2)
    (626, 1742)
    """
    _positive(delta=delta, discordant=discordant)
    if not delta <= discordant <= 1:
        raise ValueError(f"discordant = {discordant}: a share, and at least the difference {delta} itself")
    z_alpha, z_beta = float(stats.norm.isf(tail(level))), float(stats.norm.ppf(probability("power", power)))
    return math.ceil((z_alpha * math.sqrt(discordant) + z_beta * math.sqrt(discordant - delta**2)) ** 2 / delta**2)


def smallest_detectable(
    seed_sd: float,
    n_prompts: int,
    n_seeds: int,
    *,
    interaction_sd: float = 0.3,
    residual_sd: float = math.sqrt(0.08),
    power: float = 0.8,
    level: float = 0.95,
) -> float:
    """Smallest true difference of two methods (independent seeds, same prompts) that a planned study finds.

    SE² = (σ²_interaction + 2 σ²_residual/S)/n + 2 σ²_seed/S, whose last term does not shrink with the prompts. With df
    by Satterthwaite from the expected mean squares, the answer is δ SE where P(t(df, δ) > t(1 - α/2, df)) = power and
    t(df, δ) is noncentral.

    Args:
        seed_sd: standard deviation of a method's mean over training seeds (0.02: two points of win rate).
        n_prompts: prompts.
        n_seeds: seeds per method, at least 2.
        interaction_sd: of the true difference of the two methods over prompts.
        residual_sd: of one run's value for one prompt, given both. The two defaults give the difference of two single
            runs a standard deviation of 0.5 per prompt: a cautious guess, published pairs of good models show 0.4.
        power: probability of finding the difference.
        level: 1 minus the two-sided level of the test.

    Source:
        Satterthwaite 1946; the power of the t-test by the noncentral t.

    >>> [round(100 * smallest_detectable(0.02, 805, n_seeds), 1) for n_seeds in (3, 5, 10, 20)]
    [6.9, 5.2, 4.1, 3.6]
    """
    noise = Noise(seed_sd, interaction_sd, residual_sd)
    return detectable(_planned(noise, n_prompts, n_seeds), power, level)


def power(
    delta: float, n_prompts: int, n_seeds: int, *, noise: Noise | None = None, level: float = 0.95, wanted: float = 0.8
) -> Power:
    """Probability that a study of a given size finds a true difference of two methods (independent seeds).

    P(|t(df, δ/SE)| > t(1 - α/2, df)), with SE and df as in `smallest_detectable`.

    Args:
        delta: true difference (0.05: five points of win rate).
        n_prompts: prompts.
        n_seeds: seeds per method, at least 2.
        noise: standard deviations, guessed or from `noise_of`; None for the guess of `smallest_detectable` with two
            points over seeds.
        level: 1 minus the two-sided level of the test.
        wanted: power for which `smallest_detectable` is given beside it.

    >>> found = power(0.05, 805, 5)
    >>> round(found.estimate, 2), round(found.smallest_detectable, 3)
    (0.77, 0.052)
    """
    _positive(delta=delta)
    noise = noise or Noise()
    error = _planned(noise, n_prompts, n_seeds)
    chance = 1.0
    if error.se:
        critical, shift = float(stats.t.isf(tail(level), error.df)), delta / error.se
        chance = float(stats.nct.sf(critical, error.df, shift) + stats.nct.cdf(-critical, error.df, shift))
    return Power(
        estimate=chance, delta=delta, n_prompts=n_prompts, n_seeds=n_seeds, se=error.se, df=error.df,
        smallest_detectable=detectable(error, wanted, level), wanted=wanted, level=level, noise=noise,
    )  # fmt: skip


def noise_of(
    methods: Mapping[str, TableLike] | TableLike,
    *,
    clusters: Clusters = None,
    unparsed: float | None = None,
    **names: str,
) -> Noise:
    """The standard deviations that `power` and `plan_study` need, measured on the tables of a finished or pilot study.

    σ²_residual = n S V_cells, σ²_seed = max(0, V_seeds - V_cells) S, averaged over methods, and over pairs
    σ²_interaction = max(0, n V_prompts(d̄) - Σ_m σ²_residual/S_m), with clustered variances where there are clusters.

    Args:
        methods: name -> table, at least two methods of two seeds each; as in `max_t`. A model that is not trained (the
            start) has no seeds: leave it out.
        clusters, unparsed, names: as in `max_t`.

    Source:
        The moment (ANOVA) estimator, as in `mean`. With few seeds σ_seed is rough: of 3 methods with 5 seeds each, by a
        factor between 0.7 and 1.6 (95 %).

    >>> random = np.random.default_rng(0)
    >>> pilot = {m: 0.02 * random.normal(size=(5, 1)) + 0.3 * random.normal(size=(5, 2000)) for m in ("dpo", "ipo")}
    >>> noise = noise_of(pilot)
    >>> round(noise.seed_sd, 2), round(noise.interaction_sd, 1), round(noise.residual_sd, 1)
    (0.02, 0.0, 0.3)
    """
    tables = read_methods(methods, clusters, unparsed, names)
    for name, one in tables.items():
        if len(one.y_SN) < 2:
            raise ValueError(f"{name} has one seed: the noise between seeds needs at least two")
    groups = next(iter(tables.values())).groups
    n_prompts = len(groups.ids_N)
    parts = {name: variance_over_seeds(one.y_SN, groups) for name, one in tables.items()}
    residual = {name: n_prompts * len(tables[name].y_SN) * cells for name, (_, cells) in parts.items()}
    seed = [max(0.0, seeds - cells) * len(tables[name].y_SN) for name, (seeds, cells) in parts.items()]
    interaction = []
    for a, b in itertools.combinations(tables, 2):
        gap_N = centred(over_seeds(tables[a].y_SN) - over_seeds(tables[b].y_SN))
        inside = sum(residual[name] / len(tables[name].y_SN) for name in (a, b))
        interaction.append(max(0.0, n_prompts * groups.variance_of_mean(gap_N[None]) - inside))
    return Noise(*(math.sqrt(np.mean(values)) for values in (seed, interaction, list(residual.values()))))


def plan_study(
    delta: float = 0.05,
    *,
    noise: Noise | None = None,
    prompts: Sequence[int] = (200, 400, 805, 1600),
    seeds: Sequence[int] = (3, 5, 10, 20),
    power: float = 0.8,
    level: float = 0.95,
    most_seeds: int = 100,
) -> Plan:
    """How many prompts and seeds a study needs for a difference of δ, and what each size of study finds.

    Args:
        delta: smallest difference that matters (0.05: five points of win rate).
        noise: standard deviations, guessed (`Noise(seed_sd=0.01)`) or measured on a pilot (`noise_of`).
        prompts: numbers of prompts to look at.
        seeds: numbers of seeds per method to look at, each at least 2.
        power: probability of finding δ.
        level: 1 minus the two-sided level of the test; for a family of K claims 1 - 0.05/K is on the safe side.
        most_seeds: seeds that are tried.

    Raises:
        ValueError: for fewer than two seeds or prompts, and for a difference that is not positive.

    >>> print(plan_study(noise=Noise(seed_sd=0.02), prompts=(400, 805), seeds=(3, 5, 10)).to_text())
    Smallest detectable difference, points (power 80 %, two-sided 5 %; SD over seeds 2.0 points):
     prompts  3 seeds  5 seeds  10 seeds   seeds for 5.0
         400      7.8      6.3       5.2              14
         805      6.9      5.2       4.1               6
    prompts for 5.0 points: 3 seeds: out of reach, 5 seeds: 988, 10 seeds: 455
    """
    _positive(delta=delta)
    noise = noise or Noise()

    def found(n_prompts: int, n_seeds: int) -> float:
        return detectable(_planned(noise, n_prompts, n_seeds), power, level)

    def needed(n_prompts: int) -> int | None:
        if found(n_prompts, most_seeds) > delta:  # it only falls with the seeds
            return None
        return next(n_seeds for n_seeds in range(2, most_seeds + 1) if found(n_prompts, n_seeds) <= delta)

    def prompts_for(n_seeds: int) -> int | None:
        low, high = 2, MOST_PROMPTS
        if found(high, n_seeds) > delta:  # what the seeds alone leave
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if found(middle, n_seeds) <= delta else (middle, high)
        return high

    return Plan(
        delta=delta, noise=noise, power=power, level=level, prompts=tuple(prompts), seeds=tuple(seeds),
        smallest_detectable=tuple(tuple(found(n, s) for s in seeds) for n in prompts),
        seeds_needed=tuple(needed(n) for n in prompts), prompts_needed=tuple(prompts_for(s) for s in seeds),
        most_seeds=most_seeds,
    )  # fmt: skip


def _planned(noise: Noise, n_prompts: int, n_seeds: int) -> Error:
    """The error that a study of two methods with independent seeds will have, from expected mean squares."""
    if n_seeds < 2:
        raise ValueError("n_seeds must be at least 2: one run per method cannot show the spread over seeds")
    if n_prompts < 2:
        raise ValueError("n_prompts must be at least 2")
    if min(noise.seed_sd, noise.interaction_sd, noise.residual_sd) < 0:
        raise ValueError("standard deviations must not be negative")
    from_prompts = (noise.interaction_sd**2 + 2 * noise.residual_sd**2 / n_seeds) / n_prompts
    cells = noise.residual_sd**2 / (n_prompts * n_seeds)
    from_seeds = noise.seed_sd**2 / n_seeds + cells  # of one method: E[MS_seed]/(nS)
    added = 2 * noise.seed_sd**2 / n_seeds
    variance = from_prompts + added
    df = satterthwaite(variance, [(from_prompts, n_prompts - 1), (from_seeds, n_seeds - 1), (from_seeds, n_seeds - 1)])
    return Error(math.sqrt(variance), df, math.sqrt(from_prompts), math.sqrt(added))


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} = {value} must be positive")
