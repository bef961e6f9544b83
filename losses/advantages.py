"""Credit: from rewards to what each completion or token deserves. No gradient flows through any of it.

``group_B`` says which prompt a row belongs to: any integers, in any order, groups of any size. A reward of NaN is a
missing one: it is left out of its group's statistics and its advantage is 0. **R**, here: reward functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from torch import Tensor

from prefzoo.losses.base import register_credit
from prefzoo.losses.kl import ValueEstimatorName, kl_estimator
from prefzoo.losses.numerics import masked
from prefzoo.registry import ABOVE_0, NotNegative, Share, UsageError

Scale = Literal["group", "batch", "none"]


def _real(rewards: Tensor) -> Tensor:
    """Rewards as numbers that statistics can be made of: what is not float32 or float64 becomes float32.

    Integers and booleans have no NaN and no fractions, unsigned ones no negatives; squares of float16 overflow.
    """
    return rewards if rewards.dtype in (torch.float32, torch.float64) else rewards.to(torch.float32)


def _group_sum(values_B: Tensor, group_B: Tensor) -> Tensor:
    """For every row the sum over its group, (B,)."""
    index_B = torch.unique(group_B, return_inverse=True)[1]
    return torch.zeros_like(values_B).index_add(0, index_B, values_B)[index_B]


def _centred(rewards_B: Tensor, group_B: Tensor, weight_B: Tensor | None = None) -> Tensor:
    """Rewards minus the (weighted) mean of their group, 0 where missing, (B,)."""
    known_B = ~rewards_B.isnan()
    weight_B = known_B.to(rewards_B.dtype) * (1 if weight_B is None else weight_B)
    # From the group's largest on: equal rewards are then exactly 0, which R - mean(R) is not after rounding.
    index_B = torch.unique(group_B, return_inverse=True)[1]
    lowest = torch.full_like(rewards_B, -torch.inf)
    largest_B = lowest.scatter_reduce(0, index_B, rewards_B.nan_to_num(nan=-torch.inf), "amax")[index_B]
    below_B = masked(rewards_B - largest_B, known_B)
    total_B = _group_sum(weight_B, group_B)
    mean_B = _group_sum(weight_B * below_B, group_B) / torch.where(total_B > 0, total_B, 1.0)
    return masked(below_B - mean_B, known_B)


def _known(rewards_B: Tensor, group_B: Tensor) -> Tensor:
    """How many rewards of the row's group are known, (B,)."""
    return _group_sum((~rewards_B.isnan()).to(rewards_B.dtype), group_B)


@register_credit(paper="arXiv:2402.03300")
@torch.no_grad()
def group_relative(
    rewards_B: Tensor, group_B: Tensor, *, scale: Scale = "group", sample: bool = True, eps: NotNegative = 1e-4
) -> Tensor:
    """GRPO's advantage: the reward relative to the other samples of its prompt.

        A_i = (R_i - mean) / (std + eps)

    Args:
        rewards_B: one reward per completion; NaN is a missing one.
        group_B: the prompt of each completion, any integers.
        scale: by which standard deviation to divide: ``"group"``, that of the group; ``"batch"``, that of all rewards
            given; ``"none"``: do not, differences keep their reward units (Dr. GRPO).
        sample: the sample standard deviation, with n - 1; False: the population's, with n.
        eps: added to the standard deviation.

    Returns:
        Advantages, (B,); 0 for missing rewards, for groups of one, and for groups whose rewards are all equal.

    Convention: the sample standard deviation and eps = 1e-4, as in TRL; verl has 1e-6; the paper leaves both open.
    ``"batch"`` takes the deviation of the raw rewards, not of the differences, as TRL does. ``sample`` and ``eps`` have
    no effect without a division and are refused there.

    Known failure: dividing by the group's deviation makes the expected gradient another objective's than the mean
    reward's; from groups of four on, prompts that are almost always or almost never solved get the largest weight.

    Source: Shao et al., arXiv:2402.03300, section 4.1.2; scale="none": Liu et al., arXiv:2503.20783.

    >>> group_relative(torch.tensor([1.0, 5.0, 0.0, 5.0]), torch.tensor([7, 3, 7, 3]), scale="none")
    tensor([ 0.5000,  0.0000, -0.5000,  0.0000])
    """
    if scale not in ("group", "batch", "none"):
        raise UsageError(f"group_relative: scale is {scale!r}; it must be 'group', 'batch' or 'none'.")
    rewards_B = _real(rewards_B)
    centred_B = _centred(rewards_B, group_B)
    if scale == "none":
        if not sample or eps != 1e-4:
            raise UsageError("group_relative: sample and eps have no effect with scale='none', which never divides.")
        return centred_B
    if scale == "batch":
        return _over(centred_B, _std(rewards_B, sample) + eps)
    size_B = _known(rewards_B, group_B)
    variance_B = _group_sum(centred_B.square(), group_B) / (size_B - int(sample)).clamp(min=1)
    return _over(centred_B, variance_B.sqrt() + eps)


