"""The kill test: runs that die at random times, and are resumed, end as runs that never died, to the last bit.

``python tests/kills.py --kills 100 --seed 0`` prints a table and exits with 1 on any difference. Every run is real:
a forked process trains, writes checkpoints and its result; this one, which has torch loaded but never uses it, kills.
``--signal TERM`` and ``--signal INT`` ask instead of killing, and then no optimizer step may be taken twice.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}

import numpy as np
import torch

import prefzoo
from prefzoo.algorithm import Algorithm, Stage, Term
from prefzoo.losses import create_loss
from prefzoo.parts.reference import Moving
from prefzoo.parts.source import DatasetRows
from prefzoo.training import Stopped, checkpoint
from prefzoo.training import run as run_module
from prefzoo.training.engine import Engine
from prefzoo.training.guards import Watchdog

torch.set_num_threads(1)

PAIRS = [
    {"prompt": f"{a} and {b}:", "chosen": f" {a + b} is it", "rejected": f" no {a * b}"}
    for a in range(8)
    for b in range(8)
]
SHOWN = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
SIDES = ("prompt", "completion")


def moody(completions, log_metric, **_):
    """Draws from every global generator: a run that forgets one of them ends elsewhere."""
    noise = [random.random() + np.random.rand() + float(torch.rand(())) for _ in completions]
    log_metric("noise", sum(noise))
    return [len(set(c)) + n for c, n in zip(completions, noise, strict=True)]


def of_pairs(*losses: str, **stage: Any) -> Algorithm:
    made = [Stage(source=DatasetRows("pairs"), terms=(Term(create_loss(name)),), **stage) for name in losses]
    return Algorithm(stages=tuple(made))


COMMON = {
    "model": "tiny", "dataset": PAIRS, "learning_rate": 3e-3, "warmup_steps": 3, "logging_steps": 2, "save_steps": 4,
    "eval_split": 0.125, "best_metric": "loss",
}  # fmt: skip
ROWS = COMMON | {"rows_per_step": 8, "max_steps": 60, "eval_steps": 10, "save_steps": 7}
SAMPLED = COMMON | {
    "reward": moody, "max_new_tokens": 6, "prompts_per_step": 4, "max_steps": 15, "eval_steps": 5, "save_steps": 2,
    "best_metric": "reward",
}  # fmt: skip
GROUPS = SAMPLED | {"group_size": 4, "inner_epochs": 2, "minibatches": 3}
AUTOMATIC = {"save_steps": None}

RUNS: dict[str, tuple[str | Callable[[], Algorithm], dict[str, Any]]] = {
    "sft": ("sft", ROWS | {"best_metric": None}),
    "sft, LoRA": ("sft", ROWS | {"lora": True, "lora_rank": 4, "save_total_limit": 1}),
    "reward_model": ("reward_model", ROWS | {"best_metric": "rewards/accuracies", "optimizer": "sgd"}),
    "dpo": ("dpo", ROWS | {"tokens_per_batch": 120, "schedule": "cosine"}),
    "dpo, moving reference": (lambda: of_pairs("dpo", reference=Moving(0.5, every=3)), ROWS | {"save_steps": 5}),
    "ipo, then dpo": (lambda: of_pairs("ipo", "dpo"), ROWS | {"max_steps": 30}),
    "kto": ("kto", ROWS | AUTOMATIC),
    "rejection_sampling": ("rejection_sampling", SAMPLED | {
        "samples_per_prompt": 4, "prompts_per_round": 8, "epochs_per_round": 3, "rows_per_update": 3,
        "max_new_tokens": 24,
    }),
    "ppo": ("ppo", SAMPLED | {
        "inner_epochs": 3, "minibatches": 2, "prompts_per_step": 8, "kl_target": 0.5, "kl_horizon": 60, "ptx": 0.1,
        "ptx_dataset": SHOWN,
    }),
    "grpo": ("grpo", GROUPS | {"deterministic": True}),
    "rlvr": ("rlvr", GROUPS | AUTOMATIC | {"dtype": "bfloat16"}),
}  # fmt: skip
del RUNS["rejection_sampling"][1]["prompts_per_step"]
HALF = re.compile(r"\..*\.(part|old|gone)$")


# ------------------------------------------------------------------------------------------ the process that dies


def train(name: str, out: Path, resume: bool) -> None:
    """The run, with a journal of its optimizer steps beside its folder, and its phase for whoever kills it."""
    phase = os.open(out.with_suffix(".phase"), os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    journal = os.open(out.with_suffix(".steps"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    doing, prepare, step = Watchdog.doing, Engine._optimizer_step, Engine._step
    batch = {}

    def tell(dog: Watchdog, what: str) -> None:
        os.pwrite(phase, what.encode().ljust(80)[:80], 0)
        doing(dog, what)

    def prepare_told(engine: Engine, main: Any, *rest: Any) -> bool:
        content = b"".join(value.numpy().tobytes() for _, value in sorted(main.tensors().items()))
        batch["hash"] = hashlib.sha256(content).hexdigest()[:16]
        return prepare(engine, main, *rest)

    def step_told(engine: Engine, *rest: Any) -> None:
        step(engine, *rest)
        stage = "+".join(term.loss.name for term in engine.stage.terms)
        os.write(journal, f"{stage} {engine.step} {engine.place}={batch['hash']}\n".encode())

    Watchdog.doing, Engine._optimizer_step, Engine._step = tell, prepare_told, step_told
    run_module.FIRST_SAVE, run_module.SHARE = 0.1, 0.5
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    algorithm, arguments = RUNS[name]
    algorithm = algorithm if isinstance(algorithm, str) else algorithm()
    prefzoo.train(algorithm, **arguments, output_dir=out, resume=resume, quiet=True)


def start(name: str, out: Path, resume: bool) -> int:
    """A process that trains."""
    return forked(lambda: train(name, out, resume), out.with_suffix(".said"))


def forked(work: Callable[[], object], said: Path) -> int:
    """Fork; this process has but one thread, and has not computed anything: the child is as good as a new one."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1), os.dup2(handle, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        work()
        code = 0
    except Stopped as stopped:
        code = stopped.exit_code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
    raise AssertionError


