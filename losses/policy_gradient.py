"""Policy-gradient losses with one weight per token: sampled completions with an advantage for every token.

How tokens are averaged is not here: the term's count says it (token, row, row_sum, constant). GRPO, Dr. GRPO, BNPO and
DAPO are ``clipped_surrogate`` with group-relative advantages and the counts row, constant, token and token. Losses with
one weight per completion are in ``prefzoo.losses.policy_sequence``; what corrects for the sampler or drops samples,
around any of them, in ``prefzoo.losses.policy_modifiers``.

Notation of the equations: y_t is a token, A_t its advantage, π the policy, old the policy at the start of the update,
r_t = π(y_t) / old(y_t), sg the stop of gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from prefzoo.losses.base import register_loss
from prefzoo.losses.kl import EstimatorName, k3, kl_estimator
from prefzoo.losses.numerics import by_case, exponent_limit, masked, safe_exp
from prefzoo.records import LossOut, PolicyGradient, masked_mean
from prefzoo.registry import NotNegative, Positive, UsageError

# Modifiers of policy gradients weight or drop the advantage of samples; these are terms beside it.
BESIDE = {
    "sampler_correction": "its weights belong to the advantage, and this is a term beside it",
    "off_policy_mask": "it drops samples by their advantage, which this loss does not use",
    "high_entropy": "it chooses tokens for the advantage, which this loss does not use",
}


def log_ratios(batch: PolicyGradient) -> Tensor:
    """log π(y_t) - log old(y_t), (B, T), 0 outside the mask; gradient reaches the policy only."""
    return masked(batch.logps_BT - batch.old_logps_BT.detach(), batch.mask_BT)


def clipped_objective(ratio: Tensor, advantages: Tensor, clip: float, clip_high: float | None) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r, 1 - ε, 1 + ε_high) A), and 1 where the clip takes the gradient away; of any shape."""
    high = clip if clip_high is None else clip_high
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + high) * advantages
    return torch.minimum(plain, clipped), (clipped < plain).to(ratio.dtype)


@torch.no_grad()
def ratio_metrics(
    log_ratio_BT: Tensor, ratio: Tensor | None = None, clip_ratio: Tensor | None = None
) -> dict[str, Tensor]:
    """``ratio``, of the tokens if no other is given; ``clip_ratio``, if given; ``approx_kl``, k3 of KL(old ‖ π)."""
    found = {"ratio": safe_exp(log_ratio_BT) if ratio is None else ratio.detach()}
    if clip_ratio is not None:
        found["clip_ratio"] = clip_ratio.detach()
    return {**found, "approx_kl": k3(torch.zeros_like(log_ratio_BT), log_ratio_BT.detach())}


@register_loss(paper="arXiv:2402.14740", count="row_sum", reference=False)
def reinforce(batch: PolicyGradient) -> LossOut:
    """REINFORCE: make a token likelier in proportion to its advantage.

        loss_t = -A_t log π(y_t)

    Args:
        batch: sampled completions, (B, T): log-probabilities of the policy, in nats, and advantages, in reward units
            or standardised.

    Returns:
        One loss per token, (B, T), 0 outside the mask. Its value means nothing, only its gradient does. Metrics (B, T):
        ``ratio``, to the policy at the start of the update, and ``approx_kl``, the k3 estimate of KL(old ‖ π), in nats.

    Convention: no ratio. The gradient is that of the expected reward only while the policy is the one that sampled; for
    several updates on one batch take ``clipped_surrogate`` or ``cispo``. Count ``row_sum``, the sum over a completion's
    tokens, is the unbiased one; ``token`` and ``row`` divide by lengths. The baseline is in the advantage (credit).

    Known failure: after some steps on one batch nothing holds the policy back, and tokens with A < 0 are pushed to
    probability 0 without end.

    Source: Williams, Simple statistical gradient-following algorithms, 1992; for language models: Ahmadian et al., Back
    to Basics, arXiv:2402.14740.

    >>> batch = PolicyGradient(
    ...     logps_BT=torch.tensor([[-1.0, -0.5]]), old_logps_BT=torch.tensor([[-1.0, -0.5]]),
    ...     advantages_BT=torch.tensor([[2.0, -2.0]]), mask_BT=torch.tensor([[True, True]]))
    >>> reinforce(batch).loss
    tensor([[ 2., -1.]])
    """
    advantages_BT = masked(batch.advantages_BT.detach(), batch.mask_BT)
    return LossOut(-advantages_BT * masked(batch.logps_BT, batch.mask_BT), ratio_metrics(log_ratios(batch)))


