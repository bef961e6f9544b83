"""What a report is written from: ``results.json``, and a fixed sample of the answers in ``rows.parquet``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefzoo.benchmarks.reporting.page import Answers
from prefzoo.benchmarks.reporting.words import finite, plain
from prefzoo.registry import UsageError

FORMAT = 2
PROMPTS, SAMPLES = 60, 2  # shown of every task
TEXTS = ("string", "list", "binary")  # types of columns that are no scores
LETTERS = 6_000_000  # of all answers of a task together; a browser must open the file
PLACES = {"prompt", "sample", "cluster", "prompt_text", "completion", "completion_ids", "method", "seed", "run", "task"}


def read_results(folder: Path) -> dict[str, Any]:
    """``results.json`` of a finished suite, its text made harmless to the eye.

    Raises ``UsageError`` where there is none, where it cannot be read, and where another version wrote it.
    """
    file = folder / "results.json"
    if not file.exists():
        raise UsageError(f"{str(folder)!r} holds no results.json; give the --out folder of a finished suite.")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(
            f"{str(file)!r} is not JSON ({error}); run the suite again with the same --out: finished cells are kept."
        ) from error
    found = results.get("format", 1) if isinstance(results, dict) else None
    if found != FORMAT:
        raise UsageError(_other_version(file, folder, results, found))
    return plain(results)


def _other_version(file: Path, folder: Path, results: Any, found: Any) -> str:
    if not isinstance(found, int) or "suite" not in results:
        return f"{str(file)!r} was not written by prefzoo bench; give the --out folder of a finished suite."
    command = plain(results.get("command") or f"prefzoo bench {results['suite']}")
    if "--out" not in command:
        command += f" --out {folder}"
    if found > FORMAT:
        return (
            f"{str(file)!r} has format {found}, and this prefzoo reads up to {FORMAT}: a newer version wrote it. "
            "Update prefzoo; nothing was changed in the folder."
        )
    return (
        f"{str(file)!r} has format {found}, of an earlier prefzoo; this one reads format {FORMAT}. Run {command!r} to "
        "make it anew: cells that are still valid are kept, the others run again."
    )


def read_answers(folder: Path, task: str, methods: Sequence[str]) -> Answers | None:
    """The first two answers of every method's first run to prompts evenly spread over the test set.

    Which prompts is fixed by their number alone. Long answers: fewer prompts.
    """
    file = folder / "rows.parquet"
    if not file.exists() or not methods:
        return None
    import numpy as np
    import pyarrow.parquet as pq

    numbers = np.unique(pq.read_table(file, columns=["prompt"], filters=[("task", "=", task)])["prompt"].to_numpy())
    if not len(numbers):
        return None
    chosen = numbers[np.unique(np.linspace(0, len(numbers) - 1, min(PROMPTS, len(numbers))).round().astype(int))]
    rows = pq.read_table(
        file, filters=[("task", "=", task), ("prompt", "in", chosen.tolist()), ("sample", "<", SAMPLES)]
    )
    run = "run" if "run" in rows.column_names else "seed"
    first = {m["method"]: m[f"{run}_min"] for m in rows.group_by("method").aggregate([(run, "min")]).to_pylist()}
    scores = [f.name for f in rows.schema if f.name not in PLACES and not any(t in str(f.type) for t in TEXTS)]
    prompts: dict[int, dict[str, Any]] = {}
    for row in rows.select([c for c in rows.column_names if c != "completion_ids"]).to_pylist():
        if row[run] != first[row["method"]]:
            continue
        prompt = prompts.setdefault(
            row["prompt"], {"prompt": row["prompt"], "text": plain(row.get("prompt_text") or ""), "answers": {}}
        )
        told = {s: float(f"{float(row[s]):.4g}") for s in scores if finite(row[s])}
        answer = {"sample": row["sample"], "text": plain(row["completion"] or ""), "scores": told}
        prompt["answers"].setdefault(plain(row["method"]), []).append(answer)
    shown = [prompts[p] for p in sorted(prompts)]
    for prompt in shown:
        for answers in prompt["answers"].values():
            answers.sort(key=lambda a: a["sample"])
    return Answers(task, [m for m in methods if m in {plain(f) for f in first}], _within(shown))


def _within(prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """So many of them that their text is not too long, still evenly spread."""
    size = sum(len(a["text"]) for p in prompts for answers in p["answers"].values() for a in answers)
    step = -(-size // LETTERS) or 1
    return prompts[::step]
