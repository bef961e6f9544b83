"""prefzoo: every preference-optimization algorithm by name, on one engine, compared with honest statistics.

>>> import prefzoo
>>> prefzoo.create_algorithm("dpo", beta=0.2).needs == {"policy", "reference"}
True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The face is lazy: ``import prefzoo`` costs nothing, and a name is imported when it is first used.
_FACE = {
    "train": "prefzoo.training",
    "steps": "prefzoo.training",
    "generate": "prefzoo.generation",
    "Run": "prefzoo.training",
    "TrainConfig": "prefzoo.training",
    "Algorithm": "prefzoo.algorithm",
    "Schedule": "prefzoo.algorithm",
    "Stage": "prefzoo.algorithm",
    "Term": "prefzoo.algorithm",
    "create_algorithm": "prefzoo.algorithm",
    "list_algorithms": "prefzoo.algorithm",
    "register_algorithm": "prefzoo.algorithm",
    "DataSource": "prefzoo.data.formats",
    "load_dataset": "prefzoo.data.formats",
    "split_by_prompt": "prefzoo.data.formats",
    "compare": "prefzoo.benchmarks",
    "UsageError": "prefzoo.registry",
}

if TYPE_CHECKING:
    from prefzoo.algorithm import (
        Algorithm,
        Schedule,
        Stage,
        Term,
        create_algorithm,
        list_algorithms,
        register_algorithm,
    )  # fmt: skip
    from prefzoo.benchmarks import compare
    from prefzoo.data.formats import DataSource, load_dataset, split_by_prompt
    from prefzoo.generation import generate
    from prefzoo.registry import UsageError
    from prefzoo.training import Run, TrainConfig, steps, train

__all__ = [
    "Algorithm", "DataSource", "Run", "Schedule", "Stage", "Term", "TrainConfig", "UsageError", "compare",
    "create_algorithm", "generate", "list_algorithms", "load_dataset", "register_algorithm", "split_by_prompt", "steps",
    "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _FACE:
        return getattr(importlib.import_module(_FACE[name]), name)
    try:
        return importlib.import_module(f"prefzoo.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"prefzoo.{name}":
            raise
        raise AttributeError(f"module 'prefzoo' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *_FACE})
