"""Pairwise losses: a chosen and a rejected completion of one prompt, one value per pair.

Notation of the equations: s_w and s_l are the log-ratios log π(y)/ref(y) of the chosen (w) and the rejected (l)
completion, summed over their tokens, the EOS included; n_w and n_l are their numbers of tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefzoo.losses.base import register_loss
from prefzoo.records import LossOut, Pairs
from prefzoo.registry import Positive


@torch.no_grad()
def pair_metrics(batch: Pairs, beta: float) -> dict[str, Tensor]:
    """What TRL logs for pairs, (B,) each: implicit rewards beta * s, their margin, who wins, log-probabilities."""
    chosen_B, rejected_B = beta * batch.chosen_ratio_B, beta * batch.rejected_ratio_B
    return {
        "rewards/chosen": chosen_B,
        "rewards/rejected": rejected_B,
        "rewards/margins": chosen_B - rejected_B,
        "rewards/accuracies": (chosen_B > rejected_B).to(chosen_B.dtype),
        "logps/chosen": batch.chosen_B,
        "logps/rejected": batch.rejected_B,
    }


@register_loss(paper="arXiv:2305.18290", contrast=True, recommended={"learning_rate": 1e-6})
def dpo(batch: Pairs, *, beta: Positive = 0.1) -> LossOut:
    """Direct preference optimization: a classifier of pairs whose logit is the difference of implicit rewards.

        loss = -log σ(β (s_w - s_l))

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: strength of the pull to the reference, per nat. Smaller moves farther from it.

    Returns:
        One loss per pair, (B,), in nats; log 2 where policy and reference are equal. Metrics (B,): ``rewards/chosen``,
        ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies``, ``logps/chosen``, ``logps/rejected``.

    Convention: log-ratios are sums over tokens, as in the paper and in TRL (``loss_type="sigmoid"``). Label smoothing
    is another loss (cDPO, robust DPO), so there is no option for it; ``margin_B`` is not used (that is ODPO).

    Source: Rafailov et al., Direct Preference Optimization, arXiv:2305.18290, equation 7.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> dpo(batch, beta=0.5).loss  # -log σ(0.5 * (2 - 0))
    tensor([0.3133])
    """
    logits_B = beta * (batch.chosen_ratio_B - batch.rejected_ratio_B)
    return LossOut(-F.logsigmoid(logits_B), pair_metrics(batch, beta))


@register_loss(paper="arXiv:2310.12036", recommended={"learning_rate": 1e-6})
def ipo(batch: Pairs, *, beta: Positive = 0.1) -> LossOut:
    """Identity preference optimization, per token: regress the difference of mean log-ratios on 1 / (2 β).

        loss = (s_w / n_w - s_l / n_l - 1 / (2 β))²

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: the paper's τ. Sets the target difference 1 / (2 β), here in nats *per token*.

    Returns:
        One loss per pair, (B,), in squared nats per token. Metrics (B,) as ``dpo``; the rewards in them are
        beta * s, sums over tokens, so that they compare with those of the other pairwise losses.

    Convention: the authors' later form, which TRL (``loss_type="ipo"``) and HALOs use: each side is divided by its
    length. The paper and the original code use sums: ``ipo_sum``. The two need different beta: with n tokens a side, a
    per-token difference of 1 / (2 β) is a summed difference of n / (2 β).

    Source: Azar et al., A General Theoretical Paradigm, arXiv:2310.12036, equation 17; the division by length: TRL.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> ipo(batch, beta=0.25).loss  # (2/2 - 0 - 2)²
    tensor([1.])
    """
    chosen_B = batch.chosen_ratio_B / batch.chosen_len_B.clamp(min=1)
    rejected_B = batch.rejected_ratio_B / batch.rejected_len_B.clamp(min=1)
    return LossOut((chosen_B - rejected_B - 1 / (2 * beta)).square(), pair_metrics(batch, beta))


@register_loss(paper="arXiv:2310.12036", contrast=True, recommended={"learning_rate": 1e-6})
def ipo_sum(batch: Pairs, *, beta: Positive = 0.1) -> LossOut:
    """Identity preference optimization, as in the paper: regress the difference of summed log-ratios on 1 / (2 β).

        loss = (s_w - s_l - 1 / (2 β))²

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: the paper's τ. Sets the target difference 1 / (2 β), here in nats *per completion*.

    Returns:
        One loss per pair, (B,), in squared nats. Metrics (B,) as ``dpo``.

    Convention: sums over tokens, as in the paper, the original DPO code and OpenRLHF. TRL's ``ipo`` divides by the
    lengths: here ``ipo``, with its own scale of beta.

    Source: Azar et al., A General Theoretical Paradigm, arXiv:2310.12036, equation 17.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> ipo_sum(batch, beta=0.1).loss  # (2 - 0 - 5)²
    tensor([9.])
    """
    difference_B = batch.chosen_ratio_B - batch.rejected_ratio_B
    return LossOut((difference_B - 1 / (2 * beta)).square(), pair_metrics(batch, beta))
