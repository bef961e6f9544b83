"""After the study: how much more of it would decide what is undecided."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .crossed import difference
from .frames import TableLike, read_two
from .inference import Error, detectable, satterthwaite
from .records import Record
from .tables import Clusters, centred, mean_of, over_seeds

MOST_SEEDS, MOST_PROMPTS = 1_000, 10_000_000  # more is the same as never


@dataclass(frozen=True)
class Sequel(Record):
    """Seeds with the same prompts, or prompts with the same seeds, that find `effect`; None: no number does."""

    effect: float
    seeds: int | None
    prompts: int | None
    n_seeds: int
    n_prompts: int
    power: float
    level: float


def to_decide(
    a_SN: TableLike,
    b_SN: TableLike,
    *,
    clusters: Clusters = None,
    power: float = 0.8,
    level: float = 0.95,
) -> Sequel:
    """How many seeds, or how many prompts, would find the difference that this study saw, if it is the true one.

    With shared seeds, SE²(S, N) = (σ²_prompts + σ²_cells/S)/N + σ²_seeds/S, the variances from the mean squares of
    d = a - b, that of prompts times what clusters make of it; df by Satterthwaite. Found is what a t-test detects with
    this power. The difference and the noise are both guesses from one study, so this is an order of magnitude.

    Args:
        a_SN: one value per seed and prompt; row s of A and of B share their seed.
        b_SN: the same for B.
        clusters: one label per prompt.
        power: probability of finding it.
        level: 1 minus the two-sided level of the test; 1 - 0.05/K for one of K claims.

    Returns:
        `seeds` is None for a single seed, whose spread nobody knows; `prompts` is then about these two runs.

    Source:
        The expected mean squares of the crossed model; Satterthwaite 1946.

    >>> import numpy as np
    >>> y_SN = np.random.default_rng(1).normal(0.5, 0.3, (5, 400))
    >>> needed = to_decide(y_SN + 0.01, y_SN[:, ::-1])
    >>> needed.seeds > needed.n_seeds, needed.prompts > needed.n_prompts
    (True, True)
    """
    a, b = read_two(a_SN, b_SN, True, clusters)
    gap = difference(a_SN, b_SN, paired_seeds=True, clusters=clusters)
    d_SN = a.y_SN - b.y_SN
    n_seeds, n_prompts = d_SN.shape
    prompt_N, seed_S = centred(over_seeds(d_SN)), centred(d_SN.mean(1))
    per_prompt = float((prompt_N**2).sum()) / (n_prompts - 1)  # σ²_prompts + σ²_cells/S
    cells = seeds = 0.0
    if n_seeds > 1:
        cell_SN = d_SN - mean_of(d_SN) - prompt_N - seed_S[:, None]
        cells = float((cell_SN**2).sum()) / ((n_seeds - 1) * (n_prompts - 1))
        seeds = max(0.0, float((seed_S**2).sum()) / (n_seeds - 1) - cells / n_prompts)
    prompts = max(0.0, per_prompt - cells / n_seeds)
    design = gap.se_prompts**2 * n_prompts / per_prompt if per_prompt else 1.0
    share = gap.n_clusters / n_prompts

    def finds(n_seeds: int, n_prompts: int) -> bool:
        from_prompts = design * (prompts + cells / n_seeds) / n_prompts
        parts = [(from_prompts, max(1, round(share * n_prompts) - 1))]
        if n_seeds > 1:
            parts.append((seeds / n_seeds + cells / (n_seeds * n_prompts), n_seeds - 1))
        variance = from_prompts + seeds / n_seeds
        error = Error(math.sqrt(variance), satterthwaite(variance, parts), math.sqrt(from_prompts), None)
        return detectable(error, power, level) <= abs(gap.estimate)

    more_seeds = None if n_seeds == 1 else _least(lambda s: finds(s, n_prompts), n_seeds, MOST_SEEDS)
    more_prompts = _least(lambda n: finds(n_seeds, n), n_prompts, MOST_PROMPTS)
    return Sequel(abs(gap.estimate), more_seeds, more_prompts, n_seeds, n_prompts, power, level)


def _least(enough: Callable[[int], bool], low: int, most: int) -> int | None:
    """The least number from `low` on that is enough, for a condition that stays true; None above `most`."""
    if enough(low):
        return low
    high = low
    while not enough(high):
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
