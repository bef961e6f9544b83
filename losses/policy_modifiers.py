"""Modifiers of policy-gradient losses: correction for the sampler, masks of samples and of tokens.

Each is a function around the loss, which weights or drops its values by weights without gradient, so their order does
not matter. What is dropped counts as 0 in the mean: the term's count still counts its tokens and rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from prefzoo.losses.base import register_modifier
from prefzoo.losses.numerics import masked, safe_exp
from prefzoo.records import LossOut, PolicyGradient, masked_mean, masked_sum
from prefzoo.registry import NotNegative, Positive, UsageError

PolicyLoss = Callable[[PolicyGradient], LossOut]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def _above_sampler(logps_BT: Tensor, sampling_logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log π(y_t) - what the sampler reported, (B, T), detached; 0 outside the mask, and where it reported NaN."""
    return masked((logps_BT - sampling_logps_BT).detach(), mask_BT & ~sampling_logps_BT.isnan())


@torch.no_grad()
def importance_weights(
    old_logps_BT: Tensor,
    sampling_logps_BT: Tensor,
    mask_BT: Tensor,
    *,
    correction: Correction = "token_truncate",
    correction_max: float = 3.0,
    correction_min: float | None = None,
) -> Tensor:
    """Weights from the program that sampled to the learner's model, (B, T), 0 outside the mask, without gradient.

        w = exp(old_t - sampling_t)  per token,  or  exp(Σ_t (old_t - sampling_t))  per sequence, for all its tokens
        truncate: clip(w, correction_min, correction_max)      mask: w, or 0 where w is outside that range

    Args:
        old_logps_BT: log-probabilities under the learner's model at the start of the update, (B, T), in nats.
        sampling_logps_BT: what the sampler itself reported, (B, T), in nats. NaN where it reported nothing: weight 1.
        mask_BT: the sampled tokens.
        correction: how; ``"none"`` gives ones.
        correction_max: largest weight.
        correction_min: least weight. None: no bound.

    Source: Yao et al., Your efficient RL framework secretly brings you off-policy RL training, 2025.

    >>> old_BT, sampling_BT, mask_BT = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -3.0]]), torch.ones(1, 2) > 0
    >>> importance_weights(old_BT, sampling_BT, mask_BT)
    tensor([[1., 3.]])
    >>> importance_weights(old_BT, sampling_BT, mask_BT, correction="sequence_mask")
    tensor([[0., 0.]])
    """
    if correction not in get_args(Correction):
        raise UsageError(f"no correction {correction!r}. Known: {', '.join(get_args(Correction))}.")
    if not correction_max > 0 or not (correction_min is None or 0 <= correction_min < correction_max):
        raise UsageError(
            f"correction_min={correction_min!r}, correction_max={correction_max!r}: weights lie between a least one of "
            "at least 0 and a larger one above 0."
        )
    log_weight_BT = _above_sampler(old_logps_BT, sampling_logps_BT, mask_BT)
    if correction == "none":
        return mask_BT.to(log_weight_BT.dtype)
    if correction.startswith("sequence"):
        log_weight_BT = log_weight_BT.sum(-1, keepdim=True).expand_as(log_weight_BT)
    weight_BT = safe_exp(log_weight_BT)
    bounded_BT = weight_BT.clamp(correction_min, correction_max)
    if correction.endswith("mask"):
        bounded_BT = torch.where(weight_BT == bounded_BT, weight_BT, 0.0)
    return masked(bounded_BT, mask_BT)


def batch_weights(
    batch: PolicyGradient, correction: Correction, correction_max: float, correction_min: float | None
) -> Tensor:
    """The weights of a batch, (B, T); refuses bounds without a correction, and a correction without the sampler."""
    if correction == "none":
        raise UsageError("correction_max and correction_min bound the weights of a correction, but correction='none'.")
    if batch.sampling_logps_BT is None:
        raise UsageError(
            f"correction={correction!r} needs the log-probabilities that the sampler reported, but "
            "PolicyGradient.sampling_logps_BT is None."
        )
    return importance_weights(
        batch.old_logps_BT, batch.sampling_logps_BT, batch.mask_BT,
        correction=correction, correction_max=correction_max, correction_min=correction_min,
    )  # fmt: skip


