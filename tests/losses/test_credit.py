"""Credit and KL: relations of the advantage functions, of the estimators' values and gradients, and of controllers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from prefzoo.losses.advantages import (
    best_of_k,
    gae,
    gdpo,
    group_relative,
    leave_one_out,
    opo,
    reinforce_pp,
    reinforce_pp_baseline,
    remax,
    returns_to_go,
    shaped_rewards,
    top_against_bottom,
    whiten,
)
from prefzoo.losses.base import CREDITS, ESTIMATORS, create_loss
from prefzoo.losses.kl import KL_ESTIMATORS, exact, k1, k2, k3, kl_estimator
from prefzoo.parts.controllers import AdaptiveKL, FixedKL
from prefzoo.records import PolicyGradient, masked_mean, masked_sum
from prefzoo.registry import Registry, UsageError
from prefzoo.testing import random_record

# -- KL estimators: exact expectations over a small vocabulary --------------------------------------------------------


CARDS = [(registry, name) for registry in (CREDITS, ESTIMATORS) for name in registry.names()]


@pytest.mark.parametrize(("registry", "name"), CARDS, ids=[name for _, name in CARDS])
def test_cards_are_complete(registry: Registry, name: str) -> None:
    entry = registry.entry(name)
    card = entry.function.__doc__ or ""
    assert entry.paper and entry.paper.startswith("arXiv:")
    parts = ("Args:", "Returns:", "Convention:", "Known failure:", "Source:", ">>> ")
    assert [part for part in parts if part not in card] == []
    assert [option for option in inspect.signature(entry.function).parameters if f"{option}:" not in card] == []


def test_every_credit_and_estimator_is_registered() -> None:
    assert set(CREDITS.names()) == {
        "best_of_k", "gae", "gdpo", "group_relative", "leave_one_out", "opo", "reinforce_pp", "reinforce_pp_baseline",
        "remax", "shaped_rewards", "top_against_bottom", "whiten",
    }  # fmt: skip
    assert set(ESTIMATORS.names()) == {*KL_ESTIMATORS, "exact"}
    assert all(ESTIMATORS.entry(name).function is f for name, f in KL_ESTIMATORS.items())
    assert [n for n in ESTIMATORS.names() if ESTIMATORS.entry(n).tags["needs"] == "logits"] == ["exact"]
    assert {CREDITS.entry(n).tags["gives"] for n in CREDITS.names()} == {"advantages", "rows", "rewards"}


def test_unknown_kl_estimator_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="k1, k2, k3"):
        kl_estimator("kl3")
    with pytest.raises(UsageError, match="needs the logits"):
        kl_estimator("exact")
    with pytest.raises(UsageError, match="got 'backward'"):
        exact(torch.zeros(1, 3), torch.zeros(1, 3), direction="backward")  # type: ignore[arg-type]


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


# What E[value] and E[gradient] of each estimator are, over tokens of the policy; None: none of the others.
CONTRACTS: dict[str, tuple[str | None, str]] = {
    "k1": ("kl", "zero"),
    "k2": (None, "kl"),
    "k3": ("kl", "other direction"),
    "abs": (None, "distance"),
    "k1_straight": ("kl", "kl"),
    "k3_straight": ("kl", "kl"),
    "exact": ("kl", "kl"),
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_value_and_gradient_of_kl_estimators_in_expectation(
    name: str, vocabulary: tuple[Tensor, Tensor, Tensor]
) -> None:
    logits, ref, _ = vocabulary
    logps = logits.log_softmax(0)
    known = {
        "kl": (logps.exp() * (logps - ref)).sum(),
        "other direction": (ref.exp() * (ref - logps)).sum(),
        "distance": (logps.exp() - ref.exp()).abs().sum(),
        "zero": 0 * logps.sum(),
    }
    weight = logps.exp().detach()  # tokens sampled from the policy: sampling carries no gradient
    value = exact(logits, ref) if name == "exact" else (weight * kl_estimator(name)(logps, ref)).sum()
    expected_value, expected_gradient = CONTRACTS[name]
    assert [k for k, v in known.items() if torch.isclose(v, value)] == ([expected_value] if expected_value else [])
    gradients = {k: gradient_of(v, logits) for k, v in known.items()}
    found = gradient_of(value, logits)
    assert [k for k, g in gradients.items() if torch.allclose(g, found, atol=1e-12)] == [expected_gradient]


def test_table_of_contracts_has_every_estimator() -> None:
    assert set(CONTRACTS) == set(ESTIMATORS.names())


def test_signs_of_estimators(vocabulary: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, ref, _ = vocabulary
    logps = logits.log_softmax(0)
    negative = [name for name, f in KL_ESTIMATORS.items() if bool((f(logps, ref) < 0).any())]
    assert negative == ["k1", "k1_straight"]
    assert all(bool((f(ref, ref) == 0).all()) for f in KL_ESTIMATORS.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_estimators_are_finite_at_extremes(name: str, dtype: torch.dtype) -> None:
    logps = torch.tensor([-500.0, -0.01, -500.0, -1.0], dtype=dtype, requires_grad=True)
    value = kl_estimator(name)(logps, torch.tensor([-0.01, -500.0, -500.0, -1.0], dtype=dtype))
    (gradient,) = torch.autograd.grad(value.sum(), logps)
    assert bool(value.isfinite().all()) and bool(gradient.isfinite().all())


@pytest.mark.parametrize("straight", ["k1_straight", "k3_straight"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_straight_through_has_the_exact_value_of_one_and_the_gradient_of_k2(straight: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logps, ref = (-3 * torch.rand(2, 50, generator=generator)).to(dtype)
    logps.requires_grad_()
    value = kl_estimator(straight)(logps, ref)
    assert torch.equal(value, kl_estimator(straight.removesuffix("_straight"))(logps, ref))
    (found,), (wanted,) = (torch.autograd.grad(v.sum(), logps) for v in (value, k2(logps, ref)))
    torch.testing.assert_close(found, wanted)


def test_exact_kl_is_the_expectation_of_k1_and_of_k3(vocabulary: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, ref, _ = vocabulary
    for heat in (1.0, 0.7):
        logps, ref_logps = (logits / heat).log_softmax(0), (ref / heat).log_softmax(0)
        for one, other, direction in ((logps, ref_logps, "reverse"), (ref_logps, logps, "forward")):
            found = exact(logits, ref, direction=direction, temperature=heat)  # type: ignore[arg-type]
            torch.testing.assert_close(found, (one.exp() * k1(one, other)).sum())
            torch.testing.assert_close(found, (one.exp() * k3(one, other)).sum())


def test_exact_kl_leaves_the_reference_alone_and_allows_forbidden_tokens() -> None:
    logits = torch.tensor([[0.0, 1.0, -math.inf], [0.0, -math.inf, 5000.0]], requires_grad=True)
    ref = torch.tensor([[1.0, 0.0, -math.inf], [0.0, -math.inf, 0.0]], requires_grad=True)
    exact(logits, ref).sum().backward()
    assert ref.grad is None and logits.grad is not None and bool(logits.grad.isfinite().all())
    short = exact(logits[:1, :2], ref[:1, :2])
    torch.testing.assert_close(exact(logits, ref)[:1], short)


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


@pytest.mark.parametrize("straight", ["k1_straight", "k3_straight"])
def test_straight_through_estimators_and_importance_are_one_correction_too_many(
    straight: str, vocabulary: tuple[Tensor, Tensor, Tensor]
) -> None:
    logits, ref, _ = vocabulary
    logps = logits.log_softmax(0)
    ratio = (logps - logps.detach()).exp()
    expected = (logps.exp().detach() * ratio * kl_estimator(straight)(logps, ref)).sum()
    twice = 2 * exact(logits, ref)
    if straight == "k3_straight":
        twice = twice - exact(logits, ref, direction="forward")
    torch.testing.assert_close(gradient_of(expected, logits), gradient_of(twice, logits))
    batch = random_record(PolicyGradient)
    with pytest.raises(UsageError, match=f"Take '{straight[:2]}' with importance=True"):
        create_loss("kl_penalty", estimator=straight, importance=True)(batch)


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


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sample", [True, False])
def test_scales_of_group_relative(seed: int, sample: bool) -> None:
    rewards_B, group_B = groups(seed, missing=True)
    plain_B = group_relative(rewards_B, group_B, scale="none")
    batch_B = group_relative(rewards_B, group_B, scale="batch", sample=sample, eps=0.0)
    torch.testing.assert_close(batch_B, plain_B / rewards_B[~rewards_B.isnan()].std(correction=int(sample)))
    scaled_B = group_relative(rewards_B, group_B, sample=sample, eps=0.0)
    for rows, rewards in by_group(rewards_B, group_B):
        if len(rows) > 1:
            std = torch.tensor(rewards, dtype=torch.float64).std(correction=int(sample))
            torch.testing.assert_close(scaled_B[rows], plain_B[rows] / std)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("sample", [True, False])
def test_of_one_group_the_deviation_of_the_batch_is_that_of_the_group(size: int, sample: bool) -> None:
    rewards_B = torch.arange(float(size), dtype=torch.float64).square().repeat_interleave(2)[: size + 1]
    rewards_B[0] = math.nan
    group_B = torch.full((size + 1,), 8)
    by_group_B, by_batch_B = (
        group_relative(rewards_B, group_B, scale=scale, sample=sample, eps=0.5) for scale in ("group", "batch")
    )
    torch.testing.assert_close(by_group_B, by_batch_B)


def test_idle_options_of_group_relative_are_refused() -> None:
    rewards_B, group_B = groups(0)
    with pytest.raises(UsageError, match="no effect with scale='none'"):
        group_relative(rewards_B, group_B, scale="none", sample=False)
    with pytest.raises(UsageError, match="must be 'group', 'batch' or 'none'"):
        group_relative(rewards_B, group_B, scale="std")  # type: ignore[arg-type]


GROUPED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "group": group_relative,
    "batch": lambda r, g: group_relative(r, g, scale="batch"),
    "none": lambda r, g: group_relative(r, g, scale="none"),
    "no eps": lambda r, g: group_relative(r, g, eps=0.0),
    "leave_one_out": leave_one_out,
    "opo": lambda r, g: opo(r, g, torch.arange(len(r)) % 3 + 1),
    "gdpo": lambda r, g: gdpo(torch.stack([r, 2 * r], 1), g),
}


@pytest.mark.parametrize("credit", GROUPED.values(), ids=GROUPED)
def test_groups_without_contrast_get_nothing(credit: Callable[[Tensor, Tensor], Tensor]) -> None:
    """All equal, one alone, all missing: no advantage, and no NaN."""
    rewards_B = torch.tensor([0.1, 0.1, 0.1, 3.0, math.nan, math.nan, 5.0, math.nan])
    group_B = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])
    assert credit(rewards_B, group_B).tolist() == [0.0] * 8


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("credit", GROUPED.values(), ids=GROUPED)
def test_a_shift_of_a_groups_rewards_changes_nothing(credit: Callable[[Tensor, Tensor], Tensor], seed: int) -> None:
    if credit is GROUPED["batch"]:
        shift_B = torch.full((24,), 3.7, dtype=torch.float64)  # its scale knows the differences of groups
    else:
        shift_B = groups(seed)[1].double() / 10
    rewards_B, group_B = groups(seed, missing=True)
    torch.testing.assert_close(credit(rewards_B + shift_B, group_B), credit(rewards_B, group_B), rtol=1e-6, atol=1e-9)


def test_remax_is_the_reward_minus_the_greedy_one() -> None:
    rewards_B, greedy_B = torch.tensor([1.0, 2.0, math.nan, 4.0]), torch.tensor([0.5, 3.0, 1.0, math.nan])
    assert remax(rewards_B, greedy_B).tolist() == [0.5, -1.0, 0.0, 0.0]
    assert remax(torch.tensor([math.inf]), torch.tensor([1.0])).tolist() == [math.inf]


@pytest.mark.parametrize("seed", SEEDS)
def test_opo_has_the_baseline_of_least_variance_where_the_norms_go_with_the_length(seed: int) -> None:
    """b = Σ n R / Σ n minimises Σ n (R - b)², the mean squared norm of the gradient if |∇ log π|² is n."""
    rewards_B, group_B = groups(seed, missing=True)
    length_B = torch.randint(1, 9, (24,), generator=torch.Generator().manual_seed(seed))
    advantages_B = opo(rewards_B, group_B, length_B)
    assert bool((advantages_B[rewards_B.isnan()] == 0).all())
    for rows, rewards in by_group(rewards_B, group_B):
        n = length_B[rows].double()
        baseline = float((n * torch.tensor(rewards, dtype=torch.float64)).sum() / n.sum()) if rows else 0.0
        torch.testing.assert_close(advantages_B[rows], torch.tensor(rewards, dtype=torch.float64) - baseline)

        def variance(shift: float, rows: list[int] = rows, n: Tensor = n) -> float:
            return float((n * (advantages_B[rows] + shift).square()).sum())

        assert variance(0.0) <= min(variance(1e-3), variance(-1e-3))
    even_B = opo(rewards_B, group_B, torch.full((24,), 5))
    torch.testing.assert_close(even_B, group_relative(rewards_B, group_B, scale="none"))


def test_opo_of_empty_completions_is_finite() -> None:
    assert opo(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), torch.tensor([0, 0])).isfinite().all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("missing", [False, True])
def test_gdpo_of_one_reward_is_group_relative_standardised_over_the_batch(seed: int, missing: bool) -> None:
    rewards_B, group_B = groups(seed, missing=missing)
    inner_B = group_relative(rewards_B, group_B)
    known_B = ~rewards_B.isnan()
    expected_B = (inner_B - inner_B[known_B].mean()) / (inner_B[known_B].std() + 1e-4) * known_B
    torch.testing.assert_close(gdpo(rewards_B[:, None], group_B), expected_B)


@pytest.mark.parametrize("seed", SEEDS)
def test_gdpo_does_not_know_the_scale_of_a_reward(seed: int) -> None:
    rewards_BR = torch.stack([groups(seed, missing=True)[0], groups(seed + 50)[0]], 1)
    group_B = groups(seed)[1]
    scaled_BR = rewards_BR * torch.tensor([1000.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(gdpo(scaled_BR, group_B, eps=0.0), gdpo(rewards_BR, group_B, eps=0.0))
    first_B = gdpo(rewards_BR, group_B, weights=[1.0, 0.0], eps=0.0)
    known_B = ~rewards_BR[:, 0].isnan()
    single_B = gdpo(rewards_BR[:, :1], group_B, eps=0.0)
    assert torch.corrcoef(torch.stack([first_B[known_B], single_B[known_B]]))[0, 1] == pytest.approx(1.0)
    with pytest.raises(UsageError, match="3 weights for 2"):
        gdpo(rewards_BR, group_B, weights=[1.0, 1.0, 1.0])


@pytest.mark.parametrize("seed", SEEDS)
def test_top_against_bottom(seed: int) -> None:
    scores_B, group_B = groups(seed, missing=True)
    scores_B = (scores_B * 2).round()  # with ties
    best_P, worst_P = top_against_bottom(scores_B, group_B)
    expected = []
    for rows, scores in by_group(scores_B, group_B):
        if scores and max(scores) > min(scores):
            expected.append((rows[scores.index(max(scores))], rows[scores.index(min(scores))]))
    assert list(zip(best_P.tolist(), worst_P.tolist(), strict=True)) == expected
    swapped_P = top_against_bottom(-scores_B, group_B)
    assert torch.equal(swapped_P[0], worst_P) and torch.equal(swapped_P[1], best_P)


def test_pairs_of_groups_without_contrast_are_dropped() -> None:
    scores_B = torch.tensor([1.0, 1.0, 2.0, math.nan, math.nan, -math.inf, 0.0])
    best_P, worst_P = top_against_bottom(scores_B, torch.tensor([0, 0, 1, 1, 2, 3, 3]))
    assert (best_P.tolist(), worst_P.tolist()) == ([6], [5])


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


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("span_value", ["mean", "first"])
def test_gae_of_one_token_spans_is_gae_of_tokens(seed: int, span_value: Literal["mean", "first"]) -> None:
    rewards_BT, values_BT, mask_BT = token_grid(seed)
    bootstrap_B = torch.arange(6, dtype=torch.float64)
    options: dict[str, Any] = {"gamma": 0.9, "lam": 0.8, "bootstrap_B": bootstrap_B}
    spans = gae(
        rewards_BT, values_BT, mask_BT, **options,
        span_BT=torch.arange(9).expand(6, 9), span_value=span_value,
    )  # fmt: skip
    for found, expected in zip(spans, gae(rewards_BT, values_BT, mask_BT, **options), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_gae_of_one_span_is_the_return_of_the_row_minus_its_value(seed: int) -> None:
    rewards_BT, values_BT, mask_BT = token_grid(seed)
    whole_BT = torch.full((6, 9), 7)
    bootstrap_B = torch.arange(6, dtype=torch.float64)
    total_B = masked_sum(rewards_BT, mask_BT) + 0.9 * bootstrap_B
    first_B = torch.stack([v[m][:1].sum() for v, m in zip(values_BT, mask_BT, strict=True)])
    for value_B, span_value in ((masked_mean(values_BT, mask_BT), "mean"), (first_B, "first")):
        advantages_BT, returns_BT = gae(
            rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.3, bootstrap_B=bootstrap_B, span_BT=whole_BT,
            span_value=span_value,  # type: ignore[arg-type]
        )  # fmt: skip
        torch.testing.assert_close(advantages_BT, torch.where(mask_BT, (total_B - value_B)[:, None], 0.0))
        torch.testing.assert_close(returns_BT, torch.where(mask_BT, total_B[:, None], 0.0))


def naive_spans(ids: list[int]) -> list[list[int]]:
    """Places of neighbours with equal ids."""
    found: list[list[int]] = []
    for i, number in enumerate(ids):
        if i and number == ids[i - 1]:
            found[-1].append(i)
        else:
            found.append([i])
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("span_value", ["mean", "first"])
def test_gae_over_spans_equals_the_sum_over_macro_actions(seed: int, span_value: Literal["mean", "first"]) -> None:
    """Ids are any integers and may come again later; holes in the mask do not part a span."""
    rewards_BT, values_BT, mask_BT = token_grid(seed)
    span_BT = torch.randint(-2, 3, (6, 9), generator=torch.Generator().manual_seed(seed + 1)).sort(-1)[0].flip(-1) * 99
    span_BT[:, -1] = span_BT[:, 0]  # an id that comes again
    advantages_BT, returns_BT = gae(
        rewards_BT, values_BT, mask_BT, gamma=0.9, lam=0.8, span_BT=span_BT, span_value=span_value
    )
    for b, mask_T in enumerate(mask_BT):
        rewards, values = rewards_BT[b, mask_T].tolist(), values_BT[b, mask_T].tolist()
        spans = naive_spans(span_BT[b, mask_T].tolist())
        span_rewards = [sum(rewards[i] for i in span) for span in spans]
        span_values = [
            sum(values[i] for i in span) / len(span) if span_value == "mean" else values[span[0]] for span in spans
        ]
        per_span = naive_gae(span_rewards, span_values, 0.9, 0.8, 0.0) if spans else []
        expected = [a for a, span in zip(per_span, spans, strict=True) for _ in span]
        torch.testing.assert_close(advantages_BT[b, mask_T], torch.tensor(expected, dtype=torch.float64))
        returned = [a + v for a, v, span in zip(per_span, span_values, spans, strict=True) for _ in span]
        torch.testing.assert_close(returns_BT[b, mask_T], torch.tensor(returned, dtype=torch.float64))
    assert bool((advantages_BT[~mask_BT] == 0).all()) and bool((returns_BT[~mask_BT] == 0).all())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("span_value", ["mean", "first"])
def test_a_hole_parts_no_span_whatever_number_it_has(seed: int, span_value: Literal["mean", "first"]) -> None:
    rewards_BT, values_BT, mask_BT = token_grid(seed)
    span_BT = (torch.arange(9) // 4).expand(6, 9)
    other_BT = torch.where(mask_BT, span_BT, torch.arange(9) + 100)
    numbers = (span_BT, other_BT)
    given, renamed = (gae(rewards_BT, values_BT, mask_BT, span_BT=n, span_value=span_value) for n in numbers)
    for found, expected in zip(renamed, given, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_one_token_and_one_completion() -> None:
    """The smallest batch: of one token the return is its reward, and one completion alone has nothing to compare."""
    reward_BT, value_BT = torch.tensor([[3.0]]), torch.tensor([[0.5]])
    mask_BT, group_B = torch.tensor([[True]]), torch.tensor([4])
    for span_BT in (None, torch.tensor([[9]])):
        advantage_BT, return_BT = gae(reward_BT, value_BT, mask_BT, span_BT=span_BT)
        assert (advantage_BT.tolist(), return_BT.tolist()) == ([[2.5]], [[3.0]])
    assert all(credit(reward_BT[0], group_B).tolist() == [0.0] for credit in GROUPED.values())
    assert reinforce_pp(reward_BT[0], value_BT, value_BT, mask_BT).tolist() == [[0.0]]
    assert best_of_k(reward_BT[0], group_B).tolist() == [0]


@pytest.mark.parametrize("seed", SEEDS)
def test_moving_a_reward_within_its_span_changes_nothing(seed: int) -> None:
    rewards_BT, values_BT, _ = token_grid(seed)
    mask_BT = torch.ones(6, 9, dtype=torch.bool)
    span_BT = (mask_BT.cumsum(-1) - 1) // 3
    moved_BT = rewards_BT.view(6, 3, 3).roll(1, -1).reshape(6, 9)
    renamed_BT = torch.tensor([10, -5, 3])[span_BT]
    one, two, three = (
        gae(r, values_BT, mask_BT, span_BT=s)
        for r, s in ((rewards_BT, span_BT), (moved_BT, span_BT), (rewards_BT, renamed_BT))
    )
    for a, b, c in zip(one, two, three, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(a, c)
    with pytest.raises(UsageError, match="no effect without span_BT"):
        gae(rewards_BT, values_BT, mask_BT, span_value="first")


@pytest.mark.parametrize("seed", SEEDS)
def test_reinforce_pp(seed: int) -> None:
    """Standardised discounted returns; rows without a score are outside, and so are the numbers in them."""
    logps_BT, ref_BT, mask_BT = token_grid(seed)
    scores_B = torch.arange(6, dtype=torch.float64).masked_fill(torch.arange(6) == 4, math.nan)
    advantages_BT = reinforce_pp(scores_B, logps_BT, ref_BT, mask_BT, gamma=0.9, kl=0.2)
    counted_BT = mask_BT & ~scores_B.isnan()[:, None]
    assert bool((advantages_BT[~counted_BT] == 0).all())
    assert float(advantages_BT[counted_BT].mean()) == pytest.approx(0, abs=1e-12)
    assert float(advantages_BT[counted_BT].std()) == pytest.approx(1, abs=1e-6)
    kept_B = ~scores_B.isnan()
    alone = reinforce_pp(scores_B[kept_B], logps_BT[kept_B], ref_BT[kept_B], mask_BT[kept_B], gamma=0.9, kl=0.2)
    torch.testing.assert_close(advantages_BT[kept_B], alone)
    rewards_BT = shaped_rewards(scores_B[kept_B], logps_BT[kept_B], ref_BT[kept_B], mask_BT[kept_B], kl=0.2)
    for b, mask_T in enumerate(mask_BT[kept_B]):
        rewards = rewards_BT[b, mask_T].tolist()
        returns = [sum(0.9 ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]
        found = returns_to_go(rewards_BT, mask_BT[kept_B], gamma=0.9)[b, mask_T]
        torch.testing.assert_close(found, torch.tensor(returns, dtype=torch.float64))


def test_baseline_of_reinforce_pp_forgives_hard_prompts() -> None:
    """A constant added to all scores of a prompt changes only the form without baseline."""
    logps_BT, ref_BT, mask_BT = token_grid(0)
    mask_BT[2] = True
    scores_B, group_B = torch.arange(6, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, 0])
    harder_B = scores_B - 10 * group_B
    rest = (logps_BT, ref_BT, mask_BT)
    torch.testing.assert_close(
        reinforce_pp_baseline(scores_B, group_B, *rest), reinforce_pp_baseline(harder_B, group_B, *rest)
    )
    assert not torch.allclose(reinforce_pp(scores_B, *rest), reinforce_pp(harder_B, *rest))
    missing_B = scores_B.masked_fill(torch.arange(6) == 1, math.nan)
    found_BT = reinforce_pp_baseline(missing_B, group_B, *rest)
    assert bool(found_BT.isfinite().all()) and bool((found_BT[1] == 0).all())


@pytest.mark.parametrize("poison", [1e9, math.inf, math.nan])
@pytest.mark.parametrize("seed", SEEDS)
def test_token_estimators_do_not_see_masked_cells(seed: int, poison: float) -> None:
    rewards_BT, values_BT, mask_BT = token_grid(seed)
    bad_rewards_BT, bad_values_BT = (torch.where(mask_BT, x, poison) for x in (rewards_BT, values_BT))
    scores_B = torch.arange(6, dtype=torch.float64)
    pairs = [
        (gae(rewards_BT, values_BT, mask_BT), gae(bad_rewards_BT, bad_values_BT, mask_BT)),
        (
            gae(rewards_BT, values_BT, mask_BT, span_BT=(torch.arange(9) // 3).expand(6, 9)),
            gae(bad_rewards_BT, bad_values_BT, mask_BT, span_BT=(torch.arange(9) // 3).expand(6, 9)),
        ),
        (whiten(values_BT, mask_BT), whiten(bad_values_BT, mask_BT)),
        (
            shaped_rewards(scores_B, rewards_BT, values_BT, mask_BT, estimator="k3"),
            shaped_rewards(scores_B, bad_rewards_BT, bad_values_BT, mask_BT, estimator="k3"),
        ),
    ]
    for clean, poisoned in pairs:
        torch.testing.assert_close(clean, poisoned, rtol=0, atol=0)
    assert all(bool((x[~mask_BT] == 0).all()) for x in (*pairs[0][0], *pairs[1][0], pairs[2][0], pairs[3][0]))


@pytest.mark.parametrize("seed", SEEDS)
def test_whiten(seed: int) -> None:
    _, values_BT, mask_BT = token_grid(seed)
    white_BT, kept_BT = whiten(values_BT, mask_BT), whiten(values_BT, mask_BT, shift_mean=False)
    assert float(white_BT[mask_BT].mean()) == pytest.approx(0, abs=1e-12)
    assert float(white_BT[mask_BT].std()) == pytest.approx(1, abs=1e-6)
    assert float(whiten(values_BT, mask_BT, unbiased=False)[mask_BT].std(correction=0)) == pytest.approx(1, abs=1e-6)
    assert float(kept_BT[mask_BT].mean()) == pytest.approx(float(values_BT[mask_BT].mean()))
    assert bool((kept_BT[~mask_BT] == 0).all())
    assert bool((whiten(values_BT, torch.zeros_like(mask_BT)) == 0).all())
    two_BT = (mask_BT.flatten().cumsum(0) <= 2).view_as(mask_BT) & mask_BT
    assert float(whiten(values_BT, two_BT, eps=0.0)[two_BT].std()) == pytest.approx(1)


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
        *(credit(x_B, group_B) for credit in GROUPED.values()),
        remax(x_B, x_BT[:, 1]),
        *gae(x_BT, x_BT, mask_BT),
        *gae(x_BT, x_BT, mask_BT, span_BT=mask_BT.long()),
        whiten(x_BT, mask_BT),
        shaped_rewards(x_B, x_BT, x_BT, mask_BT),
        reinforce_pp(x_B, x_BT, x_BT, mask_BT),
        reinforce_pp_baseline(x_B, group_B, x_BT, x_BT, mask_BT),
        returns_to_go(x_BT, mask_BT),
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
