"""Faults, each really tried: full disks, lost folders, damaged files, NaN, hanging rewards, clocks, signals.

Where a run can go on afterwards it must end as the run that had no fault, to the last bit.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import prefzoo
from prefzoo.algorithm import Algorithm, Stage, Term
from prefzoo.locks import locked
from prefzoo.losses import create_loss
from prefzoo.parts.source import DatasetRows
from prefzoo.registry import RunError, UsageError
from prefzoo.training import Stopped, checkpoint, setup
from prefzoo.training import run as run_module
from prefzoo.training.engine import Engine, NonFiniteError

pytestmark = pytest.mark.usefixtures("no_pictures")

PAIRS = [
    {"prompt": f"{a} and {b}:", "chosen": f" {a + b} is it", "rejected": f" no {a * b}"}
    for a in range(6)
    for b in range(6)
]
RUN: dict[str, Any] = {
    "model": "tiny", "dataset": PAIRS, "learning_rate": 3e-3, "warmup_steps": 2, "rows_per_step": 8, "max_steps": 10,
    "logging_steps": 1, "save_steps": 2, "eval_split": 0.2, "eval_steps": 3, "best_metric": "loss", "quiet": True,
}  # fmt: skip
STEPS, HALF = 7, 6  # steps taken when a run is left, and its last checkpoint


def reward(completions, **_):
    """Waits for ever when the environment says so: its source, which counts, is the same then."""
    while os.environ.get("HANG") and int(os.environ["HANG"]) <= int(os.environ.get("CALLS", "0")):
        time.sleep(0.01)
    os.environ["CALLS"] = str(int(os.environ.get("CALLS", "0")) + 1)
    return [float(len(set(c))) for c in completions]


SAMPLED = {k: v for k, v in RUN.items() if k not in ("rows_per_step", "best_metric", "eval_split", "eval_steps")} | {
    "reward": reward, "prompts_per_step": 4, "group_size": 2, "max_new_tokens": 5, "inner_epochs": 2,
    "minibatches": 2, "max_steps": 4, "save_steps": 100,
}  # fmt: skip


def end(folder: Path) -> dict[str, Any]:
    """What a run has come to: weights as files, metrics without their times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = {f"{f.parent.name}/{f.name}": f.read_bytes() for f in folder.glob("*/model.safetensors")}
    models = {name: content for name, content in files.items() if name.startswith(("final", "best"))}
    assert not halves(folder)
    return {"metrics": [{k: v for k, v in row.items() if k != "time"} for row in rows], **models}


def halves(folder: Path) -> list[str]:
    return [f.name for f in folder.iterdir() if f.name.startswith(".")]


def left(folder: Path, steps: int = STEPS, **options: Any) -> Path:
    """A run that was left in the middle, as a kill would: nothing is written any more."""
    run = prefzoo.steps("dpo", output_dir=folder, **RUN | options)
    for step in run:
        if step.number == steps:
            break
    run._steps.close()
    return folder


