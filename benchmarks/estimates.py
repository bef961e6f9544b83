"""What a suite will take, before it runs: time, memory, disk. Guesses, and said to be guesses."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from prefzoo.algorithm import create_algorithm
from prefzoo.benchmarks.jobs import Job, keys_of
from prefzoo.benchmarks.plan import Plan
from prefzoo.benchmarks.suites import Suite, Task

PROCESS = 700 * 2**20  # bytes of a process that has imported the libraries
TRAINED, FROZEN = 16, 4  # bytes a parameter: weights, gradients and AdamW's two means; weights alone
ROW = 400  # bytes of a stored answer, compressed, with its scores
TINY = {"tiny": 340_000, "small": 1_800_000}  # parameters of our random models, about


@dataclass(frozen=True)
class Estimate:
    """``seconds`` of one core for what is left to do; ``wall`` with so many workers; ``memory`` of the largest process;
    ``disk`` of what stays. None: a model that is not here to be counted."""

    jobs: int
    finished: int
    seconds: float | None
    wall: float | None
    memory: int | None
    disk: int | None


def estimate(suite: Suite, plan: Plan, out: Path, workers: int) -> Estimate:
    """The time of a job is that of its like in the folder (same method, other seed), else what the suite declares for
    models of our worlds' size."""
    keys = keys_of(plan.jobs)
    seen: dict[str, list[float]] = {}
    left: list[Job] = []
    for job in plan.jobs:
        facts = out / "cells" / f"{job.name.replace('/', '-')}-{keys[job.name]}" / "facts.json"
        if facts.exists():
            with contextlib.suppress(ValueError, KeyError):
                seen.setdefault(_alike(job), []).append(json.loads(facts.read_text())["seconds"])
            continue
        left.append(job)
    sizes = {task.name: parameters(task.start.model) for task in suite.tasks}
    known = all(n is not None and n <= 2 * TINY["small"] for n in sizes.values())
    times = [_mean(seen[_alike(j)]) if _alike(j) in seen else (j.weight if known else None) for j in left]
    seconds = None if any(t is None for t in times) else sum(t or 0.0 for t in times)
    wall = None if seconds is None else max(seconds / workers, _longest(left, times))
    memory = [_memory(task, sizes[task.name]) for task in suite.tasks]
    disk = [_disk(suite, task, sizes[task.name]) for task in suite.tasks]
    return Estimate(
        len(plan.jobs), len(plan.jobs) - len(left), seconds, wall,
        None if None in memory else max(m or 0 for m in memory), None if None in disk else sum(d or 0 for d in disk),
    )  # fmt: skip


@cache
def parameters(model: str) -> int | None:
    """How many parameters a model has, without loading its weights; None: its configuration is not here."""
    if model in TINY:
        return TINY[model]
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model, local_files_only=True)
        with torch.device("meta"):
            return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except Exception:  # not on this disk, or nothing that can be counted: an estimate stops nobody
        return None


def _alike(job: Job) -> str:
    """Jobs that take about the same time: one name without its seed or trial."""
    return job.name.rpartition("/")[0] if job.role in ("cell", "trial") else job.name


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _longest(jobs: Sequence[Job], seconds: Sequence[float | None]) -> float:
    """The longest chain of jobs that wait for one another."""
    ends: dict[str, float] = {}
    for job, took in zip(jobs, seconds, strict=True):
        ends[job.name] = (took or 0.0) + max((ends.get(n, 0.0) for n in job.needs.values()), default=0.0)
    return max(ends.values(), default=0.0)


def _memory(task: Task, size: int | None) -> int | None:
    """Of the process with most roles: what it trains, and what it only asks."""
    if size is None:
        return None
    most = 0
    for method in task.algorithms:
        made = create_algorithm(method.algorithm or "sft", **method.split_options[0])
        trains = len({role for stage in made.stages for role in stage.trains})
        most = max(most, trains * TRAINED + max(len(made.needs) - trains, 1) * FROZEN)
    return PROCESS + most * size


def _disk(suite: Suite, task: Task, size: int | None) -> int | None:
    """Every cell's model and answers; the models of trials are not kept."""
    if size is None:
        return None
    cells = (len(task.methods) - 1) * suite.seeds
    answers = len(task.methods) * suite.seeds * suite.test_prompts * (task.decoding.samples + 1)
    return (cells + 2 * suite.start_seeds) * FROZEN * size + 2 * answers * ROW
