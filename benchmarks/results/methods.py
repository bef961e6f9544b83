"""The numbers of one method: means, win rates, length, diversity, what alignment costs."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefzoo.benchmarks import statistics
from prefzoo.benchmarks.results.length import controlled, length
from prefzoo.benchmarks.results.stored import Array, Stored, common

RESAMPLES = 400  # of the bootstrap beside an error: its own error is then 4 %, and 20 % are worth a look


def method(stored: Stored, name: str) -> dict[str, Any]:
    """All that the stored rows say of one method."""
    mine, judges = stored.answers[name], stored.judges
    against = {b: found for b in ("start", "sft_more") if (found := _against(stored, name, b)) is not None}
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
        "diversity": _diversity(stored, name),
        "greedy": _greedy(stored, name),
        "held_out": _held_out(stored, name),
    }


def _means(stored: Stored, name: str) -> dict[str, Any]:
    mine, clusters = stored.answers[name], stored.clusters
    found = {c: stored.table(name, c) for c in mine.scores}
    if "kl" in found:  # one ratio of sums: a mean over answers of ratios would weigh short answers more
        tokens = max(float(mine.columns["tokens"].mean()), 1e-12)
        found["kl_per_token"] = found["kl"] / tokens
    return {c: statistics.mean(y_SN, clusters=clusters).to_dict() for c, y_SN in found.items()}


def _against(stored: Stored, name: str, baseline: str) -> dict[str, Any] | None:
    """Win rate and difference of the deciding judge's score, on the runs of both."""
    if name == baseline or baseline not in stored.answers:
        return None
    judged = stored.judged(name, baseline)
    if judged is None:
        return None
    clusters, metric = stored.clusters, stored.metric
    wins_SN = stored.over_starts(judged.y_SN, judged.runs)
    even_SN = np.full_like(wins_SN, 0.5)
    permuted = statistics.permutation_test(wins_SN, even_SN, paired_seeds=True, clusters=clusters)
    difference = None
    if not stored.judges[metric]["pairs"]:
        a_SN, b_SN = stored.two_tables(name, baseline, metric)
        difference = statistics.difference(a_SN, b_SN, paired_seeds=True, clusters=clusters).to_dict()
    by_run_S = judged.y_SN.mean(1)
    return {
        "win": statistics.win_rate(wins_SN, clusters=clusters).to_dict(),
        "difference": difference,
        "ties": judged.ties, "flips": judged.flips, "unparsed": judged.unparsed,
        "win_range": [float(by_run_S.min()), float(by_run_S.max())],
        "permutation_p": permuted.p,
        "bootstrap_se": statistics.two_way_bootstrap_se(wins_SN, clusters, RESAMPLES),
    }  # fmt: skip


def _judged(stored: Stored, name: str, judge: str) -> dict[str, Any]:
    """Win rates by one judge."""
    found = {b: stored.wins(name, b, judge) for b in ("start", "sft_more") if b in stored.answers and b != name}
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
    return {}


def _greedy(stored: Stored, name: str) -> float | None:
    """The deciding judge's score of the likeliest answers."""
    found = stored.greedy.get(name)
    return None if found is None or stored.metric not in found.columns else float(found.columns[stored.metric].mean())


def _held_out(stored: Stored, name: str) -> dict[str, Any] | None:
    """By how much the negative log-likelihood of held-out demonstrations, per token, is above the start's."""
    if name == "start" or name not in stored.held_out or "start" not in stored.held_out:
        return None
    mine, start = stored.held_out[name], stored.held_out["start"]
    runs = common(mine.runs, start.runs)
    if not runs:
        return None

    def per_token(of: Any) -> Array:
        part = of.only(runs)
        return stored.over_starts(part.mean_SN("nll") / part.columns["tokens"].mean(), runs)

    return statistics.difference(per_token(mine), per_token(start), paired_seeds=True).to_dict()
