"""Reports of a finished suite: a table for the terminal, ``report.md``, ``report.png``. All from ``results.json``."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefzoo.files import replacing_file
from prefzoo.registry import UsageError

Result = Mapping[str, Any]


def report(folder: str | Path) -> str:
    """Render the stored results of a suite again; returns the terminal's table."""
    folder = Path(folder)
    if not (folder / "results.json").exists():
        raise UsageError(f"{str(folder)!r} holds no results.json; give the --out folder of a finished suite.")
    return write_report(folder)


def write_report(folder: Path) -> str:
    """Write ``report.md`` and ``report.png`` beside ``results.json``; returns the terminal's table."""
    results = json.loads((folder / "results.json").read_text())
    with replacing_file(folder / "report.md") as aside:
        aside.write_text(markdown(results), encoding="utf-8")
    draw(results, folder / "report.png")
    return terminal(results) + f"\nreport: {folder / 'report.md'}\n"


def ranked(task: Result) -> list[tuple[str, Result]]:
    """Methods by their win rate against the start, best first; the baselines last."""

    def order(item: tuple[str, Result]) -> tuple[bool, float]:
        name, method = item
        win = method.get("against_start", {}).get("win", {}).get("estimate", 0.5)
        return name in ("start", "sft_more"), -win

    return sorted(task["methods"].items(), key=order)


GROUPS = {
    "composition": "Compositions",
    "loss": "Losses, each in the default composition of its family",
    "baseline": "Baselines",
}


def groups(results: Result, task: Result) -> list[tuple[str, list[tuple[int, str, Result]]]]:
    """Titles and rows (place, name, numbers) of the tables: one without a title, or of a large suite one per group."""
    rows = [(place, name, method) for place, (name, method) in enumerate(ranked(task), 1)]
    if not large(results):
        return [("", rows)]
    made = [(title, [r for r in rows if r[2]["group"] == group]) for group, title in GROUPS.items()]
    return [(title, members) for title, members in made if members]


def large(results: Result) -> bool:
    """Whether its methods are too many for a table of all their pairs."""
    return bool(results.get("verdicts", "all") != "all")


def verdicts(task: Result) -> dict[str, str]:
    """Of a large suite: what is said of each method against the baseline, by Holm over all methods."""
    return {p["a"]: p["verdict"] for p in task["pairs"]}


def reasons(not_applicable: Mapping[str, str]) -> dict[str, list[str]]:
    """Names by the reason that they share."""
    found: dict[str, list[str]] = {}
    for name, reason in not_applicable.items():
        found.setdefault(reason, []).append(name)
    return found


def counts(task: Result) -> str:
    """How many methods there were, and what became of them; nobody is dropped."""
    trained = sum(m["group"] != "baseline" for m in task["methods"].values())
    failed = {cell.split("/")[1] for cell in task["failed"] if cell.count("/") == 2} - {"start", "sft_more"}
    none = len(task["not_applicable"])
    return f"{trained + len(failed) + none} methods: {trained} trained, {len(failed)} failed, {none} not applicable"


