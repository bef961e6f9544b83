"""What an executor is: where the jobs of a suite run, and never what they give."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from prefzoo.benchmarks.jobs import Job


class Ended(NamedTuple):
    """A job that ended: with facts, with the reason why there are none, or with neither: its process died."""

    name: str
    facts: Mapping[str, Any] | None
    error: str | None

    @property
    def died(self) -> bool:
        return self.facts is None and self.error is None


class Crew(Protocol):
    """The processes of an executor while a suite runs."""

    width: int  # jobs at a time

    def start(self, job: Job, inputs: Mapping[str, Path], folder: Path) -> bool:
        """Begin a job, or say that there is no room for it now. ``UsageError``: there never will be."""

    def wait(self, seconds: float) -> list[Ended]:
        """The jobs that have ended, after at most so many seconds."""

    def stop(self) -> None:
        """Let all jobs write where they are, and come back when they have, or could have."""


class Executor(Protocol):
    """Where jobs run. ``open`` gives its crew as a context manager, at whose end nothing of it is left."""

    def open(self, out: Path, imports: Sequence[Path], signals: Signals) -> AbstractContextManager[Crew]: ...


class Signals:
    """Ctrl-C and SIGTERM are noted in ``seen``. Only a program's main thread can do that; elsewhere they are left."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._before: dict[int, Any] = {}
        self._raising = False

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.seen.append(number)
        if self._raising:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """In here they end what is being done, by ``KeyboardInterrupt``."""
        self._raising = True
        try:
            yield
        finally:
            self._raising = False

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
