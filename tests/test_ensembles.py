"""Several rewards as one: ensembles, Llama 2's gate, rules, and rewards unsummed; reward models by their losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prefzoo
from prefzoo.data.samples import Ragged, Samples
from prefzoo.data.tokens import tokenise
from prefzoo.feedback import (
    Ensemble,
    Gate,
    Judge,
    ModelReward,
    Rules,
    StepReward,
    SumReward,
    resolve_reward,
)
from prefzoo.losses import LOSSES
from prefzoo.models.load import learn_tokenizer, new_scorer, save_scorer, tiny_model
from prefzoo.models.roles import Policy
from prefzoo.models.tree import TreeBatch
from prefzoo.records import RankedScores, Ratings, Scores
from prefzoo.registry import UsageError
from prefzoo.training.record import fingerprint

PROMPTS = ["one?", "two?"]
ANSWERS = ["a", "bb", "ccc", "dddd", "see http://x", "fine!"]
OWNERS = [0, 0, 0, 1, 1, 1]


@pytest.fixture(scope="module")
def words() -> Any:
    return learn_tokenizer([" ".join([*PROMPTS, *ANSWERS])], 300)


@pytest.fixture(scope="module")
def samples(words: Any) -> Samples:
    ids = [[*words(c, add_special_tokens=False)["input_ids"], words.eos_token_id] for c in ANSWERS]
    return Samples(
        "completions", Ragged.of(words(PROMPTS)["input_ids"]), Ragged.of(ids), np.array(OWNERS),
        extra={"prompt": PROMPTS, "unsafe": [False, True]},
    )  # fmt: skip


def giving(*scores: float | None) -> Callable[..., list[float | None]]:
    def reward(completions: list[str]) -> list[float | None]:
        return list(scores)

    return reward


A, B, C = giving(1, 2, 3, 4, 5, 6), giving(3, 2, 1, 0, -1, -2), giving(2, 2, 2, None, 2, 8)


# ------------------------------------------------------------------------------------------------ ensembles


@pytest.mark.parametrize(
    ("combine", "k", "expected"),
    [
        ("mean", 1.0, lambda r: r.mean(0)),
        ("minimum", 1.0, lambda r: r.amin(0)),
        ("product", 1.0, lambda r: r[0] * r[1] * r[2]),
        ("pessimistic", 0.5, lambda r: r.mean(0) - 0.5 * (r - r.mean(0)).square().mean(0).sqrt()),
        ("optimistic", 2.0, lambda r: r.mean(0) + 2 * (r - r.mean(0)).square().mean(0).sqrt()),
    ],
)
def test_an_ensemble_is_its_equation(
    words: Any, samples: Samples, combine: Any, k: float, expected: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    source = Ensemble([A, B, C], combine, k).bind(words)
    r_KB = torch.tensor([[1.0, 2, 3, 4, 5, 6], [3, 2, 1, 0, -1, -2], [2, 2, 2, math.nan, 2, 8]])
    torch.testing.assert_close(source(samples), expected(r_KB), equal_nan=True)
    assert source(samples)[3].isnan() and source.name == "reward+reward_2+reward_3"
    logged, _ = source.drain()
    known_KB = r_KB[:, [0, 1, 2, 4, 5]]
    assert logged["rewards/disagreement"] == pytest.approx(known_KB.std(0, correction=0).mean().item())
    assert logged["rewards/reward/mean"] == 3.5


def test_members_that_agree_are_one_whatever_is_combined(words: Any, samples: Samples) -> None:
    for combine in ("mean", "minimum", "pessimistic", "optimistic"):
        torch.testing.assert_close(Ensemble([A, A], combine).bind(words)(samples), torch.arange(1.0, 7))
    worst, low, mean, high = (
        Ensemble([A, B], combine, 1.0).bind(words)(samples)
        for combine in ("minimum", "pessimistic", "mean", "optimistic")
    )
    assert (worst <= low + 1e-6).all() and (low <= mean).all() and (mean <= high).all()  # of two, the minimum is m - s
    torch.testing.assert_close(worst, low)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Ensemble([A]), "at least two"),
        (lambda: Ensemble("runs/rm"), "at least two"),
        (lambda: Ensemble([A, B], "max"), "combine"),  # type: ignore[arg-type]
        (lambda: Ensemble([A, B], "mean", 2.0), "'k'"),
        (lambda: Ensemble([A, B], "pessimistic", -1.0), "'k'"),
        (lambda: Gate(A, B, threshold=2), "threshold"),
        (lambda: Gate(A, B, given="odds"), "given"),  # type: ignore[arg-type]
    ],
)
def test_combinations_that_make_no_sense_are_refused(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        make()


def test_an_ensemble_that_is_not_bound_says_so(samples: Samples) -> None:
    with pytest.raises(UsageError, match="bind"):
        Ensemble([A, B])(samples)


@pytest.fixture(scope="module")
def folders(words: Any, tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    """Two reward models, one of another size than the other."""
    out = []
    for seed in (1, 2):
        scorer = new_scorer(Policy(tiny_model(words, seed=seed)), "mean")
        torch.manual_seed(seed)
        torch.nn.init.normal_(scorer.head.weight)
        folder = tmp_path_factory.mktemp("models") / f"rm{seed}"
        save_scorer(scorer, words, folder)
        out.append(folder)
    return out


def test_an_ensemble_by_name_is_the_same_as_in_python_and_from_models(
    words: Any, samples: Samples, folders: Sequence[Path]
) -> None:
    first, second = folders
    text = resolve_reward(f"ensemble({first}, {second}, combine=minimum)", words)
    python = resolve_reward(Ensemble([str(first), second], combine="minimum"), words)
    models = [resolve_reward(str(f), words) for f in folders]
    assert all(isinstance(m, ModelReward) for m in models) and not text.verifies and text.name == "rm1+rm2"
    expected = torch.minimum(models[0](samples), models[1](samples))
    torch.testing.assert_close(text(samples), expected)
    torch.testing.assert_close(python(samples), expected)
    nested = resolve_reward(f"ensemble({first}, ensemble({first}, {second}, combine=minimum))", words)
    torch.testing.assert_close(nested(samples), (models[0](samples) + expected) / 2)
    assert fingerprint(text) == fingerprint(python)
    assert fingerprint(text) != fingerprint(resolve_reward(f"ensemble({first}, {second})", words))


def test_members_may_be_functions_of_a_file_verifiers_and_judges(words: Any, samples: Samples, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def length(completions):\n    return [float(len(c)) for c in completions]\n")
    source = resolve_reward(f"ensemble({tmp_path}/mine.py:length, repetition_penalty(ngram_size=1))", words)
    assert source.verifies and source.name == "length+repetition_penalty_reward"
    assert source(samples)[0] == 0.5
    shorter = Judge(lambda prompts, first, second: [float(len(a) < len(b)) for a, b in zip(first, second, strict=True)])
    both = resolve_reward([shorter, A], words)
    assert both(samples)[0] == 1 + 1 and not both.verifies


# ------------------------------------------------------------------------------------------------ several objectives


def test_objectives_are_the_parts_with_their_weights_and_sum_to_the_reward(words: Any, samples: Samples) -> None:
    source = resolve_reward([A, B, C], words, weights=[1.0, 0.5, -2.0])
    assert isinstance(source, SumReward)
    scores_BK = source.objectives(samples)
    assert scores_BK.shape == (6, 3) and scores_BK[0].tolist() == [1.0, 1.5, -4.0] and scores_BK[3, 2].isnan()
    torch.testing.assert_close(scores_BK.nansum(1), source(samples))
    assert "rewards/reward_2/mean" in source.drain()[0]
    one = resolve_reward(A, words)
    assert torch.equal(one.objectives(samples)[:, 0], one(samples))
    watched = resolve_reward([A, C], words, weights=[1.0, 0.0])  # a score that is missing there takes nothing away
    assert watched.objectives(samples)[:, 1].tolist() == [0.0] * 6


# ------------------------------------------------------------------------------------------------ the gate


def test_the_gate_takes_safety_where_it_is_in_doubt_or_the_prompt_is_marked(words: Any, samples: Samples) -> None:
    safety, helpful = giving(-3, 0, 3, -3, 0, 3), giving(10, 11, 12, 13, 14, 15)
    raw = Gate(safety, helpful, whiten=False).bind(words)
    assert raw(samples).tolist() == [-3, 11, 12, -3, 0, 3]  # sigmoid(-3) < 0.15; the second prompt is marked
    assert raw.drain()[0]["gate/unsafe"] == pytest.approx(4 / 6)
    assert Gate(safety, helpful, whiten=False, column="none").bind(words)(samples).tolist() == [-3, 11, 12, -3, 14, 15]
    assert Gate(safety, helpful, whiten=False, threshold=0.0, column="none").bind(words)(samples)[0] == 10
    white = Gate(safety, helpful).bind(words)(samples)
    assert white.mean().item() == pytest.approx(0, abs=1e-6) and white.std().item() == pytest.approx(1)
    assert (white.argsort() == raw(samples).argsort()).all()


def test_the_gate_reads_probabilities_and_keeps_what_is_missing(words: Any, samples: Samples) -> None:
    logits = torch.tensor([-3.0, 0, 3, -3, 0, 3])
    given = giving(*logits.sigmoid().tolist())
    source = Gate(given, giving(*(0.9,) * 5, None), given="probabilities", whiten=False, column="none").bind(words)
    expected = torch.where(logits.sigmoid() < 0.15, logits, math.log(9))
    expected[-1] = math.nan
    torch.testing.assert_close(source(samples), expected, equal_nan=True)
    with pytest.raises(UsageError, match="not from 0 to 1"):
        Gate(A, B, given="probabilities").bind(words)(samples)


def test_the_gate_refuses_marks_that_are_text_and_is_known_by_name(words: Any, samples: Samples) -> None:
    with pytest.raises(UsageError, match="true or false"):
        Gate(A, B, column="prompt").bind(words)(samples)
    with pytest.raises(UsageError, match="safety, helpfulness in this order"):
        resolve_reward("gate(runs/safety)", words)


# ------------------------------------------------------------------------------------------------ rules


class YesMan:
    """Says yes to what mentions http, and counts."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def bind(self, device: Any) -> YesMan:
        return self

    def __call__(self, questions: Sequence[str], verdicts: tuple[str, str]) -> list[float | None]:
        self.asked += questions
        assert verdicts == ("YES", "NO")
        return [0.9 if "http" in q else 0.2 for q in questions]

    def drain(self) -> dict[str, float]:
        return {"judge/calls": len(self.asked)}


