"""Jobs: units of work named by the hash of what they are made from, run once, in worker processes.

A job's key hashes its function, its parameters, the keys of what it needs, the package's version and the source of the
shared layer and of every registered function it uses. Its folder is written aside and renamed when it is complete, so
a finished job is never run again, an edited loss never gets an old result, and a killed suite goes on where it was.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil

import prefzoo
import prefzoo.losses
from prefzoo.plugins import import_file
from prefzoo.registry import UsageError
from prefzoo.source import layer_files, source_hash


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
    files = {*layer_files(), *(Path(__file__).with_name(n) for n in ("jobs.py", "tasks.py"))}
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
) -> dict[str, Outcome]:
    """Run jobs as their inputs become ready, ``workers`` at a time, a thread each; a failed job fails what needs it."""
    keys = keys_of(jobs)
    folders = {j.name: out / "cells" / f"{j.name.replace('/', '-')}-{keys[j.name]}" for j in jobs}
    done: dict[str, Outcome] = {}
    waiting = list(jobs)

    def finish(outcome: Outcome) -> None:
        done[outcome.name] = outcome
        report(outcome, len(done), len(jobs))

    for job in jobs:
        stored = folders[job.name] / "facts.json"
        if stored.exists():
            finish(Outcome(job.name, keys[job.name], folders[job.name], json.loads(stored.read_text()), reused=True))
            waiting.remove(job)
    if not waiting:
        return done
    context = multiprocessing.get_context("spawn")  # a forked torch deadlocks
    with concurrent.futures.ProcessPoolExecutor(workers, context, _begin, (tuple(imports),)) as pool:
        running: dict[concurrent.futures.Future[Any], Job] = {}
        while waiting or running:
            for job in sorted(waiting, key=lambda j: -j.weight):
                broken = [n for n in job.needs.values() if n in done and done[n].error]
                if broken:
                    waiting.remove(job)
                    reason = f"it needs {broken[0]}, which failed"
                    finish(Outcome(job.name, keys[job.name], folders[job.name], error=reason))
                elif len(running) < workers and all(n in done for n in job.needs.values()):
                    waiting.remove(job)
                    inputs = {k: folders[n] for k, n in job.needs.items()}
                    try:
                        future = pool.submit(_work, job.call, dict(job.params), inputs, folders[job.name])
                    except concurrent.futures.process.BrokenProcessPool:
                        raise _died(running.values()) from None
                    running[future] = job
            if not running:
                continue
            ready, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ready:
                try:
                    facts, error = future.result()
                except concurrent.futures.process.BrokenProcessPool:
                    raise _died(running.values()) from None
                job = running.pop(future)
                finish(Outcome(job.name, keys[job.name], folders[job.name], facts, error))
    return done


def _died(running: Iterable[Job]) -> UsageError:
    """Which of the processes it was is not known: when one dies, the others are stopped."""
    names = " or ".join(j.name for j in running) or "a job"
    return UsageError(
        f"{names}: its process died (killed, or out of memory); run the same command again to go on, "
        "with fewer --workers if memory was short."
    )


def _begin(imports: Sequence[Path]) -> None:
    """Once per worker: one thread each, users' files registered."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # models of this size run on the CPU, the same wherever the suite is run
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    for path in imports:
        import_file(path)


def _leave_with_parent() -> None:
    """A worker whose suite was killed must not go on training for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(call: str, params: dict[str, Any], inputs: dict[str, Path], folder: Path) -> tuple[Any, str | None]:
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    failed = folder.with_name(f"{folder.name}.failed")
    left = [f for f in folder.parent.glob(f".{folder.name}.*") if not psutil.pid_exists(int(f.suffix[1:]))]
    for stale in (failed, aside, *left):  # of a call that failed, or of processes that were killed
        shutil.rmtree(stale, ignore_errors=True)
    aside.mkdir(parents=True)
    module, _, function = call.partition(":")
    started = time.monotonic()
    _reset_peak_memory()
    try:
        facts = getattr(importlib.import_module(module), function)(params, inputs, aside)
    except Exception as error:  # a failed cell is kept and shown; it must not take the suite with it
        told = isinstance(error, UsageError | RuntimeError) and str(error).strip()
        reason = str(error) if told else traceback.format_exc(limit=-4)
        (aside / "error.txt").write_text(traceback.format_exc())
        aside.rename(failed)
        return None, reason
    facts = {**facts, "seconds": time.monotonic() - started, "peak_memory": _peak_memory()}
    (aside / "facts.json").write_text(json.dumps(facts, indent=1))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return facts, None


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
