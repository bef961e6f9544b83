"""Ranked losses: every list of the responses, with the probability that people would rank it so."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from prefzoo.losses import Loss, create_loss
from prefzoo.records import Ranked
from prefzoo.theory.base import Finding, theorem
from prefzoo.theory.policies import EnumerablePolicy, Tabular, TinyTransformer
from prefzoo.theory.populations import (
    Facts,
    World,
    differences,
    minimise,
    moved,
    pairs_of,
    total_variation,
    unfrozen,
    world,
)  # fmt: skip
from prefzoo.theory.rewards import plackett_luce_probabilities, rankings

BETA = 0.5
EXACT = 1e-9
REACHED = 1e-5

Objective = tuple[World, Callable[[EnumerablePolicy], Tensor]]


def ranked_worlds(*, uniform: bool = False) -> Iterator[World]:
    """Four responses of 1 to 3 tokens, so that all rankings can be written down; a table and a transformer.

    ``uniform``: the reference gives all of them the same probability.
    """
    table = Tabular(vocabulary=2, length=3, seed=2, spread=0.6)
    if uniform:
        table.become(torch.zeros(len(table.strings), dtype=torch.float64))
    yield world("strings", moved(table, 0.3, seed=4), table)
    if not uniform:
        transformer = TinyTransformer(vocabulary=2, length=3, seed=3)
        yield world("transformer", moved(transformer, 0.03, seed=4), transformer)


def lists_of(
    policy: EnumerablePolicy,
    reference: EnumerablePolicy,
    orders: Sequence[tuple[int, ...]],
    scores_R: Tensor | None = None,
) -> Ranked:
    """The record of these rankings of responses."""
    index = torch.tensor(orders)
    logps_RT, mask_RT = policy.logps()
    return Ranked(
        logps_PKT=logps_RT[index],
        mask_PKT=mask_RT[index],
        valid_PK=torch.ones_like(index, dtype=torch.bool),
        ref_logps_PKT=reference.logps()[0][index],
        scores_PK=None if scores_R is None else scores_R[index],
    )


def list_loss(
    loss: Loss,
    reference: EnumerablePolicy,
    orders: Sequence[tuple[int, ...]],
    weight_P: Tensor,
    scores_R: Tensor | None,
    policy: EnumerablePolicy,
) -> Tensor:
    """The loss over these rankings, a scalar."""
    return (weight_P * loss(lists_of(policy, reference, orders, scores_R)).loss).sum()


def best_first(scores_R: Tensor) -> tuple[int, ...]:
    return tuple(scores_R.argsort(descending=True).tolist())


def stationary(entry: str, claim: str, cases: list[Objective]) -> Iterator[Finding]:
    """The gradient of an objective is 0 at the world's policy; descent from its reference ends there, of the table."""
    shares = []
    for a_world, objective in cases:
        at, start = (float(p.gradient(objective(p)).abs().max()) for p in (a_world.policy, unfrozen(a_world.reference)))
        shares.append(at / start)
    claim = f"the population gradient is 0 where {claim} (share of that at the reference)"
    yield Finding(entry, "gradient", claim, max(shares), EXACT)
    a_world, objective = cases[0]
    policy = unfrozen(a_world.reference)
    minimise(policy.parameters(), functools.partial(objective, policy))
    gap = total_variation(policy, a_world.policy)
    yield Finding(entry, "optimum", "and descent from the reference ends there (total variation)", gap, REACHED)


@theorem("pl_dpo", "all_pairs_dpo")
def rankings_by_rewards(entry: str) -> Iterator[Finding]:
    """Rankings drawn by Plackett-Luce with rewards r, of any lists: the optimum is ref exp(r/β), as of DPO."""
    loss = create_loss(entry, beta=BETA)
    cases: list[Objective] = []
    for a_world in ranked_worlds():
        orders = rankings(len(a_world.behaviour_R), 3)
        shown_P = a_world.behaviour_R[torch.tensor(orders)].prod(-1)
        weight_P = shown_P * plackett_luce_probabilities(BETA * a_world.facts.ratio_R, orders)
        cases.append((a_world, functools.partial(list_loss, loss, a_world.reference, orders, weight_P, None)))
    yield from stationary(entry, "π ∝ ref exp(r/β), r the rewards of Plackett-Luce rankings of three", cases)


@theorem("exo")
def reverse_kl(entry: str) -> Iterator[Finding]:
    """With scores as labels the loss is a reverse KL over the list, so its optimum is exact."""
    temperature = 2.0
    loss = create_loss(entry, beta=BETA, reward_beta=temperature)
    cases: list[Objective] = []
    for a_world in ranked_worlds():
        scores_R = BETA * temperature * a_world.facts.ratio_R
        orders = [o for o in rankings(len(scores_R), 3) if list(o) == sorted(o, key=lambda i: -scores_R[i])]
        even_P = torch.ones(len(orders), dtype=torch.float64)
        cases.append((a_world, functools.partial(list_loss, loss, a_world.reference, orders, even_P, scores_R)))
    yield from stationary(entry, "π ∝ ref exp(score / (β β_r)), from lists of three", cases)


