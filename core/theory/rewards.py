"""Reward models: a table of rewards, one per response, fitted to the exact probabilities of what people would say.

Where the probabilities come from the model's own law with rewards r, the fit must give r back, up to the constant that
no comparison shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from prefzoo.losses import create_loss
from prefzoo.records import RankedScores, Ratings, Scores, StepScores
from prefzoo.theory.base import Finding, theorem
from prefzoo.theory.populations import differences, minimise, noise

RECOVERED = 1e-6  # reward units
EXACT = 1e-9
LAWS = ("bradley_terry", "log_exp", "davidson", "rao_kupper", "all_pairs", "plackett_luce")
NU, THETA = 0.8, 1.7


def true_rewards(count: int = 5) -> Tensor:
    """With mean zero."""
    rewards_R = noise(count, seed=11, scale=1.2)
    return rewards_R - rewards_R.mean()


def centred(rewards_R: Tensor) -> Tensor:
    return rewards_R - rewards_R.mean()


def behaviour(count: int) -> Tensor:
    """How often each response is shown."""
    return noise(count, seed=12, scale=0.5).softmax(-1)


def fit(objective: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """The rewards at the minimum, from 0."""
    rewards_R = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    minimise([rewards_R], lambda: objective(rewards_R))
    return rewards_R.detach()


def slope(objective: Callable[[Tensor], Tensor], rewards_R: Tensor) -> float:
    """Largest derivative at these rewards, as a share of that at 0."""
    sizes = []
    for at in (rewards_R, torch.zeros_like(rewards_R)):
        at = at.clone().requires_grad_()
        sizes.append(float(torch.autograd.grad(objective(at), at)[0].abs().max()))
    return sizes[0] / sizes[1]


def pairs_of(rewards_R: Tensor, tied: bool | None = None, margin_RR: Tensor | None = None) -> Scores:
    """All ordered pairs; ``tied``: whether all of them are called ties, where the loss asks."""
    count = len(rewards_R)
    return Scores(
        chosen_B=rewards_R.repeat_interleave(count),
        rejected_B=rewards_R.repeat(count),
        margin_B=None if margin_RR is None else margin_RR.flatten(),
        tie_B=None if tied is None else torch.full((count * count,), tied),
    )


@cache
def rankings(count: int, size: int) -> tuple[tuple[int, ...], ...]:
    """Every ranking of ``size`` of the responses, best first.

    >>> len(rankings(4, 3))
    24
    """
    return tuple(itertools.permutations(range(count), size))


def plackett_luce_probabilities(rewards_R: Tensor, orders: Sequence[tuple[int, ...]]) -> Tensor:
    """Of each ranking, given which responses are in it: each place is drawn by softmax from those that are left.

    >>> plackett_luce_probabilities(torch.zeros(3), rankings(3, 3))[:2]
    tensor([0.1667, 0.1667])
    """
    x_PK = rewards_R[torch.tensor(orders)]
    choices = [x_PK[:, k] - x_PK[:, k:].logsumexp(-1) for k in range(x_PK.shape[1] - 1)]
    return torch.stack(choices).sum(0).exp()


def population(entry: str, rewards_R: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss over the population that the law of the entry makes of these rewards, as a function of a fit."""
    loss = create_loss(entry, **{"davidson": {"nu": NU}, "rao_kupper": {"theta": THETA}}.get(entry, {}))
    count = len(rewards_R)
    if entry in ("all_pairs", "plackett_luce"):
        orders = rankings(count, 3)
        weight_P = plackett_luce_probabilities(rewards_R, orders) * behaviour(count)[torch.tensor(orders)].prod(-1)
        valid_PK = torch.ones(len(orders), 3, dtype=torch.bool)
        return lambda fitted_R: (
            weight_P * loss(RankedScores(rewards_PK=fitted_R[torch.tensor(orders)], valid_PK=valid_PK)).loss
        ).sum()
    shown_B = (behaviour(count)[:, None] * behaviour(count)).flatten()
    gap_RR = differences(rewards_R)
    if entry == "davidson":
        both = (gap_RR / 2).exp() + (-gap_RR / 2).exp() + NU
        win_B, tie_B = ((gap_RR / 2).exp() / both).flatten(), (NU / both).flatten()
    elif entry == "rao_kupper":
        win_B = (1 / (1 + THETA * (-gap_RR).exp())).flatten()
        tie_B = 1 - win_B - (1 / (1 + THETA * gap_RR.exp())).flatten()
    else:
        win_B = torch.sigmoid(gap_RR).flatten()
        return lambda fitted_R: (2 * shown_B * win_B * loss(pairs_of(fitted_R)).loss).sum()
    return lambda fitted_R: (
        2 * shown_B * win_B * loss(pairs_of(fitted_R, tied=False)).loss
        + shown_B * tie_B * loss(pairs_of(fitted_R, tied=True)).loss
    ).sum()