def rules_of(combine: Any = "sum", judge: Any = None) -> Rules:
    return Rules(
        {
            "link": {"question": "The answer holds a link.", "violation": True},
            "short": lambda completions: [1.0 if len(c) < 3 else 0.5 for c in completions],
            "glad": {"pattern": "!$", "weight": 2.0},
        },
        combine=combine, judge=judge or YesMan(),
    )  # fmt: skip


def test_rules_are_their_equations(words: Any, samples: Samples) -> None:
    source = rules_of().bind(words)
    p_BK = source.probabilities(samples)
    assert p_BK[:, 0].tolist() == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.9, 0.2])
    assert p_BK[:, 1].tolist() == [1, 1, 0.5, 0.5, 0.5, 0.5] and p_BK[:, 2].tolist() == [0, 0, 0, 0, 0, 1]
    assert source.weights == {"link": -1.0, "short": 1.0, "glad": 2.0}
    torch.testing.assert_close(source(samples), -p_BK[:, 0] + p_BK[:, 1] + 2 * p_BK[:, 2])
    torch.testing.assert_close(source.objectives(samples).sum(1), source(samples))
    kept_BK = torch.stack([1 - p_BK[:, 0], p_BK[:, 1], p_BK[:, 2]], 1)
    torch.testing.assert_close(rules_of("minimum").bind(words)(samples), kept_BK.amin(1))
    torch.testing.assert_close(rules_of("product").bind(words)(samples), kept_BK.prod(1))
    logged = source.drain()[0]
    assert logged["rules/short"] == pytest.approx(4 / 6) and logged["judge/calls"] > 0
    assert not source.verifies and Rules({"glad": {"pattern": "!"}}).verifies


