"""Reward against KL: curves along training, the fall from their peak, and the frontier of all methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefzoo.benchmarks import statistics
from prefzoo.benchmarks.results.stored import Array, Runs, Stored

SPENT = ("generated_tokens", "trained_tokens", "prompts")  # by a run when a point of its curve was taken


def truth(stored: Stored) -> str | None:
    """The column that says how good an answer is: the deciding judge's where it is a truth, else the best there is."""
    columns = set.intersection(*(set(a.columns) for a in stored.answers.values()))
    wanted = (stored.column if stored.column in ("gold", "exact") else "gold", "gold", "exact", stored.column)
    return next((c for c in wanted if c in columns), None)


def curve(points: Mapping[int, Runs], measure: str, stored: Stored) -> dict[str, Any] | None:
    """Means with errors at every step, and how far the truth has fallen from its peak, and the proxy risen.

    The best of many noisy points is too good. So the peak is chosen on one half of the prompts and the fall measured on
    the other, both ways round; ``peak_step`` alone is the best of all prompts.
    """
    runs = set.intersection(*(set(p.runs) for p in points.values()))
    points = {step: p.only(sorted(runs)) for step, p in points.items()}
    steps, first = list(points), next(iter(points.values()))
    if not runs or measure not in first.columns:
        return None
    columns = [c for c in first.scores if c not in SPENT]
    clusters_N = first.clusters_N
    tables = {c: [stored.over_starts(p.mean_SN(c), p.runs) for p in points.values()] for c in columns}
    means = {c: [statistics.mean(y, clusters=clusters_N) for y in tables[c]] for c in columns}
    truth_TSN = np.stack(tables[measure])
    chosen_N = _peaks(truth_TSN, clusters_N)

    def fall(column: str) -> dict[str, Any]:
        y_TSN = np.stack(tables[column])
        peak_SN = np.take_along_axis(y_TSN, chosen_N[None, None], 0)[0]
        return statistics.difference(y_TSN[-1], peak_SN, paired_seeds=True, clusters=clusters_N).to_dict()

    found = {
        "steps": steps,
        "spent": {u: [float(p.columns[u].mean()) for p in points.values()] for u in SPENT if u in first.columns},
        "means": {c: [e.estimate for e in means[c]] for c in columns},
        "ses": {c: [e.se for e in means[c]] for c in columns},
        "cis": {c: [list(e.ci) for e in means[c]] for c in columns},
        "peak_step": steps[int(truth_TSN.mean((1, 2)).argmax())],
        "end_minus_peak": fall(measure),
    }
    return found | ({"proxy_end_minus_peak": fall("proxy")} if "proxy" in columns else {})


def _peaks(y_TSN: Array, clusters_N: tuple[str, ...] | None) -> Array:
    """For every prompt the step that is best on the other half of the clusters."""
    labels = range(y_TSN.shape[2]) if clusters_N is None else clusters_N
    number = {label: k for k, label in enumerate(dict.fromkeys(labels))}
    half_N = np.array([number[label] % 2 for label in labels])
    best_2 = [int(y_TSN[:, :, half_N != h].mean((1, 2)).argmax()) for h in (0, 1)]
    return np.asarray(best_2)[half_N]


def frontier(methods: Mapping[str, Any], stored: Stored, measure: str | None, line: list[Any]) -> dict[str, Any] | None:
    """Every method's truth and proxy against the square root of its KL, with Gao's curves and the area under curves."""
    shown = {m: f["means"] for m, f in methods.items() if measure in f["means"] and "kl" in f["means"]}
    if measure is None or not shown:
        return None
    front = statistics.frontier(
        [f["kl"]["estimate"] for f in shown.values()], [f[measure]["estimate"] for f in shown.values()]
    )
    points = [
        {
            "method": name, "sqrt_kl": d, "kl": f["kl"], "gold": f[measure], "proxy": f.get("proxy"), "on_front": on,
        }
        for (name, f), d, on in zip(
            shown.items(), front.sqrt_kl_P.tolist(), front.on_front_P.tolist(), strict=True
        )
    ]  # fmt: skip
    climbs = {m: c for m, points in stored.curves.items() if (c := _climb(points, measure, stored)) is not None}
    gao = {"best_of_n": _gao_of_line(line, measure), **{m: _gao(c) for m, c in climbs.items()}}
    return {
        "gold_column": measure, "points": points, "best_of_n": line,
        "gao": {m: fit for m, fit in gao.items() if fit is not None} or None, "area": _areas(climbs) or None,
    }  # fmt: skip


@dataclass(frozen=True)
class Climb:
    """A curve as KL and gold less the start's: by run (S, K), gold by prompt (N, K), at K points behind the start."""

    kl_SK: Array
    gold_SK: Array
    gold_NK: Array
    clusters_N: tuple[str, ...] | None


def _climb(points: Mapping[int, Runs], measure: str, stored: Stored) -> Climb | None:
    runs = sorted(set.intersection(*(set(p.runs) for p in points.values())))
    if not runs or 0 not in points or any(c not in points[0].columns for c in (measure, "kl")):
        return None
    kept = [p.only(runs) for p in points.values()]
    gold_KSN = np.stack([stored.over_starts(p.mean_SN(measure), runs) for p in kept])
    kl_KSN = np.stack([stored.over_starts(p.mean_SN("kl"), runs) for p in kept])
    gain_KSN = gold_KSN[1:] - gold_KSN[0]
    return Climb(kl_KSN[1:].mean(2).T, gain_KSN.mean(2).T, gain_KSN.mean(1).T, kept[0].clusters_N)


def _gao(climb: Climb) -> dict[str, Any] | None:
    """Gao's curve of a method, prompts as units; None with fewer than three points away from the start."""
    kl_K = climb.kl_SK.mean(0)
    away = kl_K > 0
    if len(np.unique(kl_K[away])) < 3:
        return None
    return statistics.gao_fit(kl_K[away], climb.gold_NK[:, away], form="rl", clusters=climb.clusters_N).to_dict()


def _gao_of_line(line: list[Any], measure: str) -> dict[str, Any] | None:
    """Gao's curve of best-of-n by the proxy."""
    chosen = [p for p in line if p["judge"] == "proxy" and measure in p]
    start = next((p[measure] for p in chosen if p["n"] == 1), None)
    more = [p for p in chosen if p["kl"] > 0]
    if start is None or len(more) < 3:
        return None
    return statistics.gao_fit([p["kl"] for p in more], [p[measure] - start for p in more], form="best_of_n").to_dict()


def _areas(climbs: Mapping[str, Climb]) -> dict[str, Any]:
    """Area under every curve, up to the KL that all of them reach."""
    common_kl = min((float(c.kl_SK.mean(0).max()) for c in climbs.values()), default=0.0)
    if common_kl <= 0:
        return {}
    return {m: statistics.frontier_area(c.kl_SK, c.gold_SK, up_to_kl=common_kl).to_dict() for m, c in climbs.items()}
