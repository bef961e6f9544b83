"""Unpaired losses: responses y are drawn from a behaviour μ and called desirable with probability d(y).

The population loss is Σ_y μ(y) [d(y) loss(y, desirable) + (1 - d(y)) loss(y, undesirable)].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prefzoo.losses import Loss, create_loss
from prefzoo.records import Unpaired
from prefzoo.theory.base import Finding, theorem
from prefzoo.theory.policies import EnumerablePolicy
from prefzoo.theory.populations import World, minimise, noise, total_variation, unfrozen, worlds

BETA = 0.5
EXACT = 1e-9
SATURATED = ("kto", "apo_zero_unpaired")


def singles_of(policy: EnumerablePolicy, reference: EnumerablePolicy, **scalars: float) -> Unpaired:
    """All responses called desirable, then all called undesirable: 2 R rows."""
    logps_RT, mask_RT = policy.logps()
    count = len(logps_RT)
    return Unpaired(
        logps_BT=logps_RT.repeat(2, 1),
        ref_logps_BT=reference.logps()[0].repeat(2, 1),
        mask_BT=mask_RT.repeat(2, 1),
        desirable_B=torch.arange(2 * count) < count,
        **{k: torch.tensor(v, dtype=torch.float64) for k, v in scalars.items()},
    )


def weights_of(behaviour_R: Tensor, desirable_R: Tensor) -> Tensor:
    return torch.cat([behaviour_R * desirable_R, behaviour_R * (1 - desirable_R)])


def population_loss(loss: Loss, world: World, policy: EnumerablePolicy, weight_B: Tensor, **scalars: float) -> Tensor:
    return (weight_B * loss(singles_of(policy, world.reference, **scalars)).loss).sum()


@theorem("bco")
def classifier_optimum(entry: str) -> Iterator[Finding]:
    """The optimum of the binary classifier: its shifted reward is the logit of P(desirable), whatever the behaviour."""
    loss, delta = create_loss(entry, beta=BETA), 0.3
    for world in worlds():
        weight_B = weights_of(world.behaviour_R, torch.sigmoid(BETA * (world.facts.ratio_R - delta)))
        at, start = (
            float(p.gradient(population_loss(loss, world, p, weight_B, delta=delta)).abs().max())
            for p in (world.policy, unfrozen(world.reference))
        )
        claim = f"the population gradient is 0 where β (s - δ) = logit P(desirable) ({world.name})"
        yield Finding(entry, "gradient", claim, at / start, EXACT)
        if world.name == "strings":
            policy = unfrozen(world.reference)
            minimise(
                policy.parameters(),
                lambda: population_loss(loss, world, policy, weight_B, delta=delta),  # noqa: B023
            )
            gap = total_variation(policy, world.policy)
            yield Finding(entry, "optimum", "descent from the reference ends there (total variation)", gap, 1e-5)


@theorem(*SATURATED)
def value_function(entry: str) -> Iterator[Finding]:
    """Direction and saturation of a sigmoid value: which way each response is pushed, and that it ends."""
    up, down = 1.2, 0.7
    loss = create_loss(entry, beta=BETA, desirable_weight=up, undesirable_weight=down)
    scalars = {"baseline": 0.3} if entry == "kto" else {}
    anchor = scalars.get("baseline", 0.0)
    for world in worlds():
        desirable_R = torch.sigmoid(noise(len(world.behaviour_R), seed=6))
        record = singles_of(world.policy, world.reference, **scalars)
        weight_B = weights_of(world.behaviour_R, desirable_R)
        (grad_BT,) = torch.autograd.grad((weight_B * loss(record).loss).sum(), record.logps_BT)
        slope_R = grad_BT[:, 0].view(2, -1).sum(0)  # all tokens of a response have the same
        x_R = BETA * (world.facts.ratio_R - anchor)
        push_R = world.behaviour_R * BETA * torch.sigmoid(x_R) * torch.sigmoid(-x_R)
        wanted_R = push_R * ((1 - desirable_R) * down - desirable_R * up)
        gap = float((slope_R - wanted_R).abs().max() / wanted_R.abs().max())
        claim = "pushes y up where λ_D P(desirable) > λ_U P(undesirable), by β σ(x) σ(-x) of the difference"
        yield Finding(entry, "gradient", f"{claim} ({world.name})", gap, EXACT)

    values = []
    for shift in (0.0, -80.0, 80.0):  # nats, of all log-ratios
        logps_B = torch.full((2, 1), shift + anchor, dtype=torch.float64, requires_grad=True)
        row = Unpaired(
            logps_BT=logps_B, ref_logps_BT=torch.zeros_like(logps_B), mask_BT=torch.ones(2, 1, dtype=torch.bool),
            desirable_B=torch.tensor([True, False]),
            **{k: torch.tensor(v, dtype=torch.float64) for k, v in scalars.items()},
        )  # fmt: skip
        values.append(float(torch.autograd.grad(loss(row).loss.sum(), logps_B)[0].abs().max()))
    claim = "saturation: 80 nats from the reference point no row has a gradient, right or wrong (share of the largest)"
    yield Finding(entry, "limit", claim, max(values[1:]) / values[0], 1e-15)


@theorem(*SATURATED)
def majority(entry: str) -> Iterator[Finding]:
    """Contradicting labels: the responses that most people call undesirable lose all their probability."""
    world = next(worlds())
    loss = create_loss(entry, beta=1.0)
    scalars = {"baseline": 0.0} if entry == "kto" else {}
    desirable_R = torch.tensor([0.7, 0.4, 0.6, 0.45], dtype=torch.float64)
    weight_B = weights_of(world.behaviour_R, desirable_R)
    policy = unfrozen(world.reference)
    minimise(policy.parameters(), lambda: population_loss(loss, world, policy, weight_B, **scalars))
    left = float(policy.log_probs().detach().exp()[desirable_R < 0.5].sum())
    claim = "no response that the majority calls undesirable keeps probability at the optimum (mass left)"
    yield Finding(entry, "optimum", claim, left, 1e-3)


@theorem("kto")
def baseline(entry: str) -> Iterator[Finding]:
    """The reference point is where the log-ratios are measured from, and nothing else."""
    loss = create_loss(entry, beta=BETA)
    for world in worlds():
        shift = 0.7  # of the log-ratio of every response, through the first token of the reference
        record = singles_of(world.policy, world.reference, baseline=0.3)
        moved_BT = record.ref_logps_BT.clone()  # type: ignore[union-attr]
        moved_BT[:, 0] -= shift
        other = Unpaired(
            logps_BT=record.logps_BT, ref_logps_BT=moved_BT, mask_BT=record.mask_BT, desirable_B=record.desirable_B,
            baseline=torch.tensor(0.3 + shift, dtype=torch.float64),
        )  # fmt: skip
        gap = float((loss(record).loss - loss(other).loss).detach().abs().max())
        claim = f"moving z0 and all log-ratios together changes nothing ({world.name})"
        yield Finding(entry, "identity", claim, gap, 1e-12)


@theorem("apo_zero_unpaired")
def zero_anchor(entry: str) -> Iterator[Finding]:
    """It is KTO with the reference itself as reference point."""
    for world in worlds():
        ours = create_loss(entry, beta=BETA)(singles_of(world.policy, world.reference)).loss
        theirs = create_loss("kto", beta=BETA)(singles_of(world.policy, world.reference, baseline=0.0)).loss
        gap = float((ours - theirs).detach().abs().max())
        yield Finding(entry, "identity", f"equals kto at z0 = 0 ({world.name})", gap, 1e-12)
