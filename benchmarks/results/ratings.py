"""One scale for all methods: Bradley-Terry ratings of their battles on the test prompts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from prefzoo.benchmarks import statistics
from prefzoo.benchmarks.results.stored import Stored

BASELINES = ("start", "sft_more")


def ratings(stored: Stored, names: Sequence[str], verdicts: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """How well the ratings fit, and the rating of every method; or why there are none.

    A battle is one prompt of one pair, its judgement the mean over runs and samples. So the errors are over prompts,
    and the ratings are of these runs; what holds for other runs is said by the pairs.
    """
    a, b, y, clusters = [], [], [], []
    for first, second in itertools.combinations(names, 2):
        if verdicts != "all" and not {first, second} & set(BASELINES):
            continue
        judged, sign = stored.judged(first, second), 1.0
        if judged is None:
            judged, sign = stored.judged(second, first), -1.0
        if judged is None:
            continue
        y_N = 0.5 + sign * (judged.y_SN.mean(0) - 0.5)
        a += [first] * len(y_N)
        b += [second] * len(y_N)
        y += y_N.tolist()
        clusters += stored.clusters
    if not y:
        return None, {}
    anchor = next((n for n in (stored.baseline, "start") if n in {*a, *b}), None)
    try:
        fitted = statistics.bradley_terry(a, b, y, clusters=clusters, anchor=anchor)
    except ValueError as error:  # someone never wins: a rating would be infinite
        return {"refused": str(error)}, {}
    about = {
        "anchor": anchor, "fit": None if fitted.fit is None else fitted.fit.to_dict(), "n_battles": fitted.n_battles,
        "n_clusters": fitted.n_clusters, "covers": "prompts, not runs",
    }  # fmt: skip
    return about, {r.name: r.to_dict() for r in fitted.ratings}
