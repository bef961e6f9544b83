"""Metrics of a run: weighted means gathered over a logging window, JSON lines on disk, lines or a bar on the screen."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor


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

    def add(self, name: str, values: Tensor | float, mask: Tensor | None = None) -> None:
        """Values of rows (B,) or tokens (B, T); cells outside the mask do not count."""
        if isinstance(values, Tensor):
            values = values.detach().float()
            if mask is not None and values.dim() == 2:
                values = values[mask]
            total, weight = float(values.sum()), values.numel()
        else:
            total, weight = float(values), 1
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += total
        entry[1] += weight

    def means(self) -> dict[str, float]:
        return {name: total / weight for name, (total, weight) in self._sums.items() if weight}

    def clear(self) -> None:
        self._sums.clear()


class RunLog:
    """``metrics.jsonl`` and ``samples.jsonl`` in the output folder, and the screen.

    Without an output folder nothing is written. On a terminal with rich installed a progress bar, else plain lines.
    """

    SHOWN = ("loss", "reward", "rewards/margins", "rewards/accuracies", "kl", "learning_rate")

    def __init__(self, folder: Path | None, title: str, quiet: bool = False) -> None:
        self.folder = folder
        self.title = title
        self.total = 0
        self.quiet = quiet
        self.history: list[dict[str, Any]] = []
        self._started = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "samples.jsonl"):
                (folder / name).unlink(missing_ok=True)

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

    def begin(self, total: int) -> None:
        """A stage of so many steps begins."""
        self.total = total
        if self._bar is not None:
            self._bar.reset(self._task, total=total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        row = {"step": step, **values, "time": round(time.monotonic() - self._started, 3)}
        self.history.append(row)
        self._append("metrics.jsonl", row)
        numbers = "  ".join(f"{k.rpartition('/')[2]} {values[k]:.4g}" for k in self.SHOWN if k in values)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif not self.quiet:
            print(f"{self.title} {step}/{self.total}  {numbers}", file=sys.stderr, flush=True)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._append("samples.jsonl", {"step": step, **row})
        if rows and not self.quiet and self._bar is None:
            print(f"  e.g. {rows[0]['prompt'][-60:]!r} -> {rows[0]['completion'][:100]!r}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line for the user."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        if self.folder is not None:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
