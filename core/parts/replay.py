"""Replay: samples of earlier steps that are trained on again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from prefzoo.data.samples import Samples
from prefzoo.registry import UsageError


@dataclass(frozen=True)
class Replay:
    """A pool of rollouts: each step adds its own, the oldest beyond ``capacity`` completions go; all of it is credited.

    The scores are those that the samples got when they were made (column ``score``); completions without one do not
    enter. The prompts' other columns are not kept.
    """

    capacity: int = 65_536

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise UsageError(f"Replay: capacity is a number of completions of at least 1, got {self.capacity}.")

    def add(self, pool: Samples | None, samples: Samples, scores_B: Tensor) -> tuple[Samples, Tensor]:
        """The pool with these samples, and the scores of all of it."""
        known = torch.nonzero(~scores_B.isnan())[:, 0]
        scored = replace(samples, columns={**samples.columns, "score": scores_B.float()}, extra={})
        fresh = scored.take(known.numpy())
        joined = fresh if pool is None else Samples.concatenate([pool, fresh])
        rows = np.arange(max(0, len(joined) - self.capacity), len(joined))
        joined = joined.take(rows)
        return joined, joined.columns["score"]
