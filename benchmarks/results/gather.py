"""What jobs have left: their rows as whole tables, and the part of the results that rows do not tell."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefzoo.benchmarks.jobs import Outcome, saved
from prefzoo.benchmarks.judging import JudgeSpec
from prefzoo.benchmarks.results.stored import TABLES
from prefzoo.benchmarks.suites import Method, Suite, Task, about
from prefzoo.files import replacing_file

if TYPE_CHECKING:
    from prefzoo.benchmarks.plan import Plan

FORMAT = 2
MACHINE = (
    "seconds",
    "cpu_seconds",
    "peak_memory",
    "judging",
)  # facts that another run of the same suite need not repeat
HEAVY = ("completion_ids",)  # the cells keep them
TEXTS = ("prompt_text", "completion", *HEAVY)


def write_tables(suite: Suite, plan: Plan, outcomes: Mapping[str, Outcome], folder: Path) -> None:
    """``rows.parquet``, ``greedy.parquet``, ``held_out.parquet``, ``curves.parquet`` and ``judgements.parquet`` of the
    whole suite: what all cells have written, with what their judges said. Tables that nothing is left for are removed,
    as rows of an earlier call do not belong to these results."""
    pieces: dict[str, list[pa.Table]] = {name: [] for name in TABLES}
    for task in suite.tasks:
        for method, names in plan.cells[task.name].items():
            for run, name in enumerate(names):
                cell = outcomes[name]
                if cell.error is not None:
                    continue
                place = {"task": task.name, "method": method, "run": run}
                said = {
                    judge: outcomes[by_method[method][run]]
                    for judge, by_method in plan.judgements.get(task.name, {}).items()
                    if method in by_method and outcomes[by_method[method][run]].error is None
                }
                for file, table in _cell_tables(cell.folder, said).items():
                    pieces[file].append(_placed(table, place))
                for judge, outcome in said.items():
                    if (outcome.folder / "judgements.parquet").exists():
                        table = pq.read_table(outcome.folder / "judgements.parquet")
                        pieces["judgements"].append(_placed(table, {**place, "judge": judge}))
    for file, tables in pieces.items():
        path = folder / f"{file}.parquet"
        if not tables:
            path.unlink(missing_ok=True)
            continue
        with replacing_file(path) as aside:
            pq.write_table(pa.concat_tables(tables, promote_options="default"), aside)


def _cell_tables(cell: Path, said: Mapping[str, Outcome]) -> dict[str, pa.Table]:
    """A cell's rows beside the scores that judges gave them later."""
    found = {}
    for name, file, scores in (
        ("rows", "rows", "scores"), ("greedy", "greedy", "scores_greedy"),
        ("held_out", "held_out", None), ("curves", "curve", None),
    ):  # fmt: skip
        if not (cell / f"{file}.parquet").exists():
            continue
        table = pq.read_table(cell / f"{file}.parquet")
        for outcome in said.values() if scores else ():
            if (outcome.folder / f"{scores}.parquet").exists():
                table = _joined(table, pq.read_table(outcome.folder / f"{scores}.parquet"), outcome.name)
        found[name] = table.drop_columns([c for c in (TEXTS if name == "curves" else HEAVY) if c in table.column_names])
    return found


def _joined(table: pa.Table, scores: pa.Table, job: str) -> pa.Table:
    """With the columns of a judge, whose rows are the same prompts and samples in the same order."""
    places = ("prompt", "sample")
    if any(not np.array_equal(np.asarray(table[c]), np.asarray(scores[c])) for c in places):
        raise RuntimeError(f"{job} judged other answers than its cell gave")
    for name in scores.column_names:
        if name not in places:
            table = table.drop_columns([name]) if name in table.column_names else table
            table = table.append_column(name, scores[name])
    return table


def _placed(table: pa.Table, place: Mapping[str, Any]) -> pa.Table:
    for name, value in place.items():
        table = table.drop_columns([name]) if name in table.column_names else table
        table = table.append_column(name, pa.array([value] * len(table)))
    return table