@register_modifier(order=20, extras=("sampling_logps_BT",))
def sampler_correction(
    loss: PolicyLoss,
    batch: PolicyGradient,
    *,
    correction: Correction = "none",
    correction_max: Positive = 3.0,
    correction_min: NotNegative | None = None,
) -> LossOut:
    """Correction for a sampler whose numbers differ from the learner's: weight the loss by the ratio of the two.

        loss'_t = w_t loss_t,    w from old(y) / sampling(y), bounded

    Args:
        loss: any policy-gradient loss with an advantage.
        batch: its samples, with the log-probabilities that the sampler reported, in nats.
        correction: ``"token_truncate"``: a weight per token, clipped (TIS). ``"token_mask"``: tokens whose weight lies
            outside the range are dropped (MIS). ``"sequence_truncate"``, ``"sequence_mask"``: the same with one weight
            per completion, the product over its tokens. ``"none"``: off.
        correction_max: largest weight.
        correction_min: least weight. None: no bound.

    Returns:
        The weighted loss, of the loss's own shape and unit. Metrics: the loss's, and ``correction/weight``.

    Convention: the ratio of the loss stays π / old, and old / sampling is bounded apart from it, without gradient, as
    in TRL (``vllm_importance_sampling_mode`` with its ``_clip_max`` of 3, ``_clip_min``). A sequence's weight is the
    exponential of the *sum*; ``gspo`` has the mean. A loss with one value per completion takes a sequence's weight
    only. ``vespo`` has options of these names itself: it multiplies its own weight before shaping it. KL and entropy
    terms are not weighted. A token that the sampler gave no number (NaN) counts as unchanged, as in TRL.

    Known failure: the product over a long completion leaves any range, so the sequence forms drop almost everything.

    Source: Yao et al., Your efficient RL framework secretly brings you off-policy RL training, 2025.

    >>> old_BT, mask_BT = torch.tensor([[-1.0, -1.0]]), torch.tensor([[True, True]])
    >>> batch = PolicyGradient(
    ...     logps_BT=old_BT, old_logps_BT=old_BT, sampling_logps_BT=torch.tensor([[-1.5, -3.0]]),
    ...     advantages_BT=torch.tensor([[-1.0, -1.0]]), mask_BT=mask_BT)
    >>> ones = lambda batch: LossOut(torch.ones(1, 2))
    >>> sampler_correction(ones, batch, correction="token_truncate").loss  # e^0.5, and e^2 bounded
    tensor([[1.6487, 3.0000]])
    """
    weight_BT = batch_weights(batch, correction, correction_max, correction_min)
    out = loss(batch)
    if out.loss.dim() == 2:
        return LossOut(weight_BT * out.loss, {**out.metrics, "correction/weight": weight_BT})
    if correction.startswith("token"):
        raise UsageError(
            f"correction={correction!r} weights tokens, but this loss has one value per completion; take "
            f"correction={correction.replace('token', 'sequence')!r}."
        )
    weight_B = weight_BT.amax(-1)  # a sequence's tokens have one weight, cells outside the mask 0
    return LossOut(weight_B * out.loss, {**out.metrics, "correction/weight": weight_B})


@register_modifier(paper="arXiv:2512.02556", order=30, extras=("sampling_logps_BT",))
def off_policy_mask(
    loss: PolicyLoss, batch: PolicyGradient, *, off_policy_threshold: NotNegative | None = None
) -> LossOut:
    """Off-policy sequence mask: bad completions that the policy would no longer write are dropped.

        loss'_t = 0 where A < 0 and mean_t (sampling_t - log π(y_t)) > δ, else loss_t

    Args:
        loss: any policy-gradient loss with an advantage.
        batch: its samples, with the log-probabilities that the sampler reported, in nats.
        off_policy_threshold: δ, in nats per token. None: off.

    Returns:
        The loss, of its own shape and unit, 0 for completions that are dropped. Metrics: the loss's, and
        ``off_policy/dropped``, (B,).

    Convention: measured against what the sampler reported, so a difference between sampler and learner counts as well
    as the updates since; TRL does so too (``off_policy_mask_threshold``), and takes the old log-probabilities where the
    sampler reports none. A token that it gave no number (NaN) counts as unchanged, as in TRL. A is the mean advantage
    of the completion. Dropped completions still count in the mean. The paper gives no value for δ.

    Known failure: what is dropped are the samples that would push hardest; if the sampler lags, little negative signal
    is left. Watch ``off_policy/dropped``.

    Source: DeepSeek-AI, DeepSeek-V3.2, arXiv:2512.02556.

    >>> old_BT, mask_BT = torch.tensor([[-1.0, -1.0]]), torch.tensor([[True, True]])
    >>> batch = PolicyGradient(
    ...     logps_BT=old_BT, old_logps_BT=old_BT, sampling_logps_BT=old_BT + 0.5,
    ...     advantages_BT=torch.tensor([[-1.0, -1.0]]), mask_BT=mask_BT)
    >>> ones = lambda batch: LossOut(torch.ones(1, 2))
    >>> [off_policy_mask(ones, batch, off_policy_threshold=d).loss.tolist() for d in (0.4, 0.6)]
    [[[0.0, 0.0]], [[1.0, 1.0]]]
    """
    if batch.sampling_logps_BT is None:
        raise UsageError(
            "off_policy_threshold needs the log-probabilities that the sampler reported, but "
            "PolicyGradient.sampling_logps_BT is None."
        )
    assert off_policy_threshold is not None  # at its default the modifier is not called
    drift_B = -masked_mean(_above_sampler(batch.logps_BT, batch.sampling_logps_BT, batch.mask_BT), batch.mask_BT)
    bad_B = masked_sum(batch.advantages_BT.detach(), batch.mask_BT) < 0
    drop_B = bad_B & (drift_B > off_policy_threshold)
    out = loss(batch)
    kept = torch.where(drop_B if out.loss.dim() == 1 else drop_B[:, None], 0.0, out.loss)
    return LossOut(kept, {**out.metrics, "off_policy/dropped": drop_B.to(out.loss.dtype)})


