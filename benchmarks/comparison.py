"""``compare``: models that exist already, or files of answers, on the same prompts, by judges. It trains nothing."""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefzoo.benchmarks.cells import cluster_of
from prefzoo.benchmarks.contenders import gather, is_file
from prefzoo.benchmarks.judged import TASK, judged, judges_of, pairwise
from prefzoo.benchmarks.judging import Answers, PairJudge
from prefzoo.files import replacing_file
from prefzoo.registry import UsageError, suggest
from prefzoo.rollout import Sampling
from prefzoo.source import content_hash
from prefzoo.training import Run

__all__ = ["Comparison", "compare", "pairwise"]

TURNED = {"better": "worse", "worse": "better"}


@dataclass(frozen=True)
class Comparison:
    """Who wins against whom: for every pair a win rate of A over B with its interval, verdicts by Holm.

    ``results`` is the whole ``results.json``; ``contenders``: the answers of each model.
    """

    results: Mapping[str, Any] = field(repr=False)
    contenders: Mapping[str, Answers] = field(repr=False)
    tables: Mapping[str, pa.Table] = field(repr=False)
    left_out: int = 0  # prompts that leave a model no room for an answer

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.contenders)

    @property
    def baseline(self) -> str:
        """The model that the others' win rates are shown against."""
        return str(self.results["tasks"][TASK]["reference"])

    @property
    def answers(self) -> dict[str, list[str]]:
        """All answers to a prompt one after the other."""
        return {name: list(found.texts) for name, found in self.contenders.items()}

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """Every pair of models: ``win``, ``ties``, ``order_flips``, ``unparsed``, ``p_holm``, ``verdict``, ..."""
        found = self.results["tasks"][TASK]["pairs"]
        return [{**p, "win": p["head_to_head"], "order_flips": p["flips"]} for p in found]

    def __getitem__(self, pair: tuple[str, str]) -> dict[str, Any]:
        """One pair, seen from its first name: ``comparison["dpo", "kto"]["win"]["estimate"]``."""
        for name in pair:
            if name not in self.names:
                raise UsageError(f"no model {name!r}{suggest(name, self.names)} Compared: {', '.join(self.names)}.")
        a, b = pair
        if a == b:
            raise UsageError(f"{a!r} twice: give the names of two models.")
        found = {(p["a"], p["b"]): p for p in self.pairs}
        return found[a, b] if (a, b) in found else turned(found[b, a])

    def __str__(self) -> str:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        console = Console(file=io.StringIO(), width=120, force_terminal=False, markup=False, emoji=False)
        task = self.results["tasks"][TASK]
        table = Table("A", "B", "A wins, %", "p (Holm)", "ties, %", "order flips, %", "verdict on A", box=SIMPLE_HEAD)
        for p in self.pairs:
            w = p["win"]
            low, high = max(w["ci"][0], 0.0), min(w["ci"][1], 1.0)  # a t interval can reach beyond what a share can be
            interval = f"{100 * w['estimate']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            flips = "–" if p["flips"] is None else f"{100 * p['flips']:.1f}"
            table.add_row(p["a"], p["b"], interval, f"{p['p_holm']:.2g}", f"{100 * p['ties']:.1f}", flips, p["verdict"])
        console.print(table)
        scores = [j for j, told in task["judges"].items() if not told["pairs"]]
        table = Table("model", "mean characters", *(f"mean {j}" for j in scores), box=SIMPLE_HEAD)
        for name, found in task["methods"].items():
            means = (f"{found['means'][j]['estimate']:.4g}" for j in scores)
            table.add_row(name, f"{found['length']['mean']:.0f}", *means)
        console.print(table)
        if self.left_out:
            console.print(f"{self.left_out} prompts left out: too long for one of the models with its answer.")
        return console.file.getvalue()  # type: ignore[attr-defined]

    def report(self, folder: str | Path) -> str:
        """Write ``results.json``, the tables and the report into a folder; returns the terminal's table.

        ``UsageError`` where the folder holds results of something else.
        """
        from prefzoo.benchmarks.reporting import write_report

        folder, file = Path(folder), Path(folder) / "results.json"
        if file.exists() and json.loads(file.read_text(encoding="utf-8")).get("suite") != self.results["suite"]:
            raise UsageError(f"{str(folder)!r} holds the results of a suite; give the comparison a folder of its own.")
        folder.mkdir(parents=True, exist_ok=True)
        write(self.tables, folder)
        with replacing_file(file) as aside:
            aside.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        return write_report(folder)


