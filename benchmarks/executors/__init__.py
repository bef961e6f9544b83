"""Where the jobs of a suite run: in this process, in worker processes, on a Ray cluster. What they give is the same."""

from prefzoo.benchmarks.executors.base import Crew, Ended, Executor, Signals
from prefzoo.benchmarks.executors.in_process import InProcess
from prefzoo.benchmarks.executors.workers import Workers

__all__ = ["Crew", "Ended", "Executor", "InProcess", "Signals", "Workers"]
