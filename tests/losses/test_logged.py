"""What losses log: rewards, log-probabilities and likelihoods of the right side, in the right unit, inside the mask."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from prefzoo.losses.base import LOSSES, create_loss
from prefzoo.records import Pairs, Unpaired, masked_sum
from prefzoo.testing import random_record
from prefzoo.trial import inside, with_fields

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


@pytest.mark.parametrize("poison", [1e9, -1e9, math.inf, math.nan])
@pytest.mark.parametrize("name", [n for n, t in TAGS.items() if t["family"].per_token or t["count"] == "token"])
def test_outside_the_mask_a_loss_is_0_and_its_metrics_as_ever(name: str, poison: float) -> None:
    """Whatever stands there: a mean that forgets the mask is wrong by a factor, and not NaN."""
    loss = create_loss(name)
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
