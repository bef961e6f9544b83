"""Steps that are more than an optimizer's: the trust region."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefzoo.parts.update import TrustRegion

PROBE = 1e-2  # of max_kl: the KL that a difference quotient moves the policy by; rounding is then 1e-5 of the change
TOLERANCE = 1e-10  # of |residual|² / |g|², where conjugate gradients stop


@dataclass(frozen=True)
class Landscape:
    """What a trust region asks of whoever holds the samples. All of it is summed over micro-batches and processes.

    ``parameters`` are moved in place. ``gradient``: of the loss that is to fall, at the start. ``kl_gradient``: of the
    mean KL(start ‖ here), wherever the parameters are. ``loss_and_kl``: both there, without gradient.
    """

    parameters: Sequence[nn.Parameter]
    gradient: Callable[[], Sequence[Tensor]]
    kl_gradient: Callable[[], Sequence[Tensor]]
    loss_and_kl: Callable[[], tuple[float, float]]


@torch.no_grad()
def natural_step(region: TrustRegion, land: Landscape) -> tuple[Tensor, dict[str, float]]:
    """Where a step of the trust region leads, and how it went, by name. The parameters are left as they were.

    ``trust/kl``: mean KL(old ‖ π) per token of the step, in nats; ``trust/improvement``: by how much the loss falls;
    ``trust/backtracks``: lengths that were refused before; ``trust/accepted``: 0 where none was good, and the step
    leads nowhere.
    """
    origin = flat(land.parameters)
    try:
        found = _line_search(region, land, origin)
    finally:  # also where a signal ends the run: what it leaves is a whole state
        put(land.parameters, origin)
    if found is None:
        return origin, {"trust/kl": 0.0, "trust/improvement": 0.0, "trust/accepted": 0.0}
    return found


def _line_search(region: TrustRegion, land: Landscape, origin: Tensor) -> tuple[Tensor, dict[str, float]] | None:
    with torch.enable_grad():
        gradient = flat(land.gradient())
    if not gradient.any():
        return None
    step, curvature = conjugate_gradients(Fisher(region, land, origin), -gradient, region.cg_iterations)
    if not curvature > 0:  # also NaN
        return None
    step *= math.sqrt(2 * region.max_kl / curvature)
    put(land.parameters, origin)
    before, _ = land.loss_and_kl()
    for refused in range(region.backtracks):
        there = origin + region.shrink**refused * step
        put(land.parameters, there)
        after, kl = land.loss_and_kl()
        if kl <= region.max_kl and after < before:
            found = {"trust/kl": kl, "trust/improvement": before - after}
            return there, {**found, "trust/backtracks": float(refused), "trust/accepted": 1.0}
    return None


class Fisher:
    """The Fisher matrix at the origin times a vector: the Hessian of the KL by central differences of its gradient."""

    def __init__(self, region: TrustRegion, land: Landscape, origin: Tensor) -> None:
        self.damping, self.land, self.origin = region.damping, land, origin
        self.probe = PROBE * region.max_kl
        # |F v| / |v| of the vector before, which tells how far to go along the next; at first unknown.
        self.curvature = 2 * self.probe / max(1e-6 * dot(origin, origin), 1e-12)

    @torch.no_grad()
    def __call__(self, vector: Tensor) -> Tensor:
        squared = dot(vector, vector)
        product = torch.zeros_like(vector)
        for _ in range(4):
            length = math.sqrt(2 * self.probe / (self.curvature * squared))
            product = (self._at(length * vector) - self._at(-length * vector)) / (2 * length)
            curvature = dot(vector, product) / squared
            if not math.isfinite(curvature):
                curvature = 100 * self.curvature  # went too far: come nearer
            known = curvature > 0.01 * self.curvature and curvature < 100 * self.curvature
            # Flat directions are not followed to the end of the world: the damping decides there.
            self.curvature = max(curvature, 0.01 * self.curvature, 1e-30)
            if known or curvature < 0.01 * self.damping:
                break
        return product + self.damping * vector

    def _at(self, shift: Tensor) -> Tensor:
        put(self.land.parameters, self.origin + shift)
        with torch.enable_grad():
            return flat(self.land.kl_gradient())


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], target: Tensor, iterations: int) -> tuple[Tensor, float]:
    """x with A x = target, nearly, and x'A x.

    >>> a = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradients(lambda v: a @ v, torch.tensor([3.0, 4.0]), 2)[0].round(decimals=4)
    tensor([1., 1.])
    """
    x = torch.zeros_like(target)
    residual, direction = target.clone(), target.clone()
    squared = first = dot(residual, residual)
    for _ in range(iterations):
        product = matrix(direction)
        along = dot(direction, product)
        if not along > 0:  # rounding has the last word; what is found so far is a descent direction
            break
        rate = squared / along
        x += rate * direction
        residual -= rate * product
        squared, before = dot(residual, residual), squared
        if squared <= TOLERANCE * first:
            break
        direction = residual + squared / before * direction
    return x, dot(x, target - residual)


def dot(a: Tensor, b: Tensor) -> float:
    """Summed in float64: vectors of millions, whose squares are small."""
    return float((a.double() * b.double()).sum())


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All numbers in one vector, a copy."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


@torch.no_grad()
def put(parameters: Sequence[nn.Parameter], vector: Tensor) -> None:
    """The inverse of :func:`flat`, in place."""
    for parameter, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        parameter.copy_(part.view_as(parameter))


__all__ = ["Fisher", "Landscape", "conjugate_gradients", "natural_step"]
