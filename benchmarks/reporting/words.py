"""Numbers as words, and text of others made harmless to the eye."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from prefzoo.benchmarks.reporting.page import Cell

Result = Mapping[str, Any]
NONE = "–"
BASELINES = ("start", "sft_more")
# What could hide or turn round text that follows: control characters, marks of direction, halves of a character.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")


def plain(value: Any) -> Any:
    """Text, or all text in a value of JSON, with characters that cannot be seen spelled out.

    >>> plain({"a": ["b\\u202ec\\x1b[31m", 1]})
    {'a': ['b⟨U+202E⟩c⟨U+001B⟩[31m', 1]}
    """
    if isinstance(value, str):
        return UNSEEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", value.replace("\r\n", "\n"))
    if isinstance(value, Mapping):
        return {plain(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def ends(estimate: Result | None) -> tuple[float, float] | None:
    """The interval of an estimate, where it has a finite one with some width."""
    low, high = (estimate or {}).get("ci") or (None, None)
    return (float(low), float(high)) if finite(low) and finite(high) and low < high else None


def digits(value: float) -> int:
    """Decimals that give three digits or so: 2 for 6.38, 1 for 12.5, 0 for 224.

    >>> [digits(x) for x in (0.0213, 0.31, 6.4, 31.6, 224.0)]
    [4, 2, 2, 1, 0]
    """
    size = abs(value)
    if size == 0 or size >= 0.1:
        return 0 if size >= 100 else 1 if size >= 10 else 2
    return min(6, 2 - math.floor(math.log10(size)))


def decimals(half: float) -> int:
    """Decimals of a mean, by half the width of its interval: more of them would be noise.

    >>> [decimals(x) for x in (0.0004, 0.02, 0.3, 4.0, 150.0, 1e-9)]
    [4, 2, 2, 1, 0, 2]
    """
    return 0 if half >= 10 else 1 if half >= 1 else 2 if half >= 0.01 or half < 5e-5 else 3 if half >= 0.001 else 4


def number(value: Any) -> str:
    """A number in about three digits; what is not one is a dash."""
    if isinstance(value, bool) or not finite(value):
        return str(value) if isinstance(value, str | bool) else NONE
    return unsigned(value, 0 if float(value).is_integer() and abs(value) >= 10 else digits(value))


def percent(value: Any, decimals: int = 1) -> str:
    return f"{100 * value:.{decimals}f} %".replace("-", "−") if finite(value) else NONE


def p_words(p: Any) -> str:
    """``0.03``, and not smaller than ``< 0.001``."""
    return NONE if not finite(p) else "< 0.001" if p < 0.001 else f"{p:.2g}"


def share_cell(estimate: Result | None, *, bar: bool = True, tip: str = "") -> Cell:
    """A share in percent over its interval; a t interval of few seeds can reach beyond what a share can be."""
    if not estimate or not finite(estimate.get("estimate")):
        return Cell(NONE)
    value, span = estimate["estimate"], ends(estimate)
    if span is None:
        return Cell(f"{100 * value:.1f}", sort=value, tip=tip)
    low, high = max(span[0], 0.0), min(span[1], 1.0)
    note = f"{100 * low:.1f} to {100 * high:.1f}"
    return Cell(f"{100 * value:.1f}", note, value, (low, value, high) if bar else None, tip=tip)


def points_cell(estimate: Result | None) -> Cell:
    """A difference of shares in percentage points over its interval."""
    if not estimate or not finite(estimate.get("estimate")):
        return Cell(NONE)
    span, value = ends(estimate), estimate["estimate"]
    note = "" if span is None else f"{signed(100 * span[0], 1)} to {signed(100 * span[1], 1)}"
    return Cell(signed(100 * value, 1), note, value)


def value_cell(estimate: Result | float | None, *, plus: bool = False) -> Cell:
    """A mean over its interval, or a bare number."""
    if isinstance(estimate, Mapping):
        value, span = estimate.get("estimate"), ends(estimate)
    else:
        value, span = estimate, None
    if not finite(value):
        return Cell(NONE)
    places = digits(value) if span is None else decimals((span[1] - span[0]) / 2)
    show = (lambda x: signed(x, places)) if plus else (lambda x: unsigned(x, places))
    note = "" if span is None else f"{show(span[0])} to {show(span[1])}"
    return Cell(show(value) if span or plus else number(value), note, float(value))


def unsigned(value: float, places: int) -> str:
    """With a sign where it is below zero, also after rounding.

    >>> unsigned(-0.001, 2), unsigned(-1234.5, 1)
    ('0.00', '−1,234.5')
    """
    return f"{value:z,.{places}f}".replace("-", "−")


def signed(value: float, places: int = 2) -> str:
    """With its sign, and a zero without one.

    >>> signed(-1.25), signed(0.0), signed(0.5, 1)
    ('−1.25', '0.00', '+0.5')
    """
    text = f"{value:+.{places}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def baselines(task: Result) -> tuple[str, ...]:
    """What win rates are shown against: those of a suite, or the one model of a comparison."""
    return (task["reference"],) if "reference" in task else BASELINES


def ranked(task: Result) -> list[str]:
    """Methods by their win rate against the start, best first; the baselines last."""

    def order(name: str) -> tuple[bool, float, str]:
        win = (task["methods"][name].get("win") or {}).get("estimate")
        return name in baselines(task), -win if finite(win) else 1.0, name

    return sorted(task["methods"], key=order)


def against_more(task: Result) -> dict[str, str]:
    """Of each method the verdict against ``sft_more`` (of a comparison: its baseline), where the pair was judged."""
    more = baselines(task)[-1]
    turned = {"better": "worse", "worse": "better"}
    said = {p["a"]: p["verdict"] for p in task["pairs"] if p["b"] == more}
    return said | {p["b"]: turned.get(p["verdict"], p["verdict"]) for p in task["pairs"] if p["a"] == more}


def stamp(results: Result) -> str:
    """What the errors cover."""
    if results["this_run_only"]:
        return "this run only: one seed, intervals over prompts"
    starts = results.get("start_seeds", 1)
    return f"{results['seeds']} seeds" + (f" over {starts} starts" if starts > 1 else "")


def last_line(reason: str) -> str:
    """What an error says, without the way to it."""
    return (reason.strip().splitlines() or ["no reason was given"])[-1].strip()