@register_loss(
    paper="arXiv:1602.01783",
    reference=False,
    extras=lambda options: ("entropy_BT",) if options["entropy"] else (),
)
def a2c(batch: PolicyGradient, *, entropy: NotNegative = 0.01) -> LossOut:
    """Advantage actor-critic, the actor's part: REINFORCE with a bonus for entropy.

        loss_t = -A_t log π(y_t) - c H_t

    Args:
        batch: sampled completions, (B, T): log-probabilities and entropies H_t of the policy, in nats, and advantages
            from a critic, in reward units or standardised.
        entropy: c, reward units per nat of entropy. 0: no bonus, which is ``reinforce`` with another count.

    Returns:
        One loss per token, (B, T), 0 outside the mask. Metrics (B, T): ``entropy``, in nats, where there is a bonus;
        ``ratio`` and ``approx_kl``, as ``reinforce``.

    Convention: the critic is a term of its own (``clipped_value`` with ``clip=None`` trains ½ (V - R)²), and the
    advantage comes from ``GAE``, as in PPO. Default c: the paper's 0.01. The mean is over steps, here tokens. Modifiers
    act on both parts; to keep the bonus out of them, take ``reinforce`` and ``entropy_bonus`` as two terms.

    Known failure: as of ``reinforce``; and over a vocabulary of a language model the entropy bonus raises the
    probability of nonsense tokens, most of which were never sampled.

    Source: Mnih et al., Asynchronous Methods for Deep Reinforcement Learning, arXiv:1602.01783.

    >>> batch = PolicyGradient(
    ...     logps_BT=torch.tensor([[-1.0]]), old_logps_BT=torch.tensor([[-1.0]]), entropy_BT=torch.tensor([[3.0]]),
    ...     advantages_BT=torch.tensor([[2.0]]), mask_BT=torch.tensor([[True]]))
    >>> a2c(batch, entropy=0.1).loss  # 2 - 0.1 * 3
    tensor([[1.7000]])
    """
    out = reinforce(batch)
    if not entropy:
        return out
    bonus = entropy_bonus(batch)
    return LossOut(out.loss + entropy * bonus.loss, {**out.metrics, **bonus.metrics})


@register_loss(paper="arXiv:1707.06347", reference=False)
def clipped_surrogate(
    batch: PolicyGradient,
    *,
    clip: NotNegative = 0.2,
    clip_high: NotNegative | None = None,
    dual_clip: Positive | None = None,
) -> LossOut:
    """PPO's clipped surrogate: the importance-weighted advantage, without reward for leaving the clip range.

        r_t    = π(y_t) / old(y_t)
        loss_t = -min(r_t A_t, clip(r_t, 1 - ε, 1 + ε_high) A_t)

    With ``dual_clip`` c, for A_t < 0, the loss is at most -c A_t.

    Args:
        batch: sampled completions, (B, T): log-probabilities under the policy and under the one that sampled them, in
            nats, and advantages, in reward units or standardised.
        clip: ε, how far the ratio may fall; and rise, unless ``clip_high`` says otherwise.
        clip_high: ε_high, how far the ratio may rise (DAPO's clip-higher, 0.28). None: as ``clip``.
        dual_clip: c > 1 + ε_high, bounds the loss of unlikely bad tokens (TRL's ``delta``). None: no bound.

    Returns:
        One loss per token, (B, T), 0 outside the mask. Metrics (B, T): ``ratio``; ``clip_ratio``, 1 where the clip
        takes the gradient away (not where ``dual_clip`` does); ``approx_kl``, the k3 estimate of KL(old ‖ π), in nats.

    Convention: one ratio per token (GSPO has one per sequence). The log-ratio is clamped only where ``exp`` would
    overflow (80 in float32 and bfloat16, 700 in float64), where its gradient is 0; verl and OpenRLHF clamp at ±20. No
    gradient flows through advantages and old log-probabilities. At r = 1 the gradient is the plain policy gradient, -A.

    Known failure: the clip takes gradient away but does not pull back, so a policy that has left the range stays out;
    and tokens that were rare when sampled are the first to be clipped, which wears the entropy down.

    Source: Schulman et al., arXiv:1707.06347, equation 7; dual clip: Ye et al., arXiv:1912.09729; clip-higher:
    Yu et al. (DAPO), arXiv:2503.14476.

    >>> batch = PolicyGradient(
    ...     logps_BT=torch.tensor([[-1.0, -1.0]]), old_logps_BT=torch.tensor([[-1.0, -2.0]]),
    ...     advantages_BT=torch.tensor([[2.0, 2.0]]), mask_BT=torch.tensor([[True, True]]))
    >>> clipped_surrogate(batch, clip=0.2).loss
    tensor([[-2.0000, -2.4000]])
    """
    high = 1 + (clip if clip_high is None else clip_high)
    if dual_clip is not None and dual_clip <= high:
        raise UsageError(f"clipped_surrogate: dual_clip must exceed 1 + clip_high = {high:g}, got {dual_clip:g}.")
    advantages_BT = masked(batch.advantages_BT.detach(), batch.mask_BT)
    log_ratio_BT = log_ratios(batch)
    objective_BT, clip_BT = clipped_objective(safe_exp(log_ratio_BT), advantages_BT, clip, clip_high)
    if dual_clip is not None:
        bounded_BT = torch.maximum(objective_BT, dual_clip * advantages_BT)
        objective_BT = torch.where(advantages_BT < 0, bounded_BT, objective_BT)
    return LossOut(-objective_BT, ratio_metrics(log_ratio_BT, clip_ratio=clip_BT))


