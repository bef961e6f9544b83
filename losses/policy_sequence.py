"""Policy-gradient losses with one weight per completion.

Two sequence ratios are in use, and they are far apart: exp(Σ_t log r_t), the ratio of the probabilities of the whole
completion (``sequence_surrogate``, ``vespo``), and exp(mean_t log r_t), its n-th root (``gspo``, ``luspo``, and with
clipped tokens ``gmpo``). Notation as in ``prefzoo.losses.policy_gradient``; n is the number of tokens of a completion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prefzoo.losses.base import register_loss
from prefzoo.losses.numerics import by_case, masked, safe_exp
from prefzoo.losses.policy_gradient import clipped_objective, log_ratios, ratio_metrics
from prefzoo.losses.policy_modifiers import Correction, batch_weights
from prefzoo.records import LossOut, PolicyGradient, masked_mean, masked_sum
from prefzoo.registry import NotNegative, Positive, UsageError

# Of losses with one value per completion.
OFF_POLICY = ("sampler_correction", "off_policy_mask")
ANYWHERE = "it has no ratio to the policy that sampled, so its samples may come from anywhere"
WHOLE = {"high_entropy": "the modifier chooses tokens, and this loss has one value per completion"}


def row_advantages(batch: PolicyGradient) -> Tensor:
    """One advantage per completion, (B,): the mean over its tokens, which is it where all tokens have the same."""
    return masked_mean(batch.advantages_BT.detach(), batch.mask_BT)


def row_metrics(batch: PolicyGradient, ratio_B: Tensor, clip_ratio_B: Tensor) -> dict[str, Tensor]:
    """Metrics of a loss with one value per completion, (B,) each."""
    found = ratio_metrics(log_ratios(batch), ratio_B, clip_ratio_B)
    return {**found, "approx_kl": masked_mean(found["approx_kl"], batch.mask_BT)}


def sequence_ratio_loss(
    batch: PolicyGradient, clip: float, clip_high: float | None, per_token: bool = False
) -> LossOut:
    """The clipped surrogate at every token, with the ratio exp(mean_t log r_t) of its completion."""
    log_ratio_BT = log_ratios(batch)
    log_ratio_B = masked_mean(log_ratio_BT, batch.mask_BT)
    advantages_BT = masked(batch.advantages_BT.detach(), batch.mask_BT)
    sequence_BT = log_ratio_B[:, None].expand_as(log_ratio_BT)
    if per_token:  # the same value, but only the token's own log-probability gets the gradient
        logps_BT = masked(batch.logps_BT, batch.mask_BT)
        sequence_BT = sequence_BT.detach() + (logps_BT - logps_BT.detach())
    objective_BT, clip_BT = clipped_objective(safe_exp(sequence_BT), advantages_BT, clip, clip_high)
    return LossOut(-objective_BT, ratio_metrics(log_ratio_BT, safe_exp(log_ratio_B), clip_BT))


PAPER_CLIP, PAPER_CLIP_HIGH = 3e-4, 4e-4  # of GSPO


@register_loss(paper="arXiv:2402.14740", count="row", reference=False, refuses=WHOLE)
def sequence_surrogate(
    batch: PolicyGradient, *, clip: NotNegative = 0.2, clip_high: NotNegative | None = None
) -> LossOut:
    """PPO's clipped surrogate with the whole completion as one action: RLOO's loss.

        r    = π(y) / old(y) = exp(Σ_t log r_t)
        loss = -min(r A, clip(r, 1 - ε, 1 + ε_high) A)

    Args:
        batch: sampled completions, (B, T): log-probabilities under the policy and under the one that sampled them, in
            nats, and advantages, in reward units or standardised; A is their mean over the completion.
        clip: ε, how far the ratio may fall; and rise, unless ``clip_high`` says otherwise.
        clip_high: ε_high, how far the ratio may rise. None: as ``clip``.

    Returns:
        One loss per completion, (B,). Metrics (B,): ``ratio``; ``clip_ratio``, 1 where the clip takes the gradient
        away; ``approx_kl``, the k3 estimate of KL(old ‖ π) averaged over tokens, in nats.

    Convention: the ratio of whole completions, as TRL's RLOO; ``gspo`` takes its n-th root. The paper has no ratio at
    all, since it makes one update per batch: that is ``reinforce``, whose gradient this has at r = 1. Count ``row``.

    Known failure: a log-ratio of 0.01 per token is a ratio of e over 100 tokens, so after the first update of a batch
    nearly all long completions are clipped.

    Source: Ahmadian et al., Back to Basics, arXiv:2402.14740; the clip: TRL's RLOO.

    >>> batch = PolicyGradient(
    ...     logps_BT=torch.tensor([[-1.0, -1.0]]), old_logps_BT=torch.tensor([[-1.1, -1.2]]),
    ...     advantages_BT=torch.tensor([[2.0, 2.0]]), mask_BT=torch.tensor([[True, True]]))
    >>> sequence_surrogate(batch, clip=0.5).loss, sequence_surrogate(batch, clip=0.2).loss  # r = exp(0.3) = 1.35
    (tensor([-2.6997]), tensor([-2.4000]))
    """
    ratio_B = safe_exp(masked_sum(log_ratios(batch), batch.mask_BT))
    objective_B, clip_B = clipped_objective(ratio_B, row_advantages(batch), clip, clip_high)
    return LossOut(-objective_B, row_metrics(batch, ratio_B, clip_B))


@register_loss(paper="arXiv:2505.20686", count="row", refuses={**WHOLE, **dict.fromkeys(OFF_POLICY, ANYWHERE)})
def a2po(batch: PolicyGradient, *, beta: Positive = 1e-3) -> LossOut:
    """Optimal advantage regression (A*-PO): the log-ratio to the reference is fitted to the optimal advantage.

        loss = (β log π(y)/ref(y) - A)²,   A = R(x, y) - V*(x)

    Args:
        batch: sampled completions, (B, T): log-probabilities under the policy and the reference, in nats, and
            advantages, in reward units; A is their mean over the completion.
        beta: β, reward units per nat: strength of the pull to the reference.

    Returns:
        One loss per completion, (B,), in squared reward units. Metrics (B,): ``implicit_reward``, β times
        the log-ratio.

    Convention: log-ratios are summed over tokens. With V* = β log E_ref exp(R / β) it is 0 at the KL-regularised
    optimum, and only there; any other baseline moves the optimum. No ratio to the policy that sampled enters, so
    samples may come from anywhere. ``old_logps_BT`` is not read. The paper and TRL have 1e-3 for β.

    Known failure: squares: one answer with a log-ratio far from its target outweighs its batch, and long answers have
    the largest. An estimate of V* from few samples is too low, which makes every answer likelier.

    Source: Brantley et al., Accelerating RL for LLM Reasoning with Optimal Advantage Regression, arXiv:2505.20686.

    >>> batch = PolicyGradient(
    ...     logps_BT=torch.tensor([[-1.0, -1.0]]), old_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     ref_logps_BT=torch.tensor([[-2.0, -1.0]]), advantages_BT=torch.tensor([[0.5, 0.5]]),
    ...     mask_BT=torch.tensor([[True, True]]))
    >>> a2po(batch, beta=0.1).loss  # (0.1 * 1 - 0.5)²
    tensor([0.1600])
    """
    if batch.ref_logps_BT is None:
        raise UsageError("loss 'a2po' needs PolicyGradient.ref_logps_BT, the reference's log-probabilities.")
    implicit_B = beta * masked_sum(batch.logps_BT - batch.ref_logps_BT.detach(), batch.mask_BT)
    return LossOut((implicit_B - row_advantages(batch)).square(), {"implicit_reward": implicit_B.detach()})


@register_loss(paper="arXiv:2507.18071", count="row", reference=False)
def gspo(
    batch: PolicyGradient,
    *,
    clip: NotNegative = PAPER_CLIP,
    clip_high: NotNegative | None = None,
    per_token: bool = False,
) -> LossOut:
    """Group sequence policy optimization: the clipped surrogate with one length-normalised ratio per completion.

        s      = (π(y) / old(y))^(1/n) = exp(mean_t log r_t)
        loss_t = -min(s A_t, clip(s, 1 - ε, 1 + ε_high) A_t)

    Args:
        batch: sampled completions, (B, T): log-probabilities under the policy and under the one that sampled them, in
            nats, and advantages, in reward units or standardised.
        clip: ε, how far the ratio may fall.
        clip_high: ε_high, how far the ratio may rise. None: the paper's 4e-4 beside its ``clip``, else as ``clip``.
        per_token: GSPO-token, s_t = sg(s) π(y_t) / sg(π(y_t)): the same value, but each token's gradient has its own
            advantage. It differs from False only where the advantages of a completion differ.

    Returns:
        One loss per token, (B, T), 0 outside the mask; of one completion all equal where its advantages are. Metrics:
        ``ratio``, (B,), the s of a completion; (B, T): ``clip_ratio``, 1 where the clip takes the gradient away;
        ``approx_kl``, the k3 estimate of KL(old ‖ π), in nats.

    Convention: with count ``row`` it is the paper's; ``token`` and ``constant`` weight completions by their length
    (TRL: ``importance_sampling_level="sequence"`` with ``loss_type`` ``dapo`` and ``dr_grpo``), ``row_sum`` is
    ``luspo``. Defaults: the paper's, far below PPO's 0.2, because a mean of log-ratios hardly moves.

    Known failure: whole completions are clipped for a few tokens; and the gradient of each is divided by its length, so
    long ones learn less.

    Source: Zheng et al., Group Sequence Policy Optimization, arXiv:2507.18071.

    >>> batch = PolicyGradient(
    ...     logps_BT=torch.tensor([[-1.0, -1.0]]), old_logps_BT=torch.tensor([[-1.1, -1.3]]),
    ...     advantages_BT=torch.tensor([[2.0, 2.0]]), mask_BT=torch.tensor([[True, True]]))
    >>> gspo(batch, clip_high=0.5).loss  # s = exp(0.2) = 1.22
    tensor([[-2.4428, -2.4428]])
    """
    if clip_high is None and clip == PAPER_CLIP:
        clip_high = PAPER_CLIP_HIGH
    return sequence_ratio_loss(batch, clip, clip_high, per_token)


@register_loss(paper="arXiv:2602.05261", count="row_sum", reference=False)
def luspo(batch: PolicyGradient, *, clip: NotNegative = 0.2, clip_high: NotNegative | None = None) -> LossOut:
    """Length-unbiased sequence policy optimization: GSPO with every completion weighted by its length.

        loss = -n min(s A, clip(s, 1 - ε, 1 + ε_high) A),    s = exp(mean_t log r_t)

    Args:
        batch: sampled completions, (B, T): log-probabilities under the policy and under the one that sampled them, in
            nats, and advantages, in reward units or standardised.
        clip: ε, how far the ratio may fall; and rise, unless ``clip_high`` says otherwise.
        clip_high: ε_high, how far the ratio may rise. None: as ``clip``.

    Returns:
        One loss per token, (B, T), 0 outside the mask, the same as of ``gspo``: the factor n is the count ``row_sum``,
        which sums over the completion's tokens. Metrics as ``gspo``.

    Convention: with another count it is another loss: ``row`` makes it GSPO. At s = 1 its gradient is that of
    ``reinforce``, without GSPO's 1/n. Default ε: TRL's, which is wide for a mean of log-ratios; see ``gspo``.

    Known failure: long completions weigh more, so completions tend to grow, wanted or not.

    Source: Liu et al., Length-Unbiased Sequence Policy Optimization, arXiv:2602.05261.

    >>> batch = PolicyGradient(
    ...     logps_BT=torch.tensor([[-1.0, -1.0]]), old_logps_BT=torch.tensor([[-1.1, -1.3]]),
    ...     advantages_BT=torch.tensor([[2.0, 2.0]]), mask_BT=torch.tensor([[True, True]]))
    >>> luspo(batch, clip=0.5).loss
    tensor([[-2.4428, -2.4428]])
    """
    return sequence_ratio_loss(batch, clip, clip_high)


@register_loss(paper="arXiv:2507.20673", count="row", reference=False, refuses=WHOLE)
def gmpo(batch: PolicyGradient, *, clip: NotNegative = 0.4, clip_high: NotNegative | None = None) -> LossOut:
    """Geometric-mean policy optimization: the geometric mean of token ratios, each clipped in log space.

        loss = -A exp(mean_t x_t),    x_t = min(log r_t, ε_high) where A > 0,  max(log r_t, -ε) where A < 0

    Args:
        batch: sampled completions, (B, T): log-probabilities under the policy and under the one that sampled them, in
            nats, and advantages, in reward units or standardised; A is their mean over the completion.
        clip: ε, how far the *logarithm* of a token's ratio may fall, in nats; and rise, unless ``clip_high`` says
            otherwise.
        clip_high: ε_high, how far it may rise, in nats. None: as ``clip``.

    Returns:
        One loss per completion, (B,). Metrics (B,): ``ratio``, the geometric mean; ``clip_ratio``, the share of tokens
        without gradient; ``approx_kl``, the k3 estimate of KL(old ‖ π) averaged over tokens, in nats.

    Convention: ε is in log space, so 0.4 is a range of ratios from 0.67 to 1.49, wide for a token: the mean is what
    holds it. ``gspo`` clips the mean instead of the tokens. Count ``row``; a KL is a term of its own, with that count
    too.

    Known failure: a single token with a tiny ratio pulls a good completion's mean, and so its gradient, towards 0.

    Source: Zhao et al., Geometric-Mean Policy Optimization, arXiv:2507.20673.

    >>> batch = PolicyGradient(
    ...     logps_BT=torch.tensor([[-1.0, -1.0]]), old_logps_BT=torch.tensor([[-1.2, -9.0]]),
    ...     advantages_BT=torch.tensor([[2.0, 2.0]]), mask_BT=torch.tensor([[True, True]]))
    >>> gmpo(batch).loss  # -2 exp((0.2 + 0.4) / 2)
    tensor([-2.6997])
    """
    log_ratio_BT, advantages_B = log_ratios(batch), row_advantages(batch)
    high = clip if clip_high is None else clip_high
    clipped_BT = torch.where(advantages_B[:, None] > 0, log_ratio_BT.clamp(max=high), log_ratio_BT.clamp(min=-clip))
    ratio_B = safe_exp(masked_mean(clipped_BT, batch.mask_BT))
    clip_B = masked_mean((clipped_BT != log_ratio_BT).to(ratio_B.dtype), batch.mask_BT)
    return LossOut(-advantages_B * ratio_B, row_metrics(batch, ratio_B, clip_B))


TOKEN_LIMIT, LOG_WEIGHT_MIN, LOG_WEIGHT_MAX = 20.0, math.log(1e-8), 20.0  # VESPO's clamps, in nats


def _needs_of_vespo(options: Mapping[str, Any]) -> tuple[str, ...]:
    return ("sampling_logps_BT",) if options["correction"] != "none" else ()


@register_loss(paper="arXiv:2602.10693", reference=False, extras=_needs_of_vespo)
def vespo(
    batch: PolicyGradient,
    *,
    k_pos: NotNegative = 2.0,
    lambda_pos: NotNegative = 3.0,
    k_neg: NotNegative = 3.0,
    lambda_neg: NotNegative = 2.0,
    correction: Correction = "none",
    correction_max: Positive = 3.0,
    correction_min: NotNegative | None = None,
) -> LossOut:
    """VESPO: REINFORCE weighted by a smooth kernel of the whole completion's importance weight.

        w      = π(y) / old(y) = exp(Σ_t log r_t)
        loss_t = -sg(φ(w)) A_t log π(y_t),    φ(w) = w^k exp(λ (1 - w))

    Args:
        batch: sampled completions, (B, T): log-probabilities under the policy and under the one that sampled them, in
            nats, and advantages, in reward units or standardised.
        k_pos: k where A_t >= 0: how fast the weight falls for completions that are getting rare.
        lambda_pos: λ where A_t >= 0: how fast it falls for completions that are getting likely.
        k_neg: k where A_t < 0.
        lambda_neg: λ where A_t < 0.
        correction: for a sampler whose numbers differ from the learner's, as the modifier ``sampler_correction``; but
            its weights, multiplied over the tokens, go into w.
        correction_max: largest of these weights.
        correction_min: least of these weights. None: no bound.

    Returns:
        One loss per token, (B, T), 0 outside the mask. Its value means nothing, only its gradient does. Metrics:
        ``ratio``, (B,), w; (B, T): ``phi``; ``approx_kl``, the k3 estimate of KL(old ‖ π), in nats.

    Convention: φ(1) = 1, so at w = 1 the gradient is the plain policy gradient; φ is largest at w = k / λ. As in TRL,
    token log-ratios are clamped to ±20 and log w to [log 1e-8, 20], defaults are k, λ = 2, 3 and 3, 2, and the count is
    ``token``; ``row_sum`` sums log π over a completion as the derivation does.

    Known failure: w of long completions is far from 1 after one update, where φ is almost 0: those that moved most
    learn nothing more from the batch.

    Source: Shen et al., VESPO, arXiv:2602.10693.

    >>> batch = PolicyGradient(
    ...     logps_BT=torch.tensor([[-1.0, -1.0]]), old_logps_BT=torch.tensor([[-1.5, -1.5]]),
    ...     advantages_BT=torch.tensor([[2.0, 2.0]]), mask_BT=torch.tensor([[True, True]]))
    >>> vespo(batch).metrics["phi"]  # w = e: e² exp(3 (1 - e))
    tensor([[0.0426, 0.0426]])
    """
    advantages_BT = masked(batch.advantages_BT.detach(), batch.mask_BT)
    log_ratio_BT = log_ratios(batch)
    log_w_B = log_ratio_BT.detach().clamp(-TOKEN_LIMIT, TOKEN_LIMIT).sum(-1)
    if (correction, correction_max, correction_min) != ("none", 3.0, None):
        weight_BT = batch_weights(batch, correction, correction_max, correction_min)
        log_weight_BT = masked(weight_BT.log().clamp(LOG_WEIGHT_MIN, TOKEN_LIMIT), batch.mask_BT)
        whole = correction.startswith("sequence")  # then every token has the weight of all of them
        log_w_B = log_w_B + (masked_mean(log_weight_BT, batch.mask_BT) if whole else log_weight_BT.sum(-1))
    log_w_BT = log_w_B.clamp(LOG_WEIGHT_MIN, LOG_WEIGHT_MAX)[:, None].expand_as(log_ratio_BT)
    positive_BT = advantages_BT >= 0
    k_BT = by_case(positive_BT, k_pos, k_neg, advantages_BT)
    lambda_BT = by_case(positive_BT, lambda_pos, lambda_neg, advantages_BT)
    phi_BT = safe_exp(k_BT * log_w_BT - lambda_BT * log_w_BT.expm1())
    loss_BT = -phi_BT * advantages_BT * masked(batch.logps_BT, batch.mask_BT)
    return LossOut(loss_BT, {**ratio_metrics(log_ratio_BT, log_w_BT[:, 0].exp()), "phi": phi_BT})
