"""Unpaired losses: single completions labelled desirable or not, one value per completion."""

from __future__ import annotations

import torch
from torch import Tensor

from prefzoo.losses.base import register_loss
from prefzoo.records import LossOut, Unpaired
from prefzoo.registry import Positive, UsageError


def kto_baseline(ratio_B: Tensor) -> Tensor:
    """KTO's reference point z0: the mean log-ratio of mismatched completions, not below 0; a detached scalar in nats.

    Args:
        ratio_B: log-ratios log π(y')/ref(y') of completions y' that belong to *other* prompts, over the whole optimizer
            batch (all micro-batches, all processes).

    It estimates KL(π ‖ ref) from completions that the policy did not sample: biased, so it is clamped at 0.

    >>> kto_baseline(torch.tensor([0.5, -0.1])), kto_baseline(torch.tensor([-0.5, 0.1]))
    (tensor(0.2000), tensor(0.))
    """
    return ratio_B.detach().mean().clamp(min=0)


@register_loss(paper="arXiv:2402.01306", extras=("baseline",))
def kto(
    batch: Unpaired, *, beta: Positive = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> LossOut:
    """Kahneman-Tversky optimization: push single completions above or below a reference point, with saturating value.

        loss = λ_D σ(-β (s - z0))   for a desirable completion
        loss = λ_U σ(+β (s - z0))   for an undesirable one

    with s the log-ratio log π(y)/ref(y) summed over tokens and z0 the ``baseline``.

    Args:
        batch: completions with reference log-probabilities (B, T), labels (B,), and the scalar baseline z0 in nats
            (``kto_baseline``: clamped at 0, computed over the whole optimizer batch before the loss).
        beta: strength of the pull to the reference, per nat.
        desirable_weight: λ_D, loss aversion for desirable rows.
        undesirable_weight: λ_U, for undesirable rows. The paper keeps λ_D n_D / (λ_U n_U) between 1 and 4/3.

    Returns:
        One loss per completion, (B,), between 0 and λ. Metrics (B,): ``rewards`` = beta * s, ``rewards/margins`` = the
        reward's distance to the baseline on the labelled side, ``rewards/accuracies`` = whether that is positive,
        ``logps``, and ``kl/baseline`` = z0.

    Convention: λ - value, so that the loss is positive, as in the authors' code and TRL. No gradient flows through z0.

    Source: Ethayarajh et al., KTO: Model Alignment as Prospect Theoretic Optimization, arXiv:2402.01306.

    >>> batch = Unpaired(
    ...     logps_BT=torch.tensor([[-1.0], [-1.0]]), ref_logps_BT=torch.tensor([[-2.0], [-2.0]]),
    ...     mask_BT=torch.tensor([[True], [True]]), desirable_B=torch.tensor([True, False]), baseline=torch.tensor(0.0))
    >>> kto(batch, beta=1.0).loss
    tensor([0.2689, 0.7311])
    """
    if batch.baseline is None:
        raise UsageError("loss 'kto' needs Unpaired.baseline (z0): give kto_baseline(...) of mismatched completions.")
    baseline = batch.baseline.detach()
    advantage_B = beta * (batch.ratio_B - baseline)
    gain_B = torch.where(batch.desirable_B, advantage_B, -advantage_B)
    regret_B = torch.sigmoid(-gain_B)
    with torch.no_grad():
        metrics = {
            "rewards": beta * batch.ratio_B,
            "rewards/margins": gain_B.detach(),
            "rewards/accuracies": (gain_B > 0).to(gain_B.dtype),
            "logps": torch.where(batch.mask_BT, batch.logps_BT, 0.0).sum(-1),
            "kl/baseline": baseline.expand_as(gain_B),
        }
    return LossOut(torch.where(batch.desirable_B, desirable_weight * regret_B, undesirable_weight * regret_B), metrics)
