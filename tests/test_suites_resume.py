"""A suite that is killed anywhere, and started again: the same end, nothing done twice, nothing left over.

Kills are SIGKILLs of real processes. Most jobs here count instead of training; real training is in the long tests.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from prefzoo import benchmarks, cli
from prefzoo.benchmarks import cells, jobs, materials, runner, work
from prefzoo.benchmarks.jobs import Job, Outcome, keys_of, run_jobs
from prefzoo.locks import locked
from prefzoo.models.load import learn_tokenizer, load_scorer, new_scorer, save_scorer, tiny_model
from prefzoo.models.roles import Policy
from prefzoo.registry import UsageError
from prefzoo.training import Stopped

JOBS = '''
import json, os, signal, sys, threading, time
from pathlib import Path

def begin(params, folder):
    """A line in the journal for every start; the marks that an earlier process had made."""
    with open(params["journal"], "a") as journal:
        journal.write(json.dumps({"job": params["name"], "pid": os.getpid(), "found": marks(folder)}) + "\\n")

def marks(folder):
    return sorted(int(f.name) for f in folder.glob("[0-9]*"))

def count(params, inputs, folder):
    """Makes its marks one after the other, and goes on behind those that it finds, as a run does with its steps."""
    begin(params, folder)
    try:
        for number in range(len(marks(folder)), params["marks"]):
            if number == params.get("die_at") and Path(params["deaths"]).read_text().count("x") < params["times"]:
                with open(params["deaths"], "a") as deaths:
                    deaths.write("x")
                if threading.current_thread() is threading.main_thread():
                    os.kill(os.getpid(), signal.SIGKILL)
                sys.exit()  # of a thread that plays a process
            (folder / str(number)).write_text(str(number))
            time.sleep(params.get("pause", 0))
    except KeyboardInterrupt:
        time.sleep(0.5)  # writes its checkpoint, which a second signal must not spoil
        (folder / str(len(marks(folder)))).write_text("stopped")
        raise
    return {"sum": sum(marks(folder)) + sum(json.loads((f / "facts.json").read_text())["sum"] for f in inputs.values())}

def fail(params, inputs, folder):
    begin(params, folder)
    (folder / str(len(marks(folder)))).write_text("half")
    if Path(params["cure"]).exists():
        return {"sum": len(marks(folder))}
    try:
        raise OSError(params["errno"], os.strerror(params["errno"]))
    except OSError as error:
        raise RuntimeError("the checkpoint was not written") from error
'''

DRIVE = """
import json, sys
from pathlib import Path
from prefzoo.benchmarks import jobs
from prefzoo.benchmarks.jobs import Job, run_jobs
from prefzoo.locks import locked
from prefzoo.training import Stopped
jobs.everything_hash = lambda: "the layer"
if __name__ == "__main__":
    plan, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    out.mkdir(exist_ok=True)
    try:
        with locked(out):
            outcomes = run_jobs([Job(**job) for job in plan], out, workers=2)
    except Stopped as stop:
        print(stop, flush=True)
        sys.exit(stop.exit_code)
    print(json.dumps({n: o.error or o.facts["sum"] for n, o in outcomes.items()}), flush=True)
