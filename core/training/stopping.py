"""SIGTERM, SIGHUP and Ctrl-C: a run ends where its state is whole, so that it can go on from there."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))  # a lost terminal


class Stopped(KeyboardInterrupt):
    """A run was asked to end, and ended; ``output_dir`` has a checkpoint that it goes on from."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Stopping:
    """A context manager: inside it, SIGTERM, SIGHUP and Ctrl-C raise :class:`Stopped`, never in a section that is held.

    ``immediate=False`` (several processes, which must stop together): only :attr:`wanted` is set, and who runs the
    loop asks for it; if that takes longer than ``PATIENCE`` seconds, it is raised after all: this process may hang, and
    launchers kill what has not ended after 30. A second Ctrl-C raises KeyboardInterrupt wherever it comes. Outside the
    main thread, or where signals are ignored (nohup, workers of a suite), nothing is installed.
    """

    PATIENCE = 15.0

    def __init__(self, immediate: bool = True) -> None:
        self.immediate = immediate
        self.wanted: int | None = None
        self.held = 0
        self.ending = False  # what was asked for is being done
        self._overdue = False
        self._depth = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopping:
        self._depth += 1
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before.clear()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Nothing is raised in here; what came meanwhile is raised at the end."""
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1
        if self.immediate:
            self.check(self.wanted)

    def check(self, wanted: int | None) -> None:
        """Raise if somebody asked to stop: again, where user code has swallowed it, until the run is :attr:`ending`."""
        if wanted is not None and not self.held and not self.ending:
            self.wanted = wanted
            raise Stopped(wanted)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._overdue:
            return self.check(self.wanted)
        if self.wanted is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.wanted = number
        if self.immediate:
            return self.check(number)
        timer = threading.Timer(self.PATIENCE, self._again, [number])
        timer.daemon = True
        timer.start()

    def _again(self, number: int) -> None:
        """Wake the main thread, whatever system call it waits in."""
        if self._depth > 0 and not self.ending and (thread := threading.main_thread().ident) is not None:
            self._overdue = True
            signal.pthread_kill(thread, number)
