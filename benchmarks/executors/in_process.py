"""Jobs in this process, one after the other: for debuggers, breakpoints and notebooks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT
from typing import TYPE_CHECKING

from prefzoo.benchmarks import work
from prefzoo.benchmarks.executors.base import Ended, Signals
from prefzoo.training import Stopped

if TYPE_CHECKING:
    from prefzoo.benchmarks.jobs import Job


@dataclass(frozen=True)
class InProcess:
    """One job at a time in this process. A job that ends the process ends the suite; the next call goes on with it.

    Args:
        device: "cpu" hides the GPUs from jobs; else a job that wants one finds those that this process sees.
    """

    device: str = "auto"

    @contextlib.contextmanager
    def open(self, out: Path, imports: Sequence[Path], signals: Signals) -> Iterator[_InProcessCrew]:
        import torch

        threads, mask = torch.get_num_threads(), os.environ.get("CUDA_VISIBLE_DEVICES")
        work.settle(imports)
        try:
            yield _InProcessCrew(signals, None if self.device == "cpu" else mask)
        finally:
            torch.set_num_threads(threads)
            _set_mask(mask)


class _InProcessCrew:
    width = 1

    def __init__(self, signals: Signals, mask: str | None) -> None:
        self._signals = signals
        self._ended: list[Ended] = []

    def start(self, job: Job, inputs: Mapping[str, Path], folder: Path) -> bool:
        if self._ended or self._signals.seen:
            return False
        try:
            with self._signals.raised():
                facts, error = work.do(job.call, dict(job.params), dict(inputs), folder)
        except KeyboardInterrupt as stop:  # training listens itself, and tells by what it stopped
            if not self._signals.seen:
                self._signals.seen.append(stop.exit_code - 128 if isinstance(stop, Stopped) else SIGINT)
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
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = mask
