"""Data: what a file or a list becomes, what is dropped or cut and how that is told, and the store of tokens."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

import prefzoo.data.tokens as tokens_module
from prefzoo.data.formats import Dataset, Report, convert, load_dataset, split_text
from prefzoo.data.samples import Ragged, Samples, scatter
from prefzoo.data.tokens import tokenise
from prefzoo.models.load import learn_tokenizer
from prefzoo.registry import UsageError

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
BYE = {"role": "assistant", "content": "Bye"}
TALK = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sky?\n\nAssistant:"
TEMPLATE = """{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""


@pytest.fixture(scope="module")
def words() -> Any:
    tokenizer = learn_tokenizer(["say a: a b c d", TALK + " blue", "[user] [assistant]"], 300)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# ------------------------------------------------------------------------------------------------ formats

PAIR = {"prompt": "say:", "chosen": " a", "rejected": " b"}
FORMATS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "explicit prompt": (PAIR, "preference", PAIR),
    "implicit prompt": (
        {"chosen": "Sky? Answer: blue", "rejected": "Sky? Answer: black"}, "preference",
        {"prompt": "Sky? Answer:", "chosen": " blue", "rejected": " black"},
    ),
    "implicit prompt, None in its column": (
        {"prompt": None, "chosen": "Sky? Answer: blue", "rejected": "Sky? Answer: black"}, "preference",
        {"prompt": "Sky? Answer:", "chosen": " blue", "rejected": " black"},
    ),
    "one side begins the other": (
        {"chosen": "The sky is blue", "rejected": "The sky is"}, "preference",
        {"prompt": "The sky", "chosen": " is blue", "rejected": " is"},
    ),
    "HH transcript": (
        {"chosen": TALK + " blue.", "rejected": TALK + " blueish."}, "preference",
        {"prompt": TALK, "chosen": " blue.", "rejected": " blueish."},
    ),
    "dialogue": (
        {"chosen": [USER, ASSISTANT], "rejected": [USER, BYE]}, "preference",
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [BYE]},
    ),
    "unpaired": (
        {"prompt": "say:", "completion": " a", "label": True}, "unpaired",
        {"prompt": "say:", "completion": " a", "label": True},
    ),
    "unpaired with 0 and 1": (
        {"prompt": "say:", "completion": " a", "label": 0}, "unpaired",
        {"prompt": "say:", "completion": " a", "label": 0},
    ),
    "demonstration": (
        {"prompt": "say:", "completion": " a"}, "prompt_completion", {"prompt": "say:", "completion": " a"},
    ),
    "prompt only": ({"prompt": "say:", "answer": "a"}, "prompt", {"prompt": "say:", "answer": "a"}),
    "messages": ({"prompt": [USER]}, "prompt", {"prompt": [USER]}),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_the_type_is_found_by_the_columns(name: str) -> None:
    row, kind, expected = FORMATS[name]
    data = load_dataset([row])
    assert data.type == kind and {k: v for k, v in data.rows[0].items() if k in expected} == expected
    assert data.report.rows == 1 and not data.report.dropped


TEXT = st.text(alphabet="ab \n", max_size=8)


@given(TEXT, TEXT, TEXT)
def test_an_implicit_prompt_loses_nothing_and_tears_no_word(prefix: str, left: str, right: str) -> None:
    chosen, rejected = prefix + left, prefix + right
    cut = split_text(chosen, rejected)
    assert chosen[:cut] == rejected[:cut] and cut == split_text(rejected, chosen)
    assert cut == 0 or (chosen[cut : cut + 1].isspace() and rejected[cut : cut + 1].isspace())


@given(st.sampled_from(["The sky is", "a", " x y"]), st.sampled_from([" \n", "\n ", "\t ", "\n\t"]))
def test_an_implicit_prompt_ends_where_both_answers_begin_with_a_space(prompt: str, spaces: str) -> None:
    """Each with another one, which leaves the last word whole."""
    assert split_text(prompt + spaces[0] + "blue", prompt + spaces[1] + "up") == len(prompt)


