"""Rows: the types of data sets, found out by their columns, and the normal form that every row is brought to.

Types are TRL's (``language_modeling``, ``prompt``, ``prompt_completion``, ``preference``, ``unpaired``, ``stepwise``)
and, beyond them, ``ranking`` and ``scored``. A side is a string, or a list of messages for the tokenizer's chat
template. What is wrong with the structure of the data raises ``UsageError``; what is wrong with one row, ``Fault``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from prefzoo.registry import UsageError, nearest, suggest

DataType = Literal[
    "preference", "stepwise", "ranking", "unpaired", "scored", "prompt_completion", "language_modeling", "prompt"
]
Row = dict[str, Any]

SHAPES: tuple[tuple[DataType, tuple[str, ...]], ...] = (  # the first that a row has the columns of is its type
    ("preference", ("chosen", "rejected")),
    ("stepwise", ("prompt", "completions", "labels")),
    ("ranking", ("prompt", "completions", "scores")),
    ("ranking", ("prompt", "completions", "ranks")),
    ("unpaired", ("prompt", "completion", "label")),
    ("scored", ("prompt", "completion", "score")),
    ("prompt_completion", ("prompt", "completion")),
    ("language_modeling", ("messages",)),
    ("prompt", ("prompt",)),
    ("language_modeling", ("text",)),
)
SIDES = ("prompt", "chosen", "rejected", "completion", "messages", "text")
ANSWERS = ("chosen", "rejected", "completion", "completions", "label", "labels", "scores", "ranks")
CONTENT = {*SIDES, *ANSWERS, "score", "tie"}  # columns with a meaning of their own; all others are the user's
ROLES = {  # what other tools call them
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "function_call": "assistant", "system": "system",
    "developer": "developer", "tool": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
OFTEN = {  # what other data sets call our columns
    "question": "prompt", "query": "prompt", "instruction": "prompt", "input": "prompt", "problem": "prompt",
    "answer": "completion", "response": "completion", "output": "completion", "good": "chosen", "bad": "rejected",
}  # fmt: skip
ASSISTANT = "\n\nAssistant:"  # turn marker of HH-style transcripts


class Fault(Exception):
    """What is wrong with one row: it is dropped and counted."""


@dataclass
class Report:
    """What was found in a data set, and what was done to it."""

    source: str
    type: DataType
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)  # what else was cut or left out, in words
    notes: Counter[str] = field(default_factory=Counter)  # what was found and left as it is
    examples: dict[str, str] = field(default_factory=dict)  # fault -> one example in words
    masked: str | None = None  # the first row, with what the loss sees in brackets

    def drop(self, reason: str, example: str) -> None:
        self.dropped[reason] += 1
        self.examples.setdefault(reason, example[:300])

    def add(self, other: Report) -> None:
        """Count what another report counted, too."""
        self.dropped += other.dropped
        self.cut += other.cut
        self.notes += other.notes
        self.examples = {**other.examples, **self.examples}

    def lines(self) -> list[str]:
        """The report in words."""
        out = [f"data {self.source}: {self.rows} rows, type {self.type}"]
        out += [f"  dropped {n} ({reason}); for example {self.examples[reason]}" for reason, n in self.dropped.items()]
        out += [f"  {n} {what}" for what, n in [*self.cut.items(), *self.notes.items()]]
        return out + ([f"  loss on what stands in [[ ]]: {self.masked}"] if self.masked else [])

    def nothing_left(self) -> UsageError:
        return UsageError("\n".join([f"data {self.source}: no usable row is left.", *self.lines()[1:]]))


class Passes:
    """Rows that are made anew for each pass; the report says what the last whole pass found."""

    def __init__(self, make: Callable[[Report], Iterator[Row]], report: Report) -> None:
        self._make, self._report = make, report

    def __iter__(self) -> Iterator[Row]:
        found = Report(self._report.source, self._report.type)
        for row in self._make(found):
            found.rows += 1
            yield row
        self._report.__dict__.update(found.__dict__)


class Dataset:
    """Rows of one type, with the report on how they were read: a list, or passes over a source (streaming)."""

    def __init__(self, rows: list[Row] | Passes, type: DataType, report: Report, digest: str | None = None) -> None:
        self._rows, self.type, self.report, self._digest = rows, type, report, digest

    @property
    def streamed(self) -> bool:
        return isinstance(self._rows, Passes)

    @property
    def rows(self) -> list[Row]:
        """All rows, in memory."""
        if isinstance(self._rows, Passes):
            raise UsageError(
                f"data {self.report.source} is streamed, its rows are never all in memory: iterate over it."
            )
        return self._rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __len__(self) -> int:
        if isinstance(self._rows, Passes):  # known after the first pass
            return self.report.rows or sum(1 for _ in self)
        return len(self._rows)

    def hash(self) -> str:
        """Hash of the content; the same whether it is streamed or not."""
        if self._digest is None:
            self._digest = hash_of(digest(row) for row in self)
        return self._digest


def digest(value: Any) -> bytes:
    """16 bytes that stand for a row, or for a part of one."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:16]


