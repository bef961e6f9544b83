"""Ranked losses: K completions of one prompt, best first, one value per list.

Notation of the equations: s_i is the log-ratio log π(y_i)/ref(y_i) of the completion at rank i, summed over its tokens,
the EOS included; x_i = β s_i its implicit reward; K the number of completions that the list has. A list with fewer
than two completions says nothing: its loss is 0.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from prefzoo.losses.base import register_loss
from prefzoo.losses.numerics import exponent_limit, masked
from prefzoo.losses.rankings import (
    accuracy_P,
    all_pairs_P,
    differences_PKK,
    log_softmax_PK,
    plackett_luce_P,
    rest_mean_P,
)
from prefzoo.records import LossOut, Ranked
from prefzoo.registry import Positive, Share, UsageError


@torch.no_grad()
def ranking_metrics(batch: Ranked, beta: float) -> dict[str, Tensor]:
    """Those of pairs, (P,) each: the best completion is the chosen one, the mean of all others the rejected."""
    rewards_PK = beta * batch.ratio_PK
    chosen_P, rejected_P = rewards_PK[:, 0], rest_mean_P(rewards_PK, batch.valid_PK)
    return {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/margins": chosen_P - rejected_P,
        "rewards/accuracies": accuracy_P(rewards_PK, batch.valid_PK),
        "logps/chosen": batch.sum_PK[:, 0],
        "logps/rejected": rest_mean_P(batch.sum_PK, batch.valid_PK),
    }


def scores_of(batch: Ranked, loss: str, why: str) -> Tensor:
    """The scores of the data, 0 where no completion is; without them an error that says what they are for."""
    if batch.scores_PK is None:
        raise UsageError(
            f"loss {loss!r} needs Ranked.scores_PK {why}: give data that have a score for every completion."
        )
    return masked(batch.scores_PK.detach(), batch.valid_PK)


def best_takes_all(valid_PK: Tensor, dtype: torch.dtype, share: float = 0.0) -> Tensor:
    """Target probabilities of a ranking alone: 1 - share for the best, the share in equal parts for the others."""
    first_PK = torch.arange(valid_PK.shape[-1], device=valid_PK.device) == 0
    rest_P1 = (valid_PK.sum(-1, keepdim=True) - 1).clamp(min=1)
    return torch.where(first_PK, 1 - share, share / rest_P1.to(dtype)) * valid_PK


def of_lists(loss_PK: Tensor, valid_PK: Tensor) -> Tensor:
    """Sum over the completions of each list; 0 for a list that compares nothing."""
    return masked(loss_PK, valid_PK & (valid_PK.sum(-1, keepdim=True) > 1)).sum(-1)


@register_loss(paper="arXiv:2305.18290", recommended={"learning_rate": 1e-6})
def pl_dpo(batch: Ranked, *, beta: Positive = 0.1) -> LossOut:
    """Plackett-Luce DPO: the likelihood of the whole ranking, drawn from the best downwards by implicit rewards.

        loss = Σ_{k < K} [log Σ_{j ≥ k} exp(x_j) - x_k],  x = β s

    Args:
        batch: rankings with reference log-probabilities, (P, K, T), in nats.
        beta: strength of the pull to the reference, per nat.

    Returns:
        One loss per list, (P,), in nats; log K! where policy and reference are equal. Metrics (P,): ``rewards/chosen``
        = x of the best, ``rewards/rejected`` = mean x of the others, ``rewards/margins``, ``rewards/accuracies`` =
        share of pairs in the right order, ``logps/chosen``, ``logps/rejected``.

    Convention: a sum over the K - 1 choices, as in the paper, so long lists weigh more; two completions give ``dpo``.

    Known failure: as DPO, it fixes differences only, and all log-probabilities of a list may fall together. The first
    choices have the most competitors and dominate, so noise at the top of a ranking costs most.

    Source: Rafailov et al., Direct Preference Optimization, arXiv:2305.18290, appendix A.3.

    >>> batch = Ranked(
    ...     logps_PKT=torch.tensor([[[-1.0], [-2.0], [-3.0]]]), ref_logps_PKT=torch.full((1, 3, 1), -2.0),
    ...     mask_PKT=torch.ones(1, 3, 1, dtype=torch.bool), valid_PK=torch.ones(1, 3, dtype=torch.bool))
    >>> pl_dpo(batch, beta=1.0).loss  # log(1 + e^-1 + e^-2) + log(1 + e^-1)
    tensor([0.7209])
    """
    return LossOut(plackett_luce_P(beta * batch.ratio_PK, batch.valid_PK), ranking_metrics(batch, beta))


@register_loss(paper="arXiv:2305.18290", recommended={"learning_rate": 1e-6})
def all_pairs_dpo(batch: Ranked, *, beta: Positive = 0.1) -> LossOut:
    """DPO on all pairs of a ranking: every completion against every lower one, averaged over the pairs of the list.

        loss = 1/C(K,2) Σ_{i < j} -log σ(β (s_i - s_j))

    Args:
        batch: rankings with reference log-probabilities, (P, K, T), in nats.
        beta: strength of the pull to the reference, per nat.

    Returns:
        One loss per list, (P,), in nats; log 2 where policy and reference are equal. Metrics (P,) as ``pl_dpo``.

    Convention: 1/C(K,2) inside, as InstructGPT divides for reward models: every prompt counts alike. For every *pair*
    alike, give ``weight_P`` = C(K,2) (``prefzoo.losses.rankings.pairs_P``) and the count ``weight``.

    Known failure: as DPO, log-probabilities of all completions may fall together. The K - 1 pairs of one completion are
    not independent, so a list of K is less evidence than C(K,2) pairs of different prompts.

    Source: Rafailov et al., arXiv:2305.18290, equation 7; all pairs of a list with 1/C(K,2): Ouyang et al.,
    arXiv:2203.02155, equation 1.

    >>> batch = Ranked(
    ...     logps_PKT=torch.tensor([[[-1.0], [-2.0], [-3.0]]]), ref_logps_PKT=torch.full((1, 3, 1), -2.0),
    ...     mask_PKT=torch.ones(1, 3, 1, dtype=torch.bool), valid_PK=torch.ones(1, 3, dtype=torch.bool))
    >>> all_pairs_dpo(batch, beta=1.0).loss  # (2 * 0.3133 + 0.1269) / 3
    tensor([0.2512])
    """
    return LossOut(all_pairs_P(beta * batch.ratio_PK, batch.valid_PK), ranking_metrics(batch, beta))


@register_loss(
    paper="arXiv:2402.05369", recommended={"learning_rate": 1e-6},
    extras=lambda options: () if options["alpha"] is None else ("scores_PK",),
)  # fmt: skip
def nca(batch: Ranked, *, beta: Positive = 0.1, alpha: Positive | None = None) -> LossOut:
    """Noise contrastive alignment: is this completion data or noise? A classifier per completion, not of differences.

        loss = Σ_i [-p_i log σ(x_i) - 1/K log σ(-x_i)],  x = β s,  p = softmax(scores / α)

    Args:
        batch: rankings with reference log-probabilities, (P, K, T), in nats; ``scores_PK`` where ``alpha`` is given.
        beta: scale of the implicit reward, per nat.
        alpha: temperature of the labels p, in units of the scores. None: its limit 0, all on the best completion, so
            that a ranking without scores is enough.

    Returns:
        One loss per list, (P,), in nats; 2 log 2 where policy and reference are equal. Metrics (P,) as ``pl_dpo``.

    Convention: two completions without ``alpha`` give ``nca_pair``, TRL's. The authors' configuration has beta = 0.01
    and a temperature of 0.0001, which is that limit for scores that differ; the default here keeps TRL's beta.

    Known failure: it holds log-probabilities up by fighting every log-ratio, also that of the best; where p is spread
    evenly, nothing tells the completions apart and the loss only pulls back to the reference.

    Source: Chen et al., Noise Contrastive Alignment of Language Models with Explicit Rewards, arXiv:2402.05369.

    >>> batch = Ranked(
    ...     logps_PKT=torch.tensor([[[-1.0], [-2.0], [-3.0]]]), ref_logps_PKT=torch.full((1, 3, 1), -2.0),
    ...     mask_PKT=torch.ones(1, 3, 1, dtype=torch.bool), valid_PK=torch.ones(1, 3, dtype=torch.bool))
    >>> nca(batch, beta=1.0).loss  # 0.3133 + (1.3133 + 0.6931 + 0.3133) / 3
    tensor([1.0865])
    """
    x_PK, valid_PK = beta * batch.ratio_PK, batch.valid_PK
    if alpha is None:
        target_PK = best_takes_all(valid_PK, x_PK.dtype)
    else:
        scores_PK = scores_of(batch, "nca", f"for its soft labels (alpha={alpha})")
        target_PK = log_softmax_PK(scores_PK / alpha, valid_PK).exp()
    count_P1 = valid_PK.sum(-1, keepdim=True).clamp(min=1)
    loss_PK = -target_PK * F.logsigmoid(x_PK) - F.logsigmoid(-x_PK) / count_P1
    return LossOut(of_lists(loss_PK, valid_PK), ranking_metrics(batch, beta))


@register_loss(
    paper="arXiv:2402.00856", recommended={"learning_rate": 1e-6},
    extras=lambda options: () if options["reward_beta"] is None else ("scores_PK",),
)  # fmt: skip
def exo(
    batch: Ranked, *, beta: Positive = 0.1, label_smoothing: Share = 1e-3, reward_beta: Positive | None = None
) -> LossOut:
    """Efficient exact optimization: the reverse KL from the policy's distribution over the list to the preferred one.

        loss = Σ_i q_i (log q_i - log p_i),  q = softmax(β s)

    with p = softmax(scores / β_r) where ``reward_beta`` is given, else 1 - ε for the best and ε / (K - 1) for each
    other.

    Args:
        batch: rankings with reference log-probabilities, (P, K, T), in nats; ``scores_PK`` for ``reward_beta``.
        beta: the paper's β_π, scale of the implicit reward, per nat.
        label_smoothing: ε, above 0 and below 1: at 0 the divergence is infinite.
        reward_beta: β_r, temperature of the scores, in their units. None: the ranking alone, by ``label_smoothing``.

    Returns:
        One loss per list, (P,), in nats, 0 where q = p. Metrics (P,) as ``pl_dpo``.

    Convention: two completions without ``reward_beta`` give ``exo_pair``, whose default ε is the same. The gradient
    flows through q as weight and as logarithm, as in a reverse KL; DPO's is the forward one, with p as the weight.

    Known failure: reverse KL seeks a mode: where a completion below the best has most of q, its pull back saturates,
    and the gradient vanishes. A small ε makes log p large, and so the loss.

    Source: Ji et al., Towards Efficient Exact Optimization of Language Model Alignment, arXiv:2402.00856.

    >>> batch = Ranked(
    ...     logps_PKT=torch.tensor([[[-1.0], [-2.0], [-3.0]]]), ref_logps_PKT=torch.full((1, 3, 1), -2.0),
    ...     mask_PKT=torch.ones(1, 3, 1, dtype=torch.bool), valid_PK=torch.ones(1, 3, dtype=torch.bool))
    >>> exo(batch, beta=1.0, label_smoothing=0.5).loss  # q = (0.67, 0.24, 0.09), p = (0.5, 0.25, 0.25)
    tensor([0.0928])
    """
    if not 0 < label_smoothing < 1:
        raise UsageError(
            f"loss 'exo', option 'label_smoothing': expected a number above 0 and below 1, got {label_smoothing}: "
            "at the ends the reverse KL is infinite. The paper's small values are near 0.001."
        )
    x_PK, valid_PK = beta * batch.ratio_PK, batch.valid_PK
    if reward_beta is None:
        target_PK = best_takes_all(valid_PK, x_PK.dtype, label_smoothing)
        log_target_PK = torch.where(valid_PK, target_PK, 1.0).log()
    else:
        if label_smoothing != 1e-3:
            raise UsageError(
                f"loss 'exo': label_smoothing={label_smoothing} has no effect with reward_beta={reward_beta}, which "
                "takes the labels from the scores. Give one of them."
            )
        log_target_PK = log_softmax_PK(
            scores_of(batch, "exo", f"for reward_beta={reward_beta}") / reward_beta, valid_PK
        )
    log_q_PK = log_softmax_PK(x_PK, valid_PK)
    return LossOut(of_lists(log_q_PK.exp() * (log_q_PK - log_target_PK), valid_PK), ranking_metrics(batch, beta))


@torch.no_grad()
def lambda_weights(scores_PK: Tensor, x_PK: Tensor, valid_PK: Tensor) -> Tensor:
    """LambdaLoss weights of all pairs (i, j) with scores_i > scores_j, (P, K, K); 0 for all others; detached.

    |2^score_i - 2^score_j| |1/log(1 + rank_i) - 1/log(1 + rank_j)|, the ranks being those of ``x_PK``, 1 for the
    largest. By so much DCG would change if the two changed places. Equal ``x_PK`` keep the order of the list. Scores
    above 57 (in float64: 504) count as that, so that no gain overflows.
    """
    lowest = torch.finfo(x_PK.dtype).min
    order_PK = torch.where(valid_PK, x_PK, lowest).argsort(dim=-1, descending=True, stable=True)
    discount_PK = 1 / torch.log1p(1 + order_PK.argsort(-1).to(x_PK.dtype))
    # At half the largest exponent: a gain is a factor of the loss, and their product must be finite too.
    gain_PK = masked(scores_PK, valid_PK).clamp(max=exponent_limit(x_PK.dtype) / 2 / math.log(2)).exp2()
    gains_PKK = gain_PK[..., :, None] - gain_PK[..., None, :]
    both_PKK = valid_PK[..., :, None] & valid_PK[..., None, :]
    return masked(gains_PKK.clamp(min=0), both_PKK) * (discount_PK[..., :, None] - discount_PK[..., None, :]).abs()


@register_loss(paper="arXiv:2402.01878", extras=("scores_PK",), recommended={"learning_rate": 1e-6})
def lipo(batch: Ranked, *, beta: Positive = 0.1) -> LossOut:
    """LiPO-λ: DPO on all pairs of a list, each weighted by what exchanging the two would change in the list's DCG.

        loss = Σ_{ψ_i > ψ_j} Δ_ij (-log σ(x_i - x_j)),  x = β s
        Δ_ij = |G_i - G_j| |1/D(τ_i) - 1/D(τ_j)|,  G = 2^ψ - 1,  D(τ) = log(1 + τ)

    with ψ the scores of the data and τ the rank of a completion under the policy's own x, 1 for the largest.

    Args:
        batch: rankings with reference log-probabilities, (P, K, T), in nats, and ``scores_PK``, which the paper keeps
            between 0 and 1.
        beta: scale of the implicit reward, per nat.

    Returns:
        One loss per list, (P,), in nats times gain. Metrics (P,) as ``pl_dpo``.

    Convention: natural logarithm in D, and no division by the number of pairs or by the ideal DCG, as the paper writes
    it; so its scale grows with K and with the scores. The weights carry no gradient. At the start all x are equal: then
    the ranks τ are those of the list. Pairs of equal score have weight 0.

    Known failure: gains are exponential: scores of another scale than 0 to 1, such as 1 to 10, let one completion
    decide everything. Those above 57 (in float64: 504), where gains would overflow, count as equal, so a scale of 0 to
    100 loses its best. Scale them first. The ranks jump, and the loss with them.

    Source: Liu et al., LiPO: Listwise Preference Optimization through Learning-to-Rank, arXiv:2402.01878.

    >>> batch = Ranked(
    ...     logps_PKT=torch.tensor([[[-1.0], [-2.0]]]), ref_logps_PKT=torch.full((1, 2, 1), -2.0),
    ...     mask_PKT=torch.ones(1, 2, 1, dtype=torch.bool), valid_PK=torch.ones(1, 2, dtype=torch.bool),
    ...     scores_PK=torch.tensor([[1.0, 0.0]]))
    >>> lipo(batch, beta=1.0).loss  # (2 - 1) * (1/log 2 - 1/log 3) * 0.3133
    tensor([0.1668])
    """
    scores_PK = scores_of(batch, "lipo", "for the gains of its weights")
    x_PK = beta * batch.ratio_PK
    weight_PKK = lambda_weights(scores_PK, x_PK, batch.valid_PK)
    loss_PKK = -weight_PKK * F.logsigmoid(differences_PKK(x_PK, batch.valid_PK))
    return LossOut(loss_PKK.sum((-2, -1)), ranking_metrics(batch, beta))


@register_loss(paper="arXiv:2405.00675", extras=("scores_PK",), recommended={"learning_rate": 5e-7})
def sppo(batch: Ranked, *, beta: Positive = 0.001) -> LossOut:
    """Self-play preference optimization: regress the log-ratio of every sample on how often it wins.

        loss = 1/K Σ_i (s_i - (p_i - 1/2) / β)²

    Args:
        batch: rankings with reference log-probabilities, (P, K, T), in nats, and ``scores_PK``, p: the probability that
            a completion beats one of the policy that wrote them, the reference here, from 0 to 1.
        beta: 1 / η of the paper: nats of target per unit of win probability are 1 / β.

    Returns:
        One loss per list, (P,), in squared nats. Metrics (P,) as ``pl_dpo``.

    Convention: the paper's estimate from K samples; its authors train on the best and the worst alone, lists of two,
    and take half the sum of the two squares, which a mean is. Defaults are those of their scripts (η = 1000). The log
    of the partition function is taken to be 1 / (2 β), as in the paper. Not in TRL; of a pair and one probability:
    ``sppo_soft``.

    Known failure: at the default beta a tenth of win probability is 100 nats, so learning rate and number of steps set
    how far it moves. Scores that are no probabilities make targets without a meaning.

    Source: Wu et al., Self-Play Preference Optimization for Language Model Alignment, arXiv:2405.00675, algorithm 1.

    >>> batch = Ranked(
    ...     logps_PKT=torch.tensor([[[-1.0], [-2.0]]]), ref_logps_PKT=torch.full((1, 2, 1), -2.0),
    ...     mask_PKT=torch.ones(1, 2, 1, dtype=torch.bool), valid_PK=torch.ones(1, 2, dtype=torch.bool),
    ...     scores_PK=torch.tensor([[0.75, 0.25]]))
    >>> sppo(batch, beta=0.5).loss  # ((1 - 0.5)² + (0 + 0.5)²) / 2
    tensor([0.2500])
    """
    target_PK = (scores_of(batch, "sppo", "for the probabilities to win") - 0.5) / beta
    valid_PK = batch.valid_PK
    squares_PK = (batch.ratio_PK - target_PK).square() / valid_PK.sum(-1, keepdim=True).clamp(min=1)
    return LossOut(of_lists(squares_PK, valid_PK), ranking_metrics(batch, beta))