def _over(centred_B: Tensor, scale: Tensor) -> Tensor:
    """Their quotient, 0 where the first is 0: no contrast is no signal even without an eps."""
    return torch.where(centred_B == 0, 0.0, centred_B / scale)


def _std(values_B: Tensor, sample: bool = True) -> Tensor:
    """Standard deviation of the numbers that are not NaN, 0 where there are too few; a scalar."""
    known_B = ~values_B.isnan()
    size = known_B.sum()
    mean = masked(values_B, known_B).sum() / size.clamp(min=1)
    return (masked(values_B - mean, known_B).square().sum() / (size - int(sample)).clamp(min=1)).sqrt()


@register_credit(paper="arXiv:2402.14740")
@torch.no_grad()
def leave_one_out(rewards_B: Tensor, group_B: Tensor) -> Tensor:
    """RLOO's advantage: the reward minus the mean reward of the *other* samples of its prompt.

        A_i = R_i - mean_{j ≠ i} R_j = G / (G - 1) (R_i - mean)

    Args:
        rewards_B: one reward per completion; NaN is a missing one.
        group_B: the prompt of each completion, any integers.

    Returns:
        Advantages, (B,), in reward units; 0 for missing rewards and where there is no other sample to compare with.

    Convention: the reward of a completion is one number, its KL penalty inside (subtracted before, summed over its
    tokens), as in TRL. Not standardised; TRL offers that as an option.

    Known failure: with two samples a prompt the baseline is a single reward, and as noisy.

    Source: Kool et al., 2019; Ahmadian et al., arXiv:2402.14740.

    >>> leave_one_out(torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0, 0, 0]))
    tensor([ 3.0000, -1.5000, -1.5000])
    """
    rewards_B = _real(rewards_B)
    size_B = _known(rewards_B, group_B)
    return _centred(rewards_B, group_B) * size_B / (size_B - 1).clamp(min=1)


@register_credit(paper="arXiv:2310.10505")
@torch.no_grad()
def remax(rewards_B: Tensor, greedy_B: Tensor) -> Tensor:
    """ReMax's advantage: the reward minus the reward of the greedy completion of the same prompt.

        A_i = R_i - R(greedy completion of the prompt of i)

    Args:
        rewards_B: one reward per sampled completion; NaN is a missing one.
        greedy_B: for each row the reward of its prompt's greedy completion (temperature 0); NaN is a missing one.

    Returns:
        Advantages, (B,), in reward units; 0 where either reward is missing.

    Convention: the same for every token of a completion (no discount). The baseline costs one more generation a prompt
    and no second sample, so groups of one are fine.

    Known failure: where sampling rarely does as well as the greedy completion almost all advantages are negative.

    Source: Li et al. (ReMax), arXiv:2310.10505.

    >>> remax(torch.tensor([1.0, 0.0, float("nan")]), torch.tensor([0.5, 0.5, 0.5]))
    tensor([ 0.5000, -0.5000,  0.0000])
    """
    advantages_B = _real(rewards_B) - _real(greedy_B)
    return masked(advantages_B, ~advantages_B.isnan())


