"""Every algorithm keeps its contract and learns what it claims; and each check of the contract can fail.

``pytest -k nash_md`` runs that one's proofs.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import prefzoo
from prefzoo.algorithm import ALGORITHMS, Algorithm, create_algorithm, register_algorithm
from prefzoo.algorithm_checks import ALGORITHM_CHECKS, Subject
from prefzoo.contract import CHECKS
from prefzoo.data.samples import Samples
from prefzoo.losses import LOSSES, create_loss
from prefzoo.losses.base import register_loss
from prefzoo.models.causal import check_packing
from prefzoo.models.load import load_policy
from prefzoo.models.roles import Policy
from prefzoo.parts.credit import GroupRelative, LeaveOneOut
from prefzoo.parts.feedback import Reward
from prefzoo.parts.roles import REFERENCE, TEACHER
from prefzoo.parts.schedule import Schedule
from prefzoo.parts.source import DatasetRows, Rollouts
from prefzoo.records import LossOut, Pairs, PolicyGradient
from prefzoo.testing import ContractError, algorithm_checks, check_algorithm
from prefzoo.theory.enumerable_lm import PROMPTS, RESPONSES, EnumerableWorld, laboratory_policy, table
from prefzoo.theory.runs import CLAIMS, Claim, answers, fit, kl_optimum, sized, total_variation

WORLD = EnumerableWorld.make()


@pytest.mark.parametrize("name", prefzoo.list_algorithms())
def test_algorithm(name: str) -> None:
    check_algorithm(name)


def test_every_claim_is_about_an_algorithm() -> None:
    assert set(CLAIMS) - set(prefzoo.list_algorithms()) == set(), "algorithms that are gone"
    assert not set(CHECKS) & set(ALGORITHM_CHECKS), "a declared exception could mean either"


def test_the_page_tells_every_check() -> None:
    page = (Path(__file__).parents[1] / "docs" / "checks.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.M) == [*ALGORITHM_CHECKS]


# ------------------------------------------------------------------------------------------------ the model


def test_the_enumerable_model_runs_packed_and_is_a_distribution() -> None:
    said: list[str] = []
    policy = load_policy(WORLD.start, tokenizer=WORLD.words, note=said.append)
    assert policy.packed and not said and check_packing(policy) < 1e-5
    log_probs_PR = WORLD.log_probs()
    assert log_probs_PR.shape == (len(PROMPTS), len(RESPONSES))
    torch.testing.assert_close(log_probs_PR.exp().sum(-1), torch.ones(2).double(), atol=1e-4, rtol=0)


def test_log_probabilities_are_those_of_the_table() -> None:
    """Every response, token by token, against the library's own forward pass of one text."""
    for i, prompt in enumerate(PROMPTS):
        for j, response in enumerate(RESPONSES):
            ids = torch.tensor([WORLD.words(f"{prompt}{response}<eos>")["input_ids"]])
            logits = WORLD.start(input_ids=ids).logits[0, :-1].detach()
            logps = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            assert float(logps[len(prompt) - 1 :].sum()) == pytest.approx(float(WORLD.log_probs()[i, j]), abs=1e-5)


