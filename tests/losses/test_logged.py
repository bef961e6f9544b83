"""What losses log: rewards, log-probabilities and likelihoods of the right side, in the right unit, inside the mask."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from prefzoo.contract import modes
from prefzoo.losses.base import LOSSES, Loss, create_loss
from prefzoo.records import Pairs, Ranked, RankedScores, Unpaired, Values, masked_sum
from prefzoo.testing import random_record
from prefzoo.trial import extreme_record, inside, parts, with_fields

TAGS = {name: LOSSES.entry(name).tags for name in LOSSES.names()}
OF_PAIRS = [name for name, tags in TAGS.items() if tags["family"] is Pairs and tags["count"] == "row"]
SIDES = {"chosen": "rejected", "rejected": "chosen"}
close = torch.testing.assert_close


def other_side(key: str) -> str:
    head, _, side = key.partition("/")
    return f"{head}/{SIDES.get(side, side)}"


def logged(name: str, batch: Pairs, **options: float) -> dict[str, Tensor]:
    return dict(create_loss(name, **options)(batch).metrics)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_rewards_are_of_their_side(name: str) -> None:
    batch = random_record(Pairs, 3, rows=12)
    found, exchanged = logged(name, batch), logged(name, batch.swapped())
    margin_B = found["rewards/chosen"] - found["rewards/rejected"]
    close(found["rewards/margins"], margin_B)
    assert found["rewards/accuracies"].tolist() == (margin_B > 0).double().tolist()
    both = [key for key in found if key.partition("/")[2] in SIDES]
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"} <= set(both)
    for key in both:
        close(exchanged[key], found[other_side(key)])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", OF_PAIRS)
def test_one_side_made_likelier_has_the_larger_reward_and_the_other_keeps_its_own(name: str, side: str) -> None:
    batch = random_record(Pairs, 4, rows=12)
    batch = dataclasses.replace(batch, **{f"{s}_step_BT": batch.tensors()[f"{s}_mask_BT"] for s in SIDES})
    logps_BT, mask_BT = batch.tensors()[f"{side}_logps_BT"], batch.tensors()[f"{side}_mask_BT"]
    step_BT = 0.1 * mask_BT.double()
    found = logged(name, batch)
    moved = logged(name, dataclasses.replace(batch, **{f"{side}_logps_BT": logps_BT + step_BT}))
    other = SIDES[side]
    assert bool((moved[f"rewards/{side}"] > found[f"rewards/{side}"]).all())
    close(moved[f"rewards/{other}"], found[f"rewards/{other}"])
    close(moved[f"logps/{side}"], found[f"logps/{side}"] + step_BT.sum(-1))
    close(moved[f"logps/{other}"], found[f"logps/{other}"])
    if "nll" in found:  # a mean over the tokens of the chosen side
        close(moved["nll"], found["nll"] - (0.1 if side == "chosen" else 0.0))


@pytest.mark.parametrize("name", [n for n in OF_PAIRS if "beta" in LOSSES.entry(n).own_options])
def test_rewards_are_in_units_of_beta(name: str) -> None:
    batch = random_record(Pairs, 5, rows=12)
    beta = LOSSES.entry(name).options["beta"]
    found, doubled = logged(name, batch), logged(name, batch, beta=2 * beta)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        close(doubled[key], 2 * found[key])
    close(doubled["logps/chosen"], found["logps/chosen"])


@pytest.mark.parametrize("name", [name for name, tags in TAGS.items() if tags["family"] is Unpaired])
def test_logps_of_single_completions_are_sums_over_their_mask(name: str) -> None:
    batch = random_record(Unpaired, 6, rows=12)
    step_BT = torch.where(batch.mask_BT, 0.1, -0.7).double()
    found, moved = (
        create_loss(name)(b).metrics for b in (batch, dataclasses.replace(batch, logps_BT=batch.logps_BT + step_BT))
    )
    close(moved["logps"] - found["logps"], masked_sum(step_BT, batch.mask_BT))
    assert bool((moved["rewards"] > found["rewards"]).all())


@pytest.mark.parametrize("name", [name for name, tags in TAGS.items() if tags["family"] in (Ranked, RankedScores)])
def test_of_a_ranking_the_first_is_compared_with_the_mean_of_the_rest(name: str) -> None:
    loss = create_loss(name)
    batch = random_record(loss.family, 9, rows=12)
    at = "logps_PKT" if loss.family is Ranked else "rewards_PK"

    def moved(step_PK: Tensor) -> Mapping[str, Tensor]:
        """With the completions made better by so much; of log-probabilities by the first token."""
        value = batch.tensors()[at].clone()
        (value[..., 0] if value.dim() == 3 else value).add_(step_PK)
        return loss(with_fields(batch, {at: value})).metrics

    valid_PK, none_PK = batch.tensors()["valid_PK"], torch.zeros(batch.tensors()["valid_PK"].shape).double()
    found, all_better = moved(none_PK), moved(none_PK + 1.0)
    chosen_P, rejected_P = (all_better[f"rewards/{side}"] - found[f"rewards/{side}"] for side in SIDES)
    close(chosen_P, rejected_P)
    assert bool((chosen_P > 0).all())
    close(all_better["rewards/margins"], found["rewards/margins"])
    first_PK = none_PK + (torch.arange(valid_PK.shape[1]) == 0)
    first_better, rest_better = moved(first_PK), moved(1.0 - first_PK)
    for better, side, other in ((first_better, "chosen", "rejected"), (rest_better, "rejected", "chosen")):
        close(better[f"rewards/{side}"], all_better[f"rewards/{side}"])
        close(better[f"rewards/{other}"], found[f"rewards/{other}"])
    place_PK = none_PK + 1e4 * torch.arange(valid_PK.shape[1])
    assert moved(-place_PK)["rewards/accuracies"].tolist() == [1.0] * 12
    assert moved(place_PK)["rewards/accuracies"].tolist() == [0.0] * 12


def test_a_value_counts_as_clipped_where_the_clip_makes_it_worse() -> None:
    """It has gone nearer to its return than it may, and is held back; away from it nothing holds it."""
    values_BT = torch.tensor([[0.9, 0.1, -0.9]], dtype=torch.float64)
    batch = Values(
        values_BT=values_BT, old_values_BT=0 * values_BT, returns_BT=torch.ones(1, 3).double(), mask_BT=values_BT < 9
    )
    found = create_loss("clipped_value", clip=0.2)(batch).metrics
    assert found["value/clip_ratio"].tolist() == [[1.0, 0.0, 0.0]]
    close(found["value/error"], (values_BT - 1).square())


def modes_of(name: str) -> list[Loss]:
    """The loss, and with every other value of those of its options that are names or switches."""
    loss = create_loss(name)
    switches = [k for k, v in loss.entry.own_options.items() if isinstance(v, bool | str)]
    return [loss, *(mode for option in switches for mode in modes(loss, option))]


@pytest.mark.parametrize("poison", [1e9, -1e9, math.inf, math.nan])
@pytest.mark.parametrize("name", [n for n, t in TAGS.items() if t["family"].per_token or t["count"] == "token"])
def test_outside_the_mask_a_loss_is_0_and_its_metrics_as_ever(name: str, poison: float) -> None:
    """Whatever stands there: a mean that forgets the mask is wrong by a factor, and not NaN."""
    for loss in modes_of(name):
        batch = random_record(loss.family, 7)
        there = {k: cells for k in batch.tensors() if (cells := inside(batch, k)) is not None}
        real = {k: cells for k, cells in there.items() if batch.tensors()[k].is_floating_point()}
        poisoned = {k: torch.where(cells, batch.tensors()[k], poison) for k, cells in real.items()}
        out, expected = loss(with_fields(batch, poisoned)), loss(batch)
        mask_BT = batch.loss_mask_BT if out.mask_BT is None else out.mask_BT
        assert mask_BT is not None
        close(out.loss, torch.where(mask_BT, expected.loss, 0.0) if out.loss.dim() == 2 else expected.loss)
        for key, value in out.metrics.items():
            close(value, expected.metrics[key])


@pytest.mark.parametrize("name", TAGS)
def test_padding_is_not_logged(name: str) -> None:
    """Two more columns of tokens, or two more places for completions that are not there, change no mean."""
    loss = create_loss(name)
    batch = random_record(loss.family, 8)
    wide = {}
    for field, value in batch.tensors().items():
        for axis in [i for i, letter in enumerate(parts(field)[1]) if letter in "TK"]:
            value = torch.cat([value, torch.zeros_like(value.narrow(axis, 0, 2))], axis)
        wide[field] = value
    found, expected = loss(with_fields(batch, wide)).metrics, loss(batch).metrics
    for key, value in expected.items():
        close(found[key][..., : value.shape[-1]] if value.dim() == 2 else found[key], value)


@pytest.mark.parametrize("name", TAGS)
def test_what_is_logged_is_finite_at_extremes(name: str) -> None:
    for loss in modes_of(name):
        for seed in range(3):
            batch = extreme_record(random_record(loss.family, seed, rows=32, tokens=4, dtype=torch.float32), seed)
            assert [key for key, value in loss(batch).metrics.items() if not bool(value.isfinite().all())] == []
