"""Rewards: functions with TRL's signature, verifiers, reward models, and what they may return."""

from __future__ import annotations

import asyncio
import functools
import gzip
import json
import math
import re
import statistics
import threading
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from prefzoo.data.samples import Ragged, Samples
from prefzoo.feedback import (
    VERIFIERS,
    FunctionReward,
    ModelReward,
    cosine_scaled,
    exact,
    numeric,
    repetition_penalty,
    resolve_reward,
    soft_overlong_punishment,
    think_format,
)
from prefzoo.feedback.verifiers import last_number
from prefzoo.models.load import learn_tokenizer, new_scorer, save_scorer, tiny_model
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
    assert columns.keys() == {
        "prompts", "completions", "completion_ids", "answer", "level", "trainer_state", "log_metric", "log_extra",
    }  # fmt: skip
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


async def later(completions: list[str], **_: Any) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(c)) for c in completions]


class AsyncJudge:
    async def __call__(self, completions: list[str]) -> list[float]:
        return await later(completions)


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
    "tensors of one number": lambda completions: [torch.tensor([len(c)]) for c in completions],
    "any positional": lambda *_, completions: [len(c) for c in completions],
    "asynchronous": later,
    "asynchronous object": AsyncJudge(),
    "asynchronous partial": functools.partial(later, factor=2.0),
    "hands on a coroutine": lambda completions: later(completions),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_functions_of_any_signature(name: str, samples: Samples, words: Any) -> None:
    source = resolve_reward(SIGNATURES[name], words)
    scores_B = source(samples)
    assert scores_B.dtype == torch.float32 and scores_B.tolist() == [1.0, 2.0, 3.0]

    async def notebook() -> torch.Tensor:
        return source(samples)

    assert torch.equal(asyncio.run(notebook()), scores_B), "a loop runs already in this thread"


def test_the_source_has_the_functions_name(words: Any) -> None:
    for reward, name in (
        (named, "named"), (Judge(), "Judge"), ("exact", "exact"), (["exact", named], "exact+named"),
        (functools.partial(named), "named"), ([named], "named"), ([named, named], "named+named_2"),
    ):  # fmt: skip
        assert resolve_reward(reward, words).name == name


def test_what_was_sampled_wins_over_a_column_of_its_name(samples: Samples, words: Any) -> None:
    own = Samples(samples.kind, samples.prompts, samples.completions, samples.prompt_B,
                  extra={"prompt": PROMPTS, "completions": ["old", "older"], "prompts": ["x", "y"]})  # fmt: skip

    def seen(prompts: list[str], completions: list[str]) -> list[float]:
        assert completions == COMPLETIONS and prompts == [PROMPTS[b] for b in OWNERS]
        return [1.0, 1.0, 1.0]

    assert FunctionReward(seen, words)(own).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("function", "message"), [
    (lambda completions, levle: [], "asks for 'levle', which is no column of the data; did you mean 'level'?"),
    (lambda completions, environments: [], "asks for 'environments', which is no column of the data"),
    (soft_overlong_punishment, "asks for 'max_completion_len'"),
], ids=["misspelt", "unknown", "not called"])  # fmt: skip
def test_an_argument_that_cannot_be_given_is_told(function: Any, message: str, samples: Samples, words: Any) -> None:
    with pytest.raises(UsageError) as caught:
        FunctionReward(function, words)(samples)
    assert message in str(caught.value) and "prompts, completions, completion_ids" in str(caught.value)


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