def _plain(value: Any) -> Any:
    """What JSON has no words for; of arrays all items, where their text would leave some out."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def hash_of(digests: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for one in digests:
        total.update(one)
    return total.hexdigest()[:16]


def show(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)[:200].encode(errors="replace").decode()


# ---------------------------------------------------------------------------------------------- type


def detect(name: str, row: Row) -> DataType:
    """The type of a data set, by the columns of its first row."""
    for kind, needed in SHAPES:
        if needed_in(needed, row):
            return kind
    raise UsageError(
        f"data {name}: columns {', '.join(sorted(map(str, row)))} fit no known type{lookalikes(row)}. Expected one of: "
        + "; ".join(f"{kind} ({', '.join(needed)})" for kind, needed in SHAPES)
        + ". Columns of other names: columns={'prompt': 'question', ...}."
    )


def lookalikes(row: Row) -> str:
    """Columns that may be ours misspelled, in brackets; or nothing."""
    known = {column for _, needed in SHAPES for column in needed}
    others = [str(have) for have in row if have not in known]
    hints = [f"{have!r} looks like {near!r}" for have in others if (near := OFTEN.get(have) or nearest(have, known))]
    return f" ({'; '.join(hints)})" if hints else ""


def needed_in(needed: Iterable[str], row: Row) -> bool:
    return set(needed) <= set(row)


def spoken(row: Row, kind: DataType) -> Any:
    """What a row begins with: its prompt, its messages or its text."""
    if kind != "language_modeling":
        return row["prompt"]
    return row["messages"] if "messages" in row else row["text"]


def is_dialogue(row: Row, kind: DataType) -> bool:
    return not isinstance(spoken(row, kind), str)


def asks(row: Row, kind: DataType) -> Any:
    """What a row asks: its prompt, its turns before the last one of the assistant, or its text."""
    said = spoken(row, kind)
    if kind != "language_modeling" or isinstance(said, str):
        return said
    return said[: max((i for i, m in enumerate(said) if m["role"] == "assistant"), default=len(said))]


def question(row: Row, kind: DataType) -> bytes:
    """What a row asks, as evaluation data are compared: text or one message of the user, white space at ends aside."""
    said = asks(row, kind)
    if not isinstance(said, str):
        turns = [[m["role"], str(m.get("content", "")).strip(), m.get("tool_calls")] for m in said]
        return digest(turns[0][1] if len(turns) == 1 and turns[0][0] == "user" else turns)
    return digest(said.strip())


# ---------------------------------------------------------------------------------------------- messages


def without_nulls(value: Any) -> Any:
    """The same without keys whose value is null: Arrow gives every row the keys of all."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list | tuple) else value


def messages_of(value: Iterable[Any], where: str) -> list[Row]:
    """Messages in their normal form: ``role`` and ``content``, roles by their usual names, no null keys."""
    return [_message(m, f"{where}, message {i}") for i, m in enumerate(value, 1)]


