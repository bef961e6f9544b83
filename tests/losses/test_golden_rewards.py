"""Golden cases of reward models and rankings: value, gradient, float32."""

from __future__ import annotations

import pytest
import torch
from goldens import (
    DTYPES,
    Case,
    assert_all_run,
    assert_close,
    cases,
)  # fmt: skip

from prefzoo.losses.base import create_loss
from prefzoo.parts.count import Count
from prefzoo.records import Scores

FILE = "reward_model"


def covered_by(case: Case) -> str | None:
    return "reward_pairs" if case["kind"] == "reward_pairs" else None


def test_no_golden_case_is_forgotten() -> None:
    assert_all_run(FILE, covered_by, {"reward_pairs": 28})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "reward_pairs"))
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
