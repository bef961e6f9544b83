"""What trust costs: the guards as a share of a step, a checkpoint in steps; one JSON per case.

    python -m prefzoo.benchmarks.perf.trust --out runs/perf-trust            # on a CPU, small
    python -m prefzoo.benchmarks.perf.trust --out runs/perf-trust --full     # on a GPU: 0.5 and 1.5 billion weights

Times are shares of the same run, measured around the calls themselves; medians over steps, the first ones left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import prefzoo
from prefzoo.models.load import learn_tokenizer
from prefzoo.training import checkpoint, engine, run
from prefzoo.training.guards import Monitor, Watchdog
from prefzoo.training.record import hardware, versions

# Width, layers, heads; the second list is for a GPU.
SMALL = {"0.8M": (96, 4, 4), "10M": (320, 8, 8)}
FULL = {"0.5B": (1024, 24, 16), "1.5B": (1536, 28, 12)}
GUARDS: tuple[tuple[Any, str], ...] = (
    (engine.Engine, "agree"), (engine.Engine, "mark"), (engine, "not_finite"), (Monitor, "watch"), (Watchdog, "doing"),
)  # fmt: skip
WARM = 3


def measure(algorithm: str, size: str, shape: tuple[int, int, int], steps: int, device: str) -> dict[str, Any]:
    """One case: a run of so many steps with a checkpoint in the middle, and its resumption."""
    width, layers, heads = shape
    rows = [{"prompt": f"{a} plus {b} is", "chosen": f" {a + b}.", "rejected": f" {a * b + 1}."}
            for a in range(40) for b in range(40)]  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="prefzoo-trust-"))
    tokenizer = learn_tokenizer([text for row in rows for text in row.values()])
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=256, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    spent: dict[str, list[float]] = defaultdict(list)
    options: dict[str, Any] = {"rows_per_step": 32}
    if prefzoo.create_algorithm(algorithm).stages[0].on_policy:
        options = {"reward": lengths, "prompts_per_step": 8, "group_size": 8, "max_new_tokens": 32}
    arguments = {
        "model": model, "tokenizer": tokenizer, "dataset": rows, "max_steps": steps, "save_steps": steps // 2,
        "output_dir": folder / "run", "logging_steps": 1, "device": device, "quiet": True, "learning_rate": 1e-5,
    }  # fmt: skip
    try:
        targets = (*GUARDS, (run.Steps, "_save_checkpoint"), (run.Steps, "_begin"))
        with timed(targets, spent):
            first = prefzoo.steps(algorithm, **arguments, **options)
            with first:
                timed_steps(first, spent, steps // 2)
            resumed = prefzoo.steps(algorithm, **arguments, **options, resume=True)
            with resumed:
                timed_steps(resumed, spent, steps)
        size_on_disk = sum(f.stat().st_size for f in checkpoint.found(folder / "run")[-1].rglob("*"))
    finally:
        shutil.rmtree(folder)
    seconds, writing = statistics.median(spent["step"]), statistics.median(spent["_save_checkpoint"])
    guards = {name: sum(spent[name]) / steps for _, name in GUARDS}
    return {
        "algorithm": algorithm,
        "size": size,
        "weights": sum(p.numel() for p in model.parameters()),
        "device": device,
        "steps": len(spent["step"]),
        "seconds_per_step": seconds,
        "guards_seconds_per_step": guards,
        "guards_share_of_a_step": sum(guards.values()) / seconds,
        "checkpoint_seconds": writing,
        "checkpoint_in_steps": writing / seconds,
        "checkpoint_bytes": size_on_disk,
        "begin_seconds": spent["_begin"],  # of the new run, and of the resumed one: record, checksums
        "versions": versions(),
        "hardware": hardware(device),
    }


def lengths(completions: list[str], **columns: Any) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(c) % 5) for c in completions]


class timed:
    """Functions replaced by ones that write down how long they took."""

    def __init__(self, targets: Any, spent: Mapping[str, list[float]]) -> None:
        self.targets, self.spent = targets, spent
        self.before = [getattr(owner, name) for owner, name in targets]

    def __enter__(self) -> None:
        for (owner, name), function in zip(self.targets, self.before, strict=True):
            setattr(owner, name, self._timing(name, function))

    def __exit__(self, *error: object) -> None:
        for (owner, name), function in zip(self.targets, self.before, strict=True):
            setattr(owner, name, function)

    def _timing(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.spent[name].append(time.perf_counter() - started)

        return call


def timed_steps(steps: run.Steps, spent: Mapping[str, list[float]], last: int) -> None:
    """Take steps up to the last one, each timed without what checkpoints took; some warm up."""
    number = 0
    while number < last:
        started, written = time.perf_counter(), sum(spent["_save_checkpoint"])
        number = next(steps).number
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number % 10 >= WARM:
            spent["step"].append(time.perf_counter() - started - (sum(spent["_save_checkpoint"]) - written))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--full", action="store_true", help="models of a size that needs a GPU")
    parser.add_argument("--steps", type=int, default=40)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for size, shape in (FULL if chosen.full else SMALL).items():
        for algorithm in ("dpo", "grpo"):
            found = measure(algorithm, size, shape, chosen.steps, device)
            (chosen.out / f"{algorithm}-{size}.json").write_text(json.dumps(found, indent=1) + "\n")
            print(
                f"{algorithm} {size}: step {1e3 * found['seconds_per_step']:.1f} ms, guards "
                f"{100 * found['guards_share_of_a_step']:.2f} % of it, checkpoint "
                f"{found['checkpoint_in_steps']:.1f} steps ({found['checkpoint_bytes'] / 2**20:.1f} MiB)"
            )


if __name__ == "__main__":
    main()
