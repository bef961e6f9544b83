"""Golden cases of reward models and rankings: value, gradient, float32."""

from __future__ import annotations

import pytest
import torch
from goldens import (
    DTYPES,
    POISON,
    Case,
    assert_all_run,
    assert_close,
    cases,
    flat,
    mask_of,
    padded,
)  # fmt: skip

from prefzoo.losses.base import create_loss
from prefzoo.losses.rankings import pairs_P
from prefzoo.parts.count import Count
from prefzoo.records import Ranked, RankedScores, Scores

FILE = "reward_model"
RANKED = ("kwise_all_pairs", "plackett_luce")


def covered_by(case: Case) -> str | None:
    if case["kind"] == "reward_pairs":
        return "reward_pairs"
    loss = case["hyper"]["loss_type"]
    return "ranked_rewards" if loss in RANKED else "pl_dpo" if loss == "dpo_plackett_luce" else None


def test_no_golden_case_is_forgotten() -> None:
    assert_all_run(FILE, covered_by, {"reward_pairs": 28, "ranked_rewards": 12, "pl_dpo": 2})


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
    out = create_loss("bradley_terry", **options)(batch)
    assert_close(out.loss, case["expected"]["per_example"], case)
    if not any(options.values()):
        assert_close(create_loss("log_exp")(batch).loss, case["expected"]["per_example"], case)
    reduced = Count("row").mean(out.loss)
    assert_close(reduced, case["expected"]["reduced"], case)
    reduced.backward()
    for leaf, field in ((chosen_B, "chosen_rewards"), (rejected_B, "rejected_rewards")):
        assert leaf.grad is not None
        assert_close(leaf.grad, case["expected"]["grad"][field], case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "ranked_rewards"))
def test_ranked_rewards(x: Case, case: Case, dtype: torch.dtype) -> None:
    hyper, expected = case["hyper"], case["expected"]
    rewards_PK, valid_PK = padded(x["ranked_rewards"], dtype, grad=True), mask_of(x["ranked_rewards"])
    batch = RankedScores(rewards_PK=rewards_PK, valid_PK=valid_PK)
    if hyper["loss_type"] == "plackett_luce":
        out = create_loss("plackett_luce", per_choice=hyper.get("normalise") == "per_choice")(batch)
    else:
        out = create_loss("all_pairs")(batch)
    assert_close(out.loss, expected["per_example"], case)
    if hyper.get("reduction") == "all_pairs_pooled":
        reduced = Count("weight").mean(out.loss, weight_B=pairs_P(valid_PK))
    else:
        reduced = Count("row").mean(out.loss)
    assert_close(reduced, expected["reduced"], case)
    reduced.backward()
    assert rewards_PK.grad is not None
    assert_close(rewards_PK.grad[valid_PK], flat(expected["grad"]["ranked_rewards"]), case)
    assert bool((rewards_PK.grad[~valid_PK] == 0).all()), "gradient to a completion that is not there"


def ranked_logps(lists: list[list[list[float]]], dtype: torch.dtype) -> torch.Tensor:
    """(P, K, T) with one completion and one token more than the longest needs, poison wherever nothing is."""
    width = max(len(rows) for rows in lists) + 1
    length = max(len(row) for rows in lists for row in rows) + 1
    filled = [[row + [POISON] * (length - len(row)) for row in rows + [[]] * (width - len(rows))] for rows in lists]
    return torch.tensor(filled, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "pl_dpo"))
def test_pl_dpo(x: Case, case: Case, dtype: torch.dtype) -> None:
    expected = case["expected"]
    logps_PKT = ranked_logps(x["policy_logps"], dtype).requires_grad_()
    ref_PKT = ranked_logps(x["ref_logps"], dtype)
    mask_PKT = ref_PKT != POISON
    batch = Ranked(logps_PKT=logps_PKT, ref_logps_PKT=ref_PKT, mask_PKT=mask_PKT, valid_PK=mask_PKT.any(-1))
    loss_P = create_loss("pl_dpo", beta=case["hyper"]["beta"])(batch).loss
    assert_close(loss_P, expected["per_example"], case)
    reduced = Count("row").mean(loss_P)
    assert_close(reduced, expected["reduced"], case)
    reduced.backward()
    assert logps_PKT.grad is not None
    rows = [row for rows in expected["grad"]["policy_logps"] for row in rows]
    assert_close(logps_PKT.grad[mask_PKT], flat(rows), case)
    assert bool((logps_PKT.grad[~mask_PKT] == 0).all()), "gradient outside the masks"
