"""Feedback: who says what is good?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefzoo.data.samples import Samples
from prefzoo.parts.roles import REWARD, Roles
from prefzoo.registry import UsageError
from prefzoo.rollout import Finish


@dataclass(frozen=True)
class Labels:
    """The labels of the data."""

    needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Unjudged:
    """Nobody: sampled completions are trained on as they are. Their scores are missing."""

    needs: frozenset[str] = frozenset()

    def __call__(self, samples: Samples, roles: Roles) -> Tensor:
        return torch.full((len(samples.completions),), torch.nan)


@dataclass(frozen=True)
class Reward:
    """The run's ``reward``: a reward model, a function, a verifier or a judge; after a stage that trained a reward
    model, that one. ``missing_eos_penalty`` is subtracted from the score of a completion that was cut at the limit."""

    missing_eos_penalty: float = 0.0
    needs: frozenset[str] = frozenset({REWARD})

    def __call__(self, samples: Samples, roles: Roles) -> Tensor:
        cut_B = samples.columns["finish"] == Finish.LENGTH
        return roles.rewards(samples) - self.missing_eos_penalty * cut_B.float()


@dataclass(frozen=True)
class Verifier(Reward):
    """The run's ``reward``, which must check rather than judge: a function or a verifier, not a reward model."""


@dataclass(frozen=True)
class Objectives:
    """Each of the run's rewards by itself, (B, K): ``reward=[...]`` in this order, with its weight.

    ``count``: how many there must be; None: any number.
    """

    count: int | None = None
    needs: frozenset[str] = frozenset({REWARD})

    def check(self, source: Any) -> None:
        """Refuse a reward that has another number of objectives."""
        if self.count is not None and source.width != self.count:
            raise UsageError(f"reward: expected a list of {self.count} rewards, got {source.width}.")

    def __call__(self, samples: Samples, roles: Roles) -> Tensor:
        return roles.objectives(samples)


@dataclass(frozen=True)
class Finished:
    """Keep the completions that the model ended itself."""

    def __call__(self, samples: Samples, scores_B: Tensor) -> tuple[Samples, Tensor]:
        rows = torch.nonzero(samples.columns["finish"] == Finish.STOP)[:, 0]
        return samples.take(rows.numpy()), scores_B[rows]


@dataclass(frozen=True)
class MaskTruncated:
    """Keep all, but take no gradient from completions cut at the limit; they count as rows and in the baseline."""

    def __call__(self, samples: Samples, scores_B: Tensor) -> tuple[Samples, Tensor]:
        ended_B = samples.columns["finish"] == Finish.STOP
        ended_C = ended_B.repeat_interleave(torch.from_numpy(samples.completions.lengths))
        return samples.with_tokens(trainable=samples.tokens.get("trainable", ended_C) & ended_C), scores_B