@theorem(*LAWS)
def recovery(entry: str) -> Iterator[Finding]:
    """A fit to the exact probabilities of the law gives its rewards back, up to a constant."""
    rewards_R = true_rewards()
    objective = population(entry, rewards_R)
    law = {
        "davidson": "Davidson's law with ties",
        "rao_kupper": "the law of Rao and Kupper with ties",
        "all_pairs": "Plackett-Luce rankings, whose pairs are Bradley-Terry",
        "plackett_luce": "Plackett-Luce rankings",
    }.get(entry, "Bradley-Terry labels")
    yield Finding(
        entry, "gradient", f"{law}: the population gradient is 0 at the true rewards (share of that at 0)",
        slope(objective, rewards_R), EXACT,
    )  # fmt: skip
    gap = float((centred(fit(objective, len(rewards_R))) - rewards_R).abs().max())
    yield Finding(entry, "recovery", f"{law}: the fit gives the rewards back up to a constant", gap, RECOVERED)


@theorem("bradley_terry", "log_exp")
def equal_rewards(entry: str) -> Iterator[Finding]:
    """No preferences, no rewards: where all labels are coin flips, the fit is constant."""
    objective = population(entry, torch.zeros(5, dtype=torch.float64))
    start_R = noise(5, seed=13).requires_grad_()
    minimise([start_R], lambda: objective(start_R))
    gap = float(centred(start_R.detach()).abs().max())
    yield Finding(entry, "limit", "labels that are coin flips give equal rewards, from any start", gap, RECOVERED)


@theorem("bradley_terry", "log_exp")
def margin(entry: str) -> Iterator[Finding]:
    """A margin is added to the gap that the labels ask for."""
    rewards_R, margins_R = true_rewards(), noise(5, seed=14)
    loss, shown_RR = create_loss(entry), behaviour(5)[:, None] * behaviour(5)
    weight_B = (2 * shown_RR * torch.sigmoid(differences(rewards_R))).flatten()
    fitted_R = fit(lambda r: (weight_B * loss(pairs_of(r, margin_RR=differences(margins_R))).loss).sum(), 5)
    gap = float((centred(fitted_R) - centred(rewards_R + margins_R)).abs().max())
    yield Finding(entry, "recovery", "with margins m - m' the fit is r + m up to a constant", gap, RECOVERED)


@theorem("bradley_terry")
def smoothing(entry: str) -> Iterator[Finding]:
    """Label smoothing shrinks gaps to the logit of the smoothed probability, and does nothing as it goes to 0."""
    truth, share = torch.tensor([0.9, -0.9], dtype=torch.float64), 0.1
    weight_B = torch.sigmoid(differences(truth)).flatten()
    fitted_R = fit(lambda r: (weight_B * create_loss(entry, label_smoothing=share)(pairs_of(r)).loss).sum(), 2)
    p = torch.sigmoid(truth[0] - truth[1])
    wanted = torch.logit((1 - share) * p + share * (1 - p))
    gap = abs(float(fitted_R[0] - fitted_R[1] - wanted))
    yield Finding(entry, "recovery", "smoothing ε shrinks a gap to logit((1 - ε) p + ε (1 - p))", gap, RECOVERED)
    record, small = pairs_of(true_rewards()), 1e-6
    change_B = create_loss(entry, label_smoothing=small)(record).loss - create_loss(entry)(record).loss
    gap = float((change_B / small - (record.chosen_B - record.rejected_B)).abs().max())
    yield Finding(entry, "limit", "smoothing ε → 0 leaves every loss as it is: it adds ε times the gap", gap, 1e-6)