async def too_few(**_: Any) -> list[float]:
    return [1.0]


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
    "a tensor of two": (lambda **_: [0.0, torch.ones(2), 1.0], "value 1 is tensor([1., 1.]), not a number"),
    "bytes": (lambda **_: b"123", "got bytes"),
    "too large for float32": (lambda **_: [0.0, 1e39, 1.0], "value 1 is 1e+39"),
    "too large for float": (lambda **_: [0.0, 10**400, 1.0], "value 1 is 1000"),
    "a long text": (lambda **_: [0.0, "x" * 1000, 1.0], "x..., not a number"),
    "asynchronous, too few": (too_few, "got 1 values"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", WRONG)
def test_wrong_results_are_told_in_words(name: str, samples: Samples, words: Any) -> None:
    function, message = WRONG[name]
    with pytest.raises(UsageError) as caught:
        FunctionReward(function, words)(samples)
    assert message in str(caught.value) and f"reward function {function.__name__!r}" in str(caught.value)


def test_none_is_no_reward(samples: Samples, words: Any) -> None:
    found = FunctionReward(lambda **_: [None, 1.0, False], words)(samples)
    assert found[0].isnan() and found[1:].tolist() == [1.0, 0.0]


def test_sources_add_up_where_they_speak(samples: Samples, words: Any) -> None:
    total = resolve_reward([lambda **_: [None, None, 1.0], lambda **_: [None, 2.0, 3.0]], words)(samples)
    assert total[0].isnan() and total[1:].tolist() == [2.0, 4.0]


# ------------------------------------------------------------------------------------------------ what it raises


def helper() -> None:
    raise KeyError("mine")  # the line that is told


def broken(completions: list[str]) -> list[float]:
    helper()
    return []


def broken_in_a_library(completions: list[str]) -> list[float]:
    return json.loads("{")  # the line that is told


async def broken_later(completions: list[str]) -> list[float]:
    await asyncio.sleep(0)
    helper()
    return []


@pytest.mark.parametrize(("function", "error", "line"), [
    (broken, KeyError, 'raise KeyError("mine")'), (broken_later, KeyError, 'raise KeyError("mine")'),
    (broken_in_a_library, json.JSONDecodeError, 'return json.loads("{")'),
    (lambda completions: broken_later(completions), KeyError, 'raise KeyError("mine")'),
])  # fmt: skip
def test_what_a_function_raises_is_told_with_its_place(
    function: Any, error: type[Exception], line: str, samples: Samples, words: Any
) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_reward(function, words)(samples)
    cause, said = caught.value.__cause__, str(caught.value)
    assert type(cause) is error and f"reward function {function.__name__!r} raised {error.__name__}: {cause}" in said
    number = next(
        n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.strip().startswith(line)
    )
    assert f"({__file__}, line {number}: {line}" in said and "first prompt of the batch: 'two?'" in said


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_stopping_is_no_error(error: type[BaseException], samples: Samples, words: Any) -> None:
    def stop(**_: Any) -> list[float]:
        raise error

    async def stop_later(**_: Any) -> list[float]:
        raise error

    for function in (stop, stop_later):
        with pytest.raises(error):
            FunctionReward(function, words)(samples)
    assert resolve_reward(later, words)(samples).tolist() == [1.0, 2.0, 3.0], "the loop goes on"


# ------------------------------------------------------------------------------------------------ asynchronous


def test_asynchronous_functions_run_at_the_same_time(samples: Samples, words: Any) -> None:
    """Each waits until the others have begun, the plain one between them too: one after another would never end."""
    begun = {name: asyncio.Event() for name in "ab"}

    async def meet(mine: str, other: str) -> list[float]:
        begun[mine].set()
        await asyncio.wait_for(begun[other].wait(), 30)
        return [1.0, 1.0, 1.0]

    async def a(**_: Any) -> list[float]:
        return await meet("a", "b")

    async def b(**_: Any) -> list[float]:
        return await meet("b", "a")

    assert resolve_reward([a, named, [b, "exact"]], words)(samples).tolist() == [3.0, 4.0, 5.0]


def test_a_client_that_is_bound_to_its_loop_works_in_every_call(samples: Samples, words: Any) -> None:
    lock = asyncio.Lock()
    holder: list[Any] = []

    async def judge(**_: Any) -> list[float]:
        holder.append(asyncio.get_running_loop())
        async with lock:
            await asyncio.sleep(0)
        return [0.0, 0.0, 0.0]

    both = resolve_reward([judge, judge], words)
    both(samples), both(samples)
    assert len(set(map(id, holder))) == 1


def test_where_one_fails_the_others_are_given_up(samples: Samples, words: Any) -> None:
    begun, ended = threading.Event(), threading.Event()

    async def patient(**_: Any) -> list[float]:
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()
        return []

    def broken_meanwhile(**_: Any) -> list[float]:
        assert begun.wait(30), "asynchronous functions run while plain ones do"
        raise KeyError("mine")

    with pytest.raises(UsageError, match="'broken_meanwhile' raised KeyError"):
        resolve_reward([patient, broken_meanwhile], words)(samples)
    assert ended.wait(30)
    with pytest.raises(UsageError, match="asks for 'nothing'"):  # before anything was waited for
        resolve_reward([patient, lambda nothing: []], words)(samples)


# ------------------------------------------------------------------------------------------------ state and logs


def test_a_function_knows_where_the_run_is_and_logs(samples: Samples, words: Any) -> None:
    def ramp(completions: list[str], trainer_state: Any, log_metric: Any, log_extra: Any) -> list[float]:
        log_metric("progress", trainer_state.global_step / max(trainer_state.max_steps, 1))
        log_metric("empty", math.nan)
        log_extra("size", torch.tensor([len(c) for c in completions]))
        log_extra("odd", ["ä", math.nan, torch.ones(1)])
        return [trainer_state.epoch] * 3

    source = resolve_reward(ramp, words)
    assert source(samples).tolist() == [0.0, 0.0, 0.0] and source.drain()[0] == {"progress": 0.0}
    for step in (1, 2):
        source.begin(SimpleNamespace(global_step=step, max_steps=4, epoch=0.5))
        assert source(samples).tolist() == [0.5, 0.5, 0.5]
    metrics, columns = source.drain()
    assert metrics == {"progress": 0.375}, "the mean since the last drain"
    assert columns == {"size": [1, 2, 3], "odd": ["ä", "nan", "tensor([1.])"]}
    json.dumps(columns, allow_nan=False)
    assert source.drain()[0] == {}


def test_columns_are_those_of_the_last_call(samples: Samples, words: Any) -> None:
    calls = iter([True, False])

    def once(log_extra: Any, **_: Any) -> list[float]:
        if next(calls):
            log_extra("seen", COMPLETIONS)
        return [0.0, 0.0, 0.0]

    source = resolve_reward(once, words)
    source(samples)
    assert source.drain()[1] == {"seen": COMPLETIONS}
    source(samples)
    assert source.drain()[1] == {}


@pytest.mark.parametrize(("log", "message"), [
    (lambda m, e: m("x", "good"), "log_metric('x', ...) takes one number, got 'good'"),
    (lambda m, e: m("x", [1.0]), "log_metric('x', ...) takes one number, got [1.0]"),
    (lambda m, e: e("x", [1, 2]), "log_extra('x', ...) takes a list of 3 values, one per completion; got 2 values"),
    (lambda m, e: e("x", "abc"), "one per completion; got str"),
])  # fmt: skip
def test_wrong_logs_are_told_in_words(log: Any, message: str, samples: Samples, words: Any) -> None:
    def logs(log_metric: Any, log_extra: Any) -> list[float]:
        log(log_metric, log_extra)
        return [0.0, 0.0, 0.0]

    with pytest.raises(UsageError) as caught:
        resolve_reward(logs, words)(samples)
    assert message in str(caught.value) and "reward function 'logs'" in str(caught.value)


def test_other_sources_have_nothing_to_log(words: Any, samples: Samples) -> None:
    source = ModelReward(new_scorer(Policy(tiny_model(words))))
    source.begin(SimpleNamespace(global_step=1, max_steps=2, epoch=0.0))
    assert source(samples).tolist() == [0.0, 0.0, 0.0] and source.drain() == ({}, {})


def test_a_sum_reports_its_parts(samples: Samples, words: Any) -> None:
    values = {"f": [1.0, None, 4.0], "g": [0.5, 0.25, 0.0]}

    def f(log_metric: Any, log_extra: Any, trainer_state: Any) -> list[float | None]:
        log_metric("step", trainer_state.global_step)
        log_extra("note", ["f"] * 3)
        return values["f"]

    def g(log_metric: Any, log_extra: Any) -> list[float]:
        log_metric("step", 7)
        log_extra("note", ["g"] * 3)
        return values["g"]

    source = resolve_reward([f, g, lambda: [None, None, None]], words, weights=[2.0, 1.0, 1.0])
    source.begin(SimpleNamespace(global_step=5, max_steps=9, epoch=0.0))
    assert source(samples).tolist() == [2.5, 0.25, 8.0]
    metrics, columns = source.drain()
    assert columns == {"note": ["f"] * 3, "g/note": ["g"] * 3}
    expected = {"step": 5.0, "g/step": 7.0}
    for name, found in values.items():
        known = [v for v in found if v is not None]
        expected |= {f"rewards/{name}/mean": statistics.mean(known), f"rewards/{name}/std": statistics.stdev(known)}
    assert metrics == pytest.approx(expected) and source.drain()[0] == {}


# ------------------------------------------------------------------------------------------------ weights


def test_a_weighted_sum_is_the_sum_of_the_weighted(samples: Samples, words: Any) -> None:
    parts = [lambda **_: [None, None, 1.0], lambda **_: [None, 2.0, -3.0]]
    for weights in ([1.0, 1.0], [0.5, 2], [-1.0, 0.25], [3, 1e-3]):
        total = resolve_reward(parts, words, weights=weights)(samples)
        expected = weights[0] * torch.tensor([0.0, 0.0, 1.0]) + weights[1] * torch.tensor([0.0, 2.0, -3.0])
        assert total[0].isnan() and torch.equal(total[1:], expected[1:])
    assert resolve_reward(named, words, weights=[2.0])(samples).tolist() == [2.0, 4.0, 6.0]
    plain, ones = resolve_reward(parts, words)(samples), resolve_reward(parts, words, weights=[1, 1])(samples)
    assert torch.equal(plain.nan_to_num(9.0), ones.nan_to_num(9.0))


def test_a_weight_of_zero_only_watches(samples: Samples, words: Any) -> None:
    source = resolve_reward([lambda **_: [None, 2.0, 3.0], named], words, weights=[1.0, 0.0])
    found = source(samples)
    assert found[0].isnan() and found[1:].tolist() == [2.0, 3.0]
    assert source.drain()[0]["rewards/named/mean"] == 2.0


@pytest.mark.parametrize(("reward", "weights", "message"), [
    (["exact", "numeric"], [1.0], "one for each of the 2 rewards (exact, numeric); got 1 weights"),
    (["exact", "numeric"], [1.0, 1.0, 1.0], "got 3 weights"), ("exact", [1.0, 2.0], "1 rewards (exact); got 2 weights"),
    ("exact", [], "got 0 weights"), ("exact", 2.0, "got 2.0"), (["exact", "numeric"], "12", "got '12'"),
    (["exact", "numeric"], [1.0, math.nan], "that of 'numeric' must be a number, got nan"),
    (["exact", "numeric"], [True, 1.0], "that of 'exact' must be a number, got True"),
    (["exact", "numeric"], ["1", 1.0], "that of 'exact' must be a number, got '1'"),
    (["exact", "numeric"], [0, 0.0], "all are 0"), ([], None, "the list is empty"), ([], [], "the list is empty"),
])  # fmt: skip
def test_wrong_weights_are_told_in_words(reward: Any, weights: Any, message: str, words: Any) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_reward(reward, words, weights=weights)
    assert message in str(caught.value)


@pytest.mark.parametrize(("reward", "message"), [
    ("exat", "did you mean 'exact'?"), ("exat()", "did you mean 'exact'?"), (3.0, "got float"),
    ("no/such", "neither a reward-model folder nor a verifier, and could not be had from the hub"),
    ("/no/such", "neither a reward-model folder nor a verifier"),
    (torch.nn.Linear(1, 1), "a Linear in memory has no tokenizer"), (dict, "does not say which arguments it takes"),
    ("exact(case=True)", "verifier 'exact' has no option 'case'"),
    ("repetition_penalty(ngram=4)", "has no option 'ngram'; did you mean 'ngram_size'?"),
    ("repetition_penalty(ngram_size=0.5)", "option 'ngram_size': expected int, got 0.5"),
    ("repetition_penalty(ngram_size=0)", "ngram_size must be at least 1"),
    ("repetition_penalty(4)", "written as name(option=value"), ("repetition_penalty(ngram_size=", "written as name("),
    ("repetition_penalty(**{})", "option 'None'"), ("repetition_penalty(ngram_size=open('x'))", "written as name("),
    ("soft_overlong_punishment", "needs 'max_completion_len', 'soft_punish_cache'"),
    ("soft_overlong_punishment(max_completion_len=5, soft_punish_cache=6)", "from 0 to max_completion_len (5), got 6"),
    ("cosine_scaled(max_len=0)", "max_len must be at least 1"),
], ids=str)  # fmt: skip
def test_what_is_no_reward_is_refused(reward: Any, message: str, words: Any) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_reward(reward, words)
    assert message in str(caught.value)


def test_a_folder_without_a_reward_model_is_refused(tmp_path: Path, words: Any) -> None:
    with pytest.raises(UsageError, match=r"holds no (reward model|config\.json)"):
        resolve_reward(tmp_path, words)
    tiny_model(words).save_pretrained(tmp_path / "causal")
    with pytest.raises(UsageError, match=r"labels; one is needed|holds no reward model"):
        resolve_reward(tmp_path / "causal", words)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_reward_models_folder_scores_as_the_model_did(
    pooling: Any, tmp_path: Path, samples: Samples, words: Any
) -> None:
    """Its tokenizer may have got a padding token; one that calls the same ids by other names is refused."""
    scorer = new_scorer(Policy(tiny_model(words)), pooling)
    torch.nn.init.normal_(scorer.head.weight, generator=torch.Generator().manual_seed(0))
    scorer.offset.fill_(0.5)
    save_scorer(scorer, words, tmp_path / "judge")
    found = resolve_reward(tmp_path / "judge", words)
    assert found.name == "judge" and not found.verifies
    torch.testing.assert_close(found(samples), ModelReward(scorer)(samples), atol=1e-5, rtol=1e-5)
    other = learn_tokenizer(["quite other words, and more of them"], 262)
    assert other.get_vocab() != words.get_vocab()
    with pytest.raises(UsageError, match="has another tokenizer than the policy"):
        resolve_reward(str(tmp_path / "judge"), other)


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


def test_the_minus_of_typesetters_is_one() -> None:
    for minus in "-\u2212":
        assert numeric(completions=[f"so x = {minus}4."] * 2, answer=["4", "-4"]) == [0.0, 1.0]
        assert numeric(completions=["#### -4"] * 2, answer=[f"{minus}4", f"#### {minus}4"]) == [1.0, 1.0]


def test_exact_minds_words_and_not_white_space() -> None:
    assert exact(completions=["  New\n York ", "new york", "New Yorks"], answer=["New York"] * 3) == [1.0, 0.0, 0.0]
    assert exact(completions=["7"], answer=[7]) == [1.0]


@pytest.mark.parametrize("name", ["exact", "numeric", "cosine_scaled(max_len=5)"])
def test_without_answers_a_verifier_says_which_column_it_needs(name: str, samples: Samples, words: Any) -> None:
    bare = Samples(samples.kind, samples.prompts, samples.completions, samples.prompt_B, extra={"prompt": PROMPTS})
    with pytest.raises(UsageError, match="needs the right answers: a column 'answer' or 'solution' or 'ground_truth'"):
        resolve_reward(name, words)(bare)


SHIPPED_BY_TRL = {
    "think_format_reward": "think_format", "get_soft_overlong_punishment": "soft_overlong_punishment",
    "get_repetition_penalty_reward": "repetition_penalty", "get_cosine_scaled_reward": "cosine_scaled",
}  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED_BY_TRL)
def test_what_trl_ships_has_its_name_here(name: str) -> None:
    assert VERIFIERS.entry(name).name == SHIPPED_BY_TRL[name]


