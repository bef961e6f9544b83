"""The source of the package as a hash, so that what was stored by other code is not taken for this code's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path


def source_hash(files: Iterable[Path]) -> str:
    """Hash of the content of files, in the order of their names."""
    return hashlib.sha256(b"".join(f.read_bytes() for f in sorted(files))).hexdigest()[:16]


@cache
def layer_files() -> tuple[Path, ...]:
    """Every Python file of the shared layer."""
    return tuple(Path(__file__).resolve().parent.rglob("*.py"))


@cache
def layer_hash() -> str:
    """Hash of the shared layer: part of the key of everything it stores."""
    return source_hash(layer_files())
