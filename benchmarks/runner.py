"""From a suite to its jobs, from finished jobs to results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefzoo.algorithm import create_algorithm
from prefzoo.benchmarks.jobs import Job, Outcome, run_jobs
from prefzoo.benchmarks.suites import Method, Suite, Task, get_suite
from prefzoo.files import replacing_file
from prefzoo.locks import locked
from prefzoo.parts.feedback import Verifier
from prefzoo.parts.roles import TEACHER
from prefzoo.plugins import import_file
from prefzoo.registry import UsageError

TASKS = "prefzoo.benchmarks.tasks"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The jobs of a suite, and methods that cannot apply with the reason."""

    jobs: tuple[Job, ...]
    cells: dict[str, dict[str, list[str]]]  # task -> method -> job names by seed
    not_applicable: dict[str, dict[str, str]]  # task -> method -> reason


def plan(suite: Suite) -> Plan:
    """All jobs, each after what it needs. Shared work (start, data, reward model) appears once per task."""
    jobs: list[Job] = []
    cells: dict[str, dict[str, list[str]]] = {}
    refused: dict[str, dict[str, str]] = {}
    for task in suite.tasks:
        shared, inputs = _shared_jobs(task)
        jobs += shared
        cells[task.name], refused[task.name] = {}, {}
        for seed in range(suite.seeds):
            trained: list[str] = []
            for method in sorted(task.methods, key=lambda m: m.name == "sft_more"):
                reason = _not_applicable(task, method)
                if method.name == "sft_more" and not trained:
                    reason = "no other method is trained here, so there is no count of tokens to match"
                if reason:
                    refused[task.name][method.name] = reason
                    continue
                job = _cell_job(suite, task, method, seed, inputs, trained)
                jobs.append(job)
                cells[task.name].setdefault(method.name, []).append(job.name)
                if not method.baseline:
                    trained.append(job.name)
    return Plan(tuple(jobs), cells, refused)


def _shared_jobs(task: Task) -> tuple[list[Job], dict[str, str]]:
    """Jobs that all cells of a task share, and the inputs they give to a cell."""
    spec: dict[str, Any] = {
        "task": {
            "kind": task.kind,
            "settings": dict(task.settings),
            "options": {"max_new_tokens": task.options["max_new_tokens"]},
        }
    }
    name = task.name
    loss = create_algorithm("sft").sources | create_algorithm("reward_model").sources
    start, data, reward = f"{name}/start", f"{name}/data", f"{name}/reward_model"
    if task.kind == "pairs":
        path = task.settings["data"]
        if path is None:
            raise UsageError("bench pairs needs --data FILE: preference pairs as JSON Lines.")
        path = Path(path).resolve()
        if not path.exists():
            raise UsageError(f"data {str(path)!r}: no such file.")
        content = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        spec["task"]["settings"]["data"] = str(path)
        judge = f"{name}/judge"
        with_start = {"data": data, "start": start}
        jobs = [
            Job(data, f"{TASKS}:pairs_split", spec, weight=500, sources={"content": content}),
            Job(start, f"{TASKS}:pairs_start", spec, {"data": data}, weight=500, sources=loss),
            Job(
                reward, f"{TASKS}:pairs_reward_model", {**spec, "third": "train"}, with_start, weight=400, sources=loss
            ),
            Job(judge, f"{TASKS}:pairs_reward_model", {**spec, "third": "judge"}, with_start, weight=300, sources=loss),
        ]
        return jobs, {**with_start, "reward_model": reward, "judge": judge}
    jobs = [
        Job(start, f"{TASKS}:world_start", spec, weight=500, sources=loss),
        # The preference world labels the start's own answers; the verifiable one has prompts only.
        Job(data, f"{TASKS}:world_preferences", spec, {"start": start} if task.kind == "requests" else {}, weight=500),
    ]
    inputs = {"start": start, "data": data}
    if task.kind == "requests":
        jobs.append(Job(reward, f"{TASKS}:world_reward_model", spec, dict(inputs), weight=500, sources=loss))
        inputs["reward_model"] = reward
    if task.settings.get("teacher_rounds"):
        teacher, taught = f"{name}/teacher", create_algorithm("rejection_sampling").sources
        jobs.append(Job(teacher, f"{TASKS}:world_teacher", spec, {"start": start}, weight=100, sources=taught))
        inputs["teacher"] = teacher
    if task.settings.get("best_of_n"):
        jobs.append(Job(f"{name}/best_of_n", f"{TASKS}:world_best_of_n", spec, dict(inputs), weight=150))
    return jobs, inputs


def _not_applicable(task: Task, method: Method) -> str | None:
    """Why a method cannot be run on a task; read off the parts that it is made of."""
    if method.algorithm is None:
        return None
    try:
        made = create_algorithm(method.algorithm, **task.resolve(method)[0])
    except UsageError as error:
        return f"it cannot be made with these options: {error}"
    if made.trains_reward:
        return "it trains a reward model, not a policy"
    if made.data == "steps":
        return "it learns from rated steps, and the task has pairs"
    terms, rated = [t for s in made.stages for t in s.terms], task.settings.get("rated", False)
    scored = made.data == "scored" or any("scores_PK" in t.loss.extras for t in terms)
    if scored and not rated and task.kind == "requests":
        return "it learns from scores, and the task's answers are compared only"
    if task.kind == "pairs" and any(isinstance(s.feedback, Verifier) for s in made.stages):
        return "the data has preferences but no answers that a verifier could check"
    if task.kind == "sums" and (made.data != "prompts" or not made.on_policy):
        return "this world has no preference labels, only a verifier"
    if TEACHER in made.needs and not task.settings.get("teacher_rounds"):
        return "it learns from a teacher, and the task has none"
    if any(getattr(s.feedback, "revises", False) for s in made.stages):
        return "its answers are revised in words, which the language of this task does not have"
    given = {"margin", "probability", "score", "scores"} if rated else set()
    missing = {c for t in terms for c in t.loss.columns} - given
    if missing and not made.on_policy and task.kind == "requests":
        return f"it learns from a {min(missing)} of each row, which the task's annotators do not give"
    return None


