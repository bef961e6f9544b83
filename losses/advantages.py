"""Advantage estimators: from rewards to what each completion or token deserves. No gradient flows through any of them.

``group_B`` says which prompt a row belongs to: any integers, in any order, groups of any size. A reward of NaN is a
missing one: it is left out of its group's statistics and its advantage is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefzoo.losses.kl import EstimatorName, kl_estimator
from prefzoo.losses.numerics import masked


def _group_sum(values_B: Tensor, group_B: Tensor) -> Tensor:
    """For every row the sum over its group, (B,)."""
    index_B = torch.unique(group_B, return_inverse=True)[1]
    return torch.zeros_like(values_B).index_add(0, index_B, values_B)[index_B]


def _centred(rewards_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards minus the mean of their group (0 where missing), and how many of the group are known; (B,) both."""
    known_B = ~rewards_B.isnan()
    size_B = _group_sum(known_B.to(rewards_B.dtype), group_B)
    # From the group's largest on: equal rewards are then exactly 0, which R - mean(R) is not after rounding.
    index_B = torch.unique(group_B, return_inverse=True)[1]
    lowest = torch.full_like(rewards_B, -torch.inf)
    largest_B = lowest.scatter_reduce(0, index_B, rewards_B.nan_to_num(nan=-torch.inf), "amax")[index_B]
    below_B = masked(rewards_B - largest_B, known_B)
    return masked(below_B - _group_sum(below_B, group_B) / size_B.clamp(min=1), known_B), size_B


@torch.no_grad()
def group_relative(rewards_B: Tensor, group_B: Tensor, *, std: bool = True, eps: float = 1e-4) -> Tensor:
    """GRPO's advantage: the reward relative to the other samples of its prompt.

        A_i = (R_i - mean) / (std + eps)

    Args:
        rewards_B: one reward per completion; NaN is a missing one.
        group_B: the prompt of each completion, any integers.
        std: divide by the group's standard deviation. False is Dr. GRPO: differences keep their reward units.
        eps: added to the standard deviation.

    Returns:
        Advantages, (B,); 0 for missing rewards, for groups of one, and for groups whose rewards are all equal.

    Convention: the sample standard deviation (n - 1) and eps = 1e-4, as in TRL; verl has 1e-6; the paper leaves both
    open.

    Source: Shao et al., arXiv:2402.03300, section 4.1.2; std=False: Liu et al., arXiv:2503.20783.

    >>> group_relative(torch.tensor([1.0, 5.0, 0.0, 5.0]), torch.tensor([7, 3, 7, 3]), std=False)
    tensor([ 0.5000,  0.0000, -0.5000,  0.0000])
    """
    centred_B, size_B = _centred(rewards_B, group_B)
    if not std:
        return centred_B
    variance_B = _group_sum(centred_B.square(), group_B) / (size_B - 1).clamp(min=1)
    return centred_B / (variance_B.sqrt() + eps)


@torch.no_grad()
def leave_one_out(rewards_B: Tensor, group_B: Tensor) -> Tensor:
    """RLOO's advantage: the reward minus the mean reward of the *other* samples of its prompt.

        A_i = R_i - mean_{j ≠ i} R_j = G / (G - 1) (R_i - mean)

    Args:
        rewards_B: one reward per completion; NaN is a missing one.
        group_B: the prompt of each completion, any integers.

    Returns:
        Advantages, (B,), in reward units; 0 for missing rewards and where there is no other sample to compare with.

    Source: Kool et al., 2019; Ahmadian et al., arXiv:2402.14740.

    >>> leave_one_out(torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0, 0, 0]))
    tensor([ 3.0000, -1.5000, -1.5000])
    """
    centred_B, size_B = _centred(rewards_B, group_B)
    return centred_B * size_B / (size_B - 1).clamp(min=1)


