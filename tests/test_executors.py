"""Where jobs run changes nothing that they give; GPUs by free memory; a local Ray where Ray is installed."""

from __future__ import annotations

import ast
import importlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefzoo import benchmarks
from prefzoo.benchmarks import jobs, work
from prefzoo.benchmarks.executors import Executor, InProcess, Ray, Workers, parse_executor
from prefzoo.benchmarks.executors.gpus import GiB, Gpu, Places, needed, place, usable_gpus
from prefzoo.benchmarks.jobs import Job, Outcome, run_jobs, saved
from prefzoo.registry import UsageError
from prefzoo.training import Stopped

JOBS = """
import json, os, signal, time
from pathlib import Path

def number(params, inputs, folder):
    import torch
    seen = {"threads": torch.get_num_threads(), "cuda": os.environ.get("CUDA_VISIBLE_DEVICES")}
    total = params["x"] + sum(json.loads((f / "facts.json").read_text())["total"] for f in inputs.values())
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(params["x"])).cumsum(0).exp().sum().item()
    return {"total": total, "noise": noise, **seen}

def diverge(params, inputs, folder):
    (folder / "log").write_text("loss: nan")
    raise RuntimeError("the loss is nan at step 3")

def wait(params, inputs, folder):
    begun = time.time()
    (folder / "begun").touch()
    try:
        while time.time() < begun + params["seconds"]:  # in steps, as training: Ray interrupts no system call
            time.sleep(0.05)
    except KeyboardInterrupt:
        (folder / "stopped").touch()
        raise
    return {"cuda": os.environ.get("CUDA_VISIBLE_DEVICES"), "begun": begun}

def die_once(params, inputs, folder):
    if not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"total": 1}

def registered(params, inputs, folder):
    from prefzoo.losses import list_losses
    return {"total": int(params["loss"] in list_losses())}
"""

LOSS = """
from prefzoo.losses import register_loss
from prefzoo.records import LossOut, Pairs

@register_loss
def {name}(batch: Pairs) -> LossOut:
    "For a test."
    return LossOut(batch.chosen_ratio_B)
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Job functions in a module of this test alone."""
    module = f"executors_{re.sub(r'[^a-z0-9]', '_', tmp_path.name.lower())}"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"{module}.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    importlib.invalidate_caches()

    def job(name: str, call: str, needs: tuple[str, ...] = (), **more: Any) -> Job:
        params = {k: more.pop(k) for k in ("x", "seconds", "loss") if k in more}
        return Job(name, f"{module}:{call}", params, {n: n for n in needs}, **more)

    return SimpleNamespace(job=job, out=tmp_path / "out", tmp=tmp_path)


def diamond(shop: SimpleNamespace) -> list[Job]:
    return [
        shop.job("a", "number", x=1), shop.job("b", "number", ("a",), x=2, role="cell"),
        shop.job("bad", "diverge", ("a",), role="cell"), shop.job("after", "number", ("bad",), x=4),
        shop.job("without", "number", ("b", "bad"), x=8, optional=("bad",)),
        shop.job("end", "number", ("without",), x=16),
    ]  # fmt: skip


def timeless(outcome: Outcome) -> tuple[Any, ...]:
    facts = {k: v for k, v in (outcome.facts or {}).items() if k in ("total", "noise", "threads", "cuda")}
    return outcome.name, outcome.key, outcome.folder.name, facts, outcome.error, outcome.reused, outcome.role


def ray_or_skip() -> Ray:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'prefzoo[ray]'")
    return Ray(workers=2)


EXECUTORS = [
    pytest.param(lambda: Workers(2), id="workers"),
    pytest.param(ray_or_skip, id="ray", marks=pytest.mark.long),
]


# ------------------------------------------------------------------------------------------- the same everywhere


