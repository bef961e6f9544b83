"""Likelihood losses: completions to be made likelier, one value per token."""

from __future__ import annotations

from prefzoo.losses.base import register_loss
from prefzoo.records import Likelihood, LossOut


@register_loss(paper="arXiv:2203.02155")
def sft(batch: Likelihood) -> LossOut:
    """Supervised fine-tuning: the negative log-likelihood of every completion token.

        loss_t = -log π(y_t | x, y_<t)

    Args:
        batch: completions, (B, T), in nats.

    Returns:
        One loss per token, (B, T), in nats.

    Convention: its count is ``token``, the mean over all completion tokens of the optimizer batch, as in TRL; prompt
    tokens are not in the mask. ``row`` weights every completion alike, ``row_sum`` is the likelihood of completions.

    Source: the first stage of Ouyang et al., arXiv:2203.02155.

    >>> import torch
    >>> sft(Likelihood(logps_BT=torch.tensor([[-1.0, -0.5]]), mask_BT=torch.tensor([[True, True]]))).loss
    tensor([[1.0000, 0.5000]])
    """
    return LossOut(-batch.logps_BT)
