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
from torch import Tensor

from prefzoo.losses.base import create_loss
from prefzoo.losses.unpaired import class_midpoint, class_weights, kto_baseline
from prefzoo.parts.count import Count
from prefzoo.records import Unpaired

FILE = "unpaired"


def covered_by(case: Case) -> str | None:
    loss = case["hyper"]["loss_type"]
    return loss if loss in ("kto", "apo_zero_unpaired", "bco") else None


def test_no_golden_case_is_forgotten() -> None:
    assert_all_run(FILE, covered_by, {"kto": 26, "apo_zero_unpaired": 10, "bco": 32})


def record(x: Case, dtype: torch.dtype, **fields: Tensor) -> Unpaired:
    return Unpaired(
        logps_BT=padded(x["policy_logps"], dtype, grad=True),
        ref_logps_BT=padded(x["ref_logps"], dtype),
        mask_BT=mask_of(x["policy_logps"]),
        desirable_B=torch.tensor(x["labels"]),
        **fields,
    )


def check(batch: Unpaired, loss_B: Tensor, case: Case, weight_B: Tensor | None = None) -> None:
    expected = case["expected"]
    assert_close(loss_B, expected["per_example"], case)
    reduced = Count("row").mean(loss_B, weight_B=weight_B)
    assert_close(reduced, expected["reduced"], case)
    reduced.backward()
    assert batch.logps_BT.grad is not None
    assert_close(batch.logps_BT.grad[batch.mask_BT], flat(expected["grad"]["policy_logps"]), case)
    assert_padding_untouched(batch.logps_BT, batch.mask_BT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "kto"))
def test_kto(x: Case, case: Case, dtype: torch.dtype) -> None:
    partners = Unpaired(
        logps_BT=padded(x["policy_kl_logps"], dtype),
        ref_logps_BT=padded(x["ref_kl_logps"], dtype),
        mask_BT=mask_of(x["policy_kl_logps"]),
        desirable_B=torch.tensor(x["labels"]),
    )
    batch = record(x, dtype, baseline=kto_baseline(partners.ratio_B))
    options = {k: v for k, v in case["hyper"].items() if k != "loss_type"}
    check(batch, create_loss("kto", **options)(batch).loss, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "apo_zero_unpaired"))
def test_apo_zero_unpaired(x: Case, case: Case, dtype: torch.dtype) -> None:
    batch = record(x, dtype)
    options = {k: v for k, v in case["hyper"].items() if k != "loss_type"}
    check(batch, create_loss("apo_zero_unpaired", **options)(batch).loss, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "bco"))
def test_bco(x: Case, case: Case, dtype: torch.dtype) -> None:
    hyper, bare = case["hyper"], record(x, dtype)
    if hyper["delta"] == "midpoint_of_class_means":
        delta = class_midpoint(bare.ratio_B, bare.desirable_B)
    elif hyper["delta"] == "mean_of_all":  # what TRL's former trainer started its running mean from
        delta = bare.ratio_B.mean()
    else:
        delta = torch.tensor(hyper["delta"] / hyper["beta"], dtype=dtype)
    batch = record(x, dtype, delta=delta)
    out = create_loss("bco", beta=hyper["beta"])(batch)
    assert_close(out.metrics["rewards"], case["expected"]["intermediate"]["rewards"], case)
    assert_close(hyper["beta"] * delta, case["expected"]["intermediate"]["delta"], case)
    weight_B = {"mean": None, "sum_of_class_means": class_weights(batch.desirable_B, dtype)}[hyper["reduction"]]
    check(batch, out.loss, case, weight_B)
