"""Files and folders that are whole or not there: written aside, synced and renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing_file(file: Path, shared: bool = False) -> Iterator[Path]:
    """A file to write, which takes the place of another when it is whole.

    ``shared``: other processes may write the same one at the same time.
    """
    aside = file.with_name(f"tmp-{uuid.uuid4().hex}.part" if shared else f".{file.name}.part")
    try:
        yield aside
        sync_one(aside)
        os.replace(aside, file)
        sync_one(file.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder; :func:`prefzoo.training.checkpoint.tidy` brings back what was being replaced."""
    aside, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("part", "old"))
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir()
        yield aside
        sync(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk gets its room back
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(aside, folder)
    sync_one(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(folder: Path) -> None:
    """Everything in a folder to the disk, and out of memory, so that what is read again comes from there."""
    for path in folder.rglob("*"):
        sync_one(path)
    sync_one(folder)


def sync_one(path: Path) -> None:
    """A file, or the names in a folder."""
    if os.name == "nt":  # cannot open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if path.is_file() and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
