"""Streaming: the same samples as without it, and never all rows in memory."""

from __future__ import annotations

import gc
import json
import tracemalloc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import prefzoo.data.readers as readers
import prefzoo.data.tokens as tokens_module
from prefzoo.data.formats import convert, load_dataset, split_by_prompt
from prefzoo.data.samples import Samples
from prefzoo.data.tokens import tokenise
from prefzoo.models.load import learn_tokenizer
from prefzoo.registry import UsageError

TEMPLATE = """{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""


@pytest.fixture(scope="module")
def words() -> Any:
    tokenizer = learn_tokenizer(["say one two three four user assistant"], 300)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


PAIRS = [
    {"prompt": f"say {i % 7}:", "chosen": f" one {i}", "rejected": " two" * (i % 5), "margin": i / 2, "level": i % 3,
     "tags": ["x", {"n": i}]}
    for i in range(40)
]  # fmt: skip
DIALOGUES = [
    {"messages": [message("user", f"one {i}"), message("assistant", "two"), message("user", "three"),
                  message("assistant", "four " * i)]}
    for i in range(6)
]  # fmt: skip


def facts(samples: Samples) -> dict[str, Any]:
    tensors = {**samples.columns, **samples.row_columns, **samples.tokens}
    return {
        "kind": samples.kind, "prompts": [samples.prompts[i].tolist() for i in range(len(samples.prompts))],
        "completions": samples.completions.flat.tolist(), "offsets": samples.completions.offsets.tolist(),
        "owners": samples.prompt_B.tolist(), "extra": {k: list(v) for k, v in samples.extra.items()},
        "tensors": {k: v.tolist() for k, v in tensors.items()},
    }  # fmt: skip


@pytest.mark.parametrize("block", [1, 7, 512])
@pytest.mark.parametrize(("rows", "kind"), [
    (PAIRS, "pairs"), (PAIRS, "unpaired"), (PAIRS, "completions"), (PAIRS, "prompts"), (DIALOGUES, "completions"),
    (DIALOGUES, "prompts"),
], ids=["pairs", "unpaired", "completions", "prompts", "dialogues", "prompts of dialogues"])  # fmt: skip
def test_streamed_samples_are_the_same(
    rows: Any, kind: Any, block: int, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids, masks, columns, the users' columns, the report; with a store, without, and read again from it."""
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in rows))
    plain, report = tokenise(load_dataset(file), words, kind, max_length=40)
    monkeypatch.setattr(tokens_module, "BLOCK", block)
    streamed = load_dataset(file, streaming=True)
    assert len(streamed) == len(load_dataset(file))
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        samples, told = tokenise(streamed, words, kind, max_length=40, cache=cache)
        assert facts(samples) == facts(plain) and told.lines() == report.lines()
        order = np.arange(len(plain))[::-2]
        assert facts(samples.take(order)) == facts(plain.take(order))
    assert isinstance(samples.completions.flat, np.memmap) or kind == "prompts"


@pytest.mark.parametrize("first", [False, True])
def test_streamed_and_held_rows_share_no_store(first: bool, words: Any, tmp_path: Path) -> None:
    """Streamed ones keep the users' columns there."""
    plain, _ = tokenise(PAIRS, words, "pairs")
    for streaming in (first, not first) * 2:
        samples, _ = tokenise(load_dataset(PAIRS, streaming=streaming), words, "pairs", cache=tmp_path)
        assert facts(samples) == facts(plain)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_length_is_known_before_a_pass() -> None:
    """Of what is made from a stream, too."""
    rows = [row for row in PAIRS if row["rejected"]]
    for to, count in (("unpaired", 2 * len(rows)), ("prompt", len(convert(load_dataset(rows), "prompt")))):
        made = convert(load_dataset(rows, streaming=True), to)  # type: ignore[arg-type]
        assert len(made) == count == len(list(made)) == len(made)


class Row(dict[str, Any]):
    """A row that can be watched."""


