"""Preludes: what must be known about the whole optimizer batch before the first backward. No gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prefzoo.data.samples import Samples
from prefzoo.losses.unpaired import kto_baseline
from prefzoo.parts.roles import REFERENCE, Roles


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

    Row i's prompt is paired with row i-1's completion (the first with the last), in the order of the batch. ``rows``:
    use the first so many rows only; a quarter of the batch costs a quarter and is little noisier.
    """

    rows: int | None = None
    gives = "baseline"
    needs: frozenset[str] = frozenset({REFERENCE})

    def __call__(self, samples: Samples, roles: Roles) -> Tensor:
        rows = min(len(samples), self.rows or len(samples))
        partners = np.roll(np.arange(rows), 1)
        mismatched = replace(
            samples.take(np.arange(rows)),
            completions=samples.completions.take(partners), tokens={}, columns={},
        )  # fmt: skip
        # take() renumbers prompts by their old order, so prompt_B still belongs to row i.
        ratio_C = roles.policy_logps(mismatched) - roles.reference_logps(mismatched)
        owner_B = np.repeat(np.arange(rows), mismatched.completions.lengths)
        ratio_B = ratio_C.new_zeros(rows).index_add(0, torch.from_numpy(owner_B).to(ratio_C.device), ratio_C)
        return kto_baseline(ratio_B)


PRELUDES: Mapping[str, Any] = MappingProxyType({p.gives: p for p in (RotatedBaseline,)})  # by what they give
