"""Words before prompts say how good an answer is; winners are chosen by their scores, their controls by nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import prefzoo
from prefzoo.algorithm import Algorithm
from prefzoo.data.samples import Ragged, Samples
from prefzoo.losses import create_loss
from prefzoo.parts.condition import Condition, put_before, quantile_levels
from prefzoo.parts.credit import BestOfK
from prefzoo.parts.feedback import Finished
from prefzoo.parts.options import in_rounds
from prefzoo.parts.winners import Distinct, Filtered, Quantiles, Reaches, Winners, dealt_in_order
from prefzoo.registry import UsageError
from prefzoo.training.engine import Engine

WORDS = {"<low>": [20], "<mid>": [21, 22], "<top>": [23, 24, 25]}
ROLES: Any = SimpleNamespace(bos=1, step=5, encode=lambda word: np.array(WORDS[word], dtype=np.int32))
LEVELS = Condition(tuple(WORDS))
NAN = float("nan")


def sampled(prompts: list[list[int]], per: int, completions: list[list[int]] | None = None, **columns: Any) -> Samples:
    count = len(prompts) * per
    ids = completions or [[30 + b, 2] for b in range(count)]
    extra = {"prompt": [str(p) for p in prompts]}
    return Samples("completions", Ragged.of(prompts), Ragged.of(ids), np.repeat(np.arange(len(prompts)), per),
                   columns={k: torch.tensor(v) for k, v in columns.items()}, extra=extra)  # fmt: skip


def asked(samples: Samples) -> list[list[int]]:
    """The prompt of every completion."""
    return [samples.prompts[p].tolist() for p in samples.prompt_B]


def written(samples: Samples) -> list[list[int]]:
    return [samples.completions[b].tolist() for b in range(len(samples.completions))]


# ------------------------------------------------------------------------------------------------ words


def test_every_row_stands_behind_the_word_of_its_level() -> None:
    samples = sampled([[1, 5, 6], [7]], 3, level=[2, 0, 2, 1, 1, 0])
    marked = LEVELS.marked(samples, ROLES)
    assert asked(marked) == [
        [1, 23, 24, 25, 5, 6],
        [1, 20, 5, 6],
        [1, 23, 24, 25, 5, 6],
        [21, 22, 7],
        [21, 22, 7],
        [20, 7],
    ]
    assert written(marked) == written(samples)
    assert len(marked.prompts) == 4, "rows of one prompt and level share it"
    assert [marked.extra["prompt"][p] for p in marked.prompt_B] == [
        samples.extra["prompt"][p] for p in samples.prompt_B
    ]
    best = LEVELS.best(samples.as_prompts(), ROLES)
    assert [best.prompts[i].tolist() for i in range(2)] == [[1, 23, 24, 25, 5, 6], [23, 24, 25, 7]]


def test_steps_at_the_beginning_sample_without_words() -> None:
    condition = replace(LEVELS, plain_steps=6)
    prompts = sampled([[1, 5]], 1).as_prompts()
    assert condition.best(prompts, ROLES) is prompts
    later: Any = SimpleNamespace(**{**vars(ROLES), "step": 6})
    assert len(condition.best(prompts, later).prompts[0]) == 5


@pytest.mark.parametrize(("columns", "words", "levels"), [
    ({"level": [1, 0, 2, 2]}, tuple(WORDS), [1, 0, 2, 2]),
    ({"desirable": [True, False, False, True]}, ("<low>", "<top>"), [1, 0, 0, 1]),
    ({"score": [3.0, -1.0, 2.0, 9.0]}, ("<low>", "<top>"), [1, 0, 0, 1]),
    ({"score": [0.0, 1.0, 1.0, 0.0]}, tuple(WORDS), [1, 2, 2, 1]),
])  # fmt: skip
def test_rows_of_a_data_set_get_the_level_of_their_label_or_score(
    columns: dict[str, Any], words: tuple[str, ...], levels: list[int]
) -> None:
    marked = Condition(words).of_rows(sampled([[1, 5]], 4, **columns), ROLES)
    assert asked(marked) == [[1, *WORDS[words[level]], 5] for level in levels]


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_quantiles_hold_alike_many_and_ties_stay_together(levels: int) -> None:
    draw = np.random.default_rng(0)
    distinct = torch.from_numpy(draw.permutation(60)).float()
    assert torch.bincount(quantile_levels(distinct, levels)).tolist() == [60 // levels] * levels
    tied = torch.from_numpy(draw.integers(0, 4, size=60)).float()
    found = quantile_levels(tied, levels)
    for value in tied.unique():
        share = float((tied <= value).double().mean())
        expected = min(k for k in range(levels) if share <= (k + 1) / levels + 1e-12)
        assert found[tied == value].unique().tolist() == [expected]
    assert int(found[tied == tied.max()][0]) == levels - 1
    assert quantile_levels(torch.zeros(3), levels).tolist() == [levels - 1] * 3


def test_wrong_words_and_levels_are_refused() -> None:
    for words in (("<low>",), ("<low>", "<low>"), ("<low>", "")):
        with pytest.raises(UsageError, match="two different words"):
            Condition(words)
    with pytest.raises(UsageError, match="from 0 to 3, but there are 3 words"):
        LEVELS.marked(sampled([[1]], 2, level=[0, 3]), ROLES)
    with pytest.raises(UsageError, match="no label and no score"):
        LEVELS.of_rows(sampled([[1]], 2), ROLES)
    with pytest.raises(UsageError, match="bad or good"):
        LEVELS.of_rows(sampled([[1]], 2, desirable=[True, False]), ROLES)
    alike: Any = SimpleNamespace(bos=1, step=0, encode=lambda word: np.array([4]))
    with pytest.raises(UsageError, match="same tokens"):
        LEVELS.best(sampled([[1]], 1).as_prompts(), alike)
    with pytest.raises(UsageError, match="have none"):
        LEVELS.of_rows(sampled([[1]], 2, score=[1.0, NAN]), ROLES)


# ------------------------------------------------------------------------------------------------ winners

PROMPTS = [[1, 5], [1, 6], [1, 7]]
SCORES = torch.tensor([1.0, 3.0, 2.0, 3.0, NAN, 0.0, 5.0, 5.0, NAN, NAN, NAN, NAN])
TWELVE = sampled(PROMPTS, 4)


def rows_of(samples: Samples) -> list[int]:
    return [ids[0] - 30 for ids in written(samples)]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_winners_are_the_best_of_each_prompt_and_their_control_the_first(k: int) -> None:
    assert rows_of(Winners(k)(TWELVE, SCORES)) == rows_of(BestOfK(k)(TWELVE, SCORES))
    control = Winners(k, "random")(TWELVE, SCORES)
    assert np.bincount(control.prompt_B).tolist() == np.bincount(Winners(k)(TWELVE, SCORES).prompt_B).tolist()
    assert rows_of(control) == rows_of(Winners(k, "random")(TWELVE, torch.where(SCORES.isnan(), NAN, -SCORES)))


def test_the_log_ratio_may_decide_who_wins() -> None:
    pair = sampled([[1, 5]], 2).with_tokens(
        old_logps=torch.tensor([-1.0, -1.0, -2.0, -2.0]), ref_logps=torch.tensor([-3.0, -1.0, -2.0, -2.0])
    )
    assert not Winners().needs and Winners(kl=0.1).needs == {"reference"}
    scores = torch.tensor([1.0, 0.0])  # the first is 2 nats above the reference
    assert rows_of(Winners(1, kl=0.49)(pair, scores)) == [0] and rows_of(Winners(1, kl=0.51)(pair, scores)) == [1]


def test_filters_rise_from_pass_to_pass() -> None:
    credit = Filtered((0.0, 2.0, 4.0), quantiles=False, epochs=2)
    kept = credit(TWELVE, SCORES)
    passes = dict(zip(rows_of(kept), kept.columns["passes"].tolist(), strict=True))
    assert passes == {0: 2, 1: 4, 2: 4, 3: 4, 5: 2, 6: 6, 7: 6}
    by_share = Filtered((0.0, 0.5))(TWELVE, SCORES)  # of the seven known scores the median is 3
    assert [r for r, p in zip(rows_of(by_share), by_share.columns["passes"], strict=True) if p == 2] == [1, 3, 6, 7]
    control = replace(credit, choose="random")(TWELVE, SCORES)
    assert sorted(control.columns["passes"].tolist()) == sorted(passes.values())
    assert rows_of(control) == [0, 1, 2, 3, 5, 6, 7] and control.columns["passes"].tolist() == [4, 4, 4, 2, 6, 6, 2]
    assert len(credit(TWELVE, torch.full((12,), NAN))) == 0


def test_right_answers_are_kept_and_the_control_keeps_as_many_of_each_prompt() -> None:
    kept, scores = Reaches(3.0)(TWELVE, SCORES)
    assert rows_of(kept) == [1, 3, 6, 7] and scores.tolist() == [3.0, 3.0, 5.0, 5.0]
    control, _ = Reaches(3.0, "random")(TWELVE, SCORES)
    assert rows_of(control) == [0, 1, 5, 6], "one without a score is not among the first"
    assert len(Reaches(9.0)(TWELVE, SCORES)[0]) == 0


def test_numbers_are_dealt_within_their_prompts() -> None:
    draw = np.random.default_rng(1)
    prompt_B = torch.from_numpy(draw.permutation(np.repeat(np.arange(5), 6)))
    numbers_B = torch.from_numpy(draw.integers(0, 3, size=30))
    dealt_B = dealt_in_order(numbers_B, torch.zeros(30), prompt_B)
    for p in range(5):
        assert dealt_B[prompt_B == p].tolist() == sorted(numbers_B[prompt_B == p].tolist(), reverse=True)


def test_every_completion_of_a_prompt_is_imitated_once() -> None:
    same = sampled([[1, 5], [1, 6], [1, 5]], 2, [[30], [31], [30], [30], [30], [32]])
    assert written(Distinct()(same, torch.ones(6))) == [[30], [31], [30], [32]]


def test_levels_come_with_an_advantage_of_one() -> None:
    assert Quantiles(2).gives == "completions" and not Quantiles(2)(TWELVE, SCORES).tokens
    credited = Quantiles(2, advantages=True)(TWELVE, SCORES)
    assert rows_of(credited) == [0, 1, 2, 3, 5, 6, 7]
    assert credited.columns["level"].tolist() == [0, 1, 0, 1, 0, 1, 1]
    assert credited.tokens["advantages"].tolist() == [1.0] * 14


@pytest.mark.parametrize("part", [
    lambda: Winners(0), lambda: Winners(1, "worst"), lambda: Winners(kl=-1.0), lambda: Filtered(()),  # type: ignore[arg-type]
    lambda: Filtered((0.5, 0.2)), lambda: Filtered((0.5, 1.0)), lambda: Reaches(1.0, "all"), lambda: Quantiles(1),  # type: ignore[arg-type]
])  # fmt: skip
def test_impossible_parts_are_refused(part: Any) -> None:
    with pytest.raises(UsageError):
        part()


# ------------------------------------------------------------------------------------------------ runs

ROWS = [{"prompt": f"say {i}"} for i in range(8)]
SMALL: dict[str, Any] = {"model": "tiny", "quiet": True}
HOT = {
    **SMALL,
    "dataset": ROWS,
    "max_new_tokens": 6,
    "learning_rate": 1e-3,
    "temperature": 4.0,
}  # else it repeats itself


def letters(completions: list[str], **_: Any) -> list[float]:
    return [float(sum(map(str.isalpha, c))) for c in completions]


class Trained:
    """What every optimizer step of a run was trained on, and what was asked before each sampling."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.batches: list[Samples] = []
        self.asked: list[list[list[int]]] = []
        self.references: list[Samples] = []
        step, written_by, scored = Engine._optimizer_step, Engine._written, Engine.reference_logps

        def optimizer_step(engine: Engine, main: Samples, *rest: Any) -> Any:
            self.batches.append(main)
            return step(engine, main, *rest)

        def written(engine: Engine, prompts: Samples, *rest: Any) -> Samples:
            self.asked.append([prompts.prompts[i].tolist() for i in range(len(prompts.prompts))])
            return written_by(engine, prompts, *rest)

        def reference_logps(engine: Engine, samples: Samples) -> Tensor:
            self.references.append(samples)
            return scored(engine, samples)

        patch.setattr(Engine, "_optimizer_step", optimizer_step)
        patch.setattr(Engine, "_written", written)
        patch.setattr(Engine, "reference_logps", reference_logps)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trained]:
    yield Trained(monkeypatch)


