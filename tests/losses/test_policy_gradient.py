"""Policy-gradient losses and their modifiers: relations between the entries, limits, what each does to gradients."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from prefzoo.losses.base import LOSSES, MODIFIERS, create_loss
from prefzoo.losses.policy_modifiers import entropy_floor, importance_weights
from prefzoo.parts.count import Count
from prefzoo.records import LossOut, PolicyGradient, masked_mean, masked_sum
from prefzoo.registry import UsageError
from prefzoo.testing import check_loss, random_record

WIDE = {"clip": 50.0, "clip_high": 50.0}  # no clip binds
ENTRIES = [n for n in LOSSES.names() if LOSSES.entry(n).tags["family"] is PolicyGradient]
BESIDE = ("entropy_bonus", "kl_penalty")  # terms beside the advantage
ADVANTAGE = [n for n in ENTRIES if n not in (*BESIDE, "a2po")]  # which fits the advantage and does not follow it
PLAIN = [n for n in ADVANTAGE if n != "a2c"]  # nothing but the advantage in them
ROWS = ("sequence_surrogate", "gmpo")  # one value per completion
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def made(seed: int = 0, rows: int = 6, tokens: int = 5, spread: float = 0.5, **fields: Tensor) -> PolicyGradient:
    """A random record whose advantages are one per completion, with the policy's log-probabilities as leaves."""
    record = random_record(PolicyGradient, seed, rows, tokens, spread=spread)
    advantages_BT = record.advantages_BT[:, :1].expand_as(record.advantages_BT).clone()
    record = dataclasses.replace(record, **{"advantages_BT": advantages_BT, **fields})
    return dataclasses.replace(record, logps_BT=record.logps_BT.detach().clone().requires_grad_())


def given(log_ratio_BT: list[list[float]], advantages_B: list[float], **fields: Tensor) -> PolicyGradient:
    """A record of those log-ratios, nothing masked."""
    ratio_BT = torch.tensor(log_ratio_BT, dtype=torch.float64)
    logps_BT = torch.full_like(ratio_BT, -2.0).requires_grad_()
    return PolicyGradient(
        logps_BT=logps_BT,
        old_logps_BT=logps_BT.detach() - ratio_BT,
        advantages_BT=torch.tensor(advantages_B, dtype=torch.float64)[:, None].expand_as(ratio_BT),
        mask_BT=torch.ones_like(ratio_BT, dtype=torch.bool),
        **fields,
    )


def on_policy(record: PolicyGradient) -> PolicyGradient:
    return dataclasses.replace(record, old_logps_BT=record.logps_BT.detach())


def gradient(loss: Tensor, record: PolicyGradient) -> Tensor:
    """d(sum over completions of the loss, summed over tokens)/d(logps)."""
    total = masked_sum(loss, record.mask_BT).sum() if loss.dim() == 2 else loss.sum()
    return torch.autograd.grad(total, record.logps_BT)[0]


def grad_of(name: str, record: PolicyGradient, **options: Any) -> Tensor:
    return gradient(create_loss(name, **options)(record).loss, record)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def inside(record: PolicyGradient, loss: Tensor) -> Tensor:
    return torch.where(record.mask_BT, loss, 0.0) if loss.dim() == 2 else loss


# -- what they share --------------------------------------------------------------------------------------------------


def test_no_loss_is_named_after_a_credit_or_a_count() -> None:
    assert not {"grpo", "dr_grpo", "bnpo", "dapo", "rloo", "ppo"} & set(ENTRIES)
    assert {"reinforce", "a2c", "clipped_surrogate", "sequence_surrogate", "cispo", "gspo", "gmpo"} <= set(ENTRIES)
    assert {"sapo", "luspo", "vespo", "entropy_bonus", "kl_penalty"} <= set(ENTRIES)


@pytest.mark.parametrize("name", PLAIN)
def test_at_ratio_one_the_gradient_is_that_of_reinforce(name: str) -> None:
    """Summed over a completion's tokens it is the same; GMPO's loss is a mean over them."""
    record = on_policy(made())
    length_B = record.mask_BT.sum(-1).double()
    scale_B = 1 / length_B if name == "gmpo" else torch.ones_like(length_B)
    close(grad_of(name, record), grad_of("reinforce", record) * scale_B[:, None])
    close(grad_of("reinforce", record), -torch.where(record.mask_BT, record.advantages_BT, 0.0))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("scale", [0.25, 7.0])
