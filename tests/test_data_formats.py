"""Every type of data set, from every kind of file, and what becomes of it: mixtures, copies, overlap, conversions."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefzoo.data.convert import best_first, can_become, to_implicit
from prefzoo.data.formats import DataSource, convert, load_dataset, split_by_prompt
from prefzoo.data.rows import SHAPES, split_characters
from prefzoo.registry import UsageError

Row = dict[str, Any]


def said(*turns: str) -> list[Row]:
    """Messages: "user: Hi" and so on."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


def shared(*turns: str) -> list[Row]:
    return [dict(zip(("from", "value"), turn.split(": ", 1), strict=True)) for turn in turns]


ASK, RED, TEN = said("user: Colour?"), said("assistant: Red."), said("assistant: Ten.")
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
CALLS = [
    *said("user: Time?"),
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {}}}]},
    *said("tool: 10:00", "assistant: Ten."),
]

# Name -> the row as it stands in a file, the type it is found to be, and its normal form (None: the same).
SHAPED: dict[str, tuple[Row, str, Row | None]] = {
    "language modelling, standard": ({"text": "The sky is blue."}, "language_modeling", None),
    "language modelling, conversational": ({"messages": ASK + RED}, "language_modeling", None),
    "prompt only, standard": ({"prompt": "The sky is"}, "prompt", None),
    "prompt only, conversational": ({"prompt": ASK}, "prompt", None),
    "prompt completion, standard": ({"prompt": "The sky is", "completion": " blue."}, "prompt_completion", None),
    "prompt completion, conversational": ({"prompt": ASK, "completion": RED}, "prompt_completion", None),
    "preference, explicit, standard": (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "preference", None,
    ),
    "preference, explicit, conversational": ({"prompt": ASK, "chosen": RED, "rejected": TEN}, "preference", None),
    "preference, implicit, standard": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."}, "preference",
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    ),
    "preference, implicit, conversational": (
        {"chosen": ASK + RED, "rejected": ASK + TEN}, "preference", {"prompt": ASK, "chosen": RED, "rejected": TEN},
    ),
    "preference, prompt repeated as text": (
        {"prompt": "Colour?", "chosen": ASK + RED, "rejected": ASK + TEN}, "preference",
        {"prompt": ASK, "chosen": RED, "rejected": TEN},
    ),
    "preference, prompt repeated in the sides": (
        {"prompt": ASK, "chosen": ASK + RED, "rejected": ASK + TEN}, "preference",
        {"prompt": ASK, "chosen": RED, "rejected": TEN},
    ),
    "unpaired, standard": ({"prompt": "The sky is", "completion": " blue.", "label": True}, "unpaired", None),
    "unpaired, conversational": ({"prompt": ASK, "completion": TEN, "label": False}, "unpaired", None),
    "stepwise": (
        {"prompt": "2 + 2 * 3 =", "completions": [" 2 + 6 =", " 9"], "labels": [True, False]}, "stepwise", None,
    ),
    "ranking with scores": (
        {"prompt": "The sky is", "completions": [" blue.", " green.", " up."], "scores": [1.5, 0.0, 1.5]}, "ranking",
        None,
    ),
    "ranking with ranks": ({"prompt": ASK, "completions": [TEN, RED], "ranks": [2, 1]}, "ranking", None),
    "scored": ({"prompt": "The sky is", "completion": " blue.", "score": 0.5}, "scored", None),
    "a tie": ({"prompt": "The sky is", "chosen": " blue.", "rejected": " clear.", "tie": True}, "preference", None),
    "a margin": ({"prompt": "The sky is", "chosen": " blue.", "rejected": " up.", "margin": 0.5}, "preference", None),
    "tools and template arguments": (
        {"prompt": CALLS[:1], "completion": CALLS[1:], "tools": TOOLS, "chat_template_kwargs": {"think": False}},
        "prompt_completion", None,
    ),
    "tools as a string": (
        {"messages": CALLS, "tools": json.dumps(TOOLS)}, "language_modeling", {"messages": CALLS, "tools": TOOLS},
    ),
    "ShareGPT": (
        {"conversations": shared("human: Colour?", "gpt: Red.")}, "language_modeling", {"messages": ASK + RED},
    ),
    "ShareGPT with a system text": (
        {"conversations": shared("human: Colour?", "gpt: Red."), "system": "Be short."}, "language_modeling",
        {"messages": said("system: Be short.") + ASK + RED},
    ),
    "ShareGPT with tools": (
        {"conversations": shared("human: Time?", "function_call: clock()", "observation: 10:00", "gpt: Ten.")},
        "language_modeling",
        {"messages": said("user: Time?", "assistant: clock()", "tool: 10:00", "assistant: Ten.")},
    ),
    "ShareGPT pairs": (
        {"conversations": shared("human: Colour?"), "chosen": shared("gpt: Red.")[0],
         "rejected": shared("gpt: Ten.")[0]},
        "preference", {"prompt": ASK, "chosen": RED, "rejected": TEN},
    ),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Col"}, {"type": "text", "text": "our?"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}]},
        "language_modeling", {"messages": ASK + RED},
    ),
    "other columns": ({"prompt": "2 + 2 =", "answer": "4", "level": 3}, "prompt", None),
}  # fmt: skip
assert {kind for _, kind, _ in SHAPED.values()} == {kind for kind, _ in SHAPES}, "every type has a file of its shape"


