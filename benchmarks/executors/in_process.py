"""Jobs in this process, one after the other: for debuggers, breakpoints and notebooks."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefzoo.benchmarks import work
from prefzoo.benchmarks.executors.base import Ended, Signals
from prefzoo.registry import UsageError
from prefzoo.training import Stopped

if TYPE_CHECKING:
    from prefzoo.benchmarks.jobs import Job

MASK = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class InProcess:
    """One job at a time in this process. A job that ends the process ends the suite; the next call goes on with it.

    Args:
        device: for the jobs that want a GPU: auto (what this process sees), cpu or cuda. Others see none, unless CUDA
            was used in this process before.
    """

    device: str = "auto"

    @contextlib.contextmanager
    def open(self, out: Path, imports: Sequence[Path], signals: Signals) -> Iterator[_InProcessCrew]:
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: this process sees no GPU. --device auto uses the CPU then.")
        threads, mask = torch.get_num_threads(), os.environ.get(MASK)
        work.settle(imports)
        try:
            yield _InProcessCrew(signals, work.HIDDEN if self.device == "cpu" else mask)
        finally:
            torch.set_num_threads(threads)
            _set_mask(mask)


class _InProcessCrew:
    width = 1

    def __init__(self, signals: Signals, mask: str | None) -> None:
        self._signals = signals
        self._mask = mask
        self._ended: list[Ended] = []

    def start(self, job: Job, inputs: Mapping[str, Path], folder: Path) -> bool:
        if self._ended or self._signals.seen:
            return False
        _set_mask(self._mask if job.on_device else work.HIDDEN)
        try:
            with self._signals.raised():
                facts, error = work.do(job.call, dict(job.params), dict(inputs), folder)
        except KeyboardInterrupt as stop:  # training listens itself, and tells by what it was stopped
            if not self._signals.seen:
                self._signals.seen.append(stop.exit_code - 128 if isinstance(stop, Stopped) else signal.SIGINT)
            return False
        self._ended.append(Ended(job.name, facts, error))
        return True

    def wait(self, seconds: float) -> list[Ended]:
        ended, self._ended = self._ended, []
        return ended

    def stop(self) -> None:
        pass


def _set_mask(mask: str | None) -> None:
    if mask is None:
        os.environ.pop(MASK, None)
    else:
        os.environ[MASK] = mask
