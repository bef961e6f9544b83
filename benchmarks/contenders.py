"""Who is compared: models and runs, which answer here, and files of answers that somebody has written before."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefzoo.benchmarks.cells import answered
from prefzoo.benchmarks.judging import Answers
from prefzoo.data.formats import convert, load_dataset
from prefzoo.data.readers import FILES, DataSource, open_source
from prefzoo.data.tokens import encode_prompts
from prefzoo.feedback.templates import said
from prefzoo.generation import resolve_policy, sample
from prefzoo.models.causal import open_config
from prefzoo.models.folders import run_model
from prefzoo.models.load import load_tokenizer
from prefzoo.registry import UsageError
from prefzoo.rollout import Sampling
from prefzoo.training import Run

Rows = list[dict[str, Any]]
# What files of answers call their columns; the first that is there counts.
PROMPT, ANSWER = ("prompt", "instruction"), ("completion", "completions", "output", "response", "answer")
OWN = (*ANSWER[:4], "sample", "finished", "generator")  # columns of an answer; the others belong to its prompt


@dataclass(frozen=True)
class Written:
    """A file of answers: the row of every prompt, and its answers with whether each is whole."""

    name: str
    rows: Mapping[str, dict[str, Any]]
    answers: Mapping[str, list[tuple[str, bool]]]


def is_file(model: Any) -> bool:
    """Whether this is a file of answers and no model."""
    return isinstance(model, str | Path) and str(model).removesuffix(".gz").endswith(FILES)


def read_answers(file: str | Path, columns: Mapping[str, str] | None = None) -> Written:
    """Answers of a file with one or several per prompt.

    Rows are ``prompt, completion`` (several rows of a prompt in the order of ``sample``, where there is one), what
    ``prefzoo generate --out`` writes (``completions``, a list), or AlpacaEval's ``instruction, output``.

    Raises:
        UsageError: a missing file or column, and a row whose answer is no text.
    """
    name, read = open_source(DataSource(str(file), columns=columns), streaming=False)
    rows: dict[str, dict[str, Any]] = {}
    found: dict[str, list[tuple[int, str, bool]]] = {}
    for number, row in enumerate(read(), 1):
        prompt, answer = (_column(row, known, name) for known in (PROMPT, ANSWER))
        texts = row[answer] if isinstance(row[answer], list) else [row[answer]]
        whole = row.get("finished", True)
        flags = whole if isinstance(whole, list) else [bool(whole)] * len(texts)
        if not all(isinstance(t, str) for t in texts) or len(flags) != len(texts):
            raise UsageError(f"{name}, row {number}, column {answer!r}: expected a text or a list of texts.")
        asked = row[prompt] if prompt == "prompt" or not row.get("input") else f"{row[prompt]}\n\n{row['input']}"
        key = said(asked)
        rows.setdefault(key, {"prompt": asked} | {k: v for k, v in row.items() if k not in (prompt, answer, *OWN)})
        place = row.get("sample")
        found.setdefault(key, []).extend(
            (k if place is None else int(place), text, bool(flag))
            for k, (text, flag) in enumerate(zip(texts, flags, strict=True), len(found.get(key, ())))
        )
    if not rows:
        raise UsageError(f"{name}: no answers.")
    ordered = {key: [(t, f) for _, t, f in sorted(several, key=lambda a: a[0])] for key, several in found.items()}
    return Written(name, rows, ordered)


def _column(row: Mapping[str, Any], known: Sequence[str], name: str) -> str:
    column = next((k for k in known if k in row), None)
    if column is None:
        raise UsageError(
            f"{name}: no column for the {known[0]} among {', '.join(map(str, row))}; name it: "
            f"--columns {known[0]}=THEIRS (known by themselves: {', '.join(known)})."
        )
    return column


def gather(
    models: Mapping[str, Any],
    prompts: Any,
    *,
    columns: Mapping[str, str] | None,
    samples: int | None,
    sampling: Sampling,
    seed: int,
    tokenizer: Any = None,
) -> tuple[dict[str, Answers], int]:
    """The answers of all to the same prompts, as many to each; and how many prompts leave a model no room to answer.

    ``prompts`` may be left out where a file of answers has them. ``tokenizer``: of files, for judges that read tokens.
    """
    named = columns if prompts is None else None
    files = {name: read_answers(model, named) for name, model in models.items() if is_file(model)}
    if prompts is None and not files:
        raise UsageError("which prompts do the models answer? Give --prompts FILE (prompts= in Python).")
    rows = _asked(prompts, columns) if prompts is not None else _union(files)
    whole = len(rows)
    for name, model in models.items():
        if name not in files:
            rows = _answerable(model, rows, sampling.max_new_tokens)
    if not rows:
        raise UsageError(
            f"none of the {whole} prompts leaves every model room for {sampling.max_new_tokens} new tokens."
        )
    per_prompt = _per_prompt(files, rows, samples)
    if files and tokenizer is None:
        tokenizer = _bytes(files)
    found = {}
    for name, model in models.items():
        found[name] = (
            _read(files[name], rows, per_prompt, tokenizer)
            if name in files
            else _answer(model, rows, per_prompt, sampling, seed)
        )
    return found, whole - len(rows)


def _asked(prompts: Any, columns: Mapping[str, str] | None) -> Rows:
    """Each prompt once."""
    found = convert(load_dataset(prompts, columns=columns), "prompt").rows
    return list({json.dumps(r, sort_keys=True, default=str): r for r in found}.values())


def _union(files: Mapping[str, Written]) -> Rows:
    rows: dict[str, dict[str, Any]] = {}
    for file in files.values():
        for key, row in file.rows.items():
            rows[key] = {**row, **rows.get(key, {})}
    return list(rows.values())


def _per_prompt(files: Mapping[str, Written], rows: Rows, samples: int | None) -> int:
    """How many answers to each prompt all have."""
    counts = {}
    for name, file in files.items():
        missing = [r for r in rows if said(r["prompt"]) not in file.answers]
        if missing:
            shown = "; ".join(repr(said(r["prompt"])[:60]) for r in missing[:3])
            raise UsageError(
                f"{file.name} has no answer to {len(missing)} of {len(rows)} prompts, such as {shown}. All must answer "
                "the same prompts: add them, or give --prompts with those that all have."
            )
        counts[name] = min(len(file.answers[said(r["prompt"])]) for r in rows)
    if samples is None and len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UsageError(f"the files have different numbers of answers per prompt: {told}; -n 1 takes the first.")
    samples = samples or next(iter(counts.values()), 1)
    for name, count in counts.items():
        if count < samples:
            raise UsageError(f"-n {samples}: {name!r} has only {count} answers to one of the prompts.")
    return samples


def _bytes(files: Mapping[str, Written]) -> Any:
    """Tokens for functions and verifiers, which take texts from them: bytes, that no text is without."""
    from prefzoo.models.load import learn_tokenizer

    return learn_tokenizer([next(iter(file.rows)) for file in files.values()], 280)


def _read(file: Written, rows: Rows, per_prompt: int, tokenizer: Any) -> Answers:
    several = [a for row in rows for a in file.answers[said(row["prompt"])][:per_prompt]]
    texts, ended = [t for t, _ in several], np.array([f for _, f in several])
    return dataclasses.replace(Answers.of_texts(rows, texts, tokenizer), ended=ended)


def _answerable(model: Any, rows: Rows, max_new_tokens: int) -> Rows:
    """The rows whose prompts leave the model room for an answer, found without loading its weights."""
    if isinstance(model, Run):
        policy, tokenizer = resolve_policy(model)
        config = policy.model.config
    else:
        folder = run_model(model)
        tokenizer, config = load_tokenizer(folder), open_config(folder)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return rows
    ids = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    return [row for row, prompt in zip(rows, ids, strict=True) if len(prompt) + max_new_tokens <= positions]


def _answer(model: Any, rows: Rows, per_prompt: int, sampling: Sampling, seed: int) -> Answers:
    policy, tokenizer = resolve_policy(model)
    found = answered(rows, sample(policy, tokenizer, rows, per_prompt, sampling, seed), tokenizer)
    return found


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
