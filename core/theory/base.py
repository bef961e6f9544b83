"""Theorems and findings: the words of the laboratory."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["optimum", "gradient", "expectation", "bias", "limit", "identity", "recovery"]


@dataclass(frozen=True)
class Finding:
    """One claim about an entry, and what was measured.

    ``bound``: the claim holds where ``measured`` is not above it. None: a bias, which is stated and not bounded.
    """

    entry: str
    kind: Kind
    claim: str
    measured: float
    bound: float | None

    @property
    def holds(self) -> bool:
        return self.bound is None or self.measured <= self.bound

    @property
    def words(self) -> str:
        """For a card.

        >>> Finding("dpo", "limit", "beta to 0 gives log 2", 0.0, 1e-9).words
        'beta to 0 gives log 2: 0 (at most 1e-09)'
        """
        return f"{self.claim}: {self.measured:.2g}" + ("" if self.bound is None else f" (at most {self.bound:.2g})")


@dataclass(frozen=True)
class Theorem:
    """A function from the name of an entry to findings, and the entries that it speaks of."""

    prove: Callable[[str], Iterator[Finding]]
    entries: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.prove.__name__


THEOREMS: list[Theorem] = []


def theorem(*entries: str) -> Callable[[Callable[[str], Iterator[Finding]]], Callable[[str], Iterator[Finding]]]:
    """Register a theorem about these entries."""

    def register(prove: Callable[[str], Iterator[Finding]]) -> Callable[[str], Iterator[Finding]]:
        THEOREMS.append(Theorem(prove, entries))
        return prove

    return register


@functools.cache
def load_theorems() -> tuple[Theorem, ...]:
    """All theorems; the first call imports the modules beside this one."""
    package = importlib.import_module("prefzoo.theory")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"prefzoo.theory.{module.name}")
    return tuple(THEOREMS)


def findings(entry: str) -> list[Finding]:
    """What the laboratory finds of an entry; computed now.

    On one thread: the tensors are so small that a second one makes it ten times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [f for t in load_theorems() if entry in t.entries for f in t.prove(entry)]
    finally:
        torch.set_num_threads(threads)