@theorem("nca")
def noise_contrast(entry: str) -> Iterator[Finding]:
    """With the reference even over the list and β = 1, the classifier's optimum is the policy softmax(scores / α)."""
    alpha = 0.8
    loss = create_loss(entry, beta=1.0, alpha=alpha)
    cases: list[Objective] = []
    for a_world in ranked_worlds(uniform=True):
        scores_R = alpha * a_world.facts.log_prob_R
        orders = [best_first(scores_R)]
        even_P = torch.ones(len(orders), dtype=torch.float64)
        cases.append((a_world, functools.partial(list_loss, loss, a_world.reference, orders, even_P, scores_R)))
    yield from stationary(entry, "π = ref K softmax(scores/α), at β = 1 with ref even over the list of all", cases)


@theorem("lipo")
def ordering(entry: str) -> Iterator[Finding]:
    """Only the order of the scores is learned: no policy is the optimum, and each step of descent widens the gaps."""
    loss = create_loss(entry, beta=BETA)
    a_world = next(ranked_worlds())
    scores_R = torch.tensor([0.1, 0.9, 0.4, 0.6], dtype=torch.float64)
    orders = [best_first(scores_R)]
    policy = unfrozen(a_world.reference)
    gaps = []
    for step in range(150):
        if step % 50 == 0:
            gaps.append(differences(Facts.of(policy, a_world.reference).ratio_R[list(orders[0])]).diagonal(1))
        gradient = torch.autograd.grad(
            loss(lists_of(policy, a_world.reference, orders, scores_R)).loss.sum(), list(policy.parameters())
        )
        with torch.no_grad():
            for parameter, slope in zip(policy.parameters(), gradient, strict=True):
                parameter.sub_(2 * slope)
    wrong = float((differences(Facts.of(policy, a_world.reference).ratio_R[list(orders[0])]).diagonal(1) <= 0).sum())
    yield Finding(
        entry, "optimum", "descent orders the log-ratios as the scores (neighbours in the wrong order)", wrong, 0
    )
    narrower = float((gaps[2].sum() <= gaps[1].sum()) or (gaps[1].sum() <= gaps[0].sum()))
    yield Finding(entry, "optimum", "and the gaps grow without end: no optimum (1 if they do not)", narrower, 0)


@theorem("lipo")
def weighted_pair(entry: str) -> Iterator[Finding]:
    """A list of two is a pair that counts by what exchanging the two would change of its DCG."""
    gaps = []
    discount = 1 / math.log(2) - 1 / math.log(3)
    for a_world in ranked_worlds():
        scores_R = torch.tensor([0.1, 0.9, 0.4, 0.6], dtype=torch.float64)
        orders = [o for o in rankings(4, 2) if scores_R[o[0]] > scores_R[o[1]]]
        chosen_B, rejected_B = torch.tensor(orders).T
        gain_B = 2 ** scores_R[chosen_B] - 2 ** scores_R[rejected_B]
        theirs = create_loss("dpo", beta=BETA)(pairs_of(a_world.policy, a_world.reference, chosen_B, rejected_B)).loss
        ours = create_loss(entry, beta=BETA)(lists_of(a_world.policy, a_world.reference, orders, scores_R)).loss
        gaps.append(float((ours - discount * gain_B * theirs).detach().abs().max()))
    claim = "of two completions it is dpo, times (2^ψ - 2^ψ') (1/log 2 - 1/log 3)"
    yield Finding(entry, "identity", claim, max(gaps), 1e-12)


@theorem("pl_dpo", "all_pairs_dpo", "exo", "nca")
def two_completions(entry: str) -> Iterator[Finding]:
    """A list of two is a pair."""
    pair = {"pl_dpo": "dpo", "all_pairs_dpo": "dpo", "exo": "exo_pair", "nca": "nca_pair"}[entry]
    gaps = []
    for a_world in ranked_worlds():
        orders = rankings(len(a_world.behaviour_R), 2)
        chosen_B, rejected_B = torch.tensor(orders).T
        theirs = create_loss(pair, beta=BETA)(pairs_of(a_world.policy, a_world.reference, chosen_B, rejected_B)).loss
        ours = create_loss(entry, beta=BETA)(lists_of(a_world.policy, a_world.reference, orders)).loss
        gaps.append(float((ours - theirs).detach().abs().max()))
    yield Finding(entry, "identity", f"of two completions it is {pair}", max(gaps), 1e-12)


@theorem("pl_dpo", "all_pairs_dpo")
def equal_rewards(entry: str) -> Iterator[Finding]:
    """Rankings that are all equally likely leave the reference where it is."""
    a_world = next(ranked_worlds())
    orders = rankings(len(a_world.behaviour_R), 3)
    policy = unfrozen(a_world.reference)
    loss = create_loss(entry, beta=BETA)
    slope = policy.gradient(loss(lists_of(policy, a_world.reference, orders)).loss.sum()).abs().max()
    yield Finding(
        entry, "limit", "all rewards equal: the reference is the optimum (gradient there)", float(slope), 1e-12
    )
