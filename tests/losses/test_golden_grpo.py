"""Golden cases of the group losses (GRPO and its relatives): value, gradient, float32.

Every case is a composition of entries: a policy term, which modifiers may weight or mask, and beside it, untouched by
them, a KL or an entropy term, each averaged by a count.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from goldens import (
    AGGREGATIONS,
    DTYPES,
    Case,
    assert_all_run,
    assert_close,
    assert_padding_untouched,
    cases,
    check_tokens,
    flat,
    mask_of,
    padded,
)  # fmt: skip
from torch import Tensor

from prefzoo.losses.base import Loss, create_loss
from prefzoo.losses.policy_modifiers import entropy_floor, importance_weights
from prefzoo.parts.count import Count
from prefzoo.records import LossOut, PolicyGradient, masked_mean

FILE = "grpo"

COUNTS = {**AGGREGATIONS}
COUNTS |= {"cispo": AGGREGATIONS["dapo"], "vespo": AGGREGATIONS["dapo"], "sapo": AGGREGATIONS["grpo"]}
COUNTS |= {"luspo": AGGREGATIONS["seq_mean_token_sum"]}

# What the golden hyper-parameters are called here. TRL's `delta` caps the ratio of the unclipped branch, which binds
# for A < 0 only: with delta > 1 + clip_high it is the dual clip.
SPELLING = {
    "epsilon": "clip",
    "epsilon_high": "clip_high",
    "delta": "dual_clip",
    "sapo_temperature_pos": "temperature_pos",
    "sapo_temperature_neg": "temperature_neg",
    "vespo_k_pos": "k_pos",
    "vespo_lambda_pos": "lambda_pos",
    "vespo_k_neg": "k_neg",
    "vespo_lambda_neg": "lambda_neg",
    "is_mode": "correction",
    "is_clip_max": "correction_max",
    "is_clip_min": "correction_min",
    "off_policy_mask_threshold": "off_policy_threshold",
}
# What the composition takes care of.
AROUND = {
    "loss_type", "importance_sampling_level", "max_completion_length", "old", "beta", "use_bias_correction_kl",
    "cispo_clip", "off_policy_reference", "top_entropy_quantile", "entropy_coef",
}  # fmt: skip


def covered_by(case: Case) -> str | None:
    hyper = case["hyper"]
    if not hyper.keys() <= SPELLING.keys() | AROUND:
        return None
    if hyper["loss_type"] in ("gmpo", "rloo"):
        return "rows"
    return "tokens" if hyper["loss_type"] in COUNTS else None


def test_no_golden_case_is_forgotten() -> None:
    assert_all_run(FILE, covered_by, {"tokens": 111, "rows": 12})


def policy_loss(hyper: dict[str, Any]) -> Loss:
    """The entry and the options that a case is about."""
    options = {SPELLING[key]: value for key, value in hyper.items() if key in SPELLING}
    name = hyper["loss_type"]
    if name == "cispo" and hyper.get("cispo_clip") != "paper":  # TRL's epsilon_high is the cap, and epsilon unused
        options = {"clip_high": hyper["epsilon_high"] - 1}
    elif name in ("gmpo", "rloo"):
        name = {"gmpo": "gmpo", "rloo": "sequence_surrogate"}[name]
    elif name not in ("cispo", "sapo", "vespo", "luspo"):  # the others differ from GRPO in their count only
        name = "gspo" if hyper.get("importance_sampling_level") == "sequence" else "clipped_surrogate"
    if name == "gspo":
        options.setdefault("clip_high", None)
    if "top_entropy_quantile" in hyper:
        options["high_entropy"] = True
    return create_loss(name, **options)


def record(x: Case, hyper: dict[str, Any], dtype: torch.dtype) -> PolicyGradient:
    logps_BT, mask_BT = padded(x["policy_logps"], dtype, grad=True), mask_of(x["policy_logps"])
    entropy_BT = padded(x["entropies"], dtype, grad=True)
    quantile = hyper.get("top_entropy_quantile")
    return PolicyGradient(
        logps_BT=logps_BT,
        mask_BT=mask_BT,
        old_logps_BT=logps_BT.detach() if hyper.get("old") == "policy" else padded(x["old_logps"], dtype),
        ref_logps_BT=padded(x["ref_logps"], dtype),
        sampling_logps_BT=padded(x["sampling_logps"], dtype),
        entropy_BT=entropy_BT,
        entropy_floor=None if quantile is None else entropy_floor(entropy_BT, mask_BT, quantile),
        advantages_BT=torch.tensor(x["advantages"], dtype=dtype)[:, None].expand_as(logps_BT),
    )


def penalty(batch: PolicyGradient, hyper: dict[str, Any]) -> Tensor:
    """β times the KL term, at every token: neither masked nor corrected for the sampler. GMPO's has no ratio."""
    level = hyper.get("importance_sampling_level", "token") if hyper.get("use_bias_correction_kl") else "token"
    importance = hyper.get("use_bias_correction_kl", False)
    return hyper["beta"] * create_loss("kl_penalty", estimator="k3", importance=importance, level=level)(batch).loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "tokens"))