def _message(message: Any, where: str) -> Row:
    if not isinstance(message, Mapping):
        raise UsageError(f"{where}: expected a mapping with role and content, got {show(message)}.")
    said: Row = without_nulls(message)
    if "role" not in said and "from" in said:  # ShareGPT
        said = {"role": said.pop("from"), "content": said.pop("value", None), **said}
        if said["role"] not in ROLES:
            raise UsageError(f"{where}: unknown role {said['role']!r}{suggest(str(said['role']), ROLES)}")
    role = said.get("role")
    if not isinstance(role, str):
        raise UsageError(f"{where}: expected a mapping with role and content, got {show(message)}.")
    content = said.get("content")
    if isinstance(content, list):
        content = "".join(_part(p, where) for p in content)
    if content is None and not said.get("tool_calls"):
        raise Fault("a message without content")
    if content is not None and not isinstance(content, str):
        raise UsageError(f"{where}: expected text as content, got {show(content)} ({type(content).__name__}).")
    return {**said, "role": ROLES.get(role, role), **({} if content is None else {"content": _whole(content)})}


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can escape what no encoding and no tokenizer takes
        raise Fault("text with half a character (a lone surrogate)") from None
    return text


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise UsageError(f"{where}: a content part of type {kind}; prefzoo trains on text, and reads parts of type text.")


def says_nothing(side: Any) -> bool:
    if isinstance(side, str):
        return not side
    return not any(m.get("content") or m.get("tool_calls") for m in side)


# ---------------------------------------------------------------------------------------------- normal form


def normal_columns(row: Row, where: str) -> Row:
    """The row under the columns of its type: ``conversations`` become messages; pictures are refused."""
    for column in ("image", "images"):
        if row.get(column):
            raise UsageError(f"{where}, column {column!r}: pictures are not supported, prefzoo trains on text.")
    if "conversations" not in row:
        return row
    rest = {k: v for k, v in row.items() if k not in ("conversations", "system")}
    said, system = row["conversations"], row.get("system")
    if isinstance(said, list) and isinstance(system, str) and system:
        said = [{"role": "system", "content": system}, *said]
    return {**rest, ("prompt" if "chosen" in rest else "messages"): said}


def normal_row(row: Row, kind: DataType, implicit_prompt: str, where: str) -> Row:
    """The row in the normal form of its type: explicit prompt, messages with roles, true labels.

    Raises:
        Fault: this row cannot be used.
        UsageError: the data are not of this type at all (a column is missing, a value of a wrong type).
    """
    shapes = [needed for shape, needed in SHAPES if shape == kind]
    columns = next((needed for needed in shapes if needed_in(needed, row)), None)
    if columns is None:
        missing = next(c for c in shapes[0] if c not in row)
        raise UsageError(f"{where}: column {missing!r} is missing (type {kind}).")
    row = dict(row)
    if kind == "preference" and "prompt" in row and row["prompt"] is not None:
        columns = ("prompt", *columns)
    for column in columns:
        if row[column] is None:
            raise Fault(f"{column} is null")
        if column in SIDES:
            row[column] = _side(row[column], f"{where}, column {column!r}")
    _answers(row, kind, where)
    sides = [*(row[c] for c in columns if c in SIDES), *(row["completions"] if "completions" in columns else ())]
    if len({isinstance(side, str) for side in sides}) > 1 and not _repeats_in_sides(row, kind):
        raise Fault("text and messages in one row")
    if any(not isinstance(side, str) for side in sides):
        _template_columns(row, where)
    if kind == "preference":
        _pair(row, implicit_prompt)
    if "messages" in columns and isinstance(row.get("label"), int) and row["label"] in (0, 1):
        raise UsageError(
            f"{where}, column 'label': whole dialogues have no label; give 'prompt' and 'completion' with it (type "
            "unpaired), or, if it says nothing of how good they are, another name: columns={'topic': 'label'}."
        )
    if any(says_nothing(row[c]) for c in ("completion", "messages", "text") if c in columns):
        raise Fault("an empty completion" if "completion" in columns else "an empty text")
    if "prompt" in row and kind != "language_modeling":
        if says_nothing(row["prompt"]):
            raise Fault("an empty prompt")
        if not isinstance(row["prompt"], str) and row["prompt"][-1]["role"] not in ("user", "tool", "assistant"):
            raise Fault(f"the prompt ends with a message of role {row['prompt'][-1]['role']}")
    return row


