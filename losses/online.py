"""Pairwise losses that know who wrote which side: the policy the first, its reference the second.

Notation as in ``pairwise``: s is the log-ratio log π(y)/ref(y) summed over tokens, σ the logistic function.
"""

from __future__ import annotations

import torch.nn.functional as F

from prefzoo.losses.base import register_loss
from prefzoo.losses.pairwise import SOFT, column, contrast, pair_metrics
from prefzoo.records import LossOut, Pairs
from prefzoo.registry import NotNegative, Positive

WRITERS = "the chosen side is what the policy wrote, the better one or not"


@register_loss(
    paper="arXiv:2405.21046", extras=("probability_B",), recommended={"learning_rate": 5e-7}, writers=True,
    refuses={
        "label_smoothing": SOFT, "nll": WRITERS,
        "length_desensitised": "its exploration bonus would be desensitised",
    },
    exceptions={
        "swap": "the exploration bonus is of the reference's completion, whoever won",
        "reference_shift": "the exploration bonus is a likelihood term",
    },
)  # fmt: skip
def xpo(batch: Pairs, *, beta: Positive = 0.1, alpha: NotNegative = 1e-5) -> LossOut:
    """Exploratory preference optimization: DPO on a completion of the policy and one of the reference, with a bonus.

        loss = -p log σ(z) - (1 - p) log σ(-z) + α log π(y')      z = β (s - s')

    with y the policy's completion, y' the reference's, and p = 1 where y is the better one, else 0.

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats: y as the chosen and y' as the rejected
            side, whoever won; and ``probability_B``, p.
        beta: strength of the pull to the reference, per nat.
        alpha: α, weight of the exploration bonus: the policy is paid for giving up what the reference would have
            written. 0: ``dpo`` of the pair.

    Returns:
        One loss per pair, (B,), in nats. Metrics (B,) as ``dpo``, of y and y'; ``rewards/accuracies`` is the share of
        pairs in the right order; ``exploration``, log π(y').

    Convention: the sign is that of a loss: log π(y') is made smaller. log π(y') is a sum over tokens, as in TRL, whose
    default α this is; the paper's α shrinks with the number of iterations. p may lie in between, as in ``sppo_soft``.

    Known failure: the bonus has no floor: with a large α the policy leaves the reference's completions, good or bad,
    without end.

    Source: Xie et al., Exploratory Preference Optimization, arXiv:2405.21046, algorithm 1.

    >>> import torch
    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT, probability_B=torch.tensor([1.0]))
    >>> xpo(batch, beta=0.5, alpha=0.1).loss  # -log σ(0.5 * (2 - 0)) + 0.1 * -2
    tensor([0.1133])
    """
    probability_B = column(batch.probability_B, "xpo", "probability_B", "1 where the policy's completion is better")
    z_B, other_B = beta * contrast(batch), batch.rejected_B
    loss_B = -probability_B * F.logsigmoid(z_B) - (1 - probability_B) * F.logsigmoid(-z_B) + alpha * other_B
    right_B = (z_B * (probability_B - 0.5) > 0).to(z_B.dtype)
    metrics = pair_metrics(batch, beta) | {"rewards/accuracies": right_B, "exploration": other_B.detach()}
    return LossOut(loss_B, metrics)