def compare(
    models: Mapping[str, Any] | Sequence[Any],
    *,
    judge: Any,
    prompts: Any = None,
    columns: Mapping[str, str] | None = None,
    samples: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 128,
    seed: int = 0,
    baseline: str | None = None,
    tokenizer: Any = None,
    cache: str | Path = ".prefzoo-judge",
    command: str = "prefzoo.compare(...)",
) -> Comparison:
    """Compare finished models, runs or files of answers on the same prompts.

        y = mean over samples and both orders of P(A's answer is better),   difference = y - (1 - y)

    Errors are clustered by prompt; p-values are corrected over all pairs (Holm).

    Args:
        models: name -> a folder of a model, run or adapter, a hub id, a :class:`prefzoo.Run`, or a file of answers
            (JSON Lines, CSV, Parquet: prompt and completion); a list is named by its folders and files.
        judge: what :class:`~prefzoo.benchmarks.judging.JudgeSpec` knows (``length``, a verifier's name, a reward-model
            folder, ``{"llm": {...}}``, ``{"human": FILE}``), a reward function with TRL's signature, or
            ``pairwise(f)``; a list: the first decides, the others are shown.
        prompts: a data set of any type; its prompts are used, each once. None: those of the files of answers.
        columns: what ``prompts`` calls our columns; without ``prompts``, what the files of answers do.
        samples: answers per prompt, averaged within the prompt; None: as many as files have, else 1.
        temperature, top_p, max_new_tokens, seed: how models answer; the same random numbers for every one.
        baseline: the model that win rates are shown against; default: the first.
        tokenizer: for functions that read the tokens of answers from files.
        cache: folder of the verdicts of endpoints.

    One run per model: the verdicts are about these models, not about the methods that made them.

    Raises:
        UsageError: fewer than two models, names that are not unique, files that do not answer the same prompts.

    Source:
        Both orders: Zheng et al., arXiv:2306.05685; errors: ``prefzoo.benchmarks.statistics``.
    """
    started = time.monotonic()
    named = dict(models) if isinstance(models, Mapping) else dict(_named(models))
    if len(named) < 2:
        raise UsageError("compare needs at least two models.")
    if baseline is not None and baseline not in named:
        raise UsageError(f"no model {baseline!r}{suggest(baseline, named)} Compared: {', '.join(named)}.")
    sampling = Sampling(temperature, top_p, max_new_tokens)
    judges = judges_of(judge, Path(cache))
    found, left_out = gather(
        named, prompts, columns=columns, samples=samples, sampling=sampling, seed=seed, tokenizer=tokenizer
    )
    tables, spent = judged(found, judges)
    rows = next(iter(found.values())).rows
    if len({cluster_of(r) for r in rows}) < 2:
        raise UsageError(f"{len(rows)} prompt: an error needs at least two prompts that are not alike.")
    told = {
        j: {"kind": kind, "pairs": isinstance(asked, PairJudge), "primary": i == 0,
            "column": None if isinstance(asked, PairJudge) else j}
        for i, (j, (kind, asked)) in enumerate(judges.items())
    }  # fmt: skip
    per_prompt = next(iter(found.values())).per_prompt
    decoding = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "samples": per_prompt,
    }  # fmt: skip
    task = {
        "kind": "comparison", "metric": next(iter(judges)), "reference": baseline or next(iter(named)),
        "samples": per_prompt, "decoding": decoding, "budget": None, "judges": told, "shared": {}, "failed": {},
        "lost": {}, "not_applicable": {}, "tuning": None,
        "methods": {n: _about(model) for n, model in named.items()},
    }  # fmt: skip
    config = {"models": {n: _source(m) for n, m in named.items()}, "judges": list(judges), "decoding": decoding}
    results = {
        "suite": TASK, "about": "Models as they are, on the same prompts; nothing was trained.", "config": config,
        "command": command, "test_prompts": len(rows), "tasks": {TASK: task},
        "data_hashes": {n: content_hash(Path(m)) for n, m in named.items() if is_file(m)},
        "cost": {"wall_seconds": time.monotonic() - started, "judges": {TASK: spent}, "methods": {}},
    }  # fmt: skip
    return Comparison(_computed(results, tables), found, tables, left_out)


