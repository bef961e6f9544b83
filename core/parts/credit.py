"""Credit: what does each sample or token deserve? Takes scored rollouts, gives what a loss is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefzoo.data.samples import Samples
from prefzoo.losses import advantages
from prefzoo.losses.kl import ValueEstimatorName, kl_estimator
from prefzoo.parts.critics import GAE
from prefzoo.parts.roles import REFERENCE
from prefzoo.registry import UsageError


@dataclass(frozen=True)
class GroupRelative:
    """A = (R - mean of its group) / (std + eps), with the std of the group or the batch; or the difference alone.

    ``scale``: ``"group"``, ``"batch"`` or ``"none"``, as in ``prefzoo.losses.advantages.group_relative``.
    """

    scale: advantages.Scale = "group"
    eps: float = 1e-4

    gives = "advantages"
    needs: frozenset[str] = frozenset()
    smallest_group = 2

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        group_B = torch.from_numpy(samples.prompt_B)
        return per_token(samples, advantages.group_relative(scores_B, group_B, scale=self.scale, eps=self.eps))


@dataclass(frozen=True)
class LeaveOneOut:
    """A = R - mean R of the *other* samples of the prompt (RLOO).

    ``kl``: R is the reward less so much of log pi(y)/ref(y), summed over tokens; 0: no reference is needed.
    ``reward_clip``: the reward is clipped to this range first. ``normalise``: advantages are standardised over all
    samples, (A - mean) / (std + 1e-4).
    """

    kl: float = 0.0
    normalise: bool = False
    reward_clip: tuple[float, float] | None = None

    gives = "advantages"
    smallest_group = 2

    def __post_init__(self) -> None:
        if self.kl < 0:
            raise UsageError(f"LeaveOneOut: kl is a weight of at least 0, got {self.kl:g}.")
        if self.reward_clip is not None and not self.reward_clip[0] < self.reward_clip[1]:
            raise UsageError(f"LeaveOneOut: reward_clip is a least and a largest reward, got {self.reward_clip}.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({REFERENCE}) if self.kl else frozenset()

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        rewards_B = scores_B if self.reward_clip is None else scores_B.clamp(*self.reward_clip)
        if self.kl:
            rewards_B = rewards_B - self.kl * sequence_kl(samples)
        group_B = torch.from_numpy(samples.prompt_B)
        advantage_B = advantages.leave_one_out(rewards_B, group_B)
        if self.normalise:
            known_B = ~rewards_B.isnan()
            known_P = torch.bincount(group_B, weights=known_B.float())
            compared_B = known_B & (known_P[group_B] > 1)  # the others have no advantage
            known = advantage_B[compared_B]
            scale = known.std() + 1e-4 if len(known) > 1 else 1.0
            advantage_B = torch.where(compared_B, (advantage_B - known.mean()) / scale, 0.0)
        return per_token(samples, advantage_B)


@dataclass(frozen=True)
class BestOfK:
    """The ``k`` best completions of each prompt, to be made likelier; ties go to the first."""

    k: int = 1

    gives = "completions"
    needs: frozenset[str] = frozenset()
    smallest_group = 2

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UsageError(f"best of k needs k >= 1, got {self.k}.")

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        winners = advantages.best_of_k(scores_B, torch.from_numpy(samples.prompt_B), k=self.k)
        return samples.take(winners.numpy())


def per_token(samples: Samples, advantage_B: Tensor) -> Samples:
    """Every token gets the advantage of its completion."""
    lengths_B = torch.from_numpy(samples.completions.lengths)
    return samples.with_tokens(advantages=advantage_B.repeat_interleave(lengths_B))


def sequence_kl(samples: Samples, estimator: ValueEstimatorName = "k1") -> Tensor:
    """Estimated KL to the reference of each sampled completion, (B,), in nats."""
    kl_C = kl_estimator(estimator)(samples.tokens["old_logps"], samples.tokens["ref_logps"])
    owner_C = torch.repeat_interleave(
        torch.arange(len(samples.completions)), torch.from_numpy(samples.completions.lengths)
    )
    return kl_C.new_zeros(len(samples.completions)).index_add(0, owner_C, kl_C)


__all__ = ["GAE", "BestOfK", "GroupRelative", "LeaveOneOut", "per_token", "sequence_kl"]
