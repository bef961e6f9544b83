"""Relations of the pairwise losses with a reference: what the papers claim of them, beyond golden numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prefzoo.losses.base import LOSSES, create_loss
from prefzoo.records import Pairs
from prefzoo.registry import UsageError
from prefzoo.testing import loss_checks, random_record

SEEDS = range(3)
CONTRAST = ["dpo", "cdpo", "robust_dpo", "hinge", "ipo_sum", "exo_pair", "discopop", "length_dpo", "odpo",
            "reward_aware_rpo"]  # fmt: skip
SIDES = ["nca_pair", "bco_pair", "sppo_hard", "sppo_soft", "apo_zero", "apo_down", "dpop"]
SORTED = ["aot", "aot_unpaired"]


def pairs(seed: int = 0, rows: int = 6, spread: float = 0.5, **fields: Tensor) -> Pairs:
    return dataclasses.replace(random_record(Pairs, seed, rows=rows, spread=spread), **fields)


def pairs_with(chosen: Any, rejected: Any, **fields: Tensor) -> Pairs:
    """Pairs of one token whose log-ratios s_w and s_l are these, with gradient."""
    s = {"chosen": torch.as_tensor(chosen, dtype=torch.float64), "rejected": torch.as_tensor(rejected).double()}
    s = {k: v.reshape(-1, 1).clone().requires_grad_() for k, v in s.items()}
    zero_BT, mask_BT = torch.zeros_like(s["chosen"]).detach(), torch.ones_like(s["chosen"]).bool()
    return Pairs(
        chosen_logps_BT=s["chosen"], ref_chosen_logps_BT=zero_BT, chosen_mask_BT=mask_BT,
        rejected_logps_BT=s["rejected"], ref_rejected_logps_BT=zero_BT, rejected_mask_BT=mask_BT, **fields,
    )  # fmt: skip


def loss_of(name: str, batch: Pairs, **options: Any) -> Tensor:
    return create_loss(name, **options)(batch).loss


def gradients(name: str, batch: Pairs, **options: Any) -> tuple[Tensor, Tensor]:
    """d loss / d s_w and d loss / d s_l of ``pairs_with``."""
    total = loss_of(name, batch, **options).sum()
    of_w, of_l = torch.autograd.grad(total, [batch.chosen_logps_BT, batch.rejected_logps_BT])
    return of_w[:, 0], of_l[:, 0]


def same(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- noisy labels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_cdpo_mixes_dpo_with_dpo_of_the_flipped_pair(seed: int, epsilon: float) -> None:
    batch = pairs(seed)
    straight, flipped = loss_of("dpo", batch, beta=0.3), loss_of("dpo", batch.swapped(), beta=0.3)
    same(loss_of("cdpo", batch, beta=0.3, label_smoothing=epsilon), (1 - epsilon) * straight + epsilon * flipped)
    assert torch.equal(
        loss_of("cdpo", batch, beta=0.3, label_smoothing=epsilon),
        loss_of("dpo", batch, beta=0.3, label_smoothing=epsilon),
    )


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4, 0.49])
@pytest.mark.parametrize("seed", SEEDS)
def test_robust_dpo_is_unbiased_under_flipped_labels(seed: int, epsilon: float) -> None:
    """Its expectation over labels flipped with probability ε is DPO's loss on the true labels, and so the gradient."""
    batch = pairs(seed)
    options = {"beta": 0.3, "label_smoothing": epsilon}
    expected = (1 - epsilon) * loss_of("robust_dpo", batch, **options)
    expected = expected + epsilon * loss_of("robust_dpo", batch.swapped(), **options)
    same(expected, loss_of("dpo", batch, beta=0.3), 1e-10)


def test_cdpo_is_biased_under_flipped_labels() -> None:
    batch = pairs(1)
    expected = 0.8 * loss_of("cdpo", batch, label_smoothing=0.2) + 0.2 * loss_of(
        "cdpo", batch.swapped(), label_smoothing=0.2
    )
    assert not torch.allclose(expected, loss_of("dpo", batch), atol=1e-6)


