"""Relations of the unpaired losses: to their pairwise forms, to one another, monotone, and what crosses rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from prefzoo.losses.base import create_loss
from prefzoo.losses.unpaired import class_midpoint, class_weights, density_ratio_weights, kto_baseline
from prefzoo.parts.count import Count
from prefzoo.records import Pairs, Unpaired
from prefzoo.registry import UsageError
from prefzoo.testing import check_loss, random_record

SEEDS = range(3)
LOSSES = ("kto", "apo_zero_unpaired", "bco")
VARIANTS = [
    ("kto", {"beta": 5.0}),
    ("kto", {"desirable_weight": 0.5, "undesirable_weight": 1.33}),
    ("apo_zero_unpaired", {"beta": 5.0}),
    ("apo_zero_unpaired", {"desirable_weight": 0.5}),
    ("bco", {"beta": 5.0}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_contract_of_variants(name: str, options: dict[str, float]) -> None:
    check_loss(name, **options)


def of_ratios(ratio_B: Tensor, desirable_B: Tensor, **fields: Tensor) -> Unpaired:
    """Completions of one token with these log-ratios."""
    logps_BT = ratio_B[:, None] - 2
    mask_BT = torch.ones_like(logps_BT, dtype=torch.bool)
    ref_BT = torch.full_like(logps_BT, -2.0)
    return Unpaired(logps_BT=logps_BT, ref_logps_BT=ref_BT, mask_BT=mask_BT, desirable_B=desirable_B, **fields)


def taken_apart(pairs: Pairs, **fields: Tensor) -> tuple[Unpaired, Unpaired]:
    """The chosen sides as desirable rows, the rejected ones as undesirable rows."""
    rows = len(pairs.chosen_logps_BT)
    sides = []
    for side, desirable in (("chosen", True), ("rejected", False)):
        sides.append(
            Unpaired(
                logps_BT=getattr(pairs, f"{side}_logps_BT"),
                ref_logps_BT=getattr(pairs, f"ref_{side}_logps_BT"),
                mask_BT=getattr(pairs, f"{side}_mask_BT"),
                desirable_B=torch.full((rows,), desirable),
                **fields,
            )
        )
    return sides[0], sides[1]


# -- the same mathematics as a pairwise loss, side by side ------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_bco_without_shift_is_bco_pair_taken_apart(seed: int, beta: float) -> None:
    pairs = random_record(Pairs, seed, spread=2.0)
    sides = taken_apart(pairs, delta=torch.tensor(0.0, dtype=torch.float64))
    total_B = sum(create_loss("bco", beta=beta)(side).loss for side in sides)
    torch.testing.assert_close(total_B, create_loss("bco_pair", beta=beta)(pairs).loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_apo_zero_unpaired_is_apo_zero_taken_apart(seed: int) -> None:
    pairs = random_record(Pairs, seed, spread=2.0)
    total_B = sum(create_loss("apo_zero_unpaired", beta=0.7)(side).loss for side in taken_apart(pairs))
    torch.testing.assert_close(total_B, create_loss("apo_zero", beta=0.7)(pairs).loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_apo_zero_unpaired_is_kto_with_baseline_0(seed: int) -> None:
    batch = dataclasses.replace(random_record(Unpaired, seed), baseline=torch.tensor(0.0, dtype=torch.float64))
    options = {"beta": 0.7, "desirable_weight": 0.8, "undesirable_weight": 1.3}
    kto, apo = (create_loss(name, **options)(batch) for name in ("kto", "apo_zero_unpaired"))
    assert torch.equal(kto.loss, apo.loss)
    assert all(torch.equal(kto.metrics[k], v) for k, v in apo.metrics.items())


def test_bco_at_the_shift_is_log_2_and_kto_at_the_baseline_a_half() -> None:
    desirable_B = torch.tensor([True, False])
    batch = of_ratios(torch.tensor([0.6, 0.6]), desirable_B, delta=torch.tensor(0.6), baseline=torch.tensor(0.6))
    torch.testing.assert_close(create_loss("bco", beta=2.0)(batch).loss, torch.full((2,), 2.0).log())
    torch.testing.assert_close(create_loss("kto", beta=2.0)(batch).loss, torch.full((2,), 0.5))


# -- monotone, and symmetric in the labels ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_monotone_in_the_ratio(name: str) -> None:
    ratio_B = torch.linspace(-40, 40, 81, dtype=torch.float64)
    fields = {"baseline": torch.tensor(0.4).double(), "delta": torch.tensor(0.3).double()}
    for desirable, sign in ((True, -1.0), (False, 1.0)):
        batch = of_ratios(ratio_B, torch.full((81,), desirable), **fields)
        steps_B = create_loss(name, beta=0.3)(batch).loss.diff()
        assert bool((sign * steps_B > 0).all()), f"{name} with desirable={desirable} turns"


@pytest.mark.parametrize("name", LOSSES)
def test_other_label_is_mirrored_ratio(name: str) -> None:
    """The loss of an undesirable row at s is that of a desirable row mirrored at the anchor."""
    ratio_B = torch.linspace(-3, 3, 9, dtype=torch.float64)
    anchor = 0.0 if name == "apo_zero_unpaired" else 0.4
    fields = {"baseline": torch.tensor(anchor).double(), "delta": torch.tensor(anchor).double()}
    loss = create_loss(name, beta=0.5)
    down = loss(of_ratios(ratio_B, torch.zeros(9, dtype=torch.bool), **fields))
    mirrored = loss(of_ratios(2 * anchor - ratio_B, torch.ones(9, dtype=torch.bool), **fields))
    torch.testing.assert_close(down.loss, mirrored.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        down.metrics["rewards/margins"], mirrored.metrics["rewards/margins"], rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_is_right_where_its_reward_is_on_the_labelled_side_of_the_anchor(name: str) -> None:
    ratio_B, desirable_B = torch.tensor([2.0, -2.0, 2.0, -2.0]), torch.tensor([True, True, False, False])
    batch = of_ratios(ratio_B, desirable_B, baseline=torch.tensor(0.4), delta=torch.tensor(0.3))
    metrics = create_loss(name, beta=0.5)(batch).metrics
    assert metrics["rewards/accuracies"].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert metrics["rewards"].tolist() == [1.0, -1.0, 1.0, -1.0]
    assert metrics["logps"].tolist() == [0.0, -4.0, 0.0, -4.0]


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_class_weights_scale_their_class_only(name: str) -> None:
    batch = random_record(Unpaired)
    plain = create_loss(name)(batch).loss
    heavy = create_loss(name, desirable_weight=3.0)(batch).loss
    assert torch.equal(heavy, torch.where(batch.desirable_B, 3.0 * plain, plain))
    light = create_loss(name, undesirable_weight=0.7)(batch).loss
    torch.testing.assert_close(light, torch.where(batch.desirable_B, plain, 0.7 * plain), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("name", "field"), [("kto", "baseline"), ("bco", "delta")])
def test_what_crosses_rows_is_asked_for_in_words(name: str, field: str) -> None:
    batch = dataclasses.replace(random_record(Unpaired), **{field: None})
    with pytest.raises(UsageError, match=rf"{name}.*Unpaired\.{field}"):
        create_loss(name)(batch)


# -- what crosses rows, made outside the losses -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_midpoint_is_as_far_from_both_classes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards_B = torch.randn(9, generator=generator, dtype=torch.float64)
    desirable_B = torch.arange(9) < 2  # uneven classes: the mean of all rewards is another number
    delta = class_midpoint(rewards_B, desirable_B)
    torch.testing.assert_close(rewards_B[desirable_B].mean() - delta, delta - rewards_B[~desirable_B].mean())
    assert abs(float(delta - rewards_B.mean())) > 1e-3


def test_of_one_class_the_shift_is_its_mean_and_weights_are_1() -> None:
    rewards_B = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    for desirable in (True, False):
        desirable_B = torch.full((3,), desirable)
        delta = class_midpoint(rewards_B, desirable_B)
        assert float(delta) == 3.0 and not delta.requires_grad
        assert class_weights(desirable_B).tolist() == [1.0, 1.0, 1.0]
    assert float(class_midpoint(torch.zeros(0), torch.zeros(0, dtype=torch.bool))) == 0.0
    assert class_weights(torch.zeros(0, dtype=torch.bool)).shape == (0,)


@pytest.mark.parametrize("desirable", [1, 3, 5])
def test_class_weights_give_the_paper_s_sum_of_class_means(desirable: int) -> None:
    batch = random_record(Unpaired, rows=6)
    batch = dataclasses.replace(batch, desirable_B=torch.arange(6) < desirable)
    loss_B = create_loss("bco")(batch).loss
    weight_B = class_weights(batch.desirable_B, torch.float64)
    expected = loss_B[:desirable].mean() + loss_B[desirable:].mean()
    torch.testing.assert_close(Count("row").mean(loss_B, weight_B=weight_B), expected)
    torch.testing.assert_close(Count("weight").mean(loss_B, weight_B=weight_B), expected / 2)


def test_class_weights_survive_a_split_into_micro_batches() -> None:
    """They are of the whole batch: summed over uneven micro-batches and divided once, nothing changes."""
    batch = random_record(Unpaired, rows=6)
    loss_B, weight_B = create_loss("bco")(batch).loss, class_weights(batch.desirable_B, torch.float64)
    parts = (slice(0, 1), slice(1, 4), slice(4, 6))
    count = Count("row")
    total = sum(count.total(loss_B[part], weight_B=weight_B[part]) for part in parts)
    size = sum(count.size(len(loss_B[part]), weight_B=weight_B[part]) for part in parts)
    torch.testing.assert_close(total / size, count.mean(loss_B, weight_B=weight_B))


def test_density_ratio_weights_make_undesirable_rows_look_like_desirable_ones() -> None:
    """On a population with known densities of prompts, weighted undesirable rows have the desirable density."""
    desirable_x, undesirable_x = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    probability_x = desirable_x / (desirable_x + undesirable_x)  # of a classifier trained on balanced classes
    weight_x = density_ratio_weights(probability_x, torch.zeros(3, dtype=torch.bool), min_ratio=0.0)
    torch.testing.assert_close(weight_x * undesirable_x, desirable_x)
    assert density_ratio_weights(probability_x, torch.ones(3, dtype=torch.bool)).tolist() == [1.0, 1.0, 1.0]


def test_density_ratio_weights_are_bounded_and_detached() -> None:
    probability_B = torch.tensor([0.0, 0.2, 0.75, 1.0], dtype=torch.float64, requires_grad=True)
    weight_B = density_ratio_weights(probability_B, torch.zeros(4, dtype=torch.bool))
    torch.testing.assert_close(weight_B, torch.tensor([0.5, 0.5, 3.0, 10.0], dtype=torch.float64))
    assert not weight_B.requires_grad
    with pytest.raises(UsageError, match="min_ratio=3"):
        density_ratio_weights(probability_B, torch.zeros(4, dtype=torch.bool), min_ratio=3.0, max_ratio=2.0)


def test_baseline_is_clamped_from_below_only() -> None:
    assert float(kto_baseline(torch.tensor([-3.0, 1.0]))) == 0.0
    assert float(kto_baseline(torch.tensor([-1.0, 5.0]))) == 2.0
    assert not kto_baseline(torch.ones(2, requires_grad=True)).requires_grad
