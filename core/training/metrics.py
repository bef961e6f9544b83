"""Metrics of a run: weighted means gathered over a logging window, JSON lines on disk, lines or a bar on the screen."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from torch import Tensor

from prefzoo.files import sync_one
from prefzoo.registry import UsageError
from prefzoo.training.checkpoint import told

LOGS = ("metrics.jsonl", "samples.jsonl")


class Meter:
    """Weighted means by name.

    >>> import torch
    >>> meter = Meter()
    >>> meter.add("x", torch.tensor([1.0, 3.0]))
    >>> meter.add("x", torch.tensor([[5.0, 99.0]]), torch.tensor([[True, False]]))
    >>> meter.means()
    {'x': 3.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._extremes: dict[str, float] = {}

    def add(
        self,
        name: str,
        values: Tensor | float,
        mask: Tensor | None = None,
        weight: float = 1,
        weight_B: Tensor | None = None,
    ) -> None:
        """Values of rows (B,) or tokens (B, T), cells outside the mask do not count; or a mean of so many.

        ``weight_B``: of the rows, as their losses are weighted.
        """
        if isinstance(values, Tensor):
            values = values.detach().float()
            counts = values.new_ones(values.shape)
            if weight_B is not None and len(weight_B) == len(values):
                counts = counts * weight_B.detach().float().view(-1, *[1] * (values.dim() - 1))
            if mask is not None and values.dim() == 2:
                values, counts = values[mask], counts[mask]
            total, weight = float((counts * values).sum()), float(counts.sum())
        else:
            total = float(values) * weight
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += total
        entry[1] += weight

    def extreme(self, name: str, value: float) -> None:
        """The largest of all values, of a name that ends with ``min`` the smallest, instead of their mean."""
        self._extremes[name] = (min if name.endswith("min") else max)(value, self._extremes.get(name, value))

    def means(self) -> dict[str, float]:
        means = {name: total / weight for name, (total, weight) in self._sums.items() if weight}
        return means | self._extremes

    def merge(self, other: Meter) -> None:
        """Add what another meter has gathered."""
        for name, (total, weight) in other._sums.items():
            entry = self._sums.setdefault(name, [0.0, 0.0])
            entry[0] += total
            entry[1] += weight
        for name, value in other._extremes.items():
            self.extreme(name, value)

    def clear(self) -> None:
        self._sums.clear()
        self._extremes.clear()

    def state_dict(self) -> dict[str, Any]:
        """What was gathered so far, as JSON values."""
        return {"sums": {k: list(v) for k, v in self._sums.items()}, "extremes": dict(self._extremes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {k: list(v) for k, v in state["sums"].items()}
        self._extremes = dict(state["extremes"])


class RunLog:
    """``metrics.jsonl`` and ``samples.jsonl`` in the output folder, and the screen.

    Without an output folder nothing is written. On a terminal with rich installed a progress bar, else plain lines.
    """

    SHOWN = ("loss", "reward", "rewards/margins", "rewards/accuracies", "kl", "learning_rate")

    def __init__(self, folder: Path | None, title: str, quiet: bool = False) -> None:
        self.folder = folder
        self.title = title
        self.total, self.before = 0, 0
        self.quiet = quiet
        self.history: list[dict[str, Any]] = []
        self._started = time.monotonic()
        self._sizes = dict.fromkeys(LOGS, 0)
        self._bar: Any = None
        self._task: Any = None
        self._trackers: list[Any] = []

    def __enter__(self) -> RunLog:
        if not self.quiet and sys.stderr.isatty():
            try:
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            except ImportError:
                return self
            columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[numbers]}"), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=None, numbers="")
        return self

    def begin(self, total: int, done: int = 0, before: int = 0) -> None:
        """A stage of so many steps begins, or goes on; ``before``: steps of the stages before it."""
        self.total, self.before = total, before
        if self._bar is not None:
            self._bar.reset(self._task, total=total, completed=done)

    def position(self) -> dict[str, Any]:
        """How much is written so far, for a checkpoint."""
        return {"bytes": dict(self._sizes), "seconds": time.monotonic() - self._started}

    def go_on(self, position: Mapping[str, Any]) -> None:
        """Forget what was written after a checkpoint: it will be written again."""
        assert self.folder is not None
        self._started = time.monotonic() - position["seconds"]
        self._sizes = dict(position["bytes"])
        for name, size in self._sizes.items():
            file = self.folder / name
            there = _whole_lines(file, size)
            if file.exists():
                os.truncate(file, there)
            if there < size:  # removed by hand: no reason to lose the weights
                self.say(f"{file} is shorter than when the checkpoint was written; its missing lines stay missing.")
                self._sizes[name] = there
        self.history = read_log(self.folder / "metrics.jsonl")

    def sync(self) -> None:
        """To the disk: a checkpoint says how long these files are."""
        for name, size in self._sizes.items():
            if self.folder is not None and size:
                sync_one(self.folder / name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        for tracker in self._trackers:
            tracker.finish()

    def open_trackers(self, names: Sequence[str], record: Mapping[str, Any]) -> None:
        """Trackers of accelerate get the metrics too, each under its own settings and environment variables."""
        for name in names:
            if not _available(name):
                raise UsageError(f"report_to {name!r}: the package {name} is not installed; pip install {name}.")
            make = LOGGER_TYPE_TO_CLASS[name]
            folder = str(self.folder or "runs")
            tracker = make(self.title, logging_dir=folder) if make.requires_logging_directory else make(self.title)
            getattr(tracker, "start", lambda: None)()  # older versions of accelerate start it when it is made
            tracker.store_init_configuration(_flat(record))
            self._trackers.append(tracker)

    def step(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self._record(step, values)
        numbers = self._numbers(values)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        else:
            self.note(f"{self.title} {step}/{self.total}  {numbers}")

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Metrics of rows held out, each named ``eval/...``; a row of its own."""
        self._record(step, values)
        shown = self._numbers({name.removeprefix("eval/"): value for name, value in values.items()})
        self.note(f"{self.title} {step}/{self.total}  evaluation: {shown}")

    def _record(self, step: int, values: dict[str, float]) -> None:
        row = {"step": step, **values, "time": round(time.monotonic() - self._started, 3)}
        self.history.append(row)
        self._append("metrics.jsonl", row)
        for tracker in self._trackers:
            tracker.log(values, step=self.before + step)

    def _numbers(self, values: Mapping[str, float]) -> str:
        return "  ".join(f"{k.rpartition('/')[2]} {values[k]:.4g}" for k in self.SHOWN if k in values)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._append("samples.jsonl", {"step": step, **row})
        if rows and self._bar is None:
            self.note(f"  e.g. {rows[0]['prompt'][-60:]!r} -> {rows[0]['completion'][:100]!r}")

    def note(self, text: str) -> None:
        """A line for the user, unless the run is quiet."""
        if not self.quiet:
            self.say(text)

    def say(self, text: str) -> None:
        """A line that the user must see."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(f"{text}\n", end="", file=sys.stderr, flush=True)  # at once, or lines of processes run together

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if self.folder is None:
            return
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        whole = told(f"{name} could not be written to {str(self.folder)!r}", self.folder)
        with whole, (self.folder / name).open("ab") as file:
            file.write(line)
        self._sizes[name] += len(line)


def read_log(file: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``; a last line that was cut off is left out."""
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def _whole_lines(file: Path, size: int) -> int:
    """Bytes of the whole lines among the first ``size``."""
    if not file.exists():
        return 0
    with file.open("rb") as opened:
        return opened.read(size).rfind(b"\n") + 1


def _available(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested record with names such as config/learning_rate and values that every tracker can hold."""
    out: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}/")
        else:
            out[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return out
