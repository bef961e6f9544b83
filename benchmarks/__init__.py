"""The comparison harness: which algorithm is better, by how much, and how sure is that?

The face is lazy: ``prefzoo.benchmarks.statistics`` needs numpy and scipy only, and works on anybody's files.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "prefzoo.benchmarks":
    raise ImportError("import prefzoo.benchmarks, not benchmarks: the folder is a part of the package 'prefzoo'")

_FACE = {
    "SUITES": "suites",
    "Comparison": "comparison",
    "Method": "suites",
    "Suite": "suites",
    "Task": "suites",
    "compare": "comparison",
    "get_suite": "suites",
    "list_suites": "suites",
    "report": "reporting",
    "run": "runner",
}

if TYPE_CHECKING:
    from prefzoo.benchmarks.comparison import Comparison, compare
    from prefzoo.benchmarks.reporting import report
    from prefzoo.benchmarks.runner import run
    from prefzoo.benchmarks.suites import SUITES, Method, Suite, Task, get_suite, list_suites

__all__ = [
    "SUITES", "Comparison", "Method", "Suite", "Task", "compare", "get_suite", "list_suites", "report", "run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'prefzoo.benchmarks' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"prefzoo.benchmarks.{_FACE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_FACE})