def _side(value: Any, where: str) -> str | list[Row]:
    if isinstance(value, str):
        if where.endswith("'messages'"):
            raise UsageError(f"{where}: expected a list of messages, got text {show(value)}.")
        return _whole(value)
    if isinstance(value, Mapping) and ({"role", "content"} <= set(value) or {"from", "value"} <= set(value)):
        value = [value]
    if not isinstance(value, list | tuple) or where.endswith("'text'"):
        wanted = "text" if where.endswith("'text'") else "text or a list of messages"
        raise UsageError(f"{where}: expected {wanted}, got {show(value)} ({type(value).__name__}).")
    return messages_of(value, where)


def _answers(row: Row, kind: DataType, where: str) -> None:
    """Labels, scores, ranks, ties, and the completions they belong to."""
    if kind == "unpaired":
        row["label"] = _truth(row["label"], "label", where)
    if kind == "preference" and row.get("tie") is not None:
        row["tie"] = _truth(row["tie"], "tie", where)
    if kind == "preference" and row.get("margin") is not None:
        row["margin"] = _number(row["margin"], "margin", where)
    if kind == "preference" and row.get("probability") is not None:
        row["probability"] = _number(row["probability"], "probability", where)
        if not 0 <= row["probability"] <= 1:
            share = f"{row['probability']:g}"
            raise UsageError(f"{where}, column 'probability': expected a number from 0 to 1, got {share}.")
    if row.get("weight") is not None and kind != "prompt":
        row["weight"] = _number(row["weight"], "weight", where)
        if row["weight"] < 0:
            raise UsageError(f"{where}, column 'weight': expected a number of at least 0, got {row['weight']:g}.")
    if kind == "scored":
        row["score"] = _number(row["score"], "score", where)
    if kind not in ("stepwise", "ranking"):
        return
    named = ("labels",) if kind == "stepwise" else ("scores", "ranks")
    given = [column for column in named if row.get(column) is not None] or [named[-1]]
    for column in ("completions", *given):
        if row.get(column) is None:
            raise Fault(f"{column} is null")
        if not isinstance(row[column], list | tuple):
            raise UsageError(f"{where}, column {column!r}: expected a list, got {show(row[column])}.")
    for values in given:
        if len(row["completions"]) != len(row[values]):
            raise Fault(f"another number of {values} than of completions")
    if any(c is None for c in row["completions"]):
        raise Fault("a completion is null")
    row["completions"] = [_side(c, f"{where}, column 'completions'") for c in row["completions"]]
    if kind == "stepwise" and not all(isinstance(c, str) for c in row["completions"]):
        raise UsageError(f"{where}, column 'completions': steps are text, got messages.")
    read: dict[str, Callable[[Any, str, str], Any]] = {"labels": _truth, "scores": _number, "ranks": _rank}
    for values in given:
        row[values] = [read[values](v, values, where) for v in row[values]]
    if not row["completions"] or any(map(says_nothing, row["completions"])):
        raise Fault("an empty completion")


def _truth(value: Any, column: str, where: str) -> bool:
    if value is None:
        raise Fault(f"{column} is null")
    if value not in (0, 1):
        raise UsageError(f"{where}, column {column!r}: {column} is {value!r}, not true or false.")
    return bool(value)


def _number(value: Any, column: str, where: str) -> float:
    if value is None:
        raise Fault(f"{column} is null")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{where}, column {column!r}: expected a number, got {value!r}.")
    if not math.isfinite(value):
        raise Fault(f"{column} is not a finite number")
    return float(value)


