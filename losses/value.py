"""Value losses: a critic's prediction of the return at every token, one value per token."""

from __future__ import annotations

import torch

from prefzoo.losses.base import register_loss
from prefzoo.losses.numerics import masked
from prefzoo.records import LossOut, Values
from prefzoo.registry import NotNegative


@register_loss(paper="arXiv:1707.06347")
def clipped_value(batch: Values, *, clip: NotNegative | None = 0.2) -> LossOut:
    """PPO's value loss: half the squared error, the larger of that of the prediction and of the clipped prediction.

        v_clip = v_old + clip(v - v_old, -ε, ε)
        loss_t = ½ max((v - R)², (v_clip - R)²)

    Args:
        batch: predictions now and when the completions were sampled, and the returns, (B, T), in reward units.
        clip: ε, in reward units: no gain from moving farther than this in one update. None: plain ½ (v - R)².

    Returns:
        One loss per token, (B, T), in squared reward units, 0 outside the mask. Metrics (B, T): ``value/error`` =
        (v - R)², without the ½; ``value/clip_ratio``, 1 where the clipped error is the larger one (None: 0).

    Convention: the ½ is inside, as in trlx, verl, OpenRLHF and TRL's former PPO; baselines that leave it out have our
    loss twice, so halve their coefficient. The paper has neither ½ nor clipping: ε is OpenAI baselines' practice.

    Known failure: where returns move by more than ε between updates, the clip holds the critic back; ε is in reward
    units, so it must follow their scale.

    Source: Schulman et al., arXiv:1707.06347, section 5; the clipping: Engstrom et al., arXiv:2005.12729, section 3.

    >>> batch = Values(
    ...     values_BT=torch.tensor([[1.0]]), old_values_BT=torch.tensor([[0.0]]), returns_BT=torch.tensor([[1.5]]),
    ...     mask_BT=torch.tensor([[True]]))
    >>> clipped_value(batch, clip=0.5).loss, clipped_value(batch, clip=None).loss  # ½ (0.5 - 1.5)², ½ (1 - 1.5)²
    (tensor([[0.5000]]), tensor([[0.1250]]))
    """
    values_BT = masked(batch.values_BT, batch.mask_BT)
    old_values_BT = masked(batch.old_values_BT.detach(), batch.mask_BT)
    returns_BT = masked(batch.returns_BT.detach(), batch.mask_BT)
    error_BT = worst_BT = (values_BT - returns_BT).square()
    if clip is not None:
        clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
        worst_BT = torch.maximum(error_BT, (clipped_BT - returns_BT).square())
    metrics = {"value/error": error_BT.detach(), "value/clip_ratio": (worst_BT > error_BT).to(error_BT.dtype)}
    return LossOut(0.5 * worst_BT, metrics)
