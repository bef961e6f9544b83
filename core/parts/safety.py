"""Constrained reinforcement learning: a reward to be raised, a cost to be kept within a budget, and their exchange."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from prefzoo.data.samples import Samples
from prefzoo.losses import advantages
from prefzoo.parts.controllers import AdaptiveKL, FixedKL
from prefzoo.parts.critics import GAE
from prefzoo.parts.roles import of_critic
from prefzoo.registry import UsageError


class Multiplier:
    """A Lagrange multiplier: what one unit of cost is worth in reward; it rises while the mean cost is over its budget.

        ln value ← min(ln value + rate value (mean cost - budget), ln largest)

    the step of gradient ascent on value (mean cost - budget) in ln value, which keeps it positive.

    Args:
        init: the first value.
        budget: the largest mean cost, in units of cost; the paper's -d.
        rate: of the ascent, per unit of cost and of the value.
        largest: bound of the value; None: none.
        objective: the place of the cost among the run's rewards.

    A step without any known cost changes nothing.

    Source: Dai et al., Safe RLHF, arXiv:2310.12773, equation 31; the bound: the authors' code.

    >>> multiplier = Multiplier(1.0, budget=0.0, rate=0.1)
    >>> multiplier.update(2.0, 64)
    >>> round(multiplier.value, 4)
    1.2214
    """

    def __init__(
        self, init: float = 1.0, *, budget: float = 0.0, rate: float = 0.1, largest: float | None = 5.0,
        objective: int = 1,
    ) -> None:  # fmt: skip
        if init <= 0 or rate < 0 or (largest is not None and largest < init):
            raise UsageError(
                f"Multiplier: the first value must be above 0 and at most the largest, and its rate at least 0; got "
                f"{init:g}, {largest} and {rate:g}."
            )
        self.value, self.budget, self.rate, self.largest = init, budget, rate, largest
        self.follows = f"objective:{objective}"

    def update(self, cost: float, n: int) -> None:
        """Move the value after a batch of n completions of this mean cost."""
        if not n:
            return
        # exp of more is no number for a multiplier, and of less it is 0, from where no step leads back.
        step = max(-50.0, min(self.rate * self.value * (cost - self.budget), 50.0))
        self.value = self.value * math.exp(step)
        if self.largest is not None:
            self.value = min(self.value, self.largest)

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.value = float(state["value"])


@dataclass(frozen=True)
class Lagrangian:
    """Advantages of a reward less those of a cost, each with a critic of its own, weighed by a multiplier λ.

        A = (A_r - λ A_c) / (1 + λ)

    A_r is :class:`GAE`'s of ``r_t - kl k_t``, A_c that of ``c_t + kl k_t``: so the KL penalty has the weight ``kl``
    whatever λ is. The critic of the cost learns the *negative* of it, as a reward: one sign for both. Scores are
    (B, 2), reward and cost; a completion that lacks one of them gives no signal.

    Args:
        multiplier: λ, a controller of the stage.
        reward, cost: GAE of each; their ``kl`` is one object, a controller too; neither whitens by itself.
        whiten: standardise A over the tokens of the batch.
    """

    multiplier: Multiplier
    reward: GAE = field(default_factory=lambda: GAE(whiten=False))
    cost: GAE = field(default_factory=lambda: GAE(whiten=False, critic="cost"))
    whiten: bool = False

    gives = "advantages"
    smallest_group = 1

    def __post_init__(self) -> None:
        if self.reward.critic == self.cost.critic:
            raise UsageError("Lagrangian: reward and cost need a critic each; give the cost's GAE critic='cost'.")

    @property
    def kl(self) -> FixedKL | AdaptiveKL | None:
        return self.reward.kl

    @property
    def needs(self) -> frozenset[str]:
        return self.reward.needs | self.cost.needs

    def __call__(self, samples: Samples, scores_BK: Tensor) -> Samples:
        if scores_BK.dim() != 2 or scores_BK.shape[1] != 2:
            raise UsageError("Lagrangian: expected two scores per completion, reward and cost; give Objectives(2).")
        mask_BT, value = samples.mask_BT(), self.multiplier.value
        gain_BT, gains_BT, known_BT = self.reward.estimate(samples, scores_BK[:, 0])
        spared_BT, savings_BT, priced_BT = self.cost.estimate(samples, -scores_BK[:, 1])
        known_BT = known_BT & priced_BT
        advantages_BT = (gain_BT + value * spared_BT) / (1 + value)
        if self.whiten:
            advantages_BT = advantages.whiten(advantages_BT, known_BT)
        known = known_BT[mask_BT]
        returns = {
            of_critic("returns", self.reward.critic): gains_BT[mask_BT],
            of_critic("returns", self.cost.critic): savings_BT[mask_BT],
        }
        trainable = samples.tokens.get("trainable", known) & known
        return samples.with_tokens(advantages=advantages_BT[mask_BT], trainable=trainable, **returns)
