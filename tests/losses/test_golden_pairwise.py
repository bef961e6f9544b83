"""Golden cases of the pairwise losses with a reference: value, gradient, float32."""

from __future__ import annotations

import pytest
import torch
from goldens import (
    DTYPES,
    Case,
    assert_all_run,
    assert_close,
    assert_padding_untouched,
    cases,
    flat,
    mask_of,
    padded,
)  # fmt: skip

from prefzoo.losses.base import create_loss
from prefzoo.parts.count import Count
from prefzoo.records import Pairs

FILE = "pairwise_dpo"


def covered_by(case: Case) -> str | None:
    hyper = case["hyper"]
    plain = case["kind"] == "pairwise_ref" and hyper["loss_type"] in ("sigmoid", "ipo", "ipo_sum")
    return "pairwise" if plain and hyper.keys() == {"loss_type", "beta"} else None


def test_no_golden_case_is_forgotten() -> None:
    assert_all_run(FILE, covered_by, {"pairwise": 29})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "pairwise"))
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
