"""Pages of replications: reward against KL along training, beside best-of-n; tables from a run, figures from tables.

prefzoo bench replication --out runs/replication
python -m prefzoo.benchmarks.replication runs/replication docs/results/replication
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from prefzoo.benchmarks import statistics
from prefzoo.files import replacing_file
from prefzoo.registry import UsageError

Rows = list[dict[str, Any]]

MEASURED = ("gold", "exact", "proxy", "kl", "tokens")
LINE = "best_of_n"
# What is drawn of a method: world, what stands on the vertical axis, and who picks the best of n.
LEARNED = (("requests", "gold", "proxy"), ("requests", "proxy", "proxy"))
CHECKED = (("requests", "exact", "exact"), ("requests", "gold", "exact"), ("sums", "exact", "exact"))
AXES = {
    "gold": "gold reward (the truth)",
    "proxy": "reward model's score (what training sees)",
    "exact": "share of exact answers",
}


def write_tables(run: Path, to: Path) -> list[str]:
    """``NAME.csv`` of every method of a finished suite that was scored while it trained, and ``best_of_n.csv``.

    A row is one seed at one step: the number of answers, and mean and standard error (over prompts) of each measure.

    Returns:
        The methods' names.
    """
    if not (run / "results.json").exists():
        raise UsageError(f"{str(run)!r} holds no results.json; give the --out folder of 'prefzoo bench replication'.")
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    made: dict[str, Rows] = defaultdict(list)
    line: Rows = []
    for world, task in results["tasks"].items():
        for name, method in task["methods"].items():
            for seed, key in enumerate(method["cells"]):
                file = run / "cells" / f"{world}-{name}-{seed}-{key}" / "curve.parquet"
                if file.exists():
                    made[name] += [{"world": world, "seed": seed, **point} for point in curve_points(file)]
        points = task["shared"].get(LINE, {}).get("line", [])
        line += [{"world": world, **{k: p.get(k) for k in _LINE_COLUMNS[1:]}} for p in points]
    to.mkdir(parents=True, exist_ok=True)
    for name, rows in made.items():
        _write(to / f"{name}.csv", rows)
    _write(to / f"{LINE}.csv", line)
    return list(made)


_LINE_COLUMNS = (
    "world", "judge", "n", "kl", "gold", "gold_se", "exact", "exact_se", "proxy", "proxy_se",
)  # fmt: skip


def curve_points(file: Path) -> Rows:
    """The points of a stored curve: answers of a prompt are averaged first, errors are over prompts."""
    table = pq.read_table(file)
    step, prompt = np.asarray(table["step"]), np.asarray(table["prompt"])
    rows = []
    for s in sorted(set(step.tolist())):
        at = step == s
        row: dict[str, Any] = {"step": s, "n": int(at.sum())}
        answers_N = np.bincount(prompt[at])
        for name in MEASURED:
            known = name in table.column_names
            values = np.asarray(table[name], dtype=np.float64)[at] if known else None
            mean = None if values is None else statistics.mean((np.bincount(prompt[at], values) / answers_N)[None])
            row |= {name: None if mean is None else mean.estimate, f"{name}_se": None if mean is None else mean.se}
        rows.append(row)
    return rows


def _write(file: Path, rows: Rows) -> None:
    with replacing_file(file) as aside, aside.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]) if rows else list(_LINE_COLUMNS), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})


def read(file: Path) -> Rows:
    """A table as it was written; an empty field is a number that is not there."""
    with file.open(newline="", encoding="utf-8") as lines:
        return [
            {k: (v if k in ("world", "judge") else float(v) if v else math.nan) for k, v in row.items()}
            for row in csv.DictReader(lines)
        ]


def draw(folder: Path, names: Sequence[str]) -> None:
    """``NAME.png`` from ``NAME.csv`` and ``best_of_n.csv``, and nothing else."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    line = read(folder / f"{LINE}.csv")
    for name in names:
        rows = read(folder / f"{name}.csv")
        panels = [p for p in (CHECKED if name == "rlvr" else LEARNED) if any(r["world"] == p[0] for r in rows)]
        figure, axes = plt.subplots(
            1, len(panels), figsize=(4.7 * len(panels), 3.6), squeeze=False, layout="constrained"
        )
        for axis, panel in zip(axes[0], panels, strict=True):
            _draw_panel(axis, rows, line, *panel)
        axes[0][-1].legend(fontsize=7.5, frameon=False, loc="lower right")
        figure.suptitle(f"{name}: reward against KL along training", fontsize=11)
        with replacing_file(folder / f"{name}.png") as aside:
            figure.savefig(aside, dpi=130, format="png")
        plt.close(figure)


SEEDS = ("#1a4f8a", "#3b8bc4", "#79b8d8")
GREY = "#70757d"


def _draw_panel(axis: Any, rows: Rows, line: Rows, world: str, measure: str, judge: str) -> None:
    """Every seed's points in order of steps, on the square root of KL; the line of best-of-n behind them."""
    best = [p for p in line if p["world"] == world and p["judge"] == judge]
    if best:
        x = np.array([math.sqrt(p["kl"]) for p in best])
        y, error = (np.array([p[k] for p in best]) for k in (measure, f"{measure}_se"))
        axis.plot(x, y, color=GREY, ls="--", lw=1.2, label=f"best of n of the start, by {_judge(judge)}")
        axis.fill_between(x, y - 1.96 * error, y + 1.96 * error, color=GREY, alpha=0.15, lw=0)
        for p in best[:: max(1, len(best) // 4)]:
            axis.annotate(
                f"n={p['n']:.0f}", (math.sqrt(p["kl"]), p[measure]), xytext=(2, -9), textcoords="offset points",
                fontsize=6.5, color=GREY,
            )  # fmt: skip
    mine = [r for r in rows if r["world"] == world]
    for seed in sorted({r["seed"] for r in mine}):
        points = sorted((r for r in mine if r["seed"] == seed), key=lambda r: r["step"])
        x = np.array([math.sqrt(max(p["kl"], 0.0)) for p in points])
        axis.errorbar(
            x, [p[measure] for p in points], yerr=[1.96 * p[f"{measure}_se"] for p in points],
            color=SEEDS[int(seed) % len(SEEDS)], marker="o", ms=3.5, lw=1.1, elinewidth=0.7, label=f"seed {seed:.0f}",
        )  # fmt: skip
        if seed == 0:
            for p, at in zip(points, x, strict=True):
                axis.annotate(f"{p['step']:.0f}", (at, p[measure]), xytext=(-3, 6), textcoords="offset points",
                              fontsize=6.5, color=SEEDS[0])  # fmt: skip
    axis.set_title(f"{world}; numbers at points: steps of seed 0", fontsize=8, loc="left", color=GREY)
    axis.set_xlabel("KL to the start, nats (square-root scale)")
    axis.set_ylabel(AXES[measure])
    ticks = [t for t in (0, 0.25, 1, 2, 4, 8, 16, 32, 64) if math.sqrt(t) <= axis.get_xlim()[1]]
    axis.set_xticks([math.sqrt(t) for t in ticks], [f"{t:g}" for t in ticks])
    axis.spines[["top", "right"]].set_visible(False)


def _judge(judge: str) -> str:
    return {"proxy": "the reward model", "exact": "the exact check", "gold": "the truth"}[judge]


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 2:
        raise SystemExit(__doc__)
    folder = Path(arguments[1])
    names = write_tables(Path(arguments[0]), folder)
    draw(folder, names)
    print(f"{folder}: {', '.join(names)}")


if __name__ == "__main__":
    main(sys.argv[1:])