"""


class Threads(concurrent.futures.ThreadPoolExecutor):
    """Threads of this process instead of new ones, which need seconds to import torch."""

    def __init__(self, workers: int, *_: Any) -> None:
        super().__init__(workers)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> concurrent.futures.Future[Any]:  # type: ignore
        def call() -> Any:
            try:
                return function(*arguments)
            except SystemExit:
                raise concurrent.futures.process.BrokenProcessPool from None

        return super().submit(call)


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Threads)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Job functions in a module of this test alone, a journal of their starts, and a process to run them."""
    module = f"shop_{re.sub(r'[^a-z0-9]', '_', tmp_path.name.lower())}"
    modules, journal, out = tmp_path / "modules", tmp_path / "journal", tmp_path / "out"
    modules.mkdir()
    monkeypatch.setattr(jobs, "everything_hash", lambda: "the layer")  # the same keys in the other process
    (modules / f"{module}.py").write_text(JOBS)
    (modules / "drive.py").write_text(DRIVE)
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.setenv("PYTHONPATH", str(modules))
    importlib.invalidate_caches()
    started: list[subprocess.Popen[str]] = []

    def job(name: str, marks: int = 5, needs: tuple[str, ...] = (), call: str = "count", **more: Any) -> Job:
        deaths = tmp_path / f"deaths of {name}"
        deaths.touch()
        params = {"name": name, "journal": str(journal), "marks": marks, "deaths": str(deaths), **more}
        return Job(name, f"{module}:{call}", params, {n: n for n in needs})

    def starts(name: str | None = None) -> list[dict[str, Any]]:
        lines = journal.read_text().splitlines() if journal.exists() else []
        return [entry for line in lines if name in (None, (entry := json.loads(line))["job"])]

    def drive(line: list[Job]) -> subprocess.Popen[str]:
        plan = tmp_path / "plan.json"
        plan.write_text(json.dumps([vars(j) for j in line]))
        command = [sys.executable, str(modules / "drive.py"), str(plan), str(out)]
        started.append(subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        ))  # fmt: skip
        return started[-1]

    def folder(line: list[Job], name: str) -> Path:
        return out / "cells" / f"{name}-{keys_of(line)[name]}"

    def aside(line: list[Job], name: str) -> Path:
        return folder(line, name).with_name(f".{folder(line, name).name}.part")

    yield SimpleNamespace(job=job, starts=starts, drive=drive, folder=folder, aside=aside, out=out, tmp=tmp_path)
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def until(true: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + 60
    while not true():
        if process is not None and process.poll() is not None:
            pytest.fail(f"the suite ended: {process.communicate()}")
        assert time.monotonic() < deadline
        time.sleep(0.02)


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    """What a file that was touched would show."""
    return {str(f.relative_to(folder)): (f.stat().st_ino, f.stat().st_mtime_ns) for f in [folder, *folder.rglob("*")]}


def assert_whole(out: Path, line: list[Job], marks: int = 5) -> None:
    """Every cell is there with what belongs to it, and nothing else is."""
    assert sorted(f.name for f in out.iterdir()) == ["cells"]
    assert sorted(f.name for f in (out / "cells").iterdir()) == sorted(f"{n}-{k}" for n, k in keys_of(line).items())
    for cell in (out / "cells").iterdir():
        assert sorted(f.name for f in cell.iterdir()) == sorted(["facts.json", *map(str, range(marks))])


# ------------------------------------------------------------------------------------------- one job, in threads


def test_a_half_written_job_is_finished_and_not_begun_again(shop: SimpleNamespace, in_threads: None) -> None:
    line = [shop.job("a")]
    whole, aside = shop.folder(line, "a"), shop.aside(line, "a")
    for folder in (whole, aside):  # the first: removed, but not to its end
        folder.mkdir(parents=True)
    for number in range(3):
        (aside / str(number)).write_text(str(number))
    (whole / "half").touch()
    (aside / "facts.json").write_text('{"su')
    whole.with_name(f".{whole.name}.lock").write_text("pid 4194309 on host elsewhere")
    made = inodes(aside)
    outcome = run_jobs(line, shop.out)["a"]
    assert outcome.facts and outcome.facts["sum"] == 10 and not outcome.reused
    assert [s["found"] for s in shop.starts()] == [[0, 1, 2]]
    assert {n: inodes(whole)[n] for n in "012"} == {n: made[n] for n in "012"}
    assert_whole(shop.out, line)


def test_a_lock_that_a_finished_jobs_killed_worker_left_goes(shop: SimpleNamespace, in_threads: None) -> None:
    line = [shop.job("a")]
    run_jobs(line, shop.out)
    whole = shop.folder(line, "a")
    whole.with_name(f".{whole.name}.lock").touch()
    before = inodes(whole)
    assert run_jobs(line, shop.out)["a"].reused
    assert inodes(whole) == before
    assert_whole(shop.out, line)


@pytest.mark.parametrize(("number", "found"), [(errno.ENOSPC, [0]), (errno.EIO, [])])
def test_a_failed_job_begins_again_but_for_a_full_disk_it_goes_on(
    shop: SimpleNamespace, in_threads: None, number: int, found: list[int]
) -> None:
    cure = shop.tmp / "cure"
    line = [shop.job("a", call="fail", errno=number, cure=str(cure))]
    outcome = run_jobs(line, shop.out)["a"]
    assert outcome.error == "the checkpoint was not written"
    failed = shop.folder(line, "a").with_name(f"{shop.folder(line, 'a').name}.failed")
    assert failed.exists() == (not found) and shop.aside(line, "a").exists() == bool(found)
    cure.touch()
    outcome = run_jobs(line, shop.out)["a"]
    assert outcome.facts and outcome.facts["sum"] == 1 + len(found)
    assert [s["found"] for s in shop.starts()] == [[], found]
    assert len(list((shop.out / "cells").iterdir())) == 1


def test_a_worker_that_outlived_its_suite_keeps_the_next_one_out_of_its_job(
    shop: SimpleNamespace, in_threads: None
) -> None:
    """What it finishes while the other waits is taken over; the job is not done a second time."""
    line = [shop.job("a"), shop.job("b")]
    whole, aside = shop.folder(line, "a"), shop.aside(line, "a")
    aside.mkdir(parents=True)
    outcomes: dict[str, Outcome] = {}
    with locked(whole.parent, name=f".{whole.name}.lock"):
        suite = threading.Thread(target=lambda: outcomes.update(run_jobs(line, shop.out, workers=2)))
        suite.start()
        until(lambda: shop.folder(line, "b").exists())
        assert suite.is_alive() and not shop.starts("a"), "it waits"
        for number in range(5):
            (aside / str(number)).write_text(str(number))
        (aside / "facts.json").write_text('{"sum": 10}')
        aside.rename(whole)
    suite.join()
    assert outcomes["a"].facts == {"sum": 10} and not shop.starts("a")
    assert_whole(shop.out, line)


def test_a_job_that_another_process_keeps_is_told(
    shop: SimpleNamespace, in_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "PATIENCE", 0.0)
    line = [shop.job("a")]
    whole = shop.folder(line, "a")
    whole.parent.mkdir(parents=True)
    with locked(whole.parent, name=f".{whole.name}.lock"):
        outcome = run_jobs(line, shop.out)["a"]
    assert re.search(rf"process \(pid {os.getpid()} .* works in", outcome.error or "")
    assert run_jobs(line, shop.out)["a"].facts


def test_a_job_fails_at_its_third_death_and_the_others_go_on(shop: SimpleNamespace, in_threads: None) -> None:
    line = [
        shop.job("twice", die_at=3, times=2), shop.job("always", die_at=1, times=10**6),
        shop.job("after", needs=("always",)), shop.job("behind", needs=("twice",)),
    ]  # fmt: skip
    notes: list[str] = []
    outcomes = run_jobs(line, shop.out, workers=2, note=notes.append)
    assert [s["found"] for s in shop.starts("twice")] == [[], [0, 1, 2], [0, 1, 2]]
    assert outcomes["twice"].facts["sum"] == 10 and outcomes["behind"].facts["sum"] == 20
    assert outcomes["always"].error == (
        "its process died three times (killed, or out of memory?). With fewer --workers each has more memory."
    )
    assert outcomes["after"].error == "it needs always, which failed"
    assert sorted(n.partition(":")[0] for n in notes) == ["always", "always", "twice", "twice"]
    # The next call tries again, and goes on where it was.
    (shop.tmp / "deaths of always").write_text("x" * 10**6)
    outcomes = run_jobs(line, shop.out)
    assert [s["found"] for s in shop.starts("always")] == [[], [0], [0], [0]]
    assert outcomes["after"].facts["sum"] == 20
    assert_whole(shop.out, line)


def test_workers_that_never_begin_end_the_suite_in_words(
    shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stillborn(Threads):
        def submit(self, function: Callable[..., Any], *_: Any) -> concurrent.futures.Future[Any]:  # type: ignore
            return super().submit(sys.exit)

    monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Stillborn)
    with pytest.raises(UsageError, match="die before they begin"):
        run_jobs([shop.job("a"), shop.job("b")], shop.out, workers=2)
    assert not shop.starts()


# --------------------------------------------------------------------------------------------------- real processes


def test_a_job_whose_process_is_killed_goes_on_and_takes_no_other_with_it(shop: SimpleNamespace) -> None:
    line = [shop.job("once", die_at=3, times=1), shop.job("steady", pause=0.8), shop.job("last", needs=("once",))]
    notes: list[str] = []
    outcomes = run_jobs(line, shop.out, workers=2, note=notes.append)
    assert [s["found"] for s in shop.starts("once")] == [[], [0, 1, 2]]
    assert len(shop.starts("steady")) == 1
    assert {n: o.facts["sum"] for n, o in outcomes.items()} == {"once": 10, "steady": 10, "last": 20}
    assert notes == ["once: its process died; another one goes on with it"]
    assert_whole(shop.out, line)


def test_a_suite_whose_parent_is_killed_goes_on(shop: SimpleNamespace) -> None:
    """Its workers leave at once; the next one finishes what was begun and touches nothing that was finished."""
    line = [shop.job("a"), shop.job("slow", pause=0.2, needs=("a",)), shop.job("late", needs=("slow",))]
    process = shop.drive(line)
    until(lambda: (shop.aside(line, "slow") / "1").exists(), process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    until(lambda: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers))
    half, done = inodes(shop.aside(line, "slow")), inodes(shop.folder(line, "a"))
    with locked(shop.out):  # the dead owner does not hold it
        outcomes = run_jobs(line, shop.out)
    assert outcomes["a"].reused and outcomes["late"].facts["sum"] == 30
    assert len(shop.starts("a")) == 1
    assert [len(s["found"]) for s in shop.starts("slow")] == [0, len(half) - 1]
    after = inodes(shop.folder(line, "slow"))
    assert {n: after[n] for n in half if n.isdigit()} == {n: i for n, i in half.items() if n.isdigit()}
    assert inodes(shop.folder(line, "a")) == done
    assert_whole(shop.out, line)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.long)]
)
def test_a_signal_lets_the_workers_write_where_they_are(shop: SimpleNamespace, number: int, code: int) -> None:
    """SIGINT comes from a terminal: to all processes at once. SIGTERM here, too: so does a batch system."""
    line = [shop.job("a"), shop.job("slow", marks=50, pause=0.2, needs=("a",)), shop.job("late", needs=("slow",))]
    process = shop.drive(line)
    until(lambda: (shop.aside(line, "slow") / "1").exists(), process)
    os.killpg(process.pid, number)
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed) == (code, "stopped: 1 of 3 jobs are done; the same command goes on\n")
    assert errors == ""
    contents = [f.read_text() for f in shop.aside(line, "slow").iterdir()]
    assert contents.count("stopped") == 1, "what it wrote in the end is there, once"
    assert sorted(f.name for f in shop.out.iterdir()) == ["cells"], "no lock is left"
    assert sorted(f.name[:2] for f in (shop.out / "cells").iterdir()) == [".s", "a-"]