def test_verifiers_by_name_are_those_of_python(samples: Samples, words: Any) -> None:
    for text, function in (
        ("repetition_penalty", repetition_penalty()),
        ("repetition_penalty(ngram_size=1, max_penalty=-2.0)", repetition_penalty(ngram_size=1, max_penalty=-2.0)),
        ("soft_overlong_punishment(max_completion_len=3, soft_punish_cache=3)",
         soft_overlong_punishment(max_completion_len=3, soft_punish_cache=3)),
        ("cosine_scaled(max_len=4)", cosine_scaled(max_len=4)), ("think_format", think_format),
    ):  # fmt: skip
        named, made = resolve_reward(text, words), resolve_reward(function, words)
        assert torch.equal(named(samples).nan_to_num(9.0), made(samples).nan_to_num(9.0))
        assert named.name == made.name and named.verifies


THOUGHTS = {
    "<think>so</think> 2": 1.0, "<think>\nso\n</think>\n2": 1.0, "<think></think>": 1.0,
    "<think>a</think>b</think>": 1.0,
    "<think>so": 0.0, "so</think> 2": 0.0, " <think>so</think> 2": 0.0, "<think><think>so</think>": 0.0,
    "<think>a</think><think>b</think>": 0.0, "</think><think>": 0.0, "": 0.0, "<THINK>a</THINK>": 0.0,
}  # fmt: skip


