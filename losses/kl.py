"""Estimators of KL(π ‖ ref) at one sampled token, from its two log-probabilities; and the exact one, from all logits.

With d = log π(a) - log ref(a) and a ~ π (Schulman, "Approximating KL divergence", 2020). Which estimator is good to
*report* is one question, where only the mean value counts; which is good to *differentiate* is another. In expectation
over tokens of the policy itself:

    name         value           E[value]                E[gradient], when the value is differentiated as it stands
    k1           d               KL, unbiased, signed    0: it does not pull at all
    k2           d² / 2          ≈ KL, biased, >= 0      ∇ KL(π ‖ ref), unbiased
    k3           exp(-d)-1+d     KL, unbiased, >= 0      ∇ KL(ref ‖ π), the other direction
    abs          |d|             too large, >= 0         ∇ Σ_v |π(v) - ref(v)|, twice the total variation
    k1_straight  as k1           as k1                   ∇ KL(π ‖ ref), that of k2
    k3_straight  as k3           as k3                   ∇ KL(π ‖ ref), that of k2
    exact        Σ_v π(v) d(v)   KL itself               ∇ KL(π ‖ ref) itself

k1 and k3 multiplied by the differentiable ratio π / old also have the gradient of KL(π ‖ ref).

Which is good to *subtract from a reward* is a third question: there each token's value is multiplied by its ∇ log π.
Only k1 then gives ∇ KL(π ‖ ref). k3 gives ∇ KL(π ‖ ref) - ∇ KL(ref ‖ π), which near the reference is almost nothing:
that its value is unbiased does not help.

Only the exponent of k3 is clamped, from above, where ``exp`` would overflow (80 in float32 and bfloat16, 700 in
float64). verl clamps k3 and OpenRLHF all three to ±10; TRL clamps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from prefzoo.losses.base import register_estimator
from prefzoo.losses.numerics import bounded
from prefzoo.registry import Positive, UsageError, suggest

# The straight-through forms differ from k1 and k3 in their gradient only: to a reward they would be second names.
ValueEstimatorName = Literal["k1", "k2", "k3", "abs"]
EstimatorName = Literal["k1", "k2", "k3", "abs", "k1_straight", "k3_straight"]
Direction = Literal["reverse", "forward"]
Estimator = Callable[[Tensor, Tensor], Tensor]


@register_estimator(paper="arXiv:1909.08593")
def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The log-ratio itself: unbiased, of either sign, largest variance, and no gradient on average.

        k1 = log π(a) - log ref(a)

    Args:
        logps: log-probabilities of the sampled tokens under the policy, in nats, any shape.
        ref_logps: under the reference, same shape.

    Returns:
        One estimate per token, in nats, of the shape given.

    Convention: the estimate in PPO's reward. TRL, verl and OpenRLHF agree on it, verl calls it ``kl``.

    Known failure: as a term of a loss it does nothing on average: its gradient is the score function, whose mean over
    the policy's own tokens is 0.

    Source: Ziegler et al., arXiv:1909.08593; the name: Schulman, Approximating KL divergence, 2020.

    >>> k1(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -2.0]))
    tensor([0., 1.])
    """
    return logps - ref_logps


