"""The policy-gradient side of the laboratory: every entry is spoken of, and a wrong estimator is found out.

That the findings hold is in ``test_theory``; here registered functions are replaced by wrong ones, one at a time, and
each must make a finding fail. Biases are stated, not bounded, so only the other findings can.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from prefzoo.losses import LOSSES, MODIFIERS, advantages, create_loss, kl, policy_modifiers
from prefzoo.losses.base import CREDITS, ESTIMATORS
from prefzoo.parts.count import Count
from prefzoo.records import Distribution, Heads, Likelihood, LossOut, PolicyGradient, Values
from prefzoo.registry import Registry
from prefzoo.theory import findings
from prefzoo.theory.credit import binary_weight, measured_weight, order_statistics, policies, value_of
from prefzoo.theory.expectations import (
    alike,
    cosine,
    difference,
    draws,
    expected_loss,
    moved,
    nats,
    objective_gradient,
    record_of,
    some_rewards,
)
from prefzoo.theory.policies import Tabular
from prefzoo.theory.policy_gradient import SURROGATES, TOKEN

WEIGHTED = ("weighted_sft", "awr", "hpo")
FAMILIES = (PolicyGradient, Values, Likelihood, Distribution, Heads)


def owned(registry: Registry, family: bool) -> list[str]:
    return [n for n in registry.names() if not family or registry.entry(n).tags["family"] in FAMILIES]


ENTRIES = [*owned(LOSSES, True), *owned(MODIFIERS, True), *owned(CREDITS, False), *owned(ESTIMATORS, False)]


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_entry_has_a_finding_that_could_fail(entry: str) -> None:
    """Not biases alone: something that could turn out false."""
    assert any(f.bound is not None for f in findings(entry))


# -- wrong estimators -------------------------------------------------------------------------------------------------


def scaled(rewards_B: Tensor, group_B: Tensor, **_: Any) -> Tensor:
    """Not centred."""
    return rewards_B


def own_reward_in_the_baseline(rewards_B: Tensor, group_B: Tensor) -> Tensor:
    return advantages._centred(rewards_B, group_B)


def absolute_std(rewards_B: Tensor, group_B: Tensor, *, scale: str = "group", eps: float = 1e-4, **_: Any) -> Tensor:
    """The population's deviation where the sample's is promised."""
    return GROUP_RELATIVE(rewards_B, group_B, scale=scale, **({} if scale == "none" else {"eps": eps, "sample": False}))


GROUP_RELATIVE, GAE, BEST_OF_K, WHITEN = (
    advantages.group_relative, advantages.gae, advantages.best_of_k, advantages.whiten,
)  # fmt: skip
SHAPED, TOP, GDPO, REINFORCE_PP = (
    advantages.shaped_rewards, advantages.top_against_bottom, advantages.gdpo, advantages.reinforce_pp,
)  # fmt: skip


def late_gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The value of the token itself taken for that of the next one."""
    credit_BT, returns_BT = GAE(rewards_BT, values_BT, mask_BT, **options)
    return credit_BT.roll(1, -1), returns_BT


