"""Unpaired losses: single completions labelled desirable or not, one value per completion."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefzoo.losses.base import register_loss
from prefzoo.records import LossOut, Unpaired, masked_sum
from prefzoo.registry import NotNegative, Positive, UsageError


def kto_baseline(ratio_B: Tensor) -> Tensor:
    """KTO's reference point z0: the mean log-ratio of mismatched completions, not below 0; a detached scalar in nats.

    Args:
        ratio_B: log-ratios log π(y')/ref(y') of completions y' that belong to *other* prompts, over the whole optimizer
            batch (all micro-batches, all processes).

    It estimates KL(π ‖ ref) from completions that the policy did not sample: biased, so it is clamped at 0. Of an empty
    batch it is 0.

    >>> kto_baseline(torch.tensor([0.5, -0.1])), kto_baseline(torch.tensor([-0.5, 0.1]))
    (tensor(0.2000), tensor(0.))
    """
    return (ratio_B.detach().sum() / max(len(ratio_B), 1)).clamp(min=0)


def class_midpoint(ratio_B: Tensor, desirable_B: Tensor) -> Tensor:
    """BCO's shift: the midpoint of the two classes' mean log-ratios; a detached scalar in nats.

    Args:
        ratio_B: log-ratios log π(y)/ref(y), over the whole optimizer batch (all micro-batches, all processes).
        desirable_B: their labels.

    Of a batch with one class only, it is that class's mean; of an empty one, 0. The paper's is a running average of
    this; times β it is in the paper's units, those of the reward.

    >>> class_midpoint(torch.tensor([1.0, 3.0, -4.0]), torch.tensor([True, True, False]))
    tensor(-1.)
    >>> class_midpoint(torch.tensor([1.0, 3.0]), torch.tensor([True, True]))
    tensor(2.)
    """
    ratio_B = ratio_B.detach()
    classes = [ratio_B[desirable_B], ratio_B[~desirable_B]]
    means = [ratios.mean() for ratios in classes if len(ratios)]
    return torch.stack(means).mean() if means else ratio_B.new_zeros(())


def class_weights(desirable_B: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Row weights that turn a mean over rows into the sum of the two classes' means: rows / (rows of the same class).

    Args:
        desirable_B: labels of the whole optimizer batch.
        dtype: of the weights.

    With the count ``row`` (a mean over rows, weighted) the loss is the paper's: mean over desirable rows + mean over
    undesirable rows. With the count ``weight`` it is half of that, the mean of the two. In a batch with one class only,
    every weight is 1: the absent class adds nothing.

    >>> class_weights(torch.tensor([True, True, True, False]))
    tensor([1.3333, 1.3333, 1.3333, 4.0000])
    """
    desirable_rows = desirable_B.sum()
    own_B = torch.where(desirable_B, desirable_rows, len(desirable_B) - desirable_rows)
    return len(desirable_B) / own_B.to(dtype)


def density_ratio_weights(
    probability_B: Tensor, desirable_B: Tensor, *, min_ratio: float = 0.5, max_ratio: float = 10.0
) -> Tensor:
    """BCO's weights for classes that hold different prompts: undesirable rows count as if drawn like desirable ones.

    Args:
        probability_B: a classifier's probability p that a row's *prompt* comes from a desirable row, the classifier
            being trained with both classes weighing alike.
        desirable_B: labels.
        min_ratio: the ratio p / (1 - p) is not taken below this,
        max_ratio: nor above this.

    Desirable rows weigh 1, undesirable rows p / (1 - p), the ratio of the two densities of prompts. The bounds are
    those of TRL's former trainer. Detached. Multiply with ``class_weights`` for the paper's sum of class means.

    >>> density_ratio_weights(torch.tensor([0.9, 0.75, 0.999, 0.1]), torch.tensor([True, False, False, False]))
    tensor([ 1.0000,  3.0000, 10.0000,  0.5000])
    """
    if min_ratio > max_ratio:
        raise UsageError(f"density_ratio_weights: min_ratio={min_ratio} is above max_ratio={max_ratio}.")
    probability_B = probability_B.detach()
    ratio_B = (probability_B / (1 - probability_B)).clamp(
        min_ratio, max_ratio
    )  # p = 1 gives inf, which the clamp takes
    return torch.where(desirable_B, 1.0, ratio_B)


@torch.no_grad()
def unpaired_metrics(batch: Unpaired, beta: float, gain_B: Tensor) -> dict[str, Tensor]:
    """What unpaired losses log, (B,) each. ``gain_B``: how far the reward is on the side that the label asks for."""
    return {
        "rewards": beta * batch.ratio_B,
        "rewards/margins": gain_B.detach(),
        "rewards/accuracies": (gain_B > 0).to(gain_B.dtype),
        "logps": masked_sum(batch.logps_BT, batch.mask_BT),
    }


def labelled(value_B: Tensor, desirable_B: Tensor) -> Tensor:
    """The value of a desirable row, its negative for an undesirable one: how far it is on the labelled side."""
    return torch.where(desirable_B, value_B, -value_B)


def regret(gain_B: Tensor, desirable_B: Tensor, desirable_weight: float, undesirable_weight: float) -> Tensor:
    """λ σ(-gain), with the weight λ of the row's class."""
    regret_B = torch.sigmoid(-gain_B)
    return torch.where(desirable_B, desirable_weight * regret_B, undesirable_weight * regret_B)


