"""Across tasks: one key varied over its values, and methods over all tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def across(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """What several tasks say together; None for one."""
    tasks = results["tasks"]
    shared = _shared(tasks)
    if len(tasks) < 2 or not shared:
        return None
    return {"vary": vary(tasks, shared)}


def _shared(tasks: Mapping[str, Any]) -> list[str]:
    """Methods with a win rate in every task, in the order of the first."""
    first, *others = ({m for m, found in t["methods"].items() if found["win"]} for t in tasks.values())
    return [m for m in next(iter(tasks.values()))["methods"] if m in first.intersection(*others)]


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