def test_thoughts_are_opened_once_and_closed() -> None:
    assert think_format(completions=list(THOUGHTS)) == list(THOUGHTS.values())
    messages = [[{"role": "assistant", "content": text}] for text in THOUGHTS]
    assert think_format(completions=messages) == list(THOUGHTS.values())
    # What TRL's documentation says, as an expression: one opening at the start, a close after it.
    pattern = re.compile(r"<think>(?!.*<think>).*</think>", re.DOTALL)
    assert [float(bool(pattern.match(text))) for text in THOUGHTS] == list(THOUGHTS.values())


@pytest.mark.parametrize(("limit", "cache"), [(10, 4), (10, 10), (10, 1), (10, 0)])
def test_overlong_punishment_falls_only_in_the_cache(limit: int, cache: int) -> None:
    found = soft_overlong_punishment(max_completion_len=limit, soft_punish_cache=cache)(
        completion_ids=[[1] * n for n in range(15)]
    )
    for length, reward in enumerate(found):  # DAPO, equation 13, case by case
        if length <= limit - cache:
            assert reward == 0.0
        elif length <= limit:
            assert reward == pytest.approx((limit - cache - length) / cache)
        else:
            assert reward == -1.0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_repetition_counts_what_occurred_before(size: int) -> None:
    penalty = repetition_penalty(ngram_size=size, max_penalty=-1.0)
    assert penalty(completion_ids=[list(range(9)), [], [1] * (size - 1)]) == [0.0, 0.0, 0.0]
    for ids in ([1, 2, 1, 2, 1, 2], [7] * 9, [1, 1, 2, 3, 1, 1, 2]):
        seen: set[tuple[int, ...]] = set()
        again = [(n := tuple(ids[i : i + size])) in seen or seen.add(n) or False for i in range(len(ids) - size + 1)]  # type: ignore[func-returns-value]
        assert penalty(completion_ids=[ids]) == [pytest.approx(-sum(again) / len(again))]
        doubled = repetition_penalty(ngram_size=size, max_penalty=-2.0)(completion_ids=[ids])
        assert doubled == [2 * r for r in penalty(completion_ids=[ids])]
        assert penalty(completion_ids=[[i + 100 for i in ids]]) == penalty(completion_ids=[ids]), "names do not matter"


def test_cosine_runs_from_the_short_value_to_the_long_one() -> None:
    lengths = [0, 5, 10, 50]
    ids = [[1] * n for n in lengths]
    right, wrong = (cosine_scaled(max_len=10)(completions=[c] * 4, completion_ids=ids, answer=["2"] * 4) for c in "23")
    assert right == pytest.approx([1.0, 0.75, 0.5, 0.5]) and wrong == pytest.approx([-1.0, -0.75, -0.5, -0.5])
    assert cosine_scaled(max_len=10)(completions=["2"], completion_ids=[[1]], answer=["none"]) == [None]


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
