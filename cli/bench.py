"""``prefzoo bench``: what it will do (``--dry-run``), how large a study must be (``--plan``), and doing it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console

from prefzoo.benchmarks import statistics
from prefzoo.benchmarks.estimates import Estimate, estimate
from prefzoo.benchmarks.plan import Plan, candidates, plan
from prefzoo.benchmarks.runner import chosen_suite
from prefzoo.benchmarks.suites import Suite, Task, list_suites
from prefzoo.cli.cards import table, wide_console
from prefzoo.plugins import import_file
from prefzoo.registry import UsageError, suggest


def show_suites(pattern: str, imports: Sequence[Path], as_json: bool) -> None:
    """Print the suites there are."""
    for path in imports:
        import_file(path)
    found = {name: about for name, about in list_suites().items() if fnmatch(name, pattern)}
    if not found:
        raise UsageError(f"no suites match {pattern!r}{suggest(pattern, list_suites())}")
    if as_json:
        print(json.dumps(found, indent=1))
        return
    shown = table("what it is", first="suite")
    for name, about in found.items():
        shown.add_row(name, about)
    wide_console().print(shown)


def dry_run(name: str, out: Path, workers: int | None, imports: Sequence[Path], **asked: Any) -> None:
    """Print what a suite would do."""
    for path in imports:
        import_file(path)
    suite = chosen_suite(name, **asked)
    planned = plan(suite)
    workers = workers or os.cpu_count() or 1
    console = Console(width=None, highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(f"suite {suite.name}: {suite.about}".strip())
    budget = f"; budget: {suite.budget}" if suite.budget else ""
    console.print(f"{suite.seeds} seeds, {suite.test_prompts} test prompts{budget}")
    for task in suite.tasks:
        _show_task(console, suite, task, planned)
    console.print(_in_words(estimate(suite, planned, out, workers), workers))


def _show_task(console: Console, suite: Suite, task: Task, planned: Plan) -> None:
    console.print(f"\ntask {task.name}: judged by {', '.join(j.name for j in task.judges)}")
    for artifact, names in planned.shared[task.name].items():
        used = sum(set(names) & set(job.needs.values()) != set() for job in planned.jobs)
        elsewhere = (
            "" if all(n.startswith(f"{task.name}/") for n in names) else f" (the one of {names[0].split('/')[0]})"
        )
        console.print(f"  shared: {artifact}{elsewhere}, {len(names)} made, used by {used} jobs")
    if task.budget is not None:
        console.print(f"  budget of every method: {task.budget.amount:,g} {task.budget.unit.replace('_', ' ')}")
    for method in task.methods:
        if method.name in planned.not_applicable[task.name]:
            continue
        cells = len(planned.cells[task.name][method.name])
        trials = len(planned.trials.get(task.name, {}).get(method.name, ()))
        tuned = f" after {trials} trials" if trials else ""
        options = "" if method.algorithm is None else f": {method.algorithm} {_options(*task.resolve(method))}"
        console.print(f"  {method.name}, {cells} cells{tuned}{options}")
    for name in planned.trials.get(task.name, {}):
        method = task.method(name)
        tried = "; ".join(_options(c) or "as written" for c in candidates(task, method))
        console.print(f"  trials of {name}: {tried}")
    for name, reason in planned.not_applicable[task.name].items():
        console.print(f"  {name}: not applicable, {reason}")


def _options(*parts: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={v}" for part in parts for k, v in part.items())


def _in_words(found: Estimate, workers: int) -> str:
    """The estimate as sentences."""
    left = found.jobs - found.finished
    words = [f"{found.jobs} jobs, {found.finished} of them finished in this folder, {left} to do."]
    if found.seconds is None or found.wall is None:
        words.append("Time: unknown until the first cells are done (then this command estimates the rest from them).")
    else:
        words.append(f"Time: about {_time(found.wall)} with {workers} workers ({_time(found.seconds)} of one core).")
    memory = "unknown, its model is not here" if found.memory is None else _bytes(found.memory)
    disk = "unknown" if found.disk is None else _bytes(found.disk)
    words.append(f"Memory of the largest process: about {memory}. Disk: about {disk}.")
    return " ".join(words)


def _time(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} minutes"
        if seconds < 7200
        else f"{seconds / 3600:.1f} hours"
    )


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"


def plan_study(
    name: str, out: Path, points: float, seed_sd: float | None, imports: Sequence[Path], **asked: Any
) -> None:
    """Print how many prompts and seeds a difference of so many points needs: by what the folder's finished runs show of
    their spread, else by a guess."""
    for path in imports:
        import_file(path)
    suite = chosen_suite(name, **asked)
    noise, said = _noise(out)
    if seed_sd is not None:
        noise = statistics.Noise(seed_sd / 100, *(() if noise is None else (noise.interaction_sd, noise.residual_sd)))
        said = f"spread over seeds of {seed_sd:g} points, as given"
    if noise is None:
        said = "no finished runs of several seeds here: a spread over seeds of 2 points is assumed (--seed-sd)"
    prompts = sorted({200, 400, 800, 1600, suite.test_prompts})
    found = statistics.plan_study(points / 100, noise=noise, prompts=prompts, seeds=(3, 5, 10, 20))
    print(f"{said}\n{found.to_text()}")
    print(f"the suite {suite.name!r} has {suite.test_prompts} test prompts and {suite.seeds} seeds")


def _noise(out: Path) -> tuple[statistics.Noise | None, str]:
    """The spread among the runs of finished results, and what it was measured on."""
    from prefzoo.benchmarks.results import tables_of

    tables = tables_of(out) if (out / "results.json").exists() else {}
    tables = {name: y_SN for name, y_SN in tables.items() if len(y_SN) > 1}
    if len(tables) < 2:
        return None, ""
    return statistics.noise_of(tables), f"spread as measured on {len(tables)} methods of {out}"