@register_credit(paper="arXiv:2505.23585")
@torch.no_grad()
def opo(rewards_B: Tensor, group_B: Tensor, length_B: Tensor) -> Tensor:
    """OPO's advantage: the reward minus the length-weighted mean reward of its group, the baseline of least variance.

        A_i = R_i - Σ_j n_j R_j / Σ_j n_j

    Args:
        rewards_B: one reward per completion; NaN is a missing one.
        group_B: the prompt of each completion, any integers.
        length_B: n, the number of tokens of each completion.

    Returns:
        Advantages, (B,), in reward units; 0 for missing rewards, groups of one and groups of equal rewards.

    Convention: the optimal baseline of REINFORCE weights rewards by the squared norm of the score ∇ log π(y); the paper
    takes that to be proportional to the length. Not divided by a standard deviation. A completion is in its own
    baseline, as in the paper's code, which shortens the expected gradient (to 1 - 1 / G of it where lengths are equal).

    Known failure: the proportionality is an assumption: it fails where most tokens are certain.

    Source: Hao et al. (On-Policy RL with Optimal Reward Baseline), arXiv:2505.23585.

    >>> opo(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), torch.tensor([3, 1]))
    tensor([ 0.2500, -0.7500])
    """
    return _centred(_real(rewards_B), group_B, length_B)


@register_credit(paper="arXiv:2601.05242")
@torch.no_grad()
def gdpo(
    rewards_BR: Tensor, group_B: Tensor, *, weights: Sequence[float] | None = None, eps: NotNegative = 1e-4
) -> Tensor:
    """GDPO's advantage for several rewards: each is standardised within its group, then they are added.

        A_ir = (R_ir - mean) / (std + eps) within the group;   S_i = Σ_r w_r A_ir;   A_i = S_i / (std(S) + eps)

    Args:
        rewards_BR: one column per reward function; NaN where a function does not apply to a row.
        group_B: the prompt of each completion, any integers.
        weights: w, one per reward function; None: all 1.
        eps: added to the standard deviations.

    Returns:
        Advantages, (B,), standardised over all rows given; 0 for rows without any reward.

    Convention: sample deviations and eps = 1e-4, as in TRL (``multi_objective_aggregation="normalize_then_sum"``). The
    mean over the batch, which TRL subtracts too, is 0 already. GRPO on a sum of rewards is ``group_relative`` of that
    sum. Give the whole batch, not a micro-batch.

    Known failure: standardising makes a reward that hardly varies as loud as one that matters: noise counts.

    Source: Liu et al. (GDPO), arXiv:2601.05242.

    >>> gdpo(torch.tensor([[1.0, 9.0], [0.0, 0.0]]), torch.tensor([0, 0])).round(decimals=3)
    tensor([ 0.7070, -0.7070])
    """
    if weights is not None and len(weights) != rewards_BR.shape[1]:
        raise UsageError(f"gdpo: {len(weights)} weights for {rewards_BR.shape[1]} reward functions.")
    rewards_BR = _real(rewards_BR)
    columns = [group_relative(rewards_B, group_B, eps=eps) for rewards_B in rewards_BR.unbind(1)]
    weight_R = torch.ones_like(rewards_BR[0]) if weights is None else rewards_BR.new_tensor(weights)
    total_B = torch.stack(columns, 1) @ weight_R
    missing_B = rewards_BR.isnan().all(1)
    # Each group's sum is 0, and so is the mean of the batch.
    return _over(total_B, _std(total_B.masked_fill(missing_B, torch.nan)) + eps)


