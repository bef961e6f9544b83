"""Before the study: how many prompts and seeds."""

from __future__ import annotations

import math

from scipy import stats

from .inference import Error, detectable, satterthwaite
from .tables import probability, tail


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
    if n_seeds < 2:
        raise ValueError("n_seeds must be at least 2: one run per method cannot show the spread over seeds")
    if n_prompts < 2:
        raise ValueError("n_prompts must be at least 2")
    if min(seed_sd, interaction_sd, residual_sd) < 0:
        raise ValueError("standard deviations must not be negative")
    from_prompts = (interaction_sd**2 + 2 * residual_sd**2 / n_seeds) / n_prompts
    from_seeds = seed_sd**2 / n_seeds + residual_sd**2 / (n_prompts * n_seeds)  # of one method: E[MS_seed]/(nS)
    variance = from_prompts + 2 * seed_sd**2 / n_seeds
    df = satterthwaite(variance, [(from_prompts, n_prompts - 1), (from_seeds, n_seeds - 1), (from_seeds, n_seeds - 1)])
    return detectable(Error(math.sqrt(variance), df, math.sqrt(from_prompts), None), power, level)
