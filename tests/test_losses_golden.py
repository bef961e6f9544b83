"""Every golden case (tests/golden) of the losses, advantages and controllers that exist: value, gradient, float32.

``COVERED`` and ``LATER`` sort each case: run by a test here, or left to a later loss. The totals are asserted, so a
case that nobody runs cannot hide. ``end_to_end.json`` (39 cases) needs models and is another test's.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefzoo.losses.advantages import gae, group_relative, leave_one_out, shaped_rewards, whiten
from prefzoo.losses.base import create_loss
from prefzoo.losses.kl import KL_ESTIMATORS, kl_estimator
from prefzoo.losses.unpaired import kto_baseline
from prefzoo.parts.controllers import AdaptiveKL
from prefzoo.parts.count import Count
from prefzoo.records import LossOut, Pairs, PolicyGradient, Scores, Unpaired, Values

GOLDEN = Path(__file__).parent / "golden"
FILES = ("pairwise_dpo", "pairwise_reffree", "unpaired", "reward_model", "policy_gradient", "grpo")
Case = dict[str, Any]


@functools.cache
def document(file: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{file}.json").read_text())


# -- which case is tested by what -------------------------------------------------------------------------------------


def covered_by(case: Case) -> str | None:
    """The name of the test below that runs the case; None where the loss or option does not exist yet."""
    kind, hyper = case["kind"], case["hyper"]
    loss, options = hyper.get("loss_type"), {k for k in hyper if k != "loss_type"}
    if kind == "pairwise_ref" and loss in ("sigmoid", "ipo", "ipo_sum") and options == {"beta"}:
        return "pairwise"
    if kind == "unpaired" and loss == "kto":
        return "kto"
    if kind == "grpo_loss" and loss in AGGREGATIONS and options <= GRPO_OPTIONS:
        return "grpo"
    if kind == "kl_estimator":
        return kind if hyper["estimator"] in KL_ESTIMATORS else None
    if kind == "group_advantage":
        grpo = hyper["scale"] in ("group", "none") and hyper["ddof"] == 1 and "aggregation" not in hyper
        return kind if grpo else None
    if kind in ("reward_pairs", "ppo_policy", "value_loss", "gae", "shaped_reward", "rloo_advantage", "kl_controller"):
        return kind
    return None


# How the golden names of the aggregations map on counts; "token" counts the tokens of the whole batch.
AGGREGATIONS: dict[str, Callable[[Case], Count]] = {
    "token_mean": lambda hyper: Count("token"),
    "seq_mean_token_mean": lambda hyper: Count("row"),
    "seq_mean_token_sum": lambda hyper: Count("row_sum"),
    "seq_mean_token_sum_norm": lambda hyper: Count("constant", constant=hyper["max_completion_length"]),
    "grpo": lambda hyper: Count("row"),
    "bnpo": lambda hyper: Count("token"),
    "dapo": lambda hyper: Count("token"),
    "dr_grpo": lambda hyper: Count("constant", constant=hyper["max_completion_length"]),
}
GRPO_OPTIONS = {"epsilon", "epsilon_high", "delta", "beta", "use_bias_correction_kl", "max_completion_length", "old"}

COVERED = {
    "pairwise": 29,
    "kto": 26,
    "reward_pairs": 28,
    "ppo_policy": 21,
    "value_loss": 15,
    "gae": 20,
    "kl_estimator": 12,
    "shaped_reward": 16,
    "group_advantage": 16,
    "rloo_advantage": 12,
    "kl_controller": 2,
    "grpo": 50,
}
LATER = {  # golden cases whose loss or option is still to be written
    "pairwise_ref": 261,  # the other pairwise losses, f-divergences, LD-DPO, WPO, mixtures
    "pairwise_logits": 8,  # TDPO
    "pairwise_reffree": 89,  # CPO, SimPO, AlphaPO, ORPO, SLiC
    "unpaired": 42,  # APO-zero unpaired, BCO
    "ranked": 14,  # K-wise, Plackett-Luce
    "kl_estimator": 8,  # abs, and k3 with the gradient of k2
    "group_advantage": 13,  # batch scale, population std, GDPO
    "reinforce_pp": 4,  # REINFORCE++
    "distribution": 30,  # entropy, KL and log-probabilities from logits: the model layer
    "importance_ratio": 8,  # sampler corrections
    "grpo_loss": 73,  # cispo, sapo, luspo, vespo, gspo, gmpo, rloo, sampler correction, off-policy and entropy masks
}


def cases(test: str) -> list[Any]:
    found = [(file, case) for file in FILES for case in document(file)["cases"] if covered_by(case) == test]
    return [pytest.param(document(file)["input_sets"][case["inputs"]], case, id=case["name"]) for file, case in found]


def test_no_golden_case_is_forgotten() -> None:
    everything = [case for file in FILES for case in document(file)["cases"]]
    covered = Counter(name for case in everything if (name := covered_by(case)))
    later = Counter(case["kind"] for case in everything if not covered_by(case))
    assert dict(covered) == COVERED
    assert dict(later) == LATER
    assert sum(COVERED.values()) + sum(LATER.values()) == len(everything)


# -- ragged lists to padded tensors and back --------------------------------------------------------------------------

DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]
POISON = 1e9  # stands in every padded cell: it must not be seen


def padded(rows: list[list[float]], dtype: torch.dtype, *, grad: bool = False) -> Tensor:
    """(B, T) with poison in the padding; one more column than the longest row needs."""
    width = max(map(len, rows)) + 1
    return torch.tensor([row + [POISON] * (width - len(row)) for row in rows], dtype=dtype, requires_grad=grad)


def mask_of(rows: list[list[float]]) -> Tensor:
    width = max(map(len, rows)) + 1
    return torch.tensor([[t < len(row) for t in range(width)] for row in rows])


def flat(rows: list[list[float]]) -> list[float]:
    return [x for row in rows for x in row]


def assert_close(actual: Tensor, expected: list[float], case: Case) -> None:
    dtype = actual.dtype
    hard = any(word in case["inputs"] for word in ("extreme", "near_certain", "overflow"))
    rtol, atol = (1e-9, 1e-12) if dtype == torch.float64 else (1e-3, 1e-5) if hard else (2e-5, 1e-5)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=dtype), rtol=rtol, atol=atol)


def assert_padding_untouched(leaf: Tensor, mask_BT: Tensor) -> None:
    assert leaf.grad is not None
    assert bool((leaf.grad[~mask_BT] == 0).all()), "gradient in the padding"


def check_tokens(loss_BT: Tensor, count: Count, leaf_BT: Tensor, mask_BT: Tensor, field: str, case: Case) -> None:
    """Compare token losses, their aggregation by the count, and the gradient of that."""
    expected = case["expected"]
    assert_close(loss_BT[mask_BT], flat(expected["per_token_loss"]), case)
    reduced = count.mean(loss_BT, mask_BT)
    assert_close(reduced, expected["reduced"], case)
    reduced.backward()
    assert leaf_BT.grad is not None
    assert_close(leaf_BT.grad[mask_BT], flat(expected["grad"][field]), case)
    assert_padding_untouched(leaf_BT, mask_BT)


# -- pairs, singles, scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases("pairwise"))
def test_pairwise(x: Case, case: Case, dtype: torch.dtype) -> None:
    fields = {s: padded(x[f"policy_{s}_logps"], dtype, grad=True) for s in ("chosen", "rejected")}
    masks = {s: mask_of(x[f"policy_{s}_logps"]) for s in fields}
    batch = Pairs(
        chosen_logps_BT=fields["chosen"],
        rejected_logps_BT=fields["rejected"],
        chosen_mask_BT=masks["chosen"],
        rejected_mask_BT=masks["rejected"],
        ref_chosen_logps_BT=padded(x["ref_chosen_logps"], dtype),
        ref_rejected_logps_BT=padded(x["ref_rejected_logps"], dtype),
    )
    name = {"sigmoid": "dpo"}.get(case["hyper"]["loss_type"], case["hyper"]["loss_type"])
    loss_B = create_loss(name, beta=case["hyper"]["beta"])(batch).loss
    assert_close(loss_B, case["expected"]["per_example"], case)
    reduced = Count("row").mean(loss_B)
    assert_close(reduced, case["expected"]["reduced"], case)
    reduced.backward()
    for side, leaf in fields.items():
        assert leaf.grad is not None
        assert_close(leaf.grad[masks[side]], flat(case["expected"]["grad"][f"policy_{side}_logps"]), case)
        assert_padding_untouched(leaf, masks[side])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases("kto"))
def test_kto(x: Case, case: Case, dtype: torch.dtype) -> None:
    logps_BT, mask_BT = padded(x["policy_logps"], dtype, grad=True), mask_of(x["policy_logps"])
    desirable_B = torch.tensor(x["labels"])
    partners = Unpaired(
        logps_BT=padded(x["policy_kl_logps"], dtype),
        ref_logps_BT=padded(x["ref_kl_logps"], dtype),
        mask_BT=mask_of(x["policy_kl_logps"]),
        desirable_B=desirable_B,
    )
    batch = Unpaired(
        logps_BT=logps_BT,
        ref_logps_BT=padded(x["ref_logps"], dtype),
        mask_BT=mask_BT,
        desirable_B=desirable_B,
        baseline=kto_baseline(partners.ratio_B),
    )
    options = {k: v for k, v in case["hyper"].items() if k != "loss_type"}
    loss_B = create_loss("kto", **options)(batch).loss
    assert_close(loss_B, case["expected"]["per_example"], case)
    reduced = Count("row").mean(loss_B)
    assert_close(reduced, case["expected"]["reduced"], case)
    reduced.backward()
    assert logps_BT.grad is not None
    assert_close(logps_BT.grad[mask_BT], flat(case["expected"]["grad"]["policy_logps"]), case)
    assert_padding_untouched(logps_BT, mask_BT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases("reward_pairs"))
def test_reward_pairs(x: Case, case: Case, dtype: torch.dtype) -> None:
    hyper = case["hyper"]
    chosen_B = torch.tensor(x["chosen_rewards"], dtype=dtype, requires_grad=True)
    rejected_B = torch.tensor(x["rejected_rewards"], dtype=dtype, requires_grad=True)
    soft = hyper["loss_type"] == "bradley_terry_soft"
    batch = Scores(
        chosen_B=chosen_B,
        rejected_B=rejected_B,
        margin_B=torch.tensor(x["margin"], dtype=dtype) if hyper.get("use_margin") else None,
        probability_B=torch.tensor(x["chosen_probability"], dtype=dtype) if soft else None,
    )
    options = {
        "label_smoothing": hyper.get("label_smoothing", 0.0),
        "centering": hyper.get("center_rewards_coefficient", 0.0),
    }
    loss_B = create_loss("bradley_terry", **options)(batch).loss
    assert_close(loss_B, case["expected"]["per_example"], case)
    Count("row").mean(loss_B).backward()
    for leaf, field in ((chosen_B, "chosen_rewards"), (rejected_B, "rejected_rewards")):
        assert leaf.grad is not None
        assert_close(leaf.grad, case["expected"]["grad"][field], case)


# -- policy gradient --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases("ppo_policy"))
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
@pytest.mark.parametrize(("x", "case"), cases("grpo"))
def test_grpo(x: Case, case: Case, dtype: torch.dtype) -> None:
    """The group losses as compositions: clipped surrogate + β KL penalty, averaged by a count."""
    hyper = case["hyper"]
    logps_BT, mask_BT = padded(x["policy_logps"], dtype, grad=True), mask_of(x["policy_logps"])
    batch = PolicyGradient(
        logps_BT=logps_BT,
        mask_BT=mask_BT,
        old_logps_BT=logps_BT.detach() if hyper.get("old") == "policy" else padded(x["old_logps"], dtype),
        ref_logps_BT=padded(x["ref_logps"], dtype),
        advantages_BT=torch.tensor(x["advantages"], dtype=dtype)[:, None].expand_as(logps_BT),
    )
    # TRL's two-sided clip `delta` bounds the ratio itself; for delta > 1 + clip_high that is the dual clip.
    clips = {"clip": hyper["epsilon"], "clip_high": hyper.get("epsilon_high"), "dual_clip": hyper.get("delta")}
    out = create_loss("clipped_surrogate", **clips)(batch)
    if hyper.get("beta"):
        penalty = create_loss("kl_penalty", estimator="k3", importance=hyper["use_bias_correction_kl"])(batch)
        out = LossOut(out.loss + hyper["beta"] * penalty.loss)
    check_tokens(out.loss, AGGREGATIONS[hyper["loss_type"]](hyper), logps_BT, mask_BT, "policy_logps", case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases("kl_estimator"))
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


# -- values, advantages, rewards, controllers -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases("value_loss"))
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
@pytest.mark.parametrize(("x", "case"), cases("gae"))
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
@pytest.mark.parametrize(("x", "case"), cases("shaped_reward"))
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
@pytest.mark.parametrize(("x", "case"), cases("group_advantage"))
def test_group_advantage(x: Case, case: Case, dtype: torch.dtype) -> None:
    hyper = case["hyper"]
    rewards_B = weighted_rewards(x, hyper["reward_weights"], dtype)
    group_B = torch.arange(len(rewards_B)) // hyper["num_generations"]
    credit = functools.partial(group_relative, std=hyper["scale"] == "group", eps=hyper["std_eps"])
    assert_close(shuffled(credit, rewards_B, group_B), case["expected"]["advantages"], case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases("rloo_advantage"))
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


@pytest.mark.parametrize(("x", "case"), cases("kl_controller"))
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
