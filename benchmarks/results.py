"""From stored rows to results: every number is computed here, from the rows alone, and can be computed again.

Samples are averaged within a prompt first; seeds are a random effect (``statistics``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefzoo.benchmarks import statistics
from prefzoo.benchmarks.jobs import Outcome
from prefzoo.benchmarks.runner import Plan
from prefzoo.benchmarks.suites import Suite, Task, about
from prefzoo.files import replacing_file

REPORTED = (
    "gold", "exact", "judge", "proxy", "kl", "tokens", "finished", "flattery", "items", "order", "tone", "worked",
)  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """The scored answers of one method: columns (S, N, K) of S seeds, N prompts, K samples."""

    columns: Mapping[str, np.ndarray]
    clusters: list[str]
    distinct: float

    @classmethod
    def read(cls, files: list[Path]) -> Answers:
        tables = [pq.read_table(f) for f in files]
        samples = 1 + int(np.asarray(tables[0]["sample"]).max())
        numeric = [
            c.name for c in tables[0].schema
            if pa.types.is_floating(c.type) or pa.types.is_integer(c.type) or pa.types.is_boolean(c.type)
        ]  # fmt: skip
        columns = {
            n: np.stack([np.asarray(t[n], dtype=np.float64).reshape(-1, samples) for t in tables]) for n in numeric
        }
        texts = [
            (p, c) for t in tables for p, c in zip(t["prompt"].to_pylist(), t["completion"].to_pylist(), strict=True)
        ]
        return cls(columns, tables[0]["cluster"].to_pylist()[::samples], len(set(texts)) / len(texts))

    def mean_SN(self, name: str) -> np.ndarray:
        return self.columns[name].mean(-1)

    def wins_SN(self, other: Answers, metric: str) -> np.ndarray:
        """Share of samples in which this one is better than the other's of the same number; a tie is half."""
        return statistics.win(self.columns[metric], other.columns[metric]).mean(-1)


def collect(suite: Suite, plan: Plan, outcomes: Mapping[str, Outcome], folder: Path) -> dict[str, Any]:
    """The results of a suite as plain values; also writes ``rows.parquet`` with all scored answers."""
    tasks, tables = {}, []
    for task in suite.tasks:
        cells = {m: [outcomes[n] for n in names] for m, names in plan.cells[task.name].items()}
        finished = {m: c for m, c in cells.items() if all(o.error is None for o in c)}
        answers = {m: Answers.read([o.folder / "rows.parquet" for o in c]) for m, c in finished.items()}
        shared = {
            job.name.rpartition("/")[2]: dict(outcomes[job.name].facts or {"error": outcomes[job.name].error})
            for job in plan.jobs
            if job.name.count("/") == 1 and job.name.startswith(f"{task.name}/")
        }
        tasks[task.name] = {
            "kind": task.kind,
            "metric": task.metric,
            "test_prompts": next((len(a.clusters) for a in answers.values()), 0),
            "shared": shared,
            "reused": [o.name for c in cells.values() for o in c if o.reused],
            "failed": {o.name: o.error for o in outcomes.values() if o.error and o.name.startswith(f"{task.name}/")},
            "not_applicable": plan.not_applicable[task.name],
            "methods": {m: _method(m, task, answers, finished) | about(task.method(m)) for m in answers},
            "pairs": _pairs(task, answers, suite.verdicts),
            "curves": _curves(finished, task.metric),
            "settings": {k: v for k, v in task.settings.items() if k != "data"},
        }
        if task.kind == "pairs" and "judge" in shared and "test_pairs" in shared["judge"]:
            judge = shared["judge"]
            share = statistics.wilson(round(judge["right_on_test_pairs"]), judge["test_pairs"])
            tasks[task.name]["judge_accuracy"] = share.to_dict()
        for outcome in itertools.chain.from_iterable(finished.values()):
            table = pq.read_table(outcome.folder / "rows.parquet")
            tables.append(table.append_column("task", pa.array([task.name] * len(table))))
    if tables:
        with replacing_file(folder / "rows.parquet") as aside:
            pq.write_table(pa.concat_tables(tables, promote_options="default"), aside)
    else:  # the rows of an earlier call do not belong to these results
        (folder / "rows.parquet").unlink(missing_ok=True)
    return {
        "suite": suite.name,
        "budget": suite.budget,
        "seeds": suite.seeds,
        "this_run_only": suite.seeds == 1,
        "test_prompts": suite.test_prompts,
        "samples": suite.samples,
        "verdicts": suite.verdicts,
        "cpu_seconds": sum((o.facts or {}).get("cpu_seconds", 0.0) for o in outcomes.values()),
        "tasks": tasks,
    }