def _cell_job(
    suite: Suite, task: Task, method: Method, seed: int, inputs: dict[str, str], trained: Sequence[str]
) -> Job:
    options: dict[str, Any] = {}
    training: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if method.algorithm is not None:
        options, training = task.resolve(method)
        made = create_algorithm(method.algorithm, **options)
        sources = made.sources
        if TEACHER not in made.needs:
            inputs = {k: v for k, v in inputs.items() if k != "teacher"}
    settings = {k: v for k, v in task.settings.items() if k != "data"}
    params = {
        "task": {"kind": task.kind, "metric": task.metric, "settings": settings, "options": dict(task.options)},
        "method": {"name": method.name, "algorithm": method.algorithm, "options": options, "training": training,
                   "curve": method.curve},
        "seed": seed, "samples": suite.samples, "test_prompts": suite.test_prompts,
    }  # fmt: skip
    needs = {k: v for k, v in inputs.items() if k != "teacher" or method.algorithm is not None}
    if method.name == "sft_more":
        if not task.settings.get("sft_more_tokens"):
            needs |= {f"cell:{name}": name for name in trained}
        sources = create_algorithm("sft").sources
    return Job(f"{task.name}/{method.name}/{seed}", f"{TASKS}:cell", params, needs, method.weight, sources)


def run(
    suite: str | Suite,
    *,
    out: str | Path,
    algorithms: Sequence[str] | None = None,
    seeds: int | None = None,
    data: str | Path | None = None,
    imports: Sequence[str | Path] = (),
    workers: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run a suite: finished cells are not run again, half-done ones go on; then write its results and report.

    One process at a time works in a folder. Ctrl-C and SIGTERM let the workers write where they are; then
    ``prefzoo.training.Stopped`` is raised.

    Args:
        suite: a name (``prefzoo.benchmarks.SUITES``) or a :class:`Suite`.
        out: folder of cells and results.
        algorithms: only these methods of the suite, or any registered algorithms under the suite's recipes.
        seeds: training seeds per method; default: the suite's.
        data: the file of preference pairs, for the suite ``pairs``.
        imports: Python files that register losses or algorithms.
        workers: processes of one thread each; default: one per core.

    Returns:
        The results, as written to ``results.json``.
    """
    paths = [Path(p).resolve() for p in imports]
    for path in paths:
        import_file(path)
    chosen = get_suite(suite) if isinstance(suite, str) else suite
    if data is not None:
        if any(t.kind != "pairs" for t in chosen.tasks):
            raise UsageError(f"suite {chosen.name!r} brings its own data; --data is for preference pairs: bench pairs.")
        tasks = tuple(dataclasses.replace(t, settings={**t.settings, "data": str(data)}) for t in chosen.tasks)
        chosen = dataclasses.replace(chosen, tasks=tasks)
    if seeds is not None:
        if seeds < 1:
            raise UsageError(f"seeds must be at least 1, got {seeds}.")
        chosen = dataclasses.replace(chosen, seeds=seeds)
    chosen = chosen.choose(list(algorithms) if algorithms else None)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        return _run(chosen, folder, paths, workers or os.cpu_count() or 1, quiet)


def _run(suite: Suite, folder: Path, imports: Sequence[Path], workers: int, quiet: bool) -> dict[str, Any]:
    from prefzoo.benchmarks.report import write_report
    from prefzoo.benchmarks.results import collect

    planned = plan(suite)
    started = time.monotonic()

    def say(words: str) -> None:
        if not quiet:
            print(f"[{time.monotonic() - started:5.0f} s] {words}", file=sys.stderr, flush=True)

    def show(outcome: Outcome, done: int, total: int) -> None:
        how = "kept from before" if outcome.reused else f"failed: {outcome.error}" if outcome.error else "done"
        seconds = f" in {outcome.facts['seconds']:.0f} s" if outcome.facts and not outcome.reused else ""
        say(f"{done}/{total} {outcome.name}: {how}{seconds}")

    outcomes = run_jobs(planned.jobs, folder, workers=workers, imports=imports, report=show, note=say)
    for left in (folder / "cache").glob("tmp*"):  # written aside by a process that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    results = collect(suite, planned, outcomes, folder)
    results["environment"] = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        **{p: version(p) for p in ("prefzoo", "torch", "transformers", "numpy", "scipy")},
    }
    results["wall_seconds"] = time.monotonic() - started
    with replacing_file(folder / "results.json") as aside:
        aside.write_text(json.dumps(results, indent=1) + "\n")
    text = write_report(folder)
    if not quiet:
        print(text)
    return results