def fixed_lambda(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return GAE(rewards_BT, values_BT, mask_BT, **{**options, "lam": 0.9})


WRONG_CREDITS: list[tuple[str, Callable[..., Any]]] = [
    ("leave_one_out", own_reward_in_the_baseline),
    ("leave_one_out", scaled),
    ("group_relative", scaled),
    ("group_relative", absolute_std),
    ("gae", late_gae),
    ("gae", fixed_lambda),
    ("remax", lambda rewards_B, greedy_B: rewards_B - 0.5 * (rewards_B + greedy_B)),
    ("opo", lambda rewards_B, group_B, length_B: GROUP_RELATIVE(rewards_B, group_B)),
    ("gdpo", lambda rewards_BR, group_B, **_: GROUP_RELATIVE(rewards_BR.sum(1), group_B)),
    ("reinforce_pp", lambda *record, **options: REINFORCE_PP(*record, **{**options, "kl": 0.0})),
    ("reinforce_pp", lambda *record, **options: -REINFORCE_PP(*record, **options)),
    ("reinforce_pp_baseline", lambda s, g, *rest, **options: REINFORCE_PP(s, *rest, **options).abs()),
    ("whiten", lambda values, mask, **options: WHITEN(values, mask, **{**options, "unbiased": False})),
    ("best_of_k", lambda scores_B, group_B, *, k=1: BEST_OF_K(-scores_B, group_B, k=k)),
    ("best_of_k", lambda scores_B, group_B, *, k=1: BEST_OF_K(scores_B, group_B, k=k).flip(0)),
    ("top_against_bottom", lambda scores_B, group_B: TOP(scores_B, group_B)[::-1]),
    ("shaped_rewards", lambda *record, **options: SHAPED(*record, **{**options, "kl": 0.2})),
    ("shaped_rewards", lambda s, new, ref, mask, **options: SHAPED(s, ref, new, mask, **options)),
]


def broken(entry: str) -> list[str]:
    return [f.claim for f in findings(entry) if not f.holds]


@pytest.mark.parametrize(("entry", "wrong"), WRONG_CREDITS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(WRONG_CREDITS)])
def test_a_wrong_credit_is_found_out(entry: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert not broken(entry)
    monkeypatch.setattr(advantages, entry, wrong)
    assert broken(entry)


def replaced(registry: Registry, entry: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry with another function behind the same signature."""
    known = registry.entry(entry)
    function = functools.wraps(known.function)(functools.partial(wrong, known.function))
    monkeypatch.setitem(registry._entries, known.name, dataclasses.replace(known, function=function))


Loss = Callable[..., LossOut]


def negated(loss: Loss, batch: Any, **options: Any) -> LossOut:
    return LossOut(-loss(batch, **options).loss)


def doubled(loss: Loss, batch: Any, **options: Any) -> LossOut:
    return LossOut(2 * loss(batch, **options).loss)


def with_dead_policy(loss: Loss, batch: PolicyGradient, **options: Any) -> LossOut:
    """No gradient reaches the policy."""
    return loss(dataclasses.replace(batch, logps_BT=batch.logps_BT.detach() + 0 * batch.logps_BT), **options)


def length_normalised(loss: Loss, batch: Any, **options: Any) -> LossOut:
    return LossOut(loss(batch, **options).loss / batch.mask_BT.sum(-1, keepdim=True))


def off_by_one(loss: Loss, batch: PolicyGradient, **options: Any) -> LossOut:
    """Every token gets the advantage of the one before it."""
    return loss(dataclasses.replace(batch, advantages_BT=batch.advantages_BT.roll(1, -1)), **options)


def without_cap(loss: Loss, batch: Likelihood, **options: Any) -> LossOut:
    return loss(batch, **{**options, "cap": 1e9})


def swapped(loss: Loss, batch: Distribution, **options: Any) -> LossOut:
    """Policy for teacher; the gradient reaches the policy all the same."""
    moved_over = batch.logits_BTV - batch.logits_BTV.detach()
    return loss(
        dataclasses.replace(
            batch,
            logits_BTV=batch.teacher_logits_BTV.detach() + moved_over,
            teacher_logits_BTV=batch.logits_BTV.detach(),
        ),
        **options,
    )


def other_expectile(loss: Loss, batch: Heads, *, expectile: float = 0.7) -> LossOut:
    return loss(batch, expectile=1 - expectile)


WRONG_LOSSES: list[tuple[str, Callable[..., LossOut]]] = [
    *[(name, wrong) for name in SURROGATES for wrong in (negated, doubled, with_dead_policy)],
    *[(name, wrong) for name in TOKEN for wrong in (length_normalised, off_by_one)],
    ("luspo", length_normalised), ("gspo", length_normalised), ("entropy_bonus", negated), ("entropy_bonus", doubled),
    ("kl_penalty", negated), ("kl_penalty", doubled),
    *[(name, wrong) for name in ("sft", "dft", *WEIGHTED, "filtered_sft") for wrong in (negated, doubled)],
    *[(name, without_cap) for name in WEIGHTED],
    *[(name, wrong) for name in ("forward_kl", "reverse_kl") for wrong in (negated, swapped)],
    ("gkd", negated), ("gkd", lambda loss, batch, *, beta=0.5, **rest: loss(batch, beta=1 - beta, **rest)),
    ("ilql_q", lambda loss, batch, *, gamma=0.99: loss(batch, gamma=1.0)), ("ilql_v", other_expectile),
    ("ilql_v", negated), ("ilql_cql", negated), ("ilql_cql", doubled),
]  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "wrong"), WRONG_LOSSES, ids=[f"{n}-{getattr(w, '__name__', 'wrong')}" for n, w in WRONG_LOSSES]
)
def test_a_wrong_loss_is_found_out(entry: str, wrong: Callable[..., LossOut], monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(LOSSES, entry, wrong, monkeypatch)
    assert broken(entry)


def test_a_wrong_value_loss_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error without its square has its optimum at the median, not at the mean."""

    def median(loss: Loss, batch: Values, **options: Any) -> LossOut:
        return LossOut((batch.values_BT - batch.returns_BT).abs())

    replaced(LOSSES, "clipped_value", median, monkeypatch)
    assert broken("clipped_value")


@pytest.mark.parametrize("entry", ["sampler_correction", "off_policy_mask", "high_entropy"])
def test_a_wrong_modifier_is_found_out(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(modifier: Any, loss: Loss, batch: PolicyGradient, **options: Any) -> LossOut:
        """The weights of the sampler over the learner; dropped the good ones; kept the certain tokens."""
        if entry == "sampler_correction":
            assert batch.sampling_logps_BT is not None
            turned = 2 * batch.old_logps_BT - batch.sampling_logps_BT
            return modifier(loss, dataclasses.replace(batch, sampling_logps_BT=turned), **options)
        if entry == "off_policy_mask":
            kept = modifier(loss, dataclasses.replace(batch, advantages_BT=-batch.advantages_BT), **options)
            return LossOut(-kept.loss)
        out, kept = loss(batch), modifier(loss, batch, **options)
        return LossOut(out.loss - kept.loss)

    replaced(MODIFIERS, entry, backwards, monkeypatch)
    assert broken(entry)


@pytest.mark.parametrize(
    ("entry", "wrong"),
    [("k1", kl.k2), ("k2", kl.k3), ("k3", kl.k1), ("k3", kl.k3_straight), ("abs", kl.k1), ("k1_straight", kl.k1),
     ("k3_straight", kl.k3), ("k1", lambda logps, ref: ref - logps), ("k3", lambda logps, ref: kl.k3(ref, logps))],
)  # fmt: skip
def test_a_wrong_kl_estimator_is_found_out(entry: str, wrong: kl.Estimator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefzoo.theory.divergences.kl_estimator", lambda name: wrong)
    assert broken(entry)


def test_a_wrong_exact_kl_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(logits: Tensor, ref_logits: Tensor, **options: Any) -> Tensor:
        return kl.kl_of(kl.log_probs(ref_logits.detach()), kl.log_probs(logits))

    monkeypatch.setattr("prefzoo.theory.distillation.exact_estimator", turned)
    assert broken("exact")


# -- the laboratory's own tools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_are_all_there_and_weigh_one(size: int) -> None:
    policy = Tabular(vocabulary=3, length=2, seed=1)
    drawn = draws(policy, size)
    assert len(drawn.batches()) == len(policy.strings) ** size
    assert float(drawn.weight_B.sum()) == pytest.approx(size, abs=1e-12)
    assert len({tuple(drawn.index_B[rows].tolist()) for rows in drawn.batches()}) == len(drawn.batches())
    share_R = torch.zeros(len(policy.strings), dtype=torch.float64).index_add(0, drawn.index_B, drawn.weight_B) / size
    assert torch.allclose(share_R, policy.log_probs().detach().exp(), atol=1e-12)


@pytest.mark.parametrize("unit", ["row", "row_sum", "token"])
def test_units_are_those_of_the_counts(unit: Any) -> None:
    """The mean over batches of what ``Count`` makes of each batch."""
    policy = policies()[0]
    drawn = draws(policy, 2)
    generator = torch.Generator().manual_seed(0)
    record = record_of(policy, drawn.index_B, torch.randn(len(drawn.index_B), generator=generator).double())
    loss = create_loss("reinforce")
    ours = expected_loss(loss, record, drawn, unit)
    loss_BT = loss(record).loss.detach()
    each = [drawn.weight_B[rows[0]] * Count(unit).mean(loss_BT[rows], record.mask_BT[rows]) for rows in drawn.batches()]
    assert float(ours.detach()) == pytest.approx(float(torch.stack(each).sum()), rel=1e-12)


def test_the_gradient_of_the_objective_is_that_of_finite_differences() -> None:
    policy = policies()[0]
    rewards_R = some_rewards(policy)
    exact = objective_gradient(policy, rewards_R)
    table = policy.get_parameter("table")
    with torch.no_grad():
        for i in range(table.numel()):
            ends = []
            for step in (1e-6, -1e-6):
                table.view(-1)[i] += step
                ends.append(float((policy.log_probs().exp() * rewards_R).sum()))
                table.view(-1)[i] -= step
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(exact[i]), abs=1e-8)


def test_values_are_means_of_what_goes_on() -> None:
    policy = policies()[0]
    rewards_R = some_rewards(policy)
    values_RT = value_of(policy, rewards_R)
    mean = (policy.log_probs().detach().exp() * rewards_R).sum()
    assert torch.allclose(values_RT[:, 0], mean)
    # The value of a prefix is the mean of those one token further on, an ended response being worth its reward.
    shares = policy.distributions().detach().exp()
    first = sum(
        float(shares[0, 0, token]) * float(rewards_R[r] if len(policy.strings[r]) == 1 else values_RT[r, 1])
        for token in range(3)
        for r in [next(r for r, s in enumerate(policy.strings) if s[0] == token)]
    )
    assert first == pytest.approx(float(mean), rel=1e-12)


def test_order_statistics_are_distributions() -> None:
    probs_R = Tabular(vocabulary=5, seed=2).log_probs().detach().exp()
    rewards_R = torch.tensor([3.0, -1.0, 0.5, 2.0, 9.0]).double()
    ranks = [order_statistics(probs_R, rewards_R, 4, rank) for rank in (1, 2, 3, 4)]
    assert all(float(r.sum()) == pytest.approx(1, abs=1e-12) and bool((r > -1e-15).all()) for r in ranks)
    assert torch.allclose(torch.stack(ranks).mean(0), probs_R)  # a random one of the four is a draw of the policy


def test_grpo_weighs_prompts_alike_up_to_groups_of_three() -> None:
    """With 4 completions and more, prompts that are nearly always or never solved weigh more."""
    for p in (0.1, 0.5):
        for size in (2, 3, 5, 8):
            assert measured_weight(p, size) == pytest.approx(binary_weight(p, size), rel=1e-9)
    assert binary_weight(0.1, 2) == pytest.approx(binary_weight(0.5, 2))
    assert binary_weight(0.1, 3) == pytest.approx(binary_weight(0.5, 3))
    assert binary_weight(0.1, 4) > 1.02 * binary_weight(0.5, 4)


def test_differences_and_cosines() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    assert difference(a, a) == 0 and cosine(a, b) == 0
    assert difference(2 * a, a) == 1 and cosine(2 * a, a) == 1
    assert torch.equal(alike(3 * a, b), torch.tensor([2.0, 0.0]))
    policy = policies()[0]
    assert nats(policy, policy) == 0 < nats(policy, moved(policy))
    assert policies()[0].get_parameter("table").equal(policy.get_parameter("table"))  # moved left it as it was


def test_importance_weights_are_those_of_the_policies() -> None:
    """Over the sampler, the unbounded weights of a completion have mean one."""
    policy = policies()[0]
    sampler = moved(policy)
    weight_RT = policy_modifiers.importance_weights(
        policy.logps()[0], sampler.logps()[0], policy.mask_RT, correction="sequence_truncate", correction_max=1e9
    )
    assert float((sampler.log_probs().exp() * weight_RT.amax(-1)).sum().detach()) == pytest.approx(1, abs=1e-12)
