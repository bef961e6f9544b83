"""Golden cases of the group losses (GRPO and its relatives): value, gradient, float32."""

from __future__ import annotations

import pytest
import torch
from goldens import (
    AGGREGATIONS,
    DTYPES,
    Case,
    assert_all_run,
    cases,
    check_tokens,
    mask_of,
    padded,
)  # fmt: skip

from prefzoo.losses.base import create_loss
from prefzoo.records import LossOut, PolicyGradient

FILE = "grpo"


GRPO_OPTIONS = {"epsilon", "epsilon_high", "delta", "beta", "use_bias_correction_kl", "max_completion_length", "old"}


def covered_by(case: Case) -> str | None:
    hyper = case["hyper"]
    plain = hyper["loss_type"] in AGGREGATIONS and hyper.keys() - {"loss_type"} <= GRPO_OPTIONS
    return "grpo" if plain else None


def test_no_golden_case_is_forgotten() -> None:
    assert_all_run(FILE, covered_by, {"grpo": 50})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "grpo"))
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