def test_positive_multiples_of_the_advantage_scale_loss_and_gradient(name: str, scale: float) -> None:
    record = made(spread=1.0)
    larger = dataclasses.replace(record, advantages_BT=scale * record.advantages_BT)
    loss = create_loss(name)
    close(inside(record, loss(larger).loss), scale * inside(record, loss(record).loss))
    close(gradient(loss(larger).loss, larger), scale * gradient(loss(record).loss, record))


@pytest.mark.parametrize("name", ["reinforce", "cispo"])
def test_weighted_log_probabilities_are_linear_in_the_advantage(name: str) -> None:
    one, two = made(0), made(0, advantages_BT=random_record(PolicyGradient, 5, 6, 5).advantages_BT)
    both = dataclasses.replace(one, advantages_BT=one.advantages_BT - 2 * two.advantages_BT)
    loss = create_loss(name)
    mask_BT = one.mask_BT
    close(loss(both).loss[mask_BT], (loss(one).loss - 2 * loss(two).loss)[mask_BT])


def test_of_one_token_all_ratios_are_the_same() -> None:
    """A completion of one token: its ratio, its mean and its product are one number."""
    record = given([[-0.3], [0.1], [0.7], [0.02]], [1.0, -2.0, 1.5, -0.5])
    options = {"clip": 0.2, "clip_high": 0.28}
    token_B = create_loss("clipped_surrogate", **options)(record).loss[:, 0]
    for name in ("gspo", "luspo", "sequence_surrogate"):
        loss = create_loss(name, **options)(record).loss
        close(loss.reshape(-1), token_B)
        close(gradient(loss, record), grad_of("clipped_surrogate", record, **options))
    close(create_loss("gmpo", **WIDE)(record).loss, create_loss("clipped_surrogate", **WIDE)(record).loss[:, 0])


