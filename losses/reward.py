"""Score losses: scalar rewards of two completions of one prompt, one value per pair."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from prefzoo.losses.base import register_loss
from prefzoo.records import LossOut, Scores


@register_loss(paper="arXiv:2203.02155")
def bradley_terry(batch: Scores, *, label_smoothing: float = 0.0, centering: float = 0.0) -> LossOut:
    """Bradley-Terry reward model: cross-entropy of "the chosen one wins", whose logit is the difference of rewards.

        x    = r_w - r_l - m
        loss = -p log σ(x) - (1 - p) log σ(-x) + c (r_w + r_l)²

    Args:
        batch: rewards of chosen and rejected, (B,). Where the record has them: ``margin_B`` is m, in reward units
            (absent: 0); ``probability_B`` is p, the probability that the first is better (absent: 1).
        label_smoothing: ε, the share of flipped labels: p becomes p (1 - ε) + (1 - p) ε.
        centering: c, pulls the mean reward of a pair to 0; differences do not feel it.

    Returns:
        One loss per pair, (B,), in nats. Metrics (B,): ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``
        = r_w - r_l (without m), ``rewards/accuracies``.

    Convention: every pair counts alike. InstructGPT averages the pairs of one prompt first: use weights for that. With
    soft labels the margin stays on the side of the first completion.

    Source: Ouyang et al., arXiv:2203.02155, equation 1; the margin: Llama 2, arXiv:2307.09288, equation 2; centering:
    Eisenstein et al., arXiv:2312.09244; a share of random labels: Christiano et al., arXiv:1706.03741.

    >>> batch = Scores(chosen_B=torch.tensor([1.0, 1.0]), rejected_B=torch.tensor([0.0, 1.0]))
    >>> bradley_terry(batch).loss
    tensor([0.3133, 0.6931])
    """
    difference_B = batch.chosen_B - batch.rejected_B
    logits_B = difference_B if batch.margin_B is None else difference_B - batch.margin_B
    probability_B = torch.ones_like(logits_B) if batch.probability_B is None else batch.probability_B
    target_B = probability_B * (1 - label_smoothing) + (1 - probability_B) * label_smoothing
    loss_B = F.binary_cross_entropy_with_logits(logits_B, target_B, reduction="none")
    metrics = {
        "rewards/chosen": batch.chosen_B.detach(),
        "rewards/rejected": batch.rejected_B.detach(),
        "rewards/margins": difference_B.detach(),
        "rewards/accuracies": (difference_B > 0).to(difference_B.dtype),
    }
    return LossOut(loss_B + centering * (batch.chosen_B + batch.rejected_B).square(), metrics)