# ------------------------------------------------------------------------------------------------- what it left


def ends(out: Path) -> dict[str, Any]:
    """Everything a run leaves: every file to the last byte, but for the time it took."""
    found: dict[str, Any] = {"order": dict(line.split("=") for line in journal(out))}
    for file in sorted(out.rglob("*")):
        name = file.relative_to(out).as_posix()
        if file.is_dir():
            found[name] = "folder"
        elif file.suffix == ".jsonl" or file.name in ("run.json", "state.json", "manifest.json"):
            lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
            found[name] = [timeless(json.loads(line)) for line in lines]
        elif file.name == "README.md":
            found[name] = re.sub(r"\d+ s \|", "", file.read_text())
        else:
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


MOODY = (
    "time",
    "seconds",
    "cpu_seconds",
    "state.json",
    "README.md",
    "metrics.jsonl",
    "layer",
    "commit",
)  # the last two: of the source


def timeless(value: Any) -> Any:
    """Without times and what is made of them: hashes and lengths of files with times."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in MOODY}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def journal(out: Path) -> list[str]:
    return out.with_suffix(".steps").read_text().splitlines() if out.with_suffix(".steps").exists() else []


def halves(out: Path) -> list[str]:
    """What nobody but a process at work may leave."""
    return [f.name for f in out.iterdir() if HALF.search(f.name) or f.name == ".lock"] if out.exists() else []


def differences(whole: Any, ended: Any, where: str = "") -> Iterator[str]:
    """The places where two ends differ."""
    if isinstance(whole, dict) and isinstance(ended, dict):
        for key in [*whole, *(k for k in ended if k not in whole)]:
            if key not in ended or key not in whole:
                yield f"{where}/{key} {'is missing' if key not in ended else 'is too much'}"
            else:
                yield from differences(whole[key], ended[key], f"{where}/{key}")
    elif isinstance(whole, list) and isinstance(ended, list) and len(whole) == len(ended):
        for number, (a, b) in enumerate(zip(whole, ended, strict=True)):
            yield from differences(a, b, f"{where}[{number}]")
    elif whole != ended:
        yield f"{where}: {str(ended)[:80]}, not {str(whole)[:80]}"


# ------------------------------------------------------------------------------------------------- who kills it


@dataclass
class Row:
    """One line of the table."""

    fell: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    faults: list[str] = field(default_factory=list)


PHASES = ("loading", "rollout", "step", "evaluation", "checkpoint", "result")
WORDS = {"writing the result": "result", "evaluation": "evaluation", "log-prob": "loading", "sampling": "rollout",
         "reward": "rollout", "scoring": "rollout"}  # fmt: skip


def phase_of(out: Path) -> str:
    file = out.with_suffix(".phase")
    words = file.read_text().strip() if file.exists() else ""
    if words.startswith("writing checkpoint"):
        return "checkpoint"
    return next((phase for start, phase in WORDS.items() if words.startswith(start)), "step" if words else "loading")


MOMENTS = {"checkpoint": ".checkpoint-*.part", "result": ".final.part", "best": ".best.part"}


def strike(pid: int, out: Path, how: str, after: float, moment: float, number: int) -> None:
    """Wait for the moment, and send the signal: after a time, then perhaps a moment after a half folder is seen."""
    begun = time.monotonic()
    while time.monotonic() - begun < after and not gone(pid):
        time.sleep(0.002)
    if how in MOMENTS:
        while not gone(pid) and not any(out.glob(MOMENTS[how])):
            time.sleep(0.0005)
        time.sleep(moment)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def gone(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def tail(out: Path) -> str:
    return "\n".join(out.with_suffix(".said").read_text().splitlines()[-30:])


def kill_often(name: str, kills: int, folder: Path, number: int, dice: random.Random) -> Row:
    """Kill runs of one kind until there were so many kills, and compare each run's end with that of one left alone."""
    row = Row()
    folder.mkdir()
    life = time.monotonic()
    if ended(start(name, folder / "whole", False)) != 0:
        row.faults.append(f"fails without a kill:\n{tail(folder / 'whole')}")
        return row
    life = time.monotonic() - life
    whole = ends(folder / "whole")
    while sum(row.fell.values()) < kills and not row.faults:
        row.runs += 1
        out = folder / f"killed-{row.runs}"
        resume = False
        while not row.faults:
            pid = start(name, out, resume)
            resume = True
            hit = sum(row.fell.values()) < kills
            if hit:
                how = dice.choices(["any time", "early", "checkpoint", "best", "result"], [6, 2, 4, 1, 2])[0]
                after = {"result": 0.0, "early": 0.1}.get(how, 0.9) * life
                strike(pid, out, how, dice.uniform(0, after), dice.uniform(0, 0.06), number)
            code = ended(pid)
            expected = (-number,) if number == signal.SIGKILL else (-number, 128 + number)
            if code in expected:
                row.fell[phase_of(out)] += 1
                if number != signal.SIGKILL:
                    row.faults += [f"left {left} behind" for left in halves(out)]
                    row.faults += [f"{f} is damaged" for f in checkpoint.found(out) if not is_whole(f)]
            elif code == 0:
                break
            else:
                row.faults.append(f"ended with {code}, in {out}:\n{tail(out)}")
        if not row.faults:
            done = ends(out)
            if number != signal.SIGKILL:  # a checkpoint where it was stopped: more of them, and in their place
                done, expectation = ({k: v for k, v in e.items() if "checkpoint-" not in k} for e in (done, whole))
                row.faults += [f"{step} was taken {n} times" for step, n in Counter(journal(out)).items() if n > 1]
            else:
                expectation = whole
            row.faults += [f"{name}, {out}: {d}" for d in differences(expectation, done)]
            if not row.faults:
                for left in folder.glob(f"{out.name}*"):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
    return row