@pytest.mark.parametrize("epsilon", [0.5, 0.7, 1.0])
def test_robust_dpo_refuses_labels_that_are_flipped_half_of_the_time(epsilon: float) -> None:
    with pytest.raises(UsageError, match="exchange the sides"):
        loss_of("robust_dpo", pairs(), label_smoothing=epsilon)


def test_robust_dpo_is_unbounded_below_and_cdpo_is_not() -> None:
    far = pairs_with([1e4], [0.0])
    assert loss_of("robust_dpo", far, beta=1.0, label_smoothing=0.1).item() == pytest.approx(-0.1 * 1e4 / 0.8)
    assert loss_of("cdpo", far, beta=1.0, label_smoothing=0.1).item() == pytest.approx(0.1 * 1e4)


@pytest.mark.parametrize("name", ["cdpo", "exo_pair"])
@pytest.mark.parametrize("epsilon", [0.001, 0.1, 0.3])
def test_smoothed_labels_have_their_best_difference_at_their_log_odds(name: str, epsilon: float) -> None:
    best = math.log((1 - epsilon) / epsilon) / 0.5
    of_w, of_l = gradients(name, pairs_with([best - 1, best, best + 1], [0.0] * 3), beta=0.5, label_smoothing=epsilon)
    assert of_w[0] < 0 < of_w[2] and abs(float(of_w[1])) < 1e-12
    same(of_w, -of_l)


@pytest.mark.parametrize("name", ["robust_dpo", "cdpo"])
def test_without_smoothing_it_is_dpo(name: str) -> None:
    batch = pairs(2)
    same(loss_of(name, batch, label_smoothing=0.0), loss_of("dpo", batch))


# -- the logistic family ----------------------------------------------------------------------------------------------

LIMITS = {
    "dpo": math.log(2), "cdpo": math.log(2), "robust_dpo": math.log(2), "hinge": 1.0, "discopop": (math.log(2) + 1) / 2,
    "dpo_norm": math.log(2), "nca_pair": 2 * math.log(2), "bco_pair": 2 * math.log(2), "apo_zero": 1.0, "apo_down": 1.0,
    "dpop": math.log(2), "aot": math.log(2), "aot_unpaired": math.log(2),
    "exo_pair": -0.5 * math.log(4 * 0.001 * 0.999),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), LIMITS.items())
def test_beta_to_0_knows_nothing(name: str, value: float) -> None:
    same(loss_of(name, pairs(3), beta=1e-9), torch.full((6,), value, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize(("name", "value"), LIMITS.items())
def test_policy_at_the_reference(name: str, value: float) -> None:
    batch = pairs(3)
    refs = {f"ref_{k}": getattr(batch, k) for k in ("chosen_logps_BT", "rejected_logps_BT")}
    batch = dataclasses.replace(batch, **refs)
    same(loss_of(name, batch), torch.full((6,), value, dtype=torch.float64))


@pytest.mark.parametrize("name", ["dpo", "dpo_norm", "hinge", "bco_pair"])
def test_beta_to_infinity_is_the_hinge_at_0(name: str) -> None:
    """loss / β approaches max(0, -difference): only what is ranked wrongly counts."""
    s_w, s_l = torch.tensor([1.0, -2.0, 0.5, -0.3]), torch.tensor([0.4, 1.0, 0.7, -0.9])
    batch = pairs_with(s_w, s_l)
    limit = (-s_w).relu() + s_l.relu() if name == "bco_pair" else (s_l - s_w).relu()
    same(loss_of(name, batch, beta=1e4) / 1e4, limit.double(), 2e-4)


def test_hinge_is_the_larger_of_0_and_what_is_missing() -> None:
    batch = pairs_with([0.0, 2.0, 3.0, 7.0], [0.0] * 4)
    same(loss_of("hinge", batch, beta=0.5), torch.tensor([1.0, 0.0, 0.0, 0.0]).double())
    of_w, of_l = gradients("hinge", batch, beta=0.5)
    same(of_w, torch.tensor([-0.5, 0.0, 0.0, 0.0]).double())
    same(of_l, -of_w)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "exo_pair", "hinge", "length_dpo", "dpo_norm", "apo_zero", "bco_pair"])
