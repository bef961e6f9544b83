"""Verifiers: checks with a known right answer. Functions with TRL's signature; 1.0 right, 0.0 wrong.

The right answer is the data's column ``answer`` (or ``solution``, or ``ground_truth``).
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Any

from prefzoo.registry import Registry, UsageError

VERIFIERS = Registry("verifier")
ANSWER_COLUMNS = ("answer", "solution", "ground_truth")

# A sign belongs to a number unless something stands before it that it could be subtracted from: "3-4" ends in 4.
_NUMBER = re.compile(r"(?:(?<![\d)])[-+])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?:(?<![\d)])[-+])?\.\d+")


@VERIFIERS.register
def exact(completions: list[Any], **columns: Any) -> list[float | None]:
    """The completion is the answer, apart from white space at its ends and between words.

    >>> exact(completions=[" Paris ", "Rome"], answer=["Paris", "Paris"])
    [1.0, 0.0]
    """
    answers = _answers(columns)
    return [
        None if answer is None else float(_text(completion).split() == str(answer).split())
        for completion, answer in zip(completions, answers, strict=True)
    ]


@VERIFIERS.register
def numeric(completions: list[Any], **columns: Any) -> list[float | None]:
    """The number a completion ends with equals the answer's: what follows ``####`` if it is there, else the last one.

    Thousands separators, a leading plus and trailing zeros do not matter; an answer without a number is None (not
    applicable).

    >>> numeric(completions=["so 3 * 4 = 12.0", "#### 1,000", "no idea"], answer=["12", "... #### 1000", "7"])
    [1.0, 1.0, 0.0]
    """
    answers = [last_number(str(a)) for a in _answers(columns)]
    found = [last_number(_text(c)) for c in completions]
    return [None if a is None else float(f is not None and f == a) for f, a in zip(found, answers, strict=True)]


def last_number(text: str) -> Decimal | None:
    """The number after the last ``####``, or else the last number of the text."""
    tail = text.rpartition("####")[2] if "####" in text else text
    found = _NUMBER.findall(tail)
    if not found:
        return None
    try:
        return Decimal((found[0] if "####" in text else found[-1]).replace(",", ""))
    except InvalidOperation:
        return None


def _answers(columns: dict[str, Any]) -> list[Any]:
    for name in ANSWER_COLUMNS:
        if columns.get(name) is not None:
            return list(columns[name])
    have = ", ".join(sorted(columns)) or "none"
    raise UsageError(
        f"a verifier needs the right answers: a column {' or '.join(map(repr, ANSWER_COLUMNS))}; it has {have}."
    )


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else "".join(str(m["content"]) for m in completion)