CONVERTED: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("explicit prompt", "prompt_completion"): [{"prompt": "say:", "completion": " a"}],
    ("explicit prompt", "unpaired"): [
        {"prompt": "say:", "completion": " a", "label": True}, {"prompt": "say:", "completion": " b", "label": False},
    ],
    ("explicit prompt", "prompt"): [{"prompt": "say:"}],
    ("unpaired", "prompt_completion"): [{"prompt": "say:", "completion": " a"}],
    ("unpaired with 0 and 1", "prompt_completion"): [],
    ("unpaired", "prompt"): [{"prompt": "say:"}],
    ("demonstration", "prompt"): [{"prompt": "say:"}],
    ("prompt only", "prompt"): [{"prompt": "say:", "answer": "a"}],
}  # fmt: skip


@pytest.mark.parametrize(("name", "to"), CONVERTED, ids=" -> ".join)
def test_conversions(name: str, to: Any) -> None:
    data = load_dataset([FORMATS[name][0]])
    found = convert(data, to)
    assert found.rows == CONVERTED[name, to] and found.type == to
    assert convert(data, data.type) is data


def test_conversions_keep_the_users_columns_and_merge_prompts() -> None:
    rows = [{**PAIR, "level": 3}, {**PAIR, "chosen": " c", "level": 3}, {**PAIR, "level": 4}]
    data = load_dataset(rows)
    assert [r["level"] for r in convert(data, "unpaired").rows] == [3, 3, 3, 3, 4, 4]
    assert convert(data, "prompt").rows == [{"prompt": "say:", "level": 3}, {"prompt": "say:", "level": 4}]


@pytest.mark.parametrize(("name", "to", "could"), [
    ("demonstration", "preference", "preference, ranking, scored"),
    ("demonstration", "unpaired", "unpaired, preference, stepwise, ranking, scored"),
    ("prompt only", "prompt_completion",
     "prompt_completion, preference, unpaired, language_modeling, stepwise, ranking, scored"),
])  # fmt: skip
def test_what_cannot_become_something_says_what_could(name: str, to: Any, could: str) -> None:
    with pytest.raises(UsageError, match=rf"cannot become {to}\. Types that can: {could}\."):
        convert(load_dataset([FORMATS[name][0]]), to)


# ------------------------------------------------------------------------------------------------ faults

ROW_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "say:", "chosen": " a", "rejected": " a"}, "chosen and rejected are identical"),
    ({"prompt": "say:", "chosen": "", "rejected": " b"}, "an empty side"),
    ({"prompt": "", "chosen": " a", "rejected": " b"}, "an empty prompt"),
    ({"prompt": "", "chosen": " a", "rejected": " c"}, "an empty prompt"),
    ({"prompt": None, "chosen": "left", "rejected": "right"}, "chosen and rejected share no prompt"),
    ({"prompt": None, "chosen": "one", "rejected": "one"}, "chosen and rejected are identical"),
    ({"prompt": "say:", "chosen": [ASSISTANT], "rejected": [BYE]}, "text and messages in one row"),
    ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [BYE]}, "text where other rows have messages, or messages"),
    ({"prompt": "say:", "chosen": None, "rejected": " b"}, "chosen is null"),
    ({"prompt": "say:", "chosen": " a", "rejected": "\ud800"}, r"text with half a character"),
    ({"prompt": [USER], "chosen": [], "rejected": [BYE]}, "an empty side"),
    ({"prompt": [USER], "chosen": [{"role": "assistant", "content": ""}], "rejected": [BYE]}, "an empty side"),
    ({"prompt": [USER], "chosen": [{"role": "assistant", "content": None}], "rejected": [BYE]},
     "a message without content"),
    ({"prompt": [{"role": "system", "content": "Be."}], "chosen": [ASSISTANT], "rejected": [BYE]},
     "the prompt ends with a message of role system"),
]  # fmt: skip


def test_faulty_rows_are_dropped_counted_and_shown() -> None:
    data = load_dataset([PAIR, *(row for row, _ in ROW_FAULTS), PAIR])
    assert data.rows == [PAIR, PAIR] and data.report.rows == 2
    assert sum(data.report.dropped.values()) == len(ROW_FAULTS) and data.report.dropped["an empty prompt"] == 2
    words = "\n".join(data.report.lines())
    assert "data list: 2 rows, type preference" in words
    assert "dropped 2 (an empty prompt); for example row 4: {" in words
    for _, fault in ROW_FAULTS:
        assert any(fault in reason for reason in data.report.dropped), fault


