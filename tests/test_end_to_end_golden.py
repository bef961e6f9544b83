"""tests/golden/end_to_end.json: from texts and tiny models to ids, log-probabilities, losses and two SGD steps.

The expectations are float64; TRL's trainers agree with them to 1e-6. Offline cases run through ``prefzoo.train``
itself. The policy-gradient cases replay the file's completions through the engine's own rollout step; a reward model
that starts from a given folder is driven through the engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import prefzoo
from prefzoo.algorithm import Algorithm, create_algorithm
from prefzoo.data.samples import Ragged, Samples
from prefzoo.data.tokens import encode_sides, tokenise
from prefzoo.feedback import RewardSource
from prefzoo.losses import create_loss
from prefzoo.models.load import load_policy, load_scorer, load_tokenizer
from prefzoo.models.reference import token_scores
from prefzoo.models.tree import TreeBatch
from prefzoo.parts.count import Count
from prefzoo.rollout import Finish
from prefzoo.training import TrainConfig
from prefzoo.training.engine import Engine
from prefzoo.training.metrics import RunLog

GOLDEN = Path(__file__).parent / "golden"
POLICY, REFERENCE, REWARD = (GOLDEN / "tiny_model" / name for name in ("policy", "reference", "reward"))
DOCUMENT = json.loads((GOLDEN / "end_to_end.json").read_text())
Case = dict[str, Any]
CASES: dict[str, Case] = {case["name"].removeprefix("e2e/"): case for case in DOCUMENT["cases"]}

# Which algorithm a golden case is. All sums, means and anchors are that algorithm's own: nothing is adjusted here.
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo-sigmoid-beta0.1": ("dpo", {"beta": 0.1}),
    "dpo-sigmoid-beta0.5": ("dpo", {"beta": 0.5}),
    "dpo-ipo-beta0.1": ("ipo", {"beta": 0.1}),
    "dpo-truncation-18": ("dpo", {"beta": 0.1, "max_length": 18}),
    "dpo-hinge-beta0.1": ("hinge", {"beta": 0.1}),
    "dpo-apo_zero-beta0.2": ("apo_zero", {"beta": 0.2}),
    "dpo-mpo-beta0.1": ("trl:dpo", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    "cpo-beta0.1-alpha1.0": ("trl:cpo", {"beta": 0.1}),
    "simpo-beta2.0-alpha0.0": ("simpo", {"beta": 2.0, "gamma": 0.5}),
    "simpo-beta2.5-alpha0.3": ("trl:simpo", {"beta": 2.5, "simpo_gamma": 1.4, "cpo_alpha": 0.3}),
    "orpo-beta0.1": ("trl:orpo", {"beta": 0.1}),
    "orpo-beta1.0": ("trl:orpo", {"beta": 1.0}),
    "apo_zero_unpaired-beta0.1-w1.0-1.0": ("apo_zero_unpaired", {"beta": 0.1}),
    "kto-beta0.1-w1.0-1.0": ("kto", {"beta": 0.1}),
    "kto-beta0.5-w1.0-1.33": ("kto", {"beta": 0.5, "undesirable_weight": 1.33}),
}
SCORED: dict[str, dict[str, Any]] = {
    "reward-plain": {},
    "reward-center0.01": {"centering": 0.01},
    "reward-margin": {},
}


def dr_grpo() -> Algorithm:
    algorithm = create_algorithm("grpo", kl=0.0, std=False)
    (stage,) = algorithm.stages
    terms = tuple(replace(t, count=Count("constant", constant=32)) for t in stage.terms)
    algorithm.stages = (replace(stage, terms=terms),)
    return algorithm


def corrected_kl() -> Algorithm:
    """TRL's default KL term: k3 times the differentiable ratio."""
    algorithm = create_algorithm("grpo", kl=0.04)
    (stage,) = algorithm.stages
    surrogate, penalty = stage.terms
    penalty = replace(penalty, loss=create_loss("kl_penalty", importance=True))
    algorithm.stages = (replace(stage, terms=(surrogate, penalty)),)
    return algorithm


