"""The verdict in words: who wins, how sure that is, what is undecided, and what would decide it.

No sentence says more than the verdicts of the pairs do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prefzoo.benchmarks import statistics

Task = Mapping[str, Any]
MANY_SEEDS, MANY_PROMPTS = 100, 100_000  # nobody does more
SHOWN = 3  # undecided pairs at the top that get a sentence of their own


def verdict(results: Mapping[str, Any]) -> list[str]:
    """Sentences, the most important first."""
    said = []
    if compared(results):
        said.append(
            "All of this is about these models, not about the methods that made them: the errors cover the choice of "
            "prompts, and not the luck of training."
        )
    elif results["this_run_only"]:
        said.append(
            "One training seed per method: all of this is about these runs only, not about the methods. The errors "
            "cover the choice of prompts and not the luck of training; run with --seeds 5 or more."
        )
    many = len(results["tasks"]) > 1
    for name, task in results["tasks"].items():
        lead = f"{name}: " if many else ""
        said += [lead + sentence for sentence in of_task(task, results)]
    return said if compared(results) else [*said, conditional(results)]


def compared(results: Mapping[str, Any]) -> bool:
    """Whether models were compared as they are, without a suite."""
    return any("reference" in task for task in results["tasks"].values())


def of_task(task: Task, results: Mapping[str, Any]) -> list[str]:
    """What is said of one task."""
    if not task["methods"]:
        return ["no method has finished, so nothing can be said.", *failures(task, results["seeds"])]
    ranking = ranked(task)
    if not task["pairs"]:
        alone = [win_sentence(m, task) for m in ranking]
        return [*alone, *failures(task, results["seeds"]), *over_optimised(task)]
    said = [*nothing_told_apart(task), *against_sft_more(task), *leader(task, ranking)]
    said += equivalent(task, results["margin"])
    return [*said, *undecided(task, ranking), *failures(task, results["seeds"]), *over_optimised(task)]


def ranked(task: Task) -> list[str]:
    """Methods by their win rate against the reference, best first."""
    wins = {m: found["win"]["estimate"] for m, found in task["methods"].items() if found["win"]}
    wins |= {task["reference"]: 0.5} if "reference" in task else {}
    return sorted(wins, key=lambda m: (-wins[m], m))


def nothing_told_apart(task: Task) -> list[str]:
    """Ties alone: a task that is too hard, or too easy, for every method."""
    wins = [found["win"] for found in task["methods"].values() if found["win"]]
    if not wins or any(w["estimate"] != 0.5 or w["se"] for w in wins):
        return []
    return [
        f"The judge {task['metric']} called every answer a tie with the start's: it told nothing apart, and what "
        "follows says nothing about the methods."
    ]


def against_sft_more(task: Task) -> list[str]:
    """Who is better than the start that was only trained longer."""
    rivals = [_turned(p, "sft_more") for p in task["pairs"] if "sft_more" in (p["a"], p["b"])]
    if not rivals:
        return []
    better = [p["a"] for p in rivals if p["verdict"] == "better"]
    worse = [p["a"] for p in rivals if p["verdict"] == "worse"]
    things = "runs" if rivals[0]["difference"]["this_run_only"] else "methods"
    said = [
        f"Proven better than sft_more: {listed(better)} ({len(better)} of {len(rivals)} {things})."
        if better
        else "No method is proven better than sft_more."
    ]
    return said + ([f"Proven worse than sft_more: {listed(worse)}."] if worse else [])


def leader(task: Task, ranking: Sequence[str]) -> list[str]:
    """The best win rate, who is proven worse than it, and the clearest of these pairs in numbers."""
    first = ranking[0]
    pairs = [_turned(p, first, second=False) for p in task["pairs"] if first in (p["a"], p["b"])]
    if len(pairs) < len(ranking) - 1:  # a large suite compares with sft_more only
        return [win_sentence(first, task)]
    worse = [p for p in pairs if p["verdict"] == "better"]
    rest = [p["b"] for p in pairs if p["verdict"] != "better"]
    said = [win_sentence(first, task) + (" It is proven better than all others." if not rest else "")]
    if rest and worse:
        said.append(f"{first} is proven better than {listed(p['b'] for p in worse)}; not than {listed(rest)}.")
    elif rest:
        said.append(f"{first} leads, but it is not proven better than any other method.")
    nearest = min(worse, key=lambda p: ranking.index(p["b"]), default=None)
    return said + ([pair_sentence(nearest)] if nearest else [])


def equivalent(task: Task, margin: float) -> list[str]:
    """Pairs that differ by less than the margin, proven."""
    found = [f"{p['a']} and {p['b']}" for p in task["pairs"] if p["verdict"] == "equivalent"]
    return [f"Equivalent within {100 * margin:g} points: {'; '.join(found)}."] if found else []


def undecided(task: Task, ranking: Sequence[str]) -> list[str]:
    """How many pairs are open; of the best ones, what would decide them."""
    found = [p for p in task["pairs"] if p["verdict"] == "undecided"]
    found.sort(key=lambda p: sorted((ranking.index(p["a"]), ranking.index(p["b"]))))
    said = [f"{len(found)} of {len(task['pairs'])} pairs are undecided, which is not equal."] if found else []
    return said + [undecided_sentence(p) for p in found[:SHOWN]]


def undecided_sentence(pair: Mapping[str, Any]) -> str:
    """What was seen, what this study could have found, and how much more of it would decide."""
    if pair["difference"]["estimate"] < 0:
        pair = _turned(pair, pair["a"])
    gap, needed = pair["difference"], pair["to_decide"]
    said = (
        f"{pair['a']} and {pair['b']}: undecided, {pair['a']} ahead by {100 * gap['estimate']:.1f} points "
        f"(95 % {ends(gap)}; Holm p {p_words(pair['p_holm'])}); this study finds "
        f"{100 * gap['smallest_detectable']:.1f} points before Holm"
    )
    more = []
    if needed["seeds"] is not None and needed["seeds"] < MANY_SEEDS:
        more.append(f"{needed['seeds']} seeds")
    if needed["prompts"] is not None and needed["prompts"] < MANY_PROMPTS:
        more.append(f"{needed['prompts']:,} test prompts")
    if more:
        return f"{said}; about {' or '.join(more)} would decide it, were it the true one (80 % power, after Holm)."
    return f"{said}; neither {MANY_SEEDS} seeds nor {MANY_PROMPTS:,} test prompts would decide so small a difference."


def failures(task: Task, seeds: int) -> list[str]:
    """Runs that failed; their methods are shown with those that finished."""
    some = {m: f["failed_runs"] for m, f in task["methods"].items() if f["failed_runs"]}
    said = []
    if some:
        told = listed(f"{m} ({n} of {seeds})" for m, n in some.items())
        said.append(
            f"Runs failed: {told}; these methods are shown with the runs that finished, which may be the lucky ones."
        )
    if task["lost"]:
        job, reason = next(iter(task["failed"].items()))  # what is shared comes first
        said.append(f"All runs failed: {listed(task['lost'])}. First of all {job}: {reason.strip().splitlines()[-1]}")
    return said


def over_optimised(task: Task) -> list[str]:
    """Methods whose truth has fallen from its own peak; Holm over all methods with a curve."""
    curves = {m: f["curve"] for m, f in task["methods"].items() if f.get("curve")}
    falls = {m: c["end_minus_peak"] for m, c in curves.items()}
    p_holm = dict(zip(falls, statistics.holm([f["p"] for f in falls.values()]).tolist(), strict=True)) if falls else {}
    said = []
    column = (task["frontier"] or {}).get("gold_column")
    for m, fall in falls.items():
        if fall["estimate"] < 0 and p_holm[m] < 0.05:
            proxy = curves[m].get("proxy_end_minus_peak")
            rose = "" if proxy is None else f", the proxy moved by {proxy['estimate']:+.2f} ({proxy_ends(proxy)})"
            said.append(
                f"{m} is over-optimised: from its peak at step {curves[m]['peak_step']} {column} fell by "
                f"{-fall['estimate']:.2f} (95 % {-fall['ci'][1]:.2f} to {-fall['ci'][0]:.2f}; "
                f"Holm p {p_words(p_holm[m])}){rose}."
            )
    return said


def conditional(results: Mapping[str, Any]) -> str:
    """What all of it is conditional on."""
    if results["start_seeds"] > 1:
        return (
            f"Errors are over {results['start_seeds']} starts, each with data and a reward model of its own; what "
            "kind of start and data these are is given."
        )
    return "One start, one body of data, one reward model: all of this is conditional on them; start_seeds varies them."


# ------------------------------------------------------------------------------------------ parts of sentences


def win_sentence(name: str, task: Task) -> str:
    found = task["methods"][name]
    if not found["win"]:
        return f"No model wins more than half against {name}, by the judge {task['metric']}."
    against = next(iter(found["against"]))
    return f"{name} wins {share(found['win'])} against {against}, by the judge {task['metric']}."


def pair_sentence(pair: Mapping[str, Any]) -> str:
    """``kto is better than dpo: 58.1 % against 52.3 % (difference 5.8 points, 95 % 2.1 to 9.5; Holm p 0.003).``"""
    gap = pair["difference"]
    flag = f" ({pair['flag']})" if pair["flag"] else ""
    return (
        f"{pair['a']} is {pair['verdict']} than {pair['b']}: {100 * gap['mean_a']:.1f} % against "
        f"{100 * gap['mean_b']:.1f} % (difference {100 * gap['estimate']:.1f} points, 95 % {ends(gap)}; "
        f"Holm p {p_words(pair['p_holm'])}){flag}."
    )


def share(estimate: Mapping[str, Any]) -> str:
    low, high = estimate["ci"]
    return f"{100 * estimate['estimate']:.1f} % ({100 * max(low, 0):.1f} to {100 * min(high, 1):.1f})"


def ends(estimate: Mapping[str, Any]) -> str:
    return " to ".join(f"{100 * end:.1f}" for end in estimate["ci"])


def proxy_ends(estimate: Mapping[str, Any]) -> str:
    return " to ".join(f"{end:+.2f}" for end in estimate["ci"])


def p_words(p: float) -> str:
    """``0.03``, and not smaller than ``< 0.001``."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def listed(names: Any) -> str:
    """``a, b and c``.

    >>> listed(["dpo", "ipo", "kto"]), listed(["dpo"])
    ('dpo, ipo and kto', 'dpo')
    """
    *most, last = list(names)
    return f"{', '.join(most)} and {last}" if most else last


TURNED = {"better": "worse", "worse": "better"}


def _turned(pair: Mapping[str, Any], name: str, *, second: bool = True) -> Mapping[str, Any]:
    """The pair seen so that this method is the second, or the first."""
    if (pair["b"] == name) == second:
        return pair
    gap = pair["difference"]
    low, high = gap["ci"]
    turned = {
        **gap,
        "estimate": -gap["estimate"],
        "ci": [-high, -low],
        "mean_a": gap["mean_b"],
        "mean_b": gap["mean_a"],
    }
    verdict = TURNED.get(pair["verdict"], pair["verdict"])
    return {**pair, "a": pair["b"], "b": pair["a"], "difference": turned, "verdict": verdict}
