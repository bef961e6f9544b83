"""Pairwise losses that anchor each side by itself, so that what both log-ratios share does not cancel.

The symbols are those of ``pairwise``: s_w and s_l are the log-ratios log π(y)/ref(y) of the chosen (w) and the rejected
(l) completion, summed over their tokens. The last two sort the batch: they compare distributions, not pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefzoo.losses.base import register_loss
from prefzoo.losses.pairwise import SOFT, column, contrast, pair_metrics
from prefzoo.records import LossOut, Pairs
from prefzoo.registry import NotNegative, Positive


@register_loss(paper="arXiv:2402.05369", recommended={"learning_rate": 1e-6})
def nca_pair(batch: Pairs, *, beta: Positive = 0.1) -> LossOut:
    """Noise contrastive alignment of pairs: each completion is told from noise, so the chosen one may not fall.

        loss = -log σ(β s_w) - 1/2 log σ(-β s_w) - 1/2 log σ(-β s_l)

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: strength of the pull to the reference, per nat.

    Returns:
        One loss per pair, (B,), in nats; 2 log 2 where policy and reference are equal. Metrics (B,) as ``dpo``.

    Convention: the paper's loss for K = 2 with the label (1, 0), as TRL's ``loss_type="nca_pair"``, whose defaults
    these are. For K > 2 and scores: ``nca``. Its sibling InfoNCA is ``dpo`` for pairs.

    Known failure: alone, the chosen side is best at β s_w = log 2 however good it is, so differences stay small; the
    rejected side is pushed down without end.

    Source: Chen et al., Noise Contrastive Alignment of Language Models with Explicit Rewards, arXiv:2402.05369.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> nca_pair(batch, beta=0.5).loss  # 0.3133 + 1.3133 / 2 + 0.6931 / 2
    tensor([1.3165])
    """
    chosen_B, rejected_B = beta * batch.chosen_ratio_B, beta * batch.rejected_ratio_B
    noise_B = F.logsigmoid(-chosen_B) + F.logsigmoid(-rejected_B)
    return LossOut(-F.logsigmoid(chosen_B) - 0.5 * noise_B, pair_metrics(batch, beta))


@register_loss(paper="arXiv:2404.04656", recommended={"learning_rate": 1e-6})
def bco_pair(batch: Pairs, *, beta: Positive = 0.1) -> LossOut:
    """Binary classifier optimization of pairs, without shift: the chosen log-ratio above 0, the rejected one below.

        loss = -log σ(β s_w) - log σ(-β s_l)

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: strength of the pull to the reference, per nat.

    Returns:
        One loss per pair, (B,), in nats; 2 log 2 where policy and reference are equal. Metrics (B,) as ``dpo``.

    Convention: TRL's ``loss_type="bco_pair"`` since 1.0. The paper (and TRL 0.x) subtracts a shift δ, the midpoint of
    the mean rewards of the two classes, from both rewards: that is ``bco``, whose data need no pairs.

    Known failure: without δ the border stands at the reference itself. Where both completions become unlikely, as when
    the policy moves far, the chosen side has most of the gradient, and the loss turns to imitation.

    Source: Jung et al., Binary Classifier Optimization for Large Language Model Alignment, arXiv:2404.04656.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> bco_pair(batch, beta=0.5).loss  # 0.3133 + 0.6931
    tensor([1.0064])
    """
    chosen_B, rejected_B = beta * batch.chosen_ratio_B, beta * batch.rejected_ratio_B
    return LossOut(-F.logsigmoid(chosen_B) - F.logsigmoid(-rejected_B), pair_metrics(batch, beta))


def win_regression(batch: Pairs, beta: float, probability_B: Tensor | float) -> LossOut:
    """SPPO: regress both log-ratios on (p - 1/2) / β, p being the probability that the side wins."""
    target = (probability_B - 0.5) / beta
    loss_B = (batch.chosen_ratio_B - target).square() + (batch.rejected_ratio_B + target).square()
    return LossOut(loss_B, pair_metrics(batch, beta))


@register_loss(paper="arXiv:2405.00675", recommended={"learning_rate": 5e-7})
def sppo_hard(batch: Pairs, *, beta: Positive = 0.001) -> LossOut:
    """Self-play preference optimization, hard labels: the chosen completion always wins, the rejected one always loses.

        loss = (s_w - 1 / (2 β))² + (s_l + 1 / (2 β))²

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: 1 / η of the paper: the targets are ±1 / (2 β), in nats per completion.

    Returns:
        One loss per pair, (B,), in squared nats. Metrics (B,) as ``dpo``.

    Convention: the sum of the two squares, as TRL's ``loss_type="sppo_hard"``, there with beta = 0.1; the authors' code
    takes half of it. The defaults are those of the authors' scripts (η = 1000). The constant of the partition function
    is taken to be 1/2, as in the paper. With estimated win probabilities: ``sppo_soft``.

    Known failure: the targets are ±500 nats at the default beta, far beyond any policy, so the learning rate and the
    number of steps set how far it moves; a log-ratio in the hundreds rules its batch.

    Source: Wu et al., Self-Play Preference Optimization for Language Model Alignment, arXiv:2405.00675.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> sppo_hard(batch, beta=0.5).loss  # (2 - 1)² + (0 + 1)²
    tensor([2.])
    """
    return win_regression(batch, beta, 1.0)


@register_loss(
    paper="arXiv:2405.00675", extras=("probability_B",), recommended={"learning_rate": 5e-7},
    refuses={"label_smoothing": SOFT},
)  # fmt: skip
def sppo_soft(batch: Pairs, *, beta: Positive = 0.001) -> LossOut:
    """Self-play preference optimization: regress each log-ratio on how often its completion wins.

        loss = (s_w - (p - 1/2) / β)² + (s_l + (p - 1/2) / β)²

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats, and ``probability_B``, p, the
            probability that the chosen completion wins.
        beta: 1 / η of the paper: nats of target per unit of win probability are 1 / β.

    Returns:
        One loss per pair, (B,), in squared nats; with p = 1 that of ``sppo_hard``. Metrics (B,) as ``dpo``.

    Convention: the paper's p is the probability that a completion beats the policy, estimated over several samples, and
    differs between the sides; of a pair alone, the rejected one has 1 - p. The sum of the two squares; the authors'
    code takes half of it. Defaults are those of the authors' scripts. Exchanging the sides along with p changes
    nothing. Not in TRL.

    Known failure: p comes from a preference model, whose certainty about near-equal answers sets large targets; at the
    default beta a tenth of win probability is 100 nats.

    Source: Wu et al., Self-Play Preference Optimization for Language Model Alignment, arXiv:2405.00675.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT, probability_B=torch.tensor([0.75]))
    >>> sppo_soft(batch, beta=0.5).loss  # (2 - 0.5)² + (0 + 0.5)²
    tensor([2.5000])
    """
    probability_B = column(
        batch.probability_B, "sppo_soft", "probability_B", "the probability that the chosen completion wins"
    )
    return win_regression(batch, beta, probability_B)


@register_loss(paper="arXiv:2408.06266", recommended={"learning_rate": 1e-6})
def apo_zero(batch: Pairs, *, beta: Positive = 0.1) -> LossOut:
    """Anchored preference optimization, zero: the chosen completion likelier, the rejected one less likely.

        loss = 1 - σ(β s_w) + σ(β s_l)

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: strength of the pull to the reference, per nat.

    Returns:
        One loss per pair, (B,), between 0 and 2, without a unit; 1 where policy and reference are equal. Metrics (B,)
        as ``dpo``.

    Convention: as TRL's ``loss_type="apo_zero"``. For data whose chosen completions are better than what the policy
    writes; where they are worse, ``apo_down``. Without pairs: ``apo_zero_unpaired``.

    Known failure: bounded, so the gradient dies at both ends: a chosen completion that is far below the reference is
    given up.

    Source: D'Oosterlinck et al., Anchored Preference Optimization and Contrastive Revisions, arXiv:2408.06266.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> apo_zero(batch, beta=0.5).loss  # 1 - σ(1) + σ(0)
    tensor([0.7689])
    """
    chosen_B, rejected_B = beta * batch.chosen_ratio_B, beta * batch.rejected_ratio_B
    return LossOut(torch.sigmoid(-chosen_B) + torch.sigmoid(rejected_B), pair_metrics(batch, beta))


@register_loss(paper="arXiv:2408.06266", recommended={"learning_rate": 1e-6})
def apo_down(batch: Pairs, *, beta: Positive = 0.1) -> LossOut:
    """Anchored preference optimization, down: both completions less likely, the rejected one more so.

        loss = σ(β s_w) + 1 - σ(β (s_w - s_l))

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: strength of the pull to the reference, per nat.

    Returns:
        One loss per pair, (B,), between 0 and 2, without a unit; 1 where policy and reference are equal. Metrics (B,)
        as ``dpo``.

    Convention: as TRL's ``loss_type="apo_down"``. For data whose chosen completions are worse than what the policy
    writes; where they are better, ``apo_zero``.

    Known failure: lowers the chosen completions on purpose, so on good data it unlearns them. Bounded: the gradient
    dies at both ends.

    Source: D'Oosterlinck et al., Anchored Preference Optimization and Contrastive Revisions, arXiv:2408.06266.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> apo_down(batch, beta=0.5).loss  # σ(1) + 1 - σ(1 - 0)
    tensor([1.])
    """
    down_B = torch.sigmoid(beta * batch.chosen_ratio_B)
    return LossOut(down_B + torch.sigmoid(-beta * contrast(batch)), pair_metrics(batch, beta))


@register_loss(
    paper="arXiv:2402.13228", recommended={"learning_rate": 1e-6},
    exceptions={"prefers_chosen@label_smoothing": "exchanged, the penalty holds the rejected side"},
)  # fmt: skip
def dpop(batch: Pairs, *, beta: Positive = 0.3, penalty: NotNegative = 50.0) -> LossOut:
    """DPO-positive (Smaug): DPO that punishes a chosen completion below the reference.

        loss = -log σ(β (s_w - s_l - λ max(0, -s_w)))

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: strength of the pull to the reference, per nat.
        penalty: λ, logit lost per nat by which the chosen completion is less likely than under the reference, in units
            of β. 0: ``dpo``.

    Returns:
        One loss per pair, (B,), in nats; that of ``dpo`` where s_w is 0 or more. Metrics (B,) as ``dpo``, without the
        penalty.

    Convention: the penalty stands inside the σ and is a sum over tokens, as in the paper; β and λ are those of Smaug.
    At s_w = 0, where training starts, the gradient of max(0, -s_w) is taken to be 0. Not in TRL.

    Known failure: with λ = 50 a chosen completion that starts below the reference rules its batch, with 51 times the
    gradient of ``dpo`` on the chosen side. The rejected one is held by nothing.

    Source: Pal et al., Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive, arXiv:2402.13228.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-2.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-1.0, -2.0]]),
    ...     rejected_logps_BT=torch.tensor([[-4.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> dpop(batch, beta=0.5, penalty=2.0).loss  # -log σ(0.5 * (-1 + 3 - 2 * 1))
    tensor([0.6931])
    """
    below_B = F.relu(-batch.chosen_ratio_B)
    return LossOut(-F.logsigmoid(beta * (contrast(batch) - penalty * below_B)), pair_metrics(batch, beta))


# -- losses that sort the batch ---------------------------------------------------------------------------------------


def by_rank(values_B: Tensor) -> tuple[Tensor, Tensor]:
    """The values in rising order, equal ones in the order of the rows, and the row of each."""
    sorted_ = torch.sort(values_B, stable=True)
    return sorted_.values, sorted_.indices


@register_loss(
    paper="arXiv:2406.05882", whole_batch=True, contrast=True, divergence=False, recommended={"learning_rate": 1e-6},
    exceptions={"reference_shift": "policy and reference are sorted apart, and a constant per token moves the ranks"},
)  # fmt: skip
def aot(batch: Pairs, *, beta: Positive = 0.1) -> LossOut:
    """Alignment by optimal transport, paired: the policy's differences are to dominate the reference's, rank by rank.

        d_i = log π(y_w,i) - log π(y_l,i),  r_i = log ref(y_w,i) - log ref(y_l,i)
        loss = -log σ(β (d_(k) - r_(k)))      _(k): k-th smallest of the batch

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: strength of the pull to the reference, per nat.

    Returns:
        One loss per pair, (B,), in nats: pair i has that of its own rank k among the d. Metrics (B,) as ``dpo``.

    Convention: first-order stochastic dominance of the distribution of d over that of r, with the logistic cost. TRL's
    ``loss_type="aot"``, which lists the losses by rank; older releases used other names. With one pair in the batch it
    is ``dpo``. It wants the whole optimizer batch at once: a part of it has other ranks. Among equal d the order is
    that of the rows.

    Known failure: a pair is compared with whichever pair has its rank, not with itself: the policy may learn one pair
    at the cost of another. With small batches the ranks are noise.

    Source: Melnyk et al., Distributional Preference Alignment of LLMs via Optimal Transport, arXiv:2406.05882.

    >>> x_BT, mask_BT = torch.tensor([[-1.0], [-3.0]]), torch.tensor([[True], [True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=x_BT, ref_chosen_logps_BT=x_BT.flip(0) - 1.0, rejected_logps_BT=0 * x_BT,
    ...     ref_rejected_logps_BT=0 * x_BT, chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> aot(batch, beta=0.5).loss  # d = -1, -3 and r = -4, -2: by rank, each is 1 above
    tensor([0.4741, 0.4741])
    """
    policy_B, row_B = by_rank(batch.chosen_B - batch.rejected_B)
    reference_B, _ = by_rank(batch.ref_chosen_B - batch.ref_rejected_B)
    loss_B = -F.logsigmoid(beta * (policy_B - reference_B))
    return LossOut(loss_B[row_B.argsort()], pair_metrics(batch, beta))


@register_loss(
    paper="arXiv:2406.05882", whole_batch=True, recommended={"learning_rate": 1e-6},
    exceptions={"row_permutation": "the k-th loss is that of the k-th ranks, which belong to two different pairs"},
)  # fmt: skip
def aot_unpaired(batch: Pairs, *, beta: Positive = 0.1) -> LossOut:
    """Alignment by optimal transport, unpaired: chosen log-ratios are to dominate the rejected ones, rank by rank.

        loss_k = -log σ(β (s_w,(k) - s_l,(k)))      _(k): k-th smallest of the batch

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats. Which chosen completion stands beside
            which rejected one has no effect.
        beta: strength of the pull to the reference, per nat.

    Returns:
        One loss per *rank*, (B,), in nats, from the lowest: no value belongs to a pair. Metrics (B,) as ``dpo``, of the
        pairs.

    Convention: first-order stochastic dominance of the chosen log-ratios over the rejected ones, with the logistic
    cost. TRL's ``loss_type="aot_unpaired"``; older releases used other names. With one pair in the batch it is ``dpo``.
    It wants the whole optimizer batch at once. Among equal values the order is that of the rows.

    Known failure: completions of different prompts are compared, so prompts whose answers are all likelier than under
    the reference stand in for good answers. With small batches the ranks are noise.

    Source: Melnyk et al., Distributional Preference Alignment of LLMs via Optimal Transport, arXiv:2406.05882.

    >>> x_BT, mask_BT = torch.tensor([[-1.0], [-3.0]]), torch.tensor([[True], [True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=x_BT, ref_chosen_logps_BT=0 * x_BT, rejected_logps_BT=x_BT.flip(0) - 1.0,
    ...     ref_rejected_logps_BT=0 * x_BT, chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> aot_unpaired(batch, beta=0.5).loss  # -1, -3 over -4, -2: by rank, each is 1 above
    tensor([0.4741, 0.4741])
    """
    chosen_B, _ = by_rank(batch.chosen_ratio_B)
    rejected_B, _ = by_rank(batch.rejected_ratio_B)
    return LossOut(-F.logsigmoid(beta * (chosen_B - rejected_B)), pair_metrics(batch, beta))
