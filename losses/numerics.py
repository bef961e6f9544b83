"""The few numerical guards that the losses share. Nothing else in ``prefzoo.losses`` clamps."""

from __future__ import annotations

import torch
from torch import Tensor

# exp(88.7) is the largest finite float32 and bfloat16, exp(709.7) the largest float64, exp(11.09) the largest float16.
EXPONENT_LIMITS: dict[torch.dtype, float] = {torch.float64: 700.0, torch.float16: 11.0}


def exponent_limit(dtype: torch.dtype) -> float:
    """Largest exponent that we give to ``exp``: 80 in float32 and bfloat16, 700 in float64, 11 in float16."""
    return EXPONENT_LIMITS.get(dtype, 80.0)


def bounded(exponent: Tensor) -> Tensor:
    """The exponent, clamped from above where ``exp`` would overflow; there its gradient is 0.

    Below nothing is clamped: ``exp`` of a large negative number is 0, which is right and finite.

    >>> bounded(torch.tensor([-500.0, 3.0, 500.0]))
    tensor([-500.,    3.,   80.])
    """
    return exponent.clamp(max=exponent_limit(exponent.dtype))


def safe_exp(exponent: Tensor) -> Tensor:
    """``exp`` that never overflows."""
    return bounded(exponent).exp()


def deformed(x: Tensor, alpha: float, limit: float | None = None) -> Tensor:
    """(1 - exp(-alpha x)) / alpha: x bent downwards for alpha > 0, upwards below, x itself at 0. Its slope at 0 is 1.

    With x = log u it is (1 - u^-alpha) / alpha, computed without u, which would underflow. ``limit``: where the
    exponent is clamped (default: where ``exp`` overflows).

    >>> deformed(torch.tensor([-1.0, 0.0, 1.0]), 1.0)
    tensor([-1.7183,  0.0000,  0.6321])
    """
    if alpha == 0:
        return x
    limit = exponent_limit(x.dtype) if limit is None else limit
    return -(-alpha * x).clamp(max=limit).expm1() / alpha


def masked(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The values inside the mask, 0 outside: what stands outside reaches neither the result nor the gradient.

    A loss that is not linear in its inputs applies this to them *before* computing; masking its result is too late,
    because the gradient of ``exp`` or of a product at NaN is NaN, even when it is multiplied by 0.

    >>> masked(torch.tensor([[1.0, float("nan")]]), torch.tensor([[True, False]]))
    tensor([[1., 0.]])
    """
    return torch.where(mask_BT, values_BT, 0.0)


def by_case(case: Tensor, where: float, elsewhere: float, like: Tensor) -> Tensor:
    """One number where the case holds, another elsewhere, in the precision of ``like``.

    ``torch.where`` of two Python numbers would round them to float32.

    >>> by_case(torch.tensor([True, False]), 1.0, 1.05, torch.zeros(2, dtype=torch.float64))
    tensor([1.0000, 1.0500], dtype=torch.float64)
    """
    return torch.full_like(like, elsewhere).masked_fill(case, where)
