"""Data sets as samples of token ids, made once and kept in a store."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import pickle
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefzoo.data.chat import Encoded, LossOn, encode_prompts, encode_rows, encode_sides, encode_steps
from prefzoo.data.convert import best_first, worth_of
from prefzoo.data.formats import Dataset, DataType, Report, convert, load_dataset
from prefzoo.data.rows import CONTENT, Fault, Row, asks, is_dialogue
from prefzoo.data.samples import Kind, Ragged, Samples, offsets_of
from prefzoo.data.store import MARK, Column, Store, Stored
from prefzoo.models.tokenizer import end_ids
from prefzoo.registry import UsageError
from prefzoo.source import layer_hash

__all__ = ["encode_prompts", "encode_sides", "segments", "tokenise", "tokenizer_hash"]

KIND_TO_TYPE: dict[Kind, DataType] = {
    "prompts": "prompt",
    "completions": "prompt_completion",
    "unpaired": "unpaired",
    "pairs": "preference",
    "rankings": "ranking",
    "scored": "scored",
    "steps": "stepwise",
}
SIDES: dict[Kind, list[str]] = {
    "prompts": [],
    "completions": ["completion"],
    "unpaired": ["completion"],
    "pairs": ["chosen", "rejected"],
    "rankings": ["completions"],
    "scored": ["completion"],
    "steps": ["completions"],
}
NUMBERS: dict[Kind, tuple[str, ...]] = {  # the user's columns that losses read
    "prompts": (),
    "completions": ("weight",),
    "unpaired": ("weight", "score"),
    "pairs": ("margin", "probability", "weight", "score_chosen", "score_rejected"),
    "rankings": ("weight",),
    "scored": ("weight", "score"),
    "steps": ("weight",),
}
TOLD = ("margin", "probability", "weight")  # of every row or of none
BLOCK = 512  # rows that are tokenised together; no more are in memory when streaming


def tokenise(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    *,
    max_length: int = 1024,
    cache: Path | None = None,
    strict: bool = False,
    loss_on: LossOn | None = None,
    ties: bool = False,
) -> tuple[Samples, Report]:
    """A data set as samples of a kind: read, checked, converted, tokenised.

    Completions over ``max_length`` (prompt + completion) are cut at the end and counted; rows whose prompt alone
    reaches it are dropped and counted. With ``cache`` the ids are stored there once per (data, tokenizer, kind,
    loss_on, length) and memory-mapped; streamed data without it go through a temporary folder.

    Args:
        loss_on: the tokens that carry loss, in ``tokens["trainable"]`` where they are not all. None: completions (of
            several turns, the assistant's), the assistant's turns of ``messages``, the whole of ``text``.
            "completion": completions with all their turns. "assistant": the assistant's turns of whole dialogues,
            prompts included. "all": prompts and completions as one text.
        ties: keep pairs that were called equally good, told in the column ``tie``; else they are left out and counted.
    """
    loaded = load_dataset(source, strict=strict)
    data = _as_kind(loaded, kind, loss_on)
    report = Report(loaded.report.source, data.type)
    report.add(loaded.report)
    folder = None if cache is None else cache / _store_key(loaded, tokenizer, kind, loss_on, max_length, strict, ties)
    temporary = None
    if folder is None and data.streamed:
        temporary = Path(tempfile.mkdtemp(prefix="prefzoo-"))
        folder = temporary / "tokens"
    try:
        if folder is not None and (folder / MARK).exists():
            stored = Stored.open(folder)
        else:
            writer = _Writer(Store(folder), data, tokenizer, kind, max_length, strict, ties)
            stored = _write(writer, loss_on, loaded is not data)
    finally:
        if temporary is not None:  # what is mapped stays readable until nothing refers to it
            shutil.rmtree(temporary, ignore_errors=True)
    found = stored.facts["report"]
    dropped, cut, notes = (Counter(found[name]) for name in ("dropped", "cut", "notes"))
    report.add(Report(report.source, data.type, 0, dropped, cut, notes, found["examples"]))
    report.rows, report.masked = found["rows"], found["masked"]
    if report.rows == 0:
        raise report.nothing_left()
    return _samples(stored, data, kind), report


def _as_kind(data: Dataset, kind: Kind, loss_on: LossOn | None) -> Dataset:
    """The data as the type that a kind of samples is made of."""
    name, to = f"loss_on={loss_on!r}", KIND_TO_TYPE[kind]
    lm = kind == "completions" and data.type == "language_modeling"
    if loss_on is not None:
        first = next(iter(data))
        if loss_on not in ("completion", "assistant", "all"):
            raise UsageError(f"{name}: expected 'completion', 'assistant' or 'all'.")
        if kind == "prompts":
            raise UsageError(f"{name} has no effect on prompts: what is sampled carries the loss.")
        if loss_on == "assistant" and not is_dialogue(first, data.type):
            raise UsageError(f"{name}: data {data.report.source} holds plain text, in which nobody has turns.")
        if loss_on == "completion" and lm:
            raise UsageError(
                f"{name}: data {data.report.source} has no completions (type language_modeling); give 'prompt' and "
                "'completion', or leave loss_on out."
            )
        if loss_on == "all" and kind != "completions":
            raise UsageError(f"{name} has no meaning for {kind}: answers are compared, and all have the same prompt.")
        if kind == "steps":
            raise UsageError(f"{name} has no effect on steps: the last token of each carries the loss.")
    if lm:
        return data
    return convert(data, "language_modeling" if kind == "completions" and loss_on in ("assistant", "all") else to)


def _write(writer: _Writer, loss_on: LossOn | None, converted: bool) -> Stored:
    data, store = writer.data, writer.store
    try:
        rows = enumerate(data)
        while block := list(itertools.islice(rows, BLOCK)):
            sides = SIDES[writer.kind]
            if data.type == "language_modeling":
                sides = ["messages" if "messages" in block[0][1] else "text"]
            said = [row for _, row in block]
            steps = writer.kind == "steps"
            writer.add(block, encode_steps(writer.tokenizer, said) if steps
                       else encode_rows(writer.tokenizer, said, sides, loss_on))  # fmt: skip
        if converted:
            writer.report.add(data.report)
        return store.close(writer.facts())
    except BaseException:
        store.abandon()
        raise


class _Writer:
    """Encoded rows, cut to the limit, into a store; and the report on them."""

    def __init__(
        self, store: Store, data: Dataset, tokenizer: PreTrainedTokenizerBase, kind: Kind, max_length: int,
        strict: bool, ties: bool,
    ) -> None:  # fmt: skip
        self.store, self.data, self.tokenizer, self.kind = store, data, tokenizer, kind
        self.max_length, self.strict, self.ties = max_length, strict, ties
        self.report = Report(data.report.source, data.type)
        self.ends = set(end_ids(tokenizer)) if kind != "prompts" else set()
        self.bos = tokenizer.bos_token_id
        self.adds_bos = self.bos is not None and tokenizer("")["input_ids"][:1] == [self.bos]
        self.prompts: dict[
            bytes, int
        ] = {}  # each distinct prompt is stored once: its completions share its computation
        self.users: set[str] = set()
        self.lacks: dict[str, int] = {}  # column of numbers -> the first row that has none
        self.has: set[str] = set()
        self.partly = False

    def add(self, block: Sequence[tuple[int, Row]], encoded: Iterable[Encoded | Fault]) -> None:
        kept: list[tuple[int, Row, Encoded]] = []
        for (number, row), found in zip(block, encoded, strict=True):
            if self.kind == "pairs" and row.get("tie") and not self.ties:
                self.report.cut["ties left out: davidson and rao_kupper learn from them"] += 1
                continue
            try:
                cut = self._cut(found)
                if self.kind == "rankings":
                    row, cut = self._ranked(row, cut)
                    different = len(set(worth_of(row)))
                    if different < 2:
                        self.report.cut["prompts left out: no two answers of different score"] += 1
                        continue
                    if different < len(cut.completions):
                        equal = "rankings with completions of equal score, which keep the order of the data"
                        self.report.notes[equal] += 1
                kept.append((number, row, cut))
            except Fault as fault:
                shown = repr(str(asks(row, self.data.type))[:100])
                if self.strict:
                    raise UsageError(f"data {self.report.source}: {fault}; it starts {shown}") from None
                self.report.drop(str(fault), shown)
        if not self.report.rows and kept and self.kind != "prompts":
            self.report.masked = self._shown(kept[0][2])
        self.report.rows += len(kept)
        self._store(kept)

    def _cut(self, found: Encoded | Fault) -> Encoded:
        if isinstance(found, Fault):
            raise found
        room = self.max_length - len(found.prompt)
        if not found.prompt:
            raise Fault("a prompt without tokens")
        if room <= 0:
            raise Fault(f"prompt reaches the limit of {self.max_length} tokens")
        if not all(found.completions):
            raise Fault("a completion without tokens")
        trained = [mask and mask[:room] for mask in found.trained]
        if any(mask is not None and not any(mask) for mask in trained):
            raise Fault(f"no token that carries loss within the limit of {self.max_length} tokens")
        if self.kind == "pairs" and found.completions[0][:room] == found.completions[1][:room]:
            raise Fault(f"sides that are identical within the limit of {self.max_length} tokens")
        cut, notes = self.report.cut, self.report.notes
        for ids, mask in zip(found.completions, found.trained, strict=True):
            if len(ids) > room:
                cut[f"completions cut at {self.max_length} tokens (prompt + completion)"] += 1
            elif not self.ends.intersection(itertools.compress(ids, mask) if mask else ids):
                notes["completions whose loss holds no token that ends the turn: nothing there teaches to stop"] += 1
        if found.moved:
            notes["prompts whose end is tokenised otherwise when they stand alone, as in rollouts"] += 1
        if self.adds_bos and is_bos(found.prompt, self.bos) != 1:
            doubled = is_bos(found.prompt, self.bos) > 1
            notes[
                "prompts begin with several BOS tokens: the chat template writes them"
                if doubled
                else "prompts begin without the BOS token that plain text gets: the chat template writes none"
            ] += 1
        labels = found.labels and found.labels[:room]
        return Encoded(found.prompt, [ids[:room] for ids in found.completions], trained, labels=labels)

    def _ranked(self, row: Row, found: Encoded) -> tuple[Row, Encoded]:
        """The different completions of a ranking, best first."""
        order: list[int] = []
        for i in best_first(row):
            if any(found.completions[i] == found.completions[j] for j in order):
                self.report.cut["completions left out that are identical to a better one of their list"] += 1
            else:
                order.append(i)
        if len(order) < 2:
            raise Fault("fewer than two different completions")
        given = {name: [row[name][i] for i in order] for name in ("scores", "ranks") if row.get(name) is not None}
        cut = Encoded(found.prompt, [found.completions[i] for i in order], [found.trained[i] for i in order])
        return {**row, **given}, cut

    def _store(self, kept: Sequence[tuple[int, Row, Encoded]]) -> None:
        new: list[tuple[int, Row, Encoded]] = []
        owners: list[int] = []
        for one in kept:
            key = hashlib.sha256(np.asarray(one[2].prompt, dtype=np.int32).tobytes()).digest()[:16]
            if self.kind == "prompts" or key not in self.prompts:
                self.prompts[key] = len(self.prompts)
                new.append(one)
            owners += [self.prompts[key]] * len(one[2].completions)
        add, sides = self.store.add, [side for _, _, e in kept for side in e.completions]
        self.store.add_ragged("prompts", [e.prompt for _, _, e in new])
        add("rows", [number for number, _, _ in new], "int64")
        self.store.add_ragged("completions", sides)
        add("prompt_B", owners, "int64")
        masks = [np.ones(len(ids), bool) if mask is None else mask for _, _, e in kept
                 for ids, mask in zip(e.completions, e.trained, strict=True)]  # fmt: skip
        self.partly |= not all(map(all, (mask for _, _, e in kept for mask in e.trained if mask is not None)))
        add("trainable", np.concatenate(masks) if masks else [], "bool")
        if self.kind == "unpaired":
            add("desirable", [row["label"] for _, row, _ in kept], "bool")
        if self.kind == "steps":
            add("labels", [label for _, _, e in kept for label in e.labels or ()], "float32")
        if self.kind == "rankings":
            add("ranked", [len(e.completions) for _, _, e in kept], "int64")
            add("score", [score for number, row, e in kept for score in self._scores(number, row, e)], "float32")
        for name in NUMBERS[self.kind]:
            add(name, [self._number(name, number, row) for number, row, _ in kept], "float32")
        if self.ties:
            add("tie", [bool(row.get("tie")) for _, row, _ in kept], "bool")
            self.has.add("tie")
        for _, row, _ in kept:
            self.users |= set(row) - CONTENT
        if self.data.streamed:
            held = [{**_users(row), "prompt": asks(row, self.data.type)} for _, row, _ in new]
            self.store.add_ragged("extra", [np.frombuffer(pickle.dumps(h), np.uint8) for h in held], "uint8")

    def _scores(self, number: int, row: Row, found: Encoded) -> list[float]:
        """Of a ranking, one number for each completion."""
        if row.get("scores") is not None:
            self.has.add("score")
            return row["scores"]
        self.lacks.setdefault("score", number + 1)
        return [float("nan")] * len(found.completions)

    def _number(self, name: str, number: int, row: Row) -> float:
        value = row.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            self.has.add(name)
            return value
        if value is not None and name in TOLD:
            raise UsageError(f"column {name!r}, row {number + 1}: expected a number, got {value!r}.")
        self.lacks.setdefault(name, number + 1)
        return float("nan")

    def _shown(self, first: Encoded) -> str:
        """The first row, what carries loss in brackets."""
        sides = []
        for ids, mask in zip(first.completions, first.trained, strict=True):
            parts = segments(self.tokenizer, ids, mask)
            sides.append("".join(f"[[{_short(text)}]]" if learned else _short(text) for text, learned in parts))
        return f"{_short(self.tokenizer.decode(first.prompt), end=True)} {' | '.join(sides)}"

    def facts(self) -> dict[str, Any]:
        for name in TOLD:
            if name in self.has and name in self.lacks:
                raise UsageError(f"column {name!r}, row {self.lacks[name]}: expected a number, got None.")
        r = self.report
        report = {name: getattr(r, name) for name in ("rows", "dropped", "cut", "notes", "examples", "masked")}
        numbers = sorted(self.has - set(self.lacks))
        return {"report": report, "users": sorted(self.users), "numbers": numbers, "partly": self.partly}


def is_bos(ids: Sequence[int], bos: int | None) -> int:
    """How many BOS tokens ids begin with."""
    return sum(1 for _ in itertools.takewhile(lambda i: i == bos, ids))


def _users(row: Row) -> Row:
    return {k: v for k, v in row.items() if k not in CONTENT}


def _samples(stored: Stored, data: Dataset, kind: Kind) -> Samples:
    arrays, facts = stored.arrays, stored.facts
    names = [*facts["users"], "prompt"]
    extra: dict[str, Sequence[Any]]
    if data.streamed:
        extra = {name: Column(stored.ragged("extra"), name) for name in names}
    else:
        rows = [data.rows[i] for i in arrays["rows"]]
        extra = {name: [row.get(name) for row in rows] for name in facts["users"]}
        extra["prompt"] = [asks(row, data.type) for row in rows]
    prompts = stored.ragged("prompts")
    if kind == "prompts":
        return Samples(kind, prompts, Ragged.of([]), np.zeros(0, dtype=np.int64), extra=extra)
    numbers = {name: torch.from_numpy(arrays[name]) for name in facts["numbers"]}
    labels = {"desirable": torch.from_numpy(arrays["desirable"])} if kind == "unpaired" else {}
    tokens: dict[str, Tensor] = {"trainable": torch.from_numpy(arrays["trainable"])} if facts["partly"] else {}
    if kind == "steps":
        tokens["labels"] = torch.from_numpy(arrays["labels"])
    completions, prompt_B = stored.ragged("completions"), np.asarray(arrays["prompt_B"])
    if kind == "rankings":
        return _rankings(prompts, completions, prompt_B, arrays["ranked"], numbers, tokens, extra)
    of_sides = kind == "pairs"
    return Samples(
        kind, prompts, completions, prompt_B, tokens=tokens, extra=extra,
        columns=labels if of_sides else {**labels, **numbers}, row_columns=numbers if of_sides else {},
    )  # fmt: skip


def _rankings(
    prompts: Ragged, completions: Ragged, prompt_B: np.ndarray, ranked: np.ndarray, numbers: Mapping[str, Tensor],
    tokens: Mapping[str, Tensor], extra: Mapping[str, Sequence[Any]],
) -> Samples:  # fmt: skip
    """Rankings of one width: shorter ones end with empty completions, whose score is 0."""
    width = int(ranked.max())
    there = (np.arange(width) < ranked[:, None]).reshape(-1)
    lengths = np.zeros(len(there), dtype=np.int64)
    lengths[there] = completions.lengths
    row_columns = dict(numbers)
    columns = {}
    if "score" in row_columns:
        columns["score"] = torch.zeros(len(there)).masked_scatter(torch.from_numpy(there), row_columns.pop("score"))
    first = offsets_of(ranked)[:-1]
    return Samples(
        "rankings", prompts, Ragged(completions.flat, offsets_of(lengths)), np.repeat(prompt_B[first], width),
        columns=columns, row_columns=row_columns, tokens=tokens, extra=extra, width=width,
    )  # fmt: skip


def segments(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], trained: Sequence[bool] | None = None
) -> list[tuple[str, bool]]:
    """Ids as text, in runs of tokens that carry loss and tokens that do not."""
    marks = [True] * len(ids) if trained is None else trained
    runs = itertools.groupby(zip(ids, marks, strict=True), key=lambda pair: bool(pair[1]))
    return [(tokenizer.decode([int(i) for i, _ in run]), learned) for learned, run in runs]


def _short(text: str, end: bool = False) -> str:
    """A line of at most 80 characters, the middle left out; ``end``: the end alone, where the mask begins."""
    line = " ".join(text.split())
    if len(line) <= 80:
        return line
    return f"... {line[-60:]}" if end else f"{line[:40]} ... {line[-36:]}"


def _store_key(
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    loss_on: LossOn | None,
    max_length: int,
    strict: bool,
    ties: bool,
) -> str:
    facts = [data.hash(), tokenizer_hash(tokenizer), kind, loss_on, max_length, strict, ties, data.streamed]
    facts.append(layer_hash())
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what a tokenizer does: its model, its special tokens and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    facts = [body, str(tokenizer.special_tokens_map), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