@register_credit(paper="arXiv:1506.02438")
@torch.no_grad()
def gae(
    rewards_BT: Tensor,
    values_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: Share = 1.0,
    lam: Share = 0.95,
    bootstrap_B: Tensor | None = None,
    span_BT: Tensor | None = None,
    span_value: Literal["mean", "first"] = "mean",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the masked tokens of each row, or over macro-actions of several tokens.

        δ_t = r_t + γ V_{t+1} - V_t
        A_t = δ_t + γ λ A_{t+1}
        R_t = A_t + V_t

    where t + 1 is the next *masked* token: holes (prompts of later turns, tool output) and padding are skipped over.
    With spans t counts macro-actions: the reward of one is the sum of its tokens', and each of its tokens gets its
    advantage and its return.

    Args:
        rewards_BT: reward at every token. values_BT: predictions of the critic, before the token. Both in reward units.
        mask_BT: the tokens that the policy chose.
        gamma: discount per token, or per macro-action.
        lam: λ; 1 is the return minus the value, 0 the one-step error.
        bootstrap_B: value after the last token, for completions that were cut. None: 0, the completion has ended.
        span_BT: number of the macro-action of each token, any integers: neighbouring masked tokens with the same one
            belong together. ``(mask_BT.cumsum(-1) - 1) // 5`` is n-grams of 5. None: every token for itself.
        span_value: value of a macro-action: ``"mean"`` of its tokens', or that of its ``"first"`` token.

    Returns:
        Advantages and returns, (B, T) each, 0 outside the mask.

    Convention: λ = 0.95 as in TRL's former PPO and the PPO papers; the paper on macro-actions and its code have the
    mean of the tokens' values by default ("equal"). The value where a macro-action is chosen is that of its first
    token. Rewards of a span are added, undiscounted; the code of that paper averages them, which loses part of the KL
    penalty.

    Known failure: with λ < 1 the advantages are biased by the critic's error; early in training that is all there is.
    The mean value of a macro-action has seen its tokens, so as a baseline it biases the gradient even where the critic
    is right; ``"first"`` does not.

    Source: Schulman et al., arXiv:1506.02438, equation 16; macro-actions: Chai et al. (MA-RLHF), arXiv:2410.02743.

    >>> rewards_BT, values_BT = torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.5]])
    >>> gae(rewards_BT, values_BT, torch.tensor([[True, False, True]]), lam=1.0)
    (tensor([[0.5000, 0.0000, 0.5000]]), tensor([[1., 0., 1.]]))
    """
    bootstrap_B = torch.zeros_like(values_BT[:, 0]) if bootstrap_B is None else bootstrap_B
    rewards_BT, values_BT = masked(rewards_BT, mask_BT), masked(values_BT, mask_BT)
    if span_BT is None:
        if span_value != "mean":
            raise UsageError("gae: span_value has no effect without span_BT, the macro-action of each token.")
        advantages_BT = _gae(rewards_BT, values_BT, mask_BT, gamma, lam, bootstrap_B)
        return masked(advantages_BT, mask_BT), masked(advantages_BT + values_BT, mask_BT)
    index_BT, first_BT = _spans(span_BT, mask_BT)
    zero_BS = torch.zeros_like(values_BT)  # one column per macro-action; there are at most T
    size_BS = zero_BS.scatter_add(1, index_BT, mask_BT.to(values_BT.dtype))
    weight_BT = mask_BT / size_BS.gather(1, index_BT).clamp(min=1) if span_value == "mean" else first_BT
    values_BS = zero_BS.scatter_add(1, index_BT, weight_BT * values_BT)
    advantages_BS = _gae(zero_BS.scatter_add(1, index_BT, rewards_BT), values_BS, size_BS > 0, gamma, lam, bootstrap_B)
    advantages_BT, returns_BT = (x_BS.gather(1, index_BT) for x_BS in (advantages_BS, advantages_BS + values_BS))
    return masked(advantages_BT, mask_BT), masked(returns_BT, mask_BT)


def _gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float, bootstrap_B: Tensor
) -> Tensor:
    """The recursion from the last column to the first; outside the mask whatever the next masked one has."""
    next_value_B, advantage_B = bootstrap_B, torch.zeros_like(bootstrap_B)
    advantages_BT = torch.zeros_like(values_BT)
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = torch.where(mask_BT[:, t], delta_B + gamma * lam * advantage_B, advantage_B)
        next_value_B = torch.where(mask_BT[:, t], values_BT[:, t], next_value_B)
        advantages_BT[:, t] = advantage_B
    return advantages_BT


def _spans(span_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """For every masked token the place of its macro-action in the row, and whether it is the first one of it."""
    order_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device).expand(mask_BT.shape)
    seen_BT = torch.where(mask_BT, order_BT, -1).cummax(1)[0]  # the last masked token up to here
    before_BT = torch.cat([torch.full_like(seen_BT[:, :1], -1), seen_BT[:, :-1]], 1)
    first_BT = mask_BT & ((before_BT < 0) | (span_BT != span_BT.gather(1, before_BT.clamp(min=0))))
    return (first_BT.cumsum(1) - 1).clamp(min=0), first_BT


@register_credit(paper="arXiv:1909.08593")
@torch.no_grad()
def whiten(
    values_BT: Tensor, mask_BT: Tensor, *, shift_mean: bool = True, unbiased: bool = True, eps: NotNegative = 1e-8
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

    Convention: the statistics are those of the tensors given. Give the whole batch, not a micro-batch. Only the values
    count that the policy is to learn from.

    Known failure: where all advantages are nearly equal, their rounding errors are blown up to size 1.

    Source: the code of Ziegler et al., arXiv:1909.08593, which whitens advantages over the batch.

    >>> whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]]), unbiased=False)
    tensor([[-1.,  1.,  0.]])
    """
    values_BT = _real(values_BT)
    size = mask_BT.sum()
    mean = masked(values_BT, mask_BT).sum() / size.clamp(min=1)
    centred_BT = masked(values_BT - mean, mask_BT)
    variance = centred_BT.square().sum() / (size - int(unbiased)).clamp(min=1)
    white_BT = _over(centred_BT, (variance + eps).sqrt())
    return white_BT if shift_mean else masked(white_BT + mean, mask_BT)


