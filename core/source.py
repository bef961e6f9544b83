"""The source of the package as a hash, so that what was stored by other code is not taken for this code's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path


def source_hash(files: Iterable[Path]) -> str:
    """Hash of the content of files, in the order of their names."""
    return hashlib.sha256(b"".join(f.read_bytes() for f in sorted(files))).hexdigest()[:16]


def content_hash(path: Path) -> str:
    """Hash of what a file holds, or of the names and contents of a folder's files."""
    digest = hashlib.sha256()
    for file in sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]:
        digest.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as opened:
            for block in iter(lambda: opened.read(2**20), b""):
                digest.update(block)
    return digest.hexdigest()[:16]


# What looks at runs and losses from outside: editing it changes no number of a run.
OUTSIDE = ("theory", "contract.py", "testing.py", "trial.py")


@cache
def layer_files() -> tuple[Path, ...]:
    """Every Python file of the shared layer that a run goes through."""
    root = Path(__file__).resolve().parent
    return tuple(file for file in root.rglob("*.py") if file.relative_to(root).parts[0] not in OUTSIDE)


@cache
def layer_hash() -> str:
    """Hash of the shared layer: part of the key of everything it stores."""
    return source_hash(layer_files())
