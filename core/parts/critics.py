"""Credit with a critic: how much better than expected was each token?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from prefzoo.data.samples import Samples
from prefzoo.losses import advantages
from prefzoo.losses.kl import ValueEstimatorName
from prefzoo.parts.controllers import AdaptiveKL, FixedKL
from prefzoo.parts.roles import CRITIC, REFERENCE, of_critic
from prefzoo.registry import UsageError


class RunningScale:
    """The standard deviation of all rewards of a run so far, those of this batch included.

    Its numbers belong to the run: give it under ``controllers`` too, so that checkpoints hold it.

    >>> scale = RunningScale()
    >>> scale.see(torch.tensor([1.0, 3.0]))
    >>> scale.see(torch.tensor([5.0, 7.0, float("nan")]))
    >>> scale.mean, round(scale.value, 4)
    (4.0, 2.582)
    """

    follows = "reward"

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    @property
    def value(self) -> float:
        """The sample standard deviation; 1 while there is none."""
        deviation = math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return deviation or 1.0

    def see(self, rewards_B: Tensor) -> None:
        """Add a batch; missing rewards do not count."""
        known = rewards_B[~rewards_B.isnan()].double()
        if not len(known):
            return
        mean, size = float(known.mean()), float(len(known))
        total = self.count + size
        shift = mean - self.mean
        self.squares += float((known - mean).square().sum()) + shift * shift * self.count * size / total
        self.mean += shift * size / total
        self.count = total

    def update(self, mean: float, n: int) -> None:
        """Nothing to do: a mean does not tell a deviation, so the credit shows it the rewards."""

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.count, self.mean, self.squares = (float(state[k]) for k in ("count", "mean", "squares"))


@dataclass(frozen=True)
class MacroActions:
    """Tokens that are chosen together: several neighbouring ones are one action, with one value and one advantage.

    ``by``: ``"ngram"``, ``length`` tokens each (the last of a completion may have fewer); ``"perplexity"``: a new one
    begins at every token that the reference finds less likely than the one before it. ``value``: of an action, the
    ``"mean"`` of its tokens' or that of its ``"first"`` one.

    Source: Chai et al. (MA-RLHF), arXiv:2410.02743, section 3.2; its parser and its random lengths are not here.
    """

    by: Literal["ngram", "perplexity"] = "ngram"
    length: int = 5
    value: Literal["mean", "first"] = "mean"

    def __post_init__(self) -> None:
        if self.by not in ("ngram", "perplexity") or self.value not in ("mean", "first"):
            raise UsageError(f"MacroActions: by is 'ngram' or 'perplexity', value 'mean' or 'first'; got {self}.")
        if self.length < 1:
            raise UsageError(f"MacroActions: length is a number of tokens of at least 1, got {self.length}.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({REFERENCE}) if self.by == "perplexity" else frozenset()

    def spans(self, samples: Samples) -> Tensor:
        """The number of each token's action, (B, T)."""
        mask_BT = samples.mask_BT()
        if self.by == "ngram":
            return (mask_BT.cumsum(-1) - 1) // self.length
        ref_BT = samples.padded(samples.tokens["ref_logps"])
        rises_BT = torch.zeros_like(mask_BT)
        rises_BT[:, 1:] = ref_BT[:, 1:] < ref_BT[:, :-1]
        return (rises_BT & mask_BT).cumsum(-1)


@dataclass(frozen=True)
class GAE:
    """Generalised advantage estimation with a critic, a KL penalty in the reward, and whitened advantages.

    r_t = - kl * k(pi, ref)_t + [t is the last token] score;  A_t = sum_l (gamma * lam)^l delta_{t+l}

    Args:
        lam, gamma: of the sum.
        kl: weight of the penalty, a controller; None: no penalty, and no reference.
        estimator: of the KL.
        whiten: standardise advantages over all tokens.
        critic: the name of the critic, where there are several (role ``critic:NAME``).
        actions: what an action is; None: a token.
        scale: rewards are divided by this standard deviation; None: by nothing.
        centre: the mean of the run's rewards is subtracted before.
        reward_clip, advantage_clip: neither goes beyond ± this, after scaling and whitening; None: no bound.
    """

    lam: float = 0.95
    gamma: float = 1.0
    kl: FixedKL | AdaptiveKL | None = field(default_factory=FixedKL)
    estimator: ValueEstimatorName = "k1"
    whiten: bool = True
    critic: str = ""
    actions: MacroActions | None = None
    scale: RunningScale | None = None
    centre: bool = False
    reward_clip: float | None = None
    advantage_clip: float | None = None

    gives = "advantages"
    smallest_group = 1

    def __post_init__(self) -> None:
        if self.centre and self.scale is None:
            raise UsageError("GAE: centre has no effect without scale=RunningScale(), which knows the mean.")
        for name in ("reward_clip", "advantage_clip"):
            bound = getattr(self, name)
            if bound is not None and bound <= 0:
                raise UsageError(f"GAE: {name} is a bound above 0, got {bound:g}.")

    @property
    def needs(self) -> frozenset[str]:
        referred = frozenset({REFERENCE}) if self.kl is not None else frozenset()
        own = frozenset() if self.actions is None else self.actions.needs
        return frozenset({of_critic(CRITIC, self.critic)}) | referred | own

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        mask_BT = samples.mask_BT()
        advantages_BT, returns_BT, counted_BT = self.estimate(samples, scores_B)
        if self.whiten:
            advantages_BT = advantages.whiten(advantages_BT, counted_BT)
        if self.advantage_clip is not None:
            advantages_BT = advantages_BT.clamp(-self.advantage_clip, self.advantage_clip)
        known = counted_BT[mask_BT]
        trainable = samples.tokens.get("trainable", torch.ones_like(known)) & known
        returns = {of_critic("returns", self.critic): returns_BT[mask_BT]}
        return samples.with_tokens(advantages=advantages_BT[mask_BT], trainable=trainable, **returns)

    def estimate(self, samples: Samples, scores_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Advantages as they are and returns, (B, T) each, and the tokens that count: a missing reward gives no signal,
        so none of its row do."""
        mask_BT = samples.mask_BT()
        old_BT = samples.padded(samples.tokens["old_logps"])
        values_BT = samples.padded(samples.tokens[of_critic("values", self.critic)])
        known_B = ~scores_B.isnan()
        kl = 0.0 if self.kl is None else self.kl.value
        ref_BT = old_BT if self.kl is None else samples.padded(samples.tokens["ref_logps"])
        rewards_BT = advantages.shaped_rewards(
            self._rewards(scores_B).nan_to_num(), old_BT, ref_BT, mask_BT, kl=kl, estimator=self.estimator
        )
        spans = {}
        if self.actions is not None:
            spans = {"span_BT": self.actions.spans(samples), "span_value": self.actions.value}
        advantages_BT, returns_BT = advantages.gae(
            rewards_BT, values_BT, mask_BT, gamma=self.gamma, lam=self.lam, **spans
        )
        return advantages_BT, returns_BT, mask_BT & known_B[:, None]

    def _rewards(self, scores_B: Tensor) -> Tensor:
        if self.scale is not None:
            self.scale.see(scores_B)
            scores_B = (scores_B - (self.scale.mean if self.centre else 0.0)) / self.scale.value
        return scores_B if self.reward_clip is None else scores_B.clamp(-self.reward_clip, self.reward_clip)