# The composition, and whether both steps train on one rollout.
SAMPLED: dict[str, tuple[Callable[[], Algorithm], bool]] = {
    "grpo-dapo": (lambda: create_algorithm("grpo", kl=0.0, count="token"), False),
    "grpo-grpo-beta=0.04-use_bias_correction_kl=False": (lambda: create_algorithm("grpo", kl=0.04), False),
    "grpo-grpo-beta=0.04-use_bias_correction_kl=True": (corrected_kl, False),
    "grpo-dr_grpo-scale_rewards=none": (dr_grpo, False),
    "grpo-grpo-epsilon=0.2-num_iterations=2": (lambda: create_algorithm("grpo", kl=0.0, clip=0.2), True),
    "grpo-dapo-mask_truncated_completions=True": (
        lambda: create_algorithm("grpo", kl=0.0, count="token", mask_truncated=True),
        False,
    ),
    "grpo-grpo-mask_truncated_completions=True": (lambda: create_algorithm("grpo", kl=0.0, mask_truncated=True), False),
    "grpo-grpo-importance_sampling_level=sequence-epsilon=0.003-epsilon_high=0.004-num_iterations=2": (
        lambda: create_algorithm("trl:gspo", epsilon=0.003, epsilon_high=0.004),
        True,
    ),
    "grpo-cispo-epsilon_high=5.0-num_iterations=2": (lambda: create_algorithm("trl:cispo", epsilon_high=5.0), True),
    "rloo-beta=0.0": (lambda: create_algorithm("rloo", kl=0.0), True),
    "rloo-beta=0.05": (lambda: create_algorithm("rloo", kl=0.05), True),
}
TOKENISED = [name for name, case in CASES.items() if case["kind"] == "tokenisation"]
LOGPS = "dpo-tokenisation-and-logps"


def test_no_golden_case_is_forgotten() -> None:
    covered = [*TRAINED, *SCORED, *SAMPLED, *TOKENISED, LOGPS]
    assert len(covered) == len(set(covered)) == len(CASES) == 39 and set(covered) == set(CASES)


def rows(case: Case) -> list[dict[str, Any]]:
    return DOCUMENT["input_sets"][case["inputs"]]["rows"]


@pytest.fixture(scope="module")
def words() -> Any:
    return load_tokenizer(POLICY)


# ------------------------------------------------------------------------------------------------ ids, log-probs


@pytest.mark.parametrize("name", [LOGPS, *TOKENISED])
def test_token_ids(name: str, words: Any) -> None:
    """Ids are the same, whether the prompt is explicit or implicit, plain or conversational."""
    case = CASES[name]
    if "" in (rows(case)[0].get("chosen"), rows(case)[0].get("rejected")):  # loading drops it; the encoder knows it
        (row,) = rows(case)
        (prompt,), ((chosen, rejected),) = encode_sides(words, [row["prompt"]], [[row["chosen"]], [row["rejected"]]])
        assert [{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}] == case["expected"]["token_ids"]
        return
    samples, report = tokenise(rows(case), words, "pairs")
    assert not report.dropped and not report.cut
    assert pair_ids(samples) == case["expected"]["token_ids"]


def pair_ids(samples: Samples) -> list[dict[str, list[int]]]:
    return [
        {
            "prompt_ids": samples.prompts[samples.prompt_B[2 * i]].tolist(),
            "chosen_ids": samples.completions[2 * i].tolist(),
            "rejected_ids": samples.completions[2 * i + 1].tolist(),
        }
        for i in range(len(samples))
    ]


@pytest.mark.parametrize("name", ["kto-beta0.1-w1.0-1.0", "kto-beta0.5-w1.0-1.33"])
def test_token_ids_of_unpaired_rows(name: str, words: Any) -> None:
    samples, _ = tokenise(rows(CASES[name]), words, "unpaired")
    for i, row in enumerate(CASES[name]["expected"]["token_ids"]):
        assert samples.prompts[samples.prompt_B[i]].tolist() == row["prompt_ids"]
        assert samples.completions[i].tolist() == row["completion_ids"]
        assert bool(samples.columns["desirable"][i]) == row["label"]


