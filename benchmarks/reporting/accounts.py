"""Sections of tables: length and diversity, cost, judges, tuning, what failed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from prefzoo.benchmarks.reporting.leaderboard import MANY
from prefzoo.benchmarks.reporting.page import Block, Cell, Column, Section, Table, Words
from prefzoo.benchmarks.reporting.words import (
    NONE,
    Result,
    baselines,
    finite,
    last_line,
    number,
    percent,
    ranked,
    share_cell,
    value_cell,
)  # fmt: skip


def lengths(name: str, task: Result) -> Section:
    order, methods = ranked(task), task["methods"]
    kinds = list(dict.fromkeys(k for m in order for k in methods[m].get("diversity") or {} if not k.startswith("n_")))
    controlled = any(methods[m].get("length_controlled") for m in order)
    alpaca = any((methods[m].get("length_controlled") or {}).get("alpaca_eval") for m in order)
    tax = any(methods[m].get("held_out") for m in order)
    unit = "characters" if "reference" in task else "tokens"
    greedy = any(finite(methods[m].get("greedy")) for m in order)
    columns = [
        Column("method", number=False), Column(unit), Column(f"× {baselines(task)[0]}"), Column("finished, %"),
        *([Column("raw win, %"), Column("length-controlled, %"), Column("weight of length")] if controlled else []),
        *([Column("AlpacaEval's number, %")] if alpaca else []),
        *(Column(k.replace("_", "-")) for k in kinds),
        *([Column(f"greedy {task['metric']}", "score of the likeliest answers")] if greedy else []),
        *([Column("held-out loss", "nats per token above the start: what alignment costs")] if tax else []),
    ]  # fmt: skip
    rows = []
    for m in order:
        x = methods[m]
        length, lc = x.get("length") or {}, x.get("length_controlled") or {}
        ratio, weight = length.get("ratio"), lc.get("w_len", lc.get("length"))
        rows.append([
            Cell(m, sort=m), value_cell(x["means"].get(unit)),
            Cell(f"{ratio:.2f}" if finite(ratio) else NONE, sort=ratio),
            share_cell(x["means"].get("finished"), bar=False),
            *([share_cell(x.get("win"), bar=False), share_cell(lc or None, bar=False), value_cell(weight, plus=True)]
              if controlled else []),
            *([_alpaca(lc.get("alpaca_eval"))] if alpaca else []),
            *(value_cell((x.get("diversity") or {}).get(k)) for k in kinds),
            *([value_cell(x.get("greedy"))] if greedy else []),
            *([value_cell(x.get("held_out"), plus=True)] if tax else []),
        ])  # fmt: skip
    how = "Longer is not better: where the length-controlled win rate falls below the raw one, length has helped."
    return Section("Length and diversity", how, [Table("Length and diversity", columns, rows)], name)


def _alpaca(found: Result | None) -> Cell:
    """AlpacaEval's own number, in percent already or as a share."""
    value = (found or {}).get("estimate")
    return Cell(f"{value if value > 1 else 100 * value:.1f}", sort=value) if finite(value) else Cell(NONE)


def cost(results: Result, name: str, task: Result) -> Section:
    """What each method spent, and what was done once for all."""
    whole = results.get("cost") or {}
    paid, methods, order = whole.get("methods", {}).get(name, {}), task["methods"], ranked(task)
    units = list(dict.fromkeys(k for m in order for k in methods[m].get("spent") or {} if k != "seconds"))
    units = [u for u in units if any((methods[m].get("spent") or {}).get(u) for m in order)]
    budget = any(finite(methods[m].get("budget_spent")) for m in order)
    columns = [
        Column("method", number=False), *(Column(u.replace("_", " ")) for u in units),
        *([Column("of the budget")] if budget else []), Column("seconds"), Column("GiB", "peak memory"),
    ]  # fmt: skip
    rows = []
    for m in order:
        spent, mine = methods[m].get("spent") or {}, paid.get(m, {})
        memory = mine.get("peak_memory")
        rows.append([
            Cell(m, sort=m), *(Cell(_amount(spent.get(u)), sort=spent.get(u)) for u in units),
            *([Cell(percent(b := methods[m].get("budget_spent"), 0), sort=b)] if budget else []),
            Cell(number(mine.get("seconds")), sort=mine.get("seconds")),
            Cell(f"{memory / 2**30:.2f}" if finite(memory) and memory else NONE, sort=memory),
        ])  # fmt: skip
    said = []
    if finite(whole.get("wall_seconds")):
        said.append(f"Wall time of the last call: {_time(whole['wall_seconds'])}.")
    if finite(whole.get("cpu_seconds")):
        said.append(f"All jobs together: {_time(whole['cpu_seconds'])} of one core.")
    said += _saved(whole.get("saved"))
    if whole.get("reused"):
        said.append(f"{len(whole['reused'])} jobs were there already and did not run again.")
    how = "Means over runs: what training consumed is exact, seconds and memory depend on the machine."
    return Section("Cost", how, [Table("Cost of one run", columns, rows), *([Words(said)] if said else [])], name)


def _amount(spent: Any) -> str:
    if not finite(spent) or spent == 0:
        return NONE
    return f"{spent:,.0f}" if spent < 1e9 else f"{spent:.3g}"


def _saved(saved: Result | None) -> list[str]:
    """What sharing saved: against every cell making for itself what it rests on."""
    if not saved:
        return []
    shared = saved.get("shared") or {}
    said = []
    if shared:
        largest = sorted(shared, key=lambda n: (-shared[n], n))[:3]
        parts = ", ".join(f"{n} {_time(shared[n])}" for n in largest)
        said.append(f"Sharing what cells have in common saved {_time(sum(shared.values()))} (most: {parts}).")
    if saved.get("reused"):
        said.append(f"Jobs that an earlier call had done saved {_time(saved['reused'])}.")
    return said