@register_estimator(paper="arXiv:2402.03300")
def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Half the squared log-ratio: its value is biased, but its gradient is that of KL(π ‖ ref).

        k2 = (log π(a) - log ref(a))² / 2

    Args:
        logps: log-probabilities of the sampled tokens under the policy, in nats, any shape.
        ref_logps: under the reference, same shape.

    Returns:
        One estimate per token, in nats, never negative, of the shape given.

    Convention: the value is right to second order in the log-ratio only. verl calls it ``mse``.

    Known failure: reported as the KL of policies far apart it is too large or too small, by any factor.

    Source: Schulman, Approximating KL divergence, 2020; estimators in a loss: Shao et al., arXiv:2402.03300.

    >>> k2(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -2.0]))
    tensor([0.0000, 0.5000])
    """
    return 0.5 * (logps - ref_logps).square()


@register_estimator(paper="arXiv:2402.03300")
def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The log-ratio with a control variate: unbiased, never negative, but with the gradient of the other direction.

        k3 = ref(a) / π(a) - 1 - log(ref(a) / π(a))

    Args:
        logps: log-probabilities of the sampled tokens under the policy, in nats, any shape.
        ref_logps: under the reference, same shape.

    Returns:
        One estimate per token, in nats, never negative, of the shape given.

    Convention: the estimate in GRPO's loss; TRL multiplies it there by the differentiable ratio π / old. Computed with
    expm1, exact near 0. The exponent is clamped where exp would overflow (80 in float32, 700 in float64); verl clamps
    the estimate to ±10. verl calls it ``low_var_kl``.

    Known failure: where the policy gives a token far less probability than the reference, ref / π and so the variance
    explode; differentiated as it stands it pulls to KL(ref ‖ π).

    Source: Schulman, Approximating KL divergence, 2020; Shao et al., arXiv:2402.03300, equation 4.

    >>> k3(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -2.0]))
    tensor([0.0000, 0.3679])
    """
    log_ratio = bounded(ref_logps - logps)
    return log_ratio.expm1() - log_ratio


@register_estimator(name="abs", paper="arXiv:1909.08593")
def absolute(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The absolute log-ratio: a measure of distance, not an estimate of the KL.

        abs = |log π(a) - log ref(a)|

    Args:
        logps: log-probabilities of the sampled tokens under the policy, in nats, any shape.
        ref_logps: under the reference, same shape.

    Returns:
        One number per token, in nats, never negative, of the shape given.

    Convention: verl's ``abs``. Its mean is at least the KL, first order in the difference of the policies where the KL
    is second order.

    Known failure: near the reference it is much larger than the KL, so a coefficient chosen for k1 is too strong.

    Source: a variant of the penalty of Ziegler et al., arXiv:1909.08593, that verl offers.

    >>> absolute(torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, 1.0]))
    tensor([1., 2.])
    """
    return (logps - ref_logps).abs()


@register_estimator(paper="arXiv:1909.08593")
def k1_straight(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The value of k1 with the gradient of k2: unbiased to report and unbiased to differentiate.

        value k1,  gradient (log π(a) - log ref(a)) ∇ log π(a)

    Args:
        logps: log-probabilities of the sampled tokens under the policy, in nats, any shape.
        ref_logps: under the reference, same shape.

    Returns:
        One estimate per token, in nats, of either sign, of the shape given.

    Convention: verl's ``k1+``. Its gradient is that of KL(π ‖ ref) for tokens of the policy itself.

    Known failure: value and gradient do not belong to one function: finite differences and line searches disagree with
    it.

    Source: straight-through form of k1 (Ziegler et al., arXiv:1909.08593; Schulman, 2020), as in verl.

    >>> logps = torch.tensor([-1.0, -1.0], requires_grad=True)
    >>> k1_straight(logps, torch.tensor([-1.0, -3.0])).tolist(), torch.autograd.grad(
    ...     k1_straight(logps, torch.tensor([-1.0, -3.0])).sum(), logps)[0].tolist()
    ([0.0, 2.0], [0.0, 2.0])
    """
    return _straight_through(k1, logps, ref_logps)