@register_credit(paper="arXiv:2307.09288", gives="rows")
@torch.no_grad()
def best_of_k(scores_B: Tensor, group_B: Tensor, *, k: Annotated[int, ABOVE_0] = 1) -> Tensor:
    """Indices of the k best completions of every prompt.

        { i : fewer than k completions of its prompt score higher, or as high and stand before it }

    Args:
        scores_B: one score per completion; NaN is a missing one and never wins.
        group_B: the prompt of each completion, any integers.
        k: how many to keep; a group with fewer known scores keeps those.

    Returns:
        Row indices (int64), groups in the order of their numbers, best first; of equal scores the first row wins.

    Convention: the number kept per prompt is fixed, as in Llama 2; a threshold on the score is ``filtered_sft``.

    Known failure: a prompt with nothing but bad completions still gives its best one.

    Source: rejection sampling of Touvron et al. (Llama 2), arXiv:2307.09288; RAFT, Dong et al., arXiv:2304.06767.

    >>> best_of_k(torch.tensor([1.0, 2.0, 2.0, float("nan"), -1.0]), torch.tensor([0, 0, 0, 1, 1]))
    tensor([1, 4])
    """
    scores_B = _real(scores_B)
    order_B = torch.argsort(-scores_B, stable=True)  # NaN sorts last
    order_B = order_B[torch.argsort(group_B[order_B], stable=True)]
    size_P = torch.unique_consecutive(group_B[order_B], return_counts=True)[1]
    first_B = torch.repeat_interleave(size_P.cumsum(0) - size_P, size_P)
    rank_B = torch.arange(len(order_B), device=order_B.device) - first_B
    return order_B[(rank_B < k) & ~scores_B[order_B].isnan()]