@pytest.mark.parametrize("token_budget", [10_000, 40])
@pytest.mark.parametrize("role", ["policy", "ref"])
def test_log_probabilities(role: str, token_budget: int, words: Any) -> None:
    """Every completion token's, through tree batches, and their sums."""
    expected = CASES[LOGPS]["expected"]
    policy = load_policy(POLICY if role == "policy" else REFERENCE)
    samples, _ = tokenise(rows(CASES[LOGPS]), words, "pairs")
    logps_C = token_scores(lambda tree: policy(tree).logps_C, samples, token_budget, "cpu")
    sums_B = samples.padded(logps_C).sum(-1)
    for side, start in (("chosen", 0), ("rejected", 1)):
        ours = [logps_C[torch.from_numpy(samples.completions.positions([b]))] for b in range(start, 16, 2)]
        for mine, theirs in zip(ours, expected[f"{role}_{side}_logps"], strict=True):
            torch.testing.assert_close(mine, torch.tensor(theirs), rtol=1e-5, atol=1e-5)
        sums = expected["sequence_logps"][f"{role}_{side}_logps"]
        torch.testing.assert_close(sums_B[start::2], torch.tensor(sums), rtol=1e-5, atol=1e-5)


def test_truncation_keeps_what_the_reference_keeps(words: Any) -> None:
    """Rows whose prompt reaches the limit are dropped and counted; completions are cut at the end, EOS included."""
    case = CASES["dpo-truncation-18"]
    samples, report = tokenise(rows(case), words, "pairs", max_length=18)
    kept, collated = case["expected"]["rows_kept"], case["expected"]["collated"]
    assert samples.extra["prompt"] == [rows(case)[i]["prompt"] for i in kept]
    assert sum(report.dropped.values()) == len(rows(case)) - len(kept) and report.rows == len(kept)
    theirs = []
    for ids, mask in zip(collated["input_ids"], collated["completion_mask"], strict=True):
        theirs.append([i for i, m in zip(ids, mask, strict=True) if m])
    ours = [samples.completions[b].tolist() for b in (0, 2, 1, 3)]  # theirs are chosen first, then rejected
    assert ours == theirs
    uncut, _ = tokenise(rows(case), words, "pairs")
    over = sum(len(c) + len(p) > 18 for i in kept for p, c in sequences(uncut, i))
    assert list(report.cut.values()) == [over]


