"""Pairwise losses: what each one's population optimum is, and that it is there.

A *case* says, for a policy π* and its reference, which preferences p(y ≻ y') and which behaviour μ make π* the optimum
that the paper derives, in closed form and without the loss. The proof then takes the registered loss and shows that its
population gradient vanishes at π*, and that the descent from the reference ends there. Read backwards it is the paper's
theorem: with s(y) = log π*(y)/ref(y), "p = σ(β s(y) - β s(y'))" says π* ∝ ref exp(r/β) for Bradley-Terry rewards r.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prefzoo.losses import create_loss
from prefzoo.theory.base import Finding, theorem
from prefzoo.theory.populations import (
    Facts,
    World,
    differences,
    labelled,
    minimise,
    noise,
    population_loss,
    root,
    total_variation,
    unfrozen,
    worlds,
)  # fmt: skip

BETA = 0.5
SMOOTHING = 0.1
EXACT = 1e-9  # of gradients, relative to that at the reference
REACHED = 1e-5  # total variation that the descent leaves

Preferences = tuple[Tensor, Tensor]  # p(y ≻ y') (R, R), and the behaviour μ (R,)


@dataclass(frozen=True)
class Case:
    """One claim about the optimum of a loss.

    ``preferences``: from the facts of π* and a behaviour, the preferences and the behaviour under which it is optimal.
    ``fields``: further columns of all pairs, (R * R,), from the facts and the preferences.
    ``within``: of all pairs those that are compared, (R, R). ``strings_only``: not for responses of one token.
    """

    claim: str
    preferences: Callable[[Facts, Tensor], Preferences]
    options: Mapping[str, Any] = field(default_factory=dict)
    fields: Callable[[Facts, Tensor], dict[str, Tensor]] = lambda facts, win_RR: {}
    within: Callable[[World], Tensor] | None = None
    reached: bool = True
    strings_only: bool = False


def win(preference: Callable[[Facts], Tensor]) -> Callable[[Facts, Tensor], Preferences]:
    """A case in which the preferences do not depend on the behaviour, and any behaviour will do."""
    return lambda facts, behaviour_R: (preference(facts), behaviour_R)


def marginal(share: Callable[[Facts], Tensor]) -> Callable[[Facts, Tensor], Preferences]:
    """A case about P(y ≻ μ) only: p(y ≻ y') = 1/2 + P(y ≻ μ) - P(y' ≻ μ), plus cycles that no P(y ≻ μ) shows.

    P must average 1/2 over μ, because each comparison has one winner: μ is tilted until it does.
    """

    def preferences(facts: Facts, behaviour_R: Tensor) -> Preferences:
        share_R = share(facts)
        tilted = lambda k: (behaviour_R.log() + k * facts.ratio_R).softmax(-1)  # noqa: E731
        behaviour_R = tilted(root(lambda k: float(tilted(k) @ share_R) - 0.5))
        return 0.5 + differences(share_R) + cycles(behaviour_R), behaviour_R

    return preferences


def additive(gain: Callable[[Facts], Tensor]) -> Callable[[Facts, Tensor], Preferences]:
    """A case in which p(y ≻ y') = 1/2 + g(y) - g(y'), plus cycles: preferences that no reward explains."""
    return lambda facts, behaviour_R: (0.5 + differences(gain(facts)) + cycles(behaviour_R), behaviour_R)


def cycles(behaviour_R: Tensor, size: float = 0.1) -> Tensor:
    """An intransitive part of preferences, antisymmetric, that leaves every P(y ≻ μ) as it is, (R, R).

    Around the circle of responses each beats the next one and loses to the one before.
    """
    identity = torch.eye(len(behaviour_R), dtype=torch.float64)
    circle_RR = identity.roll(1, 1) - identity.roll(-1, 1)
    weighted_RR = circle_RR / (behaviour_R[:, None] * behaviour_R)
    return size * weighted_RR / weighted_RR.abs().max().clamp(min=1e-300)


def chosen_like(target: Callable[[Facts], Tensor], preference: Callable[[Facts], Tensor]) -> Any:
    """A case with a likelihood term: μ is such that the chosen responses are distributed ∝ ``target``.

    It is the fixed point of μ(y) P(y ≻ μ) ∝ target(y).
    """

    def preferences(facts: Facts, behaviour_R: Tensor) -> Preferences:
        target_R = target(facts) / target(facts).sum()
        win_RR = preference(facts)
        for _ in range(500):
            behaviour_R = (behaviour_R * target_R / (win_RR @ behaviour_R)).sqrt()
            behaviour_R = behaviour_R / behaviour_R.sum()
        return win_RR, behaviour_R

    return preferences


def bradley_terry(scale: float = 1.0) -> Callable[[Facts], Tensor]:
    """p = σ(scale (s(y) - s(y')))."""
    return lambda facts: torch.sigmoid(scale * differences(facts.ratio_R))


def desensitised(facts: Facts, alpha: float) -> Tensor:
    """Difference of two log-ratios whose tokens beyond the shorter response count ``alpha``, (R, R)."""
    place_T = torch.arange(facts.ratio_RT.shape[1])
    shorter_RR = torch.minimum(facts.length_R[:, None], facts.length_R)
    weight_RRT = 1 - (1 - alpha) * (place_T >= shorter_RR[..., None]).double()
    side_RR = (weight_RRT * facts.ratio_RT[:, None]).sum(-1)
    return side_RR - side_RR.T


def share_first_token(world: World) -> Tensor:
    """Whether two responses begin alike and both go on, (R, R)."""
    first_R, longer_R = world.policy.tokens_RT[:, 0], world.policy.mask_RT[:, 1]
    return ((first_R[:, None] == first_R) & longer_R[:, None] & longer_R).double()


def per_token_with_margin(scale: float, gamma: float) -> Callable[[Facts], Tensor]:
    """Preferences that are at rest with SimPO's logit: p σ(γ - x) = (1 - p) σ(γ + x)."""
    return from_slopes(lambda x: -torch.sigmoid(gamma - x), lambda f: scale * differences(f.mean_log_prob_R))


def log_odds(facts: Facts) -> Tensor:
    """Of the mean token probability, (R,)."""
    return torch.logit(facts.mean_log_prob_R.exp())


def bent(facts: Facts, alpha: float = 0.25) -> Tensor:
    """AlphaPO's reward of the mean token probability p: (1 - p^-α) / α."""
    return (1 - facts.mean_log_prob_R.exp() ** -alpha) / alpha


def margins(facts: Facts) -> Tensor:
    """Some true gaps of reward, (R, R)."""
    return differences(noise(len(facts.ratio_R), seed=7))


def free(scale: float) -> Callable[[Facts], Tensor]:
    """p = σ(scale (log π(y) - log π(y'))): Bradley-Terry labels of a policy without reference."""
    return lambda facts: torch.sigmoid(scale * differences(facts.log_prob_R))


def from_slopes(slope: Callable[[Tensor], Tensor], logit: Callable[[Facts], Tensor]) -> Callable[[Facts], Tensor]:
    """Preferences under which a pair with this logit x is at rest: p ℓ'(x) = (1 - p) ℓ'(-x), with ℓ' the ``slope``."""
    return lambda facts: slope(-logit(facts)) / (slope(logit(facts)) + slope(-logit(facts)))


def discopop_slope(x: Tensor, tau: float = 1.0) -> Tensor:
    """Derivative of (1 - m) log(1 + e^-x) + m e^-x with m = σ(x / τ)."""
    m, slope = torch.sigmoid(x / tau), torch.sigmoid(x / tau) * torch.sigmoid(-x / tau) / tau
    return slope * (torch.exp(-x) - torch.log1p(torch.exp(-x))) - (1 - m) * torch.sigmoid(-x) - m * torch.exp(-x)


# f'(u), u = π/ref, of f-DPO's divergences: -log u + u - 1, Jensen-Shannon, alpha 0.3 (arXiv:2309.16240, table 1).
SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "forward_kl": lambda u: -1 / u,
    "js": lambda u: torch.log(2 * u / (1 + u)),
    "alpha": lambda u: (1 - u**-0.3) / 0.3,
}


def by_slope(slope: Callable[[Tensor], Tensor], facts: Facts) -> Tensor:
    """Bradley-Terry labels whose rewards are β f'(π/ref), (R, R)."""
    return torch.sigmoid(BETA * differences(slope(facts.ratio_R.exp())))


LAMBDA = math.log((1 - SMOOTHING) / SMOOTHING)
CASES: dict[str, list[Case]] = {
    "dpo": [
        Case("π ∝ ref exp(r/β), r the rewards of Bradley-Terry labels", win(bradley_terry(BETA)), {"beta": BETA}),
    ],
    "cdpo": [
        Case(
            "σ(β (s - s')) is the smoothed preference (1 - ε) p + ε (1 - p)",
            win(lambda f: (bradley_terry(BETA)(f) - SMOOTHING) / (1 - 2 * SMOOTHING)),
            {"beta": BETA, "label_smoothing": SMOOTHING},
        )
    ],
    "robust_dpo": [
        Case(
            "π ∝ ref exp(r/β), though a share ε of the Bradley-Terry labels is flipped",
            win(lambda f: SMOOTHING + (1 - 2 * SMOOTHING) * bradley_terry(BETA)(f)),
            {"beta": BETA, "label_smoothing": SMOOTHING},
        )
    ],
    "ipo_sum": [
        Case(
            "π ∝ ref exp(P(y ≻ μ)/β), whatever the preferences, intransitive ones too",
            additive(lambda f: BETA * f.ratio_R),
            {"beta": BETA},
        )
    ],
    "ipo": [
        Case(
            "log π/ref = n (P(y ≻ μ)/β + const), n the length, whatever the preferences",
            additive(lambda f: BETA * f.mean_ratio_R),
            {"beta": BETA},
        )
    ],
    "exo_pair": [
        Case(
            "β (s - s') = (2p - 1) log((1 - ε)/ε): the mean of the smoothed labels' logits",
            win(lambda f: 0.5 + BETA * differences(f.ratio_R) / (2 * LAMBDA)),
            {"beta": BETA, "label_smoothing": SMOOTHING},
        )
    ],
    "nca_pair": [
        Case(
            "π = ref (2 P(y ≻ μ))^(1/β)",
            marginal(lambda f: torch.exp(BETA * f.ratio_R) / 2),
            {"beta": BETA},
        )
    ],
    "bco_pair": [
        Case(
            "β s(y) = logit P(y ≻ μ)",
            marginal(lambda f: torch.sigmoid(BETA * f.ratio_R)),
            {"beta": BETA},
        )
    ],
    "sppo_hard": [
        Case(
            "s(y) = (P(y ≻ μ) - 1/2)/β: one exact step of the self-play, π ∝ ref exp(P(y ≻ μ)/β)",
            marginal(lambda f: 0.5 + BETA * f.ratio_R),
            {"beta": BETA},
        )
    ],
    "sppo_soft": [
        Case(
            "s(y) = (P(y ≻ μ) - 1/2)/β: one exact step of the self-play, π ∝ ref exp(P(y ≻ μ)/β)",
            marginal(lambda f: 0.5 + BETA * f.ratio_R),
            {"beta": BETA},
            fields=lambda f, win_RR: {"probability_B": win_RR.flatten()},
        )
    ],
    "discopop": [
        Case(
            "each pair is at rest: p ℓ'(β(s - s')) = (1 - p) ℓ'(β(s' - s))",
            win(from_slopes(discopop_slope, lambda f: BETA * differences(f.ratio_R))),
            {"beta": BETA, "tau": 1.0},
        )
    ],
    "length_dpo": [
        Case(
            "π ∝ ref exp((r - α n)/β): a token costs α",
            win(lambda f: torch.sigmoid(BETA * differences(f.ratio_R) + 0.2 * differences(f.length_R))),
            {"beta": BETA, "alpha": 0.2},
        )
    ],
    "odpo": [
        Case(
            "β (s - s') is the labels' logit plus the offset",
            win(lambda f: torch.sigmoid(BETA * differences(f.ratio_R) - 0.4 * margins(f))),
            {"beta": BETA, "scale": 0.4},
            fields=lambda f, win_RR: {"margin_B": margins(f).flatten()},
        )
    ],
    "reward_aware_rpo": [
        Case(
            f"β (s - s') = η (r - r'), π ∝ ref exp(η r/β), whatever the labels (distance {distance})",
            additive(lambda f: torch.zeros_like(f.ratio_R)),
            {"beta": BETA, "scale": 2.0, "distance": distance},
            fields=lambda f, win_RR: {"margin_B": (BETA / 2 * differences(f.ratio_R)).flatten()},
        )
        for distance in ("kl", "squared")
    ],
    "rpo_nll": [
        Case(
            "π ∝ ref exp(r/β), if the chosen responses are distributed as n π",
            chosen_like(lambda f: f.log_prob_R.exp() * f.length_R, bradley_terry(BETA)),
            {"beta": BETA, "nll": 0.7},
        )
    ],
    "tdpo1": [
        Case(
            "β (s - s') + β (D - D') is r - r', D the sequential KL(ref ‖ π)",
            win(lambda f: torch.sigmoid(BETA * (differences(f.ratio_R) + differences(f.drift_R)))),
            {"beta": BETA},
        )
    ],
    "step_dpo": [
        Case(
            "given the steps before, π ∝ ref exp(r/β) for the rest",
            win(bradley_terry(BETA)),
            {"beta": BETA},
            within=share_first_token,
            reached=False,  # nothing trains the first tokens
            strings_only=True,
        )
    ],
    "tpo": [
        Case(
            "π ∝ exp(r/β), if the gold responses are distributed as n π",
            chosen_like(lambda f: f.log_prob_R.exp() * f.length_R, free(BETA)),
            {"beta": BETA, "alpha": 0.7},
        )
    ],
    "chosen_nll": [
        Case(
            "π is the distribution of the chosen responses",
            chosen_like(lambda f: f.log_prob_R.exp(), lambda f: torch.sigmoid(margins(f) / 2)),
        )
    ],
    "cpo": [
        Case(
            "π ∝ exp(r/β), r the rewards of Bradley-Terry labels, without the likelihood term",
            win(free(BETA)),
            {"beta": BETA, "nll": 0.0},
        ),
        Case(
            "π ∝ exp(r/β), with the term if the chosen responses are distributed as π",
            chosen_like(lambda f: f.log_prob_R.exp(), free(BETA)),
            {"beta": BETA, "nll": 0.7},
        ),
    ],
    "cpo_ipo": [
        Case(
            "log π = n (P(y ≻ μ)/β + const), whatever the preferences, without the likelihood term",
            additive(lambda f: 0.2 * f.mean_log_prob_R),
            {"beta": 0.2, "nll": 0.0},
        ),
        Case(
            "log π = n (P(y ≻ μ)/β + const), with the term if the chosen responses are distributed as n π",
            chosen_like(
                lambda f: f.log_prob_R.exp() * f.length_R, lambda f: 0.5 + 0.2 * differences(f.mean_log_prob_R)
            ),
            {"beta": 0.2, "nll": 0.7},
        ),
    ],
    "simpo": [
        Case(
            "log π = n (r/β + const), r the rewards of Bradley-Terry labels, at γ = 0",
            win(lambda f: torch.sigmoid(differences(f.mean_log_prob_R))),
            {"beta": 1.0, "gamma": 0.0},
        ),
        Case(
            "each pair is at rest: p σ(γ - x) = (1 - p) σ(γ + x), x its difference of rewards",
            win(per_token_with_margin(1.0, 0.5)),
            {"beta": 1.0, "gamma": 0.5},
        ),
    ],
    "cpo_simpo": [
        Case(
            "each pair is at rest as in simpo, and the chosen responses are distributed as n π",
            chosen_like(lambda f: f.log_prob_R.exp() * f.length_R, per_token_with_margin(1.0, 0.5)),
            {"beta": 1.0, "gamma": 0.5, "nll": 0.7},
        )
    ],
    "alphapo": [
        Case(
            "each pair is at rest: p σ(γ - x) = (1 - p) σ(γ + x), x its difference of bent rewards",
            win(from_slopes(lambda x: -torch.sigmoid(0.5 - x), lambda f: differences(bent(f)))),
            {"beta": 1.0, "gamma": 0.5, "alpha": 0.25},
        )
    ],
    "orpo": [
        Case(
            "the odds ratio is that of the labels, and the chosen responses are distributed as n π",
            chosen_like(
                lambda f: f.log_prob_R.exp() * f.length_R, lambda f: torch.sigmoid(differences(log_odds(f)))
            ),
            {"beta": 0.7},
        )
    ],
    "dpo_norm": [
        Case(
            "log π/ref = n (r/β + const), n the length, r the rewards of Bradley-Terry labels",
            win(lambda f: torch.sigmoid(BETA * differences(f.mean_ratio_R))),
            {"beta": BETA},
        )
    ],
}  # fmt: skip


# What modifiers make of a loss, and of which.
MODIFIED: dict[str, tuple[str, list[Case]]] = {
    "divergence": (
        "dpo",
        [
            Case(
                f"β f'(π/ref) = r + const, f of the divergence {name} and r the rewards of Bradley-Terry labels",
                win(functools.partial(by_slope, slope)),
                {"beta": BETA, "divergence": name, **({"divergence_alpha": 0.3} if name == "alpha" else {})},
            )
            for name, slope in SLOPES.items()
        ],
    ),
    "wpo": (
        "dpo",
        [
            Case(
                "π ∝ ref exp(r/β), as without the weights: they do not move what each pair asks for",
                win(bradley_terry(BETA)),
                {"beta": BETA, "wpo": True},
                reached=False,  # the weights move with the policy and have no gradient: there is no value to go down
            )
        ],
    ),
    "length_desensitised": (
        "dpo",
        [
            Case(
                "β times the difference of the weighted log-ratios is r - r'",
                win(lambda f: torch.sigmoid(BETA * desensitised(f, 0.4))),
                {"beta": BETA, "ld_alpha": 0.4},
            )
        ],
    ),
    "label_smoothing": (
        "ipo_sum",
        [
            Case(
                "π ∝ ref exp((1 - 2ε) P(y ≻ μ)/β), whatever the preferences",
                additive(lambda f: 0.3 * f.ratio_R / (1 - 2 * SMOOTHING)),
                {"beta": 0.3, "label_smoothing": SMOOTHING},
            )
        ],
    ),
    "nll": (
        "dpo",
        [
            Case(
                "π ∝ ref exp(r/β), if the chosen responses are distributed as n π",
                chosen_like(lambda f: f.log_prob_R.exp() * f.length_R, bradley_terry(BETA)),
                {"beta": BETA, "nll": 0.7},
            )
        ],
    ),
}


def check_case(entry: str, name: str, case: Case) -> Iterator[Finding]:
    """The gradient at π*, the largest of the worlds, as a share of that at the reference; and where descent ends."""
    loss = create_loss(name, **case.options)
    shares, descents = [], []
    for world in worlds():
        if case.strings_only and world.policy.length == 1:
            continue
        win_RR, behaviour_R = case.preferences(world.facts, world.behaviour_R)
        if not bool(((win_RR >= 0) & (win_RR <= 1)).all()):
            raise AssertionError(f"{entry}, {world.name}: the case's preferences are no probabilities: {win_RR}.")
        weight_B = labelled(behaviour_R, win_RR)
        if case.within is not None:
            weight_B = weight_B * case.within(world).flatten()
        fields: dict[str, Any] = case.fields(world.facts, win_RR)
        objective = functools.partial(population_loss, loss, reference=world.reference, weight_B=weight_B, **fields)
        at, start = (
            float(p.gradient(objective(policy=p)).abs().max()) for p in (world.policy, unfrozen(world.reference))
        )
        shares.append(at / start)
        descents.append((world, objective))
    claim = f"the population gradient is 0 where {case.claim}"
    yield Finding(entry, "gradient", f"{claim} (share of that at the reference)", max(shares), EXACT)
    if case.reached:
        gaps = []
        for world, objective in descents[1:]:  # strings: in the table, and in the transformer
            policy = unfrozen(world.reference)
            minimise(policy.parameters(), functools.partial(objective, policy=policy), steps=60)
            gaps.append(total_variation(policy, world.policy))
        yield Finding(
            entry, "optimum", "and descent from the reference ends there (total variation)", max(gaps), REACHED
        )


@theorem(*CASES)
def population_optimum(entry: str) -> Iterator[Finding]:
    """The population gradient vanishes at the optimum of the paper, and descent from the reference ends there."""
    for case in CASES[entry]:
        yield from check_case(entry, entry, case)


@theorem(*MODIFIED)
def modified_optimum(entry: str) -> Iterator[Finding]:
    """The same for a modifier, of the loss that it is shown on."""
    loss, cases = MODIFIED[entry]
    for case in cases:
        yield from check_case(entry, loss, replace(case, claim=f"{case.claim}; of {loss}"))


@theorem("wpo")
def on_policy(entry: str) -> Iterator[Finding]:
    """What the weights are for: pairs from elsewhere count as if the policy had written them."""
    world = next(worlds())  # of one token, where the alignment by Σp² is the same for all
    count, win_RR = len(world.behaviour_R), bradley_terry(2.0)(world.facts)
    even_R = torch.full((count,), 1 / count, dtype=torch.float64)
    gradients = []
    for behaviour_R, wpo in ((world.facts.log_prob_R.exp(), False), (even_R, True)):
        loss = create_loss("dpo", beta=BETA, wpo=wpo)
        value = population_loss(loss, world.policy, world.reference, labelled(behaviour_R, win_RR))
        gradients.append(world.policy.gradient(value))
    own, weighted = (g / g.norm() for g in gradients)
    claim = "responses of one token, drawn evenly: with the weights the gradient has the direction of that of own pairs"
    yield Finding(entry, "expectation", claim, float((own - weighted).abs().max()), EXACT)
