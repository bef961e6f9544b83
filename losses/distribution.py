"""Distribution losses: the policy's whole distribution at every token against a teacher's, one value per token.

P is the teacher, π the policy, both over the vocabulary at one token of a completion. And pure functions of logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefzoo.losses.base import register_loss
from prefzoo.losses.kl import kl_of, log_probs
from prefzoo.records import Distribution, LossOut
from prefzoo.registry import Positive, Share, UsageError


@register_loss(paper="arXiv:2306.13649")
def gkd(batch: Distribution, *, beta: Share = 0.5, temperature: Positive = 1.0) -> LossOut:
    """Generalised knowledge distillation: a Jensen-Shannon divergence between teacher and policy at every token.

        M      = β P + (1 - β) π
        loss_t = β KL(P ‖ M) + (1 - β) KL(π ‖ M)     0 < β < 1
        loss_t = KL(P ‖ π)                           β = 0
        loss_t = KL(π ‖ P)                           β = 1

    Args:
        batch: logits of policy and teacher, (B, T, V).
        beta: β, from covering all that the teacher does (0) to seeking what it does most (1); 0.5 is symmetric.
        temperature: divides both logits first.

    Returns:
        One loss per token, (B, T), in nats; at most log 2 for β = 0.5. Metrics (B, T): ``kl/forward`` = KL(P ‖ π),
        ``kl/reverse`` = KL(π ‖ P).

    Convention: as in the paper and in TRL. The divergence itself goes to 0 at both ends, like β KL(P ‖ π) and like
    (1 - β) KL(π ‖ P); at 0 and 1 the KL is put in its place, so the loss jumps there. On which completions, the data's
    or the policy's own (``lmbda`` of TRL), is the algorithm's. Not multiplied by the squared temperature.

    Known failure: bounded: where policy and teacher do not overlap, the gradient vanishes. In float32 a β below 1e-4
    loses digits (its gradient is 0.5 % off at 1e-5); β = 0 itself is exact.

    Source: Agarwal et al., On-Policy Distillation of Language Models, arXiv:2306.13649, equation 1.

    >>> batch = Distribution(logits_BTV=torch.tensor([[[0.0, 0.0]]]), teacher_logits_BTV=torch.tensor([[[1.0, 0.0]]]),
    ...     mask_BT=torch.tensor([[True]]))
    >>> gkd(batch).loss, gkd(batch, beta=0.0).loss
    (tensor([[0.0285]]), tensor([[0.1109]]))
    """
    if not 0 <= beta <= 1:
        raise UsageError(f"gkd: beta must be from 0 to 1, got {beta:g}.")
    logps_BTV, teacher_BTV = _both(batch, temperature)
    forward_BT, reverse_BT = kl_of(teacher_BTV, logps_BTV), kl_of(logps_BTV, teacher_BTV)
    if beta == 0:
        loss_BT = forward_BT
    elif beta == 1:
        loss_BT = reverse_BT
    else:
        mixture_BTV = torch.logaddexp(teacher_BTV + math.log(beta), logps_BTV + math.log1p(-beta))
        loss_BT = beta * kl_of(teacher_BTV, mixture_BTV) + (1 - beta) * kl_of(logps_BTV, mixture_BTV)
    return LossOut(loss_BT, {"kl/forward": forward_BT.detach(), "kl/reverse": reverse_BT.detach()})


@register_loss(paper="arXiv:1503.02531")
def forward_kl(batch: Distribution, *, temperature: Positive = 1.0) -> LossOut:
    """Distillation: the KL from the teacher to the policy at every token.

        loss_t = KL(P ‖ π) = Σ_v P(v) (log P(v) - log π(v))

    Args:
        batch: logits of policy and teacher, (B, T, V).
        temperature: divides both logits first.

    Returns:
        One loss per token, (B, T), in nats.

    Convention: Hinton's cross-entropy less the teacher's entropy, a constant: same gradient, but 0 at the optimum. Not
    multiplied by the squared temperature, as Hinton does to keep the gradient's size: give it as the term's weight.
    ``gkd`` with beta = 0.

    Known failure: covers everything: a small policy puts probability between the modes of a large teacher.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531.

    >>> batch = Distribution(logits_BTV=torch.tensor([[[0.0, 0.0]]]), teacher_logits_BTV=torch.tensor([[[1.0, 0.0]]]),
    ...     mask_BT=torch.tensor([[True]]))
    >>> forward_kl(batch).loss
    tensor([[0.1109]])
    """
    logps_BTV, teacher_BTV = _both(batch, temperature)
    return LossOut(kl_of(teacher_BTV, logps_BTV))


@register_loss(paper="arXiv:2306.08543")
def reverse_kl(batch: Distribution, *, temperature: Positive = 1.0) -> LossOut:
    """MiniLLM's divergence at every token: the KL from the policy to the teacher.

        loss_t = KL(π ‖ P) = Σ_v π(v) (log π(v) - log P(v))

    Args:
        batch: logits of policy and teacher, (B, T, V).
        temperature: divides both logits first.

    Returns:
        One loss per token, (B, T), in nats.

    Convention: exact over the vocabulary on the completions given: the paper's single-step part. The paper's objective
    is the KL of whole completions; its other part, the effect of a token on those after it, is a policy gradient with
    the later KL as a cost. ``gkd`` with beta = 1.

    Known failure: seeks modes: what the policy no longer does gives no gradient, so diversity is lost for good.

    Source: Gu et al. (MiniLLM), arXiv:2306.08543.

    >>> batch = Distribution(logits_BTV=torch.tensor([[[0.0, 0.0]]]), teacher_logits_BTV=torch.tensor([[[1.0, 0.0]]]),
    ...     mask_BT=torch.tensor([[True]]))
    >>> reverse_kl(batch).loss
    tensor([[0.1201]])
    """
    logps_BTV, teacher_BTV = _both(batch, temperature)
    return LossOut(kl_of(logps_BTV, teacher_BTV))


def _both(batch: Distribution, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of policy and teacher; uniform, and without gradient, outside the mask."""
    inside = batch.mask_BT[..., None]
    logits_BTV = torch.where(inside, batch.logits_BTV, 0.0)
    teacher_BTV = torch.where(inside, batch.teacher_logits_BTV.detach(), 0.0)
    return log_probs(logits_BTV, temperature), log_probs(teacher_BTV, temperature)


# -- pure functions of logits -----------------------------------------------------------------------------------------


def token_logps(logits: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token given, in nats; ``tokens`` has the shape of the logits without the vocabulary.

    >>> token_logps(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
    tensor([-0.6931])
    """
    return log_probs(logits, temperature).gather(-1, tokens[..., None])[..., 0]


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy over the vocabulary at each position, in nats.

    >>> entropy(torch.tensor([[0.0, 0.0, -torch.inf]]))
    tensor([0.6931])
    """
    logps = log_probs(logits, temperature)
    return -(logps.exp() * logps).sum(-1)


def log_sum_squares(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log Σ_v π(v)², the log-probability that two draws agree, in nats.

    >>> log_sum_squares(torch.tensor([[0.0, 0.0]]))
    tensor([-0.6931])
    """
    return (2 * log_probs(logits, temperature)).logsumexp(-1)