def test_tokens(x: Case, case: Case, dtype: torch.dtype) -> None:
    """Losses of tokens: policy term with its modifiers + β KL, averaged by a count; - c entropy, a term of its own."""
    hyper = case["hyper"]
    batch, count = record(x, hyper, dtype), COUNTS[hyper["loss_type"]](hyper)
    mask_BT = batch.mask_BT
    out = policy_loss(hyper)(batch)
    check_intermediate(out, batch, case)
    if hyper.get("beta"):
        kl_BT = penalty(batch, hyper)
        assert_close(kl_BT[mask_BT] / hyper["beta"], flat(case["expected"]["intermediate"]["per_token_kl"]), case)
        out = LossOut(out.loss + kl_BT)
    if "entropy_coef" not in hyper:
        check_tokens(out.loss, count, batch.logps_BT, mask_BT, "policy_logps", case)
        return
    # A term with its own weight and count: the mean over tokens, of those of high entropy where there is a floor.
    kept_BT = mask_BT
    if batch.entropy_floor is not None:
        kept_BT = mask_BT & (batch.entropy_BT.detach() >= batch.entropy_floor)
    bonus_BT = create_loss("entropy_bonus")(dataclasses.replace(batch, mask_BT=kept_BT)).loss
    assert_close(out.loss[mask_BT], flat(case["expected"]["per_token_loss"]), case)
    reduced = count.mean(out.loss, mask_BT) + hyper["entropy_coef"] * Count("token").mean(bonus_BT, kept_BT)
    check_reduced(reduced, batch, case)


def check_intermediate(out: LossOut, batch: PolicyGradient, case: Case) -> None:
    """What a case says about its weights and masks."""
    expected = case["expected"].get("intermediate", {})
    mask_BT = batch.mask_BT
    if "phi" in expected:  # one number per completion
        assert_close(out.metrics["phi"][:, 0], expected["phi"], case)
    if "entropy_mask" in expected:
        assert out.metrics["entropy/kept"][mask_BT].tolist() == flat(expected["entropy_mask"])
    if "off_policy_keep" in expected:
        assert (1 - out.metrics["off_policy/dropped"]).tolist() == expected["off_policy_keep"]
    if "is_ratio" in expected and "correction/weight" in out.metrics:
        assert_close(out.metrics["correction/weight"][mask_BT], flat(expected["is_ratio"]), case)


def check_reduced(reduced: Tensor, batch: PolicyGradient, case: Case) -> None:
    """Compare the mean and its gradient in everything that a case differentiates."""
    assert_close(reduced, case["expected"]["reduced"], case)
    reduced.backward()
    for field, leaf_BT in (("policy_logps", batch.logps_BT), ("entropies", batch.entropy_BT)):
        if field in case["expected"]["grad"]:
            assert_close(leaf_BT.grad[batch.mask_BT], flat(case["expected"]["grad"][field]), case)
            assert_padding_untouched(leaf_BT, batch.mask_BT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "rows"))
def test_rows(x: Case, case: Case, dtype: torch.dtype) -> None:
    """Losses of whole completions, + β times the token mean of k3: two terms, each with the count of rows."""
    hyper = case["hyper"]
    batch, count = record(x, hyper, dtype), Count("row")
    options = {k: v for k, v in hyper.items() if k != "beta"}
    loss_B = policy_loss(options)(batch).loss
    # Of a completion without tokens the ratio is 1 and TRL's loss the constant -A; a record of tokens knows no A there.
    empty_B = ~batch.mask_BT.any(-1)
    assert bool((loss_B[empty_B] == 0).all())
    loss_B = torch.where(empty_B, -batch.advantages_BT[:, 0], loss_B)
    reduced = count.mean(loss_B)
    if hyper.get("beta"):
        kl_BT = penalty(batch, hyper)
        loss_B = loss_B + masked_mean(kl_BT, batch.mask_BT)
        reduced = reduced + count.mean(kl_BT, batch.mask_BT)
    assert_close(loss_B, case["expected"]["per_sequence"], case)
    check_reduced(reduced, batch, case)


@pytest.mark.parametrize(("x", "case"), [*cases(FILE, covered_by, "tokens"), *cases(FILE, covered_by, "rows")])
def test_finite_in_bfloat16(x: Case, case: Case) -> None:
    """Policy term and KL, loss and gradient: never NaN or infinity in bfloat16."""
    hyper = {k: v for k, v in case["hyper"].items() if k not in ("beta", "entropy_coef")}
    batch = record(x, hyper, torch.bfloat16)
    terms = [policy_loss(hyper)(batch).loss]
    if case["hyper"].get("beta"):
        terms.append(penalty(batch, case["hyper"]))
    for loss in terms:
        values = loss[batch.mask_BT] if loss.dim() == 2 else loss
        (gradient_BT,) = torch.autograd.grad(values.sum(), batch.logps_BT, retain_graph=True)
        assert bool(values.isfinite().all())
        assert bool(gradient_BT.isfinite().all())


# -- policy_gradient.json: the weights alone --------------------------------------------------------------------------


def is_weight(case: Case) -> str | None:
    return "importance_ratio" if case["kind"] == "importance_ratio" else None


def test_no_weights_are_forgotten() -> None:
    assert len(cases("policy_gradient", is_weight, "importance_ratio")) == 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases("policy_gradient", is_weight, "importance_ratio"))
def test_importance_ratio(x: Case, case: Case, dtype: torch.dtype) -> None:
    """The weights of the sampler's correction, of tokens and of whole completions."""
    hyper, mask_BT = case["hyper"], mask_of(x["old_logps"])
    weight_BT = importance_weights(
        padded(x["old_logps"], dtype),
        padded(x["sampling_logps"], dtype),
        mask_BT,
        correction=hyper["is_mode"],
        correction_max=hyper["is_clip_max"],
        correction_min=hyper["is_clip_min"],
    )
    assert_close(weight_BT[mask_BT], flat(case["expected"]["is_ratio"]), case)
    assert bool((weight_BT[~mask_BT] == 0).all())