@torch.no_grad()
def entropy_floor(entropy_BT: Tensor, mask_BT: Tensor, quantile: float) -> Tensor:
    """The entropy that a share ``quantile`` of the tokens reaches: a scalar, in nats, without gradient.

    The (1 - quantile) quantile of the masked entropies, with linear interpolation; 0 of a batch without tokens.

    >>> entropy_BT, mask_BT = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 9.0]]), torch.arange(6)[None] < 5
    >>> entropy_floor(entropy_BT, mask_BT, 0.5), entropy_floor(entropy_BT, mask_BT, 0.2)
    (tensor(2.), tensor(3.2000))
    """
    if not 0 < quantile <= 1:
        raise UsageError(f"quantile is the share of the tokens that are kept, above 0 and at most 1; got {quantile!r}.")
    values = entropy_BT[mask_BT].sort()[0]  # torch.quantile refuses more than 2^24 values
    if not len(values):
        return entropy_BT.new_zeros(())
    place = (1 - quantile) * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return torch.lerp(values[below], values[above], place - below)


@register_modifier(paper="arXiv:2506.01939", order=40, extras=("entropy_BT", "entropy_floor"))
def high_entropy(loss: PolicyLoss, batch: PolicyGradient, *, high_entropy: bool = False) -> LossOut:
    """High-entropy tokens only: where the policy is nearly certain, it gets no gradient.

        loss'_t = loss_t where H_t >= floor, else 0

    Args:
        loss: any policy-gradient loss of tokens with an advantage.
        batch: its samples, with the policy's entropies, (B, T), and their floor over the optimizer batch, in nats.
        high_entropy: whether.

    Returns:
        The loss, (B, T), in its own unit, 0 for tokens below the floor. Metrics: the loss's, and ``entropy/kept``,
        (B, T).

    Convention: the floor is a quantile of the entropies of the whole optimizer batch (``entropy_floor``; the paper
    keeps 20 % of the tokens), so it comes in as a field. Tokens below it still count in the mean, as in TRL
    (``top_entropy_quantile``). KL and entropy terms are not masked.

    Known failure: in long completions most tokens are near certain, and so is the floor if they are many; then a floor
    of almost 0 keeps everything that is not exactly certain.

    Source: Wang et al., Beyond the 80/20 Rule, arXiv:2506.01939.

    >>> x_BT, mask_BT = torch.tensor([[-1.0, -1.0]]), torch.tensor([[True, True]])
    >>> batch = PolicyGradient(
    ...     logps_BT=x_BT, old_logps_BT=x_BT, advantages_BT=-x_BT, mask_BT=mask_BT,
    ...     entropy_BT=torch.tensor([[0.1, 2.0]]), entropy_floor=torch.tensor(1.5))
    >>> high_entropy(lambda batch: LossOut(torch.ones(1, 2)), batch, high_entropy=True).loss
    tensor([[0., 1.]])
    """
    if batch.entropy_BT is None or batch.entropy_floor is None:
        raise UsageError(
            "high_entropy=True needs PolicyGradient.entropy_BT and PolicyGradient.entropy_floor, but one is None."
        )
    if not high_entropy:
        raise UsageError(f"high_entropy: expected True or False, got {high_entropy!r}.")
    keep_BT = masked(batch.entropy_BT.detach(), batch.mask_BT) >= batch.entropy_floor.detach()
    out = loss(batch)
    if out.loss.dim() == 1:
        raise UsageError("high_entropy=True chooses tokens, but this loss has one value per completion.")
    return LossOut(torch.where(keep_BT, out.loss, 0.0), {**out.metrics, "entropy/kept": keep_BT.to(out.loss.dtype)})