@register_credit(paper="arXiv:2401.10020", gives="rows")
@torch.no_grad()
def top_against_bottom(scores_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the best and of the worst completion of every prompt, as a preference pair.

        (argmax_i R_i, argmin_i R_i) of each group with max R > min R

    Args:
        scores_B: one score per completion; NaN is a missing one and never chosen.
        group_B: the prompt of each completion, any integers.

    Returns:
        Row indices of the best and of the worst, (P,) each (int64), groups in the order of their numbers. Groups with
        fewer than two known scores, or with equal ones only, have no pair and are left out.

    Convention: of equal scores the first row is taken, on both sides. One pair a prompt, however many completions.

    Known failure: the extremes of many samples are where a reward model errs most, so pairs exploit its errors.

    Source: pairs of highest and lowest score: Yuan et al. (Self-Rewarding Language Models), arXiv:2401.10020.

    >>> top_against_bottom(torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0]), torch.tensor([0, 0, 0, 1, 1]))
    (tensor([1]), tensor([0]))
    """
    scores_B = _real(scores_B)
    best_P, worst_P = best_of_k(scores_B, group_B), best_of_k(-scores_B, group_B)
    pair_P = scores_B[best_P] > scores_B[worst_P]
    return best_P[pair_P], worst_P[pair_P]


@register_credit(paper="arXiv:1909.08593", gives="rewards")
@torch.no_grad()
def shaped_rewards(
    scores_B: Tensor,
    logps_BT: Tensor,
    ref_logps_BT: Tensor,
    mask_BT: Tensor,
    *,
    kl: NotNegative = 0.05,
    estimator: ValueEstimatorName = "k1",
) -> Tensor:
    """PPO's token rewards: a KL penalty at every token, and the score at the last one.

        r_t = -kl k(π(y_t), ref(y_t)) + [t is the last masked token] score

    Args:
        scores_B: score of each completion, in reward units.
        logps_BT: log-probabilities of the policy that sampled the completions, in nats. ref_logps_BT: the reference's.
        mask_BT: the tokens that the policy chose.
        kl: coefficient, in reward units per nat.
        estimator: ``"k1"``, ``"k2"``, ``"k3"`` or ``"abs"``. The mean reward is right with k1 and k3, its gradient with
            k1 alone: with k3 the penalty hardly pulls near the reference (``prefzoo.losses.kl``).

    Returns:
        Token rewards, (B, T), 0 outside the mask. A row without any token has no place for its score.

    Convention: the KL is a reward and carries no gradient; the same KL as a term of the loss is ``kl_penalty``. A score
    is clipped, where that is wanted, before it comes here.

    Known failure: a KL coefficient chosen for one scale of the score means nothing on another.

    Source: Ziegler et al., arXiv:1909.08593, equation 2; per token as in Ouyang et al., arXiv:2203.02155.

    >>> logps_BT, mask_BT = torch.tensor([[-1.0, -1.0, 0.0]]), torch.tensor([[True, True, False]])
    >>> shaped_rewards(torch.tensor([2.0]), logps_BT, logps_BT - 1, mask_BT, kl=0.5)
    tensor([[-0.5000,  1.5000,  0.0000]])
    """
    kl_BT = kl_estimator(estimator)(masked(logps_BT, mask_BT), masked(ref_logps_BT, mask_BT))
    last_BT = mask_BT & (mask_BT.flip(-1).cumsum(-1).flip(-1) == 1)
    return torch.where(last_BT, scores_B[:, None], 0.0) - kl * kl_BT


@torch.no_grad()
def returns_to_go(rewards_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Sum of the discounted rewards from each masked token on, (B, T), 0 outside the mask.

    >>> returns_to_go(torch.tensor([[1.0, 9.0, 2.0]]), torch.tensor([[True, False, True]]), gamma=0.5)
    tensor([[2., 0., 2.]])
    """
    return gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma=gamma, lam=1.0)[0]