def write(folder: Path, form: str, rows: list[Row]) -> Path:
    file = folder / f"data.{form}"
    if form.startswith("jsonl"):
        text = "".join(json.dumps(r) + "\n" for r in rows).encode()
        file.write_bytes(gzip.compress(text) if form.endswith("gz") else text)
    elif form == "json":
        file.write_text(json.dumps(rows))
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=2)
    elif form == "library.parquet":  # the datasets library writes types of its own into the file
        datasets.Dataset.from_list(rows).to_parquet(file)
    elif form in ("folder", "arrow"):
        datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
        file = folder / "saved" if form == "folder" else next((folder / "saved").glob("*.arrow"))
    else:
        with gzip.open(file, "wt", newline="") if form.endswith("gz") else file.open("w", newline="") as out:
            table = csv.DictWriter(out, list(rows[0]), delimiter="\t" if form.startswith("tsv") else ",")
            table.writeheader()
            table.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()} for r in rows)
    return file


FORMS = ["jsonl", "jsonl.gz", "json", "csv", "csv.gz", "tsv", "parquet", "library.parquet", "folder", "arrow"]


@pytest.fixture(autouse=True)
def quiet_library() -> None:
    datasets.disable_progress_bars()


@pytest.mark.parametrize("name", SHAPED)
def test_every_shape_is_read(name: str) -> None:
    row, kind, expected = SHAPED[name]
    data = load_dataset([row])
    assert (data.type, data.rows) == (kind, [expected or row]) and not data.report.dropped


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SHAPED)
def test_every_shape_is_read_from_every_kind_of_file(name: str, form: str, tmp_path: Path) -> None:
    """The file says what the list says, streamed or not. (An empty JSON object has no type in Arrow.)"""
    row, _, _ = SHAPED[name]
    if "level" in row and form[0] in "ct":
        row = {**row, "level": "3"}  # users' columns of a CSV file are text
    if "tool_calls" in str(row) and form in ("parquet", "library.parquet", "folder", "arrow"):
        row = json.loads(json.dumps(row).replace('"arguments": {}', '"arguments": "{}"')
                         .replace('"parameters": {"type": "object"}', '"parameters": "none"'))  # fmt: skip
    file = write(tmp_path, form, [row, row])
    expected = load_dataset([row, row])
    data = load_dataset(file)
    assert (data.type, data.rows) == (expected.type, expected.rows)
    if form != "json":
        streamed = load_dataset(str(file), streaming=True)
        assert list(streamed) == list(streamed) == expected.rows and streamed.hash() == data.hash()


@pytest.mark.parametrize("make", [
    datasets.Dataset.from_list, lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    lambda rows: datasets.DatasetDict(train=datasets.Dataset.from_list(rows), test=datasets.Dataset.from_list([])),
    lambda rows: datasets.Dataset.from_list(rows).with_format("torch"), lambda rows: tuple(rows),
], ids=["Dataset", "IterableDataset", "DatasetDict", "torch format", "tuple"])  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
def test_objects_in_memory(make: Any, streaming: bool) -> None:
    rows = [{"prompt": str(i), "completion": "x", "label": i % 2 == 0, "n": i} for i in range(5)]
    assert list(load_dataset(make(rows), streaming=streaming)) == rows