def _rank(value: Any, column: str, where: str) -> int:
    if value is None:
        raise Fault(f"{column} is null")
    if isinstance(value, bool) or value != int(_number(value, column, where)) or value < 1:
        raise UsageError(f"{where}, column {column!r}: expected whole numbers from 1 (the best), got {value!r}.")
    return int(value)


def _template_columns(row: Row, where: str) -> None:
    """``tools`` and ``chat_template_kwargs``, which go to the chat template, as what they stand for."""
    for column, expected in (("tools", list), ("chat_template_kwargs", dict)):
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise UsageError(f"{where}, column {column!r} is not JSON ({error.msg}): {show(value)}.") from error
        if not value:
            row.pop(column, None)
        elif not isinstance(value, expected):
            raise UsageError(f"{where}, column {column!r}: expected a {expected.__name__}, got {show(value)}.")
        else:
            row[column] = without_nulls(value)


# ---------------------------------------------------------------------------------------------- pairs


def _repeats_in_sides(row: Row, kind: DataType) -> bool:
    """Dialogues whose column ``prompt`` repeats, as text, what the user asks in both: their prompt is implicit."""
    if kind != "preference" or not isinstance(row.get("prompt"), str):
        return False
    if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        return False
    shared = row["chosen"][: split_turns(row["chosen"], row["rejected"])]
    if not any(m["role"] == "user" and str(m.get("content", "")).strip() == row["prompt"].strip() for m in shared):
        return False
    row["prompt"] = None
    return True


def _pair(row: Row, implicit_prompt: str) -> None:
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if chosen == rejected:
        raise Fault("chosen and rejected are identical")
    if says_nothing(chosen) or says_nothing(rejected):
        raise Fault("an empty side")
    if prompt is None:
        if not isinstance(chosen, str):
            cut = split_turns(chosen, rejected)
        elif implicit_prompt == "character":
            cut = split_characters(chosen, rejected)
        else:
            cut = split_text(chosen, rejected)
        if cut == 0:
            raise Fault("chosen and rejected share no prompt")
        row["prompt"], row["chosen"], row["rejected"] = chosen[:cut], chosen[cut:], rejected[cut:]
    elif not isinstance(prompt, str) and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        row["chosen"], row["rejected"] = chosen[len(prompt) :], rejected[len(prompt) :]  # whole dialogues
    if says_nothing(row["chosen"]) or says_nothing(row["rejected"]):
        raise Fault("an empty side")


def split_turns(chosen: list[Any], rejected: list[Any]) -> int:
    """Number of leading turns that two dialogues share; each keeps its last turn."""
    pairs = zip(chosen, rejected, strict=False)
    shorter = min(len(chosen), len(rejected))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), max(shorter - 1, 0))


def split_text(chosen: str, rejected: str) -> int:
    """Length of the implicit prompt of two strings.

    A transcript is cut after its last shared ``Assistant:``; other text where the common prefix last ends a word, so
    that no word is torn and the space stays with the completion.

    >>> text = "Sky? Answer: blue", "Sky? Answer: black"
    >>> text[0][: split_text(*text)]
    'Sky? Answer:'
    """
    shared = _common(chosen, rejected)
    turn = chosen.rfind(ASSISTANT, 0, shared)
    if turn >= 0:
        return turn + len(ASSISTANT)
    both_go_on = chosen[shared : shared + 1].isspace() and rejected[shared : shared + 1].isspace()
    boundaries = [m.start() for m in re.finditer(r"\s+", chosen[: shared + both_go_on])]
    return boundaries[-1] if boundaries else 0


def split_characters(chosen: str, rejected: str) -> int:
    """TRL's rule: the first character that differs, or the space before it; a shared answer prefix is prompt, too.

    >>> text = "Sky? Answer: blue", "Sky? Answer: black"
    >>> text[0][: split_characters(*text)]
    'Sky? Answer: bl'
    """
    shared = min(_common(chosen, rejected), min(len(chosen), len(rejected)) - 1)
    return shared - (shared > 0 and chosen[shared] != rejected[shared] and chosen[shared - 1] == " ")


def _common(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
