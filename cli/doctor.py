"""``prefzoo doctor``: what the machine has, and two steps on eight rows of the user's data with the user's model."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import re
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefzoo.algorithm import Algorithm
from prefzoo.cli.data import show_row
from prefzoo.cli.training import read_all
from prefzoo.data.formats import Dataset, load_dataset
from prefzoo.training import Steps, TrainConfig, steps
from prefzoo.training.setup import reading_of, resolve

ROWS = 8
OPTIONAL = {  # package -> what it is for
    "bitsandbytes": "QLoRA (load_in_4bit)",
    "tensorboard": "report_to tensorboard",
    "wandb": "report_to wandb",
    "trackio": "report_to trackio",
    "mlflow": "report_to mlflow",
}
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")


def examine(
    words: Sequence[str], given: Mapping[str, Any], config: Path | None, from_trl: Path | None,
    settings: Sequence[str], imports: Iterable[Path],
) -> None:  # fmt: skip
    """Print the environment; then, if an algorithm was named, a dry run."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    _print(console, "machine", machine())
    _print(console, "packages", packages())
    _print(console, "optional", {name: f"{_version(name) or 'not installed'}  {why}" for name, why in OPTIONAL.items()})
    set_here = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if set_here:
        _print(console, "variables", set_here)
    if not words and from_trl is None and not any(v is not None for v in given.values()):
        console.print(
            "[dim]With an algorithm, a model and data this tries two steps: "
            "prefzoo doctor dpo --model FOLDER --dataset FILE[/dim]"
        )
        return
    name, merged = read_all(words, given, config, from_trl, settings, imports)
    facts, run = dry_run(name, merged)
    assert run.engine is not None
    console.print("[bold underline]the batch, as the model reads it[/]")
    for row in range(len(run.engine.data)):
        console.print(f"\n-- row {row + 1}")
        show_row(console, run.engine.data, run.tokenizer, row)
    console.print()
    _print(console, f"dry run: {name}, two steps on {ROWS} rows", facts)


def machine() -> dict[str, str]:
    """Processor, memory, disk, GPUs."""
    facts = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
        "disk": f"{shutil.disk_usage('.').free / 2**30:.0f} GiB free here",
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        facts["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        facts[f"gpu {i}"] = f"{torch.cuda.get_device_name(i)}, {memory}, {bf16}"
    if not torch.cuda.device_count():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        facts["gpu"] = f"none ({built})"
    return facts


def packages() -> dict[str, str]:
    """Version of each required package, and what is asked for where it is missing or too old."""
    out = {"prefzoo": _version("prefzoo") or "not installed (running from a source tree)"}
    try:
        required = [r for r in metadata.requires("prefzoo") or [] if "extra ==" not in r]
    except metadata.PackageNotFoundError:
        required = []
    for requirement in required:
        name, _, least = requirement.partition(">=")
        found = _version(name)
        if found is None:
            out[name] = f"missing: pip install '{requirement}'"
        elif _numbers(found) < _numbers(least):
            out[name] = f"{found}, too old: pip install '{requirement}'"
        else:
            out[name] = found
    return out


def dry_run(name: str, merged: Mapping[str, Any]) -> tuple[dict[str, str], Steps]:
    """Two steps on the first rows, with everything else as it will be; nothing is written."""
    merged = {k: v for k, v in merged.items() if k not in ("output_dir", "push_to_hub", "best_metric", "eval_dataset")}
    mine = ("model", "reward", "reward_weights", "reference", "teacher", "ptx_dataset")
    arguments = {k: merged.pop(k) for k in mine if k in merged}
    dataset = merged.pop("dataset", None)
    for key in ("eval_steps", "eval_split", "eval_samples", "best_mode", "patience", "report_to"):
        merged.pop(key, None)
    algorithm, config = resolve(name, merged, merged.pop("config", None), arguments)
    data = first_rows(dataset, config)
    short: dict[str, Any] = {"max_steps": 2, "logging_steps": 1, "streaming": False, "columns": None, "cache_dir": None}
    if not algorithm.stages[0].on_policy:
        short["rows_per_step"] = ROWS
    config = config.model_copy(update=short)
    cuda = torch.cuda.is_available() and config.device != "cpu"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    run = steps(shortened(algorithm), dataset=data, config=config, **arguments)
    model = run.policy.model
    parameters = sum(p.numel() for p in run.policy.parameters())
    facts = {
        "data": "\n".join(data.report.lines()).removeprefix("data "),
        "model": f"{model.config.model_type}, {parameters:,} parameters, {model.dtype}, on {run.device}",
        "attention": "packed, prompts shared" if run.policy.packed else "padded rows (slower)",
    }
    seconds = []
    started = time.monotonic()
    for step in run:
        seconds.append(time.monotonic() - started)
        shown = {k: v for k, v in step.metrics.items() if k in ("loss", "reward", "grad_norm", "kl")}
        facts[f"step {step.number}"] = "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
        started = time.monotonic()
    assert run.engine is not None
    trained = sum(p.numel() for t in run.engine.trained.values() for p in t.module.parameters() if p.requires_grad)
    facts["trained"] = f"{trained:,} parameters of {', '.join(run.engine.trained)}"
    if cuda:
        facts["memory"] = f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB of GPU memory at most"
    else:
        unit = 2**20 if sys.platform != "darwin" else 2**30  # kibibytes, on a Mac bytes
        facts["memory"] = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB of this process at most"
    first = "first step (with loading and warm-up) "
    facts["time"] = f"{first}{seconds[0]:.2f} s" + "".join(f", then {s:.2f} s" for s in seconds[1:])
    return facts, run


def first_rows(dataset: Any, config: TrainConfig) -> Dataset:
    """The first rows of a data set, read under the run's own rules."""
    found = load_dataset(dataset, **reading_of(config), deduplicate=config.deduplicate, streaming=config.streaming)
    rows = list(islice(found, ROWS))
    return Dataset(rows, found.type, replace(found.report, rows=len(rows)))


def shortened(algorithm: Algorithm) -> Algorithm:
    """The same composition with at most eight prompts per rollout step."""
    stages = tuple(
        replace(s, schedule=replace(s.schedule, prompts=min(s.schedule.prompts, ROWS))) for s in algorithm.stages
    )
    short = Algorithm(stages=stages)
    short.name, short.options, short.sources = algorithm.name, algorithm.options, algorithm.sources
    return short


def _print(console: Console, title: str, facts: Mapping[str, str]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0), title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(f"  {key}", Text(value))
    console.print(f"[bold underline]{title}[/]")
    console.print(table)
    console.print()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])
