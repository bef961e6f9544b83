"""Populations of preferences: every ordered pair of responses, with the probability that people would label it so.

Two responses are drawn from a behaviour μ, and a labeller prefers y to y' with probability p(y ≻ y'). The population
loss is the sum over all ordered pairs of 2 μ(y) μ(y') p(y ≻ y') loss(y, y'); nothing is sampled.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from prefzoo.losses import Loss
from prefzoo.records import Pairs
from prefzoo.theory.policies import EnumerablePolicy, Tabular, TinyTransformer


@dataclass(frozen=True)
class World:
    """A policy, the reference it started from, and the behaviour μ that draws the responses to be compared."""

    name: str
    policy: EnumerablePolicy
    reference: EnumerablePolicy
    behaviour_R: Tensor

    @cached_property
    def facts(self) -> Facts:
        """Of the policy as it is now."""
        return Facts.of(self.policy, self.reference)


@dataclass(frozen=True)
class Facts:
    """What closed forms are written in, without gradient, for every response.

    ``log_prob_R``: log π; ``ratio_R``: log π/ref; ``length_R``: tokens; ``drift_R``: Σ_t KL(ref ‖ π) over its tokens;
    ``ratio_RT``: log-ratios of the tokens, 0 outside the mask.
    """

    log_prob_R: Tensor
    ratio_R: Tensor
    length_R: Tensor
    drift_R: Tensor
    ratio_RT: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, policy: EnumerablePolicy, reference: EnumerablePolicy) -> Facts:
        return cls(
            policy.log_probs(),
            policy.log_probs() - reference.log_probs(),
            policy.mask_RT.sum(-1).double(),
            token_kl(policy, reference).sum(-1),
            policy.logps()[0] - reference.logps()[0],
        )

    @property
    def mean_ratio_R(self) -> Tensor:
        return self.ratio_R / self.length_R

    @property
    def mean_log_prob_R(self) -> Tensor:
        return self.log_prob_R / self.length_R


def worlds() -> Iterator[World]:
    """The three settings of every proof: responses of one token, strings from a table, strings from a transformer.

    The policy lies near its reference, as after some training, so that moderate preferences make it the optimum.
    """
    references: dict[str, EnumerablePolicy] = {
        "one token": Tabular(vocabulary=4, length=1, seed=1, spread=0.6),
        "strings": Tabular(vocabulary=3, length=3, seed=2, spread=0.6),
        "transformer": TinyTransformer(vocabulary=3, length=3, seed=3),
    }
    for name, reference in references.items():
        scale = 0.03 if name == "transformer" else 0.15  # its parameters are shared, so it moves farther
        yield world(name, moved(reference, scale, seed=4), reference)


def world(name: str, policy: EnumerablePolicy, reference: EnumerablePolicy) -> World:
    """With a behaviour that is neither of the two."""
    behaviour_R = (reference.log_probs().detach() / 2 + noise(len(policy.strings), seed=5, scale=0.3)).softmax(-1)
    return World(name, policy, reference.requires_grad_(False), behaviour_R)


def noise(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers of their own random stream."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def moved(policy: EnumerablePolicy, scale: float, seed: int) -> EnumerablePolicy:
    """A copy with noise added to all parameters."""
    copied = copy.deepcopy(policy)
    for i, parameter in enumerate(copied.parameters()):
        parameter.add_(noise(*parameter.shape, seed=seed + 100 * i, scale=scale))
    return copied


def differences(values_R: Tensor) -> Tensor:
    """Of row and column, (R, R)."""
    return values_R[:, None] - values_R


def token_kl(policy: EnumerablePolicy, reference: EnumerablePolicy) -> Tensor:
    """KL(ref ‖ π) of the next token, at every token of every response, in nats."""
    log_ref_RTV, log_RTV = reference.distributions(), policy.distributions()
    return torch.where(policy.mask_RT, (log_ref_RTV.exp() * (log_ref_RTV - log_RTV)).sum(-1), 0.0)


def pairs_of(
    policy: EnumerablePolicy,
    reference: EnumerablePolicy,
    chosen_B: Tensor | None = None,
    rejected_B: Tensor | None = None,
    **fields: Tensor,
) -> Pairs:
    """The record of these pairs of responses; all ordered pairs, R * R, row by row, where none are named.

    The gold completion of a pair is its chosen one; the step that a label is about is all but the first token.
    """
    count = len(policy.strings)
    if chosen_B is None or rejected_B is None:
        chosen_B = torch.arange(count).repeat_interleave(count)
        rejected_B = torch.arange(count).repeat(count)
    logps_RT, mask_RT = policy.logps()
    ref_RT = reference.logps()[0]
    kl_RT = token_kl(policy, reference)
    log_sq_RT = (2 * policy.distributions()).logsumexp(-1)
    sides: dict[str, Tensor] = {}
    for side, index_B in (("chosen", chosen_B), ("rejected", rejected_B)):
        sides |= {
            f"{side}_logps_BT": logps_RT[index_B],
            f"{side}_mask_BT": mask_RT[index_B],
            f"ref_{side}_logps_BT": ref_RT[index_B],
            f"{side}_kl_BT": kl_RT[index_B],
            f"{side}_log_sq_BT": log_sq_RT[index_B],
            f"{side}_step_BT": mask_RT[index_B] & (torch.arange(mask_RT.shape[1]) > 0),
        }
    gold = {"gold_logps_BT": sides["chosen_logps_BT"], "gold_mask_BT": sides["chosen_mask_BT"]}
    return Pairs(**(sides | gold | fields))


def labelled(behaviour_R: Tensor, win_RR: Tensor) -> Tensor:
    """Weight of every ordered pair (chosen, rejected), R * R, row by row; they sum to one."""
    return (2 * behaviour_R[:, None] * behaviour_R * win_RR).flatten()


def population_loss(
    loss: Loss, policy: EnumerablePolicy, reference: EnumerablePolicy, weight_B: Tensor, **fields: Tensor
) -> Tensor:
    """The loss over the population of all ordered pairs, a scalar; of token losses the sum over the tokens."""
    loss_B = loss(pairs_of(policy, reference, **fields)).loss
    return (weight_B * (loss_B.sum(-1) if loss_B.dim() == 2 else loss_B)).sum()


def minimise(parameters: Iterable[Tensor], objective: Callable[[], Tensor], steps: int = 200) -> None:
    """Move the parameters to a minimum of the objective, by L-BFGS with exact gradients."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=steps, max_eval=2 * steps, history_size=40,
        tolerance_grad=1e-11, tolerance_change=1e-16, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        optimizer.zero_grad()
        value = objective()
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    optimizer.step(closure)


def unfrozen(policy: EnumerablePolicy) -> EnumerablePolicy:
    """A copy that can be trained."""
    return copy.deepcopy(policy).requires_grad_(True)


@torch.no_grad()
def total_variation(policy: EnumerablePolicy, other: EnumerablePolicy) -> float:
    """Half the summed difference of the probabilities of the responses, from 0 to 1."""
    return float((policy.log_probs().exp() - other.log_probs().exp()).abs().sum() / 2)


def root(function: Callable[[float], float], low: float = -60.0, high: float = 60.0) -> float:
    """Where an increasing function is zero, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if function(middle) > 0 else (middle, high)
    return (low + high) / 2