@register_loss(paper="arXiv:2506.13585", reference=False)
def cispo(batch: PolicyGradient, *, clip: NotNegative | None = None, clip_high: NotNegative = 4.0) -> LossOut:
    """CISPO: REINFORCE weighted by the clipped ratio; a clipped token keeps its gradient, with a bounded weight.

        loss_t = -sg(clip(r_t, 1 - ε, 1 + ε_high)) A_t log π(y_t)

    Args:
        batch: sampled completions, (B, T): log-probabilities under the policy and under the one that sampled them, in
            nats, and advantages, in reward units or standardised.
        clip: ε, the least weight is 1 - ε. None: no lower bound.
        clip_high: ε_high, the largest weight is 1 + ε_high.

    Returns:
        One loss per token, (B, T), 0 outside the mask. Its value means nothing, only its gradient does. Metrics (B, T):
        ``ratio``; ``clip_ratio``, 1 where the weight is clipped; ``approx_kl``, k3 of KL(old ‖ π), in nats.

    Convention: ε_high is relative, as in the paper and in verl. TRL's ``epsilon_high`` is the cap itself,
    min(r, epsilon_high) without a lower bound: here ``clip_high = epsilon_high - 1``; left at TRL's default of 0.2
    it scales every token down. Default: no lower bound, as the paper trained; it gives no number for ε_high, and 4 is
    the cap of 5 that TRL recommends. In the gradient the clip of ``clipped_surrogate`` drops tokens, this one never.

    Known failure: tokens outside the range still move the policy, so it can drift far from the one that sampled; watch
    ``approx_kl``.

    Source: MiniMax, MiniMax-M1, arXiv:2506.13585; the cap alone: Khatri et al. (ScaleRL),
    arXiv:2510.13786.

    >>> batch = PolicyGradient(
    ...     logps_BT=torch.tensor([[-1.0, -1.0]]), old_logps_BT=torch.tensor([[-1.0, -3.0]]),
    ...     advantages_BT=torch.tensor([[2.0, 2.0]]), mask_BT=torch.tensor([[True, True]]))
    >>> cispo(batch, clip_high=0.5).loss  # weights 1 and 1.5, log-probability -1
    tensor([[2., 3.]])
    """
    advantages_BT = masked(batch.advantages_BT.detach(), batch.mask_BT)
    log_ratio_BT = log_ratios(batch)
    ratio_BT = safe_exp(log_ratio_BT.detach())
    weight_BT = ratio_BT.clamp(None if clip is None else 1 - clip, 1 + clip_high)
    clip_BT = (weight_BT != ratio_BT).to(ratio_BT.dtype)
    loss_BT = -weight_BT * advantages_BT * masked(batch.logps_BT, batch.mask_BT)
    return LossOut(loss_BT, ratio_metrics(log_ratio_BT, clip_ratio=clip_BT))