@pytest.mark.parametrize(("row", "fault"), ROW_FAULTS)
def test_strict_stops_at_the_first_faulty_row(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(UsageError, match=rf"data list, row 2: {fault}.*it starts \{{"):
        load_dataset([PAIR, row], strict=True)


@pytest.mark.parametrize(("row", "fault"), [
    ({"prompt": "say:", "completion": " a", "label": None}, "label is null"),
    ({"prompt": "say:", "completion": "", "label": True}, "an empty completion"),
])  # fmt: skip
def test_faults_of_unpaired_rows(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(UsageError, match=f"no usable row is left(?s:.)*{fault}"):
        load_dataset([row])


WRONG_TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "steps of messages": (
        {"prompt": [USER], "completions": [[ASSISTANT], [BYE]], "labels": [True, False]},
        "column 'completions': steps are text, got messages",
    ),
    "a dialogue with a label": (
        {"messages": [USER, ASSISTANT], "label": False}, "column 'label': whole dialogues have no label; give 'prompt'",
    ),
    "a ShareGPT dialogue with a label": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "label": 1},
        "column 'label': whole dialogues have no label.*another name",
    ),
    "a number for text": ({**PAIR, "rejected": 3}, "column 'rejected': expected text or a list of messages, got 3 "),
    "texts for messages": ({**PAIR, "prompt": ["say:"]}, "column 'prompt', message 1: expected a mapping with role"),
    "no content": (
        {**PAIR, "chosen": [USER, {"content": "x"}]}, "column 'chosen', message 2: expected a mapping",
    ),
    "content that is a number": (
        {**PAIR, "chosen": [{"role": "user", "content": 4}]}, r"'chosen', message 1: expected text as content, got 4",
    ),
    "an unknown role of ShareGPT": (
        {**PAIR, "chosen": [{"from": "humann", "value": "x"}]}, "unknown role 'humann'; did you mean 'human'",
    ),
    "a picture": ({**PAIR, "image": "a.png"}, "column 'image': pictures are not supported"),
    "a picture among the messages": (
        {**PAIR, "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}]},
        "column 'prompt', message 1: a content part of type image",
    ),
    "a tie that is a word": ({**PAIR, "tie": "no"}, "column 'tie': tie is 'no', not true or false"),
    "a label that is a word": (
        {"prompt": "say:", "completion": " a", "label": "yes"}, "column 'label': label is 'yes', not true or false",
    ),
    "a score that is a word": (
        {"prompt": "say:", "completion": " a", "score": "3"}, "column 'score': expected a number, got '3'",
    ),
    "completions that are text": (
        {"prompt": "say:", "completions": "a", "labels": [True]}, "column 'completions': expected a list",
    ),
    "rank 0": (
        {"prompt": "say:", "completions": ["a", "b"], "ranks": [0, 1]}, "column 'ranks': expected whole numbers from 1",
    ),
    "messages that are text": ({"messages": "hello"}, "column 'messages': expected a list of messages, got text"),
    "text that is a list": ({"text": ["hello"]}, "column 'text': expected text, got"),
    "tools that are not JSON": (
        {"prompt": [USER], "tools": "[{"}, "column 'tools' is not JSON",
    ),
    "tools that are a number": ({"prompt": [USER], "tools": 3}, "column 'tools': expected a list, got 3"),
    "template arguments that are a list": (
        {"prompt": [USER], "chat_template_kwargs": [1]}, "column 'chat_template_kwargs': expected a dict",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_a_value_of_a_wrong_type_stops(name: str) -> None:
    """One row of a wrong type is a data set that is not what it seems: nothing is dropped, the place is named."""
    row, message = WRONG_TYPES[name]
    with pytest.raises(UsageError, match=rf"^data list, row 1, .*{message}"):
        load_dataset([row])
    if "prompt" in row and "chosen" in row:
        with pytest.raises(UsageError, match=rf"^data list, row 2, .*{message}"):
            load_dataset([PAIR, row])


STRUCTURE: dict[str, tuple[str, str]] = {
    "a column is missing": (
        '{"chosen": "a", "rejected": "b"}\n{"chosen": "a"}', r"d\.jsonl, row 2: column 'rejected' is missing",
    ),
    "unknown columns": (
        '{"chosn": "a", "rejected": "b"}', r"d\.jsonl: columns chosn, rejected fit no.*'chosn' looks like 'chosen'",
    ),
    "not JSON": ('{"prompt": "a"}\n\n{"prompt": b}', r"d\.jsonl', line 3 is not JSON .*'{\"prompt\": b}'"),
    "not an object": ('{"prompt": "a"}\n[1]', r"d\.jsonl', line 2: expected a JSON object, got list"),
    "a broken array": ('[{"prompt": "a"},', r"d\.jsonl' is not JSON"),
    "nothing": ("\n\n", r"d\.jsonl: no rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURE)
def test_structural_faults_name_the_place(name: str, tmp_path: Path) -> None:
    text, message = STRUCTURE[name]
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(UsageError, match=f"(?s){message}"):
        load_dataset(tmp_path / "d.jsonl")


@pytest.mark.parametrize(("source", "message"), [
    ([{"prompt": "a"}, "text"], "row 2: expected a mapping, got str"), (3, "data of type int cannot be read"),
    ([], "no rows"), ("nowhere.jsonl", "no such file"), ([{1: "prompt"}], "columns 1 fit no known type"),
    ({"prompt": ["a"]}, "no key 'prompt'.*rows are given as a list"), ((r for r in [PAIR]), "data of type generator"),
], ids=["row", "number", "empty", "no file", "columns", "mapping", "generator"])  # fmt: skip
def test_sources_that_cannot_be_read(source: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_dataset(source)


def test_a_file_with_another_name_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("{}")
    with pytest.raises(UsageError, match=r"did you mean 'pairs\.jsonl'"):
        load_dataset(tmp_path / "pair.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no file of a known kind"):
        load_dataset(tmp_path / "empty")


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "json", "json.gz", "byte order mark", "windows line ends"])
def test_all_files_say_the_same(form: str, tmp_path: Path) -> None:
    rows = [PAIR, {"prompt": "größe\u2028:", "chosen": " 5", "rejected": " 6"}]
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n"
    text = {"json": json.dumps(rows), "json.gz": json.dumps(rows, indent=2), "byte order mark": "\ufeff" + lines,
            "windows line ends": lines.replace("\n", "\r\n")}.get(form, lines)  # fmt: skip
    file = tmp_path / f"d.{form if 'json' in form else 'jsonl'}"
    data = text.encode()
    file.write_bytes(gzip.compress(data) if form.endswith("gz") else data)
    assert load_dataset(file).rows == rows == load_dataset(str(file)).rows
    assert load_dataset(file).hash() == load_dataset(rows).hash() != load_dataset(rows[:1]).hash()


@pytest.mark.parametrize("damage", ["cut", "flipped", "plain"])
def test_a_damaged_archive_is_told_in_words(damage: str, tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(json.dumps(PAIR).encode() * 50))
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "flipped":
        packed[12:20] = b"\xff" * 8
    else:
        packed = bytearray(json.dumps(PAIR).encode())
    (tmp_path / "d.jsonl.gz").write_bytes(bytes(packed))
    with pytest.raises(UsageError, match="cannot be read"):
        load_dataset(tmp_path / "d.jsonl.gz")


def test_datasets_of_the_library() -> None:
    rows = [PAIR, {**PAIR, "chosen": " c"}]
    assert load_dataset(datasets.Dataset.from_list(rows)).rows == rows
    mixed = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}, {"prompt": "c"}])  # fills with None
    data = load_dataset(mixed)
    assert len(data.rows) == 1
    assert data.report.dropped == Counter({"completion is null": 1})
    assert load_dataset(data) is data


