"""Keep: which samples, or whose tokens, are trained on? Beside :class:`prefzoo.parts.feedback.Finished` and its kin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prefzoo.data.samples import Samples
from prefzoo.registry import UsageError

KeepPart = Callable[[Samples, Tensor], tuple[Samples, Tensor]]


@dataclass(frozen=True)
class MixedGroups:
    """Keep the prompts whose completions differ in score: the others give a group credit nothing to compare.

    ``refill``: how many times prompts are sampled anew, in the same step, while some are missing (DAPO's dynamic
    sampling); their cost is the run's. A prompt with fewer than two scores goes too.

    Source: Yu et al. (DAPO), arXiv:2503.14476, section 3.2.
    """

    refill: int = 0

    def __post_init__(self) -> None:
        if self.refill < 0:
            raise UsageError(f"MixedGroups: refill is a number of further samplings, at least 0, got {self.refill}.")

    def __call__(self, samples: Samples, scores_B: Tensor) -> tuple[Samples, Tensor]:
        prompt_B = torch.from_numpy(samples.prompt_B)
        empty_P = torch.full((len(samples.prompts),), -torch.inf, dtype=scores_B.dtype)
        highest_P = empty_P.scatter_reduce(0, prompt_B, scores_B.nan_to_num(nan=-torch.inf), "amax")
        lowest_P = (-empty_P).scatter_reduce(0, prompt_B, scores_B.nan_to_num(nan=torch.inf), "amin")
        rows = torch.nonzero((highest_P > lowest_P)[prompt_B])[:, 0]
        return samples.take(rows.numpy()), scores_B[rows]


@dataclass(frozen=True)
class SoftOverlong:
    """Long completions lose some of their score: nothing at ``limit - buffer`` tokens, ``penalty`` at ``limit``.

        score ← score - penalty clip((n - (limit - buffer)) / buffer, 0, 1)        n: tokens of the completion

    Source: Yu et al. (DAPO), arXiv:2503.14476, equation 13, whose penalty is 1.
    """

    limit: int
    buffer: int
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.buffer <= self.limit:
            raise UsageError(
                f"SoftOverlong: buffer is a number of tokens from 1 to the limit of {self.limit}; got {self}."
            )

    def __call__(self, samples: Samples, scores_B: Tensor) -> tuple[Samples, Tensor]:
        lengths_B = torch.from_numpy(samples.completions.lengths)
        over_B = ((lengths_B - (self.limit - self.buffer)) / self.buffer).clamp(0, 1)
        return samples, scores_B - self.penalty * over_B.to(scores_B.dtype)


@dataclass(frozen=True)
class InTurn:
    """One part after another."""

    parts: tuple[KeepPart, ...]

    @property
    def refill(self) -> int:
        return max((getattr(part, "refill", 0) for part in self.parts), default=0)

    def __call__(self, samples: Samples, scores_B: Tensor) -> tuple[Samples, Tensor]:
        for part in self.parts:
            samples, scores_B = part(samples, scores_B)
        return samples, scores_B
