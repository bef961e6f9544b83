"""The numbers of one method: means, win rates, length, diversity, what alignment costs."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefzoo.benchmarks import statistics
from prefzoo.benchmarks.results.length import controlled, length
from prefzoo.benchmarks.results.stored import Stored, common

TEXTS = 200  # that diversity is measured on
RELABELLINGS = 4_000  # of a permutation test
RESAMPLES = 400  # of the bootstrap beside an error: its own error is then 4 %, and 20 % are worth a look


def method(stored: Stored, name: str) -> dict[str, Any]:
    """All that the stored rows say of one method."""
    mine, judges = stored.answers[name], stored.judges
    against = {b: found for b in stored.baselines if (found := _against(stored, name, b)) is not None}
    reference = stored.reference if name != stored.reference else None
    return {
        "seeds": list(mine.runs),
        "means": _means(stored, name),
        "win": against[reference]["win"] if reference in against else None,
        "against": against,
        "judged": {j: _judged(stored, name, j) for j in judges},
        "sensitivity": _sensitivity(stored, name, reference),
        "length": length(stored, name),
        "length_controlled": controlled(stored, name, list(stored.answers)),
        "improvement": _improvement(stored, name, reference),
        "diversity": _diversity(stored, name),
        "greedy": _greedy(stored, name),
        "held_out": _held_out(stored, name),
    }


def _means(stored: Stored, name: str) -> dict[str, Any]:
    mine, clusters = stored.answers[name], stored.clusters
    tables = {c: stored.table(name, c) for c in mine.scores}
    found = {c: statistics.mean(y_SN, clusters=clusters).to_dict() for c, y_SN in tables.items()}
    if "kl" in tables and (tables["tokens"] > 0).all():
        per_token = statistics.kl(tables["kl"], tokens=tables["tokens"], clusters=clusters).per_token
        assert per_token is not None
        found["kl_per_token"] = per_token.to_dict()
    return found


def _against(stored: Stored, name: str, baseline: str) -> dict[str, Any] | None:
    """Win rate and difference of the deciding judge's score, on the runs of both."""
    if name == baseline or baseline not in stored.answers:
        return None
    judged = stored.judged(name, baseline)
    if judged is None:
        return None
    clusters = stored.clusters
    wins_SN = stored.over_starts(judged.y_SN, judged.runs)
    even_SN = np.full_like(wins_SN, 0.5)
    permuted = statistics.permutation_test(
        wins_SN, even_SN, paired_seeds=True, clusters=clusters, max_relabellings=RELABELLINGS
    )
    difference = None
    if not stored.judges[stored.metric]["pairs"]:
        a_SN, b_SN = stored.two_tables(name, baseline, stored.column)
        difference = statistics.difference(a_SN, b_SN, paired_seeds=True, clusters=clusters).to_dict()
    by_run_S = judged.y_SN.mean(1)
    return {
        "win": statistics.win_rate(wins_SN, clusters=clusters).to_dict(),
        "difference": difference,
        "ties": judged.ties, "flips": judged.flips, "unparsed": judged.unparsed,
        "win_range": [float(by_run_S.min()), float(by_run_S.max())],
        "by_run": dict(zip(map(str, judged.runs), by_run_S.tolist(), strict=True)),
        "permutation_p": permuted.p,
        "bootstrap_se": statistics.two_way_bootstrap_se(wins_SN, clusters, RESAMPLES),
    }  # fmt: skip


def _judged(stored: Stored, name: str, judge: str) -> dict[str, Any]:
    """Win rates by one judge."""
    found = {b: stored.wins(name, b, judge) for b in stored.baselines if b != name}
    clusters = stored.clusters
    return {b: statistics.win_rate(y, clusters=clusters).to_dict() for b, y in found.items() if y is not None}


def _sensitivity(stored: Stored, name: str, reference: str | None) -> dict[str, Any] | None:
    """The win rate if all that the judge did not say had been a loss, or a win."""
    if reference is None or not stored.judges[stored.metric]["pairs"]:
        return None
    found = {}
    for key, value in (("unparsed_0", 0.0), ("unparsed_1", 1.0)):
        wins_SN = stored.wins(name, reference, unparsed=value)
        if wins_SN is None:
            return None
        found[key] = statistics.win_rate(wins_SN, clusters=stored.clusters).to_dict()
    return found


def _diversity(stored: Stored, name: str) -> dict[str, Any]:
    """Of the first run's answers to the first prompts, which are the same for all methods: these numbers depend on how
    many texts there are. ``different``: different answers to a prompt as a share of all."""
    texts_NK = stored.answers[name].columns["completion"][0]
    texts_NK = texts_NK[: max(1, TEXTS // texts_NK.shape[1])]
    try:
        found = statistics.diversity(texts_NK.ravel().tolist()).to_dict()
    except ValueError:  # no answer has a word in it
        found = {}
    return {**found, "different": float(np.mean([len(set(row)) for row in texts_NK]) / texts_NK.shape[1])}


def _greedy(stored: Stored, name: str) -> float | None:
    """The deciding judge's score of the likeliest answers."""
    found = stored.greedy.get(name)
    return None if found is None or stored.column not in found.columns else float(found.columns[stored.column].mean())


def _held_out(stored: Stored, name: str) -> dict[str, Any] | None:
    """By how much the negative log-likelihood of held-out demonstrations, per token, is above the start's."""
    if name == "start" or name not in stored.held_out or "start" not in stored.held_out:
        return None
    runs = common(stored.held_out[name].runs, stored.held_out["start"].runs)
    if not runs:
        return None
    mine, start = (stored.held_out[m].only(runs) for m in (name, "start"))
    start_N = start.mean_SN("nll").mean(0)
    after_SN = start_N + stored.over_starts(mine.mean_SN("nll") - start.mean_SN("nll"), runs)
    tax = statistics.alignment_tax(start_N, after_SN, start.mean_SN("tokens")[0])
    return {**tax.nll.to_dict(), "perplexity": tax.perplexity_after, "perplexity_of_start": tax.perplexity_before}


def _improvement(stored: Stored, name: str, reference: str | None) -> dict[str, Any] | None:
    """Probability that a run of the method has a higher win rate than a run of ``sft_more`` (or than one half)."""
    mine = None if reference is None else stored.judged(name, reference)
    if mine is None or name == "sft_more":
        return None
    rival = stored.judged("sft_more", str(reference)) if "sft_more" in stored.answers and reference == "start" else None
    runs = mine.runs if rival is None else common(mine.runs, rival.runs)
    a_S = stored.over_starts(mine.only(runs), runs).mean(1)
    if len(a_S) < 2:
        return None
    b_S = np.full_like(a_S, 0.5) if rival is None else stored.over_starts(rival.only(runs), runs).mean(1)
    found = statistics.probability_of_improvement(a_S, b_S, paired_seeds=True)
    return {**found.to_dict(), "over": reference if rival is None else "sft_more"}
