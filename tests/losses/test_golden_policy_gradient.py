"""Golden cases of surrogates, values, advantages, KL estimators and controllers: value, gradient, float32."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from goldens import (
    AGGREGATIONS,
    DTYPES,
    Case,
    assert_all_run,
    assert_close,
    cases,
    check_tokens,
    flat,
    mask_of,
    padded,
)  # fmt: skip
from torch import Tensor

from prefzoo.losses.advantages import gae, group_relative, leave_one_out, shaped_rewards, whiten
from prefzoo.losses.base import create_loss
from prefzoo.losses.kl import KL_ESTIMATORS, kl_estimator
from prefzoo.parts.controllers import AdaptiveKL
from prefzoo.parts.count import Count
from prefzoo.records import PolicyGradient, Values

FILE = "policy_gradient"


KINDS = ("ppo_policy", "value_loss", "gae", "shaped_reward", "rloo_advantage", "kl_controller")


def covered_by(case: Case) -> str | None:
    kind, hyper = case["kind"], case["hyper"]
    if kind == "kl_estimator":
        return kind if hyper["estimator"] in KL_ESTIMATORS else None
    if kind == "group_advantage":
        grpo = hyper["scale"] in ("group", "none") and hyper["ddof"] == 1 and "aggregation" not in hyper
        return kind if grpo else None
    if kind == "importance_ratio":
        return kind  # run in test_golden_grpo.py
    return kind if kind in KINDS else None


def test_no_golden_case_is_forgotten() -> None:
    assert_all_run(
        FILE,
        covered_by,
        {
            "ppo_policy": 21,
            "value_loss": 15,
            "gae": 20,
            "kl_estimator": 12,
            "shaped_reward": 16,
            "group_advantage": 16,
            "rloo_advantage": 12,
            "kl_controller": 2,
            "importance_ratio": 8,
        },
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "ppo_policy"))
def test_ppo_policy(x: Case, case: Case, dtype: torch.dtype) -> None:
    hyper = case["hyper"]
    logps_BT, mask_BT = padded(x["policy_logps"], dtype, grad=True), mask_of(x["policy_logps"])
    batch = PolicyGradient(
        logps_BT=logps_BT,
        mask_BT=mask_BT,
        old_logps_BT=padded(x["old_logps"], dtype),
        advantages_BT=padded(x["token_advantages"], dtype),
    )
    options = {"clip": hyper["clip_low"], "clip_high": hyper["clip_high"], "dual_clip": hyper["dual_clip"]}
    out = create_loss("clipped_surrogate", **options)(batch)
    check_tokens(out.loss, AGGREGATIONS[hyper["aggregation"]](hyper), logps_BT, mask_BT, "policy_logps", case)
    if "clip_fraction_token_mean" in case["expected"].get("intermediate", {}):
        clip_ratio = Count("token").mean(out.metrics["clip_ratio"], mask_BT)
        assert_close(clip_ratio, case["expected"]["intermediate"]["clip_fraction_token_mean"], case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "kl_estimator"))
def test_kl_estimator(x: Case, case: Case, dtype: torch.dtype) -> None:
    logps_BT, mask_BT = padded(x["policy_logps"], dtype, grad=True), mask_of(x["policy_logps"])
    ref_BT = padded(x["ref_logps"], dtype)
    name, expected = case["hyper"]["estimator"], case["expected"]
    assert_close(kl_estimator(name)(logps_BT, ref_BT)[mask_BT], flat(expected["per_token"]), case)
    batch = PolicyGradient(
        logps_BT=logps_BT,
        mask_BT=mask_BT,
        old_logps_BT=ref_BT,
        ref_logps_BT=ref_BT,
        advantages_BT=ref_BT,
    )
    loss_BT = create_loss("kl_penalty", estimator=name)(batch).loss
    case = {**case, "expected": {**expected, "per_token_loss": expected["per_token"]}}
    check_tokens(loss_BT, Count("token"), logps_BT, mask_BT, "policy_logps", case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "value_loss"))
def test_value_loss(x: Case, case: Case, dtype: torch.dtype) -> None:
    hyper = case["hyper"]
    values_BT, mask_BT = padded(x["values"], dtype, grad=True), mask_of(x["values"])
    batch = Values(
        values_BT=values_BT,
        mask_BT=mask_BT,
        old_values_BT=padded(x["old_values"], dtype),
        returns_BT=padded(x["returns"], dtype),
    )
    loss_BT = create_loss("clipped_value", clip=hyper["clip"])(batch).loss
    loss_BT = loss_BT * (1 if hyper["half"] else 2)  # our ½ is inside; "full" is the convention without it
    check_tokens(loss_BT, AGGREGATIONS[hyper["aggregation"]](hyper), values_BT, mask_BT, "values", case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "gae"))
def test_gae(x: Case, case: Case, dtype: torch.dtype) -> None:
    hyper, expected, mask_BT = case["hyper"], case["expected"], mask_of(x["values"])
    bootstrap_B = torch.tensor(x["bootstrap_values"], dtype=dtype) if hyper["bootstrap"] else None
    advantages_BT, returns_BT = gae(
        padded(x["token_rewards"], dtype),
        padded(x["values"], dtype),
        mask_BT,
        gamma=hyper["gamma"],
        lam=hyper["lam"],
        bootstrap_B=bootstrap_B,
    )
    assert_close(advantages_BT[mask_BT], flat(expected["advantages"]), case)
    assert_close(returns_BT[mask_BT], flat(expected["returns"]), case)
    for unbiased in (True, False):
        white_BT = whiten(advantages_BT, mask_BT, unbiased=unbiased)
        key = f"advantages_whitened_{'unbiased' if unbiased else 'biased'}"
        assert_close(white_BT[mask_BT], flat(expected[key]), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "shaped_reward"))
def test_shaped_reward(x: Case, case: Case, dtype: torch.dtype) -> None:
    hyper, mask_BT = case["hyper"], mask_of(x["old_logps"])
    scores_B = torch.tensor(x["scores"], dtype=dtype)
    if hyper["reward_clip"] is not None:
        scores_B = scores_B.clamp(-hyper["reward_clip"], hyper["reward_clip"])
    rewards_BT = shaped_rewards(
        scores_B,
        padded(x["old_logps"], dtype),
        padded(x["ref_logps"], dtype),
        mask_BT,
        kl=hyper["kl_coef"],
        estimator=hyper["kl_estimator"],
    )
    assert_close(rewards_BT[mask_BT], flat(case["expected"]["token_rewards"]), case)
    assert bool((rewards_BT[~mask_BT] == 0).all())


def weighted_rewards(x: Case, weights: list[float] | None, dtype: torch.dtype) -> Tensor:
    """Sum of the reward functions that apply to a row; NaN for a row to which none does."""
    columns = torch.tensor([[float("nan") if r is None else r for r in row] for row in x["rewards"]], dtype=dtype)
    weight = torch.ones(columns.shape[1], dtype=dtype) if weights is None else torch.tensor(weights, dtype=dtype)
    return torch.where(columns.isnan().all(1), torch.nan, (columns * weight).nansum(1))


def shuffled(function: Callable[[Tensor, Tensor], Tensor], rewards_B: Tensor, group_B: Tensor) -> Tensor:
    """Apply to shuffled rows and arbitrary group numbers, and put the result back in order."""
    order_B = torch.randperm(len(rewards_B), generator=torch.Generator().manual_seed(0))
    result_B = torch.empty_like(rewards_B)
    result_B[order_B] = function(rewards_B[order_B], (group_B * 7919 - 3)[order_B])
    return result_B


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "group_advantage"))
def test_group_advantage(x: Case, case: Case, dtype: torch.dtype) -> None:
    hyper = case["hyper"]
    rewards_B = weighted_rewards(x, hyper["reward_weights"], dtype)
    group_B = torch.arange(len(rewards_B)) // hyper["num_generations"]
    credit = functools.partial(group_relative, std=hyper["scale"] == "group", eps=hyper["std_eps"])
    assert_close(shuffled(credit, rewards_B, group_B), case["expected"]["advantages"], case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "rloo_advantage"))
def test_rloo_advantage(x: Case, case: Case, dtype: torch.dtype) -> None:
    """Clipped reward, minus β times the k1 of the whole sequence, leave-one-out, and standardised over the batch."""
    hyper = case["hyper"]
    rewards_B = weighted_rewards(x, None, dtype)
    if "reward_clip_range" in hyper:
        rewards_B = rewards_B.clamp(*hyper["reward_clip_range"])
    if "beta" in hyper:
        ratios = zip(x["old_logps"], x["ref_logps"], strict=True)
        rewards_B = rewards_B - hyper["beta"] * torch.tensor([sum(o) - sum(r) for o, r in ratios], dtype=dtype)
    group_B = torch.arange(len(rewards_B)) // hyper["num_generations"]
    advantages_B = shuffled(leave_one_out, rewards_B, group_B)
    if hyper.get("normalize_advantages"):
        known_B = ~rewards_B.isnan()
        mean, std = advantages_B[known_B].mean(), advantages_B[known_B].std()
        advantages_B = torch.where(known_B, (advantages_B - mean) / (std + 1e-4), 0.0)
    assert_close(advantages_B, case["expected"]["advantages"], case)


@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "kl_controller"))
def test_kl_controller(x: Case, case: Case) -> None:
    hyper = case["hyper"]
    controller = AdaptiveKL(hyper["init_kl_coef"], target=hyper["target"], horizon=hyper["horizon"])
    trace = []
    for kl, n in zip(x["kl"], x["n_steps"], strict=True):
        resumed = AdaptiveKL(init=0.0, target=hyper["target"], horizon=hyper["horizon"])
        resumed.load_state_dict(controller.state_dict())
        resumed.update(kl, n)
        controller = resumed
        trace.append(controller.value)
    assert trace == pytest.approx(case["expected"]["kl_coef_after_each_update"], rel=1e-12)