@pytest.mark.parametrize("source", ["file", "iterable dataset"])
def test_few_rows_are_alive_at_a_time(source: str, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3,000 rows never more than some blocks."""
    monkeypatch.setattr(tokens_module, "BLOCK", 50)
    alive: weakref.WeakSet[Row] = weakref.WeakSet()
    Row.__hash__ = object.__hash__  # type: ignore[method-assign, assignment]
    most = 0

    def watched(rows: Iterator[Any]) -> Iterator[Any]:
        nonlocal most
        for row in rows:
            one = Row(row)
            alive.add(one)
            most = max(most, len(alive))
            yield one

    rows = ({"prompt": f"say {i % 9}", "completion": " one", "label": True} for i in range(3000))
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    if source == "file":
        original = readers._json
        monkeypatch.setattr(readers, "_json", lambda *a: watched(original(*a)))
        data = load_dataset(file, streaming=True)
    else:
        stream = datasets.IterableDataset.from_generator(lambda: map(json.loads, file.open()))
        original_library = readers._library

        def library(*arguments: Any) -> Any:
            name, read = original_library(*arguments)
            return name, lambda: watched(read())

        monkeypatch.setattr(readers, "_library", library)
        data = load_dataset(stream, streaming=True)
    samples, _ = tokenise(data, words, "unpaired")
    gc.collect()
    assert len(samples) == len(data) == 3000 and 0 < most <= 200


def test_memory_does_not_hold_the_texts(words: Any, tmp_path: Path) -> None:
    """The peak of streaming 4,000 rows of 2 kB is a small part of reading them all."""
    file = tmp_path / "d.jsonl"
    row = {"prompt": "say", "completion": " one", "label": True}
    file.write_text("\n".join(json.dumps({**row, "note": f"{i} " + "x" * 2000}) for i in range(4000)))

    def peak(streaming: bool) -> int:
        gc.collect()
        tracemalloc.start()
        samples, _ = tokenise(load_dataset(file, streaming=streaming), words, "unpaired", cache=tmp_path / "cache")
        assert len(samples) == 4000
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(streaming=True) < peak(streaming=False) / 3


def test_what_needs_all_rows_is_refused(words: Any, tmp_path: Path) -> None:
    scored = load_dataset([{"prompt": "say", "completion": "x", "score": 1.0}], streaming=True)
    with pytest.raises(UsageError, match=r"grouped by prompt.*leave out streaming"):
        tokenise(scored, words, "pairs")
    with pytest.raises(UsageError, match="data list is streamed, its rows are never all in memory"):
        scored.rows  # noqa: B018
    file = tmp_path / "d.json"
    file.write_text("[{}]")
    with pytest.raises(UsageError, match=r"one JSON array, .*read as a whole; stream JSON Lines"):
        load_dataset(file, streaming=True)


def test_faults_are_found_before_anything_is_trained(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": ""}\n{"prompt": "b"}\n{"prompt": "c"')
    with pytest.raises(UsageError, match="line 4 is not JSON"):
        load_dataset(file, streaming=True)
    file.write_text('{"prompt": "a"}\n{"prompt": ""}\n{"prompt": "b"}')
    data = load_dataset(file, streaming=True)
    assert len(data) == 2 and data.report.dropped == {"an empty prompt": 1} and data.streamed
    assert list(data) == list(data) == [{"prompt": "a"}, {"prompt": "b"}]
    assert data.report.dropped == {"an empty prompt": 1}, "a second pass counts nothing twice"
    with pytest.raises(UsageError, match="row 2: an empty prompt"):
        load_dataset(file, streaming=True, strict=True)


def test_a_stream_can_be_split_by_prompt(words: Any) -> None:
    kept = [row for row in PAIRS if row["rejected"]]
    for part, whole in zip(split_by_prompt(load_dataset(PAIRS, streaming=True), 0.3, seed=1),
                           split_by_prompt(load_dataset(PAIRS), 0.3, seed=1), strict=True):  # fmt: skip
        assert part.streamed and list(part) == whole.rows and 0 < len(whole) < len(kept)
        found = [tokenise(data, words, "pairs")[0] for data in (part, whole)]
        assert facts(found[0]) == facts(found[1])


def test_a_failed_run_leaves_no_store(words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bad = [*({**pair, "weight": 1.0} for pair in PAIRS), PAIRS[1]]
    for cache in (tmp_path, None):
        with pytest.raises(UsageError, match="column 'weight', row 33"):
            tokenise(load_dataset(bad, streaming=True), words, "pairs", cache=cache)
    samples, _ = tokenise(load_dataset(PAIRS, streaming=True), words, "pairs")
    assert samples.extra["tags"][3] == samples.extra["tags"][:4][3] == ["x", {"n": 4}]
    assert list(tmp_path.iterdir()) == []