def test_rejection_sampling_is_what_it_was() -> None:
    """Against the composition of its parts before it had a control."""
    rounds = {"samples_per_prompt": 6, "prompts_per_round": 4, "epochs_per_round": 2, "rows_per_update": 3,
              "temperature": 4.0, "max_new_tokens": 100}  # fmt: skip
    old = Algorithm(**in_rounds(rounds) | {"keep": Finished()}, credit=BestOfK(2), loss=create_loss("sft"))
    common = {k: v for k, v in HOT.items() if k not in rounds}
    runs = (
        prefzoo.train(old, reward=letters, max_steps=2, **common),
        prefzoo.train("rejection_sampling", reward=letters, max_steps=2, best=2, **rounds, **common),
    )
    one, other = (torch.cat([p.detach().flatten() for p in run.model.parameters()]) for run in runs)
    assert torch.equal(one, other) and runs[0].spent.optimizer_steps > 0


def test_each_improve_step_of_rest_has_fewer_rows_of_higher_reward(trained: Trained) -> None:
    run = prefzoo.train("rest", reward=letters, max_steps=1, thresholds=(0.0, 0.5, 0.8), samples_per_prompt=6,
                        prompts_per_round=8, rows_per_update=1000, epochs_per_round=2, **HOT)  # fmt: skip
    sizes = [len(batch) for batch in trained.batches]
    assert len(sizes) == run.spent.optimizer_steps == 6
    assert sizes[0] == sizes[1] == 48 > sizes[2] == sizes[3] > sizes[4] == sizes[5] > 0
    whole, *_, last = ({tuple(ids) for ids in written(batch)} for batch in trained.batches)
    assert last < whole
    assert sizes[2] >= 24 and sizes[4] >= 9, "a half, and a fifth, with what ties"