def test_hh_transcripts(data_dir: Path, words: Any) -> None:
    """All 2,312 real pairs: the sides differ inside the last turn of the assistant, and nowhere else."""
    data = load_dataset(data_dir / "hh_rlhf" / "hh_rlhf_harmless_test.jsonl.gz")
    empty = sum(data.report.dropped.values())
    assert data.type == "preference" and len(data.rows) + empty == 2312 and empty < 25
    with gzip.open(data_dir / "hh_rlhf" / "hh_rlhf_harmless_test.jsonl.gz", "rt", encoding="utf-8") as file:
        whole = {(r["chosen"], r["rejected"]) for r in map(json.loads, file)}
    for row in data.rows:
        assert row["prompt"].startswith("\n\nHuman:") and row["prompt"].endswith("\n\nAssistant:")
        assert (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) in whole
        assert not any("\n\nHuman:" in row[side] for side in ("chosen", "rejected"))
    samples, report = tokenise(Dataset(data.rows[:50], data.type, data.report), words, "pairs", max_length=512)
    assert report.rows == len(samples) > 10 and report.rows + sum((report.dropped - data.report.dropped).values()) == 50
    cut = sum(samples.completions[b][-1] != words.eos_token_id for b in range(2 * len(samples)))
    assert cut == sum(report.cut.values()) > 0


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "completions", "prompts"])
def test_one_data_set_gives_every_kind(kind: Any, words: Any) -> None:
    """What the ids say, decoded, is what the rows say; completions end in EOS; columns line up."""
    rows = [PAIR, {**PAIR, "chosen": " c"}, {"prompt": "hum:", "chosen": " m m", "rejected": " n"}]
    samples, report = tokenise(rows, words, kind)
    twice = [0, 0, 0, 0, 1, 1]
    of_kind = {"pairs": (3, twice), "unpaired": (6, twice), "completions": (3, [0, 0, 1]), "prompts": (2, [])}
    count, owners = of_kind[kind]
    assert samples.kind == kind and report.rows == len(samples) == count and samples.prompt_B.tolist() == owners
    assert [words.decode(samples.prompts[i]) for i in range(len(samples.prompts))] == ["<bos>say:", "<bos>hum:"]
    said = [words.decode(samples.completions[i]) for i in range(len(samples.completions))]
    both = [" a<eos>", " b<eos>", " c<eos>", " b<eos>", " m m<eos>", " n<eos>"]
    assert said == {"pairs": both, "unpaired": both, "completions": both[::2], "prompts": []}[kind]
    if kind == "unpaired":
        assert samples.columns["desirable"].tolist() == [True, False] * 3


