"""Jobs: units of work named by the hash of what they are made from, each run once.

A job's key hashes its function, its parameters, the keys of what it needs, the package's version and the source of the
shared layer and of every registered function it uses. Its folder is written aside and renamed when it is complete, so
a finished job is never run again and an edited loss never gets an old result. Where jobs run is an executor's business
(``executors``), what a worker does is in ``work``; here is the order of things.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import prefzoo
import prefzoo.losses
from prefzoo.benchmarks import work
from prefzoo.benchmarks.executors import Executor, Signals, Workers
from prefzoo.registry import UsageError
from prefzoo.source import layer_files, source_hash
from prefzoo.training import Stopped

DEATHS = 3  # of a job's processes, then it has failed

# The files of the harness that make numbers, relative to this one. Statistics and reports are made anew every time.
HARNESS = (
    "jobs.py", "work.py", "tasks.py", "judges.py", "materials.py", "cells.py", "budgets.py", "rewards.py",
    "judging/*.py", "statistics/samples.py",
)  # fmt: skip
# What registered losses share. They themselves are left out: each counts for the jobs that use it (Job.sources).
LOSSES = ("base.py", "advantages.py", "kl.py", "numerics.py")


@dataclass(frozen=True)
class Job:
    """``call`` is ``"module:function"`` with the signature ``(params, inputs, folder) -> facts``.

    Args:
        params: ``how`` among them changes no result (a timeout, a limit of calls), and is no part of the key.
        needs: names of inputs -> names of the jobs that make them.
        weight: expected seconds; of the jobs that are ready the longest starts first.
        sources: hashes of the registered functions that it uses.
        role: shared, trial, choice, cell or judgement; no part of the key.
        memory: bytes that it is expected to need, of the GPU if it wants one, else of the machine; 0: unknown.
        on_device: whether it wants a GPU. Without one it runs on the CPU.
        optional: names of inputs whose jobs may fail. It is done without these then, in a folder of another name, so
            that it is done again when they are there.
    """

    name: str
    call: str
    params: Mapping[str, Any]
    needs: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    sources: Mapping[str, str] = field(default_factory=dict)
    role: str = "shared"
    memory: int = 0
    on_device: bool = False
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its folder and facts, or the reason why there are none."""

    name: str
    key: str
    folder: Path
    facts: Mapping[str, Any] | None = None
    error: str | None = None
    reused: bool = False
    role: str = "shared"


@cache
def everything_hash() -> str:
    """Hash of the source that every result depends on: the shared layer, the harness, what losses share."""
    here, losses = Path(__file__).resolve().parent, Path(prefzoo.losses.__file__).resolve().parent
    harness = {file for pattern in HARNESS for file in here.glob(pattern)}
    return source_hash({*layer_files(), *harness, *(losses / name for name in LOSSES)})