@pytest.mark.parametrize("name", PLAIN)
def test_the_kl_that_is_logged_is_that_of_old_to_policy(name: str) -> None:
    """By enumeration of one token, sampled by the old policy."""
    generator = torch.Generator().manual_seed(4)
    policy, old = torch.randn(2, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    record = given([[float(x)] for x in policy - old], [1.0] * 5)
    out = create_loss(name)(record)
    close((old.exp() * out.metrics["approx_kl"].reshape(-1)).sum(), (old.exp() * (old - policy)).sum())


# -- the clip ---------------------------------------------------------------------------------------------------------

RATIOS = [(0.5, "below"), (0.9, "inside"), (1.1, "inside"), (1.6, "above")]


@pytest.mark.parametrize("name", ["clipped_surrogate", "gspo", "luspo", "sequence_surrogate", "gmpo"])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(("ratio", "side"), RATIOS)
def test_the_clip_takes_gradient_only_where_it_would_go_further(
    name: str, advantage: float, ratio: float, side: str
) -> None:
    """A > 0 above the range and A < 0 below it: no gradient; everywhere else the unclipped one."""
    record = given([[math.log(ratio)]], [advantage])
    clips = {"clip": 0.2, "clip_high": 0.28}
    if name == "gmpo":  # the same range, in log space
        clips = {"clip": -math.log(0.8), "clip_high": math.log(1.28)}
    out = create_loss(name, **clips)(record)
    stopped = (side == "above" and advantage > 0) or (side == "below" and advantage < 0)
    close(gradient(out.loss, record), torch.tensor([[0.0 if stopped else -advantage * ratio]], dtype=torch.float64))
    assert float(out.metrics["clip_ratio"].reshape(())) == stopped


@pytest.mark.parametrize("bound", [1.5, 3.0])
def test_the_dual_clip_bounds_the_loss_of_bad_tokens_only(bound: float) -> None:
    record = made(spread=2.0, rows=64)
    plain = create_loss("clipped_surrogate")(record).loss
    out = create_loss("clipped_surrogate", dual_clip=bound)(record).loss
    bad_BT = record.mask_BT & (record.advantages_BT < 0)
    assert bool((out <= -bound * record.advantages_BT + 1e-12)[bad_BT].all())
    close(out[~bad_BT], plain[~bad_BT])
    beyond_BT = bad_BT & (plain > -bound * record.advantages_BT)
    assert 10 < int(beyond_BT.sum()) < int(bad_BT.sum())
    assert bool((gradient(out, record)[beyond_BT] == 0).all())
    close(out[bad_BT & ~beyond_BT], plain[bad_BT & ~beyond_BT])


def test_the_dual_clip_below_the_clip_is_refused() -> None:
    with pytest.raises(UsageError, match=r"dual_clip must exceed 1 \+ clip_high = 1.28, got 1.2"):
        create_loss("clipped_surrogate", clip_high=0.28, dual_clip=1.2)(made())


def test_cispo_keeps_the_gradient_that_the_clip_drops() -> None:
    """At a ratio above the range with A > 0, PPO's gradient is 0 and CISPO's the cap times A; inside both are r A."""
    record = given([[1.0, -0.1, -1.0]], [2.0])
    kept_BT = grad_of("cispo", record, clip=0.2, clip_high=0.28)
    dropped_BT = grad_of("clipped_surrogate", record, clip=0.2, clip_high=0.28)
    close(kept_BT, -2.0 * torch.tensor([[1.28, math.exp(-0.1), 0.8]], dtype=torch.float64))
    close(dropped_BT, -2.0 * torch.tensor([[0.0, math.exp(-0.1), math.exp(-1)]], dtype=torch.float64))
    close(grad_of("cispo", record, clip_high=0.28)[:, 2:], dropped_BT[:, 2:])  # no lower bound
    metrics = create_loss("cispo", clip=0.2, clip_high=0.28)(record).metrics
    assert metrics["clip_ratio"].tolist() == [[1.0, 0.0, 1.0]]


def test_cispo_without_bounds_has_the_gradient_of_the_unclipped_surrogate() -> None:
    record = made(spread=1.0)
    close(grad_of("cispo", record, clip_high=1e9), grad_of("clipped_surrogate", record, clip=1e9))


# -- ratios of whole completions --------------------------------------------------------------------------------------


def test_gspo_of_equal_token_ratios_is_the_clipped_surrogate() -> None:
    record = given([[0.3] * 4, [-0.3] * 4, [0.05] * 4, [0.3] * 4], [1.0, -1.0, 2.0, -2.0])
    clips = {"clip": 0.2, "clip_high": 0.25}
    one, two = create_loss("gspo", **clips)(record), create_loss("clipped_surrogate", **clips)(record)
    close(one.loss, two.loss)
    close(gradient(one.loss, record), gradient(two.loss, record))


def test_gspo_depends_on_the_mean_log_ratio_only() -> None:
    one, two = given([[0.4, -0.2, 0.1]], [1.0]), given([[0.1, 0.1, 0.1]], [1.0])
    close(create_loss("gspo", **WIDE)(one).loss, create_loss("gspo", **WIDE)(two).loss)
    three = given([[0.4, -0.2, 0.1], [0.3, 0.0, 0.0]], [1.0, 1.0])
    product_B = create_loss("sequence_surrogate", **WIDE)(three).metrics["ratio"]
    close(product_B, torch.full_like(product_B, math.exp(0.3)))
    close(create_loss("gspo")(three).metrics["ratio"] ** 3, product_B)  # its n-th root


def test_gspo_per_token_has_the_same_value_and_gives_each_token_its_own_advantage() -> None:
    options = {"clip": 0.3, "clip_high": 0.3}
    for same in (True, False):
        record = made(rows=16)
        if not same:
            record = dataclasses.replace(record, advantages_BT=random_record(PolicyGradient, 3, 16, 5).advantages_BT)
        whole = create_loss("gspo", **options)(record).loss
        token = create_loss("gspo", per_token=True, **options)(record).loss
        close(token[record.mask_BT], whole[record.mask_BT])
        difference = float((gradient(token, record) - gradient(whole, record)).abs().max())
        assert difference < 1e-12 if same else difference > 0.1
    unclipped = create_loss("gspo", per_token=True, **WIDE)(record)
    expected_BT = -unclipped.metrics["ratio"][:, None] * torch.where(record.mask_BT, record.advantages_BT, 0.0)
    close(gradient(unclipped.loss, record), expected_BT)


def test_luspo_is_gspo_times_the_length() -> None:
    record, clips = made(), {"clip": 0.1, "clip_high": 0.2}
    gspo, luspo = create_loss("gspo", **clips), create_loss("luspo", **clips)
    length_B = record.mask_BT.sum(-1).double()
    assert len(set(length_B.tolist())) > 1
    close(
        Count(luspo.count).total(luspo(record).loss, record.mask_BT),
        Count(gspo.count).total(gspo(record).loss, record.mask_BT, length_B),
    )


def test_gmpo_is_at_most_the_mean_of_the_clipped_ratios() -> None:
    """The geometric mean of what it clips is not above the arithmetic one; equal where the ratios are."""
    record = made(spread=1.0, rows=32)
    log_ratio_BT = torch.where(record.mask_BT, record.logps_BT - record.old_logps_BT, 0.0).detach()
    good_B = record.advantages_BT[:, 0] > 0
    clipped_BT = torch.where(good_B[:, None], log_ratio_BT.clamp(max=0.4), log_ratio_BT.clamp(min=-0.4))
    ratio_B = create_loss("gmpo")(record).metrics["ratio"]
    mean_B = masked_mean(clipped_BT.exp(), record.mask_BT)
    assert bool((ratio_B <= mean_B + 1e-12).all())
    assert int((ratio_B < mean_B - 1e-3).sum()) > 10
    close(create_loss("gmpo")(given([[0.3] * 3], [1.0])).loss, torch.tensor([-math.exp(0.3)], dtype=torch.float64))


def test_gmpo_clips_in_log_space_by_the_sign_of_the_advantage() -> None:
    good, bad = given([[0.9, -0.9, 0.1]], [1.0]), given([[0.9, -0.9, 0.1]], [-1.0])
    clips = {"clip": 0.2, "clip_high": 0.5}
    close(create_loss("gmpo", **clips)(good).loss, -torch.tensor([0.5 - 0.9 + 0.1], dtype=torch.float64).div(3).exp())
    close(create_loss("gmpo", **clips)(bad).loss, torch.tensor([0.9 - 0.2 + 0.1], dtype=torch.float64).div(3).exp())


# -- soft gates -------------------------------------------------------------------------------------------------------


def test_sapo_at_temperature_zero_is_the_unclipped_surrogate() -> None:
    record = made(spread=1.0)
    soft_BT = grad_of("sapo", record, temperature_pos=1e-6, temperature_neg=1e-6)
    close(soft_BT, grad_of("clipped_surrogate", record, **WIDE), 1e-5)


def test_sapo_at_a_large_temperature_learns_from_ratio_one_only() -> None:
    record = given([[0.0, 0.02, -0.02]], [1.0])
    gradient_BT = grad_of("sapo", record, temperature_pos=1e5)
    close(gradient_BT, torch.tensor([[-1.0, 0.0, 0.0]], dtype=torch.float64))


def test_sapo_takes_its_temperature_by_the_sign_of_the_advantage() -> None:
    record = made(spread=1.0, rows=16)
    loss_BT = create_loss("sapo")(record).loss
    other_BT = create_loss("sapo", temperature_neg=3.0)(record).loss
    changed_BT = record.mask_BT & (loss_BT != other_BT)
    assert bool((record.advantages_BT < 0)[changed_BT].all())
    assert int(changed_BT.sum()) > 5
    gate_BT = create_loss("sapo")(record).metrics["gate"]
    ratio_BT = create_loss("sapo")(record).metrics["ratio"]
    close(gradient(loss_BT, record), -torch.where(record.mask_BT, gate_BT * ratio_BT * record.advantages_BT, 0.0))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_vespo_weighs_by_a_kernel_that_is_one_on_policy_and_largest_at_k_over_lambda(sign: float) -> None:
    options = {"k_pos": 2.0, "lambda_pos": 1.0, "k_neg": 1.0, "lambda_neg": 2.0}
    peak = 2.0 if sign > 0 else 0.5
    log_w = [0.0, math.log(peak), math.log(peak) + 0.01, math.log(peak) - 0.01, 10.0, -15.0]
    record = given([[w / 2, w / 2] for w in log_w], [sign] * len(log_w))
    out = create_loss("vespo", **options)(record)
    phi = out.metrics["phi"][:, 0]
    close(phi[0], torch.ones((), dtype=torch.float64))
    assert bool((phi[1] > phi[2:]).all())
    assert bool((phi[4:] < 1e-5).all())
    close(gradient(out.loss, record), -sign * out.metrics["phi"])  # no gradient through the kernel


def test_vespo_bounds_its_weight_and_the_tokens_in_it() -> None:
    record = given([[100.0, -30.0], [15.0, 15.0], [-15.0, -15.0], [1.0, 2.0]], [1.0] * 4)
    expected_B = torch.tensor([1.0, math.exp(20.0), 1e-8, math.exp(3.0)], dtype=torch.float64)
    close(create_loss("vespo")(record).metrics["ratio"], expected_B)


def test_vespo_is_finite_with_a_kernel_that_nothing_bends_down() -> None:
    """λ = 0: the weight is W^k, which no number holds at the largest W."""
    made = given([[15.0, 15.0]], [1.0]).tensors()
    record = PolicyGradient(**{k: v.float() if v.is_floating_point() else v for k, v in made.items()})
    loss_BT = create_loss("vespo", k_pos=30.0, lambda_pos=0.0)(record).loss
    assert bool(loss_BT.isfinite().all())


@pytest.mark.parametrize("name", ROWS)
def test_what_a_loss_of_completions_logs_is_the_mean_over_their_tokens(name: str) -> None:
    """In nats per token, and as a share of the tokens."""
    record = random_record(PolicyGradient, 3, 12, 7)
    token_BT = create_loss("clipped_surrogate")(record).metrics["approx_kl"]
    close(create_loss(name)(record).metrics["approx_kl"], masked_mean(token_BT, record.mask_BT))
    higher = dataclasses.replace(
        record, old_logps_BT=record.logps_BT - 0.5, advantages_BT=torch.ones_like(record.advantages_BT)
    )
    assert create_loss(name, clip=0.1)(higher).metrics["clip_ratio"].tolist() == [1.0] * 12
    assert create_loss(name, clip=1e9)(higher).metrics["clip_ratio"].tolist() == [0.0] * 12


def test_vespo_multiplies_the_correction_into_its_weight() -> None:
    """With the correction unbounded its weight is π / sampling, whichever way the correction is counted."""
    record = made(rows=8)
    target = create_loss("vespo")(dataclasses.replace(record, old_logps_BT=record.sampling_logps_BT))
    for correction in ("token_truncate", "sequence_truncate"):
        out = create_loss("vespo", correction=correction, correction_max=1e6)(record)
        close(out.loss[record.mask_BT], target.loss[record.mask_BT], 1e-9)
        close(out.metrics["ratio"], target.metrics["ratio"], 1e-9)
    dropped = given([[9.0, 3.0]], [1.0], sampling_logps_BT=torch.tensor([[-11.0, -9.0]], dtype=torch.float64))
    found = create_loss("vespo", correction="token_mask")(dropped)  # a dropped token has the least weight, not none
    assert dropped.old_logps_BT.tolist() == [[-11.0, -5.0]]
    close(found.metrics["ratio"], torch.tensor([math.exp(12.0) * 1e-8], dtype=torch.float64))
    masked = create_loss("vespo", correction="sequence_mask", correction_max=1e-3)(record)  # all are out of range
    assert float(masked.metrics["phi"][record.mask_BT].max()) < 1e-6


# -- terms and counts -------------------------------------------------------------------------------------------------


def test_a2c_is_reinforce_and_an_entropy_bonus() -> None:
    record = made()
    record = dataclasses.replace(record, entropy_BT=record.entropy_BT.clone().requires_grad_())
    loss = create_loss("a2c", entropy=0.3)(record).loss
    parts = [create_loss(n)(record).loss for n in ("reinforce", "entropy_bonus")]
    close(loss, parts[0] + 0.3 * parts[1])
    (entropy_BT,) = torch.autograd.grad(loss.sum(), record.entropy_BT)
    close(entropy_BT, -0.3 * record.mask_BT.double())
    assert create_loss("a2c").extras == ("entropy_BT",)
    without = create_loss("a2c", entropy=0.0)
    assert without.extras == ()
    close(without(dataclasses.replace(record, entropy_BT=None)).loss, parts[0])


def test_grpo_dr_grpo_bnpo_and_dapo_are_counts_of_one_loss() -> None:
    """Of completions of one length they are one number; of different lengths they weigh completions differently."""
    equal = given([[0.1, -0.4, 0.3, 0.0], [0.5, 0.2, -0.1, -0.3]], [1.0, -1.0])
    loss_BT = create_loss("clipped_surrogate")(equal).loss
    grpo, token, dr_grpo = Count("row"), Count("token"), Count("constant", constant=4)
    close(grpo.mean(loss_BT, equal.mask_BT), token.mean(loss_BT, equal.mask_BT))
    close(dr_grpo.mean(loss_BT, equal.mask_BT), token.mean(loss_BT, equal.mask_BT))

    record = made()
    loss_BT, mask_BT = create_loss("clipped_surrogate", clip_high=0.28)(record).loss, record.mask_BT
    length_B, rows = mask_BT.sum(-1).double(), len(mask_BT)
    assert len(set(length_B.tolist())) > 1
    sum_B = masked_sum(loss_BT, mask_BT)
    close(grpo.mean(loss_BT, mask_BT), (sum_B / length_B).mean())
    close(token.mean(loss_BT, mask_BT), sum_B.sum() / length_B.sum())  # BNPO of one batch, and DAPO
    close(dr_grpo.mean(loss_BT, mask_BT), sum_B.sum() / (4 * rows))
    close(dr_grpo.mean(loss_BT, mask_BT), token.mean(loss_BT, mask_BT) * length_B.sum() / (4 * rows))
    assert float((grpo.mean(loss_BT, mask_BT) - token.mean(loss_BT, mask_BT)).detach().abs()) > 1e-3


def test_the_level_of_the_kls_ratio() -> None:
    record = made()
    token = create_loss("kl_penalty", importance=True)(record).loss
    sequence = create_loss("kl_penalty", importance=True, level="sequence")(record).loss
    plain = create_loss("kl_penalty")(record).loss
    ratio_B = create_loss("gspo")(record).metrics["ratio"]
    close(inside(record, sequence), inside(record, ratio_B[:, None] * plain))
    assert not torch.equal(token, sequence)
    one = given([[0.3], [-0.2]], [1.0, 1.0], ref_logps_BT=torch.tensor([[-1.0], [-2.5]], dtype=torch.float64))
    close(*[create_loss("kl_penalty", importance=True, level=k)(one).loss for k in ("token", "sequence")])
    with pytest.raises(UsageError, match="level='sequence' is the level of the ratio; it needs importance=True"):
        create_loss("kl_penalty", level="sequence")(record)


# -- modifiers: the correction for the sampler ------------------------------------------------------------------------


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("name", ADVANTAGE)
def test_a_sampler_that_agrees_with_the_learner_needs_no_correction(name: str, correction: str) -> None:
    """Bit for bit, loss and gradient."""
    record = made(spread=1.0)
    record = dataclasses.replace(record, sampling_logps_BT=record.old_logps_BT)
    if name in ROWS and correction.startswith("token"):
        with pytest.raises(UsageError, match=f"take correction='{correction.replace('token', 'sequence')}'"):
            create_loss(name, correction=correction)(record)
        return
    plain, out = create_loss(name)(record).loss, create_loss(name, correction=correction)(record).loss
    assert torch.equal(inside(record, out), inside(record, plain))
    assert torch.equal(gradient(out, record), gradient(plain, record))


def test_weights_of_a_completion_are_the_product_over_its_tokens() -> None:
    record = made()
    args = (record.old_logps_BT, record.sampling_logps_BT, record.mask_BT)
    token_BT = importance_weights(*args, correction="token_truncate", correction_max=1e9)
    whole_BT = importance_weights(*args, correction="sequence_truncate", correction_max=1e9)
    product_B = torch.where(record.mask_BT, token_BT, 1.0).prod(-1)
    close(whole_BT, product_B[:, None] * record.mask_BT)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_weights_are_truncated_to_the_bounds_or_dropped_outside_them(kind: str) -> None:
    record = made(spread=1.5, rows=32)
    args = (record.old_logps_BT, record.sampling_logps_BT, record.mask_BT)
    free_BT = importance_weights(*args, correction=f"{kind}_truncate", correction_max=1e9)
    bounds = {"correction_max": 1.5, "correction_min": 0.5}
    cut_BT = importance_weights(*args, correction=f"{kind}_truncate", **bounds)
    kept_BT = importance_weights(*args, correction=f"{kind}_mask", **bounds)
    mask_BT = record.mask_BT
    out_BT = mask_BT & ((free_BT > 1.5) | (free_BT < 0.5))
    assert 5 < int(out_BT.sum()) < int(mask_BT.sum())
    close(cut_BT[mask_BT], free_BT[mask_BT].clamp(0.5, 1.5))
    assert bool((kept_BT[out_BT] == 0).all())
    assert torch.equal(kept_BT[mask_BT & ~out_BT], free_BT[mask_BT & ~out_BT])
    assert not importance_weights(*args).requires_grad


def test_the_corrected_gradient_is_that_of_the_learners_own_samples() -> None:
    """By enumeration of one token: samples of the sampler, weighted, have the expected gradient of samples of old."""
    generator = torch.Generator().manual_seed(3)
    policy, old, sampling = torch.randn(3, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    policy = policy.clone().requires_grad_()
    record = PolicyGradient(
        logps_BT=policy[:, None],
        old_logps_BT=old[:, None],
        sampling_logps_BT=sampling[:, None],
        advantages_BT=torch.randn(5, 1, generator=generator, dtype=torch.float64),
        mask_BT=torch.ones(5, 1, dtype=torch.bool),
    )
    plain_B = create_loss("clipped_surrogate")(record).loss[:, 0]
    weighted_B = create_loss("clipped_surrogate", correction="token_truncate", correction_max=1e3)(record).loss[:, 0]
    wanted, found = (
        torch.autograd.grad((probability.exp() * loss_B).sum(), policy, retain_graph=True)[0]
        for probability, loss_B in ((old, plain_B), (sampling, weighted_B))
    )
    close(found, wanted)
    (naive,) = torch.autograd.grad((sampling.exp() * plain_B).sum(), policy)
    assert float((naive - wanted).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"correction_max": 2.0}, "but correction='none'"),
        ({"correction_min": 0.5}, "but correction='none'"),
        ({"correction": "token_truncate", "correction_min": 3.5}, "correction_min=3.5, correction_max=3.0"),
        ({"correction": "token_truncate", "correction_min": -0.5}, "'correction_min'.*got -0.5"),
        ({"correction": "token"}, "token_truncate"),
    ],
)
@pytest.mark.parametrize("name", ["clipped_surrogate", "vespo"])
def test_bounds_without_effect_or_sense_are_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        create_loss(name, **options)(made())


