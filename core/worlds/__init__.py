"""Embedded worlds: small seeded tasks with known truth, for judging algorithms in minutes on a laptop.

>>> import prefzoo.worlds
>>> world = prefzoo.worlds.make("requests", seed=0)
>>> row = world.prompts("test", 1)[0]
>>> world.gold(row["request"], world.oracle(row["request"]), ended=True)
10.0
"""

from __future__ import annotations

from typing import Any, Literal, overload

from .base import SPLITS, Request, RewardFunction, Row, World, nearest
from .requests import Requests
from .sums import Sums

WORLDS: dict[str, type[World]] = {world.name: world for world in (Requests, Sums)}


@overload
def make(name: Literal["requests"], *, seed: int = 0, **options: Any) -> Requests: ...
@overload
def make(name: Literal["sums"], *, seed: int = 0, **options: Any) -> Sums: ...
@overload
def make(name: str, *, seed: int = 0, **options: Any) -> World: ...
def make(name: str, *, seed: int = 0, **options: Any) -> World:
    """The world of this name; the options are the fields of its class."""
    if name not in WORLDS:
        raise nearest("world", name, WORLDS)
    return WORLDS[name](seed=seed, **options)


__all__ = ["SPLITS", "WORLDS", "Request", "Requests", "RewardFunction", "Row", "Sums", "World", "make"]
