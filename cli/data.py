"""``prefzoo data``: what a data set is, what is wrong with it, and what a model would learn from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast, get_args

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefzoo.algorithm import algorithm_entry, create_algorithm
from prefzoo.cli.training import read_columns
from prefzoo.data.convert import can_become, convert
from prefzoo.data.formats import Dataset, load_dataset
from prefzoo.data.rows import ANSWERS, SIDES, DataType, is_dialogue
from prefzoo.data.samples import Kind, Samples, offsets_of, sides_of
from prefzoo.data.tokens import KIND_TO_TYPE, segments, tokenise
from prefzoo.models.load import load_tokenizer
from prefzoo.registry import UsageError, suggest

LEARNED = "bold green"
NATURAL: dict[DataType, Kind] = {  # what is shown of a type when nothing is asked for
    "preference": "pairs", "ranking": "rankings", "unpaired": "unpaired", "stepwise": "steps", "scored": "scored",
    "prompt_completion": "completions", "language_modeling": "completions",
    "prompt": "prompts",
}  # fmt: skip


def show_data(
    files: Sequence[str],
    model: str | None = None,
    purpose: str | None = None,
    examples: int = 3,
    columns: str | None = None,
    max_length: int | None = None,
    loss_on: str | None = None,
    strict: bool = False,
    implicit_prompt: str = "word",
) -> None:
    """Print what a data set is; with a model's tokenizer, also its lengths and the tokens that carry loss.

    Args:
        files: files, folders or hub ids; several are a mixture.
        model: folder or hub id whose tokenizer is used.
        purpose: an algorithm, or a kind of samples (pairs, rankings, completions, ...); None: what the type is for.
        examples: rows that are shown.
        columns: what the data calls its columns: ``chosen=good,rejected=bad``.
        max_length: of prompt and completion, in tokens; None: 1024.
        loss_on: as in training: completion, assistant or all.
        implicit_prompt: where pairs without prompt are split: word or character.
    """
    kind = None if purpose is None else _kind(purpose)
    for option, value in (("--loss-on", loss_on), ("--max-length", max_length)):
        if model is None and value is not None:
            raise UsageError(f"{option} has no effect on text alone: give a --model, whose tokenizer reads it.")
    data = load_dataset(
        list(files), strict=strict, columns=None if columns is None else read_columns(columns),
        implicit_prompt=cast(Any, implicit_prompt),
    )  # fmt: skip
    console = Console(highlight=False, soft_wrap=True)
    if model is None:
        if kind is not None and not (kind == "completions" and data.type == "language_modeling"):
            _say(console, data.report.lines())
            data = convert(data, KIND_TO_TYPE[kind])
        _say(console, data.report.lines())
        _describe(console, data)
        for number, shown in enumerate(data.rows[:examples], 1):
            console.print(f"\n-- row {number}")
            for column in _ordered(shown):
                console.print(Text.assemble((f"{column}: ", "bold"), _plain(shown[column])))
        return
    kind = kind or NATURAL[data.type]
    tokenizer = load_tokenizer(model)
    samples, report = tokenise(data, tokenizer, kind, max_length=max_length or 1024, loss_on=cast(Any, loss_on))
    report.masked = None  # the examples say it
    _say(console, data.report.lines()[:1])
    _describe(console, data)
    console.print(f"as {kind}: {len(samples)} rows", style="bold")
    _say(console, report.lines()[1:])
    _lengths(console, samples)
    for row in range(min(examples, len(samples))):
        console.print(f"\n-- row {row + 1}")
        show_row(console, samples, tokenizer, row)


def _kind(purpose: str) -> Kind:
    kinds: tuple[Kind, ...] = get_args(Kind)
    for kind in kinds:
        if purpose == kind:
            return kind
    try:
        return create_algorithm(algorithm_entry(purpose).name).data
    except UsageError as error:
        raise UsageError(
            f"{purpose!r} is neither a kind of samples ({', '.join(kinds)}) nor an algorithm{suggest(purpose, kinds)} "
            f"{error}"
        ) from None


def _say(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(Text(line))


def _describe(console: Console, data: Dataset) -> None:
    """Columns, the form of the rows, and what they can be used for."""
    first = data.rows[0]
    form = "messages" if is_dialogue(first, data.type) else "text"
    console.print(Text(f"  columns: {', '.join(_ordered(first))} ({form})"))
    uses = [kind for kind, to in KIND_TO_TYPE.items() if data.type in can_become(to) or NATURAL[data.type] == kind]
    if not {"score", "scores", "score_chosen"} & set(first):
        uses = [kind for kind in uses if kind != "scored"]
    if data.type == "language_modeling" and form == "text":
        uses = ["completions"]
    console.print(Text(f"  can be used as: {', '.join(uses)}"))


def _ordered(row: dict[str, Any]) -> list[str]:
    """Columns, those with a meaning of their own first."""
    known = [c for c in ("prompt", *SIDES[1:], *ANSWERS, "score", "tie", "margin") if c in row]
    return [*dict.fromkeys(known), *(c for c in row if c not in known)]


def _plain(value: Any, width: int = 400) -> str:
    """A value as text, the middle of a long one left out; messages line by line."""
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        return "".join(f"\n  {m['role']}: {_plain(m.get('content') or m.get('tool_calls'))}" for m in value)
    if isinstance(value, list) and any(isinstance(v, str | list) for v in value):
        return "".join(f"\n  {i}. {_plain(v, 200)}" for i, v in enumerate(value, 1))
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= width else f"{text[: width // 2]} ... {text[-width // 2 :]}"


def _lengths(console: Console, samples: Samples) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("tokens of", "min", "median", "95 %", "max", "all"):
        table.add_column(name, justify="left" if name == "tokens of" else "right")
    measured = {"prompts": samples.prompts.lengths}
    if samples.kind == "pairs":
        measured |= {"chosen": samples.completions.lengths[0::2], "rejected": samples.completions.lengths[1::2]}
    elif samples.kind != "prompts":
        measured["completions"] = samples.completions.lengths[samples.completions.lengths > 0]
    if "trainable" in samples.tokens:
        done = offsets_of(samples.tokens["trainable"].numpy())[samples.completions.offsets]
        measured["with loss"] = np.diff(done)[samples.completions.lengths > 0]
    for name, lengths in measured.items():
        points = [lengths.min(), np.median(lengths), np.quantile(lengths, 0.95), lengths.max(), lengths.sum()]
        table.add_row(name, *(f"{int(p):,}" for p in points))
    console.print(table)


def show_row(console: Console, samples: Samples, tokenizer: Any, row: int) -> None:
    """A row as the model reads it; on a terminal the tokens that carry loss are coloured, elsewhere in [[ ]]."""
    if samples.kind == "prompts":
        console.print(Text(tokenizer.decode(samples.prompts[row])))
        return
    first = row * samples.per_row
    prompt = tokenizer.decode(samples.prompts[samples.prompt_B[first]])
    console.print(Text(prompt))
    for b, name in enumerate(sides_of(samples), first):
        if not len(samples.completions[b]):  # a shorter ranking
            continue
        mask = None
        if "trainable" in samples.tokens:
            mask = samples.tokens["trainable"][
                samples.completions.offsets[b] : samples.completions.offsets[b + 1]
            ].tolist()
        label = ""
        if samples.kind == "unpaired":
            label = " (desirable)" if samples.columns["desirable"][b] else " (undesirable)"
        elif "score" in samples.columns:
            label = f" (score {samples.columns['score'][b]:g})"
        line = Text.assemble((f"{name}{label}: ", "bold"))
        for text, learned in segments(tokenizer, samples.completions[b].tolist(), mask):
            if console.is_terminal:
                line.append(text, style=LEARNED if learned else None)
            else:
                line.append(f"[[{text}]]" if learned else text)
        console.print(line)
