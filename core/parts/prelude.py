"""Preludes: what must be known about the whole optimizer batch before the first backward. No gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prefzoo.data.samples import Samples, labels_of, loss_mask
from prefzoo.losses.policy_modifiers import entropy_floor
from prefzoo.losses.unpaired import class_midpoint, kto_baseline
from prefzoo.parts.roles import REFERENCE, Roles
from prefzoo.registry import UsageError


class Prelude(Protocol):
    """What the engine asks of a prelude: the record's field that it gives, and a scalar for the whole batch."""

    @property
    def gives(self) -> str: ...

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, samples: Samples, roles: Roles) -> Tensor: ...


@dataclass(frozen=True)
class RotatedBaseline:
    """KTO's reference point: z0 = max(0, mean_i log pi(y_{i-1} | x_i) / ref(y_{i-1} | x_i)) over the optimizer batch.

    Row i's prompt is paired with row i-1's completion (the first with the last), in the order of the batch; where rows
    of one prompt stand together, as samples of it do, with that of the row so far before that the prompts differ.
    ``rows``: use the first so many rows only; a quarter of the batch costs a quarter and is little noisier.
    """

    rows: int | None = None
    gives = "baseline"
    needs: frozenset[str] = frozenset({REFERENCE})

    def __call__(self, samples: Samples, roles: Roles) -> Tensor:
        # take() renumbers prompts by their old order, so prompt_B still belongs to row i.
        mine = samples.take(np.arange(min(len(samples), self.rows or len(samples))))
        theirs = mine.take(np.roll(np.arange(len(mine)), _shift(mine.prompt_B[:: mine.per_row])))
        trained = {name: value for name, value in theirs.tokens.items() if name == "trainable"}
        mismatched = replace(mine, completions=theirs.completions, tokens=trained, columns={})
        return kto_baseline(log_ratios(mismatched, roles))


def _shift(prompt_B: np.ndarray) -> int:
    """The least shift of the rows in a circle after which the fewest meet their own prompt."""
    least, found = len(prompt_B) + 1, 1
    for shift in range(1, len(prompt_B)):
        same = int((prompt_B == np.roll(prompt_B, shift)).sum())
        if same < least:
            least, found = same, shift
        if not same:
            break
    return found


@dataclass(frozen=True)
class EntropyFloor:
    """The entropy that the ``share`` most uncertain tokens of the optimizer batch reach.

    Source: Wang et al., Beyond the 80/20 Rule, arXiv:2506.01939, who train on a fifth of the tokens.
    """

    share: float = 0.2
    gives = "entropy_floor"
    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"EntropyFloor: share is that of the tokens to train on, above 0, got {self.share:g}.")

    def __call__(self, samples: Samples, roles: Roles) -> Tensor:
        mask_BT = loss_mask(samples, samples.mask_BT())
        return entropy_floor(samples.padded(roles.policy_entropy(samples)), mask_BT, self.share)


class RunningMean:
    """The mean of a number over all rows of the run so far, that of a prelude (``follows``): after each optimizer step
    it becomes what the prelude gave, the mean with that step's rows.

    >>> mean = RunningMean("delta")
    >>> mean.update(mean.with_batch(1.0, 2), 2)
    >>> mean.with_batch(4.0, 1), mean.value  # (1 + 1 + 4) / 3, not yet taken
    (2.0, 1.0)
    """

    def __init__(self, follows: str) -> None:
        self.follows = follows
        self.value = 0.0
        self.rows = 0

    def __repr__(self) -> str:
        return f"RunningMean({self.follows!r})"

    def with_batch(self, value: float, rows: int) -> float:
        """What the mean would be with so many rows more, whose own is ``value``."""
        return self.value + (value - self.value) * rows / max(self.rows + rows, 1)

    def update(self, mean: float, n: int) -> None:
        self.value, self.rows = mean, self.rows + n

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "rows": self.rows}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.value, self.rows = float(state["value"]), int(state["rows"])


@dataclass(frozen=True)
class ClassMidpoint:
    """BCO's shift: the midpoint of the mean log-ratios of desirable and of undesirable rows of the optimizer batch.

    ``running``: it is averaged with the midpoints of the batches before, each weighing as much as it has rows. Name the
    same object in the stage's controllers: it follows ``"delta"`` and is kept in checkpoints.

    Source: Jung et al. (BCO), arXiv:2404.04656, section 3.2, whose shift is a running average.
    """

    running: RunningMean | None = None
    gives = "delta"
    needs: frozenset[str] = frozenset({REFERENCE})

    def __call__(self, samples: Samples, roles: Roles) -> Tensor:
        midpoint = class_midpoint(log_ratios(samples, roles), labels_of(samples))
        if self.running is None:
            return midpoint
        return midpoint.new_tensor(self.running.with_batch(float(midpoint), len(samples)))


def log_ratios(samples: Samples, roles: Roles) -> Tensor:
    """Log-ratio of policy to reference of every completion, (B,), in nats: of its tokens that carry loss."""
    ratio_C = roles.policy_logps(samples) - roles.reference_logps(samples)
    if "trainable" in samples.tokens:
        ratio_C = torch.where(samples.tokens["trainable"].to(ratio_C.device), ratio_C, 0.0)
    owner_C = torch.from_numpy(np.repeat(np.arange(len(samples.completions)), samples.completions.lengths))
    return ratio_C.new_zeros(len(samples.completions)).index_add(0, owner_C.to(ratio_C.device), ratio_C)


# By what they give: the field of the record that a loss declares as its need.
PRELUDES: Mapping[str, Any] = MappingProxyType({p.gives: p for p in (RotatedBaseline, EntropyFloor, ClassMidpoint)})
