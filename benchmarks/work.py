"""The worker's side: do one job in its folder, or what is left to do of it, and tell how it ended.

A job writes into a folder aside, which is renamed when it is complete. What a killed job had written stays aside, and
the next process goes on with it: whatever a job writes it must be able to write again, and it trains with
``resume=True``.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefzoo.locks import locked
from prefzoo.plugins import import_file
from prefzoo.registry import UsageError

PATIENCE = 30.0  # seconds that a worker has to write where it is, and that one waits for another's job
HIDDEN = ""  # CUDA_VISIBLE_DEVICES of a job on the CPU: it must be the same there, whatever the machine has

Ending = tuple[dict[str, Any] | None, str | None]  # the facts of a job, or why it has none; neither: it was stopped

_busy = threading.Event()
_told = threading.Event()  # to stop


def finished(folder: Path) -> dict[str, Any] | None:
    """The facts of a finished job."""
    file = folder / "facts.json"
    return json.loads(file.read_text()) if file.exists() else None


def lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def begin(imports: Sequence[Path], gpu: str) -> None:
    """Once per worker process: its GPU, one thread, users' files registered; it leaves when its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's Ctrl-C the parent hears as well, and tells
    signal.signal(signal.SIGTERM, _terminated)
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    settle(imports)


def settle(imports: Sequence[Path]) -> None:
    """What every process that does jobs has in common, so that they give the same numbers everywhere."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(1)
    for path in imports:
        import_file(path)


def _terminated(*_: object) -> None:
    first = not _told.is_set()
    _told.set()
    if first and _busy.is_set():
        raise KeyboardInterrupt


def _leave_with_parent() -> None:
    """A worker whose suite was killed must not go on training for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def work(call: str, params: dict[str, Any], inputs: dict[str, Path], folder: Path) -> Ending:
    """Do a job in a worker process, which may be told to stop."""
    try:
        _busy.set()
        return (None, None) if _told.is_set() else do(call, params, inputs, folder)
    except KeyboardInterrupt:
        return None, None
    finally:
        _busy.clear()


def do(call: str, params: dict[str, Any], inputs: dict[str, Path], folder: Path) -> Ending:
    """Do a job while nobody else does it. ``KeyboardInterrupt`` passes: what it left aside can be gone on with."""
    try:
        # The worker of a suite that was killed leaves a moment later, and must not write beside this one.
        with locked(folder.parent, wait=PATIENCE, name=lock_of(folder).name):
            return _finish(call, params, inputs, folder)
    except UsageError as error:  # not by the job: its folder is locked, or cannot be written to
        return None, str(error)
    finally:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # other workers' jobs may have this GPU's memory now


def _finish(call: str, params: dict[str, Any], inputs: dict[str, Path], folder: Path) -> Ending:
    """Do a job, or what is left to do of it: what a killed process had begun lies in the folder aside."""
    aside, failed = folder.with_name(f".{folder.name}.part"), folder.with_name(f"{folder.name}.failed")
    facts = finished(folder)
    if facts is not None:  # whoever had the lock has done it
        return facts, None
    module, _, function = call.partition(":")
    started, worked = time.monotonic(), time.process_time()
    _reset_peak_memory()
    try:
        shutil.rmtree(failed, ignore_errors=True)
        aside.mkdir(parents=True, exist_ok=True)
        facts = getattr(importlib.import_module(module), function)(params, inputs, aside)
        took = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - worked}
        facts = {**facts, **took, "peak_memory": _peak_memory()}
        (aside / "facts.json").write_text(json.dumps(facts, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except Exception as error:  # a failed cell is kept and shown; it must not take the suite with it
        told = isinstance(error, UsageError | RuntimeError) and str(error).strip()
        reason = str(error) if told else traceback.format_exc(limit=-4)
        if _disk_is_full(error):  # no fault of the job: the next call goes on with it
            return None, reason
        with contextlib.suppress(OSError):
            (aside / "error.txt").write_text(traceback.format_exc())
            aside.rename(failed)
        return None, reason
    return facts, None


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error):  # safetensors and tokenizers have errors of their own
            return True
        error = error.__cause__ or error.__context__
    return False


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then of the worker's whole life
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