def test_quark_samples_behind_the_best_word_and_trains_behind_each_its_own(trained: Trained) -> None:
    run = prefzoo.train(
        "quark", reward=letters, max_steps=3, words=("<|1|>", "<|2|>", "<|3|>"), samples_per_prompt=4,
        prompts_per_round=4, rows_per_update=1000, capacity=40, **HOT,
    )  # fmt: skip
    encode = lambda text: run.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    words = [encode(f"<|{level}|>") for level in (1, 2, 3)]
    bos = run.tokenizer.bos_token_id
    behind = lambda prompt, word: prompt[: 1 + len(word)] == [bos, *word]  # noqa: E731
    first, *later = trained.asked
    assert not any(behind(prompt, words[-1]) for prompt in first)
    assert all(behind(prompt, words[-1]) for prompts in later for prompt in prompts)
    for samples in trained.references:  # the start and the reward read the prompt as it is
        assert not any(behind(prompt, word) for prompt in asked(samples) for word in words)
    assert [len(batch) for batch in trained.batches] == [16, 32, 40], "the pool, up to its capacity"
    for batch in trained.batches:
        scores, level_B = batch.columns["score"], batch.columns["level"]
        assert level_B.tolist() == quantile_levels(scores, 3).tolist() and len(level_B.unique()) > 1
        for prompt, level in zip(asked(batch), level_B.tolist(), strict=True):
            assert behind(prompt, words[level])
    assert run.history[-1]["kl/token"] > 0