def _time(seconds: float) -> str:
    """
    >>> _time(42), _time(775), _time(9000)
    ('42 s', '12 min 55 s', '2 h 30 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def judges(results: Result, name: str, task: Result) -> Section | None:
    """How far each judge can be trusted, and what every other judge says of the methods."""
    found = task.get("judges") or {}
    if not found:
        return None
    spent = (results.get("cost") or {}).get("judges", {}).get(name, {})
    paid_units = list(dict.fromkeys(u for paid in spent.values() for u in paid))
    keys = ("accuracy", "kappa", "alpha", "position_bias", "length_bias", "flip_rate", "unparsed", "n")
    kept = [k for k in keys if any((j.get("quality") or {}).get(k) is not None for j in found.values())]
    columns = [Column("judge", number=False), Column("kind", number=False), Column("sees", number=False),
               *(Column(k.replace("_", " ")) for k in kept), *(Column(u) for u in paid_units)]  # fmt: skip
    rows = []
    for judge, facts in found.items():
        quality, paid = facts.get("quality") or {}, spent.get(judge, {})
        rows.append([
            Cell(judge + (" (decides)" if facts.get("primary") else ""), sort=judge), Cell(str(facts["kind"])),
            Cell("pairs, both orders" if facts.get("pairs") else "one answer"),
            *(value_cell(quality.get(k)) for k in kept),
            *(Cell(number(paid.get(u)), sort=paid.get(u)) for u in paid_units),
        ])  # fmt: skip
    blocks: list[Block] = [Table("Judges", columns, rows)]
    if len(found) > 1 and task["methods"]:
        base = baselines(task)[0]
        head = [Column("method", number=False), *(Column(f"{j}: win vs {base}, %") for j in found)]
        order = [m for m in ranked(task) if task["methods"][m].get("judged")]
        told = [[Cell(m, sort=m), *(share_cell((task["methods"][m]["judged"].get(j) or {}).get(base), bar=False)
                                    for j in found)] for m in order]  # fmt: skip
        blocks.append(Table("Win rates by every judge", head, told))
    unsure = {m: x["sensitivity"] for m, x in task["methods"].items() if x.get("sensitivity")}
    if unsure:
        head = [Column("method", number=False), Column("unparsed lost, %"), Column("unparsed won, %")]
        told = [[Cell(m, sort=m), *(share_cell(s.get(k), bar=False) for k in ("unparsed_0", "unparsed_1"))]
                for m, s in unsure.items()]  # fmt: skip
        blocks.append(Table("If what the judge did not say had been a loss, or a win", head, told, quiet=True))
    shared = {k: v for k, v in (task.get("shared") or {}).items() if isinstance(v, Mapping)}
    agreement = (shared.get("reward_model") or {}).get("accuracy_against_gold")
    if finite(agreement):
        blocks.append(
            Words([f"The reward model of training agrees with gold in {percent(agreement)} of its test pairs."])
        )
    how = "Accuracy is agreement with the truth, or with people (a coin: 0.5); biases are 0 for a judge that has none."
    return Section("Judges", how, blocks, name)


def tuning(name: str, task: Result) -> Section | None:
    found = task.get("tuning")
    if not found:
        return None
    columns = [Column("method", number=False), Column("trial"), Column("options", number=False), Column("score"),
               Column("", number=False)]  # fmt: skip
    rows = []
    for m, tuned in found["methods"].items():
        for index, trial in enumerate(tuned.get("trials") or ()):
            chosen = Cell("chosen", tone="better") if tuned.get("chosen") == index else Cell("")
            rows.append([Cell(m, sort=m), Cell(str(index), sort=index), Cell(_options(trial.get("options")), raw=True),
                         _scored(trial), chosen])  # fmt: skip
    how = (
        f"{found['trials']} trials for every method, chosen on {found['prompts']} validation prompts by "
        f"{found['judge']}; trial 0 is the method as it is written. The test prompts were not seen."
    )
    return Section("Tuning", how, [Table("Trials", columns, rows, filtered=len(rows) > MANY)], name)


def _scored(trial: Result) -> Cell:
    if trial.get("error"):
        return Cell(last_line(str(trial["error"])), raw=True, tone="worse")
    score, error = trial.get("score"), trial.get("se")
    note = f"± {error:.2g}" if finite(error) else ""
    return Cell(number(score), note, score if finite(score) else None)


def _options(options: Any) -> str:
    return json.dumps(options, ensure_ascii=False) if options else "as written"


def failures(name: str, task: Result) -> Section | None:
    """Runs that failed and methods that could not be run, with their reasons; nobody is dropped."""
    blocks: list[Block] = []
    for title, what, found in (
        ("Failed", "jobs", {job: last_line(reason) for job, reason in task["failed"].items()}),
        ("Not applicable", "methods", task["not_applicable"]),
    ):
        names: dict[str, list[str]] = {}
        for name_of, reason in found.items():
            names.setdefault(reason, []).append(name_of)
        if names:
            rows = [[Cell(", ".join(who)), Cell(reason, raw=True)] for reason, who in names.items()]
            blocks.append(Table(title, [Column(what, number=False), Column("reason", number=False)], rows))
    if not blocks:
        return None
    how = "A failed run is counted, never dropped; the same command runs it again and keeps all others."
    return Section("Failed and not applicable", how, blocks, name)
