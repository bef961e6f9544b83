"""Verifiers: what a rule can check about a completion. Functions with TRL's signature, by name.

``exact`` and ``numeric`` compare with the right answer, the data's column ``answer`` (or ``solution``, or
``ground_truth``): 1.0 right, 0.0 wrong. Those that have options make a function: in Python
``repetition_penalty(ngram_size=4)``, by name the same in quotes.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from prefzoo.registry import Registry, UsageError

VERIFIERS = Registry("verifier")
ANSWER_COLUMNS = ("answer", "solution", "ground_truth")
# What every reward function can ask for besides the columns of the data.
KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra")

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


@VERIFIERS.register(aliases=("think_format_reward",))
def think_format(completions: list[Any], **columns: Any) -> list[float]:
    """The completion starts with ``<think>``, its only one, and closes it with ``</think>``: 1.0, else 0.0.

    A tokenizer for which the tags are special tokens drops them from the text of a completion.
    Source: TRL 1.16, ``think_format_reward``.

    >>> think_format(completions=["<think>1 + 1</think> 2", "2", "<think>1 + 1, so 2"])
    [1.0, 0.0, 0.0]
    """
    texts = [_text(c) for c in completions]
    return [float(t.startswith("<think>") and t.count("<think>") == 1 and "</think>" in t) for t in texts]


@VERIFIERS.register(aliases=("get_soft_overlong_punishment",), makes=True)
def soft_overlong_punishment(*, max_completion_len: int, soft_punish_cache: int) -> Callable[..., list[float]]:
    """0 for a completion that leaves room, down to -1 at the limit: add it to another reward.

        R = -min(1, max(0, |y| - (max_completion_len - soft_punish_cache)) / soft_punish_cache)

    ``|y|`` counts tokens; ``max_completion_len`` is meant to be the limit of the rollouts; without a cache
    (0) only what is over the limit gets -1.
    Source: DAPO (2503.14476), equation 13; TRL 1.16.

    >>> soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)(completion_ids=[[1] * 80, [1] * 90])
    [0.0, -0.5]
    """
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise UsageError(
            "soft_overlong_punishment: soft_punish_cache must be from 0 to max_completion_len "
            f"({max_completion_len}), got {soft_punish_cache}."
        )
    free = max_completion_len - soft_punish_cache

    def soft_overlong_punishment_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        over = [max(0, len(ids) - free) for ids in completion_ids]
        return [-min(1.0, n / soft_punish_cache if soft_punish_cache else n) if n else 0.0 for n in over]

    return soft_overlong_punishment_reward


@VERIFIERS.register(aliases=("get_repetition_penalty_reward",), makes=True)
def repetition_penalty(*, ngram_size: int = 3, max_penalty: float = -1.0) -> Callable[..., list[float]]:
    """The share of a completion's token n-grams that occurred in it before, times ``max_penalty``: add it to a reward.

        R = max_penalty * (1 - distinct n-grams / n-grams)

    Source: Demystifying Long Chain-of-Thought Reasoning (2502.03373), appendix C.2; TRL 1.16.

    >>> repetition_penalty(ngram_size=2)(completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5], [5]])
    [0.0, -0.75, 0.0]
    """
    if ngram_size < 1 or max_penalty > 0:
        raise UsageError(
            "repetition_penalty: ngram_size must be at least 1 and max_penalty at most 0, "
            f"got {ngram_size} and {max_penalty}."
        )

    def repetition_penalty_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        penalties = []
        for ids in completion_ids:
            ngrams = [tuple(ids[i : i + ngram_size]) for i in range(len(ids) - ngram_size + 1)]
            repeated = len(ngrams) - len(set(ngrams))
            penalties.append(max_penalty * repeated / len(ngrams) if repeated else 0.0)
        return penalties

    return repetition_penalty_reward


@VERIFIERS.register(aliases=("get_cosine_scaled_reward",), makes=True)
def cosine_scaled(
    *, max_len: int, min_value_wrong: float = -1.0, max_value_wrong: float = -0.5, min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable[..., list[float | None]]:  # fmt: skip
    """Right and short is best, wrong and short is worst: the verdict of ``numeric``, scaled by length along a cosine.

        R = long + (short - long) (1 + cos(pi min(1, |y| / max_len))) / 2

    ``(short, long)`` is ``(max_value_correct, min_value_correct)`` for a right completion and ``(min_value_wrong,
    max_value_wrong)`` for a wrong one; ``|y|`` counts tokens.
    Source: Demystifying Long Chain-of-Thought Reasoning (2502.03373), appendix C.1; TRL 1.16. Departure: TRL compares
    LaTeX with a package for it, we compare the last number.

    >>> cosine_scaled(max_len=4)(completions=["2", "3"], completion_ids=[[1, 1], [1, 1]], answer=["2", "2"])
    [0.75, -0.75]
    """
    if max_len < 1:
        raise UsageError(f"cosine_scaled: max_len must be at least 1, got {max_len}.")

    def cosine_scaled_reward(
        completions: list[Any], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        scores: list[float | None] = []
        for right, ids in zip(numeric(completions, **columns), completion_ids, strict=True):
            short, long = (max_value_correct, min_value_correct) if right else (min_value_wrong, max_value_wrong)
            height = 0.5 * (1 + math.cos(math.pi * min(1.0, len(ids) / max_len)))
            scores.append(None if right is None else long + (short - long) * height)
        return scores

    return cosine_scaled_reward


def verifier(text: str) -> Callable[..., Any] | None:
    """The function that a text names, with options in brackets where it has some; None: no verifier has this name.

    >>> verifier("exact") is exact, verifier("repetition_penalty(ngram_size=1)")(completion_ids=[[5, 5]]), verifier("x")
    (True, [-0.5], None)
    """
    name, bracket, _ = text.partition("(")
    if name not in VERIFIERS:
        return None
    entry = VERIFIERS.entry(name)
    options = _options(text) if bracket else {}
    entry.check_options(options, "verifier")
    missing = [k for k, default in entry.options.items() if default is inspect.Parameter.empty and k not in options]
    if missing:
        needed = ", ".join(f"{k}=..." for k in missing)
        raise UsageError(f"verifier {name!r} needs {', '.join(map(repr, missing))}: write {name}({needed}).")
    return entry.function(**options) if entry.tags.get("makes") else entry.function


def _options(text: str) -> dict[str, Any]:
    try:
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Call) and not call.args:
            return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise UsageError(f"reward {text!r}: options are written as name(option=value, option=value).")


def last_number(text: str) -> Decimal | None:
    """The number after the last ``####``, or else the last number of the text."""
    text = text.replace("\u2212", "-")  # the sign that typesetters write
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
    have = ", ".join(sorted(columns.keys() - set(KEYWORDS))) or "none"
    raise UsageError(
        f"a verifier needs the right answers: a column {' or '.join(map(repr, ANSWER_COLUMNS))}; it has {have}."
    )


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else "".join(str(m["content"]) for m in completion)