def test_csft_writes_what_its_word_asks_for() -> None:
    """Answers of two kinds behind two words; then each word, by hand, gives its own, and the product the good one."""
    rows = [
        {"prompt": f"say {i % 8}", "completion": text, "label": good}
        for i in range(32)
        for text, good in ((" yes", True), (" no", False))
    ]
    words = ("bad:", "good:")
    run = prefzoo.train("csft", dataset=rows, max_steps=60, rows_per_step=16, learning_rate=5e-3, words=words, **SMALL)
    answers = lambda prompts, **more: {  # noqa: E731
        a.strip() for row in prefzoo.generate(run, prompts, n=4, temperature=0.5, max_new_tokens=6, **more) for a in row
    }
    prompts = [f"say {i}" for i in range(8)]
    assert answers(prompts) == {"yes"}
    assert answers([f"good:{p}" for p in prompts], plain=True) == {"yes"}
    assert answers([f"bad:{p}" for p in prompts], plain=True) == {"no"}


def test_words_take_room_from_prompts() -> None:
    """A prompt that leaves no room for the word is dropped beforehand, and not found in the middle of the run."""
    from prefzoo.models.load import learn_tokenizer, tiny_model

    words = learn_tokenizer(["a"], 261)
    model = tiny_model(words, positions=24)
    empty = len(words("").input_ids)
    rows = [{"prompt": "b" * (length - empty)} for length in (9, 10, 11, 12)]
    run = prefzoo.steps(
        "quark", model=model, tokenizer=words, dataset=rows, reward=letters, max_new_tokens=8, max_steps=2,
        words=("<|1|>", "<|2|>"), samples_per_prompt=2, prompts_per_round=2, quiet=True,
    )  # fmt: skip
    room = Condition(("<|1|>", "<|2|>")).room(words)
    assert run is not None and room == 5
    for _ in run:
        assert run.engine is not None
        assert sorted(run.engine.data.prompts.lengths.tolist()) == [9, 10, 11]


