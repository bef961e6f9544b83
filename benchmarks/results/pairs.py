"""Pairs of methods: who is better, as one family of claims."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefzoo.benchmarks import statistics
from prefzoo.benchmarks.results.methods import RESAMPLES
from prefzoo.benchmarks.results.stored import Array, Stored, common


@dataclass(frozen=True)
class Family:
    """The claims of a task: the win rates of methods against the reference, on the runs of both of a pair."""

    pairs: tuple[tuple[str, str], ...]
    tables: tuple[tuple[Array, Array], ...]
    runs: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, stored: Stored, names: Sequence[str], verdicts: str) -> Family:
        """All pairs of these methods, or of each with ``sft_more``."""
        reference = stored.reference
        if reference is None:
            return cls((), (), ())
        found = {n: j for n in names if n != reference and (j := stored.judged(n, reference)) is not None}
        rivals = itertools.combinations(found, 2) if verdicts == "all" else ((n, verdicts) for n in found)
        pairs = [(a, b) for a, b in rivals if a != b and b in found and common(found[a].runs, found[b].runs)]

        def table(name: str, runs: Sequence[int]) -> Array:
            judged = found[name]
            return stored.over_starts(judged.y_SN[[judged.runs.index(r) for r in runs]], runs)

        runs = [common(found[a].runs, found[b].runs) for a, b in pairs]
        tables = [(table(a, r), table(b, r)) for (a, b), r in zip(pairs, runs, strict=True)]
        return cls(tuple(pairs), tuple(tables), tuple(runs))


def compare(stored: Stored, family: Family, planned_runs: int, margin: float) -> list[dict[str, Any]]:
    """The verdict of every pair, and what it rests on."""
    if not family.pairs:
        return []
    clusters = stored.clusters
    gaps = [
        statistics.difference(a_SN, b_SN, paired_seeds=True, clusters=clusters, bootstrap=RESAMPLES)
        for a_SN, b_SN in family.tables
    ]
    holm = statistics.holm([gap.p for gap in gaps]).tolist()
    rows = []
    for (a, b), (a_SN, b_SN), runs, gap, p in zip(family.pairs, family.tables, family.runs, gaps, holm, strict=True):
        head_SN = stored.wins(a, b)
        rows.append({
            "a": a, "b": b,
            "head_to_head": None if head_SN is None else statistics.win_rate(head_SN, clusters=clusters).to_dict(),
            "difference": gap.to_dict(), "p_holm": p,
            "verdict": statistics.verdict(gap, p, margin=margin),
            "smallest_detectable": gap.smallest_detectable,
            "permutation_p": statistics.permutation_test(a_SN, b_SN, paired_seeds=True, clusters=clusters).p,
            "flag": _flag(gap, len(runs), planned_runs),
        })  # fmt: skip
    return rows


def _flag(gap: statistics.Difference, runs: int, planned: int) -> str | None:
    """What a reader must know before he believes the numbers."""
    found = []
    if runs < planned:
        found.append(f"on the {runs} of {planned} seeds that both finished")
    if gap.this_run_only and planned > 1:
        found.append("one run only")
    if gap.bootstrap_disagrees:
        found.append(f"the bootstrap's error is {gap.bootstrap_se / gap.se:.2f} times this one")
    return "; ".join(found) or None
