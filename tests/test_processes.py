"""Several processes: the weights of one, the same bits after a break, and words where one of them ends."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from transformers import LlamaConfig, LlamaForCausalLM

from prefzoo import processes
from prefzoo.models.load import learn_tokenizer
from prefzoo.processes import Processes
from prefzoo.registry import UsageError

SCRIPT = str(Path(__file__).with_name("processes_child.py"))
child = SimpleNamespace(**runpy.run_path(SCRIPT))
BIN = Path(sys.executable).parent
NEAR = 1e-3  # of the distance moved
RATES = {"sgd": 1e-2, "adamw": 1e-3}
ALL = [(case, optimizer) for case in child.CASES for optimizer in RATES]
SHORT = [("dpo", "sgd"), ("kto", "adamw"), ("grpo", "adamw"), ("ppo", "sgd")]
THREE = [("one pair", "sgd"), ("grpo, minibatches", "adamw"), ("ppo", "sgd"), ("ppo", "adamw")]
WRITTEN = [("dpo", "sgd"), ("ppo", "sgd"), ("lora", "adamw"), ("reward_model", "adamw")]  # with an output folder


def command(size: int, launcher: str = "accelerate") -> list[str]:
    if launcher == "torchrun":
        return [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(size)]
    words = f"launch --multi_gpu --num_processes {size} --num_machines 1 --mixed_precision no --dynamo_backend no"
    return [str(BIN / "accelerate"), *words.split(), "--main_process_port", "0"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


class Launch:
    """Processes that were started; ``end`` waits for them and gives exit code and what they said."""

    def __init__(self, jobs: Sequence[Mapping[str, Any]], size: int = 2, launcher: str = "accelerate") -> None:
        self.file = file = Path(f"{jobs[0]['out']}.jobs.json")
        file.write_text(json.dumps(jobs))
        self.said = file.with_suffix(".txt")
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                [*command(size, launcher), SCRIPT, str(file)], stdout=said, stderr=said, env=environment(),
                start_new_session=True,
            )  # fmt: skip

    def end(self, limit: float = 300.0) -> tuple[int, str]:
        try:
            code = self.process.wait(limit)
        finally:
            self.kill()
        return code, self.said.read_text()

    def kill(self) -> None:
        """All of them, the launcher first, which would ask the others to end."""
        ranks = [int(file.read_text()) for file in self.said.parent.glob(f"{self.file.name}.*.pid")]
        for pid in [self.process.pid, *ranks] if self.process.poll() is None else ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model of Llama's kind, without biases, and its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = learn_tokenizer([row[side] for row in child.PAIRS for side in row])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def found(out: str | Path, rank: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    weights = load_file(f"{out}.{rank}.safetensors")
    return weights, json.loads(Path(f"{out}.{rank}.json").read_text())


def distance(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> tuple[float, float]:
    """‖a − b‖ at the end, and ‖b − b₀‖."""
    last = [name for name in b if name.endswith("|last")]
    start = [name.removesuffix("|last") + "|first" for name in last]
    norm = lambda parts: float(sum(p.double().square().sum() for p in parts)) ** 0.5  # noqa: E731
    return norm(a[n] - b[n] for n in last), norm(b[n] - b[s] for n, s in zip(last, start, strict=True))


def logged(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def listing(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def agree(one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> None:
    """The same metrics to rounding; they are compared as numbers of their size, not of 0."""
    assert [sorted(row) for row in one] == [sorted(row) for row in other]
    for mine, theirs in zip(one, other, strict=True):
        for name in mine.keys() - {"time", "rewards/accuracies"}:  # where a policy is its reference, rounding decides
            largest = max(abs(row.get(name, 0.0)) for row in one)
            assert theirs[name] == pytest.approx(mine[name], abs=1e-4 * largest + 1e-6, nan_ok=True), (name, mine)


def equivalent(model: str, folder: Path, cases: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Each case with its optimizer, done by one process here; the jobs."""
    jobs = []
    for case, optimizer in cases:
        out = f"{folder / case}.{optimizer}.one"
        options: dict[str, Any] = {"model": model, "optimizer": optimizer, "learning_rate": RATES[optimizer]}
        if (case, optimizer) in WRITTEN:
            options |= {"output_dir": f"{out}.run", "save_steps": 4}
        job = {"case": case, "options": options, "out": out}
        if "max_new_tokens" in child.CASES[case][1]:
            job["replay"] = f"{folder / case}.{optimizer}.rollouts"
        Path(f"{out}.0.json").write_text(json.dumps(child.do(job)))
        jobs.append(job)
    return jobs


def of_several(job: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(job).replace(".one", ".several"))