@theorem("bradley_terry")
def centring(entry: str) -> Iterator[Finding]:
    """Centring picks the constant that comparisons leave open; what else it does is a bias."""

    def centred_fit(rewards_R: Tensor, strength: float) -> Tensor:
        loss = create_loss(entry, centering=strength)
        others_RR = 1 - torch.eye(len(rewards_R), dtype=torch.float64)  # nobody compares a response with itself
        weight_B = (others_RR / others_RR.sum() * 2 * torch.sigmoid(differences(rewards_R))).flatten()
        return fit(lambda r: (weight_B * loss(pairs_of(r)).loss).sum(), len(rewards_R))

    rewards_R, strength = true_rewards(), 0.01
    fitted_R = centred_fit(rewards_R, strength)
    claim = "centring makes the mean reward of what was compared 0"
    yield Finding(entry, "recovery", claim, abs(float(fitted_R.mean())), RECOVERED)
    pair_R = torch.tensor([0.9, -0.9], dtype=torch.float64)
    gap = float((centred_fit(pair_R, 1.0) - pair_R).abs().max())
    yield Finding(entry, "recovery", "centring leaves the gap of two responses as it is", gap, RECOVERED)
    bias = 1 - float(differences(fitted_R).max() / differences(rewards_R).max())
    claim = f"centering={strength} of five responses, all compared with all: the share by which the largest gap shrinks"
    yield Finding(entry, "bias", claim, bias, None)


@theorem("reward_regression")
def mean_rating(entry: str) -> Iterator[Finding]:
    """The fit to raters who disagree is their mean; with Huber's loss and a small δ it goes to their median."""
    values, shares = torch.tensor([1.0, 2.0, 5.0]).double(), torch.tensor([0.3, 0.4, 0.3]).double()

    def rating(r: Tensor, **options: float) -> Tensor:
        return (shares * create_loss(entry, **options)(Ratings(rewards_B=r.expand(3), targets_B=values)).loss).sum()

    gap = abs(float(fit(lambda r: rating(r), 1)[0] - shares @ values))
    yield Finding(entry, "recovery", "the fit is the mean rating", gap, RECOVERED)
    gap = abs(float(fit(lambda r: rating(r, huber=1e-3) * 1e3, 1)[0] - 2.0))
    yield Finding(entry, "limit", "with huber = 0.001 it is the median rating, within that", gap, 1e-3)


@theorem("process_reward")
def step_probability(entry: str) -> Iterator[Finding]:
    """The fit is the probability that a step is right, for hard labels and for soft ones."""
    right = torch.tensor([0.9, 0.35, 0.6]).double()
    loss, mask_BT = create_loss(entry), torch.ones(1, 3, dtype=torch.bool)

    def scored(z: Tensor, labels_T: Tensor) -> Tensor:
        return loss(StepScores(scores_BT=z[None], labels_BT=labels_T[None], mask_BT=mask_BT)).loss[0]

    ones = torch.ones(3, dtype=torch.float64)
    hard = fit(lambda z: (right * scored(z, ones) + (1 - right) * scored(z, 0 * ones)).sum(), 3)
    soft = fit(lambda z: scored(z, right).sum(), 3)
    for name, fitted in (("labels of 0 and 1", hard), ("soft labels", soft)):
        gap = float((torch.sigmoid(fitted) - right).abs().max())
        yield Finding(entry, "recovery", f"{name}: σ(z) is the share of right ones, step by step", gap, RECOVERED)
