"""Theorems on distributions over the vocabulary: distillation losses, and the exact KL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from prefzoo.losses import create_loss
from prefzoo.losses.kl import exact as exact_estimator
from prefzoo.records import Distribution, masked_sum
from prefzoo.theory.base import Finding, theorem
from prefzoo.theory.divergences import visited
from prefzoo.theory.expectations import EXACT, bias, difference, kl, moved, nats
from prefzoo.theory.policies import EnumerablePolicy, Tabular

LOSSES = ("gkd", "forward_kl", "reverse_kl")


def token_loss(entry: str, logits_NV: Tensor, teacher_NV: Tensor, **options: float) -> Tensor:
    """The loss at N single tokens, (N,)."""
    mask = torch.ones(len(logits_NV), 1, dtype=torch.bool)
    record = Distribution(logits_BTV=logits_NV[:, None], teacher_logits_BTV=teacher_NV[:, None], mask_BT=mask)
    return create_loss(entry, **options)(record).loss[:, 0]


def some_logits(seed: int, size: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(20, size, generator=generator, dtype=torch.float64)


def entropy(probs: Tensor) -> Tensor:
    return -torch.special.xlogy(probs, probs).sum(-1)


def by_entropies(entry: str, logits: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The divergence from entropies and cross-entropies, another way than the loss computes it."""
    policy, target = logits.softmax(-1), teacher.softmax(-1)
    if entry == "forward_kl":
        return -(target * logits.log_softmax(-1)).sum(-1) - entropy(target)
    if entry == "reverse_kl":
        return -(policy * teacher.log_softmax(-1)).sum(-1) - entropy(policy)
    mixture = beta * target + (1 - beta) * policy
    return entropy(mixture) - beta * entropy(target) - (1 - beta) * entropy(policy)


@theorem(*LOSSES)
def divergence(entry: str) -> Iterator[Finding]:
    """Zero where policy and teacher are equal, and only there."""
    settings: list[Mapping[str, float]] = [{"beta": b} for b in (0.5, 0.1)] if entry == "gkd" else [{}]
    for options in settings:
        beta = options.get("beta", 0.5)
        words = f"β = {beta:g}: " if options else ""
        teacher, logits = some_logits(1), some_logits(2)
        value = token_loss(entry, logits, teacher, **options)
        measured = (value - by_entropies(entry, logits, teacher, beta)).abs().max().item()
        yield Finding(entry, "identity", f"{words}the divergence, computed from entropies", measured, EXACT)
        apart = (logits.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)
        least = (0.5 * beta * (1 - beta) if options else 0.5) * apart.square()
        measured = (least - value).clamp(min=0).max().item()
        claim = f"{words}0 only where both are equal: not below Pinsker's bound by their total variation"
        yield Finding(entry, "identity", claim, measured, 0.0)
        same = (teacher + 3).requires_grad_()
        value = token_loss(entry, same, teacher, **options)
        slope = torch.autograd.grad(value.sum(), same)[0].abs().max().item()
        yield Finding(entry, "identity", f"{words}0 at the teacher", value.detach().abs().max().item(), EXACT)
        yield Finding(entry, "optimum", f"{words}no gradient at the teacher", slope, EXACT)
        half = token_loss(entry, logits / 2, teacher / 2, **options)
        measured = (half - token_loss(entry, logits, teacher, temperature=2.0, **options)).abs().max().item()
        yield Finding(entry, "identity", f"{words}a temperature of 2 is logits of half the size", measured, EXACT)
    yield from of_completions(entry)


def of_completions(entry: str) -> Iterator[Finding]:
    """Summed over completions: whose gradient, by who wrote them."""
    policy = Tabular(vocabulary=3, length=3, seed=1)
    teacher = moved(policy, 0.7, seed=2)

    def gradient(writer: EnumerablePolicy) -> Tensor:
        record = Distribution(logits_BTV=policy.logits(), teacher_logits_BTV=teacher.logits(), mask_BT=policy.mask_RT)
        loss_R = masked_sum(create_loss(entry)(record).loss, policy.mask_RT)
        return policy.gradient((writer.log_probs().detach().exp() * loss_R).sum())

    if entry == "forward_kl":
        whole = policy.gradient(kl(teacher, policy))
        claim = "on the teacher's completions: the exact gradient of KL(P ‖ π) of whole completions"
        yield Finding(entry, "gradient", claim, difference(gradient(teacher), whole), EXACT)
        yield bias(entry, "on the policy's own completions, against it", gradient(policy), whole)
    if entry == "reverse_kl":
        claim = (
            "on the policy's own completions, against KL(π ‖ P) of whole completions (MiniLLM's other part left out)"
        )
        yield bias(entry, claim, gradient(policy), policy.gradient(kl(policy, teacher)))