def test_rules_are_added_to_a_preference_reward(words: Any, samples: Samples) -> None:
    both = resolve_reward([A, Rules({"glad": {"pattern": "!", "weight": 0.5}})], words)
    assert both(samples).tolist() == [1, 2, 3, 4, 5, 6.5]


def test_rules_go_through_a_file(words: Any, samples: Samples, tmp_path: Path) -> None:
    source = Rules({"glad": {"pattern": "!$", "weight": 2.0}, "link": {"pattern": "http", "violation": True}})
    file = source.save(tmp_path / "rules.yaml")
    read = resolve_reward(f"rules({file})", words)
    assert torch.equal(read(samples), source.bind(words)(samples)) and read(samples).tolist() == [0, 0, 0, 0, -1, 2]
    assert fingerprint(read) == fingerprint(source.bind(words))
    assert fingerprint(read) != fingerprint(resolve_reward(f"rules({file}, combine=minimum)", words))
    with pytest.raises(UsageError, match=r"my_file\.py:function"):
        rules_of().save(tmp_path / "no.yaml")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "at least one"),
        ({"a": {}}, "give one of"),
        ({"a": {"pattern": "x", "question": "y"}}, "give one of"),
        ({"a": {"patern": "x"}}, "did you mean 'pattern'"),
        ({"a": {"pattern": "("}}, "pattern"),
        ({"a": {"pattern": "x", "weight": "big"}}, "weight"),
        ({"a": "x"}, "give one of"),
        ({"a": {"question": "Is it?"}}, "nobody answers"),
    ],
)
def test_rules_that_are_none_are_refused(given: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Rules(given)


def test_a_rule_that_gives_no_probability_is_named(words: Any, samples: Samples) -> None:
    with pytest.raises(UsageError, match=r"rule 'long'.*not a probability"):
        Rules({"long": lambda completions: [float(len(c)) for c in completions]}).bind(words)(samples)


def preferring(weights: dict[str, float], count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs whose better side has the higher weighted number of letters."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        one, two = ("".join(c for c in weights if random.random() < 0.5) or "z" for _ in range(2))
        worth = [sum(w for c, w in weights.items() if c in side) for side in (one, two)]
        if abs(worth[0] - worth[1]) > 1e-9:
            better, worse = (one, two) if worth[0] > worth[1] else (two, one)
            rows.append({"prompt": "p", "chosen": better, "rejected": worse})
    return rows


def test_weights_are_fitted_by_the_hinge_loss_and_no_others_are_better(words: Any) -> None:
    truth = {"a": 3.0, "b": -2.0, "c": 1.0, "d": 0.0}
    pairs = preferring(truth, 60)
    source = Rules({c: {"pattern": c} for c in truth})
    fitted = source.fit(pairs, tokenizer=words)
    assert source.weights == dict.fromkeys(truth, 1.0)  # the original stays as it is

    def hinge(weights: dict[str, float]) -> float:
        ahead = [
            sum(w * ((c in row["chosen"]) - (c in row["rejected"])) for c, w in weights.items()) for row in pairs
        ]  # fmt: skip
        return float(np.mean([max(0.0, 1 - x) for x in ahead])) + 1e-3 * sum(abs(w) for w in weights.values())

    best = hinge(fitted.weights)
    assert best < hinge(source.weights) and best < 0.1
    random = np.random.default_rng(1)
    for size in (0.01, 0.1, 1.0):
        for _ in range(20):
            moved = {c: w + size * random.normal() for c, w in fitted.weights.items()}
            assert best <= hinge(moved) + 1e-7
    assert fitted.weights["a"] > fitted.weights["c"] > 0 > fitted.weights["b"]
    assert abs(fitted.weights["d"]) < 1e-6  # what decides nothing weighs nothing
    assert fitted.fit(pairs).weights == fitted.weights  # bound already; the same pairs, the same weights


def test_weights_complete_the_reward_that_they_are_added_to(words: Any) -> None:
    pairs = preferring({"a": 1.0}, 20)

    def base(completions: list[str]) -> list[float]:
        return [5.0 * ("a" in c) for c in completions]

    source = Rules({"a": {"pattern": "a"}})
    assert source.fit(pairs, tokenizer=words).weights["a"] == pytest.approx(1.0)
    assert source.fit(pairs, tokenizer=words, l1=2.0).weights["a"] == 0.0  # a weight costs more than it gains
    assert source.fit(pairs, tokenizer=words, base=base).weights["a"] == pytest.approx(0.0)  # it has its margin
    with pytest.raises(UsageError, match="no pair in which a rule"):
        Rules({"q": {"pattern": "q"}}).fit(pairs, tokenizer=words)
    with pytest.raises(UsageError, match="combine='sum'"):
        Rules({"a": {"pattern": "a"}}, combine="minimum").fit(pairs, tokenizer=words)


# ------------------------------------------------------------------------------------------------ reward models by name

PAIRS = [{"prompt": "p", "chosen": "a", "rejected": "bb"}, {"prompt": "q", "chosen": "ccc", "rejected": "a"}]
ROWS: dict[Any, list[dict[str, Any]]] = {
    Scores: [{**row, "tie": False, "margin": 1.0} for row in PAIRS],
    RankedScores: [{"prompt": "p", "completions": ["a", "bb", "ccc"], "scores": [3, 2, 1]}] * 2,
    Ratings: [{"prompt": "p", "completion": "a", "score": 1.5}, {"prompt": "q", "completion": "bb", "score": -1.0}],
}
OF_REWARDS = [n for n in LOSSES.names() if LOSSES.entry(n).tags["family"] in ROWS]
TRAIN: dict[str, Any] = {"rows_per_step": 2, "max_steps": 1, "quiet": True}


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("loss", OF_REWARDS)
def test_every_loss_of_rewards_makes_a_reward_model(words: Any, loss: str) -> None:
    rows = ROWS[LOSSES.entry(loss).tags["family"]]
    run = prefzoo.train(
        "reward_model", model=tiny_model(words), tokenizer=words, dataset=rows, loss=loss, pooling="mean", **TRAIN
    )
    assert run.scorer is not None and run.scorer.pooling == "mean" and bool(run.scorer.head.weight.any())


def test_a_reward_model_is_what_it_was_by_default() -> None:
    for name in ("reward_model", "rm"):
        algorithm = prefzoo.create_algorithm(name, centering=0.1)
        (term,) = algorithm.stages[0].terms
        assert term.loss.name == "bradley_terry" and term.loss.options == {"centering": 0.1} and term.count is None
        assert algorithm.data == "pairs" and algorithm.recommended == {"learning_rate": 1e-5}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"loss": "process_reward"}, "process_reward_model"),
        ({"loss": "dpo"}, "reads no rewards"),
        ({"loss": "bradly_terry"}, "did you mean 'bradley_terry'"),
        ({"loss": "davidson", "centering": 0.1}, "has no option 'centering'"),
        ({"loss": "davidson", "loss_options": {"mu": 2}}, "did you mean 'nu'"),
        ({"loss": "rao_kupper", "loss_options": {"theta": -1.0}}, "above 0"),
        ({"loss_options": {"centering": 0.1}}, "an option of its own"),
        ({"loss_options": [1]}, "options of the loss by name"),
    ],
)
def test_options_of_a_reward_model_are_checked(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        prefzoo.create_algorithm("reward_model", **options)


def test_the_options_of_a_loss_reach_it() -> None:
    (term,) = prefzoo.create_algorithm("reward_model", loss="davidson", loss_options={"nu": 2.0}).stages[0].terms
    assert term.loss.options == {"nu": 2.0}


@pytest.mark.usefixtures("no_pictures")
def test_a_process_reward_model_learns_which_steps_are_right(words: Any) -> None:
    rows = [
        {"prompt": "1 + 1", "completions": ["a", "bb"], "labels": [True, False]},
        {"prompt": "2 + 2", "completions": ["a", "a", "bb"], "labels": [True, True, False]},
    ]
    options: dict[str, Any] = {"model": tiny_model(words), "tokenizer": words, "dataset": rows, **TRAIN}
    run = prefzoo.train("process_reward_model", **options | {"max_steps": 25, "learning_rate": 3e-3})
    losses = [row["loss"] for row in run.history if "loss" in row]
    assert losses[-1] < 0.5 * losses[0] and losses[0] == pytest.approx(math.log(2), abs=0.2)
    counts = [
        prefzoo.create_algorithm("prm", weigh=weigh).stages[0].terms[0].counted.unit for weigh in ("steps", "solutions")
    ]
    assert counts == ["token", "row"]


# ------------------------------------------------------------------------------------------------ rewards of steps


def test_steps_end_where_training_puts_their_labels(words: Any) -> None:
    rows = [
        {"prompt": "1 + 1", "completions": ["a bb\n", "ccc\n", "dddd"], "labels": [True, False, True]},
        {"prompt": "one?", "completions": ["fine! see\n"], "labels": [True]},
        {"prompt": "two?", "completions": ["a\n\n", "\nb http", "\n x"], "labels": [True, True, True]},
    ]
    samples, _ = tokenise(rows, words, "steps")
    assert samples.tokens["trainable"].sum() == 7
    starts = samples.completions.offsets
    expected = [
        torch.nonzero(samples.tokens["trainable"][starts[b] : starts[b + 1]])[:, 0].tolist() for b in range(3)
    ]  # fmt: skip
    found = StepReward("unused")
    found._tokenizer = words
    ends = found.ends(samples)
    assert ends[:2] == expected[:2] and [len(e) for e in ends] == [3, 1, 3]


def test_a_completion_is_worth_what_its_steps_are(words: Any, tmp_path: Path) -> None:
    scorer = new_scorer(Policy(tiny_model(words, seed=1)))
    torch.nn.init.normal_(scorer.head.weight)
    save_scorer(scorer, words, tmp_path / "prm")
    rows = [{"prompt": "1 + 1", "completions": ["a bb\n", "ccc\n", "dddd"], "labels": [True] * 3}] * 2
    samples, _ = tokenise(rows, words, "steps")
    tree = TreeBatch.of(samples)
    with torch.no_grad():
        p = scorer(tree, steps=True).steps_C[samples.tokens["trainable"]].sigmoid()[:3]
    for reduce, expected in (("product", p.prod()), ("minimum", p.min()), ("mean", p.mean()), ("last", p[-1])):
        source = resolve_reward(f"steps({tmp_path}/prm, reduce={reduce})", words)
        torch.testing.assert_close(source(samples)[0], expected, rtol=1e-4, atol=1e-5)
        assert source.drain()[0] == {"rewards/steps": 3.0} and source.name == "prm" and not source.verifies
    with pytest.raises(UsageError, match="reduce"):
        StepReward("x", reduce="sum")  # type: ignore[arg-type]
