"""What a report is made of, whatever it is written as: sections of text, tables, charts, code, answers.

HTML and Markdown are two ways to write the same page, so they cannot say different things.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

Tone = Literal["", "better", "worse", "equivalent", "undecided"]


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        text: what is read.
        note: said smaller below it, such as an interval.
        sort: by what its column is sorted; None sorts last.
        bar: low, estimate and high, drawn on the scale of its column.
        tone: a verdict that colours it.
        tip: more of it, shown on hover and focus.
        raw: text that a machine wrote, such as an error: shown letter by letter.
    """

    text: str
    note: str = ""
    sort: float | str | None = None
    bar: tuple[float, float, float] | None = None
    tone: Tone = ""
    tip: str = ""
    raw: bool = False


@dataclass(frozen=True)
class Column:
    """A column of a table; `scale` is low, mark and high of its bars."""

    title: str
    hint: str = ""
    number: bool = True
    scale: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Words:
    """A paragraph, or a list of sentences of which the first is the most important."""

    kind: ClassVar[str] = "words"
    sentences: Sequence[str]
    lead: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under columns; `quiet` ones are folded away in HTML."""

    kind: ClassVar[str] = "table"
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    quiet: bool = False
    filtered: bool = False


@dataclass(frozen=True)
class Matrix:
    """Row against column; Markdown has the table of pairs instead."""

    kind: ClassVar[str] = "matrix"
    title: str
    names: Sequence[str]
    cells: Sequence[Sequence[Cell | None]]


@dataclass(frozen=True)
class Chart:
    """An SVG, what it shows in words, and the numbers in it; Markdown has the numbers."""

    kind: ClassVar[str] = "chart"
    title: str
    svg: str
    numbers: Table


@dataclass(frozen=True)
class Choice:
    """Charts of which one is seen, such as the same curves over several units."""

    kind: ClassVar[str] = "choice"
    title: str
    options: Mapping[str, Chart]


@dataclass(frozen=True)
class Code:
    kind: ClassVar[str] = "code"
    text: str
    language: str = ""
    title: str = ""


@dataclass(frozen=True)
class Answers:
    """Answers side by side.

    Args:
        prompts: {"prompt": number, "text": ..., "answers": {method: [{"text": ..., "scores": {...}}, ...]}}.
        methods: their order; the first few are shown at first.
    """

    kind: ClassVar[str] = "answers"
    task: str
    methods: Sequence[str]
    prompts: Sequence[Mapping[str, Any]]


Block = Words | Table | Matrix | Chart | Choice | Code | Answers


@dataclass(frozen=True)
class Section:
    """A heading, one sentence on how to read what follows, and that."""

    title: str
    how: str
    blocks: Sequence[Block]
    task: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report. `facts` are the line under its title."""

    title: str
    about: str
    facts: Sequence[str]
    sections: Sequence[Section]
    picture: str = ""
    tasks: Sequence[str] = field(default_factory=tuple)