def test_a_worker_that_does_not_end_is_killed(shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here by the second signal; else after half a minute."""
    line = [shop.job("slow", marks=10**6, pause=3600)]
    stubborn = JOBS.replace("except KeyboardInterrupt:", "except KeyboardInterrupt:\n        time.sleep(3600)")
    next((shop.tmp / "modules").glob("shop_*.py")).write_text(stubborn)

    def twice() -> None:
        until(lambda: (shop.aside(line, "slow") / "0").exists())
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    threading.Thread(target=twice).start()
    with pytest.raises(Stopped, match=r"^stopped: 0 of 1 jobs are done; the same command goes on$"):
        run_jobs(line, shop.out)
    assert shop.aside(line, "slow").exists()
    assert not [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


# -------------------------------------------------------------------------------------------------------- the suite


def test_two_processes_on_one_folder_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run_jobs", lambda *_, **__: pytest.fail("work began"))
    with locked(tmp_path), pytest.raises(UsageError, match=rf"pid {os.getpid()} .*works in .*choose another folder"):
        benchmarks.run("quick", out=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_ends_with_the_signals_code_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    def run(*_: Any, **__: Any) -> None:
        stop = Stopped(number)
        stop.args = ("stopped: 3 of 7 jobs are done; the same command goes on",)
        raise stop

    monkeypatch.setattr(benchmarks, "run", run)
    assert cli.main(["bench", "quick"]) == code
    assert "stopped: 3 of 7 jobs are done; the same command goes on\n" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- its cells


def test_a_batch_of_rewards_is_dealt_by_its_step_not_by_a_count_of_calls() -> None:
    tokenizer = learn_tokenizer(["a b c d e f g h i j"], 300)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(ids[0]) for ids in completion_ids]

    def dealt(control: cells.Permuted, step: int) -> list[float]:
        return control(["a"] * 8, [[i] for i in range(8)], trainer_state=SimpleNamespace(global_step=step))

    whole, resumed = (cells.Permuted(reward, tokenizer, 7) for _ in range(2))
    steps = [dealt(whole, step) for step in range(4)]
    assert [dealt(resumed, step) for step in (2, 3)] == steps[2:]
    assert all(sorted(s) == list(range(8)) for s in steps) and len({tuple(s) for s in steps}) == 4


def test_standardising_a_second_time_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first time was killed as it put its files in place."""
    tokenizer = learn_tokenizer(["a b c d e f g h i j"], 300)
    policy = Policy(tiny_model(tokenizer, seed=0))
    answers = cells.samples_of(["a", "b"], [[5], [9]], tokenizer, {})
    final = tmp_path / "run" / "final"
    scorer = new_scorer(policy, "mean")
    torch.nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(0))
    save_scorer(scorer, tokenizer, final)
    (final / "README.md").write_text("its card")
    names = sorted(f.name for f in final.iterdir())

    replace, moved = Path.replace, []

    def killed(file: Path, target: Path) -> Path:
        if len(moved) == 3:
            raise KeyboardInterrupt
        moved.append(file.name)
        return replace(file, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            materials._standardise(final, answers, tokenizer)
    scores = materials._standardise(final, answers, tokenizer)
    once = {f.name: f.read_bytes() for f in final.iterdir()}
    assert np.array_equal(materials._standardise(final, answers, tokenizer), scores)
    assert {f.name: f.read_bytes() for f in final.iterdir()} == once
    assert sorted(once) == names and once["README.md"] == b"its card" and [*final.parent.iterdir()] == [final]
    loaded = load_scorer(final)
    assert (float(loaded.offset), float(loaded.scale)) != (0.0, 1.0)
    assert abs(scores.mean()) < 1e-6 and abs(scores.std() - 1) < 1e-4


def test_the_points_of_a_curve_survive_their_process(tmp_path: Path) -> None:
    """Training is played here; killed between any two points, and after the last one, the curve is that of one run."""
    made: list[int] = []

    def point(step: int, policy: Any) -> pa.Table:
        made.append(step)
        return pa.table({"score": [float(step), 0.5], "text": ["a", str(policy)], "step": [step, step]})

    def run_cell(folder: Path, stops: list[int]) -> pa.Table:
        folder.mkdir(exist_ok=True)
        checkpoint = folder / "checkpoint"
        for stop in [*stops, None]:
            curve = cells.Curve(folder, point)
            curve.add(0, "start", {})  # type: ignore[arg-type]
            for step in range((int(checkpoint.read_text()) if checkpoint.exists() else 0) + 10, 50, 10):
                curve.add(step, f"policy after {step}", {"prompts": 4 * step})  # type: ignore[arg-type]
                if step == stop:
                    break  # killed: this step is lost, and its point is there already
                checkpoint.write_text(str(step))
            else:
                curve.gather()
        checkpoint.unlink(missing_ok=True)
        return pq.read_table(folder / "curve.parquet")

    whole = run_cell(tmp_path / "whole", [])
    assert made == [0, 10, 20, 30, 40] and whole["step"].to_pylist() == [s for s in made for _ in range(2)]
    assert whole["prompts"].to_pylist() == [4.0 * s for s in made for _ in range(2)]
    killed = run_cell(tmp_path / "killed", [10, 30, 40])
    assert killed.equals(whole) and made == 2 * [0, 10, 20, 30, 40], "no point is made twice"
    # Killed after the curve was gathered, as its pieces were removed.
    (tmp_path / "killed" / "curve").mkdir()
    pq.write_table(whole[:2], tmp_path / "killed" / "curve" / "000020.parquet")
    assert run_cell(tmp_path / "killed", []).equals(whole)
    assert [f.name for f in (tmp_path / "killed").iterdir()] == ["curve.parquet"]


SUITE = """
import sys
from prefzoo import benchmarks
from prefzoo.benchmarks import jobs
from prefzoo.benchmarks.suites import Suite, task
from prefzoo.training import run
jobs.everything_hash = lambda: "the layer"
run.FIRST_SAVE = run.LONGEST = 0.0  # in the workers, which import this file too: a checkpoint after every step
if __name__ == "__main__":
    methods = (
        {"algorithm": "dpo", "options": {"max_steps": 30, "rows_per_step": 8, "logging_steps": 5}},
        {"algorithm": "grpo", "curve": True,
         "options": {"prompts_per_step": 4, "group_size": 4, "max_steps": 6, "logging_steps": 2}},
    )
    world = {"name": "requests", "demonstrations": 300, "prompts": 60, "answers": 4, "validation_prompts": 8}
    start = {"sft": {"max_steps": 60, "rows_per_step": 32}}
    small = task("requests", *methods, world=world, start=start, decoding={"samples": 2})
    suite = Suite(name="small", tasks=(small,), test_prompts=16, budget="a few steps")
    benchmarks.run(suite, out=sys.argv[1], workers=2, quiet=True, imports=[__file__])
"""


def contents(out: Path) -> dict[str, Any]:
    """Everything a suite leaves, but for times and memory."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            moody = (
                "cost",
                "seconds",
                "cpu_seconds",
                "wall_seconds",
                "peak_memory",
                "time",
                "tokens_per_second",
                "reused",
            )
            return {k: timeless(v) for k, v in value.items() if k not in moody}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    found: dict[str, Any] = {}
    assert not list((out / "cache").glob("tmp*"))
    for file in sorted(f for f in out.rglob("*") if f.is_file()):
        name = str(file.relative_to(out))
        if name.startswith("cache/"):  # what is in it only saves time
            continue
        if file.suffix == ".parquet":
            found[name] = pq.read_table(file).to_pydict()
        elif file.suffix in (".json", ".jsonl"):
            rows = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
            text = json.dumps([timeless(json.loads(row)) for row in rows]).replace(str(out), "OUT")
            found[name] = text
        elif file.suffix == ".safetensors":
            found[name] = file.read_bytes()
        else:  # reports, cards and pictures show seconds
            found[name] = None
    return found


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_a_suite_that_is_killed_again_and_again_ends_as_one_that_never_was(tmp_path: Path, seed: int) -> None:
    script = tmp_path / "suite.py"
    script.write_text(SUITE)
    random = np.random.default_rng(seed)

    def start(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(script), str(out)], start_new_session=True)

    assert start(tmp_path / "whole").wait() == 0
    whole, kills, resumed = contents(tmp_path / "whole"), 0, 0
    finished: dict[Path, dict[str, tuple[int, int]]] = {}
    half = lambda: list((tmp_path / "killed" / "cells").glob(".*.part/run/checkpoint-*"))  # noqa: E731
    while True:
        process = start(tmp_path / "killed")
        before = set(half())
        while kills % 2 == 0 and kills < 8 and process.poll() is None and set(half()) <= before:
            time.sleep(0.02)  # every other kill falls into a training
        with contextlib.suppress(subprocess.TimeoutExpired):
            patience = random.uniform(0, 0.5) if kills % 2 == 0 else random.uniform(6, 14)
            if process.wait(timeout=float(patience) if kills < 8 else 600) == 0:
                break
            pytest.fail("the suite failed")
        whom = random.choice(["parent", "worker", "all", "stop"])
        workers = [p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
        if whom == "worker" and workers:
            workers[0].kill()
            time.sleep(2)
        os.killpg(process.pid, signal.SIGKILL) if whom == "all" else process.send_signal(
            signal.SIGTERM if whom == "stop" else signal.SIGKILL
        )
        process.wait()
        kills += 1
        resumed += bool(half())
        for cell, seen in finished.items():
            assert inodes(cell) == seen, "a finished cell was touched"
        finished = {f.parent: inodes(f.parent) for f in (tmp_path / "killed" / "cells").glob("[!.]*/facts.json")}
    assert resumed, "no kill came while a cell was training"
    ended = contents(tmp_path / "killed")
    assert sorted(ended) == sorted(whole), "stray files, or missing ones"
    assert [name for name in whole if ended[name] != whole[name]] == []
