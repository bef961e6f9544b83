"""How good a judge is: against people, or against the truth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prefzoo.benchmarks import statistics
from prefzoo.benchmarks.judging import JudgeSpec, make_judge
from prefzoo.benchmarks.judging.answers import Answers, PairJudge, Verdicts
from prefzoo.benchmarks.judging.people import Labelled, read_labelled
from prefzoo.registry import UsageError


def verdicts_of(judge: Any, a: Answers, b: Answers) -> Verdicts:
    """What any judge says of pairs; one that scores sees no order."""
    if isinstance(judge, PairJudge):
        return judge.compare(a, b)
    y = statistics.win(judge.score(a), judge.score(b))
    return Verdicts(y, y)


def measure(
    spec: JudgeSpec,
    source: Any,
    *,
    columns: Mapping[str, str] | None = None,
    by: str | None = None,
    tokenizer: Any = None,
    cache: str | Path = ".prefzoo-judge",
    device: str = "cpu",
) -> dict[str, Any]:
    """A judge on pairs that people have judged: accuracy, kappa, alpha, biases of place and length, flips; for the
    whole file and for each value of the column ``by``. People among themselves, where there are several.

    Where they are split evenly, or nobody has judged, a pair is a tie or is left out (and counted).

    Returns:
        ``judge``, ``pairs``, ``left_out``, ``whole`` and ``parts`` (statistics.JudgeQuality), ``people``
        (statistics.Agreement or None), ``spent``.
    """
    found = read_labelled(source, columns)
    truth_N = found.majority()
    kept = np.flatnonzero(~np.isnan(truth_N))
    if len(kept) < 2:
        raise UsageError(f"{len(kept)} of {len(truth_N)} pairs have a judgement; a judge cannot be measured on them.")
    if by is not None and by not in found.rows[0]:
        raise UsageError(f"no column {by!r} to group by; there are {', '.join(found.rows[0])}.")
    rows = [found.rows[i] for i in kept]
    a, b = (Answers.of_texts(rows, [side[i] for i in kept], tokenizer) for side in (found.a, found.b))
    judge = make_judge(spec, tokenizer=tokenizer, cache=Path(cache), device=device)
    said = verdicts_of(judge, a, b)

    def quality(places: np.ndarray) -> dict[str, Any]:
        scores = not isinstance(judge, PairJudge)
        return statistics.judge_quality(
            said.forward_B[places], truth_N[kept][places], backward=None if scores else said.backward_B[places],
            len_a=[len(a.texts[p]) for p in places], len_b=[len(b.texts[p]) for p in places],
            clusters=[rows[p]["prompt"] for p in places],
        ).to_dict()  # fmt: skip

    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(str(row[by]) if by else "", []).append(place)
    return {
        "judge": spec.name,
        "pairs": len(kept),
        "left_out": len(truth_N) - len(kept),
        "whole": quality(np.arange(len(kept))),
        "parts": {name: quality(np.array(p)) for name, p in groups.items() if by and len(p) > 1},
        "people": people(found),
        "spent": dict(said.spent),
    }


def people(found: Labelled) -> dict[str, Any] | None:
    """How far several people agree among themselves."""
    if found.labels_NR.shape[1] < 2:
        return None
    clusters = [row["prompt"] for row in found.rows]
    return statistics.agreement(found.labels_NR, clusters=clusters, raters=list(found.raters)).to_dict()