# -- modifiers: masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADVANTAGE)
def test_the_off_policy_mask_drops_bad_completions_that_have_drifted_and_nothing_else(name: str) -> None:
    record = made(rows=16, spread=1.0)
    drift_B = masked_mean(record.sampling_logps_BT - record.logps_BT.detach(), record.mask_BT)
    drop_B = (record.advantages_BT[:, 0] < 0) & (drift_B > 0.1)
    drifted_B, bad_B = drift_B > 0.1, record.advantages_BT[:, 0] < 0
    assert all(int(case_B.sum()) > 0 for case_B in (drop_B, drifted_B & ~bad_B, bad_B & ~drifted_B))
    plain, out = create_loss(name)(record), create_loss(name, off_policy_threshold=0.1)(record)
    kept_B = ~drop_B
    shape = (-1,) if out.loss.dim() == 1 else (-1, 1)
    assert torch.equal(inside(record, out.loss), inside(record, plain.loss) * kept_B.view(shape))
    close(gradient(out.loss, record), gradient(plain.loss, record) * kept_B[:, None])
    assert torch.equal(out.metrics["off_policy/dropped"], drop_B.double())


def test_what_is_dropped_still_counts() -> None:
    """The mean divides by all tokens, so a mask is a weight of 0 and no smaller batch."""
    record = made(rows=16, spread=1.0)
    plain = create_loss("clipped_surrogate")(record).loss
    out = create_loss("clipped_surrogate", off_policy_threshold=0.1)(record)
    kept_B = out.metrics["off_policy/dropped"] == 0
    total = masked_sum(plain, record.mask_BT)[kept_B].sum()
    close(Count("token").mean(out.loss, record.mask_BT), total / record.mask_BT.sum())


