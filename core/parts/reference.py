"""References: what the policy is held to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prefzoo.registry import UsageError


@dataclass(frozen=True)
class Start:
    """The start model, or the run's ``reference=``; it stays as it is."""


@dataclass(frozen=True)
class Moving:
    """A copy that follows the policy: every ``every`` optimizer steps, ref ← α policy + (1 - α) ref, weight by weight.

    ``alpha=1`` is a hard update. Its log-probabilities cannot be computed beforehand, so each step has a forward pass
    more.

    Source: Gorbatovski et al. (TR-DPO), arXiv:2404.09656, equations 3 and 4.
    """

    alpha: float = 0.6
    every: int = 512

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1 or self.every < 1:
            raise UsageError(f"a moving reference needs 0 < alpha <= 1 and every >= 1; got {self}.")

    @property
    def copies(self) -> bool:
        """Whether it is a copy of the policy at some step, and nothing between two of its states."""
        return self.alpha == 1

    def begin(self, reference: nn.Module) -> None:
        """Called once, before the first step, with the reference as it starts."""

    def begin_round(self, reference: nn.Module, policy: nn.Module) -> None:
        """Called at the beginning of every rollout step."""

    def due(self, step: int) -> bool:
        """Whether it moves now that so many optimizer steps are done."""
        return step % self.every == 0

    def kept(self) -> Mapping[str, Tensor]:
        """What it holds beside the reference's weights, itself, for checkpoints."""
        return {}

    @torch.no_grad()
    def follow(self, reference: nn.Module, policy: nn.Module, step: int = 0) -> None:
        """Move the reference, in place; ``step``: optimizer steps done."""
        for mine, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
            if mine is not theirs:  # what lies under an adapter is one for both
                mine.lerp_(theirs.to(mine.dtype), self.alpha)


@dataclass(frozen=True)
class BiasCorrected(Moving):
    """A mean of the policy's past weights, ahead by a part of the way from the start, so that it lags less (BEMA).

        every ``every`` steps:  EMA ← (1 - β_t) EMA + β_t θ_t;   ref = EMA + α_t (θ_t - θ_0)
        β_t = (lag + multiplier t)^-ema_power,   α_t = (lag + multiplier t)^-bias_power,   t optimizer steps

    Args:
        every: steps between two updates.
        ema_power: of the decay of β. 0: EMA is the policy.
        bias_power: of the decay of α, the bias correction.
        lag: ρ, as if so many steps had been done before.
        multiplier: γ, of the step.

    Two more copies of the weights are held, θ_0 and the mean. Defaults are TRL's, but that the reference is updated as
    often as the mean.

    Source: Block and Zhang, EMA Without the Lag, arXiv:2508.00180.
    """

    every: int = 400
    ema_power: float = 0.5
    bias_power: float = 0.2
    lag: float = 10.0
    multiplier: float = 1.0
    _held: dict[str, list[Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.every < 1 or self.lag <= 0 or min(self.ema_power, self.bias_power, self.multiplier) < 0:
            raise UsageError(f"a bias-corrected reference needs every >= 1, lag > 0, powers of at least 0; got {self}.")

    @property
    def copies(self) -> bool:
        return False

    def begin(self, reference: nn.Module) -> None:
        for name in ("start", "mean"):
            self._held[name] = [p.detach().clone() for p in reference.parameters()]

    def kept(self) -> Mapping[str, Tensor]:
        return {f"{name}.{i}": value for name, values in self._held.items() for i, value in enumerate(values)}

    @torch.no_grad()
    def follow(self, reference: nn.Module, policy: nn.Module, step: int = 0) -> None:
        age = self.lag + self.multiplier * step
        beta, alpha = age**-self.ema_power, age**-self.bias_power
        pairs = zip(reference.parameters(), policy.parameters(), *self._held.values(), strict=True)
        for mine, theirs, start, mean in pairs:
            mean.lerp_(theirs.to(mean.dtype), beta)
            mine.copy_(mean + alpha * (theirs.to(mean.dtype) - start))


@dataclass(frozen=True)
class EachRound(Moving):
    """A hard copy of the policy at the beginning of every rollout step: the anchor of a round is what the last one
    left."""

    alpha: float = 1.0
    every: int = 1

    def begin_round(self, reference: nn.Module, policy: nn.Module) -> None:
        self.follow(reference, policy)

    def due(self, step: int) -> bool:
        return False