@register_loss(paper="arXiv:2402.01306", extras=("baseline",))
def kto(
    batch: Unpaired, *, beta: Positive = 0.1, desirable_weight: NotNegative = 1.0, undesirable_weight: NotNegative = 1.0
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

    Known failure: the value saturates: rows far on the wrong side of z0 get almost no gradient and stay as they are,
    which helps with noisy labels and hurts with hard, true ones. One class alone drives the policy only one way.

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
    gain_B = labelled(beta * (batch.ratio_B - baseline), batch.desirable_B)
    metrics = {**unpaired_metrics(batch, beta, gain_B), "kl/baseline": baseline.expand_as(gain_B)}
    return LossOut(regret(gain_B, batch.desirable_B, desirable_weight, undesirable_weight), metrics)


@register_loss(paper="arXiv:2408.06266", recommended={"learning_rate": 1e-6})
def apo_zero_unpaired(
    batch: Unpaired, *, beta: Positive = 0.1, desirable_weight: NotNegative = 1.0, undesirable_weight: NotNegative = 1.0
) -> LossOut:
    """Anchored preference optimization of single completions: from the reference up or down, as the label says.

        loss = λ_D σ(-β s)   for a desirable completion
        loss = λ_U σ(+β s)   for an undesirable one

    with s the log-ratio log π(y)/ref(y) summed over tokens.

    Args:
        batch: completions with reference log-probabilities (B, T) and labels (B,).
        beta: strength of the pull to the reference, per nat.
        desirable_weight: λ_D, of desirable rows.
        undesirable_weight: λ_U, of undesirable rows.

    Returns:
        One loss per completion, (B,), between 0 and λ; λ / 2 where policy and reference are equal. Metrics (B,):
        ``rewards`` = beta * s, ``rewards/margins`` = the reward on the labelled side, ``rewards/accuracies`` = whether
        that is positive, ``logps``.

    Convention: the unpaired reading of APO-zero, TRL's ``loss_type="apo_zero_unpaired"`` of its KTO trainer: KTO with
    the anchor at 0 in place of z0, so no prelude is needed. A pair taken apart gives ``apo_zero``.

    Known failure: as KTO it saturates on rows far on the wrong side. The fixed anchor does not follow the policy: once
    all rewards are positive, undesirable rows are pushed down although they already rank below.

    Source: D'Oosterlinck et al., Anchored Preference Optimization, arXiv:2408.06266; the unpaired form: TRL.

    >>> batch = Unpaired(
    ...     logps_BT=torch.tensor([[-1.0], [-1.0]]), ref_logps_BT=torch.tensor([[-2.0], [-2.0]]),
    ...     mask_BT=torch.tensor([[True], [True]]), desirable_B=torch.tensor([True, False]))
    >>> apo_zero_unpaired(batch, beta=1.0).loss
    tensor([0.2689, 0.7311])
    """
    gain_B = labelled(beta * batch.ratio_B, batch.desirable_B)
    loss_B = regret(gain_B, batch.desirable_B, desirable_weight, undesirable_weight)
    return LossOut(loss_B, unpaired_metrics(batch, beta, gain_B))


@register_loss(paper="arXiv:2404.04656", extras=("delta",), recommended={"learning_rate": 5e-7})
def bco(batch: Unpaired, *, beta: Positive = 0.1) -> LossOut:
    """Binary classifier optimization: logistic regression of the label on the shifted implicit reward.

        loss = -log σ(β (s - δ))    for a desirable completion
        loss = -log σ(-β (s - δ))   for an undesirable one

    with s the log-ratio log π(y)/ref(y) summed over tokens and δ the shift.

    Args:
        batch: completions with reference log-probabilities (B, T), labels (B,), and the scalar ``delta`` in nats, the
            midpoint of the two classes' mean log-ratios (``class_midpoint``).
        beta: strength of the pull to the reference, per nat.

    Returns:
        One loss per completion, (B,), in nats. Metrics (B,): ``rewards`` = β s, ``rewards/margins`` = the
        reward's distance to β δ on the labelled side, ``rewards/accuracies`` = whether that is positive, ``logps``,
        ``bco/delta`` = δ.

    Convention: δ is in nats, as KTO's baseline is; the paper's is β δ. The paper sums the means over the two classes;
    the mean over rows that this loss gets by default (as in TRL's former trainer) is that for classes of equal size
    only: otherwise give ``class_weights`` as row weights. ``density_ratio_weights`` are its weights for classes with
    different prompts. No gradient flows through δ. A pair taken apart at δ = 0 gives ``bco_pair``. Of a batch with one
    class, δ is its mean.

    Known failure: δ lags where the rewards drift, and the gradient then has a common push up or down. Like every loss
    of single completions, it can be satisfied by what tells the classes apart, such as length.

    Source: Jung et al., Binary Classifier Optimization for Large Language Model Alignment, arXiv:2404.04656.

    >>> batch = Unpaired(
    ...     logps_BT=torch.tensor([[-1.0], [-1.0]]), ref_logps_BT=torch.tensor([[-2.0], [-2.0]]),
    ...     mask_BT=torch.tensor([[True], [True]]), desirable_B=torch.tensor([True, False]), delta=torch.tensor(1.0))
    >>> bco(batch, beta=2.0).loss  # s = 1 = δ
    tensor([0.6931, 0.6931])
    """
    if batch.delta is None:
        raise UsageError(
            "loss 'bco' needs Unpaired.delta (δ): give class_midpoint(...) of the whole batch's log-ratios, or a zero."
        )
    delta = batch.delta.detach()
    gain_B = labelled(beta * (batch.ratio_B - delta), batch.desirable_B)
    metrics = {**unpaired_metrics(batch, beta, gain_B), "bco/delta": delta.expand_as(gain_B)}
    return LossOut(-F.logsigmoid(gain_B), metrics)
