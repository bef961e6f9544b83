"""The comparison harness: which algorithm is better, by how much, and how sure is that?"""

if __name__ != "prefzoo.benchmarks":
    raise ImportError("import prefzoo.benchmarks, not benchmarks: the folder is a part of the package 'prefzoo'")

from prefzoo.benchmarks.compare import Comparison, compare
from prefzoo.benchmarks.report import report
from prefzoo.benchmarks.runner import run
from prefzoo.benchmarks.suites import SUITES, Method, Suite, Task, get_suite

__all__ = ["SUITES", "Comparison", "Method", "Suite", "Task", "compare", "get_suite", "report", "run"]
