"""Text to ids, once: the one tokenisation path of training, rollouts and rewards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefzoo.data.formats import Dataset, DataType, Report, convert, load_dataset
from prefzoo.data.samples import Kind, Ragged, Samples
from prefzoo.registry import UsageError
from prefzoo.source import layer_hash

KIND_TO_TYPE: dict[Kind, DataType] = {
    "prompts": "prompt",
    "completions": "prompt_completion",
    "unpaired": "unpaired",
    "pairs": "preference",
}
_TEXT_COLUMNS = {"prompt", "chosen", "rejected", "completion", "label"}


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any]) -> list[list[int]]:
    """Ids of prompts: with the tokenizer's own special tokens (BOS), or through the chat template for messages."""
    if prompts and not isinstance(prompts[0], str):
        return [_chat_ids(tokenizer, p, prompt=True) for p in prompts]
    return tokenizer(list(prompts), add_special_tokens=True)["input_ids"]


def encode_sides(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Any], sides: Sequence[Sequence[Any]]
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Ids of prompts and of one or two completions each.

    Prompt + completion is tokenised as a whole; the completion starts after the longest token prefix that all sides
    share with the prompt tokenised alone (tokens may merge across the boundary; what merges goes to the completion).
    Plain text gets the EOS token if it does not end with it; for messages the chat template closes the turn.

    Returns:
        prompt ids, and per row the ids of each side.
    """
    alone = encode_prompts(tokenizer, prompts)
    whole: list[list[list[int]]] = []
    for side in sides:
        if prompts and not isinstance(prompts[0], str):
            whole.append(
                [_to_last_eos(tokenizer, _chat_ids(tokenizer, [*p, *c])) for p, c in zip(prompts, side, strict=True)]
            )
        else:
            eos = tokenizer.eos_token
            texts = [p + (c if c.endswith(eos) else c + eos) for p, c in zip(prompts, side, strict=True)]
            whole.append(tokenizer(texts, add_special_tokens=True)["input_ids"] if texts else [])
    kept, cut = [], []
    for row, prompt in enumerate(alone):
        ids = [w[row] for w in whole]
        shared = min((_common_prefix(prompt, i) for i in ids), default=len(prompt))
        kept.append(prompt[:shared])
        cut.append([i[shared:] for i in ids])
    return kept, cut


def _chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Any, prompt: bool = False) -> list[int]:
    if tokenizer.chat_template is None:
        raise UsageError(
            "the data holds messages, but the tokenizer has no chat template; set tokenizer.chat_template."
        )
    ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=prompt, return_dict=True)
    return list(ids["input_ids"])


def _to_last_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Without the white space that a template writes after the EOS of the last turn: answers end with EOS."""
    last = len(ids) - 1 - ids[::-1].index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids) - 1
    return ids if tokenizer.decode(ids[last + 1 :]).strip() else ids[: last + 1]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def tokenise(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    *,
    max_length: int = 1024,
    cache: Path | None = None,
    strict: bool = False,
) -> tuple[Samples, Report]:
    """A data set as samples of a kind: read, checked, converted, tokenised.

    Completions over ``max_length`` (prompt + completion) are cut at the end and counted; rows whose prompt alone
    reaches it are dropped and counted. With ``cache`` the ids are stored there once per (data, tokenizer, kind,
    length) and memory-mapped.
    """
    data = load_dataset(source, strict=strict)
    dropped, data = data.report, convert(data, KIND_TO_TYPE[kind])
    report = Report(
        data.report.source, data.type, dropped=dropped.dropped.copy(), cut=data.report.cut.copy(),
        examples=dict(dropped.examples),
    )  # fmt: skip
    prompts = [r["prompt"] for r in data.rows]
    folder = None
    if cache is not None:
        folder = cache / _store_key(data, tokenizer, kind)
    if folder is not None and (folder / "complete").exists():
        prompt_ids = Ragged.load(folder, "prompts")
        completion_ids = Ragged.load(folder, "completions")
    else:
        if kind == "prompts":
            alone, sides = encode_prompts(tokenizer, prompts), list[list[list[int]]]()
        else:
            names = ("chosen", "rejected") if kind == "pairs" else ("completion",)
            alone, sides = encode_sides(tokenizer, prompts, [[r[n] for r in data.rows] for n in names])
        prompt_ids, completion_ids = Ragged.of(alone), Ragged.of([c for row in sides for c in row])
        if folder is not None:
            _store(folder, prompt_ids, completion_ids)
    samples, report = _samples(data, kind, prompt_ids, completion_ids, max_length, report)
    if kind != "prompts":
        prompt, first = samples.prompts[0], [samples.completions[i] for i in range(samples.per_row)]
        shown = " | ".join(f"[[{_short(tokenizer.decode(side))}]]" for side in first)
        report.masked = f"{_short(tokenizer.decode(prompt), end=True)} {shown}"
    return samples, report


