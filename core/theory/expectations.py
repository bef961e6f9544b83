"""Expectations of estimators: their mean over every batch that could have been drawn, each weighted by its probability.

The policies are those of ``prefzoo.theory.policies``; legend as there, with **B** rows: the responses of all batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prefzoo.records import LossOut, PolicyGradient, masked_mean, masked_sum
from prefzoo.theory.base import Finding
from prefzoo.theory.policies import EnumerablePolicy

EXACT = 1e-9  # what float64 leaves of two ways to compute the same, relative to its size


@dataclass(frozen=True)
class Draws:
    """Every batch of ``size`` responses that a policy can draw, one after another.

    ``index_B``: which response each row is; ``batch_B``: the batch it stands in; ``weight_B``: the probability of that
    batch, without gradient.
    """

    size: int
    index_B: Tensor
    batch_B: Tensor
    weight_B: Tensor

    def batches(self) -> list[Tensor]:
        """The rows of each batch."""
        return list(torch.arange(len(self.index_B)).view(-1, self.size))


def draws(sampler: EnumerablePolicy, size: int = 1) -> Draws:
    """All batches of ``size`` independent responses of one prompt.

    >>> from prefzoo.theory.policies import Tabular
    >>> drawn = draws(Tabular(vocabulary=2, length=1), size=2)
    >>> drawn.index_B.tolist(), round(float(drawn.weight_B[:: drawn.size].sum()), 12)
    ([0, 0, 0, 1, 1, 0, 1, 1], 1.0)
    """
    log_probs_R = sampler.log_probs().detach()
    index = torch.cartesian_prod(*[torch.arange(len(log_probs_R))] * size).view(-1, size)
    weight = log_probs_R[index].sum(-1).exp()
    batch_B = torch.arange(len(index)).repeat_interleave(size)
    return Draws(size, index.flatten(), batch_B, weight.repeat_interleave(size))


def record_of(
    policy: EnumerablePolicy,
    index_B: Tensor,
    advantages: Tensor,
    *,
    old: EnumerablePolicy | None = None,
    reference: EnumerablePolicy | None = None,
    sampling: EnumerablePolicy | None = None,
    entropy_floor: float | None = None,
) -> PolicyGradient:
    """The record of these responses. ``advantages``: per row or per token; ``old``: the policy itself where absent."""
    logps_RT, mask_RT = policy.logps()
    advantages_BT = advantages if advantages.dim() == 2 else advantages[:, None].expand(-1, mask_RT.shape[1])
    logits = policy.distributions()

    def frozen(model: EnumerablePolicy | None) -> Tensor | None:
        return None if model is None else model.logps()[0].detach()[index_B]

    return PolicyGradient(
        logps_BT=logps_RT[index_B],
        mask_BT=mask_RT[index_B],
        old_logps_BT=(old or policy).logps()[0].detach()[index_B],
        advantages_BT=advantages_BT,
        ref_logps_BT=frozen(reference),
        sampling_logps_BT=frozen(sampling),
        entropy_BT=-(logits.exp() * logits).sum(-1)[index_B],
        entropy_floor=None if entropy_floor is None else torch.tensor(entropy_floor, dtype=torch.float64),
    )


def expected_loss(
    loss: Callable[[PolicyGradient], LossOut], record: PolicyGradient, drawn: Draws, unit: str = "row_sum"
) -> Tensor:
    """The mean over all batches of the loss of a batch, averaged over its rows or tokens as ``unit`` says."""
    out = loss(record).loss
    if unit == "token":
        index = drawn.batch_B
        tokens_B = record.mask_BT.sum(-1).to(out.dtype)
        loss_B = masked_sum(out, record.mask_BT) / torch.zeros_like(tokens_B).index_add(0, index, tokens_B)[index]
    elif out.dim() == 1:
        loss_B = out / drawn.size
    else:
        loss_B = {"row": masked_mean, "row_sum": masked_sum}[unit](out, record.mask_BT) / drawn.size
    return (drawn.weight_B * loss_B).sum()


def objective_gradient(policy: EnumerablePolicy, rewards_R: Tensor) -> Tensor:
    """The exact gradient of Σ π(y) R(y): the sum over all responses, differentiated."""
    return policy.gradient((policy.log_probs().exp() * rewards_R).sum())


def some_rewards(policy: EnumerablePolicy, seed: int = 5) -> Tensor:
    """A reward for every response, (R,), all different, without relation to the policy."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(policy.strings), generator=generator, dtype=torch.float64)


def moved(policy: EnumerablePolicy, step: float = 0.3, seed: int = 11) -> EnumerablePolicy:
    """A policy some way off: normal noise of this standard deviation on every parameter."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(step * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return other


def kl(left: EnumerablePolicy, right: EnumerablePolicy) -> Tensor:
    """KL(left ‖ right) over whole responses, in nats."""
    left_R = left.log_probs()
    return (left_R.exp() * (left_R - right.log_probs())).sum()


def nats(left: EnumerablePolicy, right: EnumerablePolicy) -> float:
    return kl(left, right).item()


def zeros(drawn: Draws) -> Tensor:
    """No advantage for anything, (B,)."""
    return torch.zeros(len(drawn.index_B), dtype=torch.float64)


def difference(found: Tensor, exact: Tensor) -> float:
    """Size of the difference relative to that of the exact one.

    >>> difference(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]))
    0.5
    """
    return float((found - exact).norm() / exact.norm())


def cosine(found: Tensor, exact: Tensor) -> float:
    return float(found @ exact / (found.norm() * exact.norm()))


def alike(found: Tensor, exact: Tensor) -> Tensor:
    """Scaled to the size of the exact one, for estimators whose scale is not that of the rewards."""
    return found * (exact.norm() / found.norm())


def bias(entry: str, claim: str, found: Tensor, exact: Tensor) -> Finding:
    """What an estimator is off by: the relative size of the difference; the cosine is told in the claim."""
    told = f"{claim}: relative bias of the gradient (cosine with the exact one {cosine(found, exact):.3f})"
    return Finding(entry, "bias", told, difference(found, exact), None)