def test_only_the_tokens_of_high_entropy_have_gradient() -> None:
    record = made(rows=16)
    floor = entropy_floor(record.entropy_BT, record.mask_BT, 0.3)
    record = dataclasses.replace(record, entropy_floor=floor)
    kept_BT = record.mask_BT & (record.entropy_BT >= floor)
    assert 0.2 < float(kept_BT.sum() / record.mask_BT.sum()) < 0.4
    for name in ADVANTAGE:
        if name in ROWS:
            with pytest.raises(UsageError, match="the modifier chooses tokens"):
                create_loss(name, high_entropy=True)
            continue
        plain, out = create_loss(name)(record).loss, create_loss(name, high_entropy=True)(record).loss
        assert torch.equal(inside(record, out), torch.where(kept_BT, plain, 0.0))
    chosen = grad_of("clipped_surrogate", record, high_entropy=True)
    assert torch.equal(chosen, torch.where(kept_BT, grad_of("clipped_surrogate", record), 0.0))


@pytest.mark.parametrize("quantile", [0.05, 0.2, 0.5, 1.0])
def test_the_entropy_floor_is_the_quantile_of_the_masked_entropies(quantile: float) -> None:
    record = random_record(PolicyGradient, 2, 40, 9)
    entropy_BT = torch.where(record.mask_BT, record.entropy_BT, 1e9)  # what is masked does not count
    floor = entropy_floor(entropy_BT.requires_grad_(), record.mask_BT, quantile)
    assert not floor.requires_grad
    close(floor, torch.quantile(entropy_BT[record.mask_BT].detach(), 1 - quantile))
    share = float((entropy_BT[record.mask_BT] >= floor).double().mean())
    assert abs(share - quantile) <= 1 / int(record.mask_BT.sum())


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("quantile", [0.01, 0.5, 1.0])
def test_the_entropy_floor_of_a_few_tokens(count: int, quantile: float) -> None:
    entropy_BT = torch.tensor([[2.0, 0.5, 3.0]], dtype=torch.float64)[:, :count]
    floor = entropy_floor(entropy_BT, entropy_BT > 0, quantile)
    close(floor, torch.quantile(entropy_BT, 1 - quantile))