def test_messages_go_through_the_chat_template(words: Any) -> None:
    samples, _ = tokenise([{"chosen": [USER, ASSISTANT], "rejected": [USER, BYE]}], words, "pairs")
    assert words.decode(samples.prompts[0]) == "[user]Hi<eos>[assistant]"
    assert [words.decode(samples.completions[i]) for i in (0, 1)] == ["Hello<eos>", "Bye<eos>"]
    prompts, _ = tokenise([{"prompt": [USER]}], words, "prompts")
    assert words.decode(prompts.prompts[0]) == "[user]Hi<eos>[assistant]"
    bare = learn_tokenizer(["a"], 262)
    with pytest.raises(UsageError, match="no chat template; set"):
        tokenise([{"prompt": [USER]}], bare, "prompts")


def test_an_end_of_sequence_is_not_doubled(words: Any) -> None:
    plain, _ = tokenise([{"prompt": "say:", "completion": " a"}], words, "completions")
    closed, _ = tokenise([{"prompt": "say:", "completion": " a<eos>"}], words, "completions")
    assert plain.completions[0].tolist() == closed.completions[0].tolist()
    assert plain.completions[0].tolist().count(words.eos_token_id) == 1
    assert plain.prompts[0].tolist().count(words.bos_token_id) == 1 and words.bos_token_id not in plain.completions[0]


@pytest.mark.parametrize("kind", ["pairs", "completions"])
def test_limits_cut_and_drop_and_are_counted(kind: Any, words: Any) -> None:
    long, longer = " a b c d" * 3, "say a: " * 9
    rows = [PAIR, {**PAIR, "chosen": long}, {**PAIR, "prompt": longer}]
    full, _ = tokenise(rows, words, kind)
    limit = len(full.prompts[0]) + 4
    assert limit < len(full.prompts[1]) and max(full.completions.lengths) > 4
    samples, report = tokenise(rows, words, kind, max_length=limit)
    assert len(samples) == 2 and report.rows == 2
    assert report.dropped == Counter({f"prompt reaches the limit of {limit} tokens": 1})
    assert "say a: " in next(iter(report.examples.values()))
    assert list(report.cut.values()) == [1]
    lengths = samples.completions.lengths
    assert max(lengths) == limit - len(samples.prompts[0])
    for short, whole in ((samples.completions[i], full.completions[i]) for i in range(len(samples.completions))):
        assert short.tolist() == whole[: len(short)].tolist(), "cut at the end"
    with pytest.raises(UsageError, match=r"no usable row is left.*\n.*dropped 3 \(prompt reaches the limit of 2"):
        tokenise(rows, words, kind, max_length=2)


