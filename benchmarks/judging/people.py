"""Files of human judgements: read, matched by content, and blank ones to fill in."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefzoo.benchmarks.judging.answers import Answers, Verdicts
from prefzoo.benchmarks.judging.pairs import Shown, both_orders
from prefzoo.data.readers import DataSource, open_source
from prefzoo.feedback.templates import said
from prefzoo.files import replacing_file
from prefzoo.registry import UsageError
from prefzoo.seeds import derive_seed, generator

# What files call their columns; the first that is there counts.
COLUMNS = {
    "prompt": ("prompt", "instruction", "input", "question"),
    "a": ("answer_a", "a", "output_1", "response1", "response_a", "response_1", "first", "chosen"),
    "b": ("answer_b", "b", "output_2", "response2", "response_b", "response_2", "second", "rejected"),
}
LABELS = ("label", "winner", "verdict", "preference", "truth")
A_BETTER, B_BETTER, TIE = {"1", "a", "first", "answer_a"}, {"2", "b", "second", "answer_b"}, {"0", "tie", "c", "both"}


@dataclass(frozen=True)
class Labelled:
    """Pairs of answers with what people said: ``labels_NR``: 1 a is better, 0 b, 0.5 a tie, NaN nothing."""

    rows: list[dict[str, Any]]
    a: list[str]
    b: list[str]
    labels_NR: np.ndarray
    raters: tuple[str, ...]

    def majority(self) -> np.ndarray:
        """(N,) 1, 0.5 or 0: what more of them said than the opposite; NaN where nobody said anything."""
        there = ~np.isnan(self.labels_NR)
        lean = np.where(there, self.labels_NR - 0.5, 0).sum(1)
        return np.where(there.any(1), 0.5 + 0.5 * np.sign(lean), math.nan)


def read_labelled(source: Any, columns: Mapping[str, str] | None = None) -> Labelled:
    """Pairs that were judged: JSON Lines, CSV, Parquet (also gzipped); chosen and rejected count as a judgement.

    ``columns``: what the file calls ours (prompt, a, b, and label: one column, or several: x+y). Labels are 1, A
    or first; 2, B or second; 0, tie or C; empty where nobody judged.
    """
    found = dict(columns or {})
    name, read = open_source(DataSource.of(source), streaming=False)
    rows = [dict(row) for row in read()]
    if not rows:
        raise UsageError(f"{name}: no rows.")
    have = list(rows[0])
    for ours, names in COLUMNS.items():
        found.setdefault(ours, next((n for n in names if n in have), ""))
        if found[ours] not in have:
            raise UsageError(
                f"{name}: no column for {ours!r} among {', '.join(have)}; name it: --columns {ours}=THEIRS "
                f"(known by themselves: {', '.join(names)})."
            )
    if found["a"] == "chosen" and found["b"] == "rejected":  # tossed, or who always says "the first" would be right
        raters: tuple[str, ...] = ("chosen",)
        labels_NR = np.array([[float(derive_seed("sides", str(r["chosen"]), str(r["rejected"])) % 2)] for r in rows])
        rows = [r if label else {**r, "chosen": r["rejected"], "rejected": r["chosen"]}
                for r, [label] in zip(rows, labels_NR, strict=True)]  # fmt: skip
    else:
        raters = _raters(found.get("label"), have, name)
        labels_NR = np.array([[_label(row.get(r), name, i, r) for r in raters] for i, row in enumerate(rows)])
    extra = "input" if found["prompt"] == "instruction" and "input" in have else None  # as instruction data has it
    for row in rows:
        more = f"\n\n{row[extra]}" if extra and row[extra] else ""
        row["prompt"] = said(row[found["prompt"]]) + more
    a, b = ([str(r[found[side]]) for r in rows] for side in ("a", "b"))
    return Labelled(rows, a, b, labels_NR, raters)


def _raters(told: str | None, have: Sequence[str], name: str) -> tuple[str, ...]:
    wanted = [c.strip() for c in told.replace("+", ",").split(",")] if told else [c for c in have if c in LABELS]
    wanted = wanted or [c for c in have if c.startswith("annotator")]
    missing = [c for c in wanted if c not in have]
    if missing or not wanted:
        raise UsageError(
            f"{name}: no column {missing[0] if missing else 'with judgements'!r} among {', '.join(have)}; name it: "
            f"--columns label=THEIRS (known by themselves: {', '.join(LABELS)}, annotator...)."
        )
    return tuple(wanted)


def _label(value: Any, name: str, row: int, column: str) -> float:
    word = "" if value is None else str(value).strip().lower().removesuffix(".0")
    if word in ("", "nan"):
        return math.nan
    for words, label in ((A_BETTER, 1.0), (B_BETTER, 0.0), (TIE, 0.5)):
        if word in words:
            return label
    raise UsageError(
        f"{name}, row {row}, column {column!r}: {value!r:.40} is no judgement; write 1 or A, 2 or B, 0 or tie, or "
        "nothing."
    )


class HumanJudge:
    """People's judgements of a file, found by prompt and both texts in either order; what nobody judged has no
    verdict. Several people are averaged."""

    def __init__(self, file: str | Path, columns: Mapping[str, str] | None = None) -> None:
        found = read_labelled(file, columns)
        self._said: dict[tuple[str, str, str], list[float]] = {}
        for row, a, b, label_R in zip(found.rows, found.a, found.b, found.labels_NR, strict=True):
            for label in label_R[~np.isnan(label_R)].tolist():
                prompt = row["prompt"].strip()
                self._said.setdefault((prompt, a.strip(), b.strip()), []).append(label)
                self._said.setdefault((prompt, b.strip(), a.strip()), []).append(1 - label)

    def compare(self, answers: Answers, baseline: Answers) -> Verdicts:
        forward_B, backward_B = both_orders(answers, baseline, self._prefers)
        return Verdicts(forward_B, backward_B, {"missing": float(np.isnan(forward_B).sum())})

    def _prefers(self, shown: Sequence[Shown]) -> list[float | None]:
        keys = [(said(s.row["prompt"]).strip(), s.first.text.strip(), s.second.text.strip()) for s in shown]
        return [float(np.mean(self._said[k])) if k in self._said else None for k in keys]


def export_for_humans(answers: Mapping[str, Answers], baseline: str, file: str | Path, *, seed: int = 0) -> int:
    """Write the comparisons of every model with one of them as a sheet to fill in: blind, in shuffled order, the sides
    tossed; the judge ``{human: FILE}`` reads it. Texts that are equal are left out.

    Returns:
        How many comparisons it holds.
    """
    random, base = generator(seed, "sheet for people"), answers[baseline]
    sheet = {
        (said(mine.row(b)["prompt"]), *((x, y) if random.random() < 0.5 else (y, x)))
        for name, mine in answers.items()
        if name != baseline
        for b, (x, y) in enumerate(zip(mine.texts, base.texts, strict=True))
        if x != y
    }
    rows = sorted(sheet)
    with replacing_file(Path(file)) as aside, aside.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["prompt", "answer_a", "answer_b", "verdict"])
        writer.writerows([*rows[i], ""] for i in random.permutation(len(rows)))
    return len(rows)
