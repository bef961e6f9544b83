"""What each process of a launched run does: the jobs of a file, one after another, and what came of them.

``accelerate launch ... tests/processes_child.py JOBS.json``. A job names a case of CASES, overrides its options, and
may replay rollouts or misbehave at some place. ``OUT.RANK.json`` and ``OUT.RANK.safetensors`` hold what a process has
at the end of a job.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import prefzoo
from prefzoo.algorithm import Algorithm
from prefzoo.data.samples import Ragged, Samples
from prefzoo.losses import LOSSES, create_loss, register_loss
from prefzoo.parts.reference import Moving
from prefzoo.parts.source import DatasetRows
from prefzoo.records import LossOut, Pairs
from prefzoo.registry import RunError, UsageError
from prefzoo.training import engine as engine_module
from prefzoo.training import run as run_module
from prefzoo.training.engine import Engine
from prefzoo.training.stopping import Stopping

RANK = int(os.environ.get("RANK", "0"))
PAIRS = [
    {"prompt": f"{a} and {b}:", "chosen": f" {a + b} is it", "rejected": f" no {a * b}"}
    for a in range(8)
    for b in range(8)
]


def length(completions: list[str], **_: Any) -> list[float]:
    """Not the same for all answers to a prompt: else GRPO's gradient is rounding alone, and Adam steps all the same."""
    return [float(sum(map(ord, c)) % 7) for c in completions]


def told(completions: list[str], log_metric: Callable[..., None], **_: Any) -> list[float]:
    log_metric("mean_length", sum(map(len, completions)) / len(completions))
    return length(completions)


TRAP: list[Any] = []  # what a process does in its reward function, before it works again


def moody(completions: list[str], **_: Any) -> list[float]:
    """Draws from every global generator; each process has its own."""
    if TRAP:
        TRAP[0]()
    return [len(c) + random.random() + np.random.rand() + float(torch.rand(())) for c in completions]


REWARDS = {f.__name__: f for f in (length, told, moody)}
EVAL = {"eval_split": 0.2, "eval_steps": 5}
ROWS = {"max_steps": 10, "rows_per_step": 9, "tokens_per_batch": 120, "warmup_steps": 0}
SAMPLED = {
    "max_steps": 10, "prompts_per_step": 5, "max_new_tokens": 6, "tokens_per_batch": 120, "reward": "told",
    "warmup_steps": 0,
}  # fmt: skip
PPO = SAMPLED | {"inner_epochs": 2, "minibatches": 2, "kl_target": 0.5, "kl_horizon": 40}


def moving() -> Algorithm:
    return Algorithm(
        source=DatasetRows("pairs"), loss=create_loss("dpo"), reference=Moving(0.5, every=3)
    )  # fmt: skip


def whole_batch() -> Algorithm:
    if "coupled" not in LOSSES:

        @register_loss(whole_batch=True)
        def coupled(batch: Pairs) -> LossOut:
            """A loss that compares every pair with every other one: it cannot be cut."""
            ratio_B = batch.chosen_ratio_B - batch.rejected_ratio_B
            return LossOut(-torch.nn.functional.logsigmoid(ratio_B - 0.5 * ratio_B.roll(1)))

    return Algorithm(source=DatasetRows("pairs"), loss=create_loss("coupled"))


CASES: dict[str, tuple[str | Callable[[], Algorithm], dict[str, Any]]] = {
    "dpo": ("dpo", ROWS | EVAL),
    "one pair": ("dpo", ROWS | {"rows_per_step": 1}),
    "moving": (moving, ROWS | EVAL),
    "lora": ("dpo", ROWS | {"lora": True, "lora_rank": 4}),
    "kto": ("kto", ROWS | EVAL),
    "sft": ("sft", ROWS | EVAL),
    "reward_model": ("reward_model", ROWS | EVAL),
    "whole_batch": (whole_batch, ROWS | {"tokens_per_batch": 8192}),
    "grpo": ("grpo", SAMPLED | EVAL | {"group_size": 3}),
    "grpo, minibatches": ("grpo", SAMPLED | {"group_size": 3, "minibatches": 3, "inner_epochs": 2}),
    "rejection_sampling": ("rejection_sampling", {k: v for k, v in SAMPLED.items() if k != "prompts_per_step"} | {
        "samples_per_prompt": 4, "prompts_per_round": 7, "epochs_per_round": 2, "rows_per_update": 3,
    }),
    "ppo": ("ppo", PPO | EVAL),
    # Samplers beside the policy, the data's own answers, prompts sampled anew, a reference of each round.
    "dapo": ("dapo", SAMPLED | EVAL | {"group_size": 3, "minibatches": 1, "resamplings": 2}),
    "remax": ("remax", SAMPLED | EVAL),
    "trpo": ("trpo", SAMPLED | {"group_size": 3}),
    "xpo": ("xpo", SAMPLED | {"group_size": 2}),
    "nash_md": ("nash_md", SAMPLED),
    "spin": ("spin", {k: v for k, v in SAMPLED.items() if k not in ("prompts_per_step", "reward")} | {
        "prompts_per_round": 7, "rows_per_update": 3,
    }),
}  # fmt: skip


