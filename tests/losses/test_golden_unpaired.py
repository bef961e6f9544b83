"""Golden cases of the unpaired losses: value, gradient, float32."""

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
from prefzoo.losses.unpaired import kto_baseline
from prefzoo.parts.count import Count
from prefzoo.records import Unpaired

FILE = "unpaired"


def covered_by(case: Case) -> str | None:
    return "kto" if case["hyper"]["loss_type"] == "kto" else None


def test_no_golden_case_is_forgotten() -> None:
    assert_all_run(FILE, covered_by, {"kto": 26})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "kto"))
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