@torch.no_grad()
def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the masked tokens of each row.

        δ_t = r_t + γ V_{t+1} - V_t
        A_t = δ_t + γ λ A_{t+1}
        R_t = A_t + V_t

    where t + 1 is the next *masked* token: holes (prompts of later turns, tool output) and padding are skipped over.

    Args:
        rewards_BT: reward at every token. values_BT: predictions of the critic, before the token. Both in reward units.
        mask_BT: the tokens that the policy chose.
        gamma: discount per token.
        lam: λ; 1 is the return minus the value, 0 the one-step error.
        bootstrap_B: value after the last token, for completions that were cut. None: 0, the completion has ended.

    Returns:
        Advantages and returns, (B, T) each, 0 outside the mask.

    Source: Schulman et al., arXiv:1506.02438, equation 16.

    >>> rewards_BT, values_BT = torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.5]])
    >>> gae(rewards_BT, values_BT, torch.tensor([[True, False, True]]), lam=1.0)
    (tensor([[0.5000, 0.0000, 0.5000]]), tensor([[1., 0., 1.]]))
    """
    next_value_B = torch.zeros_like(values_BT[:, 0]) if bootstrap_B is None else bootstrap_B
    advantage_B = torch.zeros_like(next_value_B)
    advantages_BT = torch.zeros_like(values_BT)
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = torch.where(mask_BT[:, t], delta_B + gamma * lam * advantage_B, advantage_B)
        next_value_B = torch.where(mask_BT[:, t], values_BT[:, t], next_value_B)
        advantages_BT[:, t] = advantage_B
    advantages_BT = masked(advantages_BT, mask_BT)
    return advantages_BT, masked(advantages_BT + values_BT, mask_BT)


@torch.no_grad()
def whiten(
    values_BT: Tensor, mask_BT: Tensor, *, shift_mean: bool = True, unbiased: bool = True, eps: float = 1e-8
) -> Tensor:
    """Standardise over all masked tokens of the batch.

        (x - mean) / sqrt(var + eps)

    Args:
        values_BT: advantages or rewards.
        mask_BT: the tokens that count.
        shift_mean: whether the result has mean 0; False puts the mean back, as is done with rewards.
        unbiased: variance with n - 1 (TRL, verl); False: with n (OpenRLHF).
        eps: added to the variance.

    Returns:
        Whitened values, (B, T), 0 outside the mask.

    Convention: the statistics are those of the tensors given. Give the whole batch, not a micro-batch.

    >>> whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]]), unbiased=False)
    tensor([[-1.,  1.,  0.]])
    """
    size = mask_BT.sum()
    mean = masked(values_BT, mask_BT).sum() / size.clamp(min=1)
    centred_BT = masked(values_BT - mean, mask_BT)
    variance = centred_BT.square().sum() / (size - int(unbiased)).clamp(min=1)
    white_BT = centred_BT / (variance + eps).sqrt()
    return white_BT if shift_mean else masked(white_BT + mean, mask_BT)


@torch.no_grad()
def best_of_k(scores_B: Tensor, group_B: Tensor, k: int = 1) -> Tensor:
    """Indices of the k best completions of every prompt.

    Args:
        scores_B: one score per completion; NaN is a missing one and never wins.
        group_B: the prompt of each completion, any integers.
        k: how many to keep; a group with fewer known scores keeps those.

    Returns:
        Row indices (int64), groups in the order of their numbers, best first; of equal scores the first row wins.

    Source: rejection sampling of Touvron et al. (Llama 2), arXiv:2307.09288; RAFT, Dong et al., arXiv:2304.06767.

    >>> best_of_k(torch.tensor([1.0, 2.0, 2.0, float("nan"), -1.0]), torch.tensor([0, 0, 0, 1, 1]))
    tensor([1, 4])
    """
    order_B = torch.argsort(-scores_B, stable=True)  # NaN sorts last
    order_B = order_B[torch.argsort(group_B[order_B], stable=True)]
    size_P = torch.unique_consecutive(group_B[order_B], return_counts=True)[1]
    first_B = torch.repeat_interleave(size_P.cumsum(0) - size_P, size_P)
    rank_B = torch.arange(len(order_B), device=order_B.device) - first_B
    return order_B[(rank_B < k) & ~scores_B[order_B].isnan()]


@torch.no_grad()
def shaped_rewards(
    scores_B: Tensor,
    logps_BT: Tensor,
    ref_logps_BT: Tensor,
    mask_BT: Tensor,
    *,
    kl: float = 0.05,
    estimator: EstimatorName = "k1",
) -> Tensor:
    """PPO's token rewards: a KL penalty at every token, and the score at the last one.

        r_t = -kl k(π(y_t), ref(y_t)) + [t is the last masked token] score

    Args:
        scores_B: score of each completion, in reward units.
        logps_BT: log-probabilities of the policy that sampled the completions, in nats. ref_logps_BT: the reference's.
        mask_BT: the tokens that the policy chose.
        kl: coefficient, in reward units per nat.
        estimator: ``"k1"``, ``"k2"`` or ``"k3"``; only the value counts here, so k1 and k3 are both unbiased.

    Returns:
        Token rewards, (B, T), 0 outside the mask. A row without any token has no place for its score.

    Source: Ziegler et al., arXiv:1909.08593, equation 2; per token as in Ouyang et al., arXiv:2203.02155.

    >>> logps_BT, mask_BT = torch.tensor([[-1.0, -1.0, 0.0]]), torch.tensor([[True, True, False]])
    >>> shaped_rewards(torch.tensor([2.0]), logps_BT, logps_BT - 1, mask_BT, kl=0.5)
    tensor([[-0.5000,  1.5000,  0.0000]])
    """
    kl_BT = kl_estimator(estimator)(masked(logps_BT, mask_BT), masked(ref_logps_BT, mask_BT))
    last_BT = mask_BT & (mask_BT.flip(-1).cumsum(-1).flip(-1) == 1)
    return torch.where(last_BT, scores_B[:, None], 0.0) - kl * kl_BT
