"""Jobs in worker processes of this machine: the death of one takes nothing but its job, and that is gone on with."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefzoo.benchmarks import work
from prefzoo.benchmarks.executors.base import Ended, Signals
from prefzoo.benchmarks.executors.gpus import Gpu, Places, usable_gpus
from prefzoo.registry import UsageError

if TYPE_CHECKING:
    from prefzoo.benchmarks.jobs import Job

Call = concurrent.futures.Future[Any]


@dataclass(frozen=True)
class Workers:
    """Processes of one thread each. A job that wants a GPU gets the one with the most free memory, or waits for it.

    Args:
        count: how many; None: one per core.
        device: for the jobs that want a GPU: auto (a GPU where there is one), cpu or cuda. Others see none.
    """

    count: int | None = None
    device: str = "auto"

    @contextlib.contextmanager
    def open(self, out: Path, imports: Sequence[Path], signals: Signals) -> Iterator[_WorkersCrew]:
        crew = _WorkersCrew(self.count or os.cpu_count() or 1, usable_gpus(self.device), imports, signals)
        try:
            yield crew
        finally:
            crew.leave()


class _WorkersCrew:
    def __init__(self, width: int, gpus: Sequence[Gpu], imports: Sequence[Path], signals: Signals) -> None:
        self.width = width
        self._places = Places(gpus, width) if gpus else None
        self._imports = imports
        self._signals = signals
        self._idle: list[_Worker] = []
        self._running: dict[Call, tuple[str, _Worker]] = {}
        self._stillborn = 0  # workers in a row that died before they began

    def start(self, job: Job, inputs: Mapping[str, Path], folder: Path) -> bool:
        if len(self._running) == self.width:
            return False
        gpu = self._places.take(job.name, job.memory) if self._places and job.on_device else work.HIDDEN
        if gpu is None:
            return False
        worker = self._worker(gpu)
        try:
            call = worker.submit(work.work, job.call, dict(job.params), dict(inputs), folder)
        except concurrent.futures.BrokenExecutor:  # it was killed while it had nothing to do
            worker.leave()
            self._give_back(job.name)
            return False
        self._running[call] = job.name, worker
        return True

    def _worker(self, gpu: str) -> _Worker:
        """An idle process that sees this GPU, else a new one: a process keeps the GPU that it was born with."""
        for worker in self._idle:
            if worker.gpu == gpu:
                self._idle.remove(worker)
                return worker
        if len(self._idle) + len(self._running) == self.width:
            self._idle.pop(0).leave()
        return _Worker(self._imports, self._signals, gpu)

    def _give_back(self, name: str) -> None:
        if self._places:
            self._places.give_back(name)

    def wait(self, seconds: float) -> list[Ended]:
        ready, _ = concurrent.futures.wait(self._running, seconds, concurrent.futures.FIRST_COMPLETED)
        # After a signal a job without facts was stopped; it did not die.
        return [self._end(call) for call in ready] if not self._signals.seen else []

    def _end(self, call: Call) -> Ended:
        name, worker = self._running.pop(call)
        self._give_back(name)
        try:
            facts, error = call.result()
        except concurrent.futures.BrokenExecutor:
            facts = error = None
        self._stillborn = 0 if worker.began else self._stillborn + 1
        ended = Ended(name, facts, error)
        if ended.died:
            worker.leave()
        else:
            self._idle.append(worker)
        if self._stillborn == 3:
            raise UsageError(
                "the worker processes die before they begin; what they printed says why. A script that runs a suite "
                "needs: if __name__ == '__main__'."
            )
        return ended

    def stop(self) -> None:
        """Who takes longer than half a minute, or until a second signal, is killed."""
        processes = [p for _, worker in self._running.values() for p in worker.processes()]
        for process in processes:
            process.terminate()
        told, deadline = len(self._signals.seen), time.monotonic() + work.PATIENCE
        while time.monotonic() < deadline and len(self._signals.seen) == told:
            if not concurrent.futures.wait(self._running, 0.2).not_done:
                return
        for process in processes:
            process.kill()

    def leave(self) -> None:
        for worker in [*self._idle, *(worker for _, worker in self._running.values())]:
            worker.leave()


class _Worker:
    """A process for one job at a time, alone in its pool: its death takes nobody else with it."""

    def __init__(self, imports: Sequence[Path], signals: Signals, gpu: str) -> None:
        self.gpu = gpu
        context = multiprocessing.get_context("spawn")  # a forked torch deadlocks
        self._pool = concurrent.futures.ProcessPoolExecutor(1, context, work.begin, (tuple(imports), gpu))
        with signals.no_interrupt():
            self._first = self._pool.submit(os.getpid)

    @property
    def began(self) -> bool:
        """Whether it came as far as its first call."""
        return self._first.done() and self._first.exception() is None

    def submit(self, *call: Any) -> Call:
        return self._pool.submit(*call)

    def processes(self) -> list[Any]:
        return list((getattr(self._pool, "_processes", None) or {}).values())

    def leave(self) -> None:
        self._pool.shutdown()
