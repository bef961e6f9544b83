"""Judges measured: each against the truth of the same answers, where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np

from prefzoo.benchmarks.results.stored import Array, Stored, common
from prefzoo.benchmarks.statistics import judge_quality, win


def quality(stored: Stored, judge: str, truth: str | None) -> dict[str, Any] | None:
    """How a judge's verdicts on answers against the reference agree with the truth; the first sample of every prompt.

    The truth is a column (gold, exact), or a judge that stands for humans; None where there is none, and for itself.
    """
    reference, told = stored.reference, stored.judges[judge]
    if truth in (None, judge, told["column"]) or reference is None:
        return None
    parts: list[tuple[Array, ...]] = []
    for name in stored.answers:
        runs = _runs(stored, name, reference, judge, str(truth)) if name != reference else ()
        if runs:
            sides = [stored.answers[m].only(runs) for m in (name, reference)]
            said = _said(stored, judge, name, reference, runs)
            right_SN = np.sign(_said(stored, str(truth), name, reference, runs).mean(0) - 0.5) / 2 + 0.5
            lengths = [side.columns[stored.length][..., 0] for side in sides]
            labels_SN = np.broadcast_to(np.asarray(stored.clusters, dtype=object), right_SN.shape)
            parts.append((*said, right_SN, *lengths, labels_SN))
    if not parts:
        return None
    forward, backward, right, len_a, len_b, clusters = (
        np.concatenate([p[i].ravel() for p in parts]) for i in range(len(parts[0]))
    )
    known = ~np.isnan(right.astype(float))
    if not known.any():
        return None
    found = judge_quality(
        forward[known], right[known], backward=backward[known] if told["pairs"] else None,
        len_a=len_a[known], len_b=len_b[known], clusters=clusters[known].tolist(),
    )  # fmt: skip
    return {"truth": truth, **found.to_dict()}


def _runs(stored: Stored, name: str, reference: str, *judges: str) -> tuple[int, ...]:
    """Runs of both whose answers all of these judges have seen."""
    runs = common(stored.answers[name].runs, stored.answers[reference].runs)
    for judge in judges:
        if judge in stored.judges and stored.judges[judge]["pairs"]:
            found = stored.judgements.get((judge, name, reference))
            runs = () if found is None else common(runs, found.runs)
        elif any(_column(stored, judge) not in stored.answers[m].columns for m in (name, reference)):
            runs = ()
    return runs


def _said(stored: Stored, judge: str, name: str, reference: str, runs: tuple[int, ...]) -> Array:
    """(2, S, N): P(the method's answer is better) in both orders, of the first sample."""
    if judge in stored.judges and stored.judges[judge]["pairs"]:
        found = stored.judgements[judge, name, reference].only(runs)
        return np.stack([found.columns[order][..., 0] for order in ("forward", "backward")])
    mine, theirs = (stored.answers[m].only(runs).columns[_column(stored, judge)][..., 0] for m in (name, reference))
    return np.stack([win(mine, theirs)] * 2)


def _column(stored: Stored, judge: str) -> str:
    """The scores of a judge, or a column that is the truth itself."""
    return stored.judges[judge]["column"] if judge in stored.judges else judge