def compare(jobs: Sequence[Mapping[str, Any]], size: int) -> None:
    """What several processes gave is what one gave."""
    for job in jobs:
        case, optimizer, there = job["case"], job["options"]["optimizer"], of_several(job)
        weights, one = found(job["out"])
        ranks = [found(there["out"], rank) for rank in range(size)]
        for theirs, _ in ranks[1:]:
            assert all(torch.equal(theirs[name], ranks[0][0][name]) for name in theirs), f"{case}: ranks differ"
        apart, moved = distance(ranks[0][0], weights)
        print(f"| {case} | {optimizer} | {size} | {apart / moved:.1e} | {moved:.2f} |")
        assert moved > 1e-3 and apart <= NEAR * moved, (case, optimizer, apart, moved)
        agree(one["history"], ranks[0][1]["history"])
        spent = [{k: v for k, v in said["spent"].items() if k != "seconds"} for said in (one, *(r for _, r in ranks))]
        assert all(s == spent[0] for s in spent), case
        if "output_dir" in job["options"]:
            mine, theirs = (Path(j["options"]["output_dir"]) for j in (job, there))
            assert listing(mine) == listing(theirs)
            assert [said["wrote"] for _, said in ranks[1:]] == [[]] * (size - 1)
            assert len(logged(theirs)) == len(logged(mine)) == len(one["history"])


# ------------------------------------------------------------------------------------------ the weights of one


REFUSED = {
    "weights": {"case": "dpo", "misbehave": {"rank": 1, "what": "other weights"}},
    "data": {"case": "dpo", "misbehave": {"rank": 1, "what": "other data"}},
    "prompts": {"case": "grpo", "options": {"prompts_per_step": 1}},
    "uncut": {"case": "whole_batch", "options": {"tokens_per_batch": 60}},
}


def test_two_processes_give_the_weights_of_one(model: str, tmp_path: Path) -> None:
    """And what must be refused is, in words, by both of them; they go on to the next run."""
    jobs = equivalent(model, tmp_path, SHORT)
    refused = [
        {**job, "options": {"model": model} | job.get("options", {}), "out": str(tmp_path / name), "goes_on": True}
        for name, job in REFUSED.items()
    ]
    shown = {"case": "sft", "options": {"model": model, "quiet": False, "max_steps": 3}, "out": str(tmp_path / "shown")}
    code, said = Launch([*map(of_several, jobs), *refused, shown]).end()
    assert code == 0, said
    compare(jobs, 2)
    errors = {
        name: [json.loads((tmp_path / f"{name}.{rank}.json").read_text())["error"] for rank in (0, 1)]
        for name in REFUSED
    }
    for rank in (0, 1):
        assert "the processes do not run the same: fingerprints.model" in errors["weights"][rank]
        assert "the processes do not run the same: data.hash" in errors["data"][rank]
        assert errors["prompts"][rank].startswith("1 prompts cannot be shared by 2 processes")
        assert "couples the rows of a batch" in errors["uncut"][rank]
    lines = [line for line in said.splitlines() if line.startswith("sft ")]
    assert len([line for line in lines if "evaluation" not in line]) == 3, said  # one process speaks


@pytest.mark.long
def test_two_processes_give_the_weights_of_one_with_everything_else(model: str, tmp_path: Path) -> None:
    """Adapters, heads, a moving reference, an uncut loss, a process without any micro-batch."""
    jobs = equivalent(model, tmp_path, [job for job in ALL if job not in SHORT])
    code, said = Launch(list(map(of_several, jobs))).end()
    assert code == 0, said
    compare(jobs, 2)


@pytest.mark.long
def test_three_processes_of_torchrun_too(model: str, tmp_path: Path) -> None:
    jobs = equivalent(model, tmp_path, THREE)
    code, said = Launch(list(map(of_several, jobs)), 3, "torchrun").end()
    assert code == 0, said
    compare(jobs, 3)


# ------------------------------------------------------------------------------------------ breaks


MOODY = {"reward": "moody", "save_steps": 3, "max_steps": 7, "optimizer": "adamw", "learning_rate": 1e-3}
AT = {"rank": 1, "where": "step", "step": 5, "place": 1}  # in the middle of a rollout step, between two checkpoints
BREAKS: dict[str, dict[str, Any]] = {
    "a process is killed": {**AT, "what": "kill"},
    "a reward raises": {**AT, "where": "reward", "what": "raise"},
    "the launcher is asked to end": {**AT, "what": "term the launcher"},
    "a process is asked to end": {**AT, "what": "term"},
}
EVERYBODY = "all are killed"


