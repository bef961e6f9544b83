"""``prefzoo judge``: how good a judge is, on pairs that people have judged."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from prefzoo.benchmarks.judging import JudgeSpec
from prefzoo.benchmarks.judging.quality import measure
from prefzoo.cli.training import read_columns

HEAD = ("", "pairs", "accuracy", "kappa", "alpha", "ties", "unparsed", "first place", "flips", "longer")


def judge(
    judge: str, file: str, columns: str | None, by: str | None, tokenizer: str | None, cache: str, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure, then print a line for the whole file and for each part of it."""
    from prefzoo.models.load import load_tokenizer

    found = measure(
        JudgeSpec.parse(judge), file, columns=None if columns is None else read_columns(columns), by=by,
        tokenizer=None if tokenizer is None else load_tokenizer(tokenizer), cache=cache, device=device,
    )  # fmt: skip
    print(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))


def _lines(found: dict[str, Any]) -> Iterable[str]:
    table = [HEAD, *(_row(name, part) for name, part in found["parts"].items()), _row("all", found["whole"])]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEAD))]
    left = f", {found['left_out']} without a judgement left out" if found["left_out"] else ""
    yield f"judge {found['judge']!r} on {found['pairs']} pairs{left}; ± is the half of a 95 % interval"
    for row in table:
        name, *cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join([name.strip().ljust(widths[0]), *cells])
    if found["people"] is not None:
        yield f"people among themselves: alpha {_number(found['people']['alpha'])}"
    if found["spent"]:
        yield "spent: " + ", ".join(f"{k} {v:g}" for k, v in found["spent"].items())
    yield (
        "first place: how much more than 1/2 the answer shown first is preferred; flips: share of the pairs whose two "
        "orders name different winners; longer: how much more the longer answer is preferred than by the labels."
    )


def _row(name: str, part: dict[str, Any]) -> tuple[str, ...]:
    return (
        name, str(part["n"]), _number(part["accuracy"]), _number(part["kappa"]), _number(part["alpha"]),
        f"{part['ties']:.3f}", f"{part['unparsed']:.3f}", _number(part["position_bias"]), _number(part["flip_rate"]),
        _number(part["length_bias"]),
    )  # fmt: skip


def _number(told: dict[str, Any] | None) -> str:
    """An estimate and the half of its interval; a dash where there is none."""
    if told is None or told["estimate"] is None or told["estimate"] != told["estimate"]:
        return "–"
    low, high = told["ci"]
    return f"{told['estimate']:.3f} ± {(high - low) / 2:.3f}"
