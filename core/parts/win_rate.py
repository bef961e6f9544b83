"""Win rates: feedback that says how often a completion is preferred, and what is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prefzoo.data.samples import Samples
from prefzoo.parts.credit import per_token, sequence_kl
from prefzoo.parts.roles import REFERENCE, REWARD, Roles
from prefzoo.registry import UsageError

Against = Literal["all", "beside"]


def opponents(samples: Samples, against: Against) -> Tensor:
    """Who meets whom, (B, B): all other completions of the prompt, or main ones and those of the samplers beside.

    Where nobody sampled beside the policy, as in an evaluation, all others.
    """
    prompt_B = torch.from_numpy(samples.prompt_B)
    meet_BB = (prompt_B[:, None] == prompt_B) & ~torch.eye(len(prompt_B), dtype=torch.bool)
    if against == "all" or "sampler" not in samples.columns:
        return meet_BB
    main_B = samples.columns["sampler"] == 0
    return meet_BB & (main_B[:, None] != main_B)


def mean_wins(win_BB: Tensor, meet_BB: Tensor) -> Tensor:
    """The mean over those that a completion meets, (B,), without what nobody said; NaN where that is nothing."""
    known_BB = meet_BB & ~win_BB.isnan()
    return torch.where(known_BB, win_BB, 0.0).sum(1) / torch.where(known_BB.any(1), known_BB.sum(1), torch.nan)


@dataclass(frozen=True)
class WinRate:
    """The probability that a completion is preferred to others of its prompt, on average over them.

        P_i = mean_j P(y_i beats y_j);   of rewards P(y_i beats y_j) = sigmoid((R_i - R_j) / tau)

    Args:
        tau: reward units that make one logit, where the run's reward scores completions one by one. A judge, which
            compares, says its probabilities itself.
        against: all other completions of the prompt, or main ones against those of the samplers beside them only.
        missing_eos_penalty: subtracted from the reward of completions cut at the limit; not for a judge.

    A completion is not compared with itself; the papers that do so count it as one half. NaN where nothing was said.
    The mean reward that a win rate was made of is logged as ``reward/absolute``: win rates against others of the policy
    are one half on average, however good it has become.
    """

    tau: float = 1.0
    against: Against = "all"
    missing_eos_penalty: float = 0.0

    needs = frozenset({REWARD})

    def __post_init__(self) -> None:
        if self.tau <= 0:
            raise UsageError(f"WinRate: tau is a number of reward units above 0, got {self.tau:g}.")

    def __call__(self, samples: Samples, roles: Roles) -> Tensor:
        meet_BB = opponents(samples, self.against)
        if not roles.compares:
            cut_B = samples.columns["finish"] == 1
            scores_B = roles.rewards(samples) - self.missing_eos_penalty * cut_B.float()
            main_B = samples.columns.get("sampler", torch.zeros(len(scores_B))) == 0
            roles.note("reward/absolute", scores_B[main_B & ~scores_B.isnan()])
            return mean_wins(torch.sigmoid((scores_B[:, None] - scores_B) / self.tau), meet_BB)
        if self.missing_eos_penalty:
            raise UsageError("missing_eos_penalty has no effect on a judge, which gives probabilities; leave it at 0.")
        if self.against == "all" or "sampler" not in samples.columns:
            return roles.rewards(samples)
        first, second = torch.nonzero(meet_BB.triu(), as_tuple=True)
        rates = roles.rewards(duels(samples, first.numpy(), second.numpy())).view(-1, 2)
        win_BB = torch.full(meet_BB.shape, torch.nan)
        win_BB[first, second], win_BB[second, first] = rates[:, 0], rates[:, 1]
        return mean_wins(win_BB, meet_BB)


def duels(samples: Samples, first: np.ndarray, second: np.ndarray) -> Samples:
    """Each of these pairs of completions as the two answers to a prompt of its own."""
    order = np.stack([first, second], 1).reshape(-1)
    prompts = samples.prompt_B[first]
    return Samples(
        "completions", samples.prompts.take(prompts), samples.completions.take(order),
        np.repeat(np.arange(len(first)), 2),
        columns={name: column[torch.from_numpy(order)] for name, column in samples.columns.items()},
        extra={name: [values[p] for p in prompts] for name, values in samples.extra.items()},
    )  # fmt: skip


@dataclass(frozen=True)
class Demonstrated:
    """What the data wrote is good and what a model wrote is not: 1 and 0. Nobody is asked, so an evaluation, where
    there are samples alone, has no scores."""

    needs = frozenset[str]()

    def __call__(self, samples: Samples, roles: Roles) -> Tensor:
        if "sampler" not in samples.columns:
            return torch.full((len(samples.completions),), torch.nan)
        return (samples.columns["sampler"] != 0).float()


@dataclass(frozen=True)
class WinMargin:
    """The win rate of a completion above one half, less what it costs in KL; only main completions are trained on.

        A_i = P_i - 1/2 - kl log pi(y_i)/ref(y_i)

    ``kl``: enters the reward of the whole completion, its log-ratio summed over tokens (k1, from the log-probabilities
    at sampling): the mean gradient is then that of E[P] - kl KL(pi || ref). 0: no reference is needed. A completion
    without a win rate has the advantage 0.
    """

    kl: float = 0.0

    gives = "advantages"
    smallest_group = 1

    def __post_init__(self) -> None:
        if self.kl < 0:
            raise UsageError(f"WinMargin: kl is a weight of at least 0, got {self.kl:g}.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({REFERENCE}) if self.kl else frozenset()

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        if "sampler" in samples.columns:
            main = torch.nonzero(samples.columns["sampler"] == 0)[:, 0]
            samples, scores_B = samples.take(main.numpy()), scores_B[main]
        advantage_B = scores_B - 0.5
        if self.kl:
            advantage_B = advantage_B - self.kl * sequence_kl(samples)
        return per_token(samples, advantage_B.nan_to_num())
