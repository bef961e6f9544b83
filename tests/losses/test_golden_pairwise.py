"""Golden cases of the pairwise losses with a reference: value, gradient, float32."""

from __future__ import annotations

from typing import Any

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

from prefzoo.losses.base import Loss, create_loss
from prefzoo.parts.count import Count
from prefzoo.records import LossOut, Pairs

FILE = "pairwise_dpo"
SIDES = ("chosen", "rejected")


def covered_by(case: Case) -> str | None:
    if case["kind"] == "pairwise_logits":
        return "logits"
    return "mixture" if isinstance(case["hyper"]["loss_type"], list) else "pairwise"


def test_no_golden_case_is_forgotten() -> None:
    assert_all_run(FILE, covered_by, {"pairwise": 280, "mixture": 10, "logits": 8})


# -- golden names to ours ---------------------------------------------------------------------------------------------

NAMES = {
    "sigmoid": "dpo", "robust": "robust_dpo", "rdpo": "length_dpo", "sigmoid_norm": "dpo_norm", "sft": "chosen_nll"
}  # fmt: skip
DIVERGENCES = {"js_divergence": "js", "alpha_divergence": "alpha"}
OPTIONS = {
    "discopop_tau": "tau", "rdpo_alpha": "alpha", "dpop_lambda": "penalty", "use_weighting": "wpo",
    "f_divergence_type": "divergence", "f_alpha_divergence_coef": "divergence_alpha",
}  # fmt: skip


def loss_of(hyper: dict[str, Any]) -> Loss:
    """The entry of a golden case, with the options of it and of its modifiers."""
    options = {OPTIONS.get(k, k): v for k, v in hyper.items() if k not in ("loss_type", "loss_weights", "variant")}
    name = hyper.get("variant", NAMES.get(hyper["loss_type"], hyper["loss_type"]))
    if name == "chosen_nll":
        options.pop("beta", None)
    if "divergence" in options:
        options["divergence"] = DIVERGENCES.get(options["divergence"], options["divergence"])
    if options.get("divergence") == "alpha":
        options.setdefault("alpha_convention", "trl")
    return create_loss(name, **options)


def terms_of(hyper: dict[str, Any]) -> list[tuple[float, Loss, Count]]:
    """A mixture is a sum of terms; each is the mean by its count. TRL's ``sft`` is over the tokens of the batch."""
    units, parts = {"sft": "token", "nll_seq_mean": "row"}, {"nll_seq_mean": "sft"}
    return [
        (weight, loss_of({**hyper, "loss_type": parts.get(part, part)}), Count(units.get(part, "row")))  # type: ignore
        for part, weight in zip(hyper["loss_type"], hyper["loss_weights"], strict=True)
    ]


# -- records ----------------------------------------------------------------------------------------------------------


def pairs_of(x: Case, dtype: torch.dtype) -> tuple[Pairs, dict[str, Tensor]]:
    """The record of an input set, and its leaves."""
    leaves = {s: padded(x[f"policy_{s}_logps"], dtype, grad=True) for s in SIDES}
    fields: dict[str, Tensor] = {}
    for side in SIDES:
        fields[f"{side}_logps_BT"] = leaves[side]
        fields[f"{side}_mask_BT"] = mask_of(x[f"policy_{side}_logps"])
        fields[f"ref_{side}_logps_BT"] = padded(x[f"ref_{side}_logps"], dtype)
        if f"{side}_log_sum_sq_probs" in x:
            fields[f"{side}_log_sq_BT"] = padded(x[f"{side}_log_sum_sq_probs"], dtype)
    if "offset" in x:
        fields["margin_B"] = torch.tensor(x["offset"], dtype=dtype)
    return Pairs(**fields), leaves


def order_of_golden(loss: Loss, batch: Pairs) -> Tensor:
    """The rows in the order of the golden losses: of ``aot`` the k-th is that of the k-th smallest difference."""
    if loss.name == "aot":
        return (batch.chosen_B - batch.rejected_B).detach().argsort()
    return torch.arange(len(batch.chosen_logps_BT))


def check_gradient(leaves: dict[str, Tensor], batch: Pairs, case: Case) -> None:
    for side, leaf in leaves.items():
        mask_BT = batch.tensors()[f"{side}_mask_BT"]
        gradient_BT = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad  # chosen_nll does not see the other
        assert_close(gradient_BT[mask_BT], flat(case["expected"]["grad"][f"policy_{side}_logps"]), case)
        if leaf.grad is not None:
            assert_padding_untouched(leaf, mask_BT)