@theorem("gkd")
def ends(entry: str) -> Iterator[Finding]:
    """Between the two KL."""
    teacher, logits = some_logits(1), some_logits(2)
    for beta, name, scale in ((1e-6, "forward_kl", 1e-6), (1 - 1e-6, "reverse_kl", 1e-6)):
        end = token_loss(name, logits, teacher)
        near = token_loss(entry, logits, teacher, beta=beta) / scale
        words = "β to 0: over β, it goes to KL(P ‖ π)" if beta < 0.5 else "β to 1: over 1 - β, it goes to KL(π ‖ P)"
        yield Finding(entry, "limit", words, ((near - end).abs() / end).max().item(), 1e-4)
        at_end = token_loss(entry, logits, teacher, beta=round(beta))
        yield Finding(entry, "identity", f"β = {beta:.0f} is {name}", (at_end - end).abs().max().item(), EXACT)
    one, other = (token_loss(entry, *sides, beta=0.5) for sides in ((logits, teacher), (teacher, logits)))
    yield Finding(entry, "identity", "β = 0.5 is symmetric", (one - other).abs().max().item(), EXACT)
    far = token_loss(entry, torch.tensor([[40.0, 0.0]]).double(), torch.tensor([[0.0, 40.0]]).double()).item()
    yield Finding(
        entry, "limit", "β = 0.5, nothing in common: log 2", abs(far - torch.tensor(2.0).double().log().item()), EXACT
    )


@theorem("forward_kl", "reverse_kl")
def restricted(entry: str) -> Iterator[Finding]:
    """A policy of one bump, a teacher of two: where the best bump lies."""
    place_V = torch.arange(13, dtype=torch.float64)
    modes = (3.0, 9.5)
    teacher = torch.stack([-0.5 * (place_V - m).square() + w for m, w in zip(modes, (0.3, 0.0), strict=True)])
    teacher = teacher.logsumexp(0)
    centre_N = torch.arange(1.0, 11.0, 0.005, dtype=torch.float64)
    logits_NV = -0.5 * (place_V - centre_N[:, None]).square()
    best = token_loss(entry, logits_NV, teacher.expand_as(logits_NV)).argmin()
    if entry == "forward_kl":
        claim = "a policy of one bump, a teacher of two: at the optimum the means agree, between the two (covers modes)"
        measured = ((logits_NV[best].softmax(-1) - teacher.softmax(-1)) @ place_V).abs().item()
    else:
        claim = "a policy of one bump, a teacher of two: the optimum is at the likelier one (seeks modes), distance"
        measured = (centre_N[best] - modes[0]).abs().item()
    yield Finding(entry, "optimum", claim, measured, 0.01)


@theorem("exact")
def exact_kl(entry: str) -> Iterator[Finding]:
    """The KL of the tokens' distributions, and of whole responses."""
    one, other = Tabular(vocabulary=4, seed=1), moved(Tabular(vocabulary=4, seed=1), 0.7, seed=2)
    for direction, left, right in (("reverse", one, other), ("forward", other, one)):
        words = "KL(π ‖ ref)" if direction == "reverse" else "direction='forward': KL(ref ‖ π)"
        value = exact_estimator(one.prefix_logits()[0], other.prefix_logits()[0], direction=direction)  # type: ignore[arg-type]
        yield Finding(entry, "identity", f"its value is {words}", abs(value.item() - nats(left, right)), EXACT)
        measured = difference(one.gradient(value), one.gradient(kl(left, right)))
        yield Finding(entry, "gradient", f"and its gradient; {words}", measured, EXACT)
    same = exact_estimator(one.prefix_logits()[0], one.prefix_logits()[0].detach())
    yield Finding(entry, "limit", "at π = ref, its gradient is 0", one.gradient(same).norm().item(), EXACT)
    policy = Tabular(vocabulary=3, length=3, seed=1)
    reference = moved(policy, 0.7, seed=2)
    whole = visited(policy, exact_estimator(policy.logits(), reference.logits()))
    measured = abs(whole.item() - nats(policy, reference))
    claim = "summed over the tokens of the policy's completions, its mean is KL(π ‖ ref) of whole responses"
    yield Finding(entry, "expectation", claim, measured, EXACT)
    claim = "so summed, against the gradient of KL(π ‖ ref) of whole responses (prefixes yet to come are not reached)"
    yield bias(entry, claim, policy.gradient(whole), policy.gradient(kl(policy, reference)))
