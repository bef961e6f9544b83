"""Checkpoints: all that a run needs to go on, in safetensors and JSON, whole or not there at all.

``OUTPUT/checkpoint-57`` holds the state after 57 steps: an ordinary model folder, ``state.safetensors`` with every
tensor that the model's files do not hold bit for bit, ``state.json``, and ``manifest.json`` with size and sha256 of
every file. It is written aside, synced, read again and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefzoo.files import replacing_folder, sync
from prefzoo.models.reference import as_bytes
from prefzoo.registry import RunError

STATE, FACTS, MANIFEST = "state.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_ASIDE = re.compile(r"\.(checkpoint-\d+|final|best|run\.json|post-mortem-\d+\.json)\.(old|gone|part)")


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose files are those that were written."""

    folder: Path
    facts: dict[str, Any]

    @property
    def number(self) -> int:
        """Steps done."""
        return _number(self.folder)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name, on the CPU."""
        tensors = load_file(self.folder / STATE)
        held: dict[str, list[str]] = self.facts["held_by_model"]
        for file in {file for file, _ in held.values()}:
            with safe_open(self.folder / file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(key) for name, (own, key) in held.items() if own == file}
        return tensors


def write(
    output: Path,
    number: int,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    save_model: Callable[[Path], object],
    keys: Mapping[str, str],
) -> Path:
    """Write a checkpoint; one of the same number is replaced when the new one is whole.

    Args:
        tensors: all that is not in the model's files; what is, bit for bit, is left to them.
        save_model: writes the model into a folder.
        keys: what the model's files call a tensor, where they may hold it.
    """
    folder = output / f"checkpoint-{number}"
    with told(f"{folder.name} could not be written to {str(output)!r}", output), replacing_folder(folder) as aside:
        save_model(aside)
        own = {name: value.detach().cpu() for name, value in tensors.items()}
        held = _held(aside, own, keys)
        own = {name: value.contiguous() for name, value in own.items() if name not in held}
        save_file(own, aside / STATE)
        (aside / FACTS).write_text(json.dumps({**facts, "held_by_model": held}, indent=1) + "\n", encoding="utf-8")
        sync(aside)
        with safe_open(aside / STATE, framework="pt") as opened:
            wrong = [name for name, value in own.items() if not same_bits(opened.get_tensor(name), value)]
        if wrong:
            raise OSError(errno.EIO, f"what was read again differs from what was written ({wrong[0]})")
        manifest = {f.relative_to(aside).as_posix(): _facts_of(f) for f in sorted(aside.rglob("*")) if f.is_file()}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        sync(aside)
    return folder


def whole(folder: Path) -> Checkpoint:
    """The checkpoint of a folder, every file checked; RunError names the first that is at fault."""
    try:
        if not (folder / MANIFEST).is_file():
            raise RunError(f"{folder}: {MANIFEST} is missing")
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, said in manifest.items():
            if not (folder / name).is_file():
                raise RunError(f"{folder}: {name} is missing")
            if _facts_of(folder / name) != said:
                raise RunError(f"{folder}: {name} is not what was written (its checksum differs)")
        return Checkpoint(folder, json.loads((folder / FACTS).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise RunError(f"{folder} cannot be read ({error})") from error


def newest(output: Path, note: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint; damaged ones are told and passed over."""
    for folder in reversed(found(output)):
        try:
            return whole(folder)
        except RunError as error:
            note(f"damaged: {error}; the checkpoint before it is looked at.")
    return None


def found(output: Path) -> list[Path]:
    """Folders of checkpoints, the oldest first."""
    return sorted((f for f in _named(output) if _is_ours(f)), key=_number)


def foreign(output: Path) -> list[Path]:
    """Folders that have the name of a checkpoint and were written by another program."""
    return [f for f in _named(output) if not _is_ours(f)]


def _named(output: Path) -> list[Path]:
    return [f for f in output.glob("checkpoint-*") if _NAME.fullmatch(f.name) and f.is_dir()]


def _is_ours(folder: Path) -> bool:
    """By its files; an empty one is nobody's loss."""
    return any((folder / name).exists() for name in (STATE, FACTS, MANIFEST)) or not any(folder.iterdir())


def prune(output: Path, keep: int, protected: int | None = None) -> None:
    """Remove all but the newest ``keep``, and the ``protected`` one."""
    for folder in found(output)[: -keep or None]:
        if _number(folder) != protected:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder so that no half of it is left under its name."""
    gone = folder.with_name(f".{folder.name}.gone")
    with contextlib.suppress(OSError):
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def tidy(output: Path) -> None:
    """Finish what a killed process left half done: a folder that was being replaced comes back, the rest goes."""
    for left in [f for f in output.iterdir() if _ASIDE.fullmatch(f.name)]:  # other hidden files are the user's
        name, _, kind = left.name[1:].rpartition(".")
        if kind == "old" and not (output / name).exists():
            os.replace(left, output / name)
        elif left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def told(what: str, output: Path) -> Iterator[None]:
    """A disk's errors in words."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and "os error" not in str(error):  # tokenizers has no class
            raise
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if not output.is_dir():
            why, cure = "the folder is gone", "bring it back"
        elif full:
            free = shutil.disk_usage(output).free / 2**20
            why, cure = f"the disk is full ({free:.0f} MiB free)", "make room"
        else:
            why, cure = str(getattr(error, "strerror", None) or error), "mend that"
        last = [f.name for f in found(output)][-1:]
        go_on = f"; {cure}, and go on from {last[0]} with resume" if last else f"; {cure}"
        raise RunError(f"{what}: {why}{go_on}.") from error


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, NaN and signs of zero included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(as_bytes(a), as_bytes(b))


def _held(folder: Path, tensors: Mapping[str, Tensor], keys: Mapping[str, str]) -> dict[str, list[str]]:
    """Tensors that the model's files hold bit for bit: name -> file and key."""
    held: dict[str, list[str]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            there = set(opened.keys())
            for name, key in keys.items():
                if key in there and name in tensors and same_bits(opened.get_tensor(key), tensors[name]):
                    held[name] = [file.name, key]
    return held


def _facts_of(file: Path) -> dict[str, Any]:
    with file.open("rb") as opened:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])
