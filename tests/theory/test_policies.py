"""The enumerable policies are distributions, autoregressive, and differentiable."""

from __future__ import annotations

import pytest
import torch

from prefzoo.theory.policies import EnumerablePolicy, Tabular, TinyTransformer
from prefzoo.theory.populations import total_variation, world, worlds

POLICIES: list[EnumerablePolicy] = [
    Tabular(vocabulary=4, length=1, seed=1),
    Tabular(vocabulary=3, length=3, seed=2),
    TinyTransformer(vocabulary=3, length=3, seed=3),
    TinyTransformer(vocabulary=2, length=4, seed=4),
]
EACH = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{type(p).__name__}-{p.vocabulary}-{p.length}")


@EACH
def test_probabilities_of_responses_sum_to_one(policy: EnumerablePolicy) -> None:
    torch.testing.assert_close(policy.log_probs().exp().sum().item(), 1.0, rtol=0, atol=1e-12)
    assert policy.log_probs().dtype == torch.float64
    assert len({tuple(s) for s in policy.strings}) == len(policy.strings)


@EACH
def test_log_probabilities_are_those_of_the_distributions(policy: EnumerablePolicy) -> None:
    logps_RT, mask_RT = policy.logps()
    log_RTV = policy.distributions()
    for r, string in enumerate(policy.strings):
        assert int(mask_RT[r].sum()) == len(string)
        for t, token in enumerate(string):
            assert logps_RT[r, t] == log_RTV[r, t, token]


@EACH
def test_responses_that_begin_alike_share_their_distributions(policy: EnumerablePolicy) -> None:
    log_RTV = policy.distributions()
    for r, one in enumerate(policy.strings):
        for q, other in enumerate(policy.strings):
            for t in range(min(len(one), len(other))):
                if one[:t] == other[:t]:
                    assert torch.equal(log_RTV[r, t], log_RTV[q, t])


def test_the_transformer_does_not_look_ahead() -> None:
    """What stands after a prefix, the padding of its row, has no effect on it."""
    policy = TinyTransformer(vocabulary=3, length=3, seed=3)
    before = policy.prefix_logits()
    inputs, last = policy.get_buffer("inputs"), policy.get_buffer("last")
    inputs[torch.arange(policy.length) > last[:, None]] = 1
    torch.testing.assert_close(policy.prefix_logits(), before, rtol=0, atol=0)


@EACH
def test_the_gradient_is_that_of_finite_differences(policy: EnumerablePolicy) -> None:
    gradient = policy.gradient(policy.log_probs()[0])
    place, step = 0, 1e-6
    for parameter in policy.parameters():
        with torch.no_grad():
            flat = parameter.view(-1)
            flat[0] += step
            up = policy.log_probs()[0].item()
            flat[0] -= 2 * step
            down = policy.log_probs()[0].item()
            flat[0] += step
        assert abs((up - down) / (2 * step) - gradient[place].item()) < 1e-7
        place += parameter.numel()


def test_a_table_becomes_any_distribution() -> None:
    wanted = torch.randn(15, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    policy = Tabular(vocabulary=3, length=3).become(wanted + 7.0)
    torch.testing.assert_close(policy.log_probs(), wanted, rtol=0, atol=1e-12)


def test_the_worlds_are_not_trivial() -> None:
    """Policy, reference and behaviour are three distributions."""
    for a_world in worlds():
        assert total_variation(a_world.policy, a_world.reference) > 0.02
        assert (a_world.behaviour_R - a_world.reference.log_probs().exp()).abs().max() > 0.02
        assert not a_world.reference.log_probs().requires_grad
        assert a_world.policy.log_probs().requires_grad
    lengths = world("x", POLICIES[1], Tabular(3, 3, seed=5)).facts.length_R.unique()
    assert lengths.tolist() == [1, 2, 3]