def test_the_entropy_floor_of_nothing_is_zero_and_a_share_of_nothing_refused() -> None:
    entropy_BT = torch.tensor([[1.0, 2.0]])
    assert float(entropy_floor(entropy_BT, entropy_BT < 0, 0.5)) == 0
    for quantile in (0.0, 1.2):
        with pytest.raises(UsageError, match=f"above 0 and at most 1; got {quantile}"):
            entropy_floor(entropy_BT, entropy_BT > 0, quantile)


def test_modifiers_act_together_in_any_order() -> None:
    record = made(rows=16, spread=1.0)
    record = dataclasses.replace(record, entropy_floor=entropy_floor(record.entropy_BT, record.mask_BT, 0.5))
    options = {"correction": "token_truncate", "off_policy_threshold": 0.1, "high_entropy": True}
    loss = create_loss("clipped_surrogate", **options)
    assert [m.name for m, _ in loss.modifiers] == ["sampler_correction", "off_policy_mask", "high_entropy"]
    assert set(loss.extras) == {"sampling_logps_BT", "entropy_BT", "entropy_floor"}
    out = loss(record)
    weight_BT = out.metrics["correction/weight"] * (1 - out.metrics["off_policy/dropped"])[:, None]
    close(out.loss, create_loss("clipped_surrogate")(record).loss * weight_BT * out.metrics["entropy/kept"])
    reached = record
    call = create_loss("clipped_surrogate")
    for name, given_options in (
        ("sampler_correction", {"correction": "token_truncate"}),
        ("high_entropy", {"high_entropy": True}),
        ("off_policy_mask", {"off_policy_threshold": 0.1}),
    ):

        def around(batch: PolicyGradient, inner: Any = call, n: str = name, o: Any = given_options) -> LossOut:
            return MODIFIERS.entry(n).function(inner, batch, **o)

        call = around
    close(call(reached).loss, out.loss)


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize(
    "options", [{"correction": "token_truncate"}, {"off_policy_threshold": 0.1}, {"high_entropy": True}]
)
def test_terms_beside_the_advantage_refuse_the_modifiers(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="does not apply, because it"):
        create_loss(name, **options)


