"""Reports of made-up studies: one that has everything a report can show, and the same with hostile text in it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import studies

from prefzoo.benchmarks.results import collect

HOSTILE = (
    "</script><script>window.stolen=1;alert(1)</script>",
    "<img src=x onerror=window.stolen=1>",
    "'\"><svg onload=window.stolen=1>",
    "${window.stolen=1} {{ 7*7 }} {% raw %} #{1}",
    "a\u202egpj.exe\u2066\u200b\x1b[31m\x00\x07",
    "half \ud800 of one\u2028line\r\n<!-- ]]> -->",
    "| a | b |\n|---|\n```\n# no heading\n[x](javascript:alert(1)) ![i](http://a.b/c.png) <http://a.b>",
    "javascript:alert(1) &lt;b&gt; &#60; `code` ``two`` **bold** ~~s~~ $x$ https://a.b me@a.b\\",
)
"""Text that a model, a name or an error may hold."""


def finished(folder: Path, **changes: Any) -> dict[str, Any]:
    """A study with curves, a failed run and a lost method, collected; its results."""
    made = studies.suite("dpo", "ipo", "kto", "ppo", "grpo", **changes)
    planned, outcomes = studies.study(
        made, folder, effects={"dpo": 0.8, "ipo": 0.3, "kto": 0.7, "ppo": 0.2},
        failed=["requests/ipo/1", *(f"requests/grpo/{seed}" for seed in range(made.seeds))],
        curves={"ppo": lambda k: (k / 30 - (k / 40) ** 2, k / 20), "kto": lambda k: (k / 60, k / 40)},
    )  # fmt: skip
    results = collect(made, planned, outcomes, folder)
    task = results["tasks"]["requests"]
    task["not_applicable"] |= {"rlvr": "there is no answer to check", "dpop": "there is no answer to check"}
    task["tuning"] = {
        "trials": 2, "judge": "gold", "prompts": 64,
        "methods": {"dpo": {"chosen": 1, "options": {"beta": 0.3}, "trials": [
            {"options": {}, "score": 0.5, "se": 0.1}, {"options": {"beta": 0.3}, "score": 0.75, "se": 0.1},
        ]}, "kto": {"chosen": 0, "options": {}, "trials": [
            {"options": {}, "score": 0.25, "se": 0.1}, {"options": {"beta": 9.0}, "error": "Traceback\nit diverged."},
        ]}},
    }  # fmt: skip
    task["frontier"]["best_of_n"] = [
        {"judge": "proxy", "n": n, "kl": kl, "gold": gold, "gold_se": 0.05}
        for n, kl, gold in ((1, 0.0, 0.0), (4, 0.636, 0.9), (16, 1.835, 1.5))
    ]  # fmt: skip
    results["cost"] |= {"wall_seconds": 775.0, "saved": {"shared": {"requests/start": 90.0}, "reused": 12.0}}
    results["environment"] = {"prefzoo": "0.1.0", "python": "3.11"}
    write(folder, results)
    return results


def write(folder: Path, results: dict[str, Any]) -> None:
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


def rewritten(value: Any, change: Callable[[str], str], *, inside: bool = False) -> Any:
    """All names of methods and all free text of results changed; what the report looks up by is kept."""
    results = copy.deepcopy(value)
    kept = {"start", "sft_more"}

    def name(text: str) -> str:
        return text if text in kept else change(text)

    results |= {k: change(results.get(k) or "-") for k in ("suite", "about", "budget", "command")}
    results["verdict"] = [change(s) for s in results["verdict"]]
    results["environment"] = {k: change(v) for k, v in results["environment"].items()}
    results["config"] = {"name": change("config"), "tasks": [change("tasks")]}
    for task in results["tasks"].values():
        for key in ("failed", "not_applicable", "lost"):
            task[key] = {name(k): change(v) for k, v in task[key].items()}
        task["methods"] = {name(m): x for m, x in task["methods"].items()}
        for x in task["methods"].values():
            x["sees"], x["algorithm"] = change("sees"), change("algorithm")
        for pair in task["pairs"]:
            pair |= {"a": name(pair["a"]), "b": name(pair["b"]), "flag": change("flag")}
        for point in task["frontier"]["points"]:
            point["method"] = name(point["method"])
        for key in ("gao", "area"):
            found = task["frontier"].get(key) or {}
            task["frontier"][key] = {k if k == "best_of_n" else name(k): v for k, v in found.items()}
        tuned = task["tuning"]["methods"]
        task["tuning"]["methods"] = {name(m): x for m, x in tuned.items()}
        for x in tuned.values():
            for trial in x["trials"]:
                trial["options"] = {k: change(str(v)) for k, v in trial["options"].items()}
                trial |= {"error": change(trial["error"])} if "error" in trial else {}
        for facts in task["judges"].values():
            facts["kind"] = change("kind")
    for paid in results["cost"]["methods"].values():
        for method in list(paid):
            paid[name(method)] = paid.pop(method)
    return results


def rewrite_rows(file: Path, change: Callable[[str], str]) -> None:
    """Names of methods, prompts and answers of stored rows changed."""
    table = pq.read_table(file)
    for column in ("method", "prompt_text", "completion"):
        texts = [t if t in ("start", "sft_more") else change(t) for t in table[column].to_pylist()]
        texts = [t.encode("utf-8", "replace").decode() for t in texts]  # Parquet holds no half characters
        table = table.set_column(table.column_names.index(column), column, pa.array(texts))
    pq.write_table(table, file)
