"""The token store: arrays that grow block by block, in memory or in a folder of memory-mapped files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from prefzoo.data.samples import Ragged, offsets_of

MARK = "complete"  # written last; a folder without it is nobody's


class Store:
    """Named flat arrays and a few facts in JSON.

    With a folder, arrays are appended to files beside it; :meth:`close` renames the whole into its place, so that a
    killed run leaves no half store.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._blocks: dict[str, list[np.ndarray]] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._types: dict[str, str] = {}
        if folder is not None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._aside = Path(tempfile.mkdtemp(dir=folder.parent))

    def add(self, name: str, values: Any, dtype: str) -> None:
        """Append to an array."""
        block = np.asarray(values, dtype=dtype)
        self._types[name] = dtype
        if self.folder is None:
            self._blocks.setdefault(name, []).append(block)
            return
        if name not in self._files:
            self._files[name] = (self._aside / f"{name}.bin").open("wb")
        block.tofile(self._files[name])

    def add_ragged(self, name: str, sequences: Sequence[Any], dtype: str = "int32") -> None:
        """Append sequences of different lengths to a flat array, and their lengths to another."""
        self.add(f"{name}.lengths", [len(s) for s in sequences], "int64")
        self.add(name, np.concatenate([np.asarray(s, dtype=dtype) for s in sequences]) if sequences else [], dtype)

    def close(self, facts: Mapping[str, Any]) -> Stored:
        """All arrays, memory-mapped if there is a folder."""
        if self.folder is None:
            return Stored({name: np.concatenate(blocks) for name, blocks in self._blocks.items()}, facts)
        for file in self._files.values():
            file.close()
        (self._aside / MARK).write_text(json.dumps({"arrays": self._types, "facts": facts}))
        if not (self.folder / MARK).exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        try:
            os.replace(self._aside, self.folder)
        except OSError:  # another process was first
            shutil.rmtree(self._aside)
        return Stored.open(self.folder)

    def abandon(self) -> None:
        """Remove what was written."""
        for file in self._files.values():
            file.close()
        if self.folder is not None:
            shutil.rmtree(self._aside, ignore_errors=True)


class Stored:
    """Arrays of a store by name, and its facts."""

    def __init__(self, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
        self.arrays, self.facts = arrays, facts

    @classmethod
    def open(cls, folder: Path) -> Stored:
        mark = json.loads((folder / MARK).read_text())
        return cls({name: _map(folder / f"{name}.bin", dtype) for name, dtype in mark["arrays"].items()}, mark["facts"])

    def ragged(self, name: str) -> Ragged:
        return Ragged(self.arrays[name], offsets_of(self.arrays[f"{name}.lengths"]))


def _map(file: Path, dtype: str) -> np.ndarray:
    if file.stat().st_size == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(file, dtype=dtype, mode="c")  # copy on write: torch takes no read-only arrays


class Column(Sequence[Any]):
    """One column of rows that lie pickled in a store, read when asked for."""

    def __init__(self, rows: Ragged, name: str) -> None:
        self._rows, self._name = rows, name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return pickle.loads(self._rows[int(index) % len(self)].tobytes()).get(self._name)