def _short(text: str, end: bool = False) -> str:
    """A line of at most 80 characters, the middle left out; ``end``: the end alone, where the mask begins."""
    line = " ".join(text.split())
    if len(line) <= 80:
        return line
    return f"... {line[-60:]}" if end else f"{line[:40]} ... {line[-36:]}"


def _samples(
    data: Dataset, kind: Kind, prompts: Ragged, completions: Ragged, max_length: int, report: Report
) -> tuple[Samples, Report]:
    lengths = prompts.lengths
    usable = (lengths > 0) & (lengths < max_length)
    for row in np.flatnonzero(~usable):
        reason = f"prompt reaches the limit of {max_length} tokens" if lengths[row] else "a prompt without tokens"
        report.drop(reason, repr(str(data.rows[row]["prompt"])[:100]))
    per_row = {"prompts": 0, "completions": 1, "unpaired": 1, "pairs": 2}[kind]
    rows = np.flatnonzero(usable)
    if len(rows) == 0:
        raise UsageError("\n".join([f"data {report.source}: no usable row is left.", *report.lines()[1:]]))
    report.rows = len(rows)
    which = (rows[:, None] * per_row + np.arange(per_row)).reshape(-1)
    room = np.repeat(max_length - lengths[rows], per_row)
    over = completions.lengths[which] > room
    if over.any():
        report.cut[f"completions cut at {max_length} tokens (prompt + completion)"] = int(over.sum())
        completions = Ragged.of(completions[int(i)][:r] for i, r in zip(which, room, strict=True))
    elif len(rows) < len(lengths):
        completions = completions.take(which)
    prompts = prompts if len(rows) == len(lengths) else prompts.take(rows)
    kept = [data.rows[i] for i in rows]
    extra_names = sorted({k for r in kept for k in r} - _TEXT_COLUMNS)
    columns: dict[str, Tensor] = {}
    pair_columns: dict[str, Tensor] = {}
    if kind == "unpaired":
        columns["desirable"] = torch.tensor([bool(r["label"]) for r in kept])
    per_row_columns = pair_columns if kind == "pairs" else columns
    for name in ("margin", "weight") if kind == "pairs" else ("weight",) if kind != "prompts" else ():
        if name in extra_names:
            per_row_columns[name] = _numbers(name, [r.get(name) for r in kept])
    # Each distinct prompt is stored once, so that completions of one prompt can share its computation.
    unique, inverse = _distinct(prompts)
    extra = {"prompt": [r["prompt"] for r in kept], **{k: [r.get(k) for r in kept] for k in extra_names}}
    if kind == "prompts":
        return Samples(kind, prompts, Ragged.of([]), np.zeros(0, dtype=np.int64), extra=extra), report
    same_extra = {k: [v[i] for i in unique] for k, v in extra.items()}
    return (
        Samples(
            kind, prompts.take(unique), completions, np.repeat(inverse, per_row),
            columns=columns, pair_columns=pair_columns, extra=same_extra,
        ),
        report,
    )  # fmt: skip


def _numbers(name: str, values: list[Any]) -> Tensor:
    for row, value in enumerate(values, 1):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UsageError(f"column {name!r}, row {row}: expected a number, got {value!r}.")
    return torch.tensor(values, dtype=torch.float32)


def _distinct(prompts: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """First row of each distinct prompt, and for every row the number of its prompt."""
    seen: dict[bytes, int] = {}
    inverse = np.empty(len(prompts), dtype=np.int64)
    first: list[int] = []
    for row in range(len(prompts)):
        key = prompts[row].tobytes()
        if key not in seen:
            seen[key] = len(first)
            first.append(row)
        inverse[row] = seen[key]
    return np.asarray(first, dtype=np.int64), inverse


def _store_key(data: Dataset, tokenizer: PreTrainedTokenizerBase, kind: Kind) -> str:
    facts = [data.hash(), tokenizer_hash(tokenizer), kind, layer_hash()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what a tokenizer does: its model, its special tokens and its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    facts = [body, str(tokenizer.special_tokens_map), tokenizer.chat_template]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _store(folder: Path, prompts: Ragged, completions: Ragged) -> None:
    """Written aside and renamed, so that a killed run leaves no half store."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent))
    prompts.save(aside, "prompts")
    completions.save(aside, "completions")
    (aside / "complete").touch()
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)  # without its mark it is nobody's
    try:
        os.replace(aside, folder)
    except OSError:  # another process was first
        shutil.rmtree(aside)