@pytest.mark.parametrize(
    ("options", "fields", "words"),
    [
        ({"correction": "token_truncate"}, ["sampling_logps_BT"], "sampling_logps_BT is None"),
        ({"off_policy_threshold": 0.1}, ["sampling_logps_BT"], "sampling_logps_BT is None"),
        ({"high_entropy": True}, ["entropy_BT"], "entropy_BT and PolicyGradient.entropy_floor"),
        ({"high_entropy": True}, ["entropy_floor"], "entropy_BT and PolicyGradient.entropy_floor"),
    ],
)
def test_what_a_modifier_needs_it_asks_for(options: dict[str, Any], fields: list[str], words: str) -> None:
    record = dataclasses.replace(made(), **dict.fromkeys(fields))
    with pytest.raises(UsageError, match=words):
        create_loss("clipped_surrogate", **options)(record)


# -- the contract -----------------------------------------------------------------------------------------------------

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("a2c", {"entropy": 0.0}),
    ("cispo", {"clip": 0.2, "clip_high": 0.28}),
    ("gspo", {"per_token": True}),
    ("gspo", {"clip": 0.2, "clip_high": None}),
    ("sequence_surrogate", {"clip_high": 0.28}),
    ("gmpo", {"clip_high": 0.8}),
    ("sapo", {"temperature_pos": 2.0, "temperature_neg": 4.0}),
    ("vespo", {"correction": "token_truncate"}),
    ("vespo", {"correction": "sequence_mask", "correction_min": 0.5}),
    ("kl_penalty", {"importance": True, "level": "sequence"}),
    ("reinforce", {"correction": "token_mask", "correction_min": 0.5, "off_policy_threshold": 0.1}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_contract_of_variants(name: str, options: dict[str, Any]) -> None:
    check_loss(name, **options)
