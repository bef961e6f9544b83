"""AI feedback: what a judge says of completions, its labels as targets, and rules beside a reward."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from prefzoo.data.samples import Samples
from prefzoo.feedback import RewardSource, Rules, SumReward
from prefzoo.parts.feedback import Reward
from prefzoo.parts.pairs import AllPairs, Matches, TopAgainstBottom
from prefzoo.parts.roles import Roles
from prefzoo.registry import UsageError


@dataclass(frozen=True)
class Judged(Reward):
    """The run's ``reward``, which must be a judge: how often, on average, a completion beats others of its prompt."""

    def check(self, source: RewardSource) -> None:
        """Refuse what scores completions one by one."""
        if self.missing_eos_penalty:
            raise UsageError("missing_eos_penalty has no effect on a judge, which gives probabilities; leave it at 0.")
        if not source.compares:
            raise UsageError(
                f"reward {source.name!r} scores completions one by one, and AI feedback compares them: give a judge, "
                "reward='judge(model=FOLDER)', or prefzoo.feedback.Judge(f) of a function "
                "f(prompts, first, second) -> list of probabilities. An algorithm for this reward is 'online_dpo' "
                "or 'ppo'."
            )

    def __call__(self, samples: Samples, roles: Roles) -> Tensor:
        return roles.rewards(samples)


@dataclass(frozen=True)
class AILabels:
    """Pairs whose label is the judge's probability that the chosen completion is better.

    Args:
        pairs: the credit that makes pairs of win rates.
        soft: the column ``probability`` is the judge's; False: the better one is chosen, and that is all.
        largest: no probability is above it; Bai et al. take 0.6 where their judge reasons first and is too sure of
            itself afterwards.

    The pairs have no column ``margin``: a difference of win rates is no margin of rewards.

    Source: Bai et al., Constitutional AI, arXiv:2212.08073, section 4.1.
    """

    pairs: TopAgainstBottom | AllPairs | Matches
    soft: bool = True
    largest: float = 1.0

    gives = "pairs"
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        if not 0.5 < self.largest <= 1:
            raise UsageError(f"AILabels: largest is a probability above 0.5, up to 1; got {self.largest:g}.")
        if self.largest < 1 and not self.soft:
            raise UsageError("AILabels: largest has no effect on hard labels; leave it at 1.")

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({"probability"}) if self.soft else frozenset()

    @property
    def smallest_group(self) -> int:
        return self.pairs.smallest_group

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        paired = self.pairs(samples, scores_B)
        given = {"probability": paired.row_columns["probability"].clamp(max=self.largest)} if self.soft else {}
        return replace(paired, row_columns=given)

    def measure(self, before: Samples, scores_B: Tensor, after: Samples) -> dict[str, Tensor]:
        """What the pairs say of prompts that were left out; and how sure the judge was of its labels."""
        said = {"judge/confidence": after.row_columns["probability"]} if self.soft else {}
        return {**self.pairs.measure(before, scores_B, after), **said}


@dataclass(frozen=True)
class RuleRewards(Reward):
    """A reward from preferences plus one from rules; both are logged.

        R = R_1 + ... + R_{n-1} + weight R_rules        reward=[R_1, ..., rules(...)], the rules last

    A completion about which one of them says nothing has no reward, so that no reward is on another scale than the
    others. ``missing_eos_penalty`` is subtracted where a completion was cut at the limit.
    """

    weight: float = 1.0

    def check(self, source: RewardSource) -> None:
        """Refuse a reward without rules."""
        parts = list(source.parts.values()) if isinstance(source, SumReward) else [source]
        if len(parts) < 2 or not isinstance(parts[-1], Rules) or any(isinstance(p, Rules) for p in parts[:-1]):
            raise UsageError(
                "rule-based rewards are added to a reward from preferences: give both, the rules last, such as "
                "reward=['runs/rm/final', 'rules(my_rules.yaml)']; for rules alone take 'ppo' or 'grpo'."
            )
        if any(part.compares for part in parts):
            raise UsageError("rule-based rewards: a judge gives win rates and no rewards; give a reward model.")

    def __call__(self, samples: Samples, roles: Roles) -> Tensor:
        scores_BK = roles.objectives(samples)
        cut_B = samples.columns["finish"] == 1
        total_B = scores_BK[:, :-1].sum(1) + self.weight * scores_BK[:, -1]
        return total_B - self.missing_eos_penalty * cut_B.float()