class Replay:
    """A sampler that gives what another run's sampler gave, wherever it was asked; or records what the real one gives.

    Evaluations ask with the same seed again and again, so calls of a seed are counted.
    """

    def __init__(self, real: Any, file: Path, record: bool) -> None:
        self.real, self.file, self.record = real, file, record
        self.known: dict[tuple[int, int, int], Any] = {} if record else pickle.loads(file.read_bytes())
        self.calls: Counter[int] = Counter()

    def generate(
        self, prompts: Samples, n: int, sampling: Any, seed: int, keys_P: np.ndarray | None = None, **how: Any
    ) -> Samples:
        keys = np.arange(len(prompts)) if keys_P is None else keys_P
        self.calls[seed] += 1
        call = seed, self.calls[seed]
        if self.record:
            made = self.real.generate(prompts, n, sampling, seed, keys_P, **how)
            logps = made.tokens["old_logps"].split(made.completions.lengths.tolist())
            for i, key in enumerate(keys):
                rows = range(i * n, (i + 1) * n)
                self.known[*call, int(key)] = [
                    (made.completions[b], logps[b], int(made.columns["finish"][b])) for b in rows
                ]
            self.file.write_bytes(pickle.dumps(self.known))
        rows = [row for key in keys for row in self.known[*call, int(key)]]
        ids, logps, finish = zip(*rows, strict=True)
        return Samples(
            "completions", prompts.prompts, Ragged.of(ids), np.repeat(np.arange(len(keys)), n),
            columns={"finish": torch.tensor(finish)}, tokens={"old_logps": torch.cat(logps)}, extra=prompts.extra,
        )  # fmt: skip


def weights(engine: Engine) -> dict[str, Tensor]:
    return {name: value.clone().contiguous() for name, value in engine._moved().items()}


def written(folder: Path) -> list[str]:
    """A list that fills with what this process writes into a folder."""
    seen: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        creates = event == "open" and bool(args[2] & (os.O_CREAT | os.O_TRUNC | os.O_APPEND))
        if (creates or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")) and isinstance(args[0], str | Path):
            path = Path(args[0])
            if folder in path.parents:
                seen.append(f"{event} {path}")

    sys.addaudithook(hook)
    return seen


def do(job: Mapping[str, Any]) -> dict[str, Any]:
    """Train one case as the job says; what it came to."""
    algorithm, options = CASES[job["case"]]
    options = options | {"dataset": PAIRS, "logging_steps": 1, "quiet": True} | job.get("options", {})
    if "reward" in options:
        options["reward"] = REWARDS[options["reward"]]
    algorithm = algorithm if isinstance(algorithm, str) else algorithm()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(RANK)
    real, make, out = engine_module.rollout_engine, Engine.__init__, Path(job["out"])
    wrote = written(Path(options["output_dir"])) if "output_dir" in options else []
    if "replay" in job:
        file = Path(job["replay"])
        engine_module.rollout_engine = lambda *a: Replay(real(*a), file, not file.exists())  # type: ignore[assignment]

    def made(engine: Engine, *args: Any, **kwargs: Any) -> None:
        make(engine, *args, **kwargs)
        run.first = weights(engine)  # type: ignore[attr-defined]

    Engine.__init__ = made  # type: ignore[method-assign]
    try:
        if "misbehave" in job and job["misbehave"]["rank"] == RANK:
            misbehave(options, job["misbehave"])
        run = prefzoo.steps(algorithm, **options)
        with run.stopping:
            for _ in run:
                pass
            result = run.finish()
    except (UsageError, RunError) as error:
        if not job.get("goes_on"):
            raise
        return {"error": str(error)}
    finally:
        engine_module.rollout_engine, Engine.__init__ = real, make  # type: ignore[method-assign]
    if run.engine is not None:
        last = weights(run.engine)
        save_file({f"{k}|first": v for k, v in run.first.items()} | {f"{k}|last": v for k, v in last.items()},
                  f"{out}.{RANK}.safetensors")  # fmt: skip
    return {"history": result.history, "spent": result.spent.to_dict(), "wrote": wrote}


def misbehave(options: dict[str, Any], how: Mapping[str, Any]) -> None:
    """Have this process do something in the middle of an optimizer step, or in its reward function."""
    act: dict[str, Callable[[], Any]] = {
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "term the launcher": lambda: (os.kill(os.getppid(), signal.SIGTERM), time.sleep(0.5)),
        "hang": lambda: time.sleep(10_000),
        "raise": lambda: 1 / 0,
    }
    if how["what"] == "other weights":
        start = run_module.setup.start_model

        def changed(*args: Any) -> Any:
            run_module.setup.start_model = start
            policy, tokenizer = start(*args)
            with torch.no_grad():
                next(policy.parameters()).add_(1.0)
            return policy, tokenizer

        run_module.setup.start_model = changed
        return
    if how["what"] == "other data":
        options["dataset"] = PAIRS[::-1]
        return
    backward, rewards = Engine._backward, Engine.rewards

    def in_step(engine: Engine, *rest: Any) -> None:
        backward(engine, *rest)
        if how["where"] == "step" and (engine.step + 1, engine.place) == (how["step"], how["place"]):
            Engine._backward = backward  # type: ignore[method-assign]
            act[how["what"]]()

    def in_reward(engine: Engine, samples: Samples) -> Tensor:
        TRAP[:] = [act[how["what"]]] if how["where"] == "reward" and engine.step + 1 == how["step"] else []
        return rewards(engine, samples)

    Engine._backward, Engine.rewards = in_step, in_reward  # type: ignore[method-assign]


def main() -> None:
    torch.set_num_threads(1)
    Stopping.PATIENCE = 2.0
    Path(f"{sys.argv[1]}.{RANK}.pid").write_text(str(os.getpid()))
    for job in json.loads(Path(sys.argv[1]).read_text()):
        started = time.monotonic()
        said = do(job)
        Path(f"{job['out']}.{RANK}.json").write_text(json.dumps(said | {"took": time.monotonic() - started}))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
