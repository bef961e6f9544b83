"""Jobs: units of work named by the hash of what they are made from, run once, in worker processes.

A job's key hashes its function, its parameters, the keys of what it needs, the package's version and the source of the
shared layer and of every registered function it uses. Its folder is written aside and renamed when it is complete, so
a finished job is never run again and an edited loss never gets an old result. What a killed job had written stays
aside, and the next process goes on with it: whatever a job writes it must be able to write again, and it trains with
``resume=True``.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import prefzoo
import prefzoo.losses
from prefzoo.locks import locked
from prefzoo.plugins import import_file
from prefzoo.registry import UsageError
from prefzoo.source import layer_files, source_hash
from prefzoo.training import Stopped

PATIENCE = 30.0  # seconds that a worker has to write where it is, and that one waits for another's job


@dataclass(frozen=True)
class Job:
    """``call`` is ``"module:function"`` with the signature ``(params, inputs, folder) -> facts``.

    ``needs`` maps the names of inputs to the names of the jobs that make them. ``weight``: expected seconds; of the
    jobs that are ready the longest starts first. ``sources``: hashes of the registered functions it uses.
    """

    name: str
    call: str
    params: Mapping[str, Any]
    needs: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its folder and facts, or the reason why there are none."""

    name: str
    key: str
    folder: Path
    facts: Mapping[str, Any] | None = None
    error: str | None = None
    reused: bool = False


@cache
def everything_hash() -> str:
    """Hash of the source of the shared layer, of the jobs and of what losses share: what every result depends on.

    Registered losses are left out: each counts for the cells that use it (``Job.sources``).
    """
    shared = Path(prefzoo.losses.__file__).resolve().parent
    files = {*layer_files(), *(Path(__file__).with_name(n) for n in ("jobs.py", "tasks.py", "judges.py"))}
    return source_hash(files | {shared / f"{n}.py" for n in ("base", "advantages", "kl", "numerics")})


def keys_of(jobs: Sequence[Job]) -> dict[str, str]:
    """The content hash of every job; jobs are listed after what they need."""
    keys: dict[str, str] = {}
    for job in jobs:
        facts = {
            "call": job.call,
            "params": job.params,
            "needs": {k: keys[v] for k, v in sorted(job.needs.items())},
            "sources": job.sources,
            "version": prefzoo.__version__,
            "layer": everything_hash(),
        }
        keys[job.name] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return keys


def run_jobs(
    jobs: Sequence[Job],
    out: Path,
    *,
    workers: int = 1,
    imports: Sequence[Path] = (),
    report: Callable[[Outcome, int, int], None] = lambda outcome, done, total: None,
    note: Callable[[str], None] = lambda words: None,
) -> dict[str, Outcome]:
    """Run jobs as their inputs become ready, ``workers`` at a time, a thread each; a failed job fails what needs it.

    A job whose process dies is tried again, and goes on where it was; at the third death it has failed.

    Raises ``Stopped`` after Ctrl-C or SIGTERM: every worker has then written where it is, and left.
    """
    keys = keys_of(jobs)
    folders = {j.name: out / "cells" / f"{j.name.replace('/', '-')}-{keys[j.name]}" for j in jobs}
    done: dict[str, Outcome] = {}
    waiting = list(jobs)
    (out / "cells").mkdir(parents=True, exist_ok=True)

    def finish(job: Job, facts: Mapping[str, Any] | None, error: str | None = None, reused: bool = False) -> None:
        done[job.name] = Outcome(job.name, keys[job.name], folders[job.name], facts, error, reused)
        report(done[job.name], len(done), len(jobs))

    for job in jobs:
        facts = _finished(folders[job.name])
        if facts is not None:
            _lock_of(folders[job.name]).unlink(missing_ok=True)  # of a worker that was killed as it left
            finish(job, facts, reused=True)
            waiting.remove(job)
    idle: list[_Worker] = []
    running: dict[concurrent.futures.Future[Any], tuple[Job, _Worker]] = {}
    deaths: Counter[str] = Counter()
    stillborn = 0  # workers in a row that died before they began
    with _Signals() as signals:
        try:
            while waiting or running:
                if signals.seen:
                    raise Stopped(signals.seen[0])
                for job in sorted(waiting, key=lambda j: -j.weight):
                    broken = [n for n in job.needs.values() if n in done and done[n].error]
                    if broken:
                        waiting.remove(job)
                        finish(job, None, f"it needs {broken[0]}, which failed")
                    elif len(running) < workers and all(n in done for n in job.needs.values()):
                        worker = idle.pop() if idle else _Worker(imports, signals)
                        inputs = {k: folders[n] for k, n in job.needs.items()}
                        try:
                            future = worker.submit(_work, job.call, dict(job.params), inputs, folders[job.name])
                        except concurrent.futures.BrokenExecutor:  # it was killed while it had nothing to do
                            worker.leave()
                            continue
                        waiting.remove(job)
                        running[future] = job, worker
                # Signals are looked for in between: an exception in the midst of anything would be worse.
                ready, _ = concurrent.futures.wait(running, 0.2, concurrent.futures.FIRST_COMPLETED)
                for future in ready if not signals.seen else ():
                    job, worker = running.pop(future)
                    try:
                        facts, error = future.result()
                    except concurrent.futures.BrokenExecutor:
                        facts, error = None, None
                    stillborn = 0 if worker.began else stillborn + 1
                    if facts is not None or error is not None:
                        idle.append(worker)
                        finish(job, facts, error)
                        continue
                    worker.leave()
                    if stillborn == 3:
                        raise UsageError(
                            "the worker processes die before they begin; what they printed says why. A script that "
                            "runs a suite needs: if __name__ == '__main__'."
                        )
                    deaths[job.name] += worker.began
                    if deaths[job.name] == 3:
                        few = " With fewer --workers each has more memory." if workers > 1 else ""
                        finish(job, None, f"its process died three times (killed, or out of memory?).{few}")
                    else:
                        note(f"{job.name}: its process died; another one goes on with it")
                        waiting.append(job)
        except BaseException as error:
            _stop([worker for _, worker in running.values()], list(running), signals)
            if isinstance(error, Stopped):
                whole = sum(_finished(f) is not None for f in folders.values())
                error.args = (f"stopped: {whole} of {len(jobs)} jobs are done; the same command goes on",)
            raise
        finally:
            for worker in [*idle, *(w for _, w in running.values())]:
                worker.leave()
    return done


