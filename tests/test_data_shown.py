"""``prefzoo data``: what is printed about a data set."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import prefzoo.cli.data as shown
from prefzoo.cli.data import show_data
from prefzoo.registry import UsageError

MODEL = str(Path(__file__).parent / "golden" / "tiny_model" / "policy")
PAIR = {"question": "The sky is", "chosen": " blue", "rejected": " up", "id": 1}
TALK = [
    {"role": r, "content": c} for r, c in (("user", "one"), ("assistant", "two"), ("user", "3"), ("assistant", "4"))
]


def write(folder: Path, *rows: object) -> str:
    file = folder / "d.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def test_text_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, PAIR, {**PAIR, "chosen": " up"}, {**PAIR, "chosen": " grey"})
    show_data([file], columns="prompt=question", examples=1)
    said = capsys.readouterr().out
    assert "data d.jsonl: 2 rows, type preference" in said and "dropped 1 (chosen and rejected are identical)" in said
    assert "columns: prompt, chosen, rejected, id (text)" in said and "used as: prompts, completions, unpaired" in said
    assert "prompt: The sky is\nchosen:  blue\nrejected:  up\nid: 1\n" in said and "-- row 2" not in said
    show_data([file], columns="prompt=question", purpose="kto")
    said = capsys.readouterr().out
    assert "2 rows, type preference" in said and "4 rows, type unpaired" in said and "label: True" in said


def test_implicit_prompts_are_split_as_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, {"chosen": "The sky is blue", "rejected": "The sky is black"})
    for rule, prompt in (("word", "The sky is"), ("character", "The sky is bl")):
        show_data([file], implicit_prompt=rule)
        assert f"prompt: {prompt}\n" in capsys.readouterr().out


def test_what_carries_loss_stands_in_brackets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_data([write(tmp_path, {"messages": TALK})], model=MODEL)
    said = capsys.readouterr().out
    assert "as completions: 1 rows" in said and re.search(r"with loss +\d+ +\d+", said)
    assert "<|user|>one</s><|assistant|>\ncompletion: [[two</s>]]<|user|>3</s><|assistant|>[[4</s>]]" in said
    show_data([write(tmp_path, PAIR)], model=MODEL, columns="prompt=question", purpose="unpaired")
    said = capsys.readouterr().out
    assert "completion (desirable): [[ blue</s>]]" in said and "completion (undesirable): [[ up</s>]]" in said
    show_data([write(tmp_path, PAIR)], model=MODEL, columns="prompt=question", purpose="grpo")
    said = capsys.readouterr().out
    assert "as prompts: 1 rows" in said and "[[" not in said


def test_on_a_terminal_it_is_coloured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = lambda **options: Console(force_terminal=True, color_system="standard", **options)  # noqa: E731
    monkeypatch.setattr(shown, "Console", terminal)
    show_data([write(tmp_path, {"messages": TALK})], model=MODEL)
    said = capsys.readouterr().out
    assert "\x1b[1;32mtwo</s>\x1b[0m<|user|>3" in said and "[[" not in said


@pytest.mark.parametrize(("options", "message"), [
    ({"loss_on": "all"}, "--loss-on has no effect on text alone"),
    ({"max_length": 9}, "--max-length has no effect on text alone"),
    ({"implicit_prompt": "token"}, "expected 'word' or 'character'"),
    ({"purpose": "sftt"}, r"neither a kind of samples.*did you mean 'sft'"),
    ({"purpose": "sft", "columns": "prompt"}, "expected OURS=THEIRS"),
    ({"loss_on": "al", "model": MODEL, "columns": "prompt=question"}, "expected 'completion', 'assistant' or 'all'"),
    ({"purpose": "pairs"}, "chosen, id, question, rejected|cannot become|share no prompt"),
], ids=str)  # fmt: skip
def test_mistakes_are_told_in_words(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        show_data([write(tmp_path, PAIR)], **options)


def test_real_data(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_data([str(data_dir / "alpaca_eval_kwise" / "alpaca_eval_kwise.jsonl.gz")], columns="completions=responses")
    assert "400 rows, type ranking" in capsys.readouterr().out
    show_data(
        [str(data_dir / "gsm8k" / "gsm8k_test.jsonl.gz")], columns="prompt=question,completion=answer", model=MODEL
    )
    said = capsys.readouterr().out
    assert "type prompt_completion" in said and said.count("completion: [[") == 3
