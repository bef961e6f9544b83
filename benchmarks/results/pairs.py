"""Pairs of methods: who is better, as one family of claims."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefzoo.benchmarks import statistics
from prefzoo.benchmarks.results.methods import RELABELLINGS, RESAMPLES
from prefzoo.benchmarks.results.stored import Array, Judged, Stored, common
from prefzoo.benchmarks.statistics.sequel import to_decide

DRAWS = 4_000  # of max-t


@dataclass(frozen=True)
class Family:
    """The claims of a task: differences of pairs of methods in their win rates against the reference; of models that
    are compared, which have none before them, in their win rates against each other."""

    pairs: tuple[tuple[str, str], ...]
    judged: Mapping[str, Judged]
    stored: Stored

    @classmethod
    def of(cls, stored: Stored, names: Sequence[str], verdicts: str) -> Family:
        """All pairs of these methods, or of each with ``sft_more``; without those that share no run."""
        if stored.baseline:
            every = itertools.combinations(names, 2)
            return cls(tuple(p for p in every if stored.judged(*p) is not None), {}, stored)
        reference = stored.reference
        rivals = [n for n in names if n != reference] if reference else []
        judged = {n: found for n in rivals if (found := stored.judged(n, str(reference))) is not None}
        chosen = itertools.combinations(judged, 2) if verdicts == "all" else ((n, verdicts) for n in judged)
        pairs = [(a, b) for a, b in chosen if a != b and b in judged]
        return cls(tuple(p for p in pairs if common(*(judged[m].runs for m in p))), judged, stored)

    def runs(self, names: Iterable[str]) -> tuple[int, ...]:
        """Runs that all of these methods finished."""
        finished = self.stored.answers if self.stored.baseline else self.judged
        return functools.reduce(common, (finished[n].runs for n in names))

    def table(self, name: str, runs: Sequence[int]) -> Array:
        return self.stored.over_starts(self.judged[name].only(runs), runs)

    def tables(self, a: str, b: str) -> tuple[Array, Array]:
        """(S, N) of both on the runs of both; head to head one is the other turned round."""
        if self.stored.baseline:
            y_SN = self.stored.wins(a, b)
            assert y_SN is not None
            return y_SN, 1 - y_SN
        runs = self.runs((a, b))
        return self.table(a, runs), self.table(b, runs)


def compare(family: Family, planned_runs: int, margin: float) -> list[dict[str, Any]]:
    """The verdict of every pair, and what it rests on."""
    if not family.pairs:
        return []
    clusters = family.stored.clusters
    tables = [family.tables(*pair) for pair in family.pairs]
    gaps = [
        statistics.difference(a_SN, b_SN, paired_seeds=True, clusters=clusters, bootstrap=RESAMPLES)
        for a_SN, b_SN in tables
    ]
    holm = statistics.holm([gap.p for gap in gaps]).tolist()
    together = jointly(family)
    level = 1 - 0.05 / len(gaps)  # of one claim, where the whole family may err in 5 %
    rows = []
    for k, ((a, b), (a_SN, b_SN), gap, p) in enumerate(zip(family.pairs, tables, gaps, holm, strict=True)):
        head_SN, verdict = family.stored.wins(a, b), statistics.verdict(gap, p, margin=margin)
        sequel = to_decide(a_SN, b_SN, clusters=clusters, level=level) if verdict == "undecided" else None
        rows.append({
            "a": a, "b": b,
            "head_to_head": None if head_SN is None else statistics.win_rate(head_SN, clusters=clusters).to_dict(),
            "difference": gap.to_dict(), "p_holm": p,
            "p_max_t": None if together is None else together.p_adjusted[k],
            "ci_max_t": None if together is None else list(together.ci[k]),
            "verdict": verdict,
            "smallest_detectable": gap.smallest_detectable,
            "to_decide": None if sequel is None else sequel.to_dict(),
            "permutation_p": _permuted(a_SN, b_SN, clusters),
            "flag": _flag(gap, len(family.runs((a, b))), planned_runs),
            **(_head_to_head(family.stored, a, b) if family.stored.baseline else {}),
        })  # fmt: skip
    return rows


def _head_to_head(stored: Stored, a: str, b: str) -> dict[str, Any]:
    """What the judge did with a pair; McNemar's test where it says right or wrong, of the first answers."""
    judged = stored.judged(a, b)
    assert judged is not None
    mcnemar = None
    if not stored.judges[stored.metric]["pairs"]:
        a_N, b_N = (stored.answers[m].columns[stored.column][0, :, 0] for m in (a, b))
        if {*a_N, *b_N} <= {0.0, 1.0}:
            mcnemar = statistics.mcnemar(a_N, b_N).to_dict()
    return {"ties": judged.ties, "flips": judged.flips, "unparsed": judged.unparsed, "mcnemar": mcnemar}


def jointly(family: Family) -> statistics.MaxT | None:
    """Max-t over all pairs, on the runs that all of their methods finished; None where failures left fewer than two.
    Not of models head to head, whose pairs have no table of a model in common."""
    if family.stored.baseline:
        return None
    names = list(dict.fromkeys(itertools.chain.from_iterable(family.pairs)))
    runs = family.runs(names)
    if len(runs) < min(2, max(len(family.runs(pair)) for pair in family.pairs)):
        return None
    tables = {n: family.table(n, runs) for n in names}
    return statistics.max_t(
        tables, paired_seeds=True, pairs=family.pairs, clusters=family.stored.clusters, resamples=DRAWS
    )


def _permuted(a_SN: Array, b_SN: Array, clusters: Sequence[str]) -> float:
    return statistics.permutation_test(
        a_SN, b_SN, paired_seeds=True, clusters=clusters, max_relabellings=RELABELLINGS
    ).p


def _flag(gap: statistics.Difference, runs: int, planned: int) -> str | None:
    """What a reader must know before he believes the numbers."""
    found = []
    if runs < planned:
        found.append(f"on the {runs} of {planned} seeds that both finished")
    if gap.this_run_only and planned > 1:
        found.append("one run only")
    if gap.bootstrap_disagrees and gap.bootstrap_se is not None:
        found.append(f"the bootstrap's error is {gap.bootstrap_se / gap.se:.2f} times this one")
    return "; ".join(found) or None