def test_a_model_can_be_made_of_any_distribution() -> None:
    wanted = WORLD.optimum(0.3)
    torch.testing.assert_close(WORLD.log_probs(Policy(WORLD.model_of(wanted))), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(laboratory_policy(wanted[0]).log_probs().detach(), wanted[0], atol=1e-4, rtol=0)


def test_what_is_known_of_distributions() -> None:
    start, best = WORLD.log_probs(), WORLD.optimum(1e-3)
    assert WORLD.kl_to_start(start) == pytest.approx(0.0, abs=1e-9) and WORLD.gained(start) == 0.0
    assert WORLD.gained(best) == pytest.approx(1.0) and WORLD.expected_reward(best) == pytest.approx(1.0)
    assert WORLD.entropy(best) < 1e-6 < 1.5 < WORLD.entropy(start)
    # The optimum is the largest of E[r] - beta KL.
    value = lambda x: WORLD.expected_reward(x) - 0.5 * WORLD.kl_to_start(x)  # noqa: E731
    assert all(value(WORLD.optimum(0.5)) > value(WORLD.optimum(beta)) for beta in (0.4, 0.6))


def test_samples_are_drawn_from_the_model() -> None:
    """The decoding loop on the table: shares of 4000 samples against the exact probabilities."""
    ended = fit(WORLD, sized(create_algorithm("best_of_n", n=1)), Claim("", settings={}), max_steps=1)
    assert total_variation(answers(WORLD, ended.run), WORLD.log_probs()) < 0.04


# ------------------------------------------------------------------------------------------------ checks can fail


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone afterwards."""
    for registry in (LOSSES, ALGORITHMS):
        registry.names()
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def pairs(loss: Callable[..., LossOut], **parts: Any) -> Algorithm:
    return Algorithm(source=DatasetRows("pairs"), loss=create_loss(loss.__name__), **parts)


def sampled(credit: Any, **parts: Any) -> Algorithm:
    parts = {"feedback": Reward(), "loss": create_loss("reinforce"), **parts}
    return Algorithm(source=Rollouts(4, max_new_tokens=4), credit=credit, schedule=Schedule(8), **parts)


def not_an_algorithm() -> Any:
    return "dpo"


def counts_itself(*, state: list[int] = [0]) -> Algorithm:  # noqa: B006
    state[0] += 1
    return Algorithm(source=DatasetRows("pairs"), loss=create_loss("dpo", beta=0.1 * state[0]))


@dataclass(frozen=True)
class Idle(GroupRelative):
    """Asks for what it does not use."""

    needs: frozenset[str] = frozenset({REFERENCE})


@dataclass(frozen=True)
class Restless(GroupRelative):
    """Draws from the global stream."""

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        return super().__call__(samples, scores_B + torch.randn_like(scores_B))


@dataclass(frozen=True)
class Biased(LeaveOneOut):
    """Adds what no comparison would."""

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        credited = super().__call__(samples, scores_B)
        return credited.with_tokens(advantages=credited.tokens["advantages"] + 0.1 * float(scores_B.mean()))


@dataclass(frozen=True)
class Judging(Reward):
    """A teacher that nothing asks."""

    needs: frozenset[str] = frozenset({"reward", TEACHER})


def averaged_inside(batch: Pairs) -> LossOut:
    gap_B = batch.chosen_ratio_B - batch.rejected_ratio_B
    return LossOut(-F.logsigmoid(gap_B - gap_B.detach().mean()))


def beyond_the_mask(batch: Pairs) -> LossOut:
    gap_B = batch.chosen_logps_BT.sum(-1) - batch.rejected_logps_BT.sum(-1)
    return LossOut(-F.logsigmoid(gap_B))


def upside_down(batch: Pairs) -> LossOut:
    return LossOut(-F.logsigmoid(batch.rejected_ratio_B - batch.chosen_ratio_B))


def deaf(batch: PolicyGradient) -> LossOut:
    return LossOut(-batch.logps_BT * batch.mask_BT)


BROKEN: list[tuple[str, str, Callable[[], Algorithm]]] = [
    ("builds", "expected an Algorithm", not_an_algorithm),
    ("spec_round_trip", "the function keeps state", counts_itself),
    ("roles_used", "another reference gives the same weights", lambda: sampled(Idle())),
    ("roles_used", "another teacher gives the same weights", lambda: sampled(GroupRelative(), feedback=Judging())),
    ("roles_used", "another reward gives the same weights", lambda: sampled(GroupRelative(), loss=create_loss("deaf"))),
    ("same_seed_same_run", "global random stream", lambda: sampled(Restless())),
    ("micro_batches", "averaged before", lambda: pairs(averaged_inside)),
    ("poisoned_masks", "beyond the mask", lambda: pairs(beyond_the_mask)),
    ("constant_reward", "and yet the policy moves", lambda: sampled(Biased())),
    ("shifted_reward", "change the step", lambda: sampled(Biased())),
    ("learns", "goes -", lambda: pairs(upside_down)),
]


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize(("check", "words", "make"), BROKEN, ids=[f"{i}-{b[0]}" for i, b in enumerate(BROKEN)])
def test_check_can_fail(check: str, words: str, make: Callable[[], Algorithm]) -> None:
    for loss in (averaged_inside, beyond_the_mask, upside_down):
        register_loss(loss)
    register_loss(deaf, reference=False)

    if check == "spec_round_trip":
        register_algorithm(make)
    found = {c.name: c for c in algorithm_checks(make)}
    with pytest.raises(ContractError, match="breaks") as error:
        found[check]()
    assert words in str(error.value), error.value


def test_a_claim_can_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a target that is not the run's, and of a reward that rises with any feedback."""
    learns = ALGORITHM_CHECKS["learns"]
    dpo = Subject("dpo", functools.partial(create_algorithm, "dpo"), ("beta",))
    monkeypatch.setitem(CLAIMS, "dpo", Claim("another optimum", lambda w, a: w.optimum(0.4), options={"beta": 0.5}))
    with pytest.raises(ContractError, match="ends at another optimum: total variation"):
        learns(dpo)
    sft = Subject("sft", functools.partial(create_algorithm, "sft"))
    blind = Claim("more reward", share=0.2, rows=lambda world: WORLD.rows("completions"))
    monkeypatch.setitem(CLAIMS, "sft", blind)
    with pytest.raises(ContractError, match="with permuted feedback"):
        learns(sft)


def test_a_fault_is_told_once() -> None:
    def faulty() -> Algorithm:
        return sampled(GroupRelative(), feedback=Crashing())

    with pytest.raises(ContractError) as error:
        check_algorithm(faulty)
    assert str(error.value).count("RuntimeError: out of order") == 1


@dataclass(frozen=True)
class Crashing(Reward):
    def __call__(self, samples: Samples, roles: Any) -> Tensor:
        raise RuntimeError("out of order")


@pytest.mark.usefixtures("sandbox")
def test_exceptions_are_declared_and_needed() -> None:
    @register_algorithm(exceptions={"micro_batches": "no reason"})
    def fine() -> Algorithm:
        """DPO again."""
        return Algorithm(source=DatasetRows("pairs"), loss=create_loss("dpo"))

    found = {c.name: c for c in algorithm_checks("fine")}
    with pytest.raises(ContractError, match="remove the exception"):
        found["micro_batches"]()

    @register_algorithm(exceptions={"micro_batch": "a slip"})
    def slip() -> Algorithm:
        """DPO again."""
        return Algorithm(source=DatasetRows("pairs"), loss=create_loss("dpo"))

    with pytest.raises(prefzoo.UsageError, match="did you mean 'micro_batches'"):
        next(algorithm_checks("slip"))


def first(checks: Iterator[Any], name: str) -> Any:
    return next(check for check in checks if check.name == name)


def test_a_composition_and_a_function_are_checked_too() -> None:
    def mine(*, beta: float = 0.3) -> Algorithm:
        return Algorithm(source=DatasetRows("pairs"), loss=create_loss("dpo", beta=beta))

    assert first(algorithm_checks(mine), "spec_round_trip")().startswith("not applicable: it is not registered")
    assert first(algorithm_checks(mine, beta=0.2), "micro_batches")().startswith("passed")
    assert first(algorithm_checks(mine()), "roles_loaded")() == "passed"
    with pytest.raises(prefzoo.UsageError, match="a composition has no options"):
        next(algorithm_checks(mine(), beta=0.2))


def test_options_given_are_checked() -> None:
    """A claim about other options is replaced by the demand of more reward."""
    check = first(algorithm_checks("dpo", beta=1.0), "learns")
    assert "of the way to the best reward" in check()
    assert kl_optimum(WORLD, create_algorithm("dpo", beta=1.0)).equal(WORLD.optimum(1.0))


def test_another_table_is_another_model() -> None:
    assert not torch.equal(WORLD.log_probs(Policy(table(1, 0.6))), WORLD.log_probs())
