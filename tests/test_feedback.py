"""Rewards: functions with TRL's signature, verifiers, reward models, and what they may return."""

from __future__ import annotations

import asyncio
import functools
import gzip
import json
import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefzoo.data.samples import Ragged, Samples
from prefzoo.feedback import VERIFIERS, FunctionReward, ModelReward, exact, numeric, resolve_reward
from prefzoo.feedback.verifiers import last_number
from prefzoo.models.load import learn_tokenizer, new_scorer, tiny_model
from prefzoo.models.roles import Policy
from prefzoo.models.tree import TreeBatch
from prefzoo.parts.feedback import Finished, MaskTruncated, Reward
from prefzoo.registry import UsageError
from prefzoo.rollout import Finish

PROMPTS, COMPLETIONS, OWNERS = ["one?", "two?"], ["a", "bb", "ccc"], [1, 0, 1]


@pytest.fixture(scope="module")
def words() -> Any:
    return learn_tokenizer(PROMPTS + COMPLETIONS, 262)


@pytest.fixture(scope="module")
def samples(words: Any) -> Samples:
    """Two prompts with a column, three completions that end in EOS, not in the order of their prompts."""
    ids = [[*words(c, add_special_tokens=False)["input_ids"], words.eos_token_id] for c in COMPLETIONS]
    return Samples(
        "completions", Ragged.of(words(PROMPTS)["input_ids"]), Ragged.of(ids), np.array(OWNERS),
        columns={"finish": torch.tensor([Finish.STOP, Finish.LENGTH, Finish.STOP])},
        extra={"prompt": PROMPTS, "answer": ["a", "bb"], "level": [10, 20]},
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ signatures


def everything(**columns: Any) -> list[float]:
    assert columns.keys() == {"prompts", "completions", "completion_ids", "answer", "level"}
    assert columns["prompts"] == ["two?", "one?", "two?"] and columns["completions"] == COMPLETIONS
    assert columns["answer"] == ["bb", "a", "bb"] and columns["level"] == [20, 10, 20]
    assert all(isinstance(i, int) for row in columns["completion_ids"] for i in row)
    return [float(len(c)) for c in columns["completions"]]


def named(completions: list[str], level: list[int]) -> list[float]:
    assert level == [20, 10, 20]
    return [len(c) for c in completions]  # type: ignore[misc]


class Judge:
    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [float(len(c)) for c in completions]


def scaled(completions: list[str], factor: float = 1.0) -> list[float]:
    return [factor * len(c) for c in completions]


SIGNATURES: dict[str, Any] = {
    "all columns": everything,
    "named columns": named,
    "keyword-only": lambda *, completions: [len(c) for c in completions],
    "prompts and the rest": Judge(),
    "partial": functools.partial(scaled, factor=1.0),
    "tuple": lambda completions: tuple(len(c) for c in completions),
    "tensor": lambda completions: torch.tensor([len(c) for c in completions]),
    "numpy": lambda completions: np.array([len(c) for c in completions]),
    "numpy numbers": lambda completions: [np.float32(len(c)) for c in completions],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_functions_of_any_signature(name: str, samples: Samples, words: Any) -> None:
    scores_B = resolve_reward(SIGNATURES[name], words)(samples)
    assert scores_B.dtype == torch.float32 and scores_B.tolist() == [1.0, 2.0, 3.0]


def test_the_source_has_the_functions_name(words: Any) -> None:
    for reward, name in ((named, "named"), (Judge(), "Judge"), ("exact", "exact"), (["exact", named], "exact+named")):
        assert resolve_reward(reward, words).name == name


def test_messages_in_messages_out(words: Any, samples: Samples) -> None:
    """Conversational prompts get conversational completions, as in TRL."""
    messages = [[{"role": "user", "content": p}] for p in PROMPTS]
    chat = Samples(samples.kind, samples.prompts, samples.completions, samples.prompt_B,
                   extra={"prompt": messages, "answer": ["bb", "a"]})  # fmt: skip

    def seen(prompts: list[Any], completions: list[Any]) -> list[float]:
        assert prompts == [messages[b] for b in OWNERS]
        return [float(completion == [{"role": "assistant", "content": c}])
                for completion, c in zip(completions, COMPLETIONS, strict=True)]  # fmt: skip

    assert FunctionReward(seen, words)(chat).tolist() == [1.0, 1.0, 1.0]
    assert resolve_reward("exact", words)(chat).tolist() == [1.0, 1.0, 0.0]


# ------------------------------------------------------------------------------------------------ results


async def later(**_: Any) -> list[float]:
    return [1.0, 2.0, 3.0]


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "too few": (lambda **_: [1.0, 2.0], "a list of 3 numbers, one per completion; got 2 values"),
    "too many": (lambda **_: [1.0] * 4, "got 4 values"),
    "one for all": (lambda **_: 1.0, "got float"),
    "nothing": (lambda **_: None, "got NoneType"),
    "a text": (lambda **_: "123", "must return a list of 3 numbers"),
    "a mapping": (lambda **_: {0: 1.0, 1: 1.0, 2: 1.0}, "got dict"),
    "a generator": (lambda **_: (x for x in (1.0, 2.0, 3.0)), "got generator"),
    "a column": (lambda **_: torch.zeros(3, 1), "value 0 is [0.0], not a number"),
    "nan": (lambda **_: [0.0, math.nan, 0.0], "value 1 is nan; return None where there is no reward"),
    "infinite": (lambda **_: [0.0, 0.0, math.inf], "value 2 is inf"),
    "text": (lambda **_: [0.0, "good", 1.0], "value 1 is 'good', not a number or None"),
    "a number as text": (lambda **_: ["0.5", 0.0, 1.0], "value 0 is '0.5', not a number or None"),
    "a list": (lambda **_: [0.0, [1.0], 1.0], "value 1 is [1.0]"),
    "asynchronous": (later, "is asynchronous; wrap it"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", WRONG)
def test_wrong_results_are_told_in_words(name: str, samples: Samples, words: Any) -> None:
    function, message = WRONG[name]
    with pytest.raises(UsageError) as caught:
        FunctionReward(function, words)(samples)
    assert message in str(caught.value) and f"reward function {function.__name__!r}" in str(caught.value)


def test_the_cure_for_asynchronous_functions_works(samples: Samples, words: Any) -> None:
    reward = FunctionReward(lambda **columns: asyncio.run(later(**columns)), words)
    assert reward(samples).tolist() == [1.0, 2.0, 3.0]


def test_none_is_no_reward(samples: Samples, words: Any) -> None:
    found = FunctionReward(lambda **_: [None, 1.0, False], words)(samples)
    assert found[0].isnan() and found[1:].tolist() == [1.0, 0.0]


def test_sources_add_up_where_they_speak(samples: Samples, words: Any) -> None:
    total = resolve_reward([lambda **_: [None, None, 1.0], lambda **_: [None, 2.0, 3.0]], words)(samples)
    assert total[0].isnan() and total[1:].tolist() == [2.0, 4.0]


def test_an_error_of_the_function_is_the_functions(samples: Samples, words: Any) -> None:
    def broken(**_: Any) -> list[float]:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        FunctionReward(broken, words)(samples)


@pytest.mark.parametrize(("reward", "message"), [
    ("exat", "did you mean 'exact'?"), ("no/such", "neither a reward-model folder nor a verifier"), (3.0, "got float"),
], ids=str)  # fmt: skip
def test_what_is_no_reward_is_refused(reward: Any, message: str, words: Any) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_reward(reward, words)
    assert message in str(caught.value)


def test_a_folder_without_a_reward_model_is_refused(tmp_path: Path, words: Any) -> None:
    with pytest.raises(UsageError, match="holds no reward model"):
        resolve_reward(tmp_path, words)
    tiny_model(words).save_pretrained(tmp_path / "causal")
    with pytest.raises(UsageError, match=r"labels; one is needed|holds no reward model"):
        resolve_reward(tmp_path / "causal", words)


# ------------------------------------------------------------------------------------------------ parts


def test_a_reward_model_scores_by_ids_in_any_micro_batch(samples: Samples, words: Any) -> None:
    scorer = new_scorer(Policy(tiny_model(words)))
    torch.nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = scorer(TreeBatch.of(samples)).rewards_B
    for budget in (1, 10_000):
        found = ModelReward(scorer, token_budget=budget)(samples)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert resolve_reward(scorer, words).verifies is False and resolve_reward("exact", words).verifies is True
    assert resolve_reward([scorer, "exact"], words).verifies is False
    assert not any(p.requires_grad for p in scorer.parameters())


class Roles:
    def rewards(self, samples: Samples) -> torch.Tensor:
        return torch.tensor([1.0, 2.0, torch.nan])


def test_cut_completions_can_cost_something(samples: Samples) -> None:
    found = Reward(missing_eos_penalty=0.5)(samples, Roles())  # type: ignore[arg-type]
    assert found[:2].tolist() == [1.0, 1.5] and found[2].isnan()


def test_what_keeps_only_finished_completions(samples: Samples) -> None:
    scores_B = torch.tensor([1.0, 2.0, 3.0])
    kept, scores = Finished()(samples, scores_B)
    assert scores.tolist() == [1.0, 3.0] and [kept.completions[i].tolist() for i in (0, 1)] == [
        samples.completions[i].tolist() for i in (0, 2)
    ]
    masked, scores = MaskTruncated()(samples, scores_B)
    lengths = samples.completions.lengths.tolist()
    assert scores is scores_B and masked.tokens["trainable"].tolist() == (
        [True] * lengths[0] + [False] * lengths[1] + [True] * lengths[2]
    )


# ------------------------------------------------------------------------------------------------ verifiers

NUMBERS: list[tuple[str, str | None]] = [
    ("12", "12"), ("so 3 * 4 = 12.0", "12"), ("#### 1,000", "1000"), ("costs $1,234,567.50.", "1234567.50"),
    ("-3", "-3"), ("= -3.5", "-3.5"), ("+7", "7"), ("50%", "50"), ("x .5", "0.5"), ("the answer is 5.", "5"),
    ("first 3, then 4", "4"), ("#### 5 apples, not 6", "5"), ("9 #### 8 #### 7", "7"), ("A: 18", "18"),
    ("no idea", None), ("", None), ("####", None), ("1,2,3", "3"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_the_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize("column", ["answer", "solution", "ground_truth"])
@pytest.mark.parametrize("verifier", [exact, numeric])
def test_verifiers_find_the_answer(verifier: Any, column: str) -> None:
    completions = [" 7", "the 8", "", "7"]
    right = {exact: [1.0, 0.0, 0.0, None], numeric: [1.0, 1.0, 0.0, None]}
    answers = ["7", "8", "7", None]
    assert verifier(completions=completions, **{column: answers}) == right[verifier]


def test_exact_minds_words_and_not_white_space() -> None:
    assert exact(completions=["  New\n York ", "new york", "New Yorks"], answer=["New York"] * 3) == [1.0, 0.0, 0.0]
    assert exact(completions=["7"], answer=[7]) == [1.0]


@pytest.mark.parametrize("name", VERIFIERS.names())
def test_without_answers_a_verifier_says_which_column_it_needs(name: str, samples: Samples, words: Any) -> None:
    bare = Samples(samples.kind, samples.prompts, samples.completions, samples.prompt_B, extra={"prompt": PROMPTS})
    with pytest.raises(UsageError, match="needs the right answers: a column 'answer' or 'solution' or 'ground_truth'"):
        resolve_reward(name, words)(bare)


def test_numeric_agrees_with_all_published_verdicts(data_dir: Path) -> None:
    """Four models' solutions to 600 GSM8K problems, judged by the data's authors: 2,400 verdicts, none differs."""
    with gzip.open(data_dir / "gsm8k" / "gsm8k_model_solutions.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    truth = [row["ground_truth"] for row in rows]
    correct = {}
    for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
        found = numeric(completions=[row[model]["solution"] for row in rows], answer=truth)
        differ = [(r["index"], f) for r, f in zip(rows, found, strict=True) if f != float(r[model]["is_correct"])]
        assert not differ, model
        correct[model] = sum(found)
    assert list(correct.values()) == [141, 242, 220, 346]


def test_numeric_accepts_every_worked_solution_as_its_own_answer(data_dir: Path) -> None:
    with gzip.open(data_dir / "gsm8k" / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line in file]
    assert len(answers) == 1319 and set(numeric(completions=answers, answer=answers)) == {1.0}
    short = [a.rpartition("####")[2] for a in answers]
    assert set(numeric(completions=short, answer=answers)) == {1.0}
