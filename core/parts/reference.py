"""References: what the policy is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

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

    @torch.no_grad()
    def follow(self, reference: nn.Module, policy: nn.Module) -> None:
        """Move the reference, in place."""
        for mine, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
            if mine is not theirs:  # what lies under an adapter is one for both
                mine.lerp_(theirs.to(mine.dtype), self.alpha)


@dataclass(frozen=True)
class EachRound(Moving):
    """A hard copy of the policy at the beginning of every rollout step: the anchor of a round is what the last one
    left."""

    alpha: float = 1.0
    every: int = 1
