"""Columns by name from anybody's frame: pandas, pyarrow, or whatever has `columns` and `[name]`."""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np


def is_frame(value: Any) -> bool:
    """Whether a value is a frame rather than an array."""
    return hasattr(value, "columns") and hasattr(value, "__getitem__")


def names_of(frame: Any) -> list[str]:
    """The names of a frame's columns."""
    return [str(column) for column in getattr(frame, "column_names", frame.columns)]


def columns(frame: Any, name: str, /, **others: Any) -> list[Any]:
    """The arrays meant by arguments that are either a frame and column names, or arrays already; None stays None.

    Args:
        frame: a frame, or the array of `name`.
        name: the column that the first argument stands for where it is a frame.
        others: of each other argument, the column's name or the array.

    >>> columns([1, 0], "y", clusters=None)
    [[1, 0], None]
    """
    if not is_frame(frame):
        missing = [argument for argument, value in others.items() if isinstance(value, str)]
        if missing:
            raise ValueError(f"{missing[0]} is missing: give arrays for {name}, {', '.join(missing)}, or a frame")
        return [frame, *others.values()]
    known = names_of(frame)

    def column(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"the frame has no column {value!r}; {hint}It has: {', '.join(known)}")
        return np.asarray(frame[value])

    return [column(value) for value in (name, *others.values())]
