"""A folder that one process at a time works in: a lock of the kernel, which drops it when its owner dies."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from prefzoo.registry import UsageError

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
_held: set[int] = set()  # descriptors of this process's locks


def _let_go() -> None:
    """A forked child shares its parent's locks, and would hold them after the parent's death."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def locked(folder: str | Path, wait: float = 0.0, name: str = ".lock") -> Iterator[None]:
    """Hold ``folder/name``, so that no other process works in a folder that exists.

    The kernel says who owns it and lets go when the owner dies, however it dies: no age and no process number counts.
    What stands in the file is for the words of the refusal. The owner removes the file when it leaves. Where the file
    system knows no locks, that is told once, and the work goes on.

    Args:
        folder: it must exist.
        wait: seconds to wait for another owner.
        name: of the file; locks of different names are different locks.

    Errors: another owner after ``wait`` seconds, in another process or in this one; a folder that cannot be written to.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, locked(folder):
    ...     with locked(folder):
    ...         pass
    Traceback (most recent call last):
    ...
    prefzoo.registry.UsageError: this process (pid ...) still works in ...: finish() or close() what it began there, ...
    """
    file = Path(folder) / name
    handle = _take(file, time.monotonic() + wait)
    try:
        yield
    finally:
        if handle in _held:  # not in a forked child
            with contextlib.suppress(OSError):
                if _is_at(handle, file):
                    file.unlink()  # while it is held: whoever waits for it finds it gone, and makes a new one
            _held.remove(handle)
            os.close(handle)


def _take(file: Path, deadline: float) -> int | None:
    """The descriptor that holds the lock; None where there are no locks."""
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)  # not inherited by programs that are started
        except OSError as error:
            raise UsageError(f"{str(file.parent)!r} cannot be written to: {error.strerror}.") from error
        _held.add(handle)
        kept = False
        try:
            if not _lock(handle):
                if time.monotonic() >= deadline:
                    raise UsageError(_refusal(handle, file))
            elif _is_at(handle, file):  # else its owner removed it after we had opened it
                with contextlib.suppress(OSError):  # a full disk: only the words are missing
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, f"pid {os.getpid()} on host {platform.node()}".encode(), 0)
                kept = True
                return handle
            else:
                continue
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UsageError(f"{str(file)!r} cannot be locked: {error.strerror}.") from error
            _tell_once()
            file.unlink(missing_ok=True)
            return None
        finally:
            if not kept:
                _held.discard(handle)
                os.close(handle)
        time.sleep(0.05)


def _lock(handle: int) -> bool:
    """Whether the kernel gave us the lock."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the second on some network file systems
        return False
    return True


def _is_at(handle: int, file: Path) -> bool:
    """Whether this path still names the file that we have open."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _refusal(handle: int, file: Path) -> str:
    owner = os.pread(handle, 300, 0).decode(errors="replace").strip()
    who = f" ({owner})" if owner else ""
    if owner.startswith(f"pid {os.getpid()} "):
        cure = "finish() or close() what it began there, or choose another folder."
        return f"this process{who} still works in {str(file.parent)!r}: {cure}"
    return f"another process{who} works in {str(file.parent)!r}; wait for it, or choose another folder."


@cache
def _tell_once() -> None:
    print("note: no locks here; take care yourself that no second process works in this folder.", file=sys.stderr)
