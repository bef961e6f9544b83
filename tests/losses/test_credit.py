"""Credit and KL: relations of the advantage functions, of the estimators' values and gradients, and of controllers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from prefzoo.losses.advantages import best_of_k, gae, group_relative, leave_one_out, shaped_rewards, whiten
from prefzoo.losses.base import create_loss
from prefzoo.losses.kl import KL_ESTIMATORS, k1, k2, k3, kl_estimator
from prefzoo.parts.controllers import AdaptiveKL, FixedKL
from prefzoo.records import PolicyGradient, masked_sum
from prefzoo.registry import UsageError

# -- KL estimators: exact expectations over a small vocabulary --------------------------------------------------------


def test_unknown_kl_estimator_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="k1, k2, k3"):
        kl_estimator("kl3")


def test_k3_is_exact_near_zero_in_float32() -> None:
    x = torch.tensor([1e-3, 1e-2, -1e-2, 0.5])
    exact = torch.expm1(x.double()) - x.double()
    torch.testing.assert_close(k3(torch.zeros_like(x), x).double(), exact, rtol=1e-3, atol=1e-10)


@pytest.fixture(params=range(3))
def vocabulary(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the policy, log-probabilities of the reference and of an older policy, over 7 tokens."""
    generator = torch.Generator().manual_seed(request.param)
    logits, ref, old = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), ref.log_softmax(0), old.log_softmax(0)


def gradient_of(value: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits, retain_graph=True)[0]


