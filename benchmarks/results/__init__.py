"""From stored rows to results: every number is computed here, from the rows alone, and can be computed again.

``collect`` gathers what jobs have left into a few whole tables and computes; ``recompute`` computes again from those
tables, without cells and without models. Both go through :func:`computed`, so they cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefzoo.benchmarks.jobs import Outcome
from prefzoo.benchmarks.results import aggregate, frontier, pairs, words
from prefzoo.benchmarks.results.gather import FORMAT, told, write_tables
from prefzoo.benchmarks.results.judges import quality
from prefzoo.benchmarks.results.methods import method
from prefzoo.benchmarks.results.ratings import ratings
from prefzoo.benchmarks.results.stored import BASELINES, Stored, read, stored
from prefzoo.benchmarks.suites import Suite
from prefzoo.registry import UsageError

if TYPE_CHECKING:
    from prefzoo.benchmarks.plan import Plan

__all__ = ["collect", "recompute", "tables_of"]


def collect(suite: Suite, plan: Plan, outcomes: Mapping[str, Outcome], folder: Path) -> dict[str, Any]:
    """The results of a suite as plain values; writes the whole tables that they are computed from into its folder.

    A failed run is counted, and its method is shown with the runs that finished.

    Raises ``UsageError`` where the rows cannot be compared; the cells are kept.
    """
    write_tables(suite, plan, outcomes, folder)
    return computed(told(suite, plan, outcomes), folder)


def recompute(folder: str | Path) -> dict[str, Any]:
    """The results of a finished suite again, from its stored rows; what rows do not tell is kept as it was.

    Raises ``UsageError`` where the folder has no results, or those of another version.
    """
    file = Path(folder) / "results.json"
    if not file.exists():
        raise UsageError(f"{str(folder)!r} holds no results.json; give the --out folder of a finished suite.")
    found = json.loads(file.read_text(encoding="utf-8"))
    if found.get("format") != FORMAT:
        raise UsageError(
            f"{str(file)!r} has format {found.get('format', 1)}, and this version reads {FORMAT}; run the suite again: "
            "prefzoo bench SUITE --out FOLDER."
        )
    return computed(found, Path(folder))


def computed(results: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """These results with all that follows from the folder's rows."""
    tables = read(folder)
    tasks = {}
    for name, task in results["tasks"].items():
        rows = stored(tables, name, task["judges"], results["start_seeds"], task.get("reference"))
        try:
            tasks[name] = dict(task) | _task(task, rows, results)
        except ValueError as error:  # of the statistics: too few prompts or clusters for any error
            raise UsageError(
                f"task {name!r}: {error}. The cells are kept; change the suite and run it again."
            ) from error
    whole = dict(results) | {"tasks": tasks}
    whole["aggregate"] = aggregate.across(whole)
    whole["verdict"] = words.verdict(whole)
    return {**{k: v for k, v in whole.items() if k != "cost"}, "cost": whole["cost"]}


def _task(task: Mapping[str, Any], rows: Stored, results: Mapping[str, Any]) -> dict[str, Any]:
    names = [m for m in task["methods"] if m in rows.answers]
    if not names:
        return {"test_prompts": 0, "clusters": 0, "methods": {}, "pairs": [], **dict.fromkeys(("family", *WHOLE))}
    measure, judges = frontier.truth(rows), task["judges"]
    rated, rating = ratings(rows, names, results["verdicts"])
    methods = {m: {**task["methods"][m], **method(rows, m), "rating": rating.get(m)} for m in names}
    for m in names:
        methods[m]["curve"] = frontier.curve(rows.curves[m], measure, rows) if measure and m in rows.curves else None
    truth = (
        measure if measure in ("gold", "exact") else next((j for j, t in judges.items() if t["kind"] == "human"), None)
    )
    family = pairs.Family.of(rows, names, results["verdicts"])
    everyone = "all pairs of methods" if results["verdicts"] == "all" else "each method and sft_more"
    on = "their wins over each other" if rows.baseline else f"the win rates against {rows.reference}"
    line = task["shared"].get("best_of_n", {}).get("line", [])
    return {
        "test_prompts": len(rows.clusters), "clusters": len(set(rows.clusters)), "methods": methods,
        "judges": {j: {**told, "quality": quality(rows, j, truth)} for j, told in judges.items()},
        "pairs": pairs.compare(family, results["seeds"], results["margin"]),
        "family": {"size": len(family.pairs), "what": f"{everyone}, on {on}"},
        "ratings": rated, "frontier": frontier.frontier(methods, rows, measure, line),
    }  # fmt: skip


WHOLE = ("ratings", "frontier")  # of a task, where it has answers


def tables_of(folder: str | Path) -> dict[str, Any]:
    """Win rates of trained methods against the start, runs × prompts (y_SN), of the first task that has two of them:
    what a later study can be planned on. Empty where there are none."""
    results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
    tables = read(Path(folder))
    for name, task in results["tasks"].items():
        rows = stored(tables, name, task["judges"], results["start_seeds"], task.get("reference"))
        trained = [m for m in rows.answers if m not in BASELINES and rows.reference not in (None, m)]
        found = {m: y_SN for m in trained if (y_SN := rows.wins(m, str(rows.reference))) is not None}
        if len(found) > 1:
            return found
    return {}