def test_null_keys_of_arrow_are_stripped() -> None:
    """Arrow gives every message the keys of all messages, and every tool those of all tools."""
    rows = [
        {"messages": CALLS, "tools": TOOLS},
        {"messages": ASK + RED, "tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
    ]
    filled = json.loads(json.dumps(rows))
    for message in (m for row in filled for m in row["messages"]):
        for key in ("content", "tool_calls", "thinking"):
            message.setdefault(key, None)
    filled[0]["tools"][0]["function"]["strict"] = None
    assert load_dataset(filled).rows == rows


# ------------------------------------------------------------------------------------------------ places


def test_a_folder_of_files_is_one_data_set(tmp_path: Path) -> None:
    write(tmp_path, "jsonl", [{"prompt": "a"}])
    write(tmp_path, "jsonl.gz", [{"prompt": "b"}])
    write(tmp_path, "parquet", [{"prompt": "c"}])
    (tmp_path / "README.md").write_text("notes")
    assert [r["prompt"] for r in load_dataset(tmp_path)] == ["a", "b", "c"]


def test_splits_are_never_mixed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(json.dumps({"prompt": split}))
    assert [r["prompt"][:5] for r in load_dataset(tmp_path)] == ["train", "train"]
    assert load_dataset(tmp_path).report.source == f"{tmp_path.name}:train"
    for source in (f"{tmp_path}:test", DataSource(tmp_path, split="test"), {"path": str(tmp_path), "split": "test"}):
        assert [r["prompt"] for r in load_dataset(source)] == ["test-00000-of-00001"]
    with pytest.raises(UsageError, match=r"no split 'tst'; did you mean 'test'.*Its splits: test, train"):
        load_dataset(f"{tmp_path}:tst")


def test_files_of_splits_beside_others_are_refused(tmp_path: Path) -> None:
    """Either could be what is meant, and reading both would train on the test rows."""
    for name in ("pairs", "test"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name}))
    with pytest.raises(UsageError, match=r"files of splits \(test\) and others \(pairs\.jsonl\).*'FOLDER:split'"):
        load_dataset(tmp_path)
    assert load_dataset(f"{tmp_path}:test").rows == [{"prompt": "test"}]
    assert load_dataset(tmp_path / "pairs.jsonl").rows == [{"prompt": "pairs"}]


def test_hub_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(path: str, **options: Any) -> Any:
        calls.append((path, options))
        if path == "no/where":
            raise FileNotFoundError("Dataset 'no/where' doesn't exist on the Hub")
        data = datasets.Dataset.from_list([{"question": "a"}])
        data = data.to_iterable_dataset() if options["streaming"] else data
        return data if options["split"] else {"train": data, "test": data}

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.DatasetDict, "column_names", {}, raising=False)
    columns = {"prompt": "question"}
    assert load_dataset("org/name:test", columns=columns).rows == [{"prompt": "a"}]
    source = DataSource("org/name", split="test", name="main", revision="v1", columns=columns)
    assert list(load_dataset(source, streaming=True)) == [{"prompt": "a"}]
    found = load_dataset("org/name", columns=columns)
    assert found.rows == [{"prompt": "a"}] and found.report.source == "org/name:train"
    options = {"name": None, "revision": None, "streaming": False}
    assert calls[0] == ("org/name", {**options, "split": "test"})
    assert calls[1] == ("org/name", {"name": "main", "revision": "v1", "streaming": True, "split": "test"})
    with pytest.raises(UsageError, match="'no/where' is no file here, and as a hub id it cannot be loaded: Dataset"):
        load_dataset("no/where")