def is_whole(folder: Path) -> bool:
    try:
        checkpoint.whole(folder)
    except prefzoo.registry.RunError:
        return False
    return True


def load_all(folder: Path) -> None:
    """Import what runs import while they run: a new process then needs no seconds for it."""

    def work() -> None:
        for name in ("sft, LoRA", "grpo"):
            algorithm, arguments = RUNS[name]
            prefzoo.train(algorithm, **arguments | {"max_steps": 1}, output_dir=folder / name, quiet=True)
        (folder / "modules").write_text("\n".join(sys.modules))

    folder.mkdir()
    if ended(forked(work, folder / "said")) == 0:
        for module in (folder / "modules").read_text().split():
            with contextlib.suppress(Exception):
                importlib.import_module(module)
    assert threading.active_count() == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=110, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=None, help="kinds of run, with ; between them")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--short", action="store_true", help="runs of a third of the steps")
    parser.add_argument("--folder", type=Path, default=None, help="kept; else a temporary one")
    given = parser.parse_args()
    if given.short:
        for _, arguments in RUNS.values():
            arguments["max_steps"] //= 3
    names = list(RUNS) if given.only is None else [n.strip() for n in given.only.split(";")]
    dice = random.Random(given.seed)
    total, faults = Counter(), 0
    print(f"{'':24}" + "".join(f"{p:>12}" for p in ("kills", *PHASES, "runs")), flush=True)
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True)
        load_all(folder / "load")
        for i, name in enumerate(names):
            kills = given.kills * (i + 1) // len(names) - given.kills * i // len(names)
            number = getattr(signal, f"SIG{given.signal}")
            row = kill_often(name, kills, folder / str(i), number, dice)
            cells = [sum(row.fell.values()), *(row.fell[p] for p in PHASES), row.runs]
            print(f"{name:24}" + "".join(f"{c:12}" for c in cells), "  DIFFERENT" if row.faults else "  identical")
            for fault in row.faults[:20]:
                print(f"    {fault}", flush=True)
            faults += len(row.faults)
            total += row.fell
    print(f"{'all':24}" + "".join(f"{c:12}" for c in (sum(total.values()), *(total[p] for p in PHASES))))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