def _computed(results: Mapping[str, Any], tables: Mapping[str, pa.Table]) -> dict[str, Any]:
    """All numbers from the tables, as those of a suite are computed from its folder."""
    from prefzoo.benchmarks.results import computed
    from prefzoo.benchmarks.results.gather import FORMAT
    from prefzoo.benchmarks.runner import environment

    fixed = {
        "format": FORMAT, "seeds": 1, "start_seeds": 1, "this_run_only": True, "verdicts": "all", "margin": 0.02,
        "budget": "", "environment": environment(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write(tables, Path(folder))
        return computed({**fixed, **results}, Path(folder))


def write(tables: Mapping[str, pa.Table], folder: Path) -> None:
    """Each table as ``NAME.parquet``; one of an earlier comparison that has no successor is removed."""
    for name in ("rows", "judgements"):
        path = folder / f"{name}.parquet"
        if name not in tables:
            path.unlink(missing_ok=True)
            continue
        with replacing_file(path) as aside:
            pq.write_table(tables[name], aside)


# ------------------------------------------------------------------------------------------ names


def _named(models: Sequence[Any]) -> list[tuple[str, Any]]:
    names = [_name(m) for m in models]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"two of the models are called {name!r}; give them names: --names A,B (a mapping in Python)."
            )
    return list(zip(names, models, strict=True))


def _name(model: Any) -> str:
    if isinstance(model, Run):
        return model.algorithm
    path = Path(model)
    if is_file(model):
        return Path(path.name.removesuffix(".gz")).stem
    return path.parent.name if path.name == "final" else path.name


def _source(model: Any) -> str:
    return str(model) if isinstance(model, str | Path) else f"{type(model).__name__} in memory"


def _about(model: Any) -> dict[str, Any]:
    """What a suite says of a method, as far as a finished model has it."""
    return {
        "group": "answers" if is_file(model) else "model", "sees": None, "algorithm": None,
        "options": {"source": _source(model)}, "tuned": False, "failed_runs": 0, "cells": [], "spent": {},
        "budget_spent": None,
    }  # fmt: skip


def turned(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The same pair seen from the other model."""
    win, gap, mcnemar = pair["win"], pair["difference"], pair["mcnemar"]
    seen = {**win, "estimate": 1 - win["estimate"], "ci": [1 - end for end in win["ci"][::-1]], "t": -win["t"]}
    lost = {**gap, "estimate": -gap["estimate"], "ci": [-end for end in gap["ci"][::-1]], "t": -gap["t"],
            "mean_a": gap["mean_b"], "mean_b": gap["mean_a"]}  # fmt: skip
    if mcnemar is not None:
        sides = {"only_a": mcnemar["only_b"], "only_b": mcnemar["only_a"]}
        mcnemar = {**mcnemar, **sides, "estimate": -mcnemar["estimate"]}
    return {
        **pair, "a": pair["b"], "b": pair["a"], "win": seen, "head_to_head": seen, "difference": lost,
        "mcnemar": mcnemar, "verdict": TURNED.get(pair["verdict"], pair["verdict"]),
    }  # fmt: skip
