"""Winners: which sampled completions are made likelier, by their scores.

Each part has a control, ``choose="random"``: of every prompt as many completions, whatever their scores. Samples of a
prompt are alike before they are scored, so the first of them are a random choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prefzoo.data.samples import Samples
from prefzoo.losses import advantages
from prefzoo.parts.condition import quantile_levels
from prefzoo.parts.credit import per_token, sequence_kl
from prefzoo.parts.roles import REFERENCE
from prefzoo.registry import UsageError

Choose = Literal["best", "random"]


@dataclass(frozen=True)
class Winners:
    """The ``k`` best completions of each prompt, to be made likelier; ties go to the first.

    ``kl``: a score is the reward less so much of log pi(y)/ref(y), summed over tokens; 0: no reference is needed.
    """

    k: int = 1
    choose: Choose = "best"
    kl: float = 0.0

    gives = "completions"

    @property
    def smallest_group(self) -> int:
        return max(2, self.k)

    def __post_init__(self) -> None:
        _check("Winners", self.choose)
        if self.k < 1 or self.kl < 0:
            raise UsageError(f"Winners: k is at least 1 and kl a weight of at least 0; got {self}.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({REFERENCE}) if self.kl else frozenset()

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        if self.kl:
            scores_B = scores_B - self.kl * sequence_kl(samples)
        if self.choose == "random":
            scores_B = torch.where(scores_B.isnan(), scores_B, 0.0)
        return samples.take(advantages.best_of_k(scores_B, torch.from_numpy(samples.prompt_B), k=self.k).numpy())


@dataclass(frozen=True)
class Filtered:
    """The completions whose scores reach a threshold; with several, rising ones, each pass has a higher one.

        pass i trains on { y : R(y) >= τ_i },   τ_1 <= τ_2 <= ...

    ``thresholds`` are scores, or, with ``quantiles``, the shares of the step's known scores below which they lie.
    ``epochs``: passes at each. The stage's ``inner_epochs`` must be the number of passes.
    """

    thresholds: tuple[float, ...]
    quantiles: bool = True
    epochs: int = 1
    choose: Choose = "best"

    gives = "completions"
    needs: frozenset[str] = frozenset()
    smallest_group = 1

    def __post_init__(self) -> None:
        _check("Filtered", self.choose)
        if not self.thresholds or list(self.thresholds) != sorted(self.thresholds):
            raise UsageError(f"Filtered: thresholds rise from pass to pass, got {self.thresholds}.")
        if self.quantiles and not 0 <= self.thresholds[0] <= self.thresholds[-1] < 1:
            raise UsageError(f"Filtered: quantiles are shares from 0 to below 1, got {self.thresholds}.")

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        scores_B = scores_B.double()
        known = scores_B[~scores_B.isnan()]
        if not len(known):
            return samples.take([])
        limits = torch.tensor(self.thresholds, dtype=torch.float64)
        limits = known.quantile(limits) if self.quantiles else limits
        reached_B = (scores_B[:, None] >= limits).sum(1)  # nothing reaches by being missing
        if self.choose == "random":
            reached_B = dealt_in_order(reached_B, scores_B, torch.from_numpy(samples.prompt_B))
        rows = torch.nonzero(reached_B)[:, 0]
        kept = samples.take(rows.numpy())
        return replace(kept, columns={**kept.columns, "passes": self.epochs * reached_B[rows]})


@dataclass(frozen=True)
class Reaches:
    """Keep the completions whose score reaches a threshold: of a verifier, those that are right."""

    threshold: float = 1.0
    choose: Choose = "best"

    def __post_init__(self) -> None:
        _check("Reaches", self.choose)

    def __call__(self, samples: Samples, scores_B: Tensor) -> tuple[Samples, Tensor]:
        reached_B = (scores_B >= self.threshold).long()
        if self.choose == "random":
            reached_B = dealt_in_order(reached_B, scores_B, torch.from_numpy(samples.prompt_B))
        rows = torch.nonzero(reached_B)[:, 0]
        return samples.take(rows.numpy()), scores_B[rows]


@dataclass(frozen=True)
class Distinct:
    """All that were kept, to be made likelier, every completion of a prompt once."""

    gives = "completions"
    needs: frozenset[str] = frozenset()
    smallest_group = 1

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        first: dict[tuple[bytes, bytes], int] = {}
        for b, p in enumerate(samples.prompt_B):
            first.setdefault((samples.prompts[p].tobytes(), samples.completions[b].tobytes()), b)
        return samples.take(list(first.values()))


@dataclass(frozen=True)
class Quantiles:
    """Each completion with the quantile of its score among all, column ``level``, for a :class:`Condition`: all are to
    be made likelier. ``advantages``: they have one too, 1, for a term on advantages beside the likelihood."""

    levels: int = 5
    advantages: bool = False

    needs: frozenset[str] = frozenset()
    smallest_group = 1

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise UsageError(f"Quantiles: there are at least two levels, got {self.levels}.")

    @property
    def gives(self) -> str:
        return "advantages" if self.advantages else "completions"

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        known = torch.nonzero(~scores_B.isnan())[:, 0]
        samples, scores_B = samples.take(known.numpy()), scores_B[known]
        samples = replace(samples, columns={**samples.columns, "level": quantile_levels(scores_B, self.levels)})
        return per_token(samples, torch.ones(len(samples))) if self.advantages else samples


def dealt_in_order(numbers_B: Tensor, scores_B: Tensor, prompt_B: Tensor) -> Tensor:
    """The numbers of every prompt's completions dealt to them anew, the largest first, in the order in which the
    completions were sampled; those without a score (NaN) get theirs last.

    >>> dealt_in_order(torch.tensor([0, 2, 1, 0, 3]), torch.zeros(5), torch.tensor([0, 0, 0, 1, 1]))
    tensor([2, 1, 0, 3, 0])
    """
    prompt, missing = prompt_B.numpy(), scores_B.isnan().numpy()
    givers = np.lexsort((-numbers_B.numpy(), prompt))
    takers = np.lexsort((missing, prompt))
    dealt_B = torch.empty_like(numbers_B)
    dealt_B[torch.from_numpy(takers)] = numbers_B[torch.from_numpy(givers)]
    return dealt_B


def _check(part: str, choose: str) -> None:
    if choose not in ("best", "random"):
        raise UsageError(f"{part}: choose is 'best' or 'random', got {choose!r}.")
