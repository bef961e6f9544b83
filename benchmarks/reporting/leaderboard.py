"""The first sections of a task: leaderboard, matrix of win rates, pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefzoo.benchmarks.reporting import words
from prefzoo.benchmarks.reporting.page import Block, Cell, Column, Matrix, Section, Table, Words
from prefzoo.benchmarks.reporting.words import (
    NONE,
    Result,
    against_more,
    ends,
    finite,
    p_words,
    percent,
    points_cell,
    ranked,
    share_cell,
    value_cell,
)  # fmt: skip

LETTERS = {"better": "B", "worse": "W", "equivalent": "E", "undecided": "U"}
TURNED = {"better": "worse", "worse": "better"}
MANY = 16  # rows from which a table can be filtered


def large(results: Result) -> bool:
    """Whether its methods are too many for a table of all their pairs."""
    return bool(results.get("verdicts", "all") != "all")


def leaderboard(results: Result, name: str, task: Result) -> Section:
    """One row per method, best first; whoever failed in part is there, whoever failed whole is listed below."""
    methods, cost = task["methods"], (results.get("cost") or {}).get("methods", {}).get(name, {})
    order, verdicts, bases = ranked(task), against_more(task), words.baselines(task)
    trained, first = len(bases) > 1, "the start" if len(bases) > 1 else bases[0]
    wins = [w for m in order for b in bases if (w := _win(methods[m], b))]
    scale = _scale(wins)
    many, metric = large(results), task["metric"]
    lc = any(methods[m].get("length_controlled") for m in order)
    rated = any(methods[m].get("rating") for m in order)
    fails = any(methods[m]["failed_runs"] for m in order)
    columns = [
        Column("method", number=False),
        *([Column("sees", "what training is told", number=False)] if many else []),
        Column(f"win vs {bases[0]}, %", f"share of answers better than those of {first}; ties count half", scale=scale),
        *(
            [Column("win vs sft_more, %", "against the start that was only trained longer", scale=scale)]
            if trained
            else []
        ),
        Column(f"verdict vs {bases[-1]}", "by Holm over the family", number=False),
        Column(metric, "mean score by the deciding judge" if not task["judges"].get(metric, {}).get("pairs") else ""),
        *([Column("length-controlled win, %", f"vs {bases[0]}, had the answers been equally long")] if lc else []),
        *(
            [Column("rating", f"Bradley-Terry on Elo's scale, {first} is 1,000; over prompts, not runs")]
            if rated
            else []
        ),
        *([Column("KL, nats", "mean log-ratio of whole answers to the start")] if trained else []),
        Column("tokens" if trained else "characters", f"mean length of an answer, and times that of {first}"),
        *([Column("failed runs")] if fails else []),
        *([Column("seconds", "of one run: training, answering, scoring")] if cost else []),
    ]
    rows = []
    for place, m in enumerate(order, 1):
        x = methods[m]
        length = x.get("length") or {}
        ratio = length.get("ratio")
        verdict = verdicts.get(m, "")
        tried = x["failed_runs"] + len(x["seeds"])
        rows.append([
            Cell(m, f"place {place}" if many else "", sort=m, tip=_told(m, x)),
            *([Cell(str(x.get("sees") or NONE), sort=str(x.get("sees")))] if many else []),
            *(share_cell(_win(x, b), tip=_rest(x, b)) for b in bases),
            Cell(verdict or NONE, sort=verdict or None, tone=verdict),  # type: ignore[arg-type]
            value_cell(x["means"].get(metric)),
            *([share_cell(x.get("length_controlled"), bar=False)] if lc else []),
            *([value_cell(x.get("rating"))] if rated else []),
            *([value_cell(x["means"].get("kl"))] if trained else []),
            Cell(words.number(length.get("mean")), f"× {ratio:.2f}" if finite(ratio) else "", length.get("mean")),
            *([Cell(f"{x['failed_runs']} of {tried}", sort=x["failed_runs"], tone="worse" if x["failed_runs"] else "")]
              if fails else []),
            *([Cell(words.number(s := cost.get(m, {}).get("seconds")), sort=s)] if cost else []),
        ])  # fmt: skip
    blocks: list[Block] = [Table("Leaderboard", columns, rows, filtered=len(rows) > MANY)]
    lost = task.get("lost") or {}
    if lost:
        blocks.append(Words([f"All runs failed, so no numbers: {', '.join(lost)}."]))
    if metric == "exact" and trained:
        blocks.append(_gains(task, order))
    how = (
        f"Bars are 95 % intervals on one scale, the line is 50 %: a bar clear of it is a win or a loss against that "
        f"baseline alone. The verdict has been corrected for the whole family. Judge: {metric}; "
        f"{task['test_prompts']:,} prompts in {task['clusters']:,} clusters, {task['samples']} answers to each."
    )
    return Section("Leaderboard", how, blocks, name)


def _win(method: Result, baseline: str) -> Result | None:
    return (method["against"].get(baseline) or {}).get("win")


def _scale(wins: list[Result]) -> tuple[float, float, float]:
    """One scale for all bars, with 50 % on it."""
    held = [min(max(v, 0.0), 1.0) for w in wins for v in (w["estimate"], *(ends(w) or ()))]
    return min([*held, 0.45]), 0.5, max([*held, 0.55])


def _told(name: str, x: Result) -> str:
    """What a method is, for its tip."""
    seeds = f"{len(x['seeds'])} finished" + (f", {x['failed_runs']} failed" if x["failed_runs"] else "")
    tuned = ", options tuned" if x.get("tuned") else ""
    return f"{name}: {x.get('algorithm') or x.get('group') or ''}{tuned}\nruns: {seeds}"


def _rest(x: Result, baseline: str) -> str:
    """The smaller numbers behind a win rate, for its tip."""
    found = x["against"].get(baseline)
    if not found:
        return ""
    win, said = found["win"], []
    if finite(win.get("se")):
        parts = ", ".join(
            f"{what} {100 * win[key]:.2f}"
            for key, what in (("se_prompts", "prompts"), ("se_seeds", "seeds")) if finite(win.get(key))
        )  # fmt: skip
        said.append(f"error {100 * win['se']:.2f} points" + (f" ({parts})" if parts else "") + f", df {_df(win)}")
    if found.get("bootstrap_se") is not None:
        said.append(f"two-way bootstrap error {100 * found['bootstrap_se']:.2f} points")
    if found.get("win_range"):
        low, high = found["win_range"]
        said.append(f"over seeds: {100 * low:.1f} to {100 * high:.1f} %")
    said += [f"{w} {percent(found[k])}" for k, w in (("ties", "ties"), ("flips", "flips"), ("unparsed", "unparsed"))
             if finite(found.get(k))]  # fmt: skip
    if finite(found.get("permutation_p")):
        said.append(f"permutation p {p_words(found['permutation_p'])}")
    return "\n".join(said)


def _df(estimate: Result) -> str:
    return f"{estimate['df']:.1f}" if finite(estimate.get("df")) else "∞"


def _gains(task: Result, order: list[str]) -> Table:
    """For a verifier, whose answers are right or wrong: accuracy gained, in points."""
    columns = [Column("method", number=False), Column("accuracy over the start, points"),
               Column("accuracy over sft_more, points")]  # fmt: skip
    rows = [
        [Cell(m, sort=m), *(points_cell((task["methods"][m]["against"].get(b) or {}).get("difference"))
                            for b in ("start", "sft_more"))]
        for m in order if task["methods"][m]["against"]
    ]  # fmt: skip
    return Table("Exact accuracy, paired by prompt", columns, rows)


def pairs(results: Result, name: str, task: Result) -> Section | None:
    """Every pair of the family: as a matrix where all were compared, and as a table."""
    if not task["pairs"]:
        return None
    family = task.get("family") or {"size": len(task["pairs"]), "what": "the pairs below"}
    margin = 100 * results.get("margin", 0.02)
    how = (
        f"Family: {family['size']} claims, {family['what']}. Difference: of the two win rates, in points, paired by "
        f"prompt and seed. B better, W worse (Holm p < 0.05), E equivalent (within ± {margin:g} points), U undecided, "
        "which is not “equal”: the smallest detectable difference is what this study finds with 80 % probability, "
        "before Holm."
    )
    blocks: list[Block] = []
    if not large(results):
        blocks.append(_matrix(task))
    blocks.append(_table(task))
    ratings = task.get("ratings") or {}
    if ratings.get("refused"):
        blocks.append(Words([f"No ratings: {ratings['refused']}"]))
    elif ratings.get("fit"):
        fit = ratings["fit"]
        shown = ((k, words.p_words(v) if k == "p" else words.number(v)) for k, v in fit.items() if finite(v))
        told = ", ".join(f"{k} {v}" for k, v in shown)
        blocks.append(Words([f"How well one rating per method explains all pairs (Bradley-Terry): {told}."]))
    return Section("Who beats whom", how, blocks, name)


def _matrix(task: Result) -> Matrix:
    """A row's share of wins over a column, coloured, with the verdict's letter."""
    order = [m for m in ranked(task) if any(m in (p["a"], p["b"]) for p in task["pairs"])]
    found = {(p["a"], p["b"]): p for p in task["pairs"]}

    def cell(a: str, b: str) -> Cell | None:
        pair = found.get((a, b)) or found.get((b, a))
        if pair is None:
            return None
        forward = pair["a"] == a
        verdict = pair["verdict"] if forward else TURNED.get(pair["verdict"], pair["verdict"])
        head = (pair.get("head_to_head") or {}).get("estimate")
        shown = head if finite(head) else None
        share = None if shown is None else shown if forward else 1 - shown
        return Cell(
            NONE if share is None else f"{100 * share:.0f}", LETTERS.get(verdict, "?"), share, tone=verdict,
            tip=_pair_tip(a, b, pair, forward, verdict),
        )  # fmt: skip

    return Matrix("Row beats column, %", order, [[None if a == b else cell(a, b) for b in order] for a in order])


def _pair_tip(a: str, b: str, pair: Result, forward: bool, verdict: str) -> str:
    gap, sign = pair["difference"], 1 if forward else -1
    span = ends(gap)
    said = [f"{a} against {b}: {verdict}"]
    if pair.get("head_to_head"):
        head = pair["head_to_head"]
        head = head if forward else _negated(head, 1.0)
        shown = share_cell(head)
        said.append(f"head to head {shown.text} %" + (f" ({shown.note})" if shown.note else ""))
    line = f"difference {words.signed(100 * sign * gap['estimate'], 1)} points"
    if span is not None:
        low, high = sorted(sign * e for e in span)
        line += f" (95 % {words.signed(100 * low, 1)} to {words.signed(100 * high, 1)})"
    said.append(line)
    if finite(gap.get("se")):
        said.append(f"error {100 * gap['se']:.2f} points, df {_df(gap)}")
    said.append(f"p {p_words(gap.get('p'))}, Holm {p_words(pair['p_holm'])}"
                + (f", max-t {p_words(pair['p_max_t'])}" if finite(pair.get("p_max_t")) else ""))  # fmt: skip
    if finite(pair.get("permutation_p")):
        said.append(f"permutation p {p_words(pair['permutation_p'])}")
    if finite(pair.get("smallest_detectable")):
        said.append(f"smallest detectable {100 * pair['smallest_detectable']:.1f} points")
    return "\n".join([*said, *([pair["flag"]] if pair.get("flag") else [])])


def _negated(estimate: Result, one: float) -> Mapping[str, Any]:
    """The estimate of the other side: `one` minus it."""
    span = ends(estimate)
    ci = None if span is None else [one - span[1], one - span[0]]
    return {**estimate, "estimate": one - estimate["estimate"], "ci": ci}


def _table(task: Result) -> Table:
    decide = any(p.get("to_decide") for p in task["pairs"])
    flags = any(p.get("flag") for p in task["pairs"])
    columns = [
        Column("A", number=False), Column("B", number=False), Column("A wins head to head, %"),
        Column("difference, points", "of the win rates"), Column("error", "standard error, points"), Column("df"),
        Column("p"), Column("p (Holm)"),
        Column("verdict on A", number=False), Column("smallest detectable, points"),
        *([Column("would decide", "if the difference seen is the true one: 80 % power, after Holm")] if decide else []),
        *([Column("note", number=False)] if flags else []),
    ]  # fmt: skip
    rows = [
        [
            Cell(p["a"], sort=p["a"]), Cell(p["b"], sort=p["b"]), share_cell(p.get("head_to_head"), bar=False),
            points_cell(p["difference"]),
            Cell(f"{100 * p['difference']['se']:.2f}" if finite(p["difference"].get("se")) else NONE,
                 sort=p["difference"].get("se")),
            Cell(_df(p["difference"]), sort=p["difference"].get("df")),
            Cell(p_words(p["difference"].get("p")), sort=p["difference"].get("p")),
            Cell(p_words(p["p_holm"]), sort=p["p_holm"]),
            Cell(p["verdict"], sort=p["verdict"], tone=p["verdict"]),
            Cell(f"{100 * s:.1f}" if finite(s := p.get("smallest_detectable")) else NONE, sort=s),
            *([_decide(p.get("to_decide"))] if decide else []),
            *([Cell(p.get("flag") or "", sort=p.get("flag"))] if flags else []),
        ]
        for p in task["pairs"]
    ]  # fmt: skip
    return Table(f"All {len(rows)} pairs", columns, rows, quiet=True, filtered=len(rows) > MANY)


def _decide(needed: Result | None) -> Cell:
    if not needed:
        return Cell("")
    seeds, prompts = needed.get("seeds"), needed.get("prompts")
    said = [f"{seeds:,} seeds"] if seeds and seeds < 100 else []
    said += [f"{prompts:,} prompts"] if prompts and prompts < 100_000 else []
    return Cell(" or ".join(said) or "out of reach", sort=prompts)
