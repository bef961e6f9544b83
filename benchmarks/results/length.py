"""Length: how long answers are, and who wins when length is held equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from prefzoo.benchmarks.results.stored import Array, Stored, common
from prefzoo.benchmarks.statistics import alpaca_eval, length_controlled, prompt_difficulty

REFITS = 100  # of the bootstrap: the error of the error is 7 %


def length(stored: Stored, name: str) -> dict[str, Any]:
    """Mean tokens (characters where models share none), and their ratio to the start's or the baseline's."""
    mean, start = _mean(stored, name), stored.baseline or "start"
    base = _mean(stored, start) if start in stored.answers else None
    return {"mean": mean, "ratio": mean / base if base else None, "unit": stored.length}


def controlled(stored: Stored, name: str, names: Sequence[str]) -> dict[str, Any] | None:
    """The length-controlled win rate against the reference, and AlpacaEval's own number; lengths in characters.

    Prompts' difficulty is taken from the other methods. ``refused`` says why there is no number.
    """
    reference = stored.reference
    judged = None if reference in (None, name) else stored.judged(name, str(reference))
    if judged is None:
        return None
    others = [j for m in names if m not in (name, reference) and (j := stored.judged(m, str(reference))) is not None]
    if not others:
        return None
    runs = common(judged.runs, stored.answers[str(reference)].runs)
    mine, theirs = (stored.over_starts(_characters(stored, m, runs), runs) for m in (name, str(reference)))
    y_SN = stored.over_starts(judged.y_SN, judged.runs)
    difficulty_N = prompt_difficulty(np.stack([j.y_SN.mean(0) for j in others]))
    try:
        found = length_controlled(
            y_SN, mine, theirs, difficulty=difficulty_N, clusters=stored.clusters, resamples=REFITS
        )
        own = alpaca_eval(y_SN[0], mine[0], theirs[0], difficulty_N)
    except (ValueError, np.linalg.LinAlgError) as error:  # answers of one length, or length decides everything
        return {"refused": str(error)}
    about = {"of": "the first run", "estimate": own.estimate / 100, "se": own.se / 100}
    return {**found.to_dict(), "alpaca_eval": about}


def _mean(stored: Stored, name: str) -> float:
    return float(stored.answers[name].columns[stored.length].mean())


def _characters(stored: Stored, name: str, runs: Sequence[int]) -> Array:
    texts_SNK = stored.answers[name].only(runs).columns["completion"]
    return np.vectorize(len, otypes=[float])(texts_SNK).mean(-1)
