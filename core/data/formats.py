"""Reading data sets: rows of any supported type, found out by their columns, checked, and converted to another type.

Types (TRL's): ``preference`` (chosen, rejected; prompt explicit or implicit), ``unpaired`` (prompt, completion,
label), ``prompt_completion``, ``prompt``. A side is a string, or a list of messages for the tokenizer's chat template.
Structural faults stop; faults of single rows are dropped, counted and shown.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prefzoo.registry import UsageError, nearest, suggest

DataType = Literal["preference", "unpaired", "prompt_completion", "prompt"]
Row = dict[str, Any]

COLUMNS: dict[DataType, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "prompt_completion": ("prompt", "completion"),
    "prompt": ("prompt",),
}
SIDES = ("prompt", "chosen", "rejected", "completion")
ASSISTANT = "\n\nAssistant:"  # turn marker of HH-style transcripts


@dataclass
class Report:
    """What was found in a data set, and what was done to it."""

    source: str
    type: DataType
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # fault -> one example in words
    masked: str | None = None  # the first row, with what the loss sees in brackets

    def drop(self, reason: str, example: str) -> None:
        self.dropped[reason] += 1
        self.examples.setdefault(reason, example[:300])

    def lines(self) -> list[str]:
        """The report in words."""
        out = [f"data {self.source}: {self.rows} rows, type {self.type}"]
        out += [f"  dropped {n} ({reason}); for example {self.examples[reason]}" for reason, n in self.dropped.items()]
        out += [f"  {n} {what}" for what, n in self.cut.items()]
        return out + ([f"  loss on what stands in [[ ]]: {self.masked}"] if self.masked else [])


@dataclass
class Dataset:
    """Rows of one type, with the report on how they were read."""

    rows: list[Row]
    type: DataType
    report: Report

    def hash(self) -> str:
        """Hash of the content."""
        text = json.dumps(self.rows, sort_keys=True, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_dataset(source: Any, *, strict: bool = False) -> Dataset:
    """A data set from a JSON Lines or JSON file (optionally gzipped), a list of rows, or a ``datasets.Dataset``.

    ``strict``: stop at the first faulty row instead of dropping it.

    >>> data = load_dataset([{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}])
    >>> data.type, data.rows[0]["chosen"]
    ('preference', ' 2')
    """
    if isinstance(source, Dataset):
        return source
    name, rows = _read(source)
    if not rows:
        raise UsageError(f"data {name}: no rows.")
    kind = _detect(name, rows)
    report = Report(name, kind)
    kept = []
    for number, row in enumerate(rows, 1):
        fault = _fault(row, kind)
        if fault is None:
            kept.append(_split_prompt(row) if kind == "preference" and row.get("prompt") is None else dict(row))
            fault = _fault_after_split(kept[-1], kind)
            if fault is None and isinstance(kept[-1]["prompt"], str) != isinstance(kept[0]["prompt"], str):
                fault = "text where other rows have messages, or messages where they have text"
            if fault:
                kept.pop()
        if fault and strict:
            raise UsageError(f"data {name}, row {number}: {fault}; it starts {_show(row)}")
        if fault:
            report.drop(fault, f"row {number}: {_show(row)}")
    if not kept:
        raise UsageError("\n".join([f"data {name}: no usable row is left.", *report.lines()[1:]]))
    report.rows = len(kept)
    return Dataset(kept, kind, report)


def _read(source: Any) -> tuple[str, list[Row]]:
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.exists():
            near = suggest(path.name, [p.name for p in path.parent.glob("*")]) if path.parent.exists() else "."
            raise UsageError(f"data {str(path)!r}: no such file{near}")
        if path.is_dir():
            raise UsageError(f"data {str(path)!r} is a folder; give a .jsonl or .json file (optionally .gz).")
        return path.name, _read_file(path)
    if isinstance(source, Sequence):
        rows = list(source)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, Mapping):
                raise UsageError(f"data (list), row {number}: expected a mapping, got {type(row).__name__}.")
        return "list", [dict(r) for r in rows]
    if hasattr(source, "column_names") and isinstance(source, Iterable):  # a datasets.Dataset
        return "datasets.Dataset", [dict(r) for r in source]
    raise UsageError(
        f"data of type {type(source).__name__} cannot be read; give a path, a list of rows or a datasets.Dataset."
    )


def _read_file(path: Path) -> list[Row]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")  # Excel writes a mark
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UsageError(f"data {str(path)!r} cannot be read: {error}.") from error
    if text.lstrip()[:1] == "[":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"data {str(path)!r} is not JSON: {error}.") from error
        numbered = list(enumerate(rows, 1))
    else:
        numbered = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                numbered.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise UsageError(
                    f"data {str(path)!r}, line {number} is not JSON ({error.msg}): {line[:80]!r}. "
                    "Expected one JSON object per line."
                ) from error
    for number, row in numbered:
        if not isinstance(row, dict):
            raise UsageError(f"data {str(path)!r}, line {number}: expected a JSON object, got {type(row).__name__}.")
    return [row for _, row in numbered]


def _detect(name: str, rows: list[Row]) -> DataType:
    columns = set(rows[0])
    for kind, needed in COLUMNS.items():
        if columns.issuperset(needed):
            for number, row in enumerate(rows, 1):
                for column in needed:
                    if column not in row:
                        raise UsageError(f"data {name}, row {number}: column {column!r} is missing (type {kind}).")
            return kind
    hints = [
        f"{have!r} looks like {want!r}"
        for have in columns
        for want in ("prompt", "chosen", "rejected", "completion", "label")
        if have not in SIDES and nearest(have, [want])
    ]
    raise UsageError(
        f"data {name}: columns {', '.join(sorted(columns))} fit no known type"
        f"{' (' + '; '.join(hints) + ')' if hints else ''}. Expected one of: "
        + "; ".join(f"{kind} ({', '.join(needed)})" for kind, needed in COLUMNS.items())
    )


def _fault(row: Row, kind: DataType) -> str | None:
    for side in SIDES:
        value = row.get(side)
        if side in row and not (value is None and side not in COLUMNS[kind]) and not _is_text(value):
            return f"{side} is {type(value).__name__}, not text or a list of messages"
    if len({isinstance(row[side], str) for side in SIDES if row.get(side) is not None}) > 1:
        return "text and messages in one row"
    if kind == "unpaired" and not isinstance(row["label"], bool) and row["label"] not in (0, 1):
        return f"label is {row['label']!r}, not true or false"
    return None


def _fault_after_split(row: Row, kind: DataType) -> str | None:
    if kind == "preference":
        if row["chosen"] == row["rejected"]:
            return "chosen and rejected are identical"
        if not row["chosen"] or not row["rejected"]:
            return "an empty side"
    elif kind in ("unpaired", "prompt_completion") and not row["completion"]:
        return "an empty completion"
    if not row["prompt"]:
        return "an empty prompt"
    return None


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in value)


def _split_prompt(row: Row) -> Row:
    """Give a pair without prompt its implicit one: what the two sides share, up to a turn or a word boundary."""
    chosen, rejected = row["chosen"], row["rejected"]
    cut = split_turns(chosen, rejected) if isinstance(chosen, list) else split_text(chosen, rejected)
    return {**row, "prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def split_turns(chosen: list[Any], rejected: list[Any]) -> int:
    """Number of leading turns that two dialogues share."""
    pairs = zip(chosen, rejected, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))


def split_text(chosen: str, rejected: str) -> int:
    """Length of the implicit prompt of two strings.

    A transcript is cut after its last shared ``Assistant:``; other text where the common prefix last ends a word, so
    that no word is torn and the space stays with the completion.

    >>> text = "Sky? Answer: blue", "Sky? Answer: black"
    >>> text[0][: split_text(*text)]
    'Sky? Answer:'
    """
    pairs = zip(chosen, rejected, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    turn = chosen.rfind(ASSISTANT, 0, shared)
    if turn >= 0:
        return turn + len(ASSISTANT)
    both_go_on = chosen[shared : shared + 1].isspace() and rejected[shared : shared + 1].isspace()
    boundaries = [m.start() for m in re.finditer(r"\s+", chosen[: shared + both_go_on])]
    return boundaries[-1] if boundaries else 0


def _show(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)[:200]


# ---------------------------------------------------------------------------------------------- conversions


def _pairs_to_completions(row: Row) -> list[Row]:
    return [{**_rest(row), "completion": row["chosen"]}]


def _pairs_to_unpaired(row: Row) -> list[Row]:
    return [{**_rest(row), "completion": row[side], "label": side == "chosen"} for side in ("chosen", "rejected")]


def _unpaired_to_completions(row: Row) -> list[Row]:
    return [{k: v for k, v in row.items() if k != "label"}] if row["label"] else []


def prompt_only(row: Row) -> Row:
    """The row without answers and labels; the user's other columns stay."""
    return {k: v for k, v in row.items() if k not in ("chosen", "rejected", "completion", "label")}


