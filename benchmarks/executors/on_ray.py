"""Jobs as Ray tasks, on this machine or on a cluster whose nodes share the folder of results."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import prefzoo
import prefzoo.algos
import prefzoo.losses
from prefzoo.benchmarks import work
from prefzoo.benchmarks.executors.base import Ended, Signals
from prefzoo.registry import UsageError
from prefzoo.source import source_hash

if TYPE_CHECKING:
    from prefzoo.benchmarks.jobs import Job

GiB = 2**30
STORE = 128 * 2**20  # bytes of Ray's store: endings are small
LOOK = 300.0  # seconds for a node to import prefzoo


@dataclass(frozen=True)
class Ray:
    """A Ray task for each job: one core, and one GPU for a job that wants one.

    Every node needs the same prefzoo, the user's files and the folder of results at the same paths: that is looked at
    before the first job. What a lost node had begun goes on from its last checkpoint elsewhere.

    Args:
        address: of a cluster: "auto" for that of this node, host:port, or ray://host:10001; None: a Ray of its own on
            this machine, which ends with the suite.
        workers: tasks at a time; None: as many as there are cores, counted when the suite begins.
        device: for the jobs that want a GPU: auto (a GPU if the cluster has any), cpu or cuda.
    """

    address: str | None = None
    workers: int | None = None
    device: str = "auto"

    @contextlib.contextmanager
    def open(self, out: Path, imports: Sequence[Path], signals: Signals) -> Iterator[_RayCrew]:
        with _connected(self.address, self.workers) as ray:
            has = ray.cluster_resources()
            if self.device == "cuda" and not has.get("GPU"):
                raise UsageError("--device cuda: this Ray cluster has no GPU. --device auto uses the CPU then.")
            _look_at_nodes(ray, out, imports)
            width = self.workers or max(1, int(has.get("CPU", 1)))
            yield _RayCrew(ray, width, self.device != "cpu" and bool(has.get("GPU")), imports, signals)


class _RayCrew:
    def __init__(self, ray: Any, width: int, gpus: bool, imports: Sequence[Path], signals: Signals) -> None:
        self.width = width
        self._ray = ray
        self._gpus = gpus
        self._most = max((node["Resources"].get("memory", 0) for node in _nodes(ray)), default=0)
        self._imports = tuple(imports)
        self._signals = signals
        self._running: dict[Any, str] = {}  # the promise of an ending -> job

    def start(self, job: Job, inputs: Mapping[str, Path], folder: Path) -> bool:
        if len(self._running) == self.width:
            return False
        on_device = self._gpus and job.on_device
        memory = None if on_device else job.memory or None  # Ray counts the machine's; a GPU is taken whole
        most = self._most
        if memory and memory > most:
            raise UsageError(
                f"it needs {memory / GiB:.1f} GiB, and no Ray node has more than {self._most / GiB:.1f} GiB."
            )
        task = self._ray.remote(_task).options(
            name=job.name, num_cpus=1, num_gpus=int(on_device), memory=memory, max_retries=0
        )
        inputs = {name: path.resolve() for name, path in inputs.items()}
        promise = task.remote(job.call, dict(job.params), inputs, folder.resolve(), self._imports, on_device)
        self._running[promise] = job.name
        return True

    def wait(self, seconds: float) -> list[Ended]:
        if not self._running:
            return []
        ready, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=seconds)
        return [self._end(promise) for promise in ready] if not self._signals.seen else []

    def _end(self, promise: Any) -> Ended:
        name = self._running.pop(promise)
        try:
            facts, error = self._ray.get(promise)
        except self._ray.exceptions.RayTaskError as raised:  # not by the job: its errors are told, not raised
            facts, error = None, str(raised)
        except self._ray.exceptions.RayError:  # the worker or its node is gone
            facts = error = None
        return Ended(name, facts, error)

    def stop(self) -> None:
        """They hear ``KeyboardInterrupt``; who takes longer than half a minute, or until a second signal, is killed."""
        for promise in self._running:
            self._ray.cancel(promise)
        told, deadline = len(self._signals.seen), time.monotonic() + work.PATIENCE
        left = list(self._running)
        while left and time.monotonic() < deadline and len(self._signals.seen) == told:
            _, left = self._ray.wait(left, num_returns=len(left), timeout=0.2)
        for promise in left:
            self._ray.cancel(promise, force=True)


@contextlib.contextmanager
def _connected(address: str | None, workers: int | None) -> Iterator[Any]:
    """Ray, connected: to what this process is connected with already, else to a cluster or to one of its own."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with _handlers_kept():
            import ray
    except ImportError as error:
        raise UsageError("executor ray: Ray is not installed. pip install 'prefzoo[ray]'") from error
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"address": address or "local", "log_to_driver": False, "logging_level": "ERROR"}
    if not address:
        options |= {"num_cpus": workers or os.cpu_count(), "include_dashboard": False, "object_store_memory": STORE}
    try:
        with _handlers_kept():
            ray.init(**options)
    except ConnectionError as error:
        why = str(error).strip().partition("\n")[0]
        cure = "On its head node: ray start --head"
        raise UsageError(f"executor ray: no Ray answers at {address!r} ({why}). {cure}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray ends the process at SIGTERM; the suite has to stop its jobs before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _nodes(ray: Any) -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]


# ------------------------------------------------------------------------------------------------------- on the nodes


def _task(
    call: str, params: dict[str, Any], inputs: dict[str, Path], folder: Path, imports: Sequence[Path], on_device: bool
) -> work.Ending:
    if not on_device:
        os.environ["CUDA_VISIBLE_DEVICES"] = work.HIDDEN
    try:
        work.settle(imports)
    except UsageError as error:
        return None, str(error)
    return work.work(call, params, inputs, folder)


def _look_at_nodes(ray: Any, out: Path, imports: Sequence[Path]) -> None:
    """An error in words where a node does not see the folder, the user's files or this prefzoo."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = out.resolve() / f".probe-{uuid.uuid4().hex}"
    probe.write_text("a file that every node must see")
    seen = {str(path): source_hash([path]) for path in (probe, *imports)}
    try:
        answers = {}
        for node in _nodes(ray):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            look = ray.remote(_look).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            answers[f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"] = look.remote(seen, _code())
        for name, answer in answers.items():
            try:
                problem = ray.get(answer, timeout=LOOK)
            except ray.exceptions.RayError as error:
                problem = f"prefzoo does not run there: {str(error).strip().splitlines()[-1]}"
            if problem:
                raise UsageError(f"executor ray, node {name}: {problem}")
    finally:
        probe.unlink(missing_ok=True)


def _look(seen: Mapping[str, str], code: str) -> str | None:
    """What is missing on this node."""
    probe, *_ = seen
    for name, content in seen.items():
        file = Path(name)
        if not file.is_file() and name == probe:
            return (
                f"it does not see the folder {str(file.parent)!r}. --out must be on a file system that all nodes share."
            )
        if not file.is_file() or source_hash([file]) != content:
            return f"{name!r} is missing there, or another file. Put it on a file system that all nodes share."
    if code != _code():
        return f"its prefzoo ({prefzoo.__version__}) is not that of this process. Install the same one on all nodes."
    return None


def _code() -> str:
    """Hash of the code here that makes numbers."""
    from prefzoo.benchmarks.jobs import everything_hash

    folders = [Path(part.__path__[0]).resolve() for part in (prefzoo.algos, prefzoo.losses)]
    return everything_hash() + source_hash({file for folder in folders for file in folder.rglob("*.py")})
