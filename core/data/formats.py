"""Reading data sets: from any source to checked rows of one type.

Structural faults stop; faults of single rows are dropped, counted and shown. What rows look like is in ``rows``, how
sources are read in ``readers``, how types turn into each other in ``convert``.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from prefzoo.data.convert import convert, derived, prompt_only, to_implicit
from prefzoo.data.readers import DataSource, open_source, sources_of
from prefzoo.data.rows import (
    Dataset,
    DataType,
    Fault,
    Passes,
    Report,
    Row,
    detect,
    digest,
    hash_of,
    is_dialogue,
    normal_columns,
    normal_row,
    question,
    show,
    split_text,
)
from prefzoo.registry import UsageError
from prefzoo.seeds import generator

__all__ = [
    "DataSource", "DataType", "Dataset", "Report", "Row", "convert", "load_dataset", "prompt_only", "split_by_prompt",
    "split_text", "to_implicit",
]  # fmt: skip
ImplicitPrompt = Literal["word", "character"]


def load_dataset(
    source: Any,
    *,
    strict: bool = False,
    columns: Mapping[str, str] | None = None,
    implicit_prompt: ImplicitPrompt = "word",
    deduplicate: bool = False,
    streaming: bool = False,
    without_prompts_of: Any = None,
    seed: int = 0,
) -> Dataset:
    """A data set of any type from any source, checked.

    Args:
        source: a file (JSON Lines, JSON, CSV, Parquet, Arrow; text files also gzipped), a folder of such files or of
            ``datasets.save_to_disk``, a hub id (``org/name`` or ``org/name:split``), a list of rows, an object of the
            ``datasets`` library, a :class:`DataSource`, or a list of these: a mixture. Sources with weights are mixed
            in these shares, with as many rows as there can be without repeating one; without, one follows another.
        strict: stop at the first faulty row instead of dropping it.
        columns: what the data calls its columns: ``{"chosen": "good"}``.
        implicit_prompt: where pairs without prompt are split: after the last shared turn or word, or, as TRL does it,
            before the first character that differs.
        deduplicate: leave out exact copies of earlier rows; they are counted in any case.
        streaming: rows are read in passes and never all in memory.
        without_prompts_of: evaluation data; rows that ask one of its prompts are left out and counted.
        seed: of the choice and the order of rows in a weighted mixture.

    >>> data = load_dataset([{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}])
    >>> data.type, data.rows[0]["chosen"]
    ('preference', ' 2')
    """
    if implicit_prompt not in ("word", "character"):
        raise UsageError(f"implicit_prompt={implicit_prompt!r}: expected 'word' or 'character'.")
    if isinstance(source, Dataset):
        if columns is not None or (streaming and not source.streamed):
            option = "streaming" if columns is None else "columns"
            raise UsageError(f"{option} has no effect on data {source.report.source}, which are loaded already.")
        if not deduplicate and without_prompts_of is None:
            return source

    def part(one: DataSource) -> Dataset:
        if isinstance(one.path, Dataset):
            return one.path
        named = one if one.columns is not None else replace(one, columns=columns)
        return _open(named, streaming, strict, implicit_prompt)

    sources = sources_of(source)
    parts = [part(one) for one in sources]
    for one in parts[1:]:
        if one.type != parts[0].type:
            raise UsageError(
                f"a mixture of types: data {parts[0].report.source} is {parts[0].type}, {one.report.source} is "
                f"{one.type}; convert one of them, or rename its columns."
            )
    firsts = [next(iter(one), None) for one in parts] if len(parts) > 1 else []
    if len({is_dialogue(row, parts[0].type) for row in firsts if row is not None}) > 1:
        names = ", ".join(one.report.source for one in parts)
        raise UsageError(f"a mixture of text and messages (data {names}): give all of them in one form.")
    held = None
    if without_prompts_of is not None:
        evaluation = (
            without_prompts_of
            if isinstance(without_prompts_of, Dataset)
            else load_dataset(without_prompts_of, columns=columns, implicit_prompt=implicit_prompt, streaming=streaming)
        )
        held = {question(row, evaluation.type) for row in evaluation}

    def kept(row: Row, seen: set[bytes], found: Report) -> bool:
        key = digest(row)
        if key in seen:
            if deduplicate:
                found.cut["exact copies of earlier rows left out"] += 1
                return False
            found.notes["rows are exact copies of earlier ones"] += 1
        seen.add(key)
        if held is not None and question(row, parts[0].type) in held:
            found.cut[f"rows left out: their prompt is in the evaluation data {evaluation.report.source}"] += 1
            return False
        return True

    left_out, order = Report("", parts[0].type), None
    if any(one.weight is not None for one in sources):  # the shares are those of what is kept
        earlier: set[bytes] = set()
        keep = [np.array([kept(row, earlier, left_out) for row in part], dtype=bool) for part in parts]
        order = _order(keep, [one.weight for one in sources], seed)

    def make(found: Report) -> Iterator[Row]:
        seen: set[bytes] = set()
        if order is None:
            yield from (row for part in parts for row in part if kept(row, seen, found))
        else:
            yield from _mixed(parts, order, found)
            found.add(left_out)
        for part in parts:
            found.add(part.report)

    report = Report(" + ".join(dict.fromkeys(p.report.source for p in parts)), parts[0].type)
    rows = Passes(make, report)
    if streaming:
        content = hash_of(digest(row) for row in rows)
        data = Dataset(rows, report.type, report, content)
    else:
        data = Dataset(list(rows), report.type, report)
    if not len(data):
        raise report.nothing_left()
    return data


def _open(source: DataSource, streaming: bool, strict: bool, implicit_prompt: ImplicitPrompt) -> Dataset:
    """One source, its type found out by the first row, not yet gone through."""
    name, read = open_source(source, streaming)
    if not streaming:
        in_memory = list(read())  # read once, whatever passes there are
        read = in_memory.__iter__
    first = next(read(), None)
    if first is None:
        raise UsageError(f"data {name}: no rows.")
    kind = detect(name, normal_columns(first, f"data {name}, row 1"))

    def make(found: Report) -> Iterator[Row]:
        dialogues: bool | None = None
        for number, raw in enumerate(read(), 1):
            where = f"data {name}, row {number}"
            try:
                row = normal_row(normal_columns(raw, where), kind, implicit_prompt, where)
                if dialogues is not None and is_dialogue(row, kind) != dialogues:
                    raise Fault("text where other rows have messages, or messages where they have text")
            except Fault as fault:
                if strict:
                    raise UsageError(f"{where}: {fault}; it starts {show(raw)}") from None
                found.drop(str(fault), f"row {number}: {show(raw)}")
                continue
            dialogues = is_dialogue(row, kind)
            yield row

    report = Report(name, kind)
    return Dataset(Passes(make, report), kind, report)


Order = tuple[np.ndarray, list[np.ndarray]]  # the source of each row of a mixture; which rows of each are taken


def _order(keep: list[np.ndarray], weights: list[float | None], seed: int) -> Order:
    """A weighted mixture: as many rows as the shares allow without repeating one, chosen and mixed by the seed."""
    given = [w for w in weights if isinstance(w, int | float) and 0 < w < math.inf]
    if len(given) < len(weights):
        raise UsageError(f"a mixture's weights are {weights}: every source needs one above zero, or none has one.")
    shares, sizes = np.array(given) / sum(given), np.array([mask.sum() for mask in keep])
    counts = np.floor((sizes / shares).min() * shares + 1e-9).astype(int)
    if not counts.all():
        raise UsageError(f"a mixture of {sizes.tolist()} rows with weights {weights}: one source would give no row.")
    random = generator(seed, "mixture")
    taken = [np.zeros(len(mask), dtype=bool) for mask in keep]
    for mask, here, count in zip(keep, taken, counts, strict=True):
        here[np.flatnonzero(mask)[random.permutation(mask.sum())[:count]]] = True
    return random.permutation(np.repeat(np.arange(len(keep)), counts)), taken


def _mixed(parts: list[Dataset], order: Order, found: Report) -> Iterator[Row]:
    sources, taken = order
    chosen = [itertools.compress(part, mask) for part, mask in zip(parts, taken, strict=True)]
    yield from (next(chosen[s]) for s in sources)
    for number, (part, mask) in enumerate(zip(parts, taken, strict=True), 1):
        list(chosen[number - 1])  # to the end, for the part's report
        found.notes[f"rows taken of the {len(mask)} of source {number}, {part.report.source}"] += int(mask.sum())


def split_by_prompt(data: Dataset, share: float, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Training and held-out rows: a share of the distinct prompts, chosen by the seed, is held out with all its rows.

    >>> data = load_dataset([{"prompt": p, "completion": c} for p in "abcd" for c in "xy"])
    >>> [len(part) for part in split_by_prompt(data, 0.25)]
    [6, 2]
    """
    if not 0 < share < 1:
        raise UsageError(f"share={share}: expected a number between 0 and 1.")
    prompts = {question(row, data.type) for row in data}
    if len(prompts) < 2:
        raise UsageError(f"data {data.report.source}: all rows have one prompt; none can be held out.")
    count = min(max(round(share * len(prompts)), 1), len(prompts) - 1)
    held = set(sorted(prompts, key=lambda p: hashlib.sha256(f"{seed}".encode() + p).digest())[:count])

    def part(wanted: bool, name: str) -> Dataset:
        def make(found: Report) -> Iterator[Row]:
            yield from (row for row in data if (question(row, data.type) in held) == wanted)
            if not wanted:
                found.add(data.report)
                found.notes["prompts held out for evaluation, with all their rows"] = count

        split = derived(data, data.type, make)
        split.report.source += name
        return split

    return part(False, ""), part(True, " (held out)")