def test_feedme_trains_on_the_highest_rated_and_on_demonstrations(trained: Trained) -> None:
    run = prefzoo.train(
        "feedme", reward=letters, max_steps=1, share=0.25, ptx=0.5, samples_per_prompt=8, prompts_per_round=8,
        rows_per_update=1000, epochs_per_round=1, ptx_dataset=[{"prompt": "say 1", "completion": " b"}], **HOT,
    )  # fmt: skip
    (batch,) = trained.batches
    assert 16 <= len(batch) < 64
    assert run.spent.trained_tokens > len(batch.completions.flat)


@pytest.mark.long
@pytest.mark.parametrize(("name", "options"), [
    ("rest", {"thresholds": (0.0, 0.5, 0.8)}), ("quark", {"words": ("<|1|>", "<|2|>"), "capacity": 24}),
])  # fmt: skip
def test_a_run_that_is_stopped_between_two_passes_goes_on_to_the_same_bits(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**HOT, **options, "reward": letters, "samples_per_prompt": 4, "prompts_per_round": 4, "max_steps": 3,
               "rows_per_update": 6, "epochs_per_round": 2}  # fmt: skip
    whole = prefzoo.train(name, output_dir=tmp_path / "whole", **options)
    step, taken = Engine._optimizer_step, [0]

    def breaking(engine: Engine, *rest: Any) -> Any:
        taken[0] += 1
        if taken[0] == whole.spent.optimizer_steps // 2 + 1:
            raise KeyError("somebody's own error")
        return step(engine, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(Engine, "_optimizer_step", breaking)
        prefzoo.train(name, output_dir=tmp_path / "run", **options)
    going_on = prefzoo.train(name, output_dir=tmp_path / "run", resume=True, **options)
    weights = [torch.cat([p.detach().flatten() for p in run.model.parameters()]) for run in (whole, going_on)]
    assert torch.equal(*weights)
    assert going_on.spent.optimizer_steps == whole.spent.optimizer_steps
    assert going_on.spent.generated_tokens == whole.spent.generated_tokens, "nothing is sampled again"


def test_ids_go_behind_the_first_token_of_a_text() -> None:
    assert put_before(Ragged.of([[1], [1, 1, 5], []]), np.array([9]), 1).flat.tolist() == [1, 9, 1, 9, 1, 5, 9]
    assert put_before(Ragged.of([[1, 5]]), np.array([9]), None).flat.tolist() == [9, 1, 5]
