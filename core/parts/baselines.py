"""Credit without a critic: a reward less a baseline, from the batch, the past, the group or the greedy completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from prefzoo.data.samples import Samples
from prefzoo.losses import advantages
from prefzoo.losses.kl import ValueEstimatorName
from prefzoo.parts.credit import per_token, sequence_kl
from prefzoo.parts.roles import REFERENCE
from prefzoo.registry import UsageError


class MovingMean:
    """The mean reward of the steps before; 0 before the first.

        value ← decay value + (1 - decay) mean reward of the step

    ``decay``: weight of the past; None: all steps alike, steps / (steps + 1). The first is taken as it is.

    >>> baseline = MovingMean(decay=0.9)
    >>> baseline.update(2.0, 32)
    >>> baseline.update(3.0, 32)
    >>> round(baseline.value, 6)
    2.1
    """

    follows = "reward"

    def __init__(self, decay: float | None = None) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise UsageError(f"MovingMean: decay is a share from 0 up to 1, got {decay:g}.")
        self.value, self.decay, self.steps = 0.0, decay, 0

    def update(self, mean: float, n: int) -> None:
        """Add the mean reward of a step; one without any known reward changes nothing."""
        if not n:
            return
        past = self.steps / (self.steps + 1) if self.decay is None or not self.steps else self.decay
        self.value, self.steps = past * self.value + (1 - past) * mean, self.steps + 1

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "steps": float(self.steps)}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.value, self.steps = float(state["value"]), int(state["steps"])


@dataclass(frozen=True)
class Baseline:
    """A = R - b, with one baseline for all prompts: REINFORCE.

    ``of``: None, b = 0; ``"batch"``, the mean of the other completions of the batch, whatever their prompts; or a
    :class:`MovingMean` of the steps before, to be given under ``controllers`` too. None of them depends on the
    completion, so the gradient stays unbiased. ``kl``: R is the reward less so much of log pi(y)/ref(y).
    """

    of: Literal["batch"] | MovingMean | None = None
    kl: float = 0.0

    gives = "advantages"

    def __post_init__(self) -> None:
        check_kl("Baseline", self.kl)
        if isinstance(self.of, str) and self.of != "batch":
            raise UsageError(f"Baseline: of is 'batch', a MovingMean or None, got {self.of!r}.")

    @property
    def smallest_group(self) -> int:
        return 1

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({REFERENCE}) if self.kl else frozenset()

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        rewards_B = penalised(samples, scores_B, self.kl)
        if self.of == "batch":
            return per_token(samples, advantages.leave_one_out(rewards_B, torch.zeros_like(rewards_B)))
        baseline = self.of.value if isinstance(self.of, MovingMean) else 0.0
        return per_token(samples, (rewards_B - baseline).nan_to_num())


@dataclass(frozen=True)
class Greedy:
    """A = R - R of the prompt's greedy completion (ReMax), which is a sample beside the others and is not trained on.

    The source must sample it: ``Rollouts(..., beside=(Sampler(temperature=0.0),))``. ``kl``: R is the reward less so
    much of log pi(y)/ref(y), but not that of the greedy completion, which is a baseline either way.
    """

    kl: float = 0.0

    gives = "advantages"
    smallest_group = 1

    def __post_init__(self) -> None:
        check_kl("Greedy", self.kl)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({REFERENCE}) if self.kl else frozenset()

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        if "sampler" not in samples.columns:
            raise UsageError("Greedy: nobody samples the greedy completion; give beside=(Sampler(temperature=0.0),).")
        prompt_B = torch.from_numpy(samples.prompt_B)
        greedy_B = samples.columns["sampler"] > 0
        greedy_P = scores_B.new_full((len(samples.prompts),), torch.nan)  # where a keep has dropped it
        greedy_P[prompt_B[greedy_B]] = scores_B[greedy_B]
        advantage_B = advantages.remax(penalised(samples, scores_B, self.kl), greedy_P[prompt_B])
        return per_token(samples, advantage_B).take(torch.nonzero(~greedy_B)[:, 0].numpy())


@dataclass(frozen=True)
class BatchNormalised:
    """The return of every token, a KL penalty inside, standardised over the tokens of the batch: REINFORCE++.

    ``group``: the mean of its prompt's completions is taken from each score first (REINFORCE++-baseline). ``kl``:
    weight of the penalty, reward units per nat; 0: no reference. ``gamma``: discount per token.
    """

    group: bool = False
    kl: float = 0.01
    gamma: float = 1.0
    estimator: ValueEstimatorName = "k1"

    gives = "advantages"

    def __post_init__(self) -> None:
        check_kl("BatchNormalised", self.kl)

    @property
    def smallest_group(self) -> int:
        return 2 if self.group else 1

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({REFERENCE}) if self.kl else frozenset()

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        mask_BT = samples.mask_BT()
        old_BT = samples.padded(samples.tokens["old_logps"])
        ref_BT = samples.padded(samples.tokens["ref_logps"]) if self.kl else old_BT
        options = {"kl": self.kl, "gamma": self.gamma, "estimator": self.estimator}
        if self.group:
            group_B = torch.from_numpy(samples.prompt_B)
            found_BT = advantages.reinforce_pp_baseline(scores_B, group_B, old_BT, ref_BT, mask_BT, **options)
        else:
            found_BT = advantages.reinforce_pp(scores_B, old_BT, ref_BT, mask_BT, **options)
        return samples.with_tokens(advantages=found_BT[mask_BT])


@dataclass(frozen=True)
class LengthWeighted:
    """A = R - the mean of the group's rewards weighted by their lengths (OPO)."""

    gives = "advantages"
    needs: frozenset[str] = frozenset()
    smallest_group = 2

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        length_B = torch.from_numpy(samples.completions.lengths)
        return per_token(samples, advantages.opo(scores_B, torch.from_numpy(samples.prompt_B), length_B))


@dataclass(frozen=True)
class Decoupled:
    """Each of several rewards is standardised within its group, then they are added (GDPO). Needs ``Objectives``."""

    weights: Sequence[float] | None = None
    eps: float = 1e-4

    gives = "advantages"
    needs: frozenset[str] = frozenset()
    smallest_group = 2

    def __call__(self, samples: Samples, scores_BK: Tensor) -> Samples:
        if scores_BK.dim() == 1:
            raise UsageError("Decoupled: there is only one score per completion; give feedback=Objectives(count).")
        group_B = torch.from_numpy(samples.prompt_B)
        return per_token(samples, advantages.gdpo(scores_BK, group_B, weights=self.weights, eps=self.eps))


def penalised(samples: Samples, scores_B: Tensor, kl: float) -> Tensor:
    """The reward less the estimated KL of the completion, in reward units."""
    return scores_B - kl * sequence_kl(samples) if kl else scores_B


def check_kl(part: str, kl: float) -> None:
    if kl < 0:
        raise UsageError(f"{part}: kl is a weight of at least 0, got {kl:g}.")