def _method(
    name: str, task: Task, answers: Mapping[str, Answers], cells: Mapping[str, list[Outcome]]
) -> dict[str, Any]:
    mine, outcomes = answers[name], cells[name]
    facts = [dict(o.facts or {}) for o in outcomes]
    spent = [f["spent"] for f in facts if f.get("spent")]
    out: dict[str, Any] = {
        "seeds": len(outcomes),
        "cells": [o.key for o in outcomes],
        "means": {
            c: statistics.mean(mine.mean_SN(c), clusters=mine.clusters).to_dict()
            for c in REPORTED
            if c in mine.columns
        },
        "greedy": float(np.mean([f["greedy"] for f in facts])),
        "distinct": mine.distinct,
        "seconds": float(np.mean([f["seconds"] for f in facts])),
        "peak_memory": max(f["peak_memory"] for f in facts),
        "spent": {k: float(np.mean([s[k] for s in spent])) for k in spent[0]} if spent else {},
    }
    for baseline in ("start", "sft_more"):
        if name == baseline or baseline not in answers:
            continue
        base = answers[baseline]
        wins_SN = mine.wins_SN(base, task.metric)
        difference = statistics.difference(
            mine.mean_SN(task.metric), base.mean_SN(task.metric), paired_seeds=True, clusters=mine.clusters
        )
        ties = (mine.columns[task.metric] == base.columns[task.metric]).mean()
        out[f"against_{baseline}"] = {
            "win": statistics.win_rate(wins_SN, clusters=mine.clusters).to_dict(),
            "difference": difference.to_dict(),
            "ties": float(ties),
            "win_range_over_seeds": [float(wins_SN.mean(1).min()), float(wins_SN.mean(1).max())],
        }
    return out


def _pairs(task: Task, answers: Mapping[str, Answers], verdicts: str = "all") -> list[dict[str, Any]]:
    """Pairs of trained methods, all of them or each with ``sft_more``: who wins head to head, and Holm's verdict over
    these pairs on the win rates against the start."""
    names = [n for n in answers if n != "start"]
    if "start" not in answers or len(names) < 2:
        return []
    against = {n: answers[n].wins_SN(answers["start"], task.metric) for n in names}
    clusters = answers["start"].clusters
    rows: list[dict[str, Any]] = []
    gaps = []
    chosen: Iterable[tuple[str, str]] = itertools.combinations(names, 2)
    if verdicts != "all":
        chosen = ((n, verdicts) for n in names if n != verdicts and verdicts in answers)
    for a, b in chosen:
        gap = statistics.difference(against[a], against[b], paired_seeds=True, clusters=clusters)
        head = statistics.win_rate(answers[a].wins_SN(answers[b], task.metric), clusters=clusters)
        gaps.append(gap)
        rows.append({"a": a, "b": b, "head_to_head": head.to_dict(), "difference": gap.to_dict()})
    adjusted = statistics.holm([g.p for g in gaps]).tolist() if gaps else []
    for row, gap, p in zip(rows, gaps, adjusted, strict=True):
        row |= {"p_holm": float(p), "verdict": statistics.verdict(gap, float(p))}
    return rows


def _curves(cells: Mapping[str, list[Outcome]], metric: str) -> dict[str, Any]:
    """For methods scored while training: means by step, and whether the truth ends below its own peak while the proxy
    goes on rising. The peak is chosen by looking, so the drop from it is flattered by about one standard error."""
    out: dict[str, Any] = {}
    for name, outcomes in cells.items():
        files = [o.folder / "curve.parquet" for o in outcomes if (o.folder / "curve.parquet").exists()]
        if not files:
            continue
        tables = [pq.read_table(f) for f in files]
        steps = sorted(set(tables[0]["step"].to_pylist()))
        columns = [c for c in (metric, "proxy", "kl", "tokens", "flattery", "finished") if c in tables[0].column_names]

        def by_step(column: str, tables: list[pa.Table] = tables, steps: list[int] = steps) -> np.ndarray:
            """(steps, S, N), samples averaged."""
            found = []
            for table in tables:
                step, prompt = np.asarray(table["step"]), np.asarray(table["prompt"])
                values = np.asarray(table[column], dtype=np.float64)
                prompts = prompt.max() + 1
                found.append([
                    np.bincount(prompt[step == s], values[step == s], prompts)
                    / np.bincount(prompt[step == s], None, prompts)
                    for s in steps
                ])  # fmt: skip
            return np.asarray(found).transpose(1, 0, 2)

        truth = by_step(metric)
        peak = int(truth.mean((1, 2)).argmax())
        entry: dict[str, Any] = {
            "steps": steps,
            "means": {c: by_step(c).mean((1, 2)).tolist() for c in columns},
            "errors": [statistics.mean(t).se for t in truth],
            "peak_step": steps[peak],
            "end_minus_peak": statistics.difference(truth[-1], truth[peak], paired_seeds=True).to_dict(),
        }
        if "proxy" in columns:
            proxy = by_step("proxy")
            entry["proxy_end_minus_peak"] = statistics.difference(proxy[-1], proxy[peak], paired_seeds=True).to_dict()
        out[name] = entry
    return out