def test_the_gradient_pushes_the_sides_apart(name: str) -> None:
    of_w, of_l = gradients(name, pairs_with([-3.0, 0.0, 1.0], [2.0, 0.0, -1.0]), beta=0.1)
    assert bool((of_w < 0).all()) and bool((of_l > 0).all())


def test_exo_is_the_reverse_kl_and_cdpo_the_forward_kl_less_entropy() -> None:
    z = torch.tensor([-3.0, -0.5, 0.0, 1.0, 4.0], dtype=torch.float64)
    batch, epsilon = pairs_with(z, 0 * z), 0.1
    q_2, label_2 = (
        torch.stack([z.sigmoid(), (-z).sigmoid()]),
        torch.tensor([[1 - epsilon], [epsilon]], dtype=torch.float64),
    )
    same(loss_of("exo_pair", batch, beta=1.0, label_smoothing=epsilon), (q_2 * (q_2 / label_2).log()).sum(0), 1e-10)
    entropy = -(label_2 * label_2.log()).sum()
    same(
        loss_of("cdpo", batch, beta=1.0, label_smoothing=epsilon) - entropy,
        (label_2 * (label_2 / q_2).log()).sum(0),
        1e-10,
    )


def test_exo_and_dpo_order_pairs_differently() -> None:
    """DPO pulls hardest at the worst pair, EXO gives it up: its gradient dies on both sides."""
    z = [-60.0, -2.0, 0.0, 2.0]
    dpo_w, _ = gradients("dpo", pairs_with(z, [0.0] * 4), beta=1.0)
    exo_w, _ = gradients("exo_pair", pairs_with(z, [0.0] * 4), beta=1.0, label_smoothing=1e-3)
    assert dpo_w.abs().argmax() == 0 and bool((dpo_w.diff() > 0).all())
    assert exo_w.abs().argmin() == 0 and float(exo_w.abs()[0]) < 1e-20 and exo_w.abs().argmax() == 2


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_exo_needs_smoothing(epsilon: float) -> None:
    with pytest.raises(UsageError, match=r"above 0 and below 1.*'dpo'"):
        loss_of("exo_pair", pairs(), label_smoothing=epsilon)


