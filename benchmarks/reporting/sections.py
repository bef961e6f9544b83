"""The page: which sections a report has, in which order; the verdict, charts, answers and configuration."""

from __future__ import annotations

from pathlib import Path

import yaml

from prefzoo.benchmarks.reporting import figures, words
from prefzoo.benchmarks.reporting.accounts import cost, failures, judges, lengths, tuning
from prefzoo.benchmarks.reporting.leaderboard import MANY, leaderboard, pairs
from prefzoo.benchmarks.reporting.page import Block, Cell, Choice, Code, Column, Page, Section, Table, Words
from prefzoo.benchmarks.reporting.stored import read_answers
from prefzoo.benchmarks.reporting.words import (
    Result,
    ranked,
    share_cell,
    value_cell,
)  # fmt: skip


def page(results: Result, folder: Path) -> Page:
    """The whole report, most important first."""
    tasks = results["tasks"]
    many = len(tasks) > 1
    made: list[Section | None] = [verdict(results), across(results)]
    for name, task in tasks.items():
        if task["methods"]:
            made += [
                leaderboard(results, name, task), pairs(results, name, task), frontier(name, task),
                proxy(name, task), curves(name, task), lengths(name, task),
                None if "reference" in task else cost(results, name, task),
            ]  # fmt: skip
        made += [judges(results, name, task), tuning(name, task), failures(name, task), answers(folder, name, task)]
    made += [configuration(results), origin(results)]
    sizes: dict[str, list[str]] = {}
    for name, task in tasks.items():
        sizes.setdefault(_size(task), []).append(name)
    facts = [words.stamp(results), *(f"{', '.join(n)}: {s}" if len(sizes) > 1 else s for s, n in sizes.items())]
    environment = results.get("environment") or {}
    facts += [f"prefzoo {environment['prefzoo']}"] if "prefzoo" in environment else []
    return Page(
        results["suite"], results.get("about") or "", facts, [s for s in made if s], "report.png",
        tuple(tasks) if many else (),
    )  # fmt: skip


def _size(task: Result) -> str:
    return f"{task['test_prompts']:,} prompts × {task['samples']} answers, judged by {task['metric']}"


def verdict(results: Result) -> Section:
    said = list(results.get("verdict") or ["Nothing can be said: the results hold no verdict."])
    how = "Nothing here says more than the corrected tests below; “undecided” is not “equal”."
    budget = [Words([f"Budget, stated before: {results['budget']}."])] if results.get("budget") else []
    return Section("Verdict", how, [Words(said, lead=True), *budget])


def across(results: Result) -> Section | None:
    """What several tasks say together."""
    found = results.get("aggregate") or {}
    blocks: list[Block] = []
    if found.get("vary"):
        chart = figures.varied(found["vary"])
        blocks += [chart] if chart else []
    if found.get("iqm"):
        rows = [[Cell(m, sort=m), share_cell(e)] for m, e in found["iqm"].items()]
        columns = [Column("method", number=False), Column("win rate, %")]
        blocks.append(Table("Interquartile mean over runs and tasks", columns, rows))
    if found.get("probability_of_improvement"):
        rows = [[Cell(k, sort=k), share_cell(e, bar=False)] for k, e in found["probability_of_improvement"].items()]
        columns = [Column("pair", number=False), Column("probability, %")]
        title = "Probability that a run of one method is better than a run of the other"
        blocks.append(Table(title, columns, rows, filtered=len(rows) > MANY))
    if found.get("profiles"):
        chart = figures.profiles(found["profiles"])
        blocks += [chart] if chart else []
    how = "A point is a win rate on one task with its 95 % interval over prompts and seeds; whole runs are resampled."
    return Section("Across tasks", how, blocks) if blocks else None


def frontier(name: str, task: Result) -> Section | None:
    chart = figures.frontier(task)
    if chart is None:
        return None
    blocks: list[Block] = [chart]
    found = task["frontier"]
    if found.get("gao"):
        blocks.append(_fits(found["gao"]))
    if found.get("area"):
        columns = [Column("method", number=False), Column("mean of the best gold within reach")]
        rows = [[Cell(m, sort=m), value_cell(e)] for m, e in found["area"].items()]
        blocks.append(Table("Area under the frontier, up to the KL that all curves reach", columns, rows))
    how = (
        "Up is better, left is nearer to the start. Filled points are on the front: no other method has more at less "
        "KL. Crosses are 95 % intervals; the dashed line is best-of-n sampling from the start, dotted ones Gao's fits."
    )
    return Section("Reward against KL", how, blocks, name)