def resumed(folder: Path, algorithm: Any = "dpo", **options: Any) -> dict[str, Any]:
    prefzoo.train(algorithm, output_dir=folder, resume=True, **(RUN if algorithm == "dpo" else {}) | options)
    return end(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The end of the run without a fault."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    prefzoo.train("dpo", output_dir=folder, **RUN)
    return end(folder)


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was left after step 7, with checkpoints 4 and 6. Tests work on copies."""
    return left(tmp_path_factory.mktemp("left") / "run")


def raise_signal(number: int = signal.SIGTERM) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread")
    signal.raise_signal(number)


# ------------------------------------------------------------------------------------------- disks and folders


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("a small file system can be mounted by root only")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no mount here: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> None:
    """To the last byte."""
    with (place / "ballast").open("wb", buffering=0) as file:
        for size in (2**20, 2**10, 1):
            try:
                while file.write(b"x" * size) == size:
                    pass
            except OSError:
                pass


@pytest.mark.parametrize("moment", ["checkpoint", "metrics", "result"])
def test_a_full_disk_is_told_and_after_making_room_the_run_goes_on(moment, disk, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "FIRST_SAVE", 0.0)
    monkeypatch.setattr(run_module, "SHARE", 1e9)  # where nobody says when: after every step
    options = {
        "checkpoint": {"save_steps": 4},
        "metrics": {"max_steps": 60, "save_steps": 20, "eval_steps": 100},
        "result": {"save_steps": None},
    }[moment]
    at = {"checkpoint": 8, "metrics": 21, "result": 10}[moment]
    good = {"checkpoint": 4, "metrics": 20, "result": 9}[moment]
    if moment == "metrics":  # more lines than the rest of a page holds
        prefzoo.train("dpo", output_dir=tmp_path / "whole", **RUN | options)
        whole = end(tmp_path / "whole")

    def full(step: int, *_: Any) -> None:
        if step == at:
            fill(disk)

    words = {"checkpoint": "checkpoint-8 could", "metrics": "metrics.jsonl could|checkpoint", "result": "result could"}
    cure = f"make room, and go on from checkpoint-{good} with resume"
    with pytest.raises(RunError, match=rf"({words[moment]}).*disk is full.*{cure}"):
        prefzoo.train("dpo", output_dir=disk / "run", callback=full, **RUN | options)
    assert halves(disk / "run") == []
    assert checkpoint.whole(checkpoint.found(disk / "run")[-1].absolute()).number == good
    (disk / "ballast").unlink()
    assert resumed(disk / "run", **options) == whole


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_cannot_be_written_to_is_told_before_the_first_step(resume, disk, middle):
    if resume:
        shutil.copytree(middle, disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(UsageError, match=r"cannot be written to.*Read-only"):
        prefzoo.train("dpo", output_dir=disk / "run", resume=resume, **RUN)


def test_a_folder_that_is_gone_is_told_and_not_made_again(tmp_path):
    with pytest.raises(RunError, match=r"the folder is gone; bring it back"):
        prefzoo.train(
            "dpo", output_dir=tmp_path / "run", callback=lambda step, *_: step == 5 and lost(tmp_path / "run"), **RUN
        )
    assert list(tmp_path.iterdir()) == []


def lost(folder: Path) -> None:
    shutil.rmtree(folder)


def test_a_folder_that_comes_back_is_gone_on_with(tmp_path, whole):
    run, away = tmp_path / "run", tmp_path / "away"
    with pytest.raises(RunError, match="the folder is gone"):
        prefzoo.train("dpo", output_dir=run, callback=lambda step, *_: step == 5 and run.rename(away) and None, **RUN)
    away.rename(run)
    assert resumed(run) == whole


def test_what_a_killed_process_left_half_done_is_finished_or_removed(middle, tmp_path, whole):
    run = shutil.copytree(middle, tmp_path / "run")
    (run / "best").rename(run / ".best.old")  # killed between the two renames
    for name in (".checkpoint-8.part", ".checkpoint-99.part", ".final.part", ".checkpoint-2.gone", ".checkpoint-6.old"):
        (run / name).mkdir()
        (run / name / "model.safetensors").write_bytes(b"half")
    (run / ".run.json.part").write_text("{")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert resumed(run) == whole


# ---------------------------------------------------------------------------------------- damaged checkpoints


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    place = len(content) // 2
    if how == "flipped":
        content[place] ^= 0x10
    file.unlink() if how == "missing" else file.write_bytes(content[:place] if how == "cut" else content)


@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_whatever_file_is_damaged_the_checkpoint_before_it_is_taken(how, middle, tmp_path):
    files = [f.name for f in (middle / f"checkpoint-{HALF}").iterdir()]
    assert {"model.safetensors", "state.safetensors", "state.json", "manifest.json", "config.json"} <= set(files)
    for name in files:
        said: list[str] = []
        shutil.copytree(middle, tmp_path / name)
        damage(tmp_path / name / f"checkpoint-{HALF}" / name, how)
        found = checkpoint.newest(tmp_path / name, said.append)
        assert found is not None and found.number == HALF - 2
        assert len(said) == 1 and f"checkpoint-{HALF}" in said[0] and name in said[0]


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json"])
def test_a_run_with_a_damaged_checkpoint_ends_as_one_without(name, middle, whole, tmp_path, capsys):
    run = shutil.copytree(middle, tmp_path / "run")
    damage(run / f"checkpoint-{HALF}" / name, "flipped")
    assert resumed(run) == whole
    assert f"{name} is not what was written" in capsys.readouterr().err


def test_where_all_checkpoints_are_damaged_nothing_is_lost(middle, tmp_path):
    run = shutil.copytree(middle, tmp_path / "run")
    for folder in checkpoint.found(run):
        damage(folder / "state.json", "cut")
    with pytest.raises(RunError, match=r"every checkpoint in .* is damaged"):
        resumed(run)
    assert {f.name for f in run.iterdir()} == {f.name for f in middle.iterdir()}


def test_a_damaged_checkpoint_does_not_push_whole_ones_out(tmp_path):
    """It is newer than all that the resumed run writes before it comes there again."""
    run = left(tmp_path / "run", save_total_limit=3)
    damage(run / f"checkpoint-{HALF}" / "state.json", "flipped")
    again = prefzoo.steps("dpo", output_dir=run, resume=True, **RUN | {"save_total_limit": 1, "save_steps": 1})
    assert next(again).number == HALF - 1
    again._steps.close()
    assert [f.name for f in checkpoint.found(run)] == [f"checkpoint-{HALF - 1}"]


def test_logs_are_on_the_disk_before_the_checkpoint_that_counts_on_them(tmp_path, monkeypatch):
    synced: list[str] = []
    sync = os.fsync

    def told(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        sync(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc")
    monkeypatch.setattr(os, "fsync", told)
    run = left(tmp_path / "run", 2)
    assert (run / "checkpoint-2").exists()
    assert synced.index("metrics.jsonl") < synced.index("run", synced.index("manifest.json"))


# ------------------------------------------------------------------------------------------- not a finite number

BAD = 6  # the step whose batch gets a NaN


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of the third row of one batch is NaN."""
    step = Engine._optimizer_step

    def poisoned(engine: Engine, main: Any, *rest: Any) -> bool:
        if engine.step == BAD - 1:
            ref_logps = main.tokens["ref_logps"].clone()
            ref_logps[int(main.completions.lengths[:2].sum())] = math.nan
            main = main.with_tokens(ref_logps=ref_logps)
        return step(engine, main, *rest)

    monkeypatch.setattr(Engine, "_optimizer_step", poisoned)


def test_stop_leaves_the_last_good_state_and_the_run_goes_on_from_it(poison, tmp_path, whole, monkeypatch):
    with pytest.raises(NonFiniteError, match=rf"step {BAD}: .* nan.*stopped before the step"):
        prefzoo.train("dpo", output_dir=tmp_path / "run", **RUN)
    last = checkpoint.newest(tmp_path / "run", pytest.fail)
    assert last is not None and last.number == BAD - 1
    assert all(t.isfinite().all() for t in last.tensors().values() if t.is_floating_point())
    said = json.loads((tmp_path / "run" / f"post-mortem-{BAD}.json").read_text())
    assert "nan" in json.dumps(said).lower()
    monkeypatch.undo()
    assert resumed(tmp_path / "run") == whole


def without_step(monkeypatch: pytest.MonkeyPatch, instead: Any = lambda engine: None) -> None:
    step = Engine._optimizer_step

    def left_out(engine: Engine, main: Any, *rest: Any) -> bool:
        if engine.step != BAD - 1:
            return step(engine, main, *rest)
        instead(engine)
        engine.place += 1
        engine.mark()
        return True

    monkeypatch.setattr(Engine, "_optimizer_step", left_out)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_skip_is_the_run_without_the_step_and_rollback_the_run_that_goes_back(policy, poison, tmp_path, monkeypatch):
    out, options = tmp_path / "run", RUN | {"save_steps": 4}
    prefzoo.train("dpo", output_dir=out, on_nonfinite=policy, **options)
    monkeypatch.undo()
    other = tmp_path / "other"

    def back(engine: Engine) -> None:
        good = checkpoint.whole(other / "checkpoint-4")
        engine.go_back(good.tensors(), good.facts["engine"])

    without_step(monkeypatch, *([back] if policy == "rollback" else []))
    prefzoo.train("dpo", output_dir=other, **options)
    for name in ("final", "best"):
        assert (out / name / "model.safetensors").read_bytes() == (other / name / "model.safetensors").read_bytes()


def test_rollback_takes_the_weights_of_the_checkpoint(poison, tmp_path):
    options = RUN | {"save_steps": 4, "on_nonfinite": "rollback"}
    for step in prefzoo.steps("dpo", output_dir=tmp_path / "run", **options):
        if step.number == BAD:
            there = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
            mine = step.policy.model.state_dict()
            assert all(torch.equal(mine[name], value) for name, value in there.items())
            break


def test_a_skipped_step_survives_a_resume(poison, tmp_path):
    ends = []
    for name in ("whole", "left"):
        out = tmp_path / name
        if name == "left":
            left(out, on_nonfinite="skip")
        prefzoo.train("dpo", output_dir=out, resume=True, on_nonfinite="skip", **RUN)
        ends.append(end(out))
    assert ends[0] == ends[1]


# --------------------------------------------------------------------------------------------- signals and clocks


@pytest.fixture
def no_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALLS", "0")
    monkeypatch.delenv("HANG", raising=False)


def test_a_reward_that_hangs_is_named_and_sigterm_ends_it_with_a_checkpoint(tmp_path, no_calls, monkeypatch, capfd):
    prefzoo.train("grpo", output_dir=tmp_path / "whole", **SAMPLED)
    monkeypatch.setenv("HANG", "2")
    monkeypatch.setenv("CALLS", "0")
    said: list[str] = []
    hanging = prefzoo.steps("grpo", output_dir=tmp_path / "run", stuck_minutes=0.005, **SAMPLED)

    def hear(text: str) -> None:
        said.append(text)
        if "nothing has moved" in text and "time.sleep(0.01)" in text:
            os.kill(os.getpid(), signal.SIGTERM)

    hanging.watchdog._say = hear
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals come to the main thread")
    with pytest.raises(Stopped) as stopped:
        for _ in hanging:
            pass
    assert stopped.value.exit_code == 143 and any("'reward'" in s and "test_faults.py" in s for s in said)
    assert [f.name for f in checkpoint.found(tmp_path / "run")] == ["checkpoint-2"] and not halves(tmp_path / "run")
    monkeypatch.delenv("HANG")
    assert resumed(tmp_path / "run", "grpo", **SAMPLED) == end(tmp_path / "whole")


@pytest.mark.parametrize(("number", "place"), [
    (signal.SIGTERM, 2), (signal.SIGINT, 3), pytest.param(signal.SIGTERM, 0, marks=pytest.mark.long),
    pytest.param(signal.SIGINT, 0, marks=pytest.mark.long), pytest.param(signal.SIGTERM, 3, marks=pytest.mark.long),
    pytest.param(signal.SIGINT, 2, marks=pytest.mark.long),
])  # fmt: skip
def test_a_signal_inside_a_rollout_step_keeps_its_samples(number, place, tmp_path, no_calls, monkeypatch):
    """The step that is being taken is finished; none is taken twice, nothing is sampled twice."""
    prefzoo.train("grpo", output_dir=tmp_path / "whole", **SAMPLED)
    calls, taken, step = int(os.environ["CALLS"]), [], Engine._step
    monkeypatch.setenv("CALLS", "0")

    def struck(engine: Engine, *rest: Any) -> None:
        taken.append((engine.step, engine.place))
        if taken[-1] == (2, place) and len(taken) == len(set(taken)):
            raise_signal(number)
        step(engine, *rest)

    monkeypatch.setattr(Engine, "_step", struck)
    with pytest.raises(Stopped):
        prefzoo.train("grpo", output_dir=tmp_path / "run", **SAMPLED)
    (last,) = checkpoint.found(tmp_path / "run")
    engine = json.loads((last / "state.json").read_text())["engine"]
    assert (engine["step"], engine["place"]) == (2, place + 1)
    assert engine["samples"].get("rollouts") == (None if place == 3 else "completions")
    assert resumed(tmp_path / "run", "grpo", **SAMPLED) == end(tmp_path / "whole")
    assert len(taken) == len(set(taken)) == 16 and int(os.environ["CALLS"]) == calls


def test_a_reward_that_catches_everything_does_not_keep_a_run_from_ending(tmp_path):
    """And what it gave after the signal is not trained on."""
    steps: list[int] = []

    def careless(completions, trainer_state, **_):
        steps.append(trainer_state.global_step)
        with contextlib.suppress(BaseException):
            if steps[-1] == 2:
                raise_signal()
        return [float(len(c)) for c in completions]

    with pytest.raises(Stopped):
        prefzoo.train("grpo", output_dir=tmp_path / "run", **SAMPLED | {"reward": careless})
    last = checkpoint.whole(checkpoint.found(tmp_path / "run")[-1]).facts["engine"]
    assert (last["step"], last["place"]) == (2, 0), "no optimizer step was taken on it"
    assert steps[-1] == 2


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_signal_while_the_best_model_is_replaced_leaves_it_whole(moment, tmp_path, monkeypatch, whole):
    replace, seen = os.replace, []

    def struck(source: Any, target: Any) -> None:
        best = Path(source).name == ".best.part"
        seen.extend([1] if best else [])
        if best and len(seen) == 2 and moment == "before":
            raise_signal()
        replace(source, target)
        if best and len(seen) == 2 and moment == "after":
            raise_signal()

    monkeypatch.setattr(os, "replace", struck)
    with pytest.raises(Stopped):
        prefzoo.train("dpo", output_dir=tmp_path / "run", **RUN)
    assert not halves(tmp_path / "run") and (tmp_path / "run" / "best" / "model.safetensors").exists()
    monkeypatch.undo()
    assert resumed(tmp_path / "run") == whole


@pytest.mark.parametrize("moment", ["preparation", "evaluation"])
def test_a_signal_between_two_stages_loses_neither(moment, tmp_path, monkeypatch):
    stages = [Stage(source=DatasetRows("pairs"), terms=(Term(create_loss(name)),)) for name in ("ipo", "dpo")]
    both, options = Algorithm(stages=tuple(stages)), RUN | {"save_steps": None, "max_steps": 5}
    prefzoo.train(both, output_dir=tmp_path / "whole", **options)
    owner, name = {"preparation": (setup, "make_engine"), "evaluation": (Engine, "evaluate")}[moment]
    inner, taken, step = getattr(owner, name), [], Engine._step

    def struck(*arguments: Any, **named: Any) -> Any:
        if len(taken) == 5 and (moment == "preparation" or arguments[0].step == 0):
            raise_signal()
        return inner(*arguments, **named)

    def counted(engine: Engine, *rest: Any) -> None:
        taken.append(engine.step)
        step(engine, *rest)

    monkeypatch.setattr(Engine, "_step", counted)
    monkeypatch.setattr(owner, name, struck)
    with pytest.raises(Stopped):
        prefzoo.train(both, output_dir=tmp_path / "run", **options)
    monkeypatch.setattr(owner, name, inner)
    assert resumed(tmp_path / "run", both, **options) == end(tmp_path / "whole")
    assert taken == 2 * [0, 1, 2, 3, 4], "no step is taken twice"


def test_a_later_stage_is_held_to_what_the_one_before_has_made(tmp_path):
    stages = [Stage(source=DatasetRows("pairs"), terms=(Term(create_loss(name)),)) for name in ("ipo", "dpo")]
    both = Algorithm(stages=tuple(stages))
    prefzoo.train(both, output_dir=tmp_path / "whole", **RUN)
    run = prefzoo.steps(both, output_dir=tmp_path / "run", **RUN)
    for step in run:
        if (step.stage, step.number) == (1, 5):
            break
    run._steps.close()
    again = prefzoo.steps(both, output_dir=tmp_path / "run", resume=True, **RUN)
    assert [(s.stage, s.number) for s in again] == [(1, n) for n in range(5, 11)], "nothing is done again"
    assert end(tmp_path / "run") == end(tmp_path / "whole")


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch, whole):
    dice, now = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: now() + dice.uniform(-1e6, 1e6))
    left(tmp_path / "run")
    assert resumed(tmp_path / "run") == whole
    times = [json.loads(line)["time"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert times == sorted(times) and times[0] >= 0


def test_how_often_a_reward_model_is_written_moves_no_random_number(tmp_path):
    """Its head is drawn anew wherever it is written, and must not be drawn from the run's generators."""
    states = []
    options = {k: v for k, v in RUN.items() if k not in ("eval_split", "eval_steps", "best_metric")}
    for every in (1, 5):
        torch.manual_seed(0)
        prefzoo.train("reward_model", output_dir=tmp_path / str(every), **options | {"save_steps": every})
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# ---------------------------------------------------------------------------------- other runs, other processes


def files(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize(("change", "words", "allowed"), [
    ({"learning_rate": 1e-3}, "learning_rate", "learning_rate"),
    ({"dataset": PAIRS[:-1]}, "data", "data"),
    ({"beta": 0.3}, "beta", "beta"),
    ({}, "versions", "versions"),
], ids=["configuration", "data", "option", "version"])  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused_and_left_alone(change, words, allowed, middle, tmp_path, monkeypatch):
    model = {"model": middle / "checkpoint-4"}  # the tiny one has a tokenizer learned from the data
    run = left(tmp_path / "run", **model)
    before, change = files(run), change | model
    if words == "versions":  # as if the checkpoint were of another version of prefzoo
        told = run_module.describe
        other = lambda *a: (r := told(*a)) | {"versions": r["versions"] | {"prefzoo": "9.9"}}  # noqa: E731
        monkeypatch.setattr(run_module, "describe", other)
    with pytest.raises(UsageError, match=rf"(?s)checkpoint-{HALF} is of another run.*{words}.*may_differ"):
        prefzoo.train("dpo", output_dir=run, resume=True, **RUN | change)
    assert files(run) == before
    done = prefzoo.train("dpo", output_dir=run, resume=True, may_differ=allowed, **RUN | change)
    assert done.spent.optimizer_steps == 10


def test_two_processes_in_one_folder_the_second_is_refused(tmp_path, whole):
    run = tmp_path / "run"
    first = prefzoo.steps("dpo", output_dir=run, **RUN)
    for step in first:
        if step.number == 3:
            before = files(run)
            with pytest.raises(UsageError, match=r"process .* works in"):
                prefzoo.train("dpo", output_dir=run, resume=True, **RUN)
            with (
                pytest.raises(UsageError, match=r"process .* works in"),
                prefzoo.steps("dpo", output_dir=run, resume=True, **RUN) as second,
            ):
                next(second)
            assert files(run) == before, "the second has changed the folder of the first"
    first.finish()
    assert end(run) == whole
    with locked(run):
        pass