@pytest.mark.parametrize(("source", "message"), [
    ({"path": "d.jsonl", "splt": "x"}, r"no key 'splt'; did you mean 'split'"), ({"split": "x"}, "'path' is missing"),
    (DataSource([{"prompt": "a"}], name="x"), "name='x' has no effect on rows in memory"),
    (DataSource("data.csv", split="x"), "no such file"), ("folder/data.csv", "no such file"),
], ids=str)  # fmt: skip
def test_sources_that_make_no_sense(source: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_dataset(source)


BROKEN = {
    "csv with more cells than columns": ("d.csv", b"prompt,completion\na,b,c\n", "row 1: more cells than the header"),
    "csv with an open quote": ("d.csv", b'prompt,completion\n"a,b\n', "cannot be read: unexpected end of data"),
    "csv, not UTF-8": ("d.csv", "prompt\nä\n".encode("latin-1"), "cannot be read: .*utf-8"),
    "no parquet": ("d.parquet", b"hello", "cannot be read: "),
    "no arrow": ("d.arrow", b"hello", "cannot be read: "),
    "no gzip": ("d.csv.gz", b"prompt\na\n", "cannot be read: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_told_in_words(name: str, tmp_path: Path) -> None:
    file, content, message = BROKEN[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UsageError, match=f"^data .*{file}.*{message}"):
        load_dataset(tmp_path / file)


def test_cells_of_csv_files_keep_what_they_say(tmp_path: Path) -> None:
    """A prompt that looks like a number, or an answer like JSON, is text; labels are not; long cells are read."""
    rows = [{"prompt": "4", "completion": "true", "label": True, "n": "1"},
            {"prompt": "x" * 200_000, "completion": '[{"name": "a,b"}]\n', "label": False, "n": ""}]  # fmt: skip
    assert load_dataset(write(tmp_path, "csv", rows)).rows == rows


@pytest.mark.parametrize("said_as", ["{}", "[{}]"])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value"), ("content", "role")])
def test_messages_as_python_prints_them_are_refused(keys: tuple[str, str], said_as: str, tmp_path: Path) -> None:
    """They would be trained on as text; as JSON the same cell holds messages."""
    cell = {keys[0]: "user", keys[1]: "assistant"}
    rows = [{"prompt": said_as.format(write_as(cell)), "completion": "x"} for write_as in (str, json.dumps)]
    with pytest.raises(UsageError, match=r"row 1, column 'prompt': messages as Python prints them.*json\.dumps"):
        load_dataset(write(tmp_path, "csv", rows[:1]))
    with pytest.raises(UsageError, match="text and messages in one row"):
        load_dataset(write(tmp_path, "csv", rows[1:]))


# ------------------------------------------------------------------------------------------------ columns


def test_columns_under_other_names() -> None:
    rows = [{"question": "The sky is", "good": " blue", "bad": " green", "id": 3}]
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert load_dataset(rows, columns=names).rows == [
        {"prompt": "The sky is", "chosen": " blue", "rejected": " green", "id": 3}
    ]
    with pytest.raises(
        UsageError, match=r"there is no column 'goood'; did you mean 'good'\? Its columns: question, go"
    ):
        load_dataset(rows, columns={"chosen": "goood"})
    loaded = load_dataset(rows, columns=names)
    for options, name in (({"columns": names}, "columns"), ({"streaming": True}, "streaming")):
        with pytest.raises(UsageError, match=f"{name} has no effect on data list, which are loaded already"):
            load_dataset(loaded, **options)  # type: ignore[arg-type]


@given(st.text("ab ", max_size=6), st.text("ab ", max_size=4), st.text("ab ", max_size=4))
def test_the_character_rule_is_the_references(prefix: str, left: str, right: str) -> None:
    """TRL's extract_prompt, written as its sources state it, wherever it gives a prompt and two answers."""
    chosen, rejected = prefix + left, prefix + right
    if not chosen or not rejected:
        return
    index = 0
    for index in range(min(len(chosen), len(rejected))):
        if chosen[index] != rejected[index]:
            index -= chosen[index - 1] == " "
            break
    if index > 0:
        assert split_characters(chosen, rejected) == index
    if chosen == rejected or index < 1:
        with pytest.raises(UsageError, match="no usable row is left"):
            load_dataset([{"chosen": chosen, "rejected": rejected}], implicit_prompt="character")


def test_the_rules_of_implicit_prompts_differ_inside_words() -> None:
    rows = [{"chosen": "The sky is blue", "rejected": "The sky is black"}]
    assert load_dataset(rows).rows[0]["prompt"] == "The sky is"
    assert load_dataset(rows, implicit_prompt="character").rows[0]["prompt"] == "The sky is bl"
    with pytest.raises(UsageError, match="expected 'word' or 'character'"):
        load_dataset(rows, implicit_prompt="token")  # type: ignore[arg-type]


def test_a_dialogue_that_begins_another_keeps_its_last_turn() -> None:
    more = said("user: Why?", "assistant: Light.")
    (row,) = load_dataset([{"chosen": ASK + RED + more, "rejected": ASK + RED}]).rows
    assert row == {"prompt": ASK, "chosen": RED + more, "rejected": RED}


# ------------------------------------------------------------------------------------------------ mixtures


def numbered(name: str, count: int) -> list[Row]:
    return [{"prompt": f"{name}{i}"} for i in range(count)]


def test_sources_follow_each_other(tmp_path: Path) -> None:
    file = write(tmp_path, "jsonl", numbered("a", 3))
    data = load_dataset([file, DataSource(numbered("b", 2))])
    assert [r["prompt"] for r in data] == ["a0", "a1", "a2", "b0", "b1"] and data.report.source == "data.jsonl + list"
    pairs = [{"prompt": "x", "chosen": "a", "rejected": "b"}]
    with pytest.raises(UsageError, match=r"a mixture of types: data data\.jsonl is prompt, list is preference"):
        load_dataset([file, DataSource(pairs)])
    with pytest.raises(UsageError, match="a mixture of text and messages"):
        load_dataset([file, DataSource([{"prompt": ASK}])])
    faulty = load_dataset([file, DataSource([{"prompt": ""}, {"prompt": "b"}])])
    assert faulty.report.dropped == Counter({"an empty prompt": 1}) and len(faulty) == 4


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
def test_weights_are_the_shares_of_a_mixture(a: int, b: int, w: int, v: int, seed: int) -> None:
    """As many rows as the shares allow, none twice; the same seed gives the same mixture, streamed or not."""
    parts = [DataSource(numbered("a", a), weight=w), DataSource(numbered("b", b), weight=v)]
    try:
        rows = [r["prompt"] for r in load_dataset(parts, seed=seed)]
    except UsageError:
        whole = min(a / w, b / v)
        assert min(int(whole * w + 1e-6), int(whole * v + 1e-6)) == 0, "a source that would give no row"
        return
    assert len(set(rows)) == len(rows)
    count = Counter(r[0] for r in rows)
    whole = min(a / w, b / v)
    assert count["a"] == int(whole * w + 1e-6) and count["b"] == int(whole * v + 1e-6)
    assert rows == [r["prompt"] for r in load_dataset(parts, seed=seed, streaming=True)]


def test_every_source_has_a_weight_or_none() -> None:
    for weights in ([1, None], [1, 0], [1, -1], [1, "2"], [1, float("inf")], [1, float("nan")]):
        with pytest.raises(UsageError, match="every source needs one above zero, or none has one"):
            load_dataset([DataSource(numbered("a", 3), weight=w) for w in weights])
    data = load_dataset([{"path": numbered(n, 8), "weight": w} for n, w in (("a", 3), ("b", 1))])
    assert Counter(r["prompt"][0] for r in data) == {"a": 8, "b": 2}
    assert data.report.notes == {
        "rows taken of the 8 of source 1, list": 8,
        "rows taken of the 8 of source 2, list": 2,
    } and data.rows != sorted(data.rows, key=str)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_shares_are_those_of_the_rows_that_are_kept(streaming: bool) -> None:
    """Nine of ten rows of a are copies, half of b asks what the evaluation asks: still one to one."""
    parts = [DataSource(numbered("a", 10) * 10, weight=1), DataSource(numbered("b", 40), weight=1)]
    options: dict[str, Any] = {"deduplicate": True, "without_prompts_of": numbered("b", 20), "streaming": streaming}
    data = load_dataset(parts, **options)
    assert Counter(r["prompt"][0] for r in data) == {"a": 10, "b": 10}
    assert data.report.cut == {
        "exact copies of earlier rows left out": 90,
        "rows left out: their prompt is in the evaluation data list": 20,
    }


def test_the_seed_chooses_the_rows_of_a_mixture() -> None:
    """Not the first ones: over some seeds any row is taken, whether or not the other source fills up."""
    parts = [DataSource(numbered("a", 8), weight=1), DataSource(numbered("b", 2), weight=1)]
    taken = [frozenset(r["prompt"] for r in load_dataset(parts, seed=s) if r["prompt"][0] == "a") for s in range(40)]
    assert len(set(taken)) > 5 and frozenset().union(*taken) == {f"a{i}" for i in range(8)}


# ------------------------------------------------------------------------------------------------ copies, overlap


@pytest.mark.parametrize("streaming", [False, True])
def test_copies_are_counted_and_left_out_on_request(streaming: bool) -> None:
    rows = [*numbered("a", 3), *numbered("a", 2), {"prompt": "a0", "level": 1}]
    data = load_dataset(rows, streaming=streaming)
    assert len(data) == 6 and data.report.notes == {"rows are exact copies of earlier ones": 2}
    data = load_dataset(rows, deduplicate=True, streaming=streaming)
    assert list(data) == [*numbered("a", 3), rows[-1]]
    assert data.report.cut == {"exact copies of earlier rows left out": 2}
    again = load_dataset(load_dataset(rows), deduplicate=True)
    assert again.rows == list(data)


@pytest.mark.parametrize("streaming", [False, True])
def test_prompts_of_the_evaluation_are_left_out(streaming: bool) -> None:
    pairs = [{"prompt": f"a{i % 4}", "chosen": f" {i}", "rejected": " x"} for i in range(8)]
    data = load_dataset(pairs, without_prompts_of=numbered("a", 2), streaming=streaming)
    assert {r["prompt"] for r in data} == {"a2", "a3"} and len(data) == 4
    assert data.report.cut == {"rows left out: their prompt is in the evaluation data list": 4}
    dialogues = [{"messages": said(f"user: {i}", "assistant: x")} for i in range(3)]
    held = load_dataset([{"prompt": said("user: 1")}])
    assert len(load_dataset(dialogues, without_prompts_of=held, streaming=streaming)) == 2
    with pytest.raises(UsageError, match="no usable row is left"):
        load_dataset(pairs, without_prompts_of=pairs, streaming=streaming)


def test_copies_are_compared_to_the_last_item() -> None:
    """The text of a long array leaves its middle out."""
    whole = np.arange(3000)
    rows = [{"prompt": "a", "x": x} for x in (whole, whole.copy(), np.where(whole == 1500, 7, whole))]
    assert len(load_dataset(rows, deduplicate=True)) == 2


@pytest.mark.parametrize("asked", [
    " Colour?\n", said("user: Colour?"), said("user:  Colour? "), [{"role": "user", "content": "Colour?", "id": 7}],
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["text", "message", "dialogue"])
def test_a_question_is_the_same_in_any_dress(kind: str, asked: Any) -> None:
    """White space at its ends, other keys of messages, text or one message of the user."""
    row = {"text": {"prompt": "Colour?", "completion": "Red."}, "message": {"prompt": ASK, "completion": RED},
           "dialogue": {"messages": ASK + RED}}[kind]  # fmt: skip
    with pytest.raises(UsageError, match=r"no usable row is left(?s:.)*their prompt is in the evaluation data"):
        load_dataset([row], without_prompts_of=[{"prompt": asked}])
    for other in ("Col our?", said("system: Be.", "user: Colour?"), said("tool: Colour?")):
        assert len(load_dataset([row], without_prompts_of=[{"prompt": other}])) == 1


@given(st.lists(st.integers(0, 9), min_size=2, max_size=30), st.floats(0.05, 0.95), st.integers(0, 5))
def test_no_prompt_is_on_both_sides_of_a_split(prompts: list[int], share: float, seed: int) -> None:
    if len(set(prompts)) < 2:
        prompts.append(99)
    data = load_dataset([{"prompt": str(p), "completion": str(i)} for i, p in enumerate(prompts)])
    train, held = split_by_prompt(data, share, seed)
    left, right = ({r["prompt"] for r in part} for part in (train, held))
    assert (
        left and right and not left & right and len(train) + len(held) == len(prompts) == train.report.rows + len(held)
    )
    assert len(right) == min(max(round(share * len(set(prompts))), 1), len(set(prompts)) - 1)
    assert split_by_prompt(data, share, seed)[1].rows == held.rows


def test_the_seed_chooses_what_is_held_out() -> None:
    data = load_dataset(numbered("a", 8))
    held = [frozenset(r["prompt"] for r in split_by_prompt(data, 0.25, seed)[1]) for seed in range(40)]
    assert len(set(held)) > 5 and frozenset().union(*held) == {f"a{i}" for i in range(8)}


# ------------------------------------------------------------------------------------------------ conversions

TYPES = [kind for kind, _ in SHAPES]
CONVERTIBLE = sorted({(a, to) for to in TYPES for a in can_become(to) if a != to})
GROUPS = {  # by the compatibility page, and ours beyond it
    "prompt_completion": {"language_modeling", "prompt"},
    "preference": {"ranking", "scored", "language_modeling", "prompt_completion", "prompt", "unpaired"},
    "unpaired": {"language_modeling", "prompt_completion", "prompt"},
    "stepwise": {"language_modeling", "prompt_completion", "prompt", "unpaired"},
    "ranking": {"preference", "scored", "language_modeling", "prompt_completion", "prompt", "unpaired"},
    "scored": {"ranking", "preference", "language_modeling", "prompt_completion", "prompt", "unpaired"},
    "language_modeling": {"prompt_completion", "prompt"},
}


def test_the_conversions_are_those_of_the_page() -> None:
    found: dict[str, set[str]] = {}
    for a, b in CONVERTIBLE:
        found.setdefault(a, set()).add(b)
    assert found == GROUPS


PROMPT = "The sky is"
EXAMPLE: dict[str, list[Row]] = {
    "preference": [{"prompt": PROMPT, "chosen": " blue", "rejected": " up", "id": 1}],
    "unpaired": [{"prompt": PROMPT, "completion": c, "label": c == " blue", "id": 1} for c in (" blue", " up")],
    "stepwise": [{"prompt": PROMPT, "completions": [" bl", "ue"], "labels": [True, True], "id": 1},
                 {"prompt": PROMPT, "completions": [" ", "up"], "labels": [True, False], "id": 1}],
    "ranking": [{"prompt": PROMPT, "completions": [" up", " blue"], "ranks": [2, 1], "id": 1}],
    "scored": [{"prompt": PROMPT, "completion": c, "score": s, "id": 1} for c, s in ((" blue", 1), (" up", 0.5))],
    "prompt_completion": [{"prompt": PROMPT, "completion": " blue", "id": 1}],
    "language_modeling": [{"text": PROMPT + " blue", "id": 1}],
    "prompt": [{"prompt": PROMPT, "id": 1}],
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("a", "b"), CONVERTIBLE, ids=" to ".join)
def test_all_types_say_the_same(a: Any, b: Any, streaming: bool) -> None:
    """One fact (blue is better than up) told in every type: a conversion gives what the other type says."""
    data = load_dataset(EXAMPLE[a], streaming=streaming)
    if a == "language_modeling":
        with pytest.raises(UsageError, match=r"plain text .* has no prompt"):
            list(convert(data, b))
        return
    if a == "scored" and streaming and b != "prompt":
        with pytest.raises(UsageError, match="all must be in memory; leave out streaming"):
            convert(data, b)
        return
    converted = convert(data, b)
    expected = EXAMPLE[b]
    if (a, b) == ("scored", "preference"):
        expected = [{**row, "score_chosen": 1.0, "score_rejected": 0.5} for row in expected]
    if b == "ranking":
        told = {"scores": [1.0, 0.5]} if a == "scored" else {"ranks": [1, 2]}
        expected = [{"prompt": PROMPT, "completions": [" blue", " up"], "id": 1, **told}]
    if b == "scored":  # an order alone is no score
        expected = []
        assert list(converted) == [] and len(converted.report.cut) == 1
    assert list(converted) == expected and converted.report.rows == len(expected) and converted.type == b
    assert list(converted) == expected, "and again"


def test_pairs_as_rankings_keep_the_choice_whatever_their_scores_say() -> None:
    rows = [{**EXAMPLE["preference"][0], "score_chosen": c, "score_rejected": r, "margin": 1.0, "weight": 2.0}
            for c, r in ((0.5, 0.25), (0.25, 0.5))]  # fmt: skip
    rows.append({**EXAMPLE["preference"][0], "tie": True})
    ranked = convert(load_dataset(rows), "ranking")
    whole = {"prompt": PROMPT, "id": 1, "weight": 2.0, "completions": [" blue", " up"], "ranks": [1, 2]}
    assert ranked.rows == [{**whole, "scores": [0.5, 0.25]}, {**whole, "scores": [0.25, 0.5]}]
    assert ranked.report.cut == {"ties left out: neither side is the better one": 1}
    assert [best_first(row) for row in ranked.rows] == [[0, 1], [0, 1]]
    each = [{"prompt": PROMPT, "id": 1, "weight": 2.0, "completion": c, "score": s}
            for c, s in ((" blue", 0.5), (" up", 0.25), (" blue", 0.25), (" up", 0.5))]  # fmt: skip
    scored = convert(load_dataset(rows), "scored")
    assert scored.rows == each == convert(ranked, "scored").rows
    assert scored.report.cut == {"pairs left out: no number in score_chosen and score_rejected": 1}


@pytest.mark.parametrize("row", [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello", "rejected": " Hell"},
    {"prompt": ASK, "chosen": RED, "rejected": TEN}, {"prompt": ASK, "chosen": RED + ASK + TEN, "rejected": TEN},
], ids=str)  # fmt: skip
def test_an_implicit_prompt_is_found_again(row: Row) -> None:
    assert load_dataset([to_implicit(row)]).rows == [row]


def test_dialogues_and_their_last_answers_are_the_same() -> None:
    dialogue = {"messages": said("system: Be.", "user: A?", "assistant: B", "user: C?", "assistant: D")}
    data = load_dataset([dialogue])
    answered = convert(data, "prompt_completion")
    assert answered.rows == [{"prompt": dialogue["messages"][:-1], "completion": dialogue["messages"][-1:]}]
    assert convert(answered, "language_modeling").rows == data.rows
    assert convert(data, "prompt").rows == [{"prompt": dialogue["messages"][:-1]}]
    open_end = load_dataset([{"messages": dialogue["messages"][:-1]}])
    assert convert(open_end, "prompt").rows == convert(data, "prompt").rows
    assert convert(load_dataset([{"messages": ASK}]), "prompt_completion").report.cut == {
        "dialogues left out: nothing that the assistant answers": 1
    }


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_rankings_give_all_their_pairs(scores: list[int]) -> None:
    """As many pairs as there are pairs of different score; each puts the higher one first; ranks say the same."""
    row = {"prompt": "p", "completions": [f"c{i}" for i in range(len(scores))]}
    data = load_dataset([{**row, "scores": scores}])
    pairs = convert(data, "preference")
    best = [(i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b]
    assert sorted((r["chosen"], r["rejected"]) for r in pairs) == sorted((f"c{i}", f"c{j}") for i, j in best)
    assert all(r["score_chosen"] > r["score_rejected"] for r in pairs)
    equal = len(scores) * (len(scores) - 1) // 2 - len(best)
    assert pairs.report.cut["pairs of equal score left out"] == (equal if best else 0)
    assert pairs.report.cut["prompts left out: no two answers of different score"] == (not best)
    ranks = [1 + sorted(set(scores), reverse=True).index(s) for s in scores]
    ranked = convert(load_dataset([{**row, "ranks": ranks}]), "preference")
    assert [(r["chosen"], r["rejected"]) for r in ranked] == [(r["chosen"], r["rejected"]) for r in pairs]
    two = convert(data, "unpaired").rows
    assert [r["label"] for r in two] == ([True, False] if best else [])
    assert convert(data, "prompt_completion").rows[0]["completion"] == f"c{scores.index(max(scores))}"


def test_scored_answers_are_grouped_by_prompt() -> None:
    rows = [{"prompt": p, "completion": c, "score": s} for p, c, s in
            (("a", "x", 1), ("b", "y", 2), ("a", "z", 3), ("a", "w", 3))]  # fmt: skip
    data = load_dataset(rows)
    assert convert(data, "ranking").rows == [
        {"prompt": "a", "completions": ["x", "z", "w"], "scores": [1.0, 3.0, 3.0]},
        {"prompt": "b", "completions": ["y"], "scores": [2.0]},
    ]
    pairs = convert(data, "preference")
    assert len(pairs) == 2 and pairs.report.cut == {
        "prompts left out: no two answers of different score": 1, "pairs of equal score left out": 1,
    }  # fmt: skip
    assert [r["completion"] for r in convert(data, "prompt_completion")] == ["z", "y"]
    assert [r["prompt"] for r in convert(data, "prompt")] == ["a", "b"]


def test_ties_have_no_better_side() -> None:
    data = load_dataset([{**EXAMPLE["preference"][0], "tie": t} for t in (True, False, None)])
    rated = convert(data, "unpaired")
    assert len(rated) == 4 and rated.report.cut == {"ties left out: neither side is the better one": 1}
    assert all("tie" not in row for row in rated)
    shown = convert(data, "prompt_completion")
    assert len(shown) == 3 and shown.report.notes == {"demonstrations are the chosen side of a tie": 1}


def test_answers_under_other_tools_or_template_arguments_are_not_compared() -> None:
    row = {"prompt": ASK, "completion": RED, "score": 1.0}
    others: list[Row] = [{}, {"tools": TOOLS}, {"chat_template_kwargs": {"think": True}}]
    data = load_dataset([{**row, **o, "completion": c, "score": s} for o in others for c, s in ((RED, 1.0), (TEN, 2))])
    groups = convert(data, "ranking").rows
    assert [len(g["completions"]) for g in groups] == [2, 2, 2]
    assert [{k: g[k] for k in o} for g, o in zip(groups, others, strict=True)] == others
    assert len(convert(data, "preference")) == 3


def test_of_scores_and_ranks_the_scores_are_believed_and_kept() -> None:
    row: Row = {"prompt": "p", "completions": ["a", "b"], "scores": [0.1, 0.9], "ranks": [2, 1]}
    (pair,) = convert(load_dataset([row]), "preference").rows
    assert pair == {"prompt": "p", "chosen": "b", "rejected": "a", "score_chosen": 0.9, "score_rejected": 0.1}
    del row["scores"]
    assert convert(load_dataset([row]), "preference").rows == [{"prompt": "p", "chosen": "b", "rejected": "a"}]


def test_prompts_carry_nothing_that_judges_answers() -> None:
    """Of any type; what the user says beside it goes on to the reward functions."""
    judged = {"margin": 2.0, "tie": False, "score_chosen": 1.0, "score_rejected": 0.0, "score": 1.0}
    for kind in ("preference", "unpaired", "ranking", "scored", "prompt_completion"):
        rows = convert(load_dataset([{**judged, **row, "answer": "blue"} for row in EXAMPLE[kind]]), "prompt").rows
        assert rows == [{"prompt": PROMPT, "id": 1, "answer": "blue"}], kind


def test_the_end_of_a_dialogue_that_no_answer_follows_is_counted() -> None:
    data = convert(load_dataset([{"messages": ASK + RED + said("user: Why?", "user: Why??")}]), "prompt_completion")
    assert data.rows == [{"prompt": ASK, "completion": RED}]
    assert data.report.cut == {"messages after the last answer left out": 2}