@pytest.mark.parametrize("other", EXECUTORS)
def test_outcomes_do_not_depend_on_the_executor(shop: SimpleNamespace, other: Callable[[], Executor]) -> None:
    line = diamond(shop)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        here = run_jobs(line, shop.tmp / "here", executor=InProcess())
        assert torch.get_num_threads() == 2, "it is as it was"
    finally:
        torch.set_num_threads(threads)
    there = run_jobs(line, shop.out, executor=other())
    assert {n: timeless(o) for n, o in there.items()} == {n: timeless(o) for n, o in here.items()}
    assert here["without"].facts and here["without"].facts["total"] == 11 and here["end"].facts["total"] == 27
    assert here["a"].facts["threads"] == 1 and here["a"].facts["cuda"] == ""
    assert here["bad"].error == "the loss is nan at step 3" and here["bad"].role == "cell"
    assert here["after"].error == "it needs bad, which failed"
    for out in (shop.out, shop.tmp / "here"):
        kept = next((out / "cells").glob("bad-*.failed"))
        assert sorted(f.name for f in kept.iterdir()) == ["error.txt", "log"]
    again = run_jobs(line, shop.out, executor=InProcess())
    assert sorted(n for n, o in again.items() if o.reused) == ["a", "b", "end", "without"]


def test_what_was_made_without_an_input_is_not_taken_for_what_is_made_with_it(
    shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is what rests on it: its key is the same, as its own inputs are."""
    line = [j for j in diamond(shop) if j.name != "after"]
    first = run_jobs(line, shop.out, executor=InProcess())
    module = importlib.import_module(line[0].call.partition(":")[0])
    monkeypatch.setattr(module, "diverge", lambda params, inputs, folder: {"total": 100})
    cured = run_jobs(line, shop.out, executor=InProcess())
    assert (first["end"].facts["total"], cured["end"].facts["total"]) == (27, 127)
    assert first["end"].key == cured["end"].key and first["end"].folder != cured["end"].folder


@pytest.mark.parametrize("other", [pytest.param(ray_or_skip, id="ray", marks=pytest.mark.long)])
def test_a_lost_worker_is_replaced_and_users_files_are_imported(
    shop: SimpleNamespace, other: Callable[[], Executor]
) -> None:
    mine = shop.tmp / "mine.py"
    mine.write_text(LOSS.format(name=f"of_{shop.tmp.name.rpartition('_')[0][-20:]}x"))
    name = re.search(r"def (\w+)", mine.read_text())[1]  # type: ignore[index]
    line = [shop.job("dies", "die_once"), shop.job("mine", "registered", loss=name)]
    notes: list[str] = []
    outcomes = run_jobs(line, shop.out, executor=other(), imports=[mine], note=notes.append)
    assert {n: o.facts["total"] for n, o in outcomes.items()} == {"dies": 1, "mine": 1}
    assert notes == ["dies: its process died; another one goes on with it"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "executor", [pytest.param(InProcess, id="in-process"), pytest.param(ray_or_skip, id="ray", marks=pytest.mark.long)]
)
def test_a_signal_stops_the_jobs_which_write_where_they_are(
    shop: SimpleNamespace, executor: Callable[[], Executor], number: signal.Signals
) -> None:
    line = [shop.job("slow", "wait", seconds=60), shop.job("next", "number", ("slow",), x=1)]

    def send() -> None:
        deadline = time.monotonic() + 60
        while not list((shop.out / "cells").glob(".slow-*.part/begun")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)
        os.kill(os.getpid(), number)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    where = executor()
    (shop.out / "cells").mkdir(parents=True)
    threading.Thread(target=send).start()
    with pytest.raises(Stopped, match=r"^stopped: 0 of 2 jobs are done") as stop:
        run_jobs(line, shop.out, executor=where)
    assert stop.value.exit_code == 128 + number
    assert [f.parent.name[:5] for f in (shop.out / "cells").glob(".*/stopped")] == [".slow"]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(("text", "expected"), [
    ("in-process", InProcess("cpu")), ("workers", Workers(3, "cpu")), ("workers:3", Workers(3, "cpu")),
    ("ray", Ray(None, 3, "cpu")), ("ray:auto", Ray("auto", 3, "cpu")), ("ray:head:6379", Ray("head:6379", 3, "cpu")),
    ("ray://head:10001", Ray("ray://head:10001", 3, "cpu")),
])  # fmt: skip
def test_executors_by_name(text: str, expected: Executor) -> None:
    assert parse_executor(text, None if text == "in-process" else 3, "cpu") == expected


@pytest.mark.parametrize(("arguments", "words"), [
    (("worker",), "did you mean 'workers'"), (("in-proces",), "did you mean 'in-process'"),
    (("workers:many",), "a number of processes"), (("workers:0",), "a number of processes"),
    (("workers:4", 2), "--workers 2 differ"), (("in-process", 4), "drop --workers 4"),
    (("workers", None, "cudda"), "did you mean 'cuda'"),
])  # fmt: skip
def test_a_wrong_executor_is_told(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_executor(*arguments)


# ------------------------------------------------------------------------------------------------------------ GPUs

free = st.integers(0, 80 * GiB)
gpus_of = st.lists(st.tuples(free, free), max_size=8).map(
    lambda sizes: [Gpu(f"GPU-{i}", max(s), min(s)) for i, s in enumerate(sizes)]
)


@given(st.integers(0, 100 * GiB), gpus_of, st.integers(1, 4))
def test_a_job_gets_the_gpu_that_has_the_most_left(memory: int, gpus: list[Gpu], share: int) -> None:
    left = [gpu.free - needed(memory, gpu, share) for gpu in gpus]
    index = place(memory, gpus, share)
    if index is None:
        assert all(n < 0 for n in left)
    else:
        assert left[index] == max(left) >= 0


@given(gpus_of.filter(bool), st.lists(st.tuples(st.booleans(), free), max_size=30), st.integers(1, 12))
def test_no_gpu_is_ever_given_out_twice_over(gpus: list[Gpu], events: list[tuple[bool, int]], jobs: int) -> None:
    """And when everything has been given back, all is free again."""
    whole = [Gpu(g.uuid, g.capacity, g.capacity) for g in gpus]
    places, running = Places(whole, jobs), []
    for number, (ends, memory) in enumerate(events):
        if ends and running:
            places.give_back(running.pop())
        elif memory > max(g.capacity for g in whole):
            with pytest.raises(UsageError, match="no GPU has more than"):
                places.take(str(number), memory)
        elif places.take(str(number), memory) is not None:
            running.append(str(number))
        else:
            assert running, "a job waits though all is free"
        assert all(0 <= g.free <= g.capacity for g in places.gpus)
    for name in running:
        places.give_back(name)
    assert places.gpus == whole


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """A program nvidia-smi of our own; the mask is off."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "bin").mkdir()

    def install(prints: str, code: int = 0) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<END\n{prints}\nEND\nexit {code}\n")
        program.chmod(0o755)

    return install


TWO = "0, GPU-aa11, 10240\n1, GPU-bb22, 20480"


@pytest.mark.parametrize(("mask", "uuids"), [
    (None, ["GPU-aa11", "GPU-bb22"]), ("", []), ("1", ["GPU-bb22"]), ("1,0", ["GPU-bb22", "GPU-aa11"]),
    ("GPU-bb", ["GPU-bb22"]), ("0,-1,1", ["GPU-aa11"]), ("-1", []),
])  # fmt: skip
def test_a_mask_is_read_as_cuda_does(smi: Callable[..., None], mask: str | None, uuids: list[str]) -> None:
    smi(TWO)
    found = usable_gpus("auto", {} if mask is None else {"CUDA_VISIBLE_DEVICES": mask})
    assert [g.uuid for g in found] == uuids
    assert all(g.free == g.capacity == {"GPU-aa11": 10, "GPU-bb22": 20}[g.uuid] * GiB for g in found)
    assert usable_gpus("cpu") == []


@pytest.mark.parametrize(("prints", "code", "mask", "words"), [
    ("no devices were found", 6, None, "no GPU was found: nvidia-smi says 'no devices were found'"),
    (TWO, 0, "", "hides all of them"), (TWO, 0, "2", "names '2'; nvidia-smi lists 0 .GPU-aa11., 1"),
    (TWO, 0, "GPU-", "names 'GPU-'"), ("0, GPU-aa11, [N/A]", 0, None, "'.N/A.' as the free memory of GPU-aa11"),
])  # fmt: skip
def test_cuda_without_a_usable_gpu_is_told(
    smi: Callable[..., None], prints: str, code: int, mask: str | None, words: str
) -> None:
    smi(prints, code)
    with pytest.raises(UsageError, match=words):
        usable_gpus("cuda", {} if mask is None else {"CUDA_VISIBLE_DEVICES": mask})


def test_workers_see_one_gpu_each_and_wait_for_room(shop: SimpleNamespace, smi: Callable[..., None]) -> None:
    """Two of 15 GiB on GPUs of 10 and 20: the second waits for the larger one, though a worker is free."""
    smi(TWO)
    large = {"on_device": True, "memory": 15 * GiB, "seconds": 0.3}
    line = [
        shop.job("a", "wait", **large), shop.job("b", "wait", **large), shop.job("cpu", "wait", seconds=0.1),
        shop.job("huge", "wait", seconds=0, on_device=True, memory=30 * GiB),
    ]  # fmt: skip
    outcomes = run_jobs(line, shop.out, executor=Workers(2, "cuda"))
    a, b, cpu = (outcomes[n].facts for n in ("a", "b", "cpu"))
    assert a and b and cpu and a["cuda"] == b["cuda"] == "GPU-bb22" and cpu["cuda"] == ""
    assert abs(a["begun"] - b["begun"]) >= 0.3
    assert outcomes["huge"].error == (
        "it needs 30.0 GiB on a GPU, and no GPU has more than 20.0 GiB free. Make its batches smaller, stop what else "
        "uses the GPUs, or use --device cpu."
    )


# ----------------------------------------------------------------------------------------- what the harness says of it


def test_what_sharing_saved() -> None:
    """start (10 s) is needed by three cells and a trial, data (5 s) through reward by two, choice (1 s) by one."""
    line = [
        Job("start", "m:f", {}), Job("data", "m:f", {}), Job("reward", "m:f", {}, {"data": "data"}),
        Job("trial", "m:f", {}, {"start": "start"}, role="trial"),
        Job("choice", "m:f", {}, {"trial": "trial"}, role="choice"),
        Job("x", "m:f", {}, {"start": "start", "reward": "reward"}, role="cell"),
        Job("y", "m:f", {}, {"start": "start", "reward": "reward", "choice": "choice"}, role="cell"),
        Job("z", "m:f", {}, {"start": "start", "cell:x": "x"}, role="cell"),
        Job("j", "m:f", {}, {"x": "x", "start": "start"}, role="judgement"),
    ]  # fmt: skip
    seconds = {"start": 10, "data": 5, "reward": 3, "trial": 7, "choice": 1, "x": 2, "y": 2, "z": 2, "j": 1}
    outcomes = {n: Outcome(n, "key", Path(n), {"seconds": s}, reused=n in ("x", "start")) for n, s in seconds.items()}
    outcomes["z"] = Outcome("z", "key", Path("z"), None, "it failed")
    found = saved(line, outcomes)
    assert found.shared == {"start": 30, "data": 5, "reward": 3} and found.reused == 12 and found.seconds == 50


def test_every_module_of_the_harness_that_a_job_goes_through_is_in_its_key() -> None:
    """By what modules import: an edit of a module that counts for no key would leave old numbers standing."""
    root = Path(benchmarks.__file__).resolve().parent
    counted = {file for pattern in jobs.HARNESS for file in root.glob(pattern)}
    outside = {"executors", "suites", "statistics"}  # where, what, and what is computed anew from rows

    def imported(file: Path) -> set[Path]:
        found = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prefzoo.benchmarks"):
                parts = node.module.split(".")[2:]  # type: ignore[union-attr]
                found |= {root.joinpath(*parts, a.name).with_suffix(".py") for a in node.names}
                found |= {root.joinpath(*parts).with_suffix(".py")} if parts else set()
        return {f for f in found if f.exists() and f.relative_to(root).parts[0] not in outside}

    assert {imported_file for file in counted for imported_file in imported(file)} <= counted
    assert Path(work.__file__).resolve() in counted