@register_loss(paper="arXiv:2511.20347", count="row", reference=False)
def sapo(batch: PolicyGradient, *, temperature_pos: Positive = 1.0, temperature_neg: Positive = 1.05) -> LossOut:
    """Soft adaptive policy optimization: a smooth gate on the ratio in place of the clip.

        loss_t = -(4 / τ) σ(τ (r_t - 1)) A_t        τ = temperature_pos where A_t > 0, else temperature_neg

    Args:
        batch: sampled completions, (B, T): log-probabilities under the policy and under the one that sampled them, in
            nats, and advantages, in reward units or standardised.
        temperature_pos: τ where A_t > 0. The larger, the narrower the range of ratios that still has gradient.
        temperature_neg: τ where A_t <= 0.

    Returns:
        One loss per token, (B, T), 0 outside the mask. Metrics (B, T): ``ratio``; ``gate``, the gradient's weight
        4 σ' from 0 to 1, which is 1 at r = 1; ``approx_kl``, the k3 estimate of KL(old ‖ π), in nats.

    Convention: the factor 4 / τ makes the gradient at r = 1 that of the plain policy gradient, for every τ. For τ to 0
    it is the unclipped surrogate, r A plus a constant. Defaults: the paper's; tokens with A < 0 get the narrower range,
    because their gradient spreads over all other tokens. Paper and TRL average per completion, count ``row``.

    Known failure: below r = 1 the gate hardly closes (4 σ'(-τ) is still 0.79 at r = 0 and τ = 1), so bad tokens are
    pushed down long after a clip would have let go.

    Source: Gao et al., Soft Adaptive Policy Optimization, arXiv:2511.20347.

    >>> batch = PolicyGradient(
    ...     logps_BT=torch.tensor([[-1.0, -1.0]]), old_logps_BT=torch.tensor([[-1.0, -9.0]]),
    ...     advantages_BT=torch.tensor([[1.0, 1.0]]), mask_BT=torch.tensor([[True, True]]))
    >>> sapo(batch).loss  # -4 σ(0), and -4 σ(a large number)
    tensor([[-2., -4.]])
    """
    advantages_BT = masked(batch.advantages_BT.detach(), batch.mask_BT)
    log_ratio_BT = log_ratios(batch)
    tau_BT = by_case(advantages_BT > 0, temperature_pos, temperature_neg, advantages_BT)
    sigmoid_BT = torch.sigmoid(tau_BT * (safe_exp(log_ratio_BT) - 1))
    gate_BT = (4 * sigmoid_BT * (1 - sigmoid_BT)).detach()
    return LossOut(-4 / tau_BT * sigmoid_BT * advantages_BT, {**ratio_metrics(log_ratio_BT), "gate": gate_BT})


WITHOUT_REWARD = {  # what no algorithm does that is this term alone
    "roles_used": "it does not look at the reward: it is a term beside others",
    "constant_reward": "it does not look at the reward: it is a term beside others",
}


@register_loss(
    paper="arXiv:1602.01783", reference=False, extras=("entropy_BT",), refuses=BESIDE, exceptions=WITHOUT_REWARD
)
def entropy_bonus(batch: PolicyGradient) -> LossOut:
    """Entropy as a term of the loss: the policy is paid for staying undecided.

        loss_t = -H_t,    H_t = -Σ_v π(v) log π(v)

    Args:
        batch: sampled completions with the entropy of the policy's distribution at every token, (B, T), in nats.

    Returns:
        One loss per token, (B, T), in nats, 0 outside the mask. Metrics (B, T): ``entropy``.

    Convention: the coefficient is the weight of the term, the averaging its count. TRL's ``entropy_coef`` is the
    weight, always with the count ``token``, whatever the policy term has; with a quantile of high-entropy tokens, TRL
    takes the mean over those only. The entropy is differentiated where the tokens stand; that the bonus also changes
    which prefixes are sampled is left out, as everywhere. Modifiers do not apply: it has no advantage.

    Known failure: over a large vocabulary the entropy grows cheapest in the tail, by nonsense tokens; a coefficient
    that is harmless at first can blow the entropy up later.

    Source: Mnih et al., Asynchronous Methods for Deep Reinforcement Learning, arXiv:1602.01783; the idea: Williams and
    Peng, 1991.

    >>> batch = PolicyGradient(
    ...     logps_BT=torch.tensor([[-1.0]]), old_logps_BT=torch.tensor([[-1.0]]), entropy_BT=torch.tensor([[3.0]]),
    ...     advantages_BT=torch.tensor([[2.0]]), mask_BT=torch.tensor([[True]]))
    >>> entropy_bonus(batch).loss
    tensor([[-3.]])
    """
    if batch.entropy_BT is None:
        raise UsageError("an entropy bonus needs PolicyGradient.entropy_BT, the policy's entropies, but it is None.")
    entropy_BT = masked(batch.entropy_BT, batch.mask_BT)
    return LossOut(-entropy_BT, {"entropy": entropy_BT.detach()})


