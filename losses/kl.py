"""Estimators of KL(π ‖ ref) at one sampled token, from its two log-probabilities.

With x = log ref(a) - log π(a) and a ~ π (Schulman, "Approximating KL divergence", 2020):

    name   value            E[value]                  E[gradient], when the value is differentiated as it stands
    k1     -x               KL, unbiased, signed      0: it does not pull at all
    k2     x² / 2           ≈ KL, biased, >= 0        the gradient of KL(π ‖ ref), unbiased
    k3     exp(x) - 1 - x   KL, unbiased, >= 0        the gradient of KL(ref ‖ π), the other direction

Which estimator is good to *report* or to *subtract from a reward* (k1, k3: only the value counts) is one question,
which is good to *differentiate* another (k2; or k1 and k3 multiplied by the differentiable ratio π / old, which makes
their gradient that of KL(π ‖ ref)). A term of a loss differentiates; a reward does not.

Only the exponent of k3 is clamped, from above, where ``exp`` would overflow (80 in float32 and bfloat16, 700 in
float64). verl clamps k3 and OpenRLHF all three to ±10; TRL clamps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from prefzoo.losses.numerics import bounded
from prefzoo.registry import UsageError, suggest

EstimatorName = Literal["k1", "k2", "k3"]
Estimator = Callable[[Tensor, Tensor], Tensor]


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """log π - log ref: unbiased, of either sign, largest variance."""
    return logps - ref_logps


def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """(log π - log ref)² / 2: biased value, but its gradient is that of KL(π ‖ ref)."""
    return 0.5 * (logps - ref_logps).square()


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """ref/π - 1 - log(ref/π): unbiased, never negative.

    >>> import torch
    >>> k3(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -2.0]))
    tensor([0.0000, 0.3679])
    """
    log_ratio = bounded(ref_logps - logps)
    return log_ratio.expm1() - log_ratio


KL_ESTIMATORS: Mapping[str, Estimator] = MappingProxyType({"k1": k1, "k2": k2, "k3": k3})


def kl_estimator(name: str) -> Estimator:
    """The estimator of that name.

    >>> kl_estimator("k2") is k2
    True
    """
    if name not in KL_ESTIMATORS:
        raise UsageError(f"no KL estimator {name!r}{suggest(name, KL_ESTIMATORS)} Known: {', '.join(KL_ESTIMATORS)}.")
    return KL_ESTIMATORS[name]