def test_kl_estimators_in_expectation(vocabulary: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, ref, _ = vocabulary
    logps = logits.log_softmax(0)
    weight = logps.exp().detach()  # tokens sampled from the policy: sampling carries no gradient
    kl, reverse = (logps.exp() * (logps - ref)).sum(), (ref.exp() * (ref - logps)).sum()
    value = {name: (weight * f(logps, ref)).sum() for name, f in KL_ESTIMATORS.items()}
    gradient = {name: gradient_of(v, logits) for name, v in value.items()}
    kl_gradient = gradient_of(kl, logits)

    torch.testing.assert_close(value["k1"], kl)
    torch.testing.assert_close(value["k3"], kl)
    assert not torch.isclose(value["k2"], kl)
    assert bool((k3(logps, ref) >= 0).all()) and bool((k2(logps, ref) >= 0).all()) and bool((k1(logps, ref) < 0).any())

    torch.testing.assert_close(gradient["k1"], torch.zeros(7, dtype=torch.float64))
    torch.testing.assert_close(gradient["k2"], kl_gradient)
    torch.testing.assert_close(gradient["k3"], gradient_of(reverse, logits))
    assert not torch.allclose(gradient["k3"], kl_gradient, rtol=0.05)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_importance_makes_value_and_gradient_those_of_the_kl(
    vocabulary: tuple[Tensor, Tensor, Tensor], estimator: str
) -> None:
    """Even for tokens that an older policy sampled."""
    logits, ref, old = vocabulary
    logps = logits.log_softmax(0)
    batch = PolicyGradient(
        logps_BT=logps[None],
        old_logps_BT=old[None],
        ref_logps_BT=ref[None],
        advantages_BT=torch.zeros(1, 7, dtype=torch.float64),
        mask_BT=torch.ones(1, 7, dtype=torch.bool),
    )
    loss_BT = create_loss("kl_penalty", estimator=estimator, importance=True)(batch).loss
    expected, kl = (old.exp() * loss_BT[0]).sum(), (logps.exp() * (logps - ref)).sum()
    torch.testing.assert_close(expected, kl)
    torch.testing.assert_close(gradient_of(expected, logits), gradient_of(kl, logits))


# -- advantages -------------------------------------------------------------------------------------------------------

SEEDS = range(5)


def groups(seed: int, *, missing: bool = False) -> tuple[Tensor, Tensor]:
    """24 rewards in groups of uneven size with arbitrary numbers, in no order."""
    generator = torch.Generator().manual_seed(seed)
    rewards_B = torch.randn(24, generator=generator, dtype=torch.float64)
    group_B = torch.tensor([-40, 7, 7000, 3, 12])[torch.randint(0, 5, (24,), generator=generator)]
    if missing:
        rewards_B[torch.randperm(24, generator=generator)[:5]] = math.nan
    return rewards_B, group_B


def by_group(rewards_B: Tensor, group_B: Tensor) -> Iterator[tuple[list[int], list[float]]]:
    """Rows and rewards of each group, missing ones left out."""
    for group in sorted(set(group_B.tolist())):
        rows = [i for i in range(len(group_B)) if group_B[i] == group and not rewards_B[i].isnan()]
        yield rows, rewards_B[rows].tolist()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("missing", [False, True])
def test_group_relative(seed: int, missing: bool) -> None:
    rewards_B, group_B = groups(seed, missing=missing)
    plain_B, scaled_B = group_relative(rewards_B, group_B, scale="none"), group_relative(rewards_B, group_B, eps=0.0)
    assert bool((plain_B[rewards_B.isnan()] == 0).all())
    for rows, rewards in by_group(rewards_B, group_B):
        assert float(plain_B[rows].sum()) == pytest.approx(0, abs=1e-12)
        expected = torch.tensor(rewards, dtype=torch.float64) - sum(rewards) / len(rewards)
        torch.testing.assert_close(plain_B[rows], expected)
        if len(rows) > 1:
            assert float(scaled_B[rows].std()) == pytest.approx(1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("missing", [False, True])
def test_leave_one_out(seed: int, missing: bool) -> None:
    rewards_B, group_B = groups(seed, missing=missing)
    advantages_B, centred_B = leave_one_out(rewards_B, group_B), group_relative(rewards_B, group_B, scale="none")
    assert bool((advantages_B[rewards_B.isnan()] == 0).all())
    for rows, rewards in by_group(rewards_B, group_B):
        size = len(rows)
        for row, reward in zip(rows, rewards, strict=True):
            others = (sum(rewards) - reward) / (size - 1) if size > 1 else reward
            assert float(advantages_B[row]) == pytest.approx(reward - others, abs=1e-12)
        if size > 1:
            torch.testing.assert_close(advantages_B[rows], centred_B[rows] * size / (size - 1))


def test_groups_without_contrast_get_nothing() -> None:
    """All equal, one alone, all missing: no advantage, and no NaN."""
    rewards_B = torch.tensor([0.25, 0.25, 3.0, math.nan, math.nan, 5.0, math.nan])
    group_B = torch.tensor([0, 0, 1, 2, 2, 3, 3])
    for credit in (group_relative, leave_one_out):
        assert credit(rewards_B, group_B).tolist() == [0.0] * 7


def token_grid(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a mask with holes and padding; one row is empty."""
    generator = torch.Generator().manual_seed(seed)
    rewards_BT, values_BT = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    mask_BT = torch.rand(6, 9, generator=generator) < 0.7
    mask_BT[2] = False
    return rewards_BT, values_BT, mask_BT


def naive_gae(rewards: list[float], values: list[float], gamma: float, lam: float, bootstrap: float) -> list[float]:
    """A_t = sum_k (γλ)^k δ_{t+k}, written as the sum that it is."""
    following = [*values[1:], bootstrap]
    delta = [r + gamma * n - v for r, v, n in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.99, 1.0)])
def test_gae_equals_the_sum_over_the_masked_tokens_of_each_row(seed: int, gamma: float, lam: float) -> None:
    rewards_BT, values_BT, mask_BT = token_grid(seed)
    bootstrap_B = torch.arange(6, dtype=torch.float64)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam, bootstrap_B=bootstrap_B)
    for b, mask_T in enumerate(mask_BT):
        rewards, values = rewards_BT[b, mask_T].tolist(), values_BT[b, mask_T].tolist()
        expected = naive_gae(rewards, values, gamma, lam, float(b)) if values else []
        torch.testing.assert_close(advantages_BT[b, mask_T], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(returns_BT[mask_BT], (advantages_BT + values_BT)[mask_BT])


@pytest.mark.parametrize("seed", SEEDS)
def test_gae_with_lambda_1_is_return_minus_value(seed: int) -> None:
    rewards_BT, values_BT, mask_BT = token_grid(seed)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=1.0, lam=1.0)
    to_go_BT = torch.where(mask_BT, rewards_BT, 0.0).flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(advantages_BT[mask_BT], (to_go_BT - values_BT)[mask_BT])
    torch.testing.assert_close(returns_BT[mask_BT], to_go_BT[mask_BT])


@pytest.mark.parametrize("poison", [1e9, math.inf, math.nan])
@pytest.mark.parametrize("seed", SEEDS)
def test_token_estimators_do_not_see_masked_cells(seed: int, poison: float) -> None:
    rewards_BT, values_BT, mask_BT = token_grid(seed)
    bad_rewards_BT, bad_values_BT = (torch.where(mask_BT, x, poison) for x in (rewards_BT, values_BT))
    scores_B = torch.arange(6, dtype=torch.float64)
    pairs = [
        (gae(rewards_BT, values_BT, mask_BT), gae(bad_rewards_BT, bad_values_BT, mask_BT)),
        (whiten(values_BT, mask_BT), whiten(bad_values_BT, mask_BT)),
        (
            shaped_rewards(scores_B, rewards_BT, values_BT, mask_BT, estimator="k3"),
            shaped_rewards(scores_B, bad_rewards_BT, bad_values_BT, mask_BT, estimator="k3"),
        ),
    ]
    for clean, poisoned in pairs:
        torch.testing.assert_close(clean, poisoned, rtol=0, atol=0)
    assert all(bool((x[~mask_BT] == 0).all()) for x in (*pairs[0][0], pairs[1][0], pairs[2][0]))


@pytest.mark.parametrize("seed", SEEDS)
def test_whiten(seed: int) -> None:
    _, values_BT, mask_BT = token_grid(seed)
    white_BT, kept_BT = whiten(values_BT, mask_BT), whiten(values_BT, mask_BT, shift_mean=False)
    assert float(white_BT[mask_BT].mean()) == pytest.approx(0, abs=1e-12)
    assert float(white_BT[mask_BT].std()) == pytest.approx(1, abs=1e-6)
    assert float(whiten(values_BT, mask_BT, unbiased=False)[mask_BT].std(correction=0)) == pytest.approx(1, abs=1e-6)
    assert float(kept_BT[mask_BT].mean()) == pytest.approx(float(values_BT[mask_BT].mean()))
    assert bool((whiten(values_BT, torch.zeros_like(mask_BT)) == 0).all())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 2, 30])
def test_best_of_k(seed: int, k: int) -> None:
    scores_B, group_B = groups(seed, missing=True)
    scores_B = (scores_B * 2).round()  # with ties
    expected = []
    for rows, scores in by_group(scores_B, group_B):
        ranked = sorted(zip(rows, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))
        expected += [row for row, _ in ranked[:k]]
    assert best_of_k(scores_B, group_B, k=k).tolist() == expected


def test_best_of_k_at_the_edges() -> None:
    scores_B = torch.tensor([math.nan, -math.inf, math.nan])
    assert best_of_k(scores_B, torch.tensor([5, 5, 9])).tolist() == [1]  # minus infinity is a score, NaN is none
    assert best_of_k(torch.empty(0), torch.empty(0, dtype=torch.long)).tolist() == []


@pytest.mark.parametrize("seed", SEEDS)
def test_shaped_rewards_add_up(seed: int) -> None:
    logps_BT, ref_BT, mask_BT = token_grid(seed)
    scores_B = torch.arange(6, dtype=torch.float64)
    rewards_BT = shaped_rewards(scores_B, logps_BT, ref_BT, mask_BT, kl=0.3)
    total_B = scores_B * mask_BT.any(-1) - 0.3 * masked_sum(logps_BT - ref_BT, mask_BT)
    torch.testing.assert_close(rewards_BT.sum(-1), total_B)


def test_advantages_carry_no_gradient() -> None:
    x_BT = torch.randn(4, 3, requires_grad=True)
    mask_BT, group_B, x_B = torch.ones(4, 3, dtype=torch.bool), torch.tensor([0, 0, 1, 1]), x_BT[:, 0]
    made = [
        group_relative(x_B, group_B),
        leave_one_out(x_B, group_B),
        *gae(x_BT, x_BT, mask_BT),
        whiten(x_BT, mask_BT),
        shaped_rewards(x_B, x_BT, x_BT, mask_BT),
    ]
    assert not any(x.requires_grad for x in made)


# -- controllers ------------------------------------------------------------------------------------------------------


def test_adaptive_kl_steers_and_its_step_is_bounded() -> None:
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000)
    controller.update(kl=1e9, n=100)
    assert controller.value == pytest.approx(0.1 * 1.02)
    controller.update(kl=-1e9, n=100)
    assert controller.value == pytest.approx(0.1 * 1.02 * 0.98)
    with pytest.raises(UsageError, match="must be positive"):
        AdaptiveKL(target=0.0)


@pytest.mark.parametrize("controller", [FixedKL(0.3), AdaptiveKL(0.3)])
def test_controllers_resume(controller: FixedKL | AdaptiveKL) -> None:
    controller.update(kl=7.0, n=10)
    resumed = type(controller)()
    resumed.load_state_dict(controller.state_dict())
    assert resumed.value == controller.value