def markdown(results: Result) -> str:
    """The report as Markdown."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("prefzoo.benchmarks"),
        undefined=StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
    )
    template = environment.get_template("report.md.j2")
    return template.render(
        r=results, groups=groups, large=large(results), verdicts=verdicts, counts=counts, reasons=reasons, rows=ranked,
        win=win_text, mean=mean_text, points=points_text, interval=interval_text,
        signed=signed_text, pct=lambda x: f"{100 * x:.1f} %",
    )  # fmt: skip


def interval_text(estimate: Result) -> str:
    """``64.2 % (62.1 to 66.3)``."""
    low, high = _shares(estimate)
    return f"{100 * estimate['estimate']:.1f} % ({low:.1f} to {high:.1f})"


def _shares(estimate: Result) -> tuple[float, float]:
    """The interval of a share in percent; a t interval of few seeds can reach beyond what a share can be."""
    low, high = estimate["ci"]
    return max(100 * low, 0.0), min(100 * high, 100.0)


def win_text(method: Result, baseline: str) -> str:
    """Win rate against a baseline, in bold where the interval is clear of 50 %."""
    against = method.get(f"against_{baseline}")
    if against is None:
        return "–"
    win = against["win"]
    low, high = win["ci"]
    clear = low > 0.5 or high < 0.5
    return f"**{interval_text(win)}**" if clear else interval_text(win)


def mean_text(method: Result, column: str, *, bare: bool = False) -> str:
    """A mean with half its interval, or alone."""
    estimate = method["means"].get(column)
    if estimate is None:
        return "–"
    half = (estimate["ci"][1] - estimate["ci"][0]) / 2
    digits = 1 if column == "tokens" else 2
    mean = f"{estimate['estimate']:.{digits}f}"
    return mean if bare or not math.isfinite(half) else f"{mean} ± {half:.{digits}f}"


def points_text(difference: Result) -> str:
    """A difference of shares in percentage points with its interval."""
    low, high = difference["ci"]
    return f"{100 * difference['estimate']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def signed_text(difference: Result) -> str:
    low, high = difference["ci"]
    return f"{difference['estimate']:+.2f} ({low:+.2f} to {high:+.2f})"


def terminal(results: Result, width: int = 120) -> str:
    """The leaderboard as plain text."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    # Square brackets are a stamp, intervals and the words of errors, never styles.
    width += 8 if large(results) else 0  # for the places
    console = Console(file=io.StringIO(), width=width, force_terminal=False, markup=False, emoji=False)
    stamp = (
        "this run only: one seed, intervals over prompts" if results["this_run_only"] else f"{results['seeds']} seeds"
    )
    for name, task in results["tasks"].items():
        size = f"{task.get('test_prompts', results['test_prompts'])} prompts × {results['samples']} answers"
        table = Table(title=f"{results['suite']} / {name}   {size}   [{stamp}]", box=SIMPLE_HEAD, title_justify="left")
        columns = [
            "method",
            "win vs start, %",
            "vs sft_more, %",
            task["metric"],
            "proxy",
            "KL",
            "tokens",
            "seconds",
            "GiB",
        ]
        if large(results):
            columns.insert(0, "")
        for column in columns:
            table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
        for place, (method_name, method) in enumerate(ranked(task), 1):
            table.add_row(
                *([str(place)] if large(results) else []),
                method_name, _plain_win(method, "start"), _plain_win(method, "sft_more"),
                mean_text(method, task["metric"]),
                *(mean_text(method, c, bare=True) for c in ("proxy", "kl", "tokens")),
                f"{method['seconds']:.0f}", f"{method['peak_memory'] / 2**30:.2f}",
            )  # fmt: skip
        console.print(table)
        if task["metric"] == "exact":
            for method_name, method in ranked(task):
                if "against_start" in method:
                    gain = points_text(method["against_start"]["difference"])
                    console.print(f"  {method_name}: exact accuracy {gain} points over the start", highlight=False)
        if "judge_accuracy" in task:
            accuracy = task["judge_accuracy"]
            console.print(
                f"  judge agrees with people in {interval_text(accuracy)} of "
                f"{accuracy['n']} test pairs (a coin: 50 %)", highlight=False,
            )  # fmt: skip
        for method_name, curve in task["curves"].items():
            proxy = f", proxy {signed_text(curve['proxy_end_minus_peak'])}" if "proxy_end_minus_peak" in curve else ""
            console.print(
                f"  {method_name}: {task['metric']} peaks at step {curve['peak_step']}, then "
                f"{signed_text(curve['end_minus_peak'])}{proxy}", highlight=False,
            )  # fmt: skip
        if large(results):
            console.print(f"  {counts(task)}", highlight=False)
        none = task["not_applicable"]
        for names, reason in [(", ".join(v), k) for k, v in reasons(none).items()] if large(results) else none.items():
            console.print(f"  {names}: not applicable, {reason}", highlight=False)
        for cell, reason in task["failed"].items():
            console.print(f"  {cell} FAILED: {reason.strip().splitlines()[-1]}", highlight=False)
    return console.file.getvalue()  # type: ignore[attr-defined]


def _plain_win(method: Result, baseline: str) -> str:
    against = method.get(f"against_{baseline}")
    if against is None:
        return "–"
    low, high = _shares(against["win"])
    return f"{100 * against['win']['estimate']:.1f} [{low:.1f}, {high:.1f}]"