def sequences(samples: Samples, row: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for b in (2 * row, 2 * row + 1):
        yield samples.prompts[samples.prompt_B[b]], samples.completions[b]


# ------------------------------------------------------------------------------------------------ two steps

PLAIN = {"optimizer": "sgd", "learning_rate": 0.02, "schedule": "constant", "warmup_steps": 0, "max_grad_norm": None,
         "shuffle": False, "logging_steps": 1, "max_steps": 2}  # fmt: skip


def assert_steps(history: list[dict[str, float]], case: Case) -> None:
    assert len(history) == 2
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in history] == pytest.approx(case["expected"][key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("tokens_per_batch", [8192, 60], ids=["one batch", "many micro-batches"])
@pytest.mark.parametrize("name", TRAINED)
def test_training(name: str, tokens_per_batch: int) -> None:
    algorithm, options = TRAINED[name]
    needs = create_algorithm(algorithm, **{k: v for k, v in options.items() if k != "max_length"}).needs
    run = prefzoo.train(
        algorithm, model=POLICY, reference=REFERENCE if "reference" in needs else None, dataset=rows(CASES[name]),
        rows_per_step=8, quiet=True, tokens_per_batch=tokens_per_batch, **PLAIN, **options,
    )  # fmt: skip
    assert_steps(run.history, CASES[name])
    if algorithm == "kto":
        expected = CASES[name]["expected"]["intermediate"]["z0"]
        assert [row["kl/baseline"] for row in run.history] == pytest.approx(expected, rel=1e-4)


def test_training_gives_the_gradient_of_every_parameter() -> None:
    """Not only the norm of all: after one step of SGD every parameter has moved by its own golden norm."""
    case = CASES["dpo-sigmoid-beta0.1"]
    run = prefzoo.train("dpo", model=POLICY, reference=REFERENCE, dataset=rows(case), rows_per_step=8, quiet=True,
                        **{**PLAIN, "max_steps": 1})  # fmt: skip
    before = dict(load_policy(POLICY).model.named_parameters())
    expected = case["expected"]["param_grad_norm_step1"]
    moved = {k: float((p - before[k]).detach().norm()) / 0.02 for k, p in run.model.named_parameters()}
    assert moved.keys() == expected.keys()
    for key, norm in expected.items():
        assert moved[key] == pytest.approx(norm, rel=2e-3, abs=1e-4), key  # the weights are float32: lr * g is rounded


def engine_of(algorithm: Algorithm, data: Samples, words: Any, **roles: Any) -> Engine:
    policy = roles.pop("policy", None) or load_policy(POLICY)
    (stage,) = algorithm.stages
    config, log = TrainConfig.of(PLAIN, {"rows_per_step": 8}), RunLog(None, "golden", quiet=True)
    return Engine(stage, config, tokenizer=words, policy=policy, data=data, log=log, **roles)


@pytest.mark.parametrize("name", SCORED)
def test_reward_model(name: str, words: Any) -> None:
    """From a given sequence classifier: scores, two steps."""
    case = CASES[name]
    samples, _ = tokenise(rows(case), words, "pairs")
    scorer = load_scorer(REWARD)
    engine = engine_of(create_algorithm("reward_model", **SCORED[name]), samples, words, scorer=scorer)
    steps, history = engine.run(), []
    for number in (1, 2):
        expected = case["expected"]["intermediate"][f"rewards_step{number}"]
        with torch.no_grad():
            rewards_B = scorer(TreeBatch.of(samples)).rewards_B
        for ours, side in ((rewards_B[0::2], "chosen"), (rewards_B[1::2], "rejected")):
            torch.testing.assert_close(ours, torch.tensor(expected[f"{side}_rewards"]), rtol=1e-4, atol=1e-5)
        history.append(next(steps)[1])
    assert_steps(history, case)


class Given(RewardSource):
    """The rewards of the file."""

    name = "given"

    def __init__(self, rewards: list[float]) -> None:
        self.rewards = torch.tensor(rewards)

    def __call__(self, samples: Samples) -> Tensor:
        return self.rewards


class Replay:
    """Stands in for the sampler: the completions of the file, with the log-probabilities of the policy that asks."""

    def __init__(self, engine: Engine, samples: Samples, once: bool) -> None:
        self.engine, self.samples, self.once = engine, samples, once
        self.old: Tensor | None = None

    def generate(self, *_: Any, **__: Any) -> Samples:
        if self.old is None or not self.once:
            self.old = self.engine.policy_logps(self.samples)
        return self.samples.with_tokens(old_logps=self.old)


@pytest.mark.parametrize("name", SAMPLED)
def test_policy_gradient(name: str, words: Any) -> None:
    case, (composition, once) = CASES[name], SAMPLED[name]
    given, expected = DOCUMENT["input_sets"][case["inputs"]], case["expected"]
    ids, distinct = expected["token_ids"], list(dict.fromkeys(given["prompts"]))
    texts = words(given["completions"], add_special_tokens=False)["input_ids"]
    assert texts == ids["completion_ids"], "the file's texts and ids are one"
    samples = Samples(
        "completions",
        Ragged.of([ids["prompt_ids"][given["prompts"].index(p)] for p in distinct]),
        Ragged.of(ids["completion_ids"]),
        np.array([distinct.index(p) for p in given["prompts"]]),
        columns={"finish": torch.tensor([Finish.STOP if i[-1] == 2 else Finish.LENGTH for i in ids["completion_ids"]])},
        extra={"prompt": distinct},
    )
    algorithm = composition()
    reference = load_policy(REFERENCE).requires_grad_(False) if "reference" in algorithm.needs else None
    rewards = Given(given["rewards"])
    engine = engine_of(algorithm, samples.as_prompts(), words, reference=reference, reward=rewards)
    if "policy_logps_step1" in expected:
        torch.testing.assert_close(
            samples.padded(engine.policy_logps(samples)), padded(expected["policy_logps_step1"]), rtol=1e-5, atol=1e-5
        )
    if "ref_logps" in expected:
        torch.testing.assert_close(
            samples.padded(engine.reference_logps(samples)), padded(expected["ref_logps"]), rtol=1e-5, atol=1e-5
        )
    credit = engine.stage.credit
    assert credit is not None
    scored = samples.with_tokens(old_logps=engine.policy_logps(samples))
    if reference is not None:
        scored = scored.with_tokens(ref_logps=engine.reference_logps(samples))
    advantages_BT = samples.padded(credit(scored, torch.tensor(given["rewards"])).tokens["advantages"])
    torch.testing.assert_close(
        advantages_BT[:, 0], torch.tensor(expected["intermediate"]["advantages"]), rtol=1e-4, atol=1e-6
    )
    engine.rollouts = Replay(engine, samples, once)  # type: ignore[assignment]
    assert_steps([values for _, values, _ in engine.run()], case)


def padded(lists: list[list[float]]) -> Tensor:
    width = max(map(len, lists))
    return torch.tensor([row + [0.0] * (width - len(row)) for row in lists])
