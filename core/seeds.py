"""Random streams. Each is derived by hashing what it is for, never by ``seed + index``; nothing is shared."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from (seed, purpose, step, row, ...).

    >>> derive_seed(0, "order", 1) != derive_seed(0, "order", 2) != derive_seed(1, "order", 1)
    True
    """
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator of its own for a purpose."""
    return np.random.Generator(np.random.PCG64(derive_seed(*parts)))


def uniforms(seed: int, keys_R: np.ndarray, steps: int) -> np.ndarray:
    """Uniform numbers in [0, 1), one for each (seed, row key, step): (R, steps) float64.

    Counter-based (splitmix64 finaliser): a row's numbers do not depend on which rows stand beside it.
    """
    with np.errstate(over="ignore"):
        rows = _mix(_mix(np.asarray([seed]).astype(np.uint64)) + np.asarray(keys_R).astype(np.uint64))
        counters = np.arange(1, steps + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (_mix(rows[:, None] + counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