@pytest.mark.long
def test_a_run_that_broke_goes_on_to_the_same_bits(model: str, tmp_path: Path) -> None:
    """Rewards draw from the global generators, of which each process has its own."""

    def job(name: str, **options: Any) -> dict[str, Any]:
        options |= MOODY | {"model": model, "output_dir": str(tmp_path / name)}
        return {"case": "ppo", "options": options, "out": str(tmp_path / f"{name}.out")}

    said = {}
    for name, how in BREAKS.items():
        code, said[name] = Launch([job(name) | {"misbehave": how}]).end()
        print("=" * 30, name, code, said[name], sep="\n")
        assert code != 0
        assert {p for p in listing(tmp_path / name) if p.startswith(".")} == set(), name
    for name, text in said.items():
        assert "stopped after step 4 of 7; the run goes on from" in text, name
    assert "process 0 of 2 cannot go on without the others" in said["a process is killed"]
    assert "Signal 9 (SIGKILL)" in said["a process is killed"]  # the launcher's last words
    assert "ZeroDivisionError" in said["a reward raises"] and "division by zero" in said["a reward raises"]
    for name in ("the launcher is asked to end", "a process is asked to end"):
        assert "stopped by SIGTERM" in said[name] and "without the others" not in said[name], said[name]

    killed = Launch([job(EVERYBODY)])
    wait_for(lambda: (tmp_path / EVERYBODY / "metrics.jsonl").read_text().count("\n") >= 5)
    killed.kill()
    code, text = Launch([job("whole"), *(job(name, resume=True) for name in (*BREAKS, EVERYBODY))]).end()
    assert code == 0, text
    for name in (*BREAKS, EVERYBODY):
        for rank in (0, 1):
            mine, theirs = (found(tmp_path / f"{n}.out", rank)[0] for n in ("whole", name))
            assert all(torch.equal(mine[key], theirs[key]) for key in mine if key.endswith("|last")), (name, rank)
        assert logged(tmp_path / name) == logged(tmp_path / "whole"), name
        assert listing(tmp_path / name) == listing(tmp_path / "whole"), name


@pytest.mark.long
def test_a_process_that_hangs_is_told_of_and_does_not_keep_the_others_from_ending(model: str, tmp_path: Path) -> None:
    options = MOODY | {"model": model, "output_dir": str(tmp_path / "run"), "stuck_minutes": 0.01}
    how = {"rank": 1, "where": "reward", "step": 2, "what": "hang"}
    launched = Launch([{"case": "ppo", "options": options, "out": str(tmp_path / "out"), "misbehave": how}])
    wait_for(lambda: launched.said.read_text().count("nothing has moved") >= 2)
    launched.process.terminate()
    _, said = launched.end()
    print(said)
    assert "process 0: nothing has moved" in said and "waiting for the samples of the other processes" in said
    assert "process 1: nothing has moved" in said and "reward 'moody' for step 2, at " in said
    assert "the run goes on from" in said and (tmp_path / "run" / "checkpoint-1").is_dir()


def wait_for(true: Callable[[], bool], limit: float = 300.0) -> None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if true():
                return
        time.sleep(0.02)
    raise AssertionError("it did not happen")


# ------------------------------------------------------------------------------------------ the collectives


def test_shares_are_consecutive_and_cover_everything() -> None:
    for size in range(1, 6):
        for rows in range(12):
            parts = [Processes(rank, size).share(range(rows)) for rank in range(size)]
            assert [row for part in parts for row in part] == list(range(rows))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_gradient_that_nobody_has_stays_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW decays the weights of every parameter with a gradient, and leaves those without alone."""
    monkeypatch.setattr(processes, "BUCKET", 7)
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        shapes = [(2, 3), (4,), (), (3, 3), (0,)]
        parameters = [
            nn.Parameter(torch.randn(shape, dtype=d)) for shape in shapes for d in (torch.float32, torch.bfloat16)
        ]
        given = [None if i % 3 == 1 else torch.randn_like(p) for i, p in enumerate(parameters)]
        for p, grad in zip(parameters, given, strict=True):
            p.grad = None if grad is None else grad.clone()
        Processes(0, 2).sum_gradients(parameters)  # the group has one member, so the sum is its own
        for p, grad in zip(parameters, given, strict=True):
            assert (p.grad is None) == (grad is None)
            assert grad is None or torch.equal(p.grad, grad)
        value = torch.ones(3)
        assert Processes(0, 2).sum(value) is not value
    finally:
        distributed.destroy_process_group()


def test_several_processes_without_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError, match="RANK is not set; start them with accelerate launch or torchrun"):
        Processes.launched()