@register_estimator(paper="arXiv:2402.03300")
def k3_straight(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2: never negative, and unbiased to report and to differentiate.

        value k3,  gradient (log π(a) - log ref(a)) ∇ log π(a)

    Args:
        logps: log-probabilities of the sampled tokens under the policy, in nats, any shape.
        ref_logps: under the reference, same shape.

    Returns:
        One estimate per token, in nats, never negative, of the shape given.

    Convention: verl's ``k3+``. Its gradient is that of KL(π ‖ ref) for tokens of the policy itself, and stays small
    where that of k3, ref / π - 1, explodes.

    Known failure: value and gradient do not belong to one function: finite differences and line searches disagree with
    it.

    Source: straight-through form of k3 (Shao et al., arXiv:2402.03300; Schulman, 2020), as in verl.

    >>> logps = torch.tensor([-1.0, -1.0], requires_grad=True)
    >>> torch.autograd.grad(k3_straight(logps, torch.tensor([-1.0, -3.0])).sum(), logps)[0]
    tensor([0., 2.])
    """
    return _straight_through(k3, logps, ref_logps)


def _straight_through(value: Estimator, logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The value of one estimator, the gradient of k2."""
    slope = (logps - ref_logps).detach()
    return value(logps, ref_logps).detach() + slope * (logps - logps.detach())  # the second summand is exactly 0


@register_estimator(paper="arXiv:2306.08543", needs="logits")
def exact(
    logits: Tensor, ref_logits: Tensor, *, direction: Direction = "reverse", temperature: Positive = 1.0
) -> Tensor:
    """The KL itself, summed over the vocabulary: no sampling noise, right value and right gradient.

        reverse: KL(π ‖ ref) = Σ_v π(v) (log π(v) - log ref(v));   forward: KL(ref ‖ π)

    Args:
        logits: of the policy, vocabulary last, any shape before it.
        ref_logits: of the reference, same shape; it gets no gradient.
        direction: ``"reverse"`` is the KL of every other estimator here, ``"forward"`` the other one.
        temperature: divides both logits first.

    Returns:
        One KL per position, in nats, of the shape given without the vocabulary; float32 where the logits are halves.

    Convention: exact at each token of the completions given. Its mean over sampled completions estimates the KL of
    whole sequences; its gradient there leaves out that the policy chooses which prefixes are visited.

    Known failure: needs the logits of both models at once, 2 T V numbers a row.

    Source: Gu et al. (MiniLLM), arXiv:2306.08543, who use its sum over a completion.

    >>> exact(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    tensor([0.1201])
    """
    return kl_of(log_probs(logits, temperature), log_probs(ref_logits.detach(), temperature), direction)


exact_kl = exact


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities over the last axis, in float32 at least. Minus infinity marks what cannot be chosen.

    >>> log_probs(torch.tensor([0.0, 0.0, -torch.inf])).exp()
    tensor([0.5000, 0.5000, 0.0000])
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    scaled = logits / temperature
    # Finite, so that 0 probability times it is 0 and not NaN.
    return scaled.clamp(min=torch.finfo(scaled.dtype).min / 8).log_softmax(-1)


def kl_of(logps: Tensor, ref_logps: Tensor, direction: Direction = "reverse") -> Tensor:
    """KL(π ‖ ref) of two log-distributions over the last axis, or KL(ref ‖ π) if ``direction`` is forward."""
    if direction not in ("reverse", "forward"):
        raise UsageError(
            f"the direction of a KL is 'reverse', KL(π ‖ ref), or 'forward', KL(ref ‖ π); got {direction!r}."
        )
    first, second = (logps, ref_logps) if direction == "reverse" else (ref_logps, logps)
    return (first.exp() * (first - second)).sum(-1)


KL_ESTIMATORS: Mapping[str, Estimator] = MappingProxyType(
    {"k1": k1, "k2": k2, "k3": k3, "abs": absolute, "k1_straight": k1_straight, "k3_straight": k3_straight}
)


def kl_estimator(name: str) -> Estimator:
    """The estimator of that name, from two log-probabilities.

    >>> kl_estimator("k2") is k2
    True
    """
    if name not in KL_ESTIMATORS:
        if name == "exact":
            raise UsageError(
                "KL estimator 'exact' needs the logits of both models: call prefzoo.losses.kl.exact on them."
            )
        raise UsageError(f"no KL estimator {name!r}{suggest(name, KL_ESTIMATORS)} Known: {', '.join(KL_ESTIMATORS)}.")
    return KL_ESTIMATORS[name]
