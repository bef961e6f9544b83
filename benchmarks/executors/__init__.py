"""Where the jobs of a suite run: in this process, in worker processes, on a Ray cluster. What they give is the same."""

from __future__ import annotations

from prefzoo.benchmarks.executors.base import Crew, Ended, Executor, Signals
from prefzoo.benchmarks.executors.gpus import DEVICES
from prefzoo.benchmarks.executors.in_process import InProcess
from prefzoo.benchmarks.executors.on_ray import Ray
from prefzoo.benchmarks.executors.workers import Workers
from prefzoo.registry import UsageError, suggest

__all__ = ["DEVICES", "Crew", "Ended", "Executor", "InProcess", "Ray", "Signals", "Workers", "parse_executor"]

EXECUTORS = ("in-process", "workers", "ray")


def parse_executor(text: str = "workers", workers: int | None = None, device: str = "auto") -> Executor:
    """The executor that a command line names.

    Args:
        text: ``in-process``; ``workers`` or ``workers:4``, processes of this machine; ``ray``, a Ray of its own;
            ``ray:auto``, ``ray:host:port`` or ``ray://host:10001``, a cluster.
        workers: jobs at a time; None: one per core.
        device: for the jobs that want a GPU: ``auto``, ``cpu`` or ``cuda``.

    Errors: an unknown name or device; a number that is none; two numbers.

    >>> parse_executor("workers:4"), parse_executor("ray:auto", device="cpu")
    (Workers(count=4, device='auto'), Ray(address='auto', workers=None, device='cpu'))
    """
    if device not in DEVICES:
        raise UsageError(f"--device {device!r}: expected {', '.join(DEVICES)}{suggest(device, DEVICES)}")
    name, _, more = text.partition(":")
    if name == "in-process" and not more:
        if workers not in (None, 1):
            raise UsageError(f"--executor in-process does one job at a time; drop --workers {workers}.")
        return InProcess(device)
    if name == "workers":
        if more and not (more.isdecimal() and int(more)):
            raise UsageError(f"--executor {text!r}: expected a number of processes, as in workers:4.")
        if more and workers not in (None, int(more)):
            raise UsageError(f"--executor {text!r} and --workers {workers} differ: give one of them.")
        return Workers(int(more) if more else workers, device)
    if name == "ray":
        return Ray((text if more.startswith("//") else more) or None, workers, device)
    raise UsageError(f"--executor {text!r}: expected {', '.join(EXECUTORS)}{suggest(name, EXECUTORS)}")
