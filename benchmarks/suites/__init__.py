"""Suites: what is compared, on what, at what budget. Those that come with prefzoo are YAML files beside this one, or,
where the registry says what is in them, functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefzoo.benchmarks.suites.spec import (
    SFT_MORE,
    START,
    Budget,
    Data,
    Decoding,
    Feedback,
    Method,
    Start,
    Suite,
    Task,
    Tuning,
    World,
    about,
    read_suite,
)  # fmt: skip
from prefzoo.registry import Registry, UsageError, suggest
from prefzoo.yaml_numbers import read_yaml

__all__ = [
    "SFT_MORE", "START", "SUITES", "Budget", "Data", "Decoding", "Feedback", "Method", "Start", "Suite", "Task",
    "Tuning", "World", "about", "get_suite", "list_suites", "read_suite", "task",
]  # fmt: skip

SUITES = Registry("suite")


def task(like: str, *algorithms: Method | str | Mapping[str, Any], **changes: Any) -> Task:
    """A ready task (requests, sums, files) with these algorithms, or its own, and other values.

    >>> [m.name for m in task("requests", "dpo", world={"prompts": 100}).methods]
    ['start', 'dpo', 'sft_more']
    """
    own = {"algorithms": list(algorithms)} if algorithms else {}
    return Task.model_validate({"like": like, **own, **changes})


def list_suites() -> dict[str, str]:
    """The suites there are, ours and those that users have registered, and what each is about."""
    found = {name: SUITES.entry(name).line for name in SUITES.names()}
    for file in Path(__file__).parent.glob("*.yaml"):
        found[file.stem] = str(read_yaml(file).get("about", "")).strip()
    return dict(sorted(found.items()))


def get_suite(name: str | Path, changes: Mapping[str, Any] | None = None) -> Suite:
    """A suite by its name or its YAML file, with values changed by dotted keys.

    >>> get_suite("quick", {"seeds": 3}).seeds
    3
    """
    file = Path(__file__).parent / f"{name}.yaml"
    if str(name) in SUITES.names():
        suite: Suite = SUITES.entry(str(name)).function()
        if not changes:
            return suite
        ours = {*Suite.model_fields, "vary"}  # but budget.amount is of the task's budget, which is no text
        inside = {
            k if k.split(".")[0] in ours and k[:7] != "budget." else f"tasks.0.{k}": v for k, v in changes.items()
        }
        return read_suite(suite.model_dump(exclude_unset=True), inside)
    if file.exists():
        return read_suite(file, changes)
    if Path(name).suffix in (".yaml", ".yml"):
        return read_suite(name, changes)
    known = list_suites()
    raise UsageError(f"no suite {str(name)!r}{suggest(str(name), known)} There are {', '.join(known)}, and FILE.yaml.")


from prefzoo.benchmarks.suites import registered  # noqa: E402, F401
