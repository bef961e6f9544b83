"""Reward against KL: curves along training, the fall from their peak, and the frontier of all methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from prefzoo.benchmarks import statistics
from prefzoo.benchmarks.results.stored import Array, Runs, Stored

SPENT = ("generated_tokens", "trained_tokens", "prompts")  # by a run when a point of its curve was taken


def truth(stored: Stored) -> str | None:
    """The column that says how good an answer is: the deciding judge's where it is a truth, else the best there is."""
    columns = set.intersection(*(set(a.columns) for a in stored.answers.values()))
    wanted = (stored.metric if stored.metric in ("gold", "exact") else "gold", "gold", "exact", stored.metric)
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


def frontier(methods: Mapping[str, Mapping[str, Any]], measure: str | None, line: list[Any]) -> dict[str, Any] | None:
    """Every method's truth and proxy against the square root of its KL; on the front is what no other method beats in
    truth at less or equal KL."""
    if measure is None:
        return None
    points = [
        {
            "method": name, "sqrt_kl": math.sqrt(max(0.0, m["means"]["kl"]["estimate"])), "kl": m["means"]["kl"],
            "gold": m["means"][measure], "proxy": m["means"].get("proxy"),
        }
        for name, m in methods.items()
        if "kl" in m["means"] and measure in m["means"]
    ]  # fmt: skip
    return {"gold_column": measure, "points": points, "best_of_n": line}
