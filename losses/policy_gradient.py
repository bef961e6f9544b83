"""Policy-gradient losses: sampled completions with an advantage for every token, one value per token.

How tokens are averaged is not here: the term's count says it (token, row, row_sum, constant).
"""

from __future__ import annotations

import math

import torch

from prefzoo.losses.base import register_loss
from prefzoo.losses.kl import EstimatorName, k3, kl_estimator
from prefzoo.losses.numerics import exponent_limit, masked, safe_exp
from prefzoo.records import LossOut, PolicyGradient
from prefzoo.registry import UsageError


@register_loss(paper="arXiv:1707.06347", reference=False)
def clipped_surrogate(
    batch: PolicyGradient, *, clip: float = 0.2, clip_high: float | None = None, dual_clip: float | None = None
) -> LossOut:
    """PPO's clipped surrogate: the importance-weighted advantage, without reward for leaving the clip range.

        r_t    = π(y_t) / old(y_t)
        loss_t = -min(r_t A_t, clip(r_t, 1 - ε, 1 + ε_high) A_t)

    With ``dual_clip`` c, for A_t < 0, the loss is at most -c A_t.

    Args:
        batch: sampled completions, (B, T): log-probabilities under the policy and under the one that sampled them, in
            nats, and advantages, in reward units or standardised.
        clip: ε, how far the ratio may fall; and rise, unless ``clip_high`` says otherwise.
        clip_high: ε_high, how far the ratio may rise (DAPO's clip-higher, 0.28). None: as ``clip``.
        dual_clip: c > 1 + ε_high, bounds the loss of unlikely bad tokens (TRL's ``delta``). None: no bound.

    Returns:
        One loss per token, (B, T), 0 outside the mask. Metrics (B, T): ``ratio``; ``clip_ratio``, 1 where the clip
        takes the gradient away; ``approx_kl``, the k3 estimate of KL(old ‖ π), in nats.

    Convention: one ratio per token (GSPO has one per sequence). The log-ratio is clamped only where ``exp`` would
    overflow (80 in float32 and bfloat16, 700 in float64), where its gradient is 0; verl and OpenRLHF clamp at ±20. No
    gradient flows through advantages and old log-probabilities. At r = 1 the gradient is the plain policy gradient, -A.

    Source: Schulman et al., arXiv:1707.06347, equation 7; dual clip: Ye et al., arXiv:1912.09729; clip-higher:
    Yu et al. (DAPO), arXiv:2503.14476.

    >>> batch = PolicyGradient(
    ...     logps_BT=torch.tensor([[-1.0, -1.0]]), old_logps_BT=torch.tensor([[-1.0, -2.0]]),
    ...     advantages_BT=torch.tensor([[2.0, 2.0]]), mask_BT=torch.tensor([[True, True]]))
    >>> clipped_surrogate(batch, clip=0.2).loss
    tensor([[-2.0000, -2.4000]])
    """
    high = 1 + (clip if clip_high is None else clip_high)
    if dual_clip is not None and dual_clip <= high:
        raise UsageError(f"clipped_surrogate: dual_clip must exceed 1 + clip_high = {high:g}, got {dual_clip:g}.")
    advantages_BT = masked(batch.advantages_BT.detach(), batch.mask_BT)
    log_ratio_BT = masked(batch.logps_BT - batch.old_logps_BT.detach(), batch.mask_BT)
    ratio_BT = safe_exp(log_ratio_BT)
    plain_BT, clipped_BT = ratio_BT * advantages_BT, ratio_BT.clamp(1 - clip, high) * advantages_BT
    objective_BT = torch.minimum(plain_BT, clipped_BT)
    if dual_clip is not None:
        objective_BT = torch.where(
            advantages_BT < 0, torch.maximum(objective_BT, dual_clip * advantages_BT), objective_BT
        )
    metrics = {
        "ratio": ratio_BT.detach(),
        "clip_ratio": (clipped_BT < plain_BT).to(ratio_BT.dtype),
        "approx_kl": k3(torch.zeros_like(log_ratio_BT), log_ratio_BT.detach()),
    }
    return LossOut(-objective_BT, metrics)


@register_loss(paper="arXiv:2402.03300")
def kl_penalty(batch: PolicyGradient, *, estimator: EstimatorName = "k3", importance: bool = False) -> LossOut:
    """KL to the reference as a term of the loss: an estimate at every sampled token, differentiated as it stands.

        loss_t = k(π(y_t), ref(y_t))                      importance=False
        loss_t = π(y_t) / old(y_t) k(π(y_t), ref(y_t))    importance=True

    Args:
        batch: sampled completions with reference log-probabilities, (B, T), in nats.
        estimator: ``"k1"``, ``"k2"`` or ``"k3"``, as in ``prefzoo.losses.kl``.
        importance: multiply by the ratio of policy to sampling policy, and differentiate the ratio too.

    Returns:
        One loss per token, (B, T), in nats, 0 outside the mask. Metrics (B, T): ``kl/token``, the estimate without
        the ratio.

    Convention: value and gradient are two questions. In expectation over tokens of the policy itself:

        estimator  value, E     gradient, importance=False   gradient, importance=True
        k1         KL(π ‖ ref)  0                            ∇ KL(π ‖ ref)
        k2         biased       ∇ KL(π ‖ ref)                ∇ of the biased value
        k3         KL(π ‖ ref)  ∇ KL(ref ‖ π)                ∇ KL(π ‖ ref)

    ``k3, importance=False`` is the original GRPO; ``k3, importance=True`` is TRL's default
    (``use_bias_correction_kl``), which also corrects for tokens sampled from an older policy. Exponents, and the
    product with the ratio, are clamped only where they would overflow (exp(80) in float32 and bfloat16, exp(700) in
    float64), where the gradient is 0.

    Source: Shao et al. (GRPO), arXiv:2402.03300, equation 4; importance: DeepSeek-V3.2, arXiv:2512.02556; the
    estimators: Schulman, Approximating KL divergence, 2020.

    >>> batch = PolicyGradient(
    ...     logps_BT=torch.tensor([[-1.0, -1.0]]), old_logps_BT=torch.tensor([[-1.0, -2.0]]),
    ...     ref_logps_BT=torch.tensor([[-1.0, -2.0]]), advantages_BT=torch.zeros(1, 2), mask_BT=torch.ones(1, 2) > 0)
    >>> kl_penalty(batch).loss, kl_penalty(batch, importance=True).loss
    (tensor([[0.0000, 0.3679]]), tensor([[0., 1.]]))
    """
    if batch.ref_logps_BT is None:
        raise UsageError(
            "loss 'kl_penalty' needs reference log-probabilities, but PolicyGradient.ref_logps_BT is None."
        )
    logps_BT = masked(batch.logps_BT, batch.mask_BT)
    kl_BT = kl_estimator(estimator)(logps_BT, masked(batch.ref_logps_BT.detach(), batch.mask_BT))
    loss_BT = kl_BT
    if importance:
        ratio_BT = safe_exp(logps_BT - masked(batch.old_logps_BT.detach(), batch.mask_BT))
        loss_BT = (ratio_BT * kl_BT).clamp(max=math.exp(exponent_limit(kl_BT.dtype)))
    return LossOut(loss_BT, {"kl/token": kl_BT.detach()})
