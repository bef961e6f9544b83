"""Golden cases of the pairwise losses without a reference: value, gradient, float32.

The golden likelihood term is a mean over the tokens of the batch, but for the case that says ``token_sum``: here a term
of its own, ``chosen_nll`` by tokens, beside the loss with ``nll=0``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from goldens import DTYPES, Case, assert_all_run, assert_close, assert_padding_untouched, cases, flat, mask_of, padded
from torch import Tensor

from prefzoo.losses.base import Loss, create_loss
from prefzoo.parts.count import Count
from prefzoo.records import Pairs

FILE = "pairwise_reffree"
SIDES = ("chosen", "rejected", "prompt")


def covered_by(case: Case) -> str:
    hyper = case["hyper"]
    if hyper["loss_type"] == "orpo":
        return "orpo"
    return "own_nll" if hyper["loss_type"] == "slic_hf" or hyper.get("nll") == "token_sum" else "batch_nll"


def test_no_golden_case_is_forgotten() -> None:
    assert_all_run(FILE, covered_by, {"batch_nll": 64, "own_nll": 6, "orpo": 19})


def pairs_of(x: Case, dtype: torch.dtype) -> tuple[Pairs, dict[str, Tensor]]:
    """The record of an input set, and its leaves."""
    leaves = {s: padded(x[f"policy_{s}_logps"], dtype, grad=True) for s in SIDES}
    masks = {f"{s}_mask_BT": mask_of(x[f"policy_{s}_logps"]) for s in SIDES}
    return Pairs(**{f"{s}_logps_BT": leaf for s, leaf in leaves.items()}, **masks), leaves


def loss_of(hyper: dict[str, Any], **options: Any) -> Loss:
    """The entry of a golden case: the comparison alone, unless options say otherwise."""
    names = {"sigmoid": "cpo", "hinge": "cpo_hinge", "ipo": "cpo_ipo"}
    name = "alphapo" if "alpha" in hyper else names.get(hyper["loss_type"], hyper["loss_type"])
    given = {{"simpo_gamma": "gamma", "lambda": "nll"}.get(k, k): v for k, v in hyper.items()}
    given = {k: v for k, v in given.items() if k not in ("loss_type", "cpo_alpha") and v not in NLLS}
    if name.startswith("cpo"):
        given["nll"] = 0.0
    return create_loss(name, **{**given, **options})


NLLS = ("token_sum", "completion", "prompt_and_completion")


def check_gradient(reduced: Tensor, leaves: dict[str, Tensor], batch: Pairs, case: Case) -> None:
    assert_close(reduced, case["expected"]["reduced"], case)
    reduced.backward()
    for side, leaf in leaves.items():
        expected = case["expected"]["grad"].get(f"policy_{side}_logps")
        if expected is None:
            assert side == "prompt" and leaf.grad is None
            continue
        mask_BT = batch.tensors()[f"{side}_mask_BT"]
        gradient_BT = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert_close(gradient_BT[mask_BT], flat(expected), case)
        if leaf.grad is not None:
            assert_padding_untouched(leaf, mask_BT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "batch_nll"))
def test_comparison_and_a_term_of_tokens(x: Case, case: Case, dtype: torch.dtype) -> None:
    batch, leaves = pairs_of(x, dtype)
    loss_B = loss_of(case["hyper"])(batch).loss
    assert_close(loss_B, case["expected"]["per_example"], case)
    nll = Count("token").mean(create_loss("chosen_nll")(batch).loss, batch.chosen_mask_BT)
    assert_close(nll, case["expected"]["intermediate"]["nll"], case)
    check_gradient(Count("row").mean(loss_B) + case["hyper"]["cpo_alpha"] * nll, leaves, batch, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "own_nll"))
def test_likelihood_inside_the_loss(x: Case, case: Case, dtype: torch.dtype) -> None:
    batch, leaves = pairs_of(x, dtype)
    hyper = case["hyper"]
    loss = loss_of(hyper) if hyper["loss_type"] == "slic_hf" else loss_of(hyper, nll=hyper["cpo_alpha"])
    check_gradient(Count("row").mean(loss(batch).loss), leaves, batch, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "orpo"))
def test_orpo(x: Case, case: Case, dtype: torch.dtype) -> None:
    """Its NLL is a mean per row; the golden one, over the tokens of the batch, is the mean of rows by their tokens."""
    batch, leaves = pairs_of(x, dtype)
    hyper, expected = case["hyper"], case["expected"]
    comparison = loss_of(hyper, nll=0.0)(batch)
    assert_close(comparison.loss, expected["intermediate"]["or_term_per_example"], case)
    everything = hyper["nll"] == "prompt_and_completion"
    whole = loss_of(hyper, likelihood="all" if everything else "completion")(batch)
    assert batch.prompt_mask_BT is not None
    tokens_B = batch.chosen_len_B + (batch.prompt_mask_BT.sum(-1) if everything else 0)
    torch.testing.assert_close(whole.loss, comparison.loss + whole.metrics["nll"])
    nll = Count("weight").mean(whole.loss - comparison.loss, weight_B=tokens_B.to(dtype))
    term = create_loss("prompt_chosen_nll" if everything else "chosen_nll")(batch)
    assert_close(
        Count("token").mean(term.loss, term.mask_BT if everything else batch.chosen_mask_BT),
        expected["intermediate"]["nll"],
        case,
    )
    check_gradient(Count("row").mean(comparison.loss) + nll, leaves, batch, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("x", "case"), [p for test in ("batch_nll", "own_nll", "orpo") for p in cases(FILE, covered_by, test)]
)
def test_never_nan_in_low_precision(x: Case, case: Case, dtype: torch.dtype) -> None:
    batch, leaves = pairs_of(x, dtype)
    loss_B = loss_of(case["hyper"])(batch).loss
    loss_B.sum().backward()
    assert bool(loss_B.isfinite().all())
    assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves.values() if leaf.grad is not None)
