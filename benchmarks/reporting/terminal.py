"""The leaderboard as plain text."""

from __future__ import annotations

import io

from prefzoo.benchmarks.reporting import words
from prefzoo.benchmarks.reporting.leaderboard import large
from prefzoo.benchmarks.reporting.words import NONE, Result, ends, finite, last_line, ranked


def terminal(results: Result, width: int = 120) -> str:
    """A table per task, and below it what failed or does not apply."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    # Square brackets are a stamp, intervals and the words of errors, never styles.
    many = large(results)
    console = Console(file=io.StringIO(), width=width + 8 * many, force_terminal=False, markup=False, emoji=False)
    for name, task in results["tasks"].items():
        size = f"{task['test_prompts']} prompts × {task['samples']} answers"
        title = f"{results['suite']} / {name}   {size}   [{words.stamp(results)}]"
        table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
        bases = words.baselines(task)
        trained = len(bases) > 1
        wins = ["method", "win vs start, %", "vs sft_more, %"] if trained else ["model", "win vs the last, %"]
        rest = ["proxy", "KL", "tokens", "seconds", "GiB"] if trained else ["characters"]
        for column in ["#"] * many + wins + [task["metric"], *rest]:
            table.add_column(column, justify="left" if column in ("method", "model") else "right", no_wrap=True)
        paid = (results.get("cost") or {}).get("methods", {}).get(name, {})
        for place, method in enumerate(ranked(task), 1):
            x, mine = task["methods"][method], paid.get(method, {})
            table.add_row(
                *[str(place)] * many, method, *(_win(x, b) for b in bases),
                _mean(x["means"].get(task["metric"])),
                *(words.value_cell(x["means"].get(c)).text for c in (("proxy", "kl", "tokens") if trained else rest)),
                *((words.number(mine.get("seconds")),
                   f"{mine['peak_memory'] / 2**30:.2f}" if mine.get("peak_memory") else NONE) if trained else ()),
            )  # fmt: skip
        console.print(table)
        if task["metric"] == "exact":
            for method in ranked(task):
                gain = (task["methods"][method]["against"].get("start") or {}).get("difference")
                if gain:
                    points = words.points_cell(gain)
                    told = f"  {method}: exact accuracy {points.text} ({points.note}) points over the start"
                    console.print(told, highlight=False)
        if many:
            console.print(f"  {counts(task)}", highlight=False)
        none: dict[str, list[str]] = {}
        for method, reason in task["not_applicable"].items():
            none.setdefault(reason, []).append(method)
        for reason, names in none.items():
            console.print(f"  {', '.join(names)}: not applicable, {reason}", highlight=False)
        for job, reason in task["failed"].items():
            console.print(f"  {job} FAILED: {last_line(reason)}", highlight=False)
    for sentence in results.get("verdict") or ():
        console.print(f"• {sentence}", highlight=False)
    return console.file.getvalue()  # type: ignore[attr-defined]


def _win(method: Result, baseline: str) -> str:
    win = (method["against"].get(baseline) or {}).get("win")
    if not win or not finite(win.get("estimate")):
        return NONE
    cell = words.share_cell(win)
    return f"{cell.text} [{cell.note.replace(' to ', ', ')}]" if ends(win) else cell.text


def _mean(estimate: Result | None) -> str:
    """A mean and half its interval."""
    cell, span = words.value_cell(estimate), ends(estimate)
    return cell.text if span is None else f"{cell.text} ± {(half := (span[1] - span[0]) / 2):.{words.decimals(half)}f}"


def counts(task: Result) -> str:
    """How many methods there were, and what became of them; nobody is dropped."""
    trained = sum(m not in words.BASELINES for m in task["methods"])
    lost = sum(m not in words.BASELINES for m in task.get("lost") or ())
    none = len(task["not_applicable"])
    return f"{trained + lost + none} methods: {trained} trained, {lost} failed, {none} not applicable"
