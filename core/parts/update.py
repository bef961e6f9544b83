"""Updates: how the gradient of an optimizer step becomes a step. None: the optimizer of the run."""

from __future__ import annotations

from dataclasses import dataclass

from prefzoo.registry import UsageError


@dataclass(frozen=True)
class TrustRegion:
    """The step along the natural gradient that changes the policy by at most ``max_kl``, in place of an optimizer's.

        θ ← θ + s x,   (F + damping) x = g,   s = sqrt(2 max_kl / x'(F + damping) x),   then s, shrink s, shrink² s, ...
        until KL(old ‖ π) <= max_kl and the terms of the policy have improved; else θ stays

    Args:
        max_kl: the largest mean KL(old ‖ π) per token of a step, in nats, exact over the vocabulary.
        cg_iterations: of the conjugate gradients that solve for x.
        damping: added to the diagonal of the Fisher matrix F, which so few tokens leave singular.
        backtracks: step lengths that are tried.
        shrink: from one to the next.

    F x is a central difference of the KL's gradient, so that no kernel needs a second derivative. Cost of a step, in
    forward and backward passes over its samples: 1 for g, 2 for each iteration (a few more where the size of the
    difference must be found), each with a forward pass of the old policy; and a forward pass of both policies for each
    length tried. Memory: a copy of the trained parameters, and some vectors of their size.

    Applies to the policy alone; other models that the stage trains keep the optimizer. The learning rate, the schedule
    and the clipping of gradients have no effect on the policy.

    Source: Schulman et al., arXiv:1502.05477, appendix C; max_kl, iterations: its experiments. Damping, backtracks and
    shrink: OpenAI's Spinning Up.
    """

    max_kl: float = 0.01
    cg_iterations: int = 10
    damping: float = 0.1
    backtracks: int = 10
    shrink: float = 0.8

    def __post_init__(self) -> None:
        if self.max_kl <= 0 or self.damping < 0:
            raise UsageError(f"TrustRegion: max_kl must be above 0 and damping at least 0; got {self}.")
        if min(self.cg_iterations, self.backtracks) < 1:
            raise UsageError(f"TrustRegion: cg_iterations and backtracks must be at least 1; got {self}.")
        if not 0 < self.shrink < 1:
            raise UsageError(f"TrustRegion: shrink is the ratio of two step lengths, between 0 and 1; got {self}.")
