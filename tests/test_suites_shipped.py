"""Every shipped suite can be planned; those with files run on local copies of their data, and say what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefzoo import benchmarks
from prefzoo.benchmarks.materials import files_data, here
from prefzoo.benchmarks.plan import plan
from prefzoo.benchmarks.results.words import nothing_told_apart
from prefzoo.benchmarks.runner import chosen_suite
from prefzoo.benchmarks.suites import get_suite, list_suites, read_suite, spec
from prefzoo.data.formats import load_dataset
from prefzoo.models.load import load_tokenizer
from prefzoo.registry import UsageError

MINE = Path(__file__).resolve().parent.parent / "docs" / "scripts" / "my_suite.yaml"


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def pairs(first: int, count: int, messages: bool = False) -> list[dict[str, Any]]:
    """Pairs as UltraFeedback has them, or as TL;DR has them."""

    def said(question: str, answer: str) -> Any:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return turns if messages else answer

    rows = range(first, first + count)
    return [
        {"prompt": f"Question {i}?", "chosen": said(f"Question {i}?", f"Yes, {i}."),
         "rejected": said(f"Question {i}?", f"No, {i}.")} for i in rows
    ]  # fmt: skip


def given(**parts: Any) -> dict[str, Any]:
    none = dict.fromkeys(("train", "validation", "test", "held_out", "demonstrations", "columns", "rows"))
    return {
        "data": {**none, "max_length": 256, "vocabulary": 300, **parts}, "start": {"model": "tiny", "sft": {}},
        "held_out": False, "max_new_tokens": 8, "start_seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted({*list_suites()} - {"pairs", "zoo"}))
def test_a_shipped_suite_says_what_it_is_about_and_can_be_planned(name: str) -> None:
    suite = get_suite(name)
    assert (list_suites()[name] and suite.budget) or any(t.budget for t in suite.tasks)
    made = plan(suite)
    known = {job.name for job in made.jobs}
    assert all({*job.needs.values()} <= known for job in made.jobs)
    assert all(made.cells[t.name] for t in suite.tasks)


def test_the_suite_of_the_documentation_can_be_planned() -> None:
    suite = read_suite(MINE)
    assert [m.name for m in suite.tasks[0].algorithms] == ["dpo", "kto", "simpo gamma=0.5", "simpo gamma=1.0"]
    assert {len(t) for t in plan(suite).trials["requests"].values()} == {suite.tasks[0].tuning.trials}  # type: ignore[union-attr]


def test_every_key_of_a_suite_is_in_its_documentation() -> None:
    page = MINE.parent.with_name("benchmarks.md").read_text(encoding="utf-8")
    sections = {
        spec.World: "world.", spec.Data: "data.", spec.Start: "start.", spec.Feedback: "feedback.",
        spec.Budget: "budget.", spec.Tuning: "tuning.", spec.Decoding: "decoding.", spec.Method: "algorithms: ",
        spec.Suite: "", spec.Task: "",
    }  # fmt: skip
    own = {"tasks", "world", "data", "start", "feedback", "decoding", "name"}  # a section has its keys in the table
    missing = [
        f"{at}{key}" for section, at in sections.items() for key in section.model_fields
        if f"| `{at}{key}` |" not in page and not (at == "" and key in own)
    ]  # fmt: skip
    assert not missing


def test_a_folder_with_the_splits_of_the_hub_stands_in_for_it(tmp_path: Path) -> None:
    folder = tmp_path / "uf"
    for part, first in {"train_prefs-00000-of-00002": 0, "train_prefs-00001-of-00002": 5, "test_prefs": 10}.items():
        written(folder / f"{part}.jsonl", pairs(first, 5))
    asked = {"path": str(folder), "name": "main", "split": "train_prefs"}
    assert here(asked) == {"path": str(folder), "split": "train_prefs"}
    assert [r["prompt"] for r in load_dataset(here(asked)).rows] == [f"Question {i}?" for i in range(10)]
    assert here({**asked, "path": str(folder / "test_prefs.jsonl")}) == {"path": str(folder / "test_prefs.jsonl")}
    hub = {**asked, "path": "org/name"}
    assert here(hub) == hub


def test_other_data_bring_their_own_test_part(tmp_path: Path) -> None:
    file = written(tmp_path / "mine.jsonl", pairs(0, 4))
    data = chosen_suite("tldr", data=file).tasks[0].data
    assert data is not None and data.train == str(file)
    assert (data.validation, data.test, data.demonstrations) == (None, None, None)
    columns = chosen_suite("real-gsm8k", data=file).tasks[0].data
    assert columns is not None and columns.columns == {"prompt": "question"}


def test_dialogues_give_a_random_start_a_template_and_text_gives_none(tmp_path: Path) -> None:
    for messages in (True, False):
        out = tmp_path / str(messages)
        out.mkdir()
        files_data(given(train=str(written(tmp_path / f"{messages}.jsonl", pairs(0, 60, messages)))), {}, out)
        assert (load_tokenizer(out / "tokenizer").chat_template is not None) == messages


def test_demonstrations_are_read_under_their_own_columns(tmp_path: Path) -> None:
    rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(40)]
    file = str(written(tmp_path / "gsm8k.jsonl", rows))
    named = {"path": file, "columns": {"prompt": "question", "completion": "answer"}}
    found = files_data(given(train=file, demonstrations=named, columns={"prompt": "question"}), {}, tmp_path)
    assert found["demonstrations"] == {"rows": 40}
    first = json.loads((tmp_path / "demonstrations.jsonl").read_text().split("\n")[0])
    assert first["completion"] == "#### 1"


def test_a_registered_suite_s_budget_is_changed_by_its_key() -> None:
    budget = get_suite("zoo", {"budget.amount": 512}).tasks[0].budget
    assert budget is not None and budget.amount == 512 and get_suite("zoo", {"budget.amount": 512}).budget


def test_ties_alone_are_told_and_anything_else_is_not() -> None:
    tie, half = {"estimate": 0.5, "se": 0.0}, {"estimate": 0.5, "se": 0.1}
    assert "told nothing apart" in nothing_told_apart({"metric": "numeric", "methods": {"a": {"win": tie}}})[0]
    assert not nothing_told_apart({"metric": "numeric", "methods": {"a": {"win": tie}, "b": {"win": half}}})


@pytest.mark.long
def test_a_method_that_diverges_is_counted_and_the_others_go_on(tmp_path: Path) -> None:
    small = {
        "world.demonstrations": 300, "world.prompts": 16, "start.sft.max_steps": 20, "test_prompts": 16, "seeds": 1,
        "decoding.samples": 2, "sft_more.tokens": 300, "feedback.reward_model": None,
    }  # fmt: skip
    wild = {"name": "wild", "algorithm": "dpo", "options": {"learning_rate": 1e20, "rows_per_step": 4}}
    results = benchmarks.run(
        "noise", out=tmp_path, changes={**small, "vary": {"world.noise": [0.0]}, "algorithms": ["dpo", wild]},
        executor="in-process", quiet=True,
    )  # fmt: skip
    (task,) = results["tasks"].values()
    assert {"dpo", "sft_more", "start"} <= {*task["methods"]}
    assert list(task["lost"]) == ["wild"] and any("/wild/" in name for name in task["failed"])
    assert (tmp_path / "report.html").exists()


@pytest.mark.long
def test_a_suite_of_files_without_a_file_stops_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        benchmarks.run("real-hh", data="./nothing.jsonl", out=tmp_path / "out", quiet=True)
