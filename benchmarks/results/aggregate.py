"""Across tasks: one key varied over its values, and methods over all tasks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from prefzoo.benchmarks import statistics

THRESHOLDS = [k / 20 for k in range(21)]  # of win rates


def across(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """What several tasks say together; None for one."""
    tasks = results["tasks"]
    shared = _shared(tasks)
    if len(tasks) < 2 or not shared:
        return None
    return {"vary": vary(tasks, shared), **over_tasks(results, shared)}


def _shared(tasks: Mapping[str, Any]) -> list[str]:
    """Methods with a win rate in every task, in the order of the first."""
    first, *others = ({m for m, found in t["methods"].items() if found["win"]} for t in tasks.values())
    return [m for m in next(iter(tasks.values()))["methods"] if m in first.intersection(*others)]


def over_tasks(results: Mapping[str, Any], methods: list[str]) -> dict[str, Any]:
    """Win rates of whole runs over all tasks: interquartile means, who improves on whom, shares above thresholds.

    Empty where fewer than two runs finished everywhere.
    """
    tasks = list(results["tasks"].values())
    by_run = {m: [next(iter(t["methods"][m]["against"].values()))["by_run"] for t in tasks] for m in methods}
    runs = sorted(set.intersection(*(set(task) for found in by_run.values() for task in found)), key=int)
    if len({int(r) % results["start_seeds"] if results["start_seeds"] > 1 else r for r in runs}) < 2:
        return {"iqm": {}, "probability_of_improvement": {}, "profiles": {}}
    tables = {m: np.array([[task[r] for task in found] for r in runs]) for m, found in by_run.items()}
    if results["start_seeds"] > 1:
        start_S = np.array([int(r) % results["start_seeds"] for r in runs])
        tables = {m: np.stack([y[start_S == s].mean(0) for s in np.unique(start_S)]) for m, y in tables.items()}
    rivals = itertools.combinations(methods, 2) if results["verdicts"] == "all" else ((m, "sft_more") for m in methods)
    return {
        "iqm": {m: statistics.iqm(y_ST).to_dict() for m, y_ST in tables.items()},
        "probability_of_improvement": {
            f"{a}>{b}": statistics.probability_of_improvement(tables[a], tables[b], paired_seeds=True).to_dict()
            for a, b in rivals
            if a != b and b in tables
        },
        "profiles": {m: statistics.performance_profile(y_ST, THRESHOLDS).to_dict() for m, y_ST in tables.items()},
    }


def vary(tasks: Mapping[str, Any], methods: list[str]) -> dict[str, Any] | None:
    """Win rates by the value of the key that a suite varies; its tasks are called KEY=VALUE."""
    keys = {name.partition("=")[0] for name in tasks if "=" in name}
    if len(keys) != 1 or not all("=" in name for name in tasks):
        return None
    values = [_number(name.partition("=")[2]) for name in tasks]
    table = {m: [t["methods"][m]["win"] for t in tasks.values()] for m in methods}
    return {"key": keys.pop(), "values": values, "methods": table}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
