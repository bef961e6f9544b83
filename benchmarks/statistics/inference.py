"""From an error to an interval, a test, and the smallest difference that it finds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

from .tables import probability, tail


@dataclass(frozen=True)
class Error:
    """Error of a mean over prompts and seeds, and its two parts."""

    se: float
    df: float
    se_prompts: float
    se_seeds: float | None


def satterthwaite(variance: float, parts: Sequence[tuple[float, int]]) -> float:
    """df = V² / Σ_k V_k²/df_k, written with the shares V_k/V, which cannot underflow."""
    if variance == 0:
        return float(parts[0][1])
    return 1 / math.fsum((part / variance) ** 2 / df for part, df in parts)  # fsum: the same after swapping A and B


def critical_t(level: float, df: float) -> float:
    """t(1 - α/2, df) of a two-sided interval or test."""
    return float(special.stdtrit(df, 1 - tail(level)))


def interval(estimate: float, error: Error, level: float) -> tuple[float, float]:
    half = critical_t(level, error.df) * error.se
    return estimate - half, estimate + half


def t_test(effect: float, error: Error) -> tuple[float, float]:
    """t and its two-sided p; with an error of 0 the limits: t = 0, p = 1 for no effect, else t = ±inf, p = 0."""
    if error.se == 0:
        return (math.copysign(math.inf, effect), 0.0) if effect else (0.0, 1.0)
    t = effect / error.se
    return t, 2 * float(special.stdtr(error.df, -abs(t)))


def detectable(error: Error, power: float, level: float) -> float:
    """δ SE with P(t(df, δ) > t(1 - α/2, df)) = power, t(df, δ) noncentral."""
    if error.se == 0:
        return 0.0
    miss = 1 - probability("power", power)
    return error.se * float(special.nctdtrinc(error.df, miss, critical_t(level, error.df)))
