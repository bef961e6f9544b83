"""Credit by the optimal value: what the best policy near the reference would be worth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefzoo.data.samples import Samples
from prefzoo.parts.credit import per_token
from prefzoo.parts.roles import REFERENCE
from prefzoo.registry import UsageError


@dataclass(frozen=True)
class OptimalAdvantage:
    """A = R - V*, V* = β log mean exp(R' / β) over the reference's completions of the same prompt.

    The reference's are those of the samplers beside the policy (``Rollouts(beside=(Sampler("reference", count=N),))``);
    they are compared with and not trained on. V* is the value of the policy ref exp(R / β), estimated from N samples:
    below it by chance, and never above the best of them. A prompt without any reward of the reference's has no
    advantage (NaN rows are left out).

    Args:
        temperature: β, in reward units.

    Source: Brantley et al. (A*-PO), arXiv:2505.20686, section 3.
    """

    temperature: float = 0.5

    gives = "advantages"
    needs: frozenset[str] = frozenset({REFERENCE})
    smallest_group = 2

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"OptimalAdvantage: temperature is above 0, got {self.temperature:g}.")

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        main_B, known_B = samples.columns["sampler"] == 0, ~scores_B.isnan()
        prompt_B, prompts = torch.from_numpy(samples.prompt_B), len(samples.prompts)
        asked_B = ~main_B & known_B
        scaled = scores_B[asked_B].double() / self.temperature
        highest_P = torch.full((prompts,), -torch.inf, dtype=torch.float64)
        highest_P = highest_P.scatter_reduce(0, prompt_B[asked_B], scaled, "amax")
        count_P = torch.bincount(prompt_B[asked_B], minlength=prompts)
        shifted = (scaled - highest_P[prompt_B[asked_B]]).exp()
        total_P = torch.zeros(prompts, dtype=torch.float64).index_add(0, prompt_B[asked_B], shifted)
        value_P = self.temperature * (highest_P + (total_P / count_P).log())
        rows = torch.nonzero(main_B & known_B & (count_P[prompt_B] > 0))[:, 0]
        advantage_B = (scores_B.double() - value_P[prompt_B]).to(scores_B.dtype)[rows]
        return per_token(samples.take(rows.numpy()), advantage_B)