def keys_of(jobs: Sequence[Job]) -> dict[str, str]:
    """The content hash of every job; jobs are listed after what they need."""
    keys: dict[str, str] = {}
    for job in jobs:
        facts = {
            "call": job.call,
            "params": {k: v for k, v in job.params.items() if k != "how"},
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
    executor: Executor | None = None,
    workers: int = 1,
    imports: Sequence[Path] = (),
    report: Callable[[Outcome, int, int], None] = lambda outcome, done, total: None,
    note: Callable[[str], None] = lambda words: None,
) -> dict[str, Outcome]:
    """Run jobs as their inputs become ready; a finished one is kept, a failed one fails what needs it.

    A job whose process dies is tried again, and goes on where it was; at the third death it has failed.

    Args:
        jobs: each after what it needs.
        out: their folders are made in ``out/cells``.
        executor: where they run; None: ``Workers(workers)``.
        imports: Python files of the user, imported by every process that does jobs.
        report: called with each outcome, the count of outcomes and of jobs.
        note: called with what a person should hear.

    Raises ``Stopped`` after Ctrl-C or SIGTERM: every job has then written where it is, as far as it could.
    """
    keys = keys_of(jobs)
    planned = {j.name: out / "cells" / f"{j.name.replace('/', '-')}-{keys[j.name]}" for j in jobs}
    folders = dict(planned)
    done: dict[str, Outcome] = {}
    waiting = list(jobs)
    running: dict[str, Job] = {}
    deaths: Counter[str] = Counter()
    (out / "cells").mkdir(parents=True, exist_ok=True)

    def finish(job: Job, facts: Mapping[str, Any] | None, error: str | None = None, reused: bool = False) -> None:
        done[job.name] = Outcome(job.name, keys[job.name], folders[job.name], facts, error, reused, job.role)
        report(done[job.name], len(done), len(jobs))

    for job in jobs:
        facts = work.finished(folders[job.name])
        if facts is not None:
            work.lock_of(folders[job.name]).unlink(missing_ok=True)  # of a worker that was killed as it left
            finish(job, facts, reused=True)
            waiting.remove(job)
    if not waiting:
        return done
    with Signals() as signals, (executor or Workers(workers)).open(out, imports, signals) as crew:
        try:
            while waiting or running:
                if signals.seen:
                    raise Stopped(signals.seen[0])
                for job in sorted(waiting, key=lambda j: -j.weight):
                    failed = {k for k, n in job.needs.items() if n in done and done[n].error}
                    broken = [job.needs[k] for k in sorted(failed - set(job.optional))]
                    if broken:
                        waiting.remove(job)
                        finish(job, None, f"it needs {broken[0]}, which failed")
                    elif all(n in done for n in job.needs.values()):
                        folders[job.name] = _folder_of(job, planned, done)
                        facts = work.finished(folders[job.name])
                        if facts is not None:
                            waiting.remove(job)
                            finish(job, facts, reused=True)
                            continue
                        inputs = {k: done[n].folder for k, n in job.needs.items() if k not in failed}
                        try:
                            started = crew.start(job, inputs, folders[job.name])
                        except UsageError as refusal:
                            waiting.remove(job)
                            finish(job, None, str(refusal))
                            continue
                        if started:
                            waiting.remove(job)
                            running[job.name] = job
                # Signals are looked for in between: an exception in the midst of anything would be worse.
                for ended in crew.wait(0.2):
                    job = running.pop(ended.name)
                    if not ended.died:
                        finish(job, ended.facts, ended.error)
                        continue
                    deaths[job.name] += 1
                    if deaths[job.name] == DEATHS:
                        few = " With fewer --workers each has more memory." if crew.width > 1 else ""
                        finish(job, None, f"its process died three times (killed, or out of memory?).{few}")
                    else:
                        note(f"{job.name}: its process died; another one goes on with it")
                        waiting.append(job)
        except BaseException as error:
            crew.stop()
            if isinstance(error, Stopped):
                whole = sum(work.finished(f) is not None for f in folders.values())
                error.args = (f"stopped: {whole} of {len(jobs)} jobs are done; the same command goes on",)
            raise
    return done


def _folder_of(job: Job, planned: Mapping[str, Path], done: Mapping[str, Outcome]) -> Path:
    """The planned folder, or one beside it where inputs failed or were made without theirs: the key tells not that."""
    unusual = {
        k: None if done[n].error else done[n].folder.name
        for k, n in sorted(job.needs.items())
        if done[n].error or done[n].folder != planned[n]
    }
    beside = hashlib.sha256(json.dumps(unusual).encode()).hexdigest()[:8]
    folder = planned[job.name]
    return folder.with_name(f"{folder.name}-without-{beside}") if unusual else folder


@dataclass(frozen=True)
class Saved:
    """Seconds that were not spent: on shared jobs, by name, and on what an earlier call had done."""

    shared: Mapping[str, float]
    reused: float

    @property
    def seconds(self) -> float:
        return sum(self.shared.values()) + self.reused


def saved(jobs: Sequence[Job], outcomes: Mapping[str, Outcome]) -> Saved:
    """What a suite saved: without sharing, every cell would make for itself the shared jobs and choices it rests on.

    shared(a) = seconds(a) * (number of cells and trials that need a - 1)

    """
    rests: dict[str, set[str]] = {}  # a shared job or choice -> those that it rests on, itself too
    users: Counter[str] = Counter()
    for job in jobs:
        on = set().union(*(rests.get(name, set()) for name in job.needs.values()))
        if job.role in ("shared", "choice"):
            rests[job.name] = on | {job.name}
        elif job.role in ("cell", "trial"):
            users.update(on)
    spent = {name: float(o.facts["seconds"]) for name, o in outcomes.items() if o.facts}
    return Saved(
        {name: spent[name] * (count - 1) for name, count in users.items() if name in spent and count > 1},
        sum(spent[name] for name, o in outcomes.items() if o.reused and name in spent),
    )