def test_columns_follow_their_rows(words: Any) -> None:
    rows = [{**PAIR, "margin": 1.5, "level": 1}, {**PAIR, "prompt": "x" * 60, "margin": 9.0, "level": 2},
            {"prompt": "hum:", "chosen": " m", "rejected": " n", "margin": 0, "level": 3}]  # fmt: skip
    samples, _ = tokenise(rows, words, "pairs", max_length=30)
    assert samples.row_columns["margin"].tolist() == [1.5, 0.0] and samples.extra["level"] == [1, 3]
    prompts, _ = tokenise(rows, words, "prompts")
    assert prompts.extra["level"] == [1, 2, 3] and prompts.extra["prompt"] == [r["prompt"] for r in rows]
    assert prompts.take([2, 0]).extra["level"] == [3, 1]


# ------------------------------------------------------------------------------------------------ the store


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the tokenizer was asked."""
    calls: list[int] = []
    original = tokens_module.encode_rows
    monkeypatch.setattr(tokens_module, "encode_rows", lambda *a: (calls.append(1), original(*a))[1])
    return calls


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "completions", "prompts"])
def test_ids_are_stored_once_and_memory_mapped(kind: Any, words: Any, tmp_path: Path, encoded: list[int]) -> None:
    rows = [PAIR, {"prompt": "hum:", "chosen": " m", "rejected": " n"}]
    plain, _ = tokenise(rows, words, kind)
    encoded.clear()
    first, _ = tokenise(rows, words, kind, cache=tmp_path)
    assert encoded
    encoded.clear()
    second, report = tokenise(rows, words, kind, cache=tmp_path)
    assert not encoded and report.rows == len(plain)
    facts = lambda s: [x.tolist() for x in (s.prompts.flat, s.completions.flat, s.completions.offsets, s.prompt_B)]  # noqa: E731
    assert facts(first) == facts(second) == facts(plain)
    if kind != "prompts":
        assert isinstance(second.completions.flat, np.memmap)


def test_what_is_strict_believes_no_store_that_was_not(words: Any, tmp_path: Path) -> None:
    rows = [PAIR, {**PAIR, "prompt": "say a: " * 40}]
    for again in (False, True):
        assert len(tokenise(rows, words, "pairs", max_length=20, cache=tmp_path)[0]) == 1
        with pytest.raises(UsageError, match="prompt reaches the limit of 20 tokens; it starts"):
            tokenise(rows, words, "pairs", max_length=20, cache=tmp_path, strict=True)
        assert len(list(tmp_path.iterdir())) == 1, again


def test_what_changes_the_samples_changes_the_store(words: Any, tmp_path: Path, encoded: list[int]) -> None:
    """Another text, kind, limit, tokenizer or template: never somebody else's samples."""
    other = learn_tokenizer(["say a: a b"], 262)
    spoken = learn_tokenizer(["say a: a b"], 262)
    spoken.chat_template = TEMPLATE
    calls: list[dict[str, Any]] = [
        {}, {"source": [{**PAIR, "chosen": " z"}]}, {"kind": "unpaired"}, {"tokenizer": other}, {"tokenizer": spoken},
        {"max_length": 4}, {"kind": "completions"}, {"kind": "completions", "loss_on": "all"},
    ]  # fmt: skip
    for again in (False, True):
        for call in calls:
            encoded.clear()
            tokenise(**{"source": [PAIR], "tokenizer": words, "kind": "pairs", "cache": tmp_path, **call})
            assert bool(encoded) != again, call


def test_a_stored_report_says_what_the_first_said(words: Any, tmp_path: Path) -> None:
    rows = [PAIR, PAIR, {**PAIR, "chosen": " b"}, {**PAIR, "prompt": "say a: " * 9}, {**PAIR, "chosen": " a b c d" * 9}]
    found = [tokenise(rows, words, "unpaired", cache=tmp_path, max_length=30)[1].lines() for _ in range(2)]
    assert found[0] == found[1] == tokenise(rows, words, "unpaired", max_length=30)[1].lines() and len(found[0]) == 6


