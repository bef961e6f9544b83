"""Losses of online preference: what a bonus adds, and where one step of self-play ends."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from prefzoo.losses import create_loss
from prefzoo.theory.base import Finding, theorem
from prefzoo.theory.populations import differences, pairs_of, unfrozen, worlds
from prefzoo.theory.ranked import Objective, list_loss, lists_of, ranked_worlds, rankings, stationary

BETA = 0.5
EXACT = 1e-9


@theorem("xpo")
def exploration(entry: str) -> Iterator[Finding]:
    """One side drawn from the policy, the other from the reference: DPO's gradient, and that of a KL to get away."""
    alpha, gaps, hands = 0.3, [], []
    for world in worlds():
        count = len(world.behaviour_R)
        win_RR = torch.sigmoid(differences(torch.linspace(-1, 1, count, dtype=torch.float64)))
        drawn_B = (world.policy.log_probs().exp()[:, None] * world.reference.log_probs().exp()).flatten().detach()
        pairs_now = functools.partial(pairs_of, world.policy, world.reference, probability_B=win_RR.flatten())
        pairs = pairs_now()
        found = world.policy.gradient((drawn_B * create_loss(entry, beta=BETA, alpha=alpha)(pairs).loss).sum())
        pairs = pairs_now()
        turned = create_loss("dpo", beta=BETA)(pairs.swapped()).loss
        won_B = win_RR.flatten()
        plain = (drawn_B * (won_B * create_loss("dpo", beta=BETA)(pairs).loss + (1 - won_B) * turned)).sum()
        reference_R = world.reference.log_probs().detach()
        kl = (reference_R.exp() * (reference_R - world.policy.log_probs())).sum()
        wanted = world.policy.gradient(plain) - alpha * world.policy.gradient(kl)
        gaps.append(float((found - wanted).abs().max()))
        log_R = world.policy.log_probs().detach().requires_grad_()
        z_B = BETA * (pairs.chosen_ratio_B - pairs.rejected_ratio_B).detach()
        push_B = BETA * (torch.sigmoid(z_B) - won_B)
        by_hand = log_R[torch.arange(count).repeat_interleave(count)] * push_B
        by_hand = by_hand + log_R[torch.arange(count).repeat(count)] * (alpha - push_B)
        slope_R = torch.autograd.grad((drawn_B * by_hand).sum(), log_R)[0]
        hands.append(float((found - world.policy.gradient((slope_R * world.policy.log_probs()).sum())).abs().max()))
    claim = "y ~ π, y' ~ ref: the expected gradient is dpo's on the labels, less α ∇ KL(ref ‖ π)"
    yield Finding(entry, "expectation", claim, max(gaps), EXACT)
    claim = "by log π(y) a pair has the slope β (σ(z) - p), by log π(y') that with the other sign and + α"
    yield Finding(entry, "gradient", claim, max(hands), EXACT)


@theorem("xpo")
def without_bonus(entry: str) -> Iterator[Finding]:
    """α = 0 is DPO of the pair as it was labelled."""
    gaps = []
    for world in worlds():
        pairs = pairs_of(world.policy, world.reference)
        theirs = create_loss("dpo", beta=BETA)
        for won, wanted in ((1.0, theirs(pairs).loss), (0.0, theirs(pairs.swapped()).loss)):
            labels_B = torch.full_like(wanted, won)
            ours = create_loss(entry, beta=BETA, alpha=0.0)(
                pairs_of(world.policy, world.reference, probability_B=labels_B)
            )
            gaps.append(float((ours.loss - wanted).detach().abs().max()))
    yield Finding(entry, "limit", "α = 0: dpo of the pair, the better side chosen", max(gaps), 1e-12)


@theorem("sppo")
def self_play_step(entry: str) -> Iterator[Finding]:
    """With exact win probabilities the square has its optimum where one step of multiplicative weights ends."""
    loss = create_loss(entry, beta=BETA)
    cases: list[Objective] = []
    for a_world in ranked_worlds():
        scores_R = 0.5 + BETA * a_world.facts.ratio_R
        orders = [o for o in rankings(len(scores_R), 3) if list(o) == sorted(o, key=lambda i: -scores_R[i])]
        even_P = torch.ones(len(orders), dtype=torch.float64)
        cases.append((a_world, functools.partial(list_loss, loss, a_world.reference, orders, even_P, scores_R)))
    yield from stationary(entry, "π ∝ ref exp(p/β), p the probability to win, one step of the self-play", cases)


@theorem("sppo")
def winner_and_loser(entry: str) -> Iterator[Finding]:
    """A list of two whose probabilities add up to one is a soft pair."""
    gaps = []
    for a_world in ranked_worlds():
        scores_R = torch.tensor([0.9, 0.1, 0.6, 0.4], dtype=torch.float64)
        orders = [(0, 1), (2, 3)]
        chosen_B, rejected_B = torch.tensor(orders).T
        theirs = create_loss("sppo_soft", beta=BETA)(
            pairs_of(
                unfrozen(a_world.policy), a_world.reference, chosen_B, rejected_B, probability_B=scores_R[chosen_B]
            )
        )
        ours = create_loss(entry, beta=BETA)(lists_of(a_world.policy, a_world.reference, orders, scores_R))
        gaps.append(float((ours.loss - theirs.loss / 2).detach().abs().max()))
    yield Finding(entry, "identity", "of two completions with p and 1 - p it is half of sppo_soft", max(gaps), 1e-12)