@register_loss(paper="arXiv:2402.03300", refuses=BESIDE, exceptions=WITHOUT_REWARD)
def kl_penalty(
    batch: PolicyGradient,
    *,
    estimator: EstimatorName = "k3",
    importance: bool = False,
    level: Literal["token", "sequence"] = "token",
) -> LossOut:
    """KL to the reference as a term of the loss: an estimate at every sampled token, differentiated as it stands.

        loss_t = k(π(y_t), ref(y_t))                      importance=False
        loss_t = r k(π(y_t), ref(y_t))                    importance=True

    Args:
        batch: sampled completions with reference log-probabilities, (B, T), in nats.
        estimator: ``"k1"``, ``"k2"``, ``"k3"``, ``"abs"``, ``"k1_straight"`` or ``"k3_straight"``, as in
            ``prefzoo.losses.kl``.
        importance: multiply by the ratio of policy to sampling policy, and differentiate the ratio too.
        level: of that ratio: ``"token"``, r_t; or ``"sequence"``, GSPO's exp(mean_t log r_t), for a KL beside ``gspo``.

    Returns:
        One loss per token, (B, T), in nats, 0 outside the mask. Metrics (B, T): ``kl/token``, the estimate without
        the ratio.

    Convention: value and gradient are two questions. In expectation over tokens of the policy itself:

        estimator    value, E     gradient, importance=False   gradient, importance=True
        k1           KL(π ‖ ref)  0                            ∇ KL(π ‖ ref)
        k2           biased       ∇ KL(π ‖ ref)                ∇ of the biased value
        k3           KL(π ‖ ref)  ∇ KL(ref ‖ π)                ∇ KL(π ‖ ref)
        abs          too large    ∇ Σ_v |π(v) - ref(v)|        ∇ of the value
        k1_straight  KL(π ‖ ref)  ∇ KL(π ‖ ref)                refused: it would be twice that
        k3_straight  KL(π ‖ ref)  ∇ KL(π ‖ ref)                refused: twice that less ∇ KL(ref ‖ π)

    ``k3, importance=False`` is the original GRPO; ``k3, importance=True`` is TRL's default
    (``use_bias_correction_kl``), which also corrects for tokens sampled from an older policy. Exponents, and the
    product with the ratio, are clamped only where they would overflow (exp(80) in float32 and bfloat16, exp(700) in
    float64), where the gradient is 0. Modifiers do not apply: TRL too adds the KL after its masks and its correction
    for the sampler, which are for the advantage.

    Known failure: k3 explodes on a token that the reference likes and the policy hardly samples; one such token is the
    whole gradient of a batch.

    Source: Shao et al. (GRPO), arXiv:2402.03300, equation 4; importance: DeepSeek-V3.2, arXiv:2512.02556; the
    estimators: Schulman, Approximating KL divergence, 2020.

    >>> batch = PolicyGradient(
    ...     logps_BT=torch.tensor([[-1.0, -1.0]]), old_logps_BT=torch.tensor([[-1.0, -2.0]]),
    ...     ref_logps_BT=torch.tensor([[-1.0, -2.0]]), advantages_BT=torch.zeros(1, 2), mask_BT=torch.ones(1, 2) > 0)
    >>> kl_penalty(batch).loss, kl_penalty(batch, importance=True).loss
    (tensor([[0.0000, 0.3679]]), tensor([[0., 1.]]))
    """
    if batch.ref_logps_BT is None:
        raise UsageError(
            "loss 'kl_penalty' needs reference log-probabilities, but PolicyGradient.ref_logps_BT is None."
        )
    logps_BT = masked(batch.logps_BT, batch.mask_BT)
    kl_BT = kl_estimator(estimator)(logps_BT, masked(batch.ref_logps_BT.detach(), batch.mask_BT))
    loss_BT = kl_BT
    if level != "token" and not importance:
        raise UsageError(f"kl_penalty: level={level!r} is the level of the ratio; it needs importance=True.")
    if importance:
        if estimator.endswith("_straight"):
            raise UsageError(
                f"kl_penalty: estimator={estimator!r} has the gradient of the KL already; importance=True adds the "
                f"ratio's to it. Take {estimator.removesuffix('_straight')!r} with importance=True, or leave it out."
            )
        log_ratio_BT = log_ratios(batch)
        if level == "sequence":
            log_ratio_BT = masked_mean(log_ratio_BT, batch.mask_BT)[:, None]
        loss_BT = (safe_exp(log_ratio_BT) * kl_BT).clamp(max=math.exp(exponent_limit(kl_BT.dtype)))
    return LossOut(loss_BT, {"kl/token": kl_BT.detach()})