@pytest.mark.parametrize("missing", ["complete", "completions.bin"])
def test_a_half_written_store_is_not_believed(missing: str, words: Any, tmp_path: Path) -> None:
    """A killed run leaves a folder aside, never one under the final name; one without its mark is written again."""
    plain, _ = tokenise([PAIR], words, "pairs")
    tokenise([PAIR], words, "pairs", cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    if missing != "complete":
        (folder / missing).write_bytes(b"")
    (folder / "complete").unlink()
    again, _ = tokenise([PAIR], words, "pairs", cache=tmp_path)
    assert again.completions.flat.tolist() == plain.completions.flat.tolist()
    once_more, _ = tokenise([PAIR], words, "pairs", cache=tmp_path)
    assert isinstance(once_more.completions.flat, np.memmap), "and the store is whole again"
    assert [f.name for f in tmp_path.iterdir()] == [folder.name], "nothing is left aside"


def test_the_store_is_a_list_of_ids(tmp_path: Path) -> None:
    ragged = Ragged.of([[5, 6], [], [7]])
    ragged.save(tmp_path, "x")
    loaded = Ragged.load(tmp_path, "x")
    assert isinstance(loaded.flat, np.memmap) and [loaded[i].tolist() for i in range(3)] == [[5, 6], [], [7]]
    assert loaded.take([2, 0, 0, 1]).flat.tolist() == [7, 5, 6, 5, 6]


# ------------------------------------------------------------------------------------------------ boundaries


def whole(samples: Samples, words: Any) -> list[str]:
    """Prompt and completion of each, as text."""
    ids = [[*samples.prompts[p], *samples.completions[b]] for b, p in enumerate(samples.prompt_B)]
    return [words.decode([int(i) for i in row], skip_special_tokens=True) for row in ids]


def test_where_one_side_merges_with_the_prompt_no_text_is_lost() -> None:
    """The sides share the shorter prompt: what merges on one of them goes to both completions."""
    words = learn_tokenizer(["the sky is blue"] * 9, 300)
    pair = {"prompt": "the sk", "chosen": "y is", "rejected": " blue"}
    sides = [
        tokenise([{"prompt": "the sk", "completion": pair[s]}], words, "completions") for s in ("chosen", "rejected")
    ]
    lengths = [len(s.prompts[0]) for s, _ in sides]
    assert lengths[0] < lengths[1], "sky is one token, sk is another"
    samples, report = tokenise([pair], words, "pairs")
    assert whole(samples, words) == ["the sky is", "the sk blue"] and len(samples.prompts[0]) == lengths[0]
    note = "prompts whose end is tokenised otherwise when they stand alone, as in rollouts"
    assert [r.notes[note] for r in (sides[0][1], sides[1][1], report)] == [1, 0, 1]


def with_ends(*pieces: str) -> Any:
    """A tokenizer that puts special tokens where told."""
    words = learn_tokenizer(["say a: a b c d"], 300)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(pieces),
        special_tokens=[(words.bos_token, words.bos_token_id), (words.eos_token, words.eos_token_id)],
    )
    return words


@pytest.mark.parametrize("kind", ["pairs", "completions", "prompts"])
def test_a_tokenizer_that_ends_every_text_gives_the_same(kind: Any) -> None:
    """A prompt has no end, and an answer one."""
    plain, ending = with_ends("<bos>", "$A"), with_ends("<bos>", "$A", "<eos>")
    assert ending("a")["input_ids"] == [*plain("a")["input_ids"], plain.eos_token_id]
    found = [tokenise([PAIR, {**PAIR, "chosen": " c<eos>"}], words, kind)[0] for words in (plain, ending)]
    assert [s.prompts.flat.tolist() for s in found] == [found[0].prompts.flat.tolist()] * 2
    assert [s.completions.flat.tolist() for s in found] == [found[0].completions.flat.tolist()] * 2
    texts = [tokenise([{"text": "a b"}], words, "completions")[0].completions[0].tolist() for words in (plain, ending)]
    assert texts[0] == texts[1] and texts[0].count(plain.eos_token_id) == 1


def test_a_text_that_is_only_its_end_is_a_fault() -> None:
    """Without BOS nothing is left to learn from once the first token is the prompt."""
    words = with_ends("$A")
    samples, report = tokenise([{"text": "<eos>"}, {"text": "a b"}], words, "completions")
    assert len(samples) == 1 and report.dropped == {"a completion without tokens": 1}


