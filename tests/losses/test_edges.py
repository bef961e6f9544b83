"""What stands at the edge of a range: options without a meaning, missing numbers, integers and halves as rewards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prefzoo.losses.advantages import (
    best_of_k,
    gdpo,
    group_relative,
    leave_one_out,
    opo,
    reinforce_pp,
    remax,
    top_against_bottom,
    whiten,
)
from prefzoo.losses.base import CREDITS, LOSSES, create_loss, list_losses
from prefzoo.losses.policy_modifiers import importance_weights
from prefzoo.losses.unpaired import kto_baseline
from prefzoo.records import Pairs, PolicyGradient, Scores
from prefzoo.registry import UsageError
from prefzoo.testing import random_record

# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    ("name", "option"),
    [("dpo", "beta"), ("alphapo", "alpha"), ("filtered_sft", "threshold"), ("simpo", "gamma"), ("awr", "cap")],
)
def test_a_number_that_is_not_finite_is_no_value_of_an_option(name: str, option: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"option '{option}': expected finite float"):
        create_loss(name, **{option: value})


def test_a_large_integer_is_a_number() -> None:
    assert create_loss("filtered_sft", threshold=10**400).options["threshold"] == 10**400


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("kto", "desirable_weight"),
        ("kto", "undesirable_weight"),
        ("apo_zero_unpaired", "desirable_weight"),
        ("clipped_value", "clip"),
        ("vespo", "correction_min"),
        ("reinforce", "correction_min"),
        ("reinforce", "off_policy_threshold"),
    ],
)
def test_what_would_turn_a_loss_round_is_refused(name: str, option: str) -> None:
    create_loss(name, **{option: 0.0})
    with pytest.raises(UsageError, match=option):
        create_loss(name, **{option: -0.5})


@pytest.mark.parametrize(
    ("name", "option", "value"), [("whiten", "eps", -1e-8), ("shaped_rewards", "kl", -0.1), ("best_of_k", "k", 0)]
)
def test_options_of_credit_have_ranges(name: str, option: str, value: float) -> None:
    with pytest.raises(UsageError, match=option):
        CREDITS.entry(name).check_options({option: value}, "credit")


def test_a_range_or_nothing_is_told_in_words() -> None:
    with pytest.raises(UsageError, match="expected float of at least 0 or None, got -1"):
        create_loss("clipped_value", clip=-1)


# -- missing numbers --------------------------------------------------------------------------------------------------


def test_the_baseline_of_an_empty_batch_is_0() -> None:
    assert kto_baseline(torch.tensor([])).tolist() == 0


@pytest.mark.parametrize("name", ["davidson", "rao_kupper"])
def test_of_a_tie_the_probability_is_not_read(name: str) -> None:
    tie_B, gradients = torch.tensor([True, False]), []
    for missing in (0.3, math.nan):
        chosen_B = torch.tensor([1.0, 2.0], requires_grad=True)
        probability_B = torch.tensor([missing, 0.8])
        batch = Scores(chosen_B=chosen_B, rejected_B=torch.zeros(2), tie_B=tie_B, probability_B=probability_B)
        gradients.append(torch.autograd.grad(create_loss(name)(batch).loss.sum(), chosen_B)[0].tolist())
    assert gradients[0] == gradients[1]


def unscored(batch: PolicyGradient) -> tuple[PolicyGradient, PolicyGradient]:
    """The batch with one sampled token that the sampler gave no number, and with that token unchanged."""
    sampling_BT, first_BT = batch.sampling_logps_BT, batch.mask_BT & (batch.mask_BT.cumsum(-1) == 1)
    assert sampling_BT is not None
    nothing = dataclasses.replace(batch, sampling_logps_BT=sampling_BT.masked_fill(first_BT, math.nan))
    return nothing, dataclasses.replace(batch, sampling_logps_BT=sampling_BT.where(~first_BT, batch.old_logps_BT))


@pytest.mark.parametrize("correction", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("name", ["reinforce", "vespo"])
def test_a_token_that_the_sampler_gave_no_number_counts_as_unchanged(name: str, correction: str) -> None:
    nothing, unchanged = unscored(random_record(PolicyGradient))
    loss = create_loss(name, correction=correction, correction_max=1.3)
    assert torch.equal(loss(nothing).loss, loss(unchanged).loss)


def test_an_off_policy_mask_does_without_the_tokens_that_the_sampler_gave_no_number() -> None:
    batch = random_record(PolicyGradient)
    batch = dataclasses.replace(
        batch,
        old_logps_BT=batch.logps_BT,
        sampling_logps_BT=batch.logps_BT + 1,
        advantages_BT=-torch.ones_like(batch.logps_BT),
    )
    nothing, unchanged = unscored(batch)
    loss = create_loss("reinforce", off_policy_threshold=0.4)
    assert torch.equal(loss(nothing).loss, loss(unchanged).loss)
    assert loss(nothing).metrics["off_policy/dropped"].any()


def test_one_token_cannot_take_the_whole_weight_of_vespo() -> None:
    """Its correction is within e^20, as its ratio is, before the tokens are multiplied."""
    ones_BT = torch.ones(1, 2, dtype=torch.float64)
    batch = PolicyGradient(
        logps_BT=-ones_BT, old_logps_BT=-ones_BT, advantages_BT=ones_BT, mask_BT=ones_BT > 0,
        sampling_logps_BT=torch.tensor([[-51.0, 19.0]], dtype=torch.float64),
    )  # fmt: skip
    out = create_loss("vespo", correction="token_truncate", correction_max=1e30)(batch)
    assert out.metrics["ratio"].log().item() == pytest.approx(20 + math.log(1e-8))


@pytest.mark.parametrize("name", [name for name in list_losses() if LOSSES.entry(name).tags["family"].per_token])
def test_outside_the_mask_a_loss_of_tokens_is_0(name: str) -> None:
    loss = create_loss(name)
    batch = random_record(loss.family)
    out = loss(batch)
    mask_BT = batch.loss_mask_BT if out.mask_BT is None else out.mask_BT
    assert mask_BT is not None
    if out.loss.dim() == 2:
        assert not out.loss[~mask_BT].any()


# -- rewards of other types -------------------------------------------------------------------------------------------

GROUP_B = torch.tensor([0, 0, 0, 1, 1, 1])
Credit = Callable[[Tensor], Tensor]
OF_REWARDS: dict[str, Credit] = {
    "group_relative": lambda r: group_relative(r, GROUP_B),
    "group_relative, batch": lambda r: group_relative(r, GROUP_B, scale="batch"),
    "leave_one_out": lambda r: leave_one_out(r, GROUP_B),
    "opo": lambda r: opo(r, GROUP_B, torch.tensor([1, 2, 3, 4, 5, 6])),
    "gdpo": lambda r: gdpo(torch.stack([r, r], 1), GROUP_B, weights=[0.5, 0.25]),
    "remax": lambda r: remax(r, r.flip(0)),
    "best_of_k": lambda r: best_of_k(r, GROUP_B, k=2),
    "top_against_bottom": lambda r: torch.cat(top_against_bottom(r, GROUP_B)),
    "whiten": lambda r: whiten(r[None], torch.ones(1, 6) > 0),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", OF_REWARDS)
def test_rewards_of_any_type_are_numbers(name: str, dtype: torch.dtype) -> None:
    """Integers, the booleans of a verifier, and halves, whose own squares overflow or lose their digits."""
    largest = 1 if dtype is torch.bool else 250
    rewards_B = largest * torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    assert torch.equal(OF_REWARDS[name](rewards_B.to(dtype)), OF_REWARDS[name](rewards_B))


def test_squares_of_halves_do_not_overflow() -> None:
    rewards_B = torch.tensor([300.0, -300.0, 300.0, -300.0])
    found_B = group_relative(rewards_B.half(), torch.zeros(4, dtype=torch.int64), sample=False)
    assert found_B.tolist() == pytest.approx([1, -1, 1, -1])


def test_equal_rewards_are_no_signal_without_an_eps_either() -> None:
    same_BT, mask_BT = torch.ones(2, 1), torch.ones(2, 1) > 0
    assert whiten(same_BT, mask_BT, eps=0.0).tolist() == [[0], [0]]
    assert reinforce_pp(torch.ones(2), -same_BT, -same_BT, mask_BT, eps=0.0).tolist() == [[0], [0]]


# -- what the cards say -----------------------------------------------------------------------------------------------


def test_discopop_falls_towards_the_rejected_side_where_training_starts() -> None:
    """A dip at z = -0.12 and a bump at z = 0.07, as its card says."""
    z_B = torch.linspace(-0.4, 0.4, 801, dtype=torch.float64, requires_grad=True)
    one_BT = torch.ones(len(z_B), 1, dtype=torch.float64)
    batch = Pairs(
        chosen_logps_BT=z_B[:, None] - one_BT, ref_chosen_logps_BT=-one_BT, chosen_mask_BT=one_BT > 0,
        rejected_logps_BT=-one_BT, ref_rejected_logps_BT=-one_BT, rejected_mask_BT=one_BT > 0,
    )  # fmt: skip
    slope_B = torch.autograd.grad(create_loss("discopop", beta=1.0)(batch).loss.sum(), z_B)[0]
    rises = z_B[slope_B > 0]
    assert rises.min().item() == pytest.approx(-0.12, abs=0.005)
    assert rises.max().item() == pytest.approx(0.07, abs=0.005)


def test_weights_of_one_are_given_where_a_sampler_gave_nothing() -> None:
    old_BT, mask_BT = torch.tensor([[-1.0, -1.0]]), torch.tensor([[True, True]])
    weights_BT = importance_weights(old_BT, torch.tensor([[math.nan, -2.0]]), mask_BT)
    assert weights_BT.tolist() == [[1.0, pytest.approx(math.e)]]