def test_discopop_is_logistic_below_and_exponential_above() -> None:
    z = torch.tensor([-40.0, -9.0, 9.0, 40.0], dtype=torch.float64)
    expected = torch.where(z < 0, -torch.nn.functional.logsigmoid(z), (-z).exp())
    same(loss_of("discopop", pairs_with(z, 0 * z), beta=1.0, tau=0.05), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tau", [0.05, 1.0, 4.0])
def test_discopop_never_overflows(tau: float, dtype: torch.dtype) -> None:
    z = torch.tensor([-3000.0, -500.0, -80.0, 0.0, 500.0, 3000.0])
    batch = pairs_with(z, 0 * z)
    fields = {k: v.detach().to(dtype).requires_grad_(k == "chosen_logps_BT") for k, v in batch.tensors().items()
              if v.is_floating_point()}  # fmt: skip
    batch = dataclasses.replace(batch, **fields)
    loss_B = loss_of("discopop", batch, beta=1.0, tau=tau)
    (gradient_BT,) = torch.autograd.grad(loss_B.sum(), batch.chosen_logps_BT)
    assert bool(loss_B.isfinite().all()) and bool(gradient_BT.isfinite().all())


def test_discopop_is_exact_where_only_a_factor_would_overflow() -> None:
    z = torch.tensor([-100.0], dtype=torch.float64)
    exact = loss_of("discopop", pairs_with(z, 0 * z), beta=1.0, tau=1.25)
    batch = pairs_with(z, 0 * z)
    low = dataclasses.replace(batch, **{k: v.float() for k, v in batch.tensors().items() if v.is_floating_point()})
    torch.testing.assert_close(loss_of("discopop", low, beta=1.0, tau=1.25).double(), exact, rtol=1e-4, atol=0.0)


# -- lengths ----------------------------------------------------------------------------------------------------------


def with_lengths(batch: Pairs, chosen: int, rejected: int) -> Pairs:
    columns = {s: torch.arange(getattr(batch, f"{s}_mask_BT").shape[1]) for s in ("chosen", "rejected")}
    rows = len(batch.chosen_logps_BT)
    return dataclasses.replace(
        batch,
        chosen_mask_BT=(columns["chosen"] < chosen).expand(rows, -1),
        rejected_mask_BT=(columns["rejected"] < rejected).expand(rows, -1),
    )


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_equal_lengths_only_rescale_beta(seed: int, n: int) -> None:
    batch = with_lengths(pairs(seed), n, n)
    same(loss_of("dpo_norm", batch, beta=0.3 * n), loss_of("dpo", batch, beta=0.3))
    same(loss_of("ipo", batch, beta=0.3 * n), loss_of("ipo_sum", batch, beta=0.3) / n**2)
    same(loss_of("length_dpo", batch, beta=0.3, alpha=5.0), loss_of("dpo", batch, beta=0.3))


def test_length_dpo_pushes_less_where_the_chosen_side_is_longer() -> None:
    """Its gradient is DPO's at a logit that is α n higher: from the objective reward - α n - KL."""
    batch = with_lengths(pairs(0), 4, 1)
    for alpha in (0.01, 0.2):
        logit_B = 0.1 * (batch.chosen_ratio_B - batch.rejected_ratio_B) + alpha * 3
        same(loss_of("length_dpo", batch, beta=0.1, alpha=alpha), -torch.nn.functional.logsigmoid(logit_B))
    shorter = with_lengths(pairs(0), 1, 4)
    assert bool((loss_of("length_dpo", shorter, alpha=0.2) > loss_of("dpo", shorter)).all())


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("name", ["ipo", "dpo_norm"])
def test_an_empty_side_stands_at_the_reference(name: str, side: str) -> None:
    batch = pairs(1)
    empty = {f"{side}_mask_BT": torch.zeros_like(getattr(batch, f"{side}_mask_BT"))}
    at_reference = {f"ref_{side}_logps_BT": getattr(batch, f"{side}_logps_BT")}
    emptied, unmoved = dataclasses.replace(batch, **empty), dataclasses.replace(batch, **at_reference)
    same(loss_of(name, emptied), loss_of(name, unmoved))


# -- columns of the data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_odpo_asks_for_a_difference_that_is_larger_by_the_margin(seed: int) -> None:
    batch = pairs(seed)
    margin_B = batch.margin_B
    assert margin_B is not None
    same(loss_of("odpo", dataclasses.replace(batch, margin_B=torch.zeros_like(margin_B))), loss_of("dpo", batch))
    z = torch.linspace(-2, 2, 6).double()
    shifted = pairs_with(z / 0.1 + 3.0 * margin_B / 0.1, 0 * z, margin_B=margin_B)
    same(loss_of("odpo", shifted, beta=0.1, scale=3.0), loss_of("dpo", pairs_with(z / 0.1, 0 * z), beta=0.1), 1e-10)


@pytest.mark.parametrize("distance", ["kl", "squared"])
def test_reward_aware_rpo_is_0_where_the_gaps_agree_and_nowhere_else(distance: str) -> None:
    gap = torch.tensor([-3.0, -0.1, 0.0, 2.0], dtype=torch.float64)
    options = {"beta": 0.1, "scale": 2.0, "distance": distance}
    at = pairs_with(20 * gap, 0 * gap, margin_B=gap)
    same(loss_of("reward_aware_rpo", at, **options), 0 * gap)
    same(gradients("reward_aware_rpo", at, **options)[0], 0 * gap)
    off = pairs_with(20 * gap + 1, 0 * gap, margin_B=gap)
    assert bool((loss_of("reward_aware_rpo", off, **options) > 1e-6).all())
    assert bool((gradients("reward_aware_rpo", off, **options)[0] > 0).all())


def test_reward_aware_rpo_is_dpo_of_soft_labels_less_their_entropy() -> None:
    batch = pairs(2)
    assert batch.margin_B is not None
    p_B = torch.sigmoid(batch.margin_B)
    mixed = p_B * loss_of("dpo", batch) + (1 - p_B) * loss_of("dpo", batch.swapped())
    entropy = -(p_B * p_B.log() + (1 - p_B) * (1 - p_B).log())
    same(loss_of("reward_aware_rpo", batch, beta=0.1), mixed - entropy, 1e-10)


@pytest.mark.parametrize("distance", ["kl", "squared"])
def test_reward_aware_rpo_does_not_care_which_side_is_called_chosen(distance: str) -> None:
    batch = pairs(2)
    options = {"distance": distance}
    same(loss_of("reward_aware_rpo", batch, **options), loss_of("reward_aware_rpo", batch.swapped(), **options))


@pytest.mark.parametrize(
    ("name", "field"), [("odpo", "margin_B"), ("reward_aware_rpo", "margin_B"), ("sppo_soft", "probability_B")]
)
def test_a_missing_column_is_told(name: str, field: str) -> None:
    with pytest.raises(UsageError, match=f"{name}.*Pairs.{field}.*column '{field.removesuffix('_B')}'"):
        loss_of(name, dataclasses.replace(pairs(), **{field: None}))


@pytest.mark.parametrize("name", ["odpo", "reward_aware_rpo", "sppo_soft"])
def test_columns_of_the_data_are_constants(name: str) -> None:
    columns = {f: torch.full((6,), 0.7).double().requires_grad_() for f in ("margin_B", "probability_B")}
    batch = pairs(**columns)
    assert not loss_of(name, batch).requires_grad  # nothing else in this record has gradient


def test_the_squared_distance_is_a_square() -> None:
    batch = pairs_with([4.0, -1.0], [1.0, 1.0], margin_B=torch.tensor([0.5, 1.0]).double())
    expected = torch.tensor([(0.6 - 1.0) ** 2, (-0.4 - 2.0) ** 2], dtype=torch.float64)
    same(loss_of("reward_aware_rpo", batch, beta=0.2, scale=2.0, distance="squared"), expected)


@pytest.mark.parametrize("name", ["reward_aware_rpo", "sppo_soft"])
def test_soft_labels_are_not_smoothed(name: str) -> None:
    with pytest.raises(UsageError, match="soft already"):
        create_loss(name, label_smoothing=0.1)


def test_odpo_with_its_label_read_the_other_way_has_the_margin_turned_too() -> None:
    batch = pairs(4)
    assert batch.margin_B is not None
    logit_B = -0.1 * (batch.chosen_ratio_B - batch.rejected_ratio_B) + batch.margin_B
    expected = 0.7 * loss_of("odpo", batch) - 0.3 * torch.nn.functional.logsigmoid(logit_B)
    same(loss_of("odpo", batch, label_smoothing=0.3), expected)


# -- losses that anchor each side -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SIDES, "rpo_nll"])
def test_a_shared_shift_does_not_cancel(name: str) -> None:
    s_w, s_l = torch.tensor([-1.0, 0.5]), torch.tensor([-2.0, 1.0])
    p_B = torch.tensor([0.8, 0.6]).double()
    one, two = (pairs_with(s_w + c, s_l + c, probability_B=p_B) for c in (0.0, 1.0))
    assert not LOSSES.entry(name).tags["contrast"]
    assert not torch.allclose(loss_of(name, one, beta=0.1), loss_of(name, two, beta=0.1))


@pytest.mark.parametrize("name", CONTRAST)
def test_a_shared_shift_cancels(name: str) -> None:
    s_w, s_l = torch.tensor([-1.0, 0.5]), torch.tensor([-2.0, 1.0])
    m_B = torch.tensor([0.8, 0.6]).double()
    one, two = (pairs_with(s_w + c, s_l + c, margin_B=m_B) for c in (0.0, 1.0))
    assert LOSSES.entry(name).tags["contrast"]
    same(loss_of(name, one), loss_of(name, two), 1e-10)
    for side_one, side_two in zip(gradients(name, one), gradients(name, two), strict=True):
        same(side_one, side_two, 1e-10)


@pytest.mark.parametrize("seed", SEEDS)
def test_sppo_soft_of_a_certain_win_is_sppo_hard(seed: int) -> None:
    certain = pairs(seed, probability_B=torch.ones(6).double())
    same(loss_of("sppo_soft", certain, beta=0.2), loss_of("sppo_hard", certain, beta=0.2))
    turned = dataclasses.replace(certain, probability_B=torch.zeros(6).double())
    same(loss_of("sppo_soft", turned, beta=0.2), loss_of("sppo_hard", certain.swapped(), beta=0.2))


def test_sppo_soft_is_0_at_its_targets_and_a_coin_flip_stays_at_the_reference() -> None:
    p_B = torch.tensor([0.5, 0.6, 0.9], dtype=torch.float64)
    target = (p_B - 0.5) / 0.01
    same(loss_of("sppo_soft", pairs_with(target, -target, probability_B=p_B), beta=0.01), 0 * p_B)
    assert float(target[0]) == 0


def test_apo_is_bounded_and_its_anchors_are_right() -> None:
    s = torch.linspace(-900, 900, 7).double()
    s_w, s_l = (x.flatten() for x in torch.meshgrid(s, s, indexing="ij"))
    for name in ("apo_zero", "apo_down"):
        loss_B = loss_of(name, pairs_with(s_w, s_l)).detach()
        assert bool((loss_B >= 0).all()) and bool((loss_B <= 2).all()) and float(loss_B.max()) > 1.99
    zero_w, zero_l = gradients("apo_zero", pairs_with([0.5], [0.2]))
    assert zero_w < 0 < zero_l
    down_w, down_l = gradients("apo_down", pairs_with([0.0], [-60.0]))  # once apart, both go down
    assert down_w > 0 and down_l > 0


def test_nca_holds_the_chosen_side_at_log_2_over_beta() -> None:
    of_w, of_l = gradients("nca_pair", pairs_with([math.log(2) / 0.1] * 3, [-50.0, 0.0, 50.0]), beta=0.1)
    same(of_w, torch.zeros(3).double())
    assert bool((of_l > 0).all())


def test_bco_pair_adds_two_classifiers() -> None:
    s_w, s_l = torch.tensor([1.0, -2.0]), torch.tensor([0.3, 4.0])
    alone = loss_of("dpo", pairs_with(s_w, 0 * s_w)) + loss_of("dpo", pairs_with(0 * s_l, s_l))
    same(loss_of("bco_pair", pairs_with(s_w, s_l)), alone)


@pytest.mark.parametrize("seed", SEEDS)
def test_dpop_without_penalty_is_dpo(seed: int) -> None:
    batch = pairs(seed)
    same(loss_of("dpop", batch, beta=0.2, penalty=0.0), loss_of("dpo", batch, beta=0.2))
    above = pairs_with([0.0, 0.5, 3.0], [1.0, -4.0, 2.0])
    same(loss_of("dpop", above, beta=0.2, penalty=50.0), loss_of("dpo", above, beta=0.2))


def test_dpop_has_1_plus_penalty_times_the_chosen_gradient_below_the_reference() -> None:
    below = pairs_with([-0.5, -2.0], [0.0, -3.0])
    of_w, of_l = gradients("dpop", below, beta=0.2, penalty=4.0)
    same(of_w, -5 * of_l)
    assert bool((of_w < 0).all())


@pytest.mark.parametrize("nll", [0.0, 0.5, 2.0])
def test_rpo_nll_is_dpo_and_the_mean_nll_of_each_chosen_completion(nll: float) -> None:
    batch = pairs(5)
    mean_B = -batch.chosen_B / batch.chosen_len_B
    same(loss_of("rpo_nll", batch, beta=0.2, nll=nll), loss_of("dpo", batch, beta=0.2) + nll * mean_B)


# -- losses that sort the batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SORTED)
@pytest.mark.parametrize("seed", SEEDS)
def test_one_pair_has_no_ranks_to_exchange(name: str, seed: int) -> None:
    batch = pairs(seed, rows=1)
    same(loss_of(name, batch), loss_of("dpo", batch))
    same(loss_of(name, batch, label_smoothing=0.2), loss_of("cdpo", batch, label_smoothing=0.2))


@pytest.mark.parametrize("seed", SEEDS)
def test_aot_is_dpo_where_policy_and_reference_rank_the_pairs_alike(seed: int) -> None:
    batch = pairs(seed)
    order_B = (batch.ref_chosen_B - batch.ref_rejected_B).argsort().argsort().double()
    policy_BT = torch.where(batch.chosen_mask_BT, 10.0 * order_B[:, None] / batch.chosen_len_B[:, None], 0.0)
    alike = dataclasses.replace(batch, chosen_logps_BT=policy_BT)
    same(loss_of("aot", alike), loss_of("dpo", alike))


@pytest.mark.parametrize("seed", SEEDS)
def test_sorting_pairs_costs_least(seed: int) -> None:
    """Optimal transport: for a convex cost no other assignment of ranks has a smaller sum."""
    batch = pairs(seed)
    policy_B, ref_B = batch.chosen_B - batch.rejected_B, batch.ref_chosen_B - batch.ref_rejected_B
    least = loss_of("aot", batch).sum()
    for k in range(50):
        order_B = torch.randperm(6, generator=torch.Generator().manual_seed(k))
        other = -torch.nn.functional.logsigmoid(0.1 * (policy_B - ref_B[order_B])).sum()
        assert float(other) >= float(least) - 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_aot_gives_every_pair_the_loss_of_its_rank(seed: int) -> None:
    batch = pairs(seed)
    policy_B, ref_B = batch.chosen_B - batch.rejected_B, batch.ref_chosen_B - batch.ref_rejected_B
    rank_B = (policy_B[:, None] > policy_B).sum(1)
    expected = -torch.nn.functional.logsigmoid(0.1 * (policy_B - ref_B.sort().values[rank_B]))
    same(loss_of("aot", batch), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_aot_unpaired_does_not_know_who_stands_beside_whom(seed: int) -> None:
    batch = pairs(seed)
    order_B = torch.tensor([3, 0, 5, 1, 4, 2])
    names = [n for n in batch.tensors() if "rejected" in n]
    moved = dataclasses.replace(batch, **{n: batch.tensors()[n][order_B] for n in names})
    same(loss_of("aot_unpaired", batch), loss_of("aot_unpaired", moved))
    assert not torch.allclose(loss_of("aot", batch), loss_of("aot", moved))


@pytest.mark.parametrize("name", SORTED)
def test_the_gradient_goes_back_through_the_sort(name: str) -> None:
    """Every pair's own completions receive the gradient of their rank; with ties too."""
    s_w, s_l = torch.tensor([2.0, -1.0, 2.0, 0.5]), torch.tensor([0.0, 0.0, 3.0, -2.0])
    batch = pairs_with(s_w, s_l)
    of_w, of_l = gradients(name, batch, beta=0.5)
    low, high = s_w.double().sort(stable=True)
    if name == "aot_unpaired":
        slope = -0.5 * torch.sigmoid(-0.5 * (low - s_l.double().sort(stable=True).values))
        same(of_w[high], slope)
        same(of_l[s_l.sort(stable=True).indices], -slope)
    else:  # the reference is 0 everywhere: each difference is compared with 0
        slope = -0.5 * torch.sigmoid(-0.5 * (s_w - s_l).double())
        same(of_w, slope)
        same(of_l, -slope)


@pytest.mark.parametrize("name", SORTED)
def test_smoothing_reads_every_rank_both_ways(name: str) -> None:
    batch, epsilon = pairs(3), 0.2
    mean = loss_of(name, batch, label_smoothing=epsilon).mean()
    delta = (loss_of(name, batch).exp() - 1).log().neg()  # the logit, back from -log σ
    both = -(1 - epsilon) * torch.nn.functional.logsigmoid(delta) - epsilon * torch.nn.functional.logsigmoid(-delta)
    same(mean, both.mean(), 1e-10)
    same(loss_of(name, batch, label_smoothing=epsilon), both, 1e-10)


# -- the contract, with options ---------------------------------------------------------------------------------------

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("robust_dpo", {"label_smoothing": 0.45}),
    ("exo_pair", {"label_smoothing": 0.3, "beta": 1.0}),
    ("discopop", {"tau": 2.0, "beta": 1.0}),
    ("dpop", {"penalty": 0.0}),
    ("sppo_hard", {"beta": 0.1}),
    ("rpo_nll", {"nll": 0.2}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_contract_of_variants(name: str, options: dict[str, Any]) -> None:
    for check in loss_checks(name, **options):
        if check.name != "modifiers_keep_contract":  # test_contract runs it at the defaults; it is the slow one
            check()