def told(suite: Suite, plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """The results without what is computed from rows."""
    return {
        "format": FORMAT, "suite": suite.name, "about": suite.about, "config": suite.model_dump(mode="json"),
        "command": f"prefzoo bench {suite.name} --seeds {suite.seeds}",
        "seeds": suite.seeds, "start_seeds": suite.start_seeds, "this_run_only": suite.seeds == 1,
        "test_prompts": suite.test_prompts, "verdicts": suite.verdicts, "margin": suite.margin, "budget": suite.budget,
        "data_hashes": {
            task: outcomes[names["data"][0]].key for task, names in plan.shared.items() if names.get("data")
        },
        "tasks": {task.name: _task(suite, task, plan, outcomes) for task in suite.tasks},
        "cost": _cost(suite, plan, outcomes),
    }  # fmt: skip


def _task(suite: Suite, task: Task, plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    cells = plan.cells[task.name]
    reasons = {n: outcomes[n].error for names in _jobs_of(task.name, plan) for n in names if outcomes[n].error}
    lost = {m: _reason(names, outcomes) for m, names in cells.items() if all(outcomes[n].error for n in names)}
    return {
        "kind": task.kind, "metric": task.metric, "samples": task.decoding.samples,
        "decoding": task.decoding.model_dump(mode="json"),
        "budget": None if task.budget is None else task.budget.model_dump(mode="json"),
        "judges": {
            j.name: {"kind": j.kind, "pairs": j.pairs, "primary": i == 0, "column": None if j.pairs else _column(j)}
            for i, j in enumerate(task.judges)
        },
        "shared": {
            artifact: _of_starts([_facts(outcomes[n]) for n in names])
            for artifact, names in plan.shared.get(task.name, {}).items()
        },
        "failed": reasons, "lost": lost, "not_applicable": plan.not_applicable[task.name],
        "tuning": _tuning(task, plan, outcomes),
        "methods": {
            m.name: _method(suite, task, m, [outcomes[n] for n in cells[m.name]], m.name in plan.choices[task.name])
            for m in task.methods
            if m.name in cells and m.name not in lost
        },
    }  # fmt: skip


def _column(judge: JudgeSpec) -> str:
    """Where a judge's scores are: one that every cell asks anyway may have been given another name."""
    return {"reward_model": "proxy"}.get(judge.kind, judge.kind) if judge.builtin else judge.name


def _jobs_of(task: str, plan: Plan) -> list[list[str]]:
    """The names of a task's jobs, in order: of what is shared, trials, choices, cells, judgements."""
    judged = [names for methods in plan.judgements.get(task, {}).values() for names in methods.values()]
    choices = [list(plan.choices.get(task, {}).values())]
    groups = (plan.shared, plan.trials, {task: {"": choices[0]}}, plan.cells)
    return [names for group in groups for names in group.get(task, {}).values()] + judged


def _reason(names: list[str], outcomes: Mapping[str, Outcome]) -> str:
    return next(error for n in names if (error := outcomes[n].error))


def _facts(outcome: Outcome) -> dict[str, Any]:
    if outcome.error is not None:
        return {"error": outcome.error}
    return {k: v for k, v in (outcome.facts or {}).items() if k not in MACHINE}


def _of_starts(facts: list[dict[str, Any]]) -> dict[str, Any]:
    return facts[0] if len(facts) == 1 else {"starts": facts}


def _method(suite: Suite, task: Task, method: Method, cells: list[Outcome], tuned: bool) -> dict[str, Any]:
    whole = [o for o in cells if o.error is None]
    facts = [o.facts or {} for o in whole]
    spent = [f["spent"] for f in facts if f.get("spent")]
    mean = {k: float(np.mean([s[k] for s in spent])) for k in spent[0]} if spent else {}
    budget = task.budget
    return {
        **about(method), "algorithm": method.algorithm, "tuned": tuned,
        "options": {**facts[0].get("options", {}), **facts[0].get("training", {})},
        "failed_runs": len(cells) - len(whole),
        "cells": [o.key for o in whole],
        "spent": mean,
        "budget_spent": mean[budget.unit] / budget.amount if budget is not None and budget.unit in mean else None,
    }  # fmt: skip


def _tuning(task: Task, plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, Any] | None:
    if task.tuning is None:
        return None
    methods = {}
    for name, choice in plan.choices.get(task.name, {}).items():
        found = _facts(outcomes[choice])
        for trial, job in zip(found.get("trials", ()), plan.trials[task.name][name], strict=False):
            if outcomes[job].error is not None:
                trial["error"] = outcomes[job].error
        methods[name] = found
    judge = next((j.name for j in task.judges if not j.pairs), None)
    return {"trials": task.tuning.trials, "judge": judge, "prompts": task.tuning.prompts, "methods": methods}


def _cost(suite: Suite, plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """What depends on the machine, and on what was there already."""
    facts = {n: o.facts or {} for n, o in outcomes.items()}

    def of(names: list[str]) -> dict[str, float]:
        done = [facts[n] for n in names if facts[n]]
        seconds = float(np.mean([f.get("seconds", 0.0) for f in done])) if done else 0.0
        return {"seconds": seconds, "peak_memory": max((f.get("peak_memory", 0) for f in done), default=0)}

    judges: dict[str, dict[str, dict[str, float]]] = {}
    for task, by_judge in plan.judgements.items():
        for judge, methods in by_judge.items():
            spent: dict[str, float] = {}
            for name in (n for names in methods.values() for n in names):
                for told in facts[name].get("judging", {}).values():
                    for unit, amount in told.items():
                        spent[unit] = spent.get(unit, 0) + amount
            if spent:
                judges.setdefault(task, {})[judge] = spent
    return {
        "cpu_seconds": sum(f.get("cpu_seconds", 0.0) for f in facts.values()),
        "methods": {task: {m: of(names) for m, names in methods.items()} for task, methods in plan.cells.items()},
        "jobs": {n: f["seconds"] for n, f in facts.items() if "seconds" in f},
        "judges": judges,
        "saved": dataclasses.asdict(saved(plan.jobs, outcomes)),
        "reused": [n for n, o in outcomes.items() if o.reused],
    }