@register_credit(paper="arXiv:2501.03262")
@torch.no_grad()
def reinforce_pp(
    scores_B: Tensor,
    logps_BT: Tensor,
    ref_logps_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: Share = 1.0,
    kl: NotNegative = 0.01,
    estimator: ValueEstimatorName = "k1",
    unbiased: bool = True,
    eps: NotNegative = 1e-8,
) -> Tensor:
    """REINFORCE++: the return of each token, with a KL penalty inside, standardised over all tokens of the batch.

        r_t = -kl k(π(y_t), ref(y_t)) + [t is the last token] score
        G_t = r_t + γ G_{t+1};   A_t = (G_t - mean(G)) / sqrt(var(G) + eps)

    Args:
        scores_B: score of each completion, in reward units; NaN is a missing one.
        logps_BT: log-probabilities of the policy that sampled the completions, in nats. ref_logps_BT: the reference's.
        mask_BT: the tokens that the policy chose.
        gamma: discount per token.
        kl: coefficient of the penalty, in reward units per nat.
        estimator: of the KL, as in ``shaped_rewards``.
        unbiased: variance with n - 1; False: with n (OpenRLHF).
        eps: added to the variance.

    Returns:
        Advantages, (B, T), 0 outside the mask and in rows without a score, which do not count in the statistics.

    Convention: no critic and no group: the baseline is the mean of the batch, so one sample a prompt is enough.
    ``reinforce_pp_baseline`` takes the group's mean first. Give the whole batch, not a micro-batch.

    Known failure: prompts of unequal difficulty share one baseline: every answer to an easy prompt looks good.

    Source: Hu et al. (REINFORCE++), arXiv:2501.03262.

    >>> logps_BT, mask_BT = torch.tensor([[-1.0], [-1.0]]), torch.tensor([[True], [True]])
    >>> reinforce_pp(torch.tensor([1.0, 0.0]), logps_BT, logps_BT, mask_BT, unbiased=False).round(decimals=4)
    tensor([[ 1.],
            [-1.]])
    """
    counted_BT = mask_BT & ~scores_B.isnan()[:, None]
    rewards_BT = shaped_rewards(scores_B, logps_BT, ref_logps_BT, mask_BT, kl=kl, estimator=estimator)
    return whiten(returns_to_go(rewards_BT, counted_BT, gamma=gamma), counted_BT, unbiased=unbiased, eps=eps)


@register_credit(paper="arXiv:2501.03262")
@torch.no_grad()
def reinforce_pp_baseline(
    scores_B: Tensor,
    group_B: Tensor,
    logps_BT: Tensor,
    ref_logps_BT: Tensor,
    mask_BT: Tensor,
    *,
    gamma: Share = 1.0,
    kl: NotNegative = 0.0,
    estimator: ValueEstimatorName = "k1",
    unbiased: bool = True,
    eps: NotNegative = 1e-8,
) -> Tensor:
    """REINFORCE++ with a baseline: the group's mean is taken from the score, the rest is ``reinforce_pp``.

        score'_i = score_i - mean of its group;   then REINFORCE++ with score'

    Args:
        scores_B: score of each completion, in reward units; NaN is a missing one.
        group_B: the prompt of each completion, any integers.
        logps_BT: log-probabilities of the policy that sampled the completions, in nats. ref_logps_BT: the reference's.
        mask_BT: the tokens that the policy chose.
        gamma: discount per token.
        kl: coefficient of the penalty in the reward, in reward units per nat; the paper has a term of the loss instead.
        estimator: of the KL, as in ``shaped_rewards``.
        unbiased: variance with n - 1; False: with n (OpenRLHF).
        eps: added to the variance.

    Returns:
        Advantages, (B, T), 0 outside the mask and in rows without a score, which do not count in the statistics.

    Convention: the KL penalty is in the reward, as in ``reinforce_pp``. The paper has it as a term of the loss in this
    form, with k2: that is kl = 0 here and a term ``kl_penalty``. The group's mean is of the scores alone; the deviation
    is the batch's, not the group's as in GRPO.

    Known failure: tokens are standardised, not completions: long completions weigh more in mean and deviation.

    Source: Hu et al. (REINFORCE++), arXiv:2501.03262.

    >>> logps_BT, mask_BT = torch.tensor([[-1.0]] * 4), torch.tensor([[True]] * 4)
    >>> scores_B, group_B = torch.tensor([9.0, 7.0, 1.0, -1.0]), torch.tensor([0, 0, 1, 1])
    >>> reinforce_pp_baseline(scores_B, group_B, logps_BT, logps_BT, mask_BT, unbiased=False)[:, 0]
    tensor([ 1., -1.,  1., -1.])
    """
    centred_B = _centred(scores_B, group_B).masked_fill(scores_B.isnan(), torch.nan)
    return reinforce_pp(
        centred_B, logps_BT, ref_logps_BT, mask_BT,
        gamma=gamma, kl=kl, estimator=estimator, unbiased=unbiased, eps=eps,
    )  # fmt: skip