def _fits(gao: Result) -> Table:
    """Gao's curves: R(d) = d (α - β d) of best-of-n, d (α - β log d) of RL, and where they peak."""
    columns = [Column("of", number=False), Column("form", number=False), Column("α"), Column("β"), Column("peak, √KL"),
               Column("gold there, over the start"), Column("points")]  # fmt: skip
    rows = []
    for name, fit in gao.items():
        peak = fit.get("peak") or {}
        form = "d (α − β d)" if fit["form"] == "best_of_n" else "d (α − β log d)"
        rows.append([
            Cell("best of n" if name == "best_of_n" else name, sort=name), Cell(form), value_cell(fit["alpha"]),
            value_cell(fit["beta"]), value_cell(peak or None), value_cell(peak.get("gold")),
            Cell(str(fit["n_points"]), sort=fit["n_points"]),
        ])  # fmt: skip
    return Table("Gao's fits of gold above the start, d = √KL", columns, rows)


def proxy(name: str, task: Result) -> Section | None:
    chart = figures.gold_against_proxy(task)
    how = (
        "Right: the reward that training sees goes up. Up: the truth goes up. A way that bends down while it goes "
        "right is over-optimisation. Rings are steps of training, on validation prompts; large points are test prompts."
    )
    return Section("Gold against proxy", how, [chart], name) if chart else None


def curves(name: str, task: Result) -> Section | None:
    charts = figures.learning_curves(task)
    if not charts:
        return None
    columns = [
        Column("method", number=False), Column("peak at step"), Column("from peak to end"), Column("p"),
        Column("proxy meanwhile"),
    ]  # fmt: skip
    found = {m: c for m in ranked(task) if (c := task["methods"][m].get("curve"))}
    rows = [
        [Cell(m, sort=m), Cell(str(c["peak_step"]), sort=c["peak_step"]), value_cell(c["end_minus_peak"], plus=True),
         Cell(words.p_words((c["end_minus_peak"] or {}).get("p")), sort=(c["end_minus_peak"] or {}).get("p")),
         value_cell(c.get("proxy_end_minus_peak"), plus=True)]
        for m, c in found.items()
    ]  # fmt: skip
    how = (
        "Bands are 95 % intervals, on validation prompts. The peak is chosen on one half of the prompts and the fall "
        "measured on the other, both ways round, so that looking for it does not make it larger."
    )
    blocks: list[Block] = [Choice("Over", charts), Table("The fall from the peak", columns, rows)]
    return Section("Learning curves", how, blocks, name)


def answers(folder: Path, name: str, task: Result) -> Section | None:
    found = read_answers(folder, name, ranked(task))
    if found is None:
        return None
    how = (
        f"{len(found.prompts)} test prompts, evenly spread over all; the first two answers of each method's first run. "
        "They show what the numbers are about; they prove nothing."
    )
    return Section("Answers side by side", how, [found], name)


def configuration(results: Result) -> Section:
    text = yaml.safe_dump(results.get("config") or {}, sort_keys=False, allow_unicode=True, width=100)
    return Section("Configuration", "The suite as it was checked before anything ran.", [Code(text, "yaml", "Suite")])


def origin(results: Result) -> Section:
    """Versions, hashes of the data, and how to make all of it again."""
    facts = {**(results.get("environment") or {})}
    facts |= {f"data of {task}": key for task, key in (results.get("data_hashes") or {}).items()}
    rows = [[Cell(str(k)), Cell(str(v), raw=True)] for k, v in facts.items()]
    command = results.get("command") or f"prefzoo bench {results['suite']}"
    seeds = {n: sorted({s for m in t["methods"].values() for s in m["seeds"]}) for n, t in results["tasks"].items()}
    said = [f"Seeds{f' of {n}' if len(seeds) > 1 else ''}: {', '.join(map(str, s))}." for n, s in seeds.items() if s]
    code = "\n".join([
        "# all of it again; in the same DIR finished cells are kept",
        command if "--out" in command else f"{command} --out DIR",
        "# this page again; --recompute: every number first, from the stored rows, without a model",
        "prefzoo report DIR",
    ])  # fmt: skip
    blocks: list[Block] = [Code(code, "bash", "Commands"), Words(said)] if said else [Code(code, "bash", "Commands")]
    if rows:
        blocks.append(Table("Versions", [Column("of", number=False), Column("is", number=False)], rows))
    how = "All numbers are in results.json, all answers with their scores in rows.parquet beside this page."
    return Section("Versions and commands", how, blocks)