def test_pairs_that_are_identical_after_the_cut_are_left_out(words: Any) -> None:
    row = {"prompt": "say:", "chosen": " a b c d a", "rejected": " a b c d b"}
    full, _ = tokenise([row], words, "pairs")
    for limit in range(len(full.prompts[0]) + 1, len(full.prompts[0]) + int(full.completions.lengths[0])):
        samples, report = tokenise([row, PAIR], words, "pairs", max_length=limit)
        one, other = (full.completions[i][: limit - len(full.prompts[0])].tolist() for i in (0, 1))
        reason = f"sides that are identical within the limit of {limit} tokens"
        assert len(samples) == 2 - (one == other) and report.dropped == ({reason: 1} if one == other else {})


def test_ties_are_no_pairs(words: Any) -> None:
    """With them or without, the same samples; and they are counted."""
    rows = [PAIR, {**PAIR, "chosen": " c", "tie": True}, {**PAIR, "chosen": " d", "tie": False}]
    found = [tokenise(r, words, "pairs") for r in (rows, rows[::2])]
    assert found[0][0].completions.flat.tolist() == found[1][0].completions.flat.tolist()
    assert [r.cut["ties left out: davidson and rao_kupper learn from them"] for _, r in found] == [1, 0]
    done, report = tokenise(rows, words, "completions")
    assert len(done) == 3 and report.notes["demonstrations are the chosen side of a tie"] == 1


@pytest.mark.parametrize("kind", ["pairs", "completions", "unpaired"])
def test_a_negative_weight_is_refused_where_it_stands(kind: Any, words: Any, tmp_path: Path) -> None:
    """By its row in the file, whatever was dropped before it or made of it."""
    file = tmp_path / "d.jsonl"
    rows = [{**PAIR, "weight": 1}, {**PAIR, "chosen": None, "weight": 1}, {**PAIR, "weight": -1}]
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        UsageError, match=r"data d\.jsonl, row 3, column 'weight': expected a number of at least 0, got -1"
    ):
        tokenise(load_dataset(file), words, kind)


def test_what_both_conversions_leave_out_is_counted(words: Any) -> None:
    """On the way from rated answers over demonstrations to whole texts."""
    rows = [{"prompt": "say:", "completion": " a", "label": label} for label in (True, False, False)]
    for loss_on in (None, "all"):
        samples, report = tokenise(rows, words, "completions", loss_on=loss_on)  # type: ignore[arg-type]
        assert len(samples) == 1 and report.cut == {"undesirable completions left out": 2}


# ------------------------------------------------------------------------------------------------ samples


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_taking_rows_keeps_every_column_with_its_row(lengths: list[int], random: Any) -> None:
    owners = [random.randrange(3) for _ in lengths]
    ids = [[100 * b + t for t in range(n)] for b, n in enumerate(lengths)]
    samples = Samples(
        "completions", Ragged.of([[7], [8, 8], [9]]), Ragged.of(ids), np.array(owners),
        columns={"row": torch.arange(len(ids))}, tokens={"id": torch.tensor([float(x) for row in ids for x in row])},
        extra={"prompt": ["a", "b", "c"]},
    )  # fmt: skip
    rows = [random.randrange(len(ids)) for _ in range(random.randrange(1, 9))]
    taken = samples.take(rows)
    assert taken.columns["row"].tolist() == rows and len(taken) == len(rows)
    assert taken.tokens["id"].tolist() == [float(x) for r in rows for x in ids[r]] == taken.completions.flat.tolist()
    assert [taken.extra["prompt"][p] for p in taken.prompt_B] == ["abc"[owners[r]] for r in rows]
    assert len(taken.prompts) == len({owners[r] for r in rows}), "shared prompts stay shared"


def test_scatter_is_differentiable_and_fills_with_zeros() -> None:
    mask_BT = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    flat_C = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    found = scatter(flat_C, mask_BT)
    assert found.tolist() == [[1, 2, 0], [0, 0, 0], [3, 0, 0]]
    (found * torch.arange(9.0).view(3, 3)).sum().backward()
    assert flat_C.grad.tolist() == [0.0, 1.0, 6.0]


def test_reports_are_words() -> None:
    report = Report("d.jsonl", "prompt", rows=3)
    report.drop("too long", "x" * 999)
    report.drop("too long", "y")
    report.cut["cut"] = 2
    head, dropped, cut = report.lines()
    assert head == "data d.jsonl: 3 rows, type prompt" and cut == "  2 cut"
    assert dropped.startswith("  dropped 2 (too long); for example xxx") and len(dropped) < 400
