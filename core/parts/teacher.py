"""Credit from a teacher: what a sampled token does for the log-probability that the teacher gives to the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prefzoo.data.samples import Samples
from prefzoo.parts.roles import TEACHER
from prefzoo.registry import UsageError


@dataclass(frozen=True)
class TeacherReturn:
    """The reward of a token is how much likelier the teacher finds it; it is credited with those of what follows.

        r_t = log P(y_t) - log π_old(y_t);   A_t = Σ_{s>t} γ^{s-t-1} r_s  [/ number of tokens after t]

    Args:
        gamma: discount per token.
        own: the token's own r_t is credited too, A_t = Σ_{s≥t} γ^{s-t} r_s. Leave it out beside ``reverse_kl``, which
            holds that part exactly, for all tokens of the vocabulary.
        normalise: divide by the number of tokens that are summed, so that long completions are not punished.
        early: weight of being early: A_t is multiplied by 1 + early (1 - Σ_{s<t} |r_s| / Σ_s |r_s|), from 1 + early at
            the first token down to 1 where all disagreement with the teacher lies behind.

    Without ``normalise``, at γ = 1, the policy gradient of these advantages together with the gradient of
    ``reverse_kl``, both summed over completions, is the gradient of KL(π ‖ P) of whole completions.

    Source: Gu et al. (MiniLLM), arXiv:2306.08543, equations 3 (single step and long part) and 5 (length); ``early``:
    Xie et al. (IW-OPD), arXiv:2606.22600, algorithm 1.
    """

    gamma: float = 1.0
    own: bool = False
    normalise: bool = True
    early: float = 0.0

    gives = "advantages"
    needs: frozenset[str] = frozenset({TEACHER})
    smallest_group = 1

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise UsageError(f"TeacherReturn: gamma is from 0 to 1, got {self.gamma:g}.")
        if self.early < 0:
            raise UsageError(f"TeacherReturn: early is a weight of at least 0, got {self.early:g}.")

    def __call__(self, samples: Samples, scores_B: torch.Tensor) -> Samples:
        mask_BT = samples.mask_BT()
        gain_BT = samples.padded(samples.tokens["teacher_logps"] - samples.tokens["old_logps"])
        total_BT, count_BT = torch.zeros_like(gain_BT), torch.zeros_like(gain_BT)
        total_B, count_B = gain_BT.new_zeros(len(gain_BT)), gain_BT.new_zeros(len(gain_BT))
        for t in reversed(range(gain_BT.shape[1])):  # cells outside the mask are 0, and come last
            later_B, later_count_B = total_B, count_B
            total_B = gain_BT[:, t] + self.gamma * total_B
            count_B = count_B + mask_BT[:, t]
            total_BT[:, t] = total_B if self.own else later_B
            count_BT[:, t] = count_B if self.own else later_count_B
        if self.normalise:
            total_BT = total_BT / count_BT.clamp(min=1)
        if self.early:
            apart_BT = gain_BT.abs()
            before_BT = (apart_BT.cumsum(1) - apart_BT) / apart_BT.sum(1, keepdim=True).clamp(min=1e-8)
            total_BT = total_BT * (1 + self.early * (1 - before_BT))
        return samples.with_tokens(advantages=total_BT[mask_BT])