def _finished(folder: Path) -> dict[str, Any] | None:
    """The facts of a finished job."""
    file = folder / "facts.json"
    return json.loads(file.read_text()) if file.exists() else None


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


# ------------------------------------------------------------------------------------------ the parent's side


class _Signals:
    """Ctrl-C and SIGTERM are noted in ``seen``. Only a program's main thread can do that; elsewhere they are left."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, lambda n, _: self.seen.append(n))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def no_interrupt(self) -> Iterator[None]:
        """A process that is started here never hears Ctrl-C, not even while it imports."""
        if not self._before:
            yield
            return
        mine = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, mine)


class _Worker:
    """A process for one job at a time, alone in its pool: its death takes nobody else with it."""

    def __init__(self, imports: Sequence[Path], signals: _Signals) -> None:
        context = multiprocessing.get_context("spawn")  # a forked torch deadlocks
        self._pool = concurrent.futures.ProcessPoolExecutor(1, context, _begin, (tuple(imports),))
        with signals.no_interrupt():
            self._first = self._pool.submit(os.getpid)

    @property
    def began(self) -> bool:
        """Whether it came as far as its first call."""
        return self._first.done() and self._first.exception() is None

    def submit(self, *call: Any) -> concurrent.futures.Future[Any]:
        return self._pool.submit(*call)

    def processes(self) -> list[Any]:
        return list((getattr(self._pool, "_processes", None) or {}).values())

    def leave(self) -> None:
        self._pool.shutdown()


def _stop(workers: Sequence[_Worker], calls: Sequence[concurrent.futures.Future[Any]], signals: _Signals) -> None:
    """Tell them to write where they are; who takes longer than half a minute, or until a second signal, is killed."""
    processes = [p for w in workers for p in w.processes()]
    for process in processes:
        process.terminate()
    told, deadline = len(signals.seen), time.monotonic() + PATIENCE
    while time.monotonic() < deadline and len(signals.seen) == told:
        if not concurrent.futures.wait(calls, 0.2).not_done:
            return
    for process in processes:
        process.kill()


# ------------------------------------------------------------------------------------------ the worker's side

_busy = threading.Event()
_told = threading.Event()  # to stop


def _begin(imports: Sequence[Path]) -> None:
    """Once per worker: one thread each, users' files registered."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's Ctrl-C the parent hears as well, and tells
    signal.signal(signal.SIGTERM, _terminated)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # models of this size run on the CPU, the same wherever the suite is run
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
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


def _work(
    call: str, params: dict[str, Any], inputs: dict[str, Path], folder: Path
) -> tuple[dict[str, Any] | None, str | None]:
    """The facts of a job, or why it has none; neither where the worker was told to stop."""
    try:
        _busy.set()
        if _told.is_set():
            return None, None
        # The worker of a suite that was killed leaves a moment later, and must not write beside this one.
        with locked(folder.parent, wait=PATIENCE, name=_lock_of(folder).name):
            return _finish(call, params, inputs, folder)
    except KeyboardInterrupt:
        return None, None
    except UsageError as error:  # not by the job: its folder is locked, or cannot be written to
        return None, str(error)
    finally:
        _busy.clear()


def _finish(
    call: str, params: dict[str, Any], inputs: dict[str, Path], folder: Path
) -> tuple[dict[str, Any] | None, str | None]:
    """Do a job, or what is left to do of it: what a killed process had begun lies in the folder aside."""
    aside, failed = folder.with_name(f".{folder.name}.part"), folder.with_name(f"{folder.name}.failed")
    facts = _finished(folder)
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