def _to_prompt(row: Row) -> list[Row]:
    return [prompt_only(row)]


def _rest(row: Row) -> Row:
    return {k: v for k, v in row.items() if k not in ("chosen", "rejected")}


CONVERSIONS: dict[tuple[DataType, DataType], Callable[[Row], list[Row]]] = {
    ("preference", "prompt_completion"): _pairs_to_completions,
    ("preference", "unpaired"): _pairs_to_unpaired,
    ("preference", "prompt"): _to_prompt,
    ("unpaired", "prompt_completion"): _unpaired_to_completions,
    ("unpaired", "prompt"): _to_prompt,
    ("prompt_completion", "prompt"): _to_prompt,
}


def convert(data: Dataset, to: DataType) -> Dataset:
    """The same data as another type: pairs become desirable and undesirable rows, chosen answers, or prompts.

    Rows made from one stay neighbours; the training order is shuffled by (seed, epoch) anyway, so classes mix.
    """
    if data.type == to:
        return data
    conversion = CONVERSIONS.get((data.type, to))
    if conversion is None:
        possible = [a for a, b in CONVERSIONS if b == to]
        raise UsageError(
            f"data {data.report.source} is of type {data.type}; it cannot become {to}. "
            f"Types that can: {', '.join([to, *possible])}."
        )
    rows = [new for row in data.rows for new in conversion(row)]
    report = Report(data.report.source, to)
    if to == "prompt":  # several rows of one prompt are one prompt
        distinct = list({json.dumps(r, sort_keys=True, default=str): r for r in rows}.values())
        if len(distinct) < len(rows):
            report.cut["rows left out that ask the same as another"] = len(rows) - len(distinct)
        rows = distinct
    report.rows = len(rows)
    return Dataset(rows, to, report)