def mean_of(loss: Loss, out: LossOut, batch: Pairs) -> Tensor:
    return Count(loss.count).mean(out.loss, batch.chosen_mask_BT)  # type: ignore[arg-type]


# -- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "pairwise"))
def test_pairwise(x: Case, case: Case, dtype: torch.dtype) -> None:
    batch, leaves = pairs_of(x, dtype)
    loss = loss_of(case["hyper"])
    out = loss(batch)
    if out.loss.dim() == 1:
        assert_close(out.loss[order_of_golden(loss, batch)], case["expected"]["per_example"], case)
    reduced = mean_of(loss, out, batch)
    assert_close(reduced, case["expected"]["reduced"], case)
    reduced.backward()
    check_gradient(leaves, batch, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "mixture"))
def test_mixture(x: Case, case: Case, dtype: torch.dtype) -> None:
    batch, leaves = pairs_of(x, dtype)
    terms = terms_of(case["hyper"])
    reduced = torch.stack([w * c.mean(loss(batch).loss, batch.chosen_mask_BT) for w, loss, c in terms]).sum()
    assert_close(reduced, case["expected"]["reduced"], case)
    reduced.backward()
    check_gradient(leaves, batch, case)


PER_SEQUENCE = [p for p in cases(FILE, covered_by, "mixture") if "nll_seq_mean" in p.values[1]["hyper"]["loss_type"]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), PER_SEQUENCE)
def test_a_term_of_likelihood_per_sequence_is_rpo_nll(x: Case, case: Case, dtype: torch.dtype) -> None:
    batch, leaves = pairs_of(x, dtype)
    dpo_weight, nll_weight = case["hyper"]["loss_weights"]
    assert dpo_weight == 1.0
    loss_B = create_loss("rpo_nll", beta=case["hyper"]["beta"], nll=nll_weight)(batch).loss
    assert_close(loss_B, case["expected"]["per_example"], case)
    loss_B.mean().backward()
    check_gradient(leaves, batch, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("x", "case"), cases(FILE, covered_by, "logits"))
def test_logits(x: Case, case: Case, dtype: torch.dtype) -> None:
    """TDPO: log-probabilities and the exact KL come from logits, and the gradient is with respect to them."""
    fields: dict[str, Tensor] = {}
    leaves: dict[str, list[Tensor]] = {}
    for side in SIDES:
        leaves[side] = [torch.tensor(r, dtype=dtype, requires_grad=True) for r in x[f"policy_{side}_logits"]]
        rows: dict[str, list[Tensor]] = {"": [], "ref_": [], "kl": []}
        for logits_TV, ref, ids in zip(leaves[side], x[f"ref_{side}_logits"], x[f"{side}_ids"], strict=True):
            policy_TV, ref_TV = logits_TV.log_softmax(-1), torch.tensor(ref, dtype=dtype).log_softmax(-1)
            index_T1 = torch.tensor(ids)[:, None]
            rows[""].append(policy_TV.gather(-1, index_T1)[:, 0])
            rows["ref_"].append(ref_TV.gather(-1, index_T1)[:, 0])
            rows["kl"].append((ref_TV.exp() * (ref_TV - policy_TV)).sum(-1))
        fields[f"{side}_logps_BT"], fields[f"ref_{side}_logps_BT"], fields[f"{side}_kl_BT"] = (
            torch.nn.utils.rnn.pad_sequence(rows[k], batch_first=True, padding_value=1e9) for k in rows
        )
        fields[f"{side}_mask_BT"] = fields[f"{side}_logps_BT"].detach() < 1e9
    loss_B = loss_of(case["hyper"])(Pairs(**fields)).loss
    for side in SIDES:
        kl_B = torch.where(fields[f"{side}_mask_BT"], fields[f"{side}_kl_BT"], 0.0).sum(-1)
        assert_close(kl_B.detach(), case["expected"]["intermediate"][f"seq_kl_{side}"], case)
    assert_close(loss_B, case["expected"]["per_example"], case)
    loss_B.mean().backward()
    assert_close(loss_B.mean(), case["expected"]["reduced"], case)
    for side in SIDES:
        for leaf, expected in zip(leaves[side], case["expected"]["grad"][f"policy_{side}_logits"], strict=True):
            assert leaf.grad is not None
            assert_close(leaf.grad.flatten(), flat(expected), case)