def draw(results: Result, path: Path) -> None:
    """One row per task: win rates with intervals, the metric against the square root of KL, curves while training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = [(n, t) for n, t in results["tasks"].items() if len(t["methods"]) > 1]
    if not tasks:
        return
    wide = 3 if any(t["curves"] for _, t in tasks) else 2
    heights = [max(2.6, (0.17 if _dense(t) else 0.36) * len(t["methods"]) + 1.2) for _, t in tasks]
    figure, axes = plt.subplots(
        len(tasks), wide, figsize=(4.6 * wide, sum(heights)), squeeze=False,
        gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    for (name, task), row in zip(tasks, axes, strict=True):
        _draw_wins(row[0], name, task)
        _draw_frontier(row[1], task)
        if wide == 3:
            _draw_curves(row[2], task)
    stamp = "this run only (one seed)" if results["this_run_only"] else f"{results['seeds']} seeds"
    figure.suptitle(f"prefzoo bench {results['suite']} – {stamp}", fontsize=11)
    with replacing_file(path) as aside:
        figure.savefig(aside, dpi=130, format="png")
    plt.close(figure)


def _dense(task: Result) -> bool:
    """Whether there are so many methods that the figure must be read with patience."""
    return len(task["methods"]) > 30


BLUE, GREY, RED = "#2b6cb0", "#8a8f98", "#c05621"


def _draw_wins(axis: Any, name: str, task: Result) -> None:
    """Win rates against the start; for a verifier, whose answers are right or wrong, the gain in accuracy."""
    checked = task["metric"] == "exact"
    shown = [
        (m, x["against_start"]["difference" if checked else "win"]) for m, x in ranked(task) if "against_start" in x
    ]
    for place, (method, value) in enumerate(reversed(shown)):
        colour = GREY if method == "sft_more" else BLUE
        low, high = (100 * value["ci"][0], 100 * value["ci"][1]) if checked else _shares(value)
        axis.plot([low, high], [place, place], color=colour, lw=2.2, solid_capstyle="round")
        axis.plot(100 * value["estimate"], place, "o", color=colour, ms=6)
    axis.axvline(0 if checked else 50, color="black", lw=0.8, ls=":")
    axis.set_yticks(range(len(shown)), [m for m, _ in reversed(shown)], fontsize=6.5 if _dense(task) else None)
    axis.set_ylim(-0.6, len(shown) - 0.4)
    axis.set_xlabel(f"{'accuracy gained over' if checked else 'win rate against'} the start, % (95 %)")
    axis.set_title(f"{name}, judged by {task['metric']}", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_frontier(axis: Any, task: Result) -> None:
    order = [method for method, _ in ranked(task)]
    named = {*order[:12], "start", "sft_more"} if _dense(task) else {*order}
    for method, x in ranked(task):
        kl, score = x["means"]["kl"], x["means"][task["metric"]]
        distance = math.sqrt(max(kl["estimate"], 0.0))
        colour = GREY if method in ("start", "sft_more") else BLUE
        error = (score["ci"][1] - score["ci"][0]) / 2
        axis.errorbar(
            distance, score["estimate"], yerr=error if math.isfinite(error) else None, fmt="o", color=colour, ms=5, lw=1.2
        )
        if method in named:
            axis.annotate(method, (distance, score["estimate"]), xytext=(5, 3), textcoords="offset points", fontsize=7.5)
    scores = [x["means"][task["metric"]]["estimate"] for x in task["methods"].values()]
    room = 0.2 * (max(scores) - min(scores)) + 1e-3  # for the points; the interval of a collapsed method may leave it
    axis.set_ylim(min(scores) - room, max(scores) + room)
    axis.margins(x=0.18)
    axis.set_xlabel("sqrt of KL to the start, sqrt(nats)")
    axis.set_ylabel(task["metric"])
    axis.spines[["top", "right"]].set_visible(False)


def _draw_curves(axis: Any, task: Result) -> None:
    if not task["curves"]:
        axis.set_axis_off()
        return
    name, curve = next(iter(task["curves"].items()))
    axis.errorbar(
        curve["steps"],
        curve["means"][task["metric"]],
        yerr=[1.96 * e for e in curve["errors"]],
        color=BLUE,
        marker="o",
        ms=4,
    )
    axis.set_xlabel(f"{name}: rollout step")
    axis.set_ylabel(task["metric"], color=BLUE)
    axis.spines["top"].set_visible(False)
    if "proxy" in curve["means"]:
        other = axis.twinx()
        other.plot(curve["steps"], curve["means"]["proxy"], color=RED, marker="s", ms=4, ls="--")
        other.set_ylabel("proxy reward (what training sees)", color=RED)
        other.spines["top"].set_visible(False)
