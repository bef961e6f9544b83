"""What an algorithm is made of, in the words of a table: read off its parts, never off its name."""

from __future__ import annotations

import re
from typing import Any

from prefzoo.algorithm import Algorithm, Stage
from prefzoo.parts.feedback import Verifier
from prefzoo.parts.roles import POLICY, REFERENCE, REWARD
from prefzoo.parts.source import DatasetRows, Rollouts, Sampler

COLUMNS = ("source", "feedback", "credit", "terms", "count", "reference")
LEARNS_FROM = {  # what the data must hold, or can be turned into
    "pairs": "pairs",
    "unpaired": "rated answers",
    "rankings": "rankings",
    "scored": "scored answers",
    "steps": "rated steps",
    "completions": "demonstrations",
    "prompts": "prompts",
}
NONE = "–"


def composition(algorithm: Algorithm) -> list[dict[str, str]]:
    """One row of :data:`COLUMNS` for each stage; of what is only a way to decode, one row that says so."""
    rows = [stage_row(stage) for stage in algorithm.stages]
    if algorithm.product is not None:
        how = f"decoded by {in_words(algorithm.product)}"
        if rows:
            rows[-1]["terms"] += f"; {how}"
        else:
            judge = "reward" if REWARD in algorithm.needs else NONE
            rows.append(dict.fromkeys(COLUMNS, NONE) | {"source": "prompts", "feedback": judge, "terms": how})
    return rows


def stage_row(stage: Stage) -> dict[str, str]:
    """What stands in the table about one stage."""
    source = source_words(stage.source)
    if stage.replay is not None:
        source += " + replay"
    if stage.condition is not None:
        source += f", marked by {in_words(stage.condition)}"
    credit = [in_words(part) for part in (stage.keep, stage.credit, stage.prelude, stage.update) if part is not None]
    terms = []
    for term in stage.terms:
        weight = "" if term.weight == 1 else f"{term.weight:.3g} "
        rows = "" if term.rows == "main" else f" on {term.rows}"
        role = "" if term.trains == POLICY else f" → {term.trains}"
        terms.append(f"{weight}{term.loss.name}{rows}{role}")
    return {
        "source": source,
        "feedback": in_words(stage.feedback),
        "credit": ", ".join(credit) or NONE,
        "terms": " + ".join(terms),
        "count": ", ".join(dict.fromkeys(term.counted.unit for term in stage.terms)),
        "reference": in_words(stage.reference) if REFERENCE in stage.needs else NONE,
    }


def source_words(source: DatasetRows | Rollouts) -> str:
    """Where samples come from, and how many of each prompt.

    >>> source_words(Rollouts(8, beside=(Sampler("reference"),)))
    '8 rollouts + 1 of reference'
    """
    if isinstance(source, DatasetRows):
        return LEARNS_FROM[source.kind]
    made = f"{source.group_size} rollout{'s' if source.group_size > 1 else ''}"
    if source.by != POLICY:
        made += f" of {source.by}"
    for sampler in source.beside:
        made += f" + {_sampler(sampler)}"
    if source.share < 1:
        made += f" in {100 * source.share:.0f} % of steps, else demonstrations"
    if source.mask_top_p is not None:
        made += ", inside the mask's nucleus"
    return made


def _sampler(sampler: Sampler) -> str:
    if sampler.role == "data":
        return "the demonstration"
    blended = " blended with the reference" if sampler.blend else ""
    greedy = " greedy" if sampler.temperature == 0 else ""
    return f"{sampler.count}{greedy} of {sampler.role}{blended}"


def in_words(part: Any) -> str:
    """A part by the words of its class.

    >>> from prefzoo.parts.credit import GAE, BestOfK, LeaveOneOut
    >>> in_words(LeaveOneOut()), in_words(BestOfK()), in_words(GAE())
    ('leave one out', 'best of k', 'GAE')
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*", type(part).__name__)
    return " ".join(word if len(word) > 1 and word.isupper() else word.lower() for word in words)


def needs(algorithm: Algorithm) -> list[str]:
    """What must be there beside the policy and the data; what it trains from nothing is not needed."""
    wanted = set(algorithm.needs) - {POLICY}
    if not algorithm.asks_for_reward:
        wanted.discard(REWARD)
    if REWARD in wanted and any(isinstance(s.feedback, Verifier) for s in algorithm.stages):
        wanted = (wanted - {REWARD}) | {"verifier"}
    return sorted(wanted)
