"""Run a suite: its jobs, its results, its report."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import prefzoo
from prefzoo.benchmarks.executors import Executor, parse_executor
from prefzoo.benchmarks.jobs import Outcome, run_jobs
from prefzoo.benchmarks.plan import plan
from prefzoo.benchmarks.suites import Suite, get_suite
from prefzoo.files import replacing_file
from prefzoo.locks import locked
from prefzoo.plugins import import_file
from prefzoo.registry import UsageError

FORMAT = 2  # of a results folder
SPLIT_OFF = ("data.validation", "data.test", "data.held_out", "data.demonstrations")  # of other data than the suite's


def run(
    suite: str | Path | Suite,
    *,
    out: str | Path,
    algorithms: Sequence[str] | None = None,
    seeds: int | None = None,
    data: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    imports: Sequence[str | Path] = (),
    executor: str | Executor = "workers",
    workers: int | None = None,
    device: str = "cpu",
    quiet: bool = False,
) -> dict[str, Any]:
    """Run a suite: finished cells are not run again, half-done ones go on; then write its results and report.

    One process at a time works in a folder. Ctrl-C and SIGTERM let the workers write where they are; then
    ``prefzoo.training.Stopped`` is raised.

    Args:
        suite: a name (``prefzoo.benchmarks.list_suites()``), a YAML file, or a :class:`Suite`.
        out: folder of cells and results, of one suite.
        algorithms: only these methods of the suite, or any registered algorithms under the suite's recipes.
        seeds: training seeds per method; default: the suite's.
        data: file, folder or hub id instead of the suite's data; test prompts and the other parts are split off it.
        changes: other values of the suite by dotted keys: ``{"start.model": "my-model"}``.
        imports: Python files that register losses, algorithms or suites.
        executor: ``in-process``, ``workers`` (processes of one thread each), ``ray``, or an executor.
        workers: how many; default: one per core.
        device: ``cpu``, ``cuda`` or ``auto``; models of the embedded worlds are too small to gain from a GPU.

    Returns:
        The results, as written to ``results.json``.
    """
    paths = [Path(p).resolve() for p in imports]
    for path in paths:
        import_file(path)
    chosen = chosen_suite(suite, algorithms=algorithms, seeds=seeds, data=data, changes=changes)
    where = parse_executor(executor, workers=workers, device=device) if isinstance(executor, str) else executor
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _claim(folder, chosen)
        return _run(chosen, folder, paths, where, quiet)


def chosen_suite(
    suite: str | Path | Suite,
    *,
    algorithms: Sequence[str] | None = None,
    seeds: int | None = None,
    data: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Suite:
    """The suite as it is asked for."""
    changed = dict(changes or {})
    if seeds is not None:
        if seeds < 1:
            raise UsageError(f"seeds must be at least 1, got {seeds}.")
        changed["seeds"] = seeds
    if isinstance(suite, Suite):
        if set(changed) - {"seeds"} or data is not None:
            raise UsageError("changes by key are for suites that are named; a Suite is changed with its method but().")
        chosen = suite.but(**changed) if changed else suite
    else:
        try:
            instead = {} if data is None else {"data.train": str(data), **dict.fromkeys(SPLIT_OFF)}
            chosen = get_suite(suite, {**instead, **changed})
        except UsageError as error:
            if data is not None and _brings_data(suite, changed):
                raise UsageError(
                    f"suite {str(suite)!r} brings its own data; --data is for suites of files: pairs, real-hh."
                ) from error
            raise
    return chosen.choose(list(algorithms) if algorithms else None)


def _brings_data(suite: str | Path, changes: Mapping[str, Any]) -> bool:
    """Whether all tasks of a suite are worlds."""
    try:
        return all(task.world is not None for task in get_suite(suite, changes).tasks)
    except UsageError:
        return False


def _claim(folder: Path, suite: Suite) -> None:
    """A folder holds one suite: what another one wrote there is neither overwritten nor mixed in."""
    file = folder / "suite.json"
    if file.exists():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            there, form = found["name"], found["format"]
        except (ValueError, KeyError):
            raise UsageError(
                f"{str(file)!r} is damaged; delete it if the folder's cells are of {suite.name!r}."
            ) from None
        if there != suite.name:
            raise UsageError(
                f"{str(folder)!r} holds the suite {there!r}; give {suite.name!r} a folder of its own (--out). "
                "Nothing was changed."
            )
        if form > FORMAT:
            raise UsageError(
                f"{str(folder)!r} has format {form}, of a newer prefzoo ({found.get('prefzoo')}) than this one, "
                f"{prefzoo.__version__}. Nothing was changed; use that version, or another folder (--out)."
            )
    elif (folder / "results.json").exists():
        aside = folder / "results.of-another-version.json"
        (folder / "results.json").replace(aside)
        print(f"note: the results here are of an older prefzoo; they were kept as {aside.name}.", file=sys.stderr)
    with replacing_file(file) as written:
        facts = {"name": suite.name, "format": FORMAT, "prefzoo": prefzoo.__version__}
        written.write_text(json.dumps(facts) + "\n", encoding="utf-8")


def _run(suite: Suite, folder: Path, imports: Sequence[Path], executor: Executor, quiet: bool) -> dict[str, Any]:
    from prefzoo.benchmarks.reporting import write_report
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

    outcomes = run_jobs(planned.jobs, folder, executor=executor, imports=imports, report=show, note=say)
    for left in (folder / "cache").glob("tmp*"):  # written aside by a process that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    results = collect(suite, planned, outcomes, folder)
    results["environment"] = environment()
    results["cost"] |= {"wall_seconds": time.monotonic() - started, "executor": str(executor)}
    with replacing_file(folder / "results.json") as aside:
        aside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = write_report(folder)
    if not quiet:
        print(text)
    return results


def environment() -> dict[str, Any]:
    """What results were computed with."""
    packages = ("prefzoo", "torch", "transformers", "numpy", "scipy")
    return {
        "python": platform.python_version(), "cores": os.cpu_count(), "machine": platform.machine(),
        **{p: version(p) for p in packages},
    }  # fmt: skip
