"""Credit of rows of a data set: scores that came with them, less a baseline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from prefzoo.data.samples import Samples, labels_of
from prefzoo.losses.advantages import group_relative
from prefzoo.losses.unpaired import class_weights
from prefzoo.parts.roles import CRITIC
from prefzoo.registry import UsageError

Baseline = Literal["prompt", "data", "critic"]


@dataclass(frozen=True)
class ReturnAbove:
    """A = R - V: the score of a completion less what was to be expected, at each of its tokens.

    Args:
        baseline: V. ``"prompt"``: the mean score of the completions of the same prompt in all the data (a prompt with
            one completion has A = 0); ``"data"``: the mean of all scores; ``"critic"``: a critic's value before each
            token, which learns the score as the return of every token.
        standardise: divide by the standard deviation of all A (of a critic's, by that of the optimizer batch).

    A missing score (NaN) stays missing: losses give it no weight.

    Source: Peng et al. (AWR), arXiv:1910.00177, section 3; a learned V: its algorithm 1.
    """

    baseline: Baseline = "prompt"
    standardise: bool = True

    gives = "advantages"
    smallest_group = 1
    of_rows = frozenset({"scored", "unpaired"})  # of a data set
    reads = frozenset({"score"})

    def __post_init__(self) -> None:
        if self.baseline not in ("prompt", "data", "critic"):
            raise UsageError(f"baseline is {self.baseline!r}; it must be 'prompt', 'data' or 'critic'.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({CRITIC} if self.baseline == "critic" else ())

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        lengths_B = torch.from_numpy(samples.completions.lengths)
        known_B = ~scores_B.isnan()
        scores_C = scores_B.repeat_interleave(lengths_B)
        if self.baseline == "critic":
            advantages_C = scores_C - samples.tokens["values"]
            samples = samples.with_tokens(
                returns=scores_C.nan_to_num(), trainable=_trainable(samples) & known_B.repeat_interleave(lengths_B)
            )
        else:
            group_B = torch.from_numpy(samples.prompt_B)
            one_B = group_B if self.baseline == "prompt" else torch.zeros_like(group_B)
            advantage_B = torch.where(known_B, group_relative(scores_B, one_B, scale="none"), torch.nan)
            advantages_C = advantage_B.repeat_interleave(lengths_B)
        if self.standardise:
            known = advantages_C[~advantages_C.isnan() & _trainable(samples)]
            if len(known) > 1:
                advantages_C = advantages_C / (known.std() + 1e-4)
        return samples.with_tokens(advantages=advantages_C)


@dataclass(frozen=True)
class ClassBalance:
    """Weights of labelled rows that turn a mean over rows into the sum of the two classes' means: n / n of its class.

    Counted over all the data, not over a batch. The weights that rows have already are kept as factors.

    Source: Jung et al. (BCO), arXiv:2404.04656, whose loss is a sum of two expectations.
    """

    gives = "unpaired"
    needs: frozenset[str] = frozenset()
    smallest_group = 1
    of_rows = frozenset({"unpaired"})

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        weight_B = class_weights(labels_of(samples))
        own_B = samples.columns.get("weight")
        return replace(
            samples, columns={**samples.columns, "weight": weight_B if own_B is None else weight_B * own_B}
        )  # fmt: skip


def _trainable(samples: Samples) -> Tensor:
    return samples.tokens.get("trainable", torch.ones(len(samples.completions.flat), dtype=torch.bool))


__all__ = ["Baseline", "ClassBalance", "ReturnAbove"]
