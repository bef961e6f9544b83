"""Made-up studies: a suite's plan with rows that have known effects instead of trained models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefzoo.benchmarks.jobs import Outcome
from prefzoo.benchmarks.plan import Plan, plan
from prefzoo.benchmarks.suites import Suite

WORDS = np.array(["lamp", "milk", "rope", "salt", "tea", "wine", "corn", "fish"], dtype=object)


def suite(*methods: Any, **changes: Any) -> Suite:
    """A suite of the world of requests."""
    given = {"name": "made up", "world": {"name": "requests"}, "algorithms": list(methods) or ["dpo", "ipo", "kto"]}
    given |= {
        "start": {"sft": {"max_steps": 1}},
        "seeds": 3,
        "test_prompts": 60,
        "decoding": {"samples": 2, "max_new_tokens": 8},
        **changes,
    }
    return Suite.model_validate(given)


def study(
    made: Suite,
    folder: Path,
    *,
    effects: Mapping[str, float] | None = None,
    failed: Collection[str] = (),
    seed_sd: float = 0.02,
    curves: Mapping[str, Callable[[int], tuple[float, float]]] | None = None,
    unparsed: float = 0.1,
) -> tuple[Plan, dict[str, Outcome]]:
    """The plan and what became of its jobs.

    Args:
        effects: what a method adds to the gold reward of every answer; 0 where none is given.
        failed: names of jobs that failed.
        seed_sd: standard deviation of that over runs.
        curves: method -> step -> (gold, proxy), at steps 0, 10, ... 60.
        unparsed: share of the orders of a judge of pairs without a verdict.
    """
    planned = plan(made)
    outcomes: dict[str, Outcome] = {}
    for index, job in enumerate(planned.jobs):
        key = f"{index:016x}"
        place = folder / "cells" / f"{job.name.replace('/', '-')}-{key}"
        if job.name in failed or any(n in failed for k, n in job.needs.items() if k not in job.optional):
            outcomes[job.name] = Outcome(job.name, key, place, None, "it diverged.", role=job.role)
            continue
        place.mkdir(parents=True)
        random = np.random.default_rng([7, index])
        facts: dict[str, Any] = {"seconds": 1.5, "cpu_seconds": 1.0, "peak_memory": 2**20}
        if job.role == "cell":
            name = job.params["method"]["name"]
            facts |= _cell(job.params, (effects or {}).get(name, 0.0), seed_sd, random, place)
            if curves and name in curves:
                _curve(curves[name], random, place)
        elif job.role == "judgement" and job.params["against"]:
            facts |= _compared(job, outcomes, unparsed, random, place)
        elif job.role == "judgement":
            for name, source in (("scores", "rows"), ("scores_greedy", "greedy")):
                table = pq.read_table(outcomes[job.needs["cell"]].folder / f"{source}.parquet")
                score = np.asarray(table["gold"]) + random.normal(0, 0.5, len(table))
                pq.write_table(table.select(["prompt", "sample"]).append_column(job.params["judge"]["name"], [score]),
                               place / f"{name}.parquet")  # fmt: skip
        outcomes[job.name] = Outcome(job.name, key, place, facts, role=job.role)
    return planned, outcomes


def _cell(params: Mapping[str, Any], effect: float, seed_sd: float, random: Any, place: Path) -> dict[str, Any]:
    n, k = params["test_prompts"], params["samples"]
    prompt_N = np.random.default_rng(1).normal(0, 1, n)  # the prompts are the same for all
    effect += random.normal(0, seed_sd) if params["method"]["name"] != "start" else 0.0

    def rows(samples: int) -> dict[str, Any]:
        gold_NK = prompt_N[:, None] + effect + random.normal(0, 1, (n, samples))
        tokens = random.integers(3, 9, n * samples)
        return {
            "prompt": np.repeat(np.arange(n), samples), "sample": np.tile(np.arange(samples), n),
            "gold": gold_NK.ravel(), "exact": (gold_NK > 1).ravel().astype(float),
            "proxy": (gold_NK + random.normal(0, 0.3, gold_NK.shape)).ravel(),
            "tokens": tokens, "finished": tokens < 8,
            "cluster": [f"c{i // 2}" for i in range(n) for _ in range(samples)],
            "prompt_text": [f"prompt {i}" for i in range(n) for _ in range(samples)],
            "completion": [" ".join(random.choice(WORDS, t)) for t in tokens], "completion_ids": [[1]] * len(tokens),
        }  # fmt: skip

    table = rows(k)
    table["kl"] = abs(effect) * 2 + random.normal(0, 0.1, n * k)
    run = {"method": [params["method"]["name"]] * (n * k), "seed": [params["seed"]] * (n * k)}
    pq.write_table(pa.table({**table, **run}), place / "rows.parquet")
    pq.write_table(pa.table(rows(1)), place / "greedy.parquet")
    nll = random.gamma(2, 3, 40) + effect
    held_out = {"row": np.arange(40), "nll": nll, "tokens": np.random.default_rng(2).integers(4, 12, 40)}
    pq.write_table(pa.table(held_out), place / "held_out.parquet")
    spent = {"optimizer_steps": 10, "prompts": 64, "generated_tokens": 0, "trained_tokens": 500 + params["seed"]}
    trained = params["method"]["name"] != "start"
    return {"method": params["method"]["name"], "seed": params["seed"], "spent": spent if trained else None}


def _curve(shape: Callable[[int], tuple[float, float]], random: Any, place: Path) -> None:
    n, tables = 80, []
    prompt_N = np.random.default_rng(3).normal(0, 1, n)
    for step in range(0, 70, 10):
        gold, proxy = shape(step)
        columns = {
            "prompt": np.repeat(np.arange(n), 2), "sample": np.tile(np.arange(2), n),
            "gold": np.repeat(prompt_N, 2) + gold + random.normal(0, 0.5, 2 * n),
            "proxy": np.repeat(prompt_N, 2) + proxy + random.normal(0, 0.5, 2 * n),
            "kl": np.full(2 * n, step / 10.0), "tokens": np.full(2 * n, 5), "finished": np.ones(2 * n, bool),
            "cluster": [f"v{i}" for i in range(n) for _ in range(2)], "completion": ["x"] * (2 * n),
            "step": np.full(2 * n, step), "generated_tokens": np.full(2 * n, 100.0 * step),
        }  # fmt: skip
        tables.append(pa.table(columns))
    pq.write_table(pa.concat_tables(tables), place / "curve.parquet")


def _compared(job: Any, outcomes: Mapping[str, Outcome], unparsed: float, random: Any, place: Path) -> dict[str, Any]:
    """A judge of pairs that sees gold with noise, likes the first place, and sometimes says nothing."""
    mine = pq.read_table(outcomes[job.needs["cell"]].folder / "rows.parquet")
    tables = []
    for baseline in job.params["against"]:
        theirs = pq.read_table(outcomes[job.needs[f"against:{baseline}"]].folder / "rows.parquet")
        gap = np.asarray(mine["gold"]) - np.asarray(theirs["gold"]) + random.normal(0, 0.3, len(mine))
        said = {"forward": (gap + 0.3 > 0) * 1.0, "backward": (gap - 0.3 > 0) * 1.0}
        said = {k: np.where(random.random(len(v)) < unparsed, np.nan, v) for k, v in said.items()}
        tables.append(pa.table({
            "prompt": mine["prompt"], "sample": mine["sample"], "against": [baseline] * len(mine), **said
        }))  # fmt: skip
    pq.write_table(pa.concat_tables(tables), place / "judgements.parquet")
    return {"judging": {b: {"calls": 2 * len(mine)} for b in job.params["against"]}}
