"""Pairwise losses: what each pair does by itself, identities between losses, limits, and losses without an optimum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from prefzoo.losses import create_loss
from prefzoo.records import Pairs
from prefzoo.theory.base import Finding, theorem
from prefzoo.theory.policies import Tabular
from prefzoo.theory.populations import (
    Facts,
    World,
    differences,
    labelled,
    minimise,
    moved,
    noise,
    pairs_of,
    population_loss,
    unfrozen,
    worlds,
)  # fmt: skip

BETA = 0.5
EXACT = 1e-9

CONTRASTS = ("dpo", "cdpo", "robust_dpo", "ipo", "ipo_sum", "exo_pair", "discopop", "dpo_norm")  # odd at p = 1/2


def pairs_apart(gap_B: Tensor) -> Pairs:
    """Pairs of one-token responses whose log-ratios differ by these nats, evenly to both sides."""
    half_BT = gap_B[:, None].double() / 2
    mask_BT = torch.ones_like(half_BT, dtype=torch.bool)
    return Pairs(
        chosen_logps_BT=half_BT - 3, rejected_logps_BT=-half_BT - 3, chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT,
        ref_chosen_logps_BT=0 * half_BT - 3, ref_rejected_logps_BT=0 * half_BT - 3,
    )  # fmt: skip


# -- identities -------------------------------------------------------------------------------------------------------


def with_prompts(world: World) -> Pairs:
    """All pairs, the first token of each chosen response read as its prompt."""
    whole = pairs_of(world.policy, world.reference)
    fields = {k: v[:, 1:] for k, v in whole.tensors().items() if "chosen" in k.split("_")}
    fields |= {"prompt_logps_BT": whole.chosen_logps_BT[:, :1], "prompt_mask_BT": whole.chosen_mask_BT[:, :1]}
    return replace(whole, **fields)


@theorem("prompt_chosen_nll")
def prompts_as_completions(entry: str) -> Iterator[Finding]:
    """A prompt that is read along counts as the first tokens of the completion."""
    for world in worlds():
        split, whole = with_prompts(world), pairs_of(world.policy, world.reference)
        ours, theirs = (
            world.policy.gradient(create_loss(name)(batch).loss.sum())
            for name, batch in ((entry, split), ("chosen_nll", whole))
        )
        claim = f"the gradient is chosen_nll's of prompt and completion as one string ({world.name})"
        yield Finding(entry, "identity", claim, float((ours - theirs).abs().max()), EXACT)


@theorem("orpo")
def likelihood_of_all(entry: str) -> Iterator[Finding]:
    """With ``likelihood="all"`` the term is a row's mean of prompt_chosen_nll."""
    for world in worlds():
        batch = with_prompts(world)
        once, twice = (create_loss(entry, likelihood="all", nll=nll)(batch).loss for nll in (1.0, 2.0))
        out = create_loss("prompt_chosen_nll")(batch)
        mean_B = out.loss.sum(-1) / out.mask_BT.sum(-1)  # type: ignore[union-attr]
        gap = float((twice - once - mean_B).detach().abs().max())
        yield Finding(
            entry, "identity", f"likelihood='all' is the mean of prompt_chosen_nll ({world.name})", gap, EXACT
        )


# -- limits -----------------------------------------------------------------------------------------------------------


def population_gradient(entry: str, options: Mapping[str, Any], world: World, win_RR: Tensor) -> Tensor:
    weight_B = labelled(world.behaviour_R, win_RR)
    loss = create_loss(entry, **options)
    return world.policy.gradient(population_loss(loss, world.policy, world.reference, weight_B))


def some_labels(world: World) -> Tensor:
    return torch.sigmoid(differences(noise(len(world.behaviour_R), seed=21)))


@theorem(*CONTRASTS)
def indifference(entry: str) -> Iterator[Finding]:
    """All rewards equal: labels are coin flips, and the reference is the optimum."""
    slopes = []
    for world in worlds():
        weight_B = labelled(world.behaviour_R, torch.full_like(differences(world.behaviour_R), 0.5))
        loss, policy = create_loss(entry, beta=BETA), unfrozen(world.reference)
        slopes.append(float(policy.gradient(population_loss(loss, policy, world.reference, weight_B)).abs().max()))
    yield Finding(entry, "limit", "all rewards equal: the gradient is 0 at the reference", max(slopes), 1e-12)


@theorem("dpo")
def temperature(entry: str) -> Iterator[Finding]:
    """β → 0: every pair counts alike; β → ∞: only pairs in the wrong order count."""
    gaps_low, gaps_high = [], []
    for world in worlds():
        win_RR = some_labels(world)
        weight_B = labelled(world.behaviour_R, win_RR)
        pairs = pairs_of(world.policy, world.reference)
        contrast_B = pairs.chosen_ratio_B - pairs.rejected_ratio_B
        low, high = 1e-6, 1e6
        wanted = world.policy.gradient(-(weight_B * contrast_B).sum() / 2)
        got = population_gradient(entry, {"beta": low}, world, win_RR) / low
        gaps_low.append(float((got - wanted).abs().max() / wanted.abs().max()))
        loss_B = create_loss(entry, beta=high)(pairs).loss.detach() / high
        gaps_high.append(float((loss_B - (-contrast_B.detach()).clamp(min=0)).abs().max()))
    claim = "β → 0: gradient / β is -½ of that of s_w - s_l, every pair counts alike"
    yield Finding(entry, "limit", claim, max(gaps_low), 1e-5)
    yield Finding(entry, "limit", "β → ∞: loss / β is max(0, s_l - s_w)", max(gaps_high), 1e-5)


@theorem("cdpo", "robust_dpo")
def little_smoothing(entry: str) -> Iterator[Finding]:
    """Smoothing → 0 is dpo."""
    gaps = []
    for world in worlds():
        pairs = pairs_of(world.policy, world.reference)
        ours = create_loss(entry, beta=BETA, label_smoothing=1e-9)(pairs).loss
        gaps.append(float((ours - create_loss("dpo", beta=BETA)(pairs).loss).detach().abs().max()))
    yield Finding(entry, "limit", "smoothing ε → 0 is dpo (difference at ε = 1e-9)", max(gaps), 1e-8)


@theorem("robust_dpo")
def unbiased(entry: str) -> Iterator[Finding]:
    """On flipped labels it has the value and the gradient that dpo has on clean ones, for every policy."""
    share, gaps = 0.2, []
    for world in worlds():
        clean_RR = some_labels(world)
        flipped_RR = (1 - share) * clean_RR + share * (1 - clean_RR)
        wanted = population_gradient("dpo", {"beta": BETA}, world, clean_RR)
        got = population_gradient(entry, {"beta": BETA, "label_smoothing": share}, world, flipped_RR)
        gaps.append(float((got - wanted).abs().max() / wanted.abs().max()))
    claim = "labels flipped with probability ε: the expected gradient is that of dpo on clean labels, at every policy"
    yield Finding(entry, "expectation", claim, max(gaps), EXACT)


@theorem("cdpo", "exo_pair")
def hard_labels(entry: str) -> Iterator[Finding]:
    """Labels that are always the same still have a finite optimum: the logit of the smoothing."""
    share = 0.1
    target = torch.log(torch.tensor((1 - share) / share)) / BETA
    table = Tabular(vocabulary=2, length=1, spread=0.0)
    policy, loss = unfrozen(table), create_loss(entry, beta=BETA, label_smoothing=share)
    first, second = torch.tensor([0]), torch.tensor([1])
    minimise(policy.parameters(), lambda: loss(pairs_of(policy, table, first, second)).loss.sum())
    ratio_R = Facts.of(policy, table).ratio_R
    gap = abs(float(ratio_R[0] - ratio_R[1] - target))
    yield Finding(entry, "optimum", "hard labels: s_w - s_l ends at log((1 - ε)/ε) / β", gap, 1e-5)


# Entry, its options, and what it is then.
ONE_TOKEN: dict[str, tuple[dict[str, float], str, dict[str, float]]] = {
    "ipo": ({}, "ipo_sum", {}),
    "dpo_norm": ({}, "dpo", {}),
    "length_dpo": ({}, "dpo", {}),
    "tdpo1": ({}, "dpo", {}),
    "tdpo2": ({}, "dpo", {}),
    "simpo": ({"gamma": 0.0}, "cpo", {"nll": 0.0}),
    "cpo_simpo": ({"gamma": 0.0, "nll": 0.3}, "cpo", {"nll": 0.3}),
}


@theorem(*ONE_TOKEN)
def one_token(entry: str) -> Iterator[Finding]:
    """Where every response has one token, dividing by lengths does nothing, and both sides of a pair drift alike."""
    world = next(worlds())
    own, other, others = ONE_TOKEN[entry]
    pairs = pairs_of(world.policy, world.reference)
    ours, theirs = create_loss(entry, beta=BETA, **own), create_loss(other, beta=BETA, **others)
    gap = float((ours(pairs).loss - theirs(pairs).loss).detach().abs().max())
    yield Finding(entry, "limit", f"responses of one token: equals {other}", gap, 1e-12)


# Entry, the option that switches off what it adds, and what it is then.
SWITCHED_OFF: dict[str, tuple[dict[str, float], str, dict[str, float]]] = {
    "length_dpo": ({"alpha": 0.0}, "dpo", {}),
    "rpo_nll": ({"nll": 0.0}, "dpo", {}),
    "dpop": ({"penalty": 0.0}, "dpo", {}),
    "tdpo2": ({"alpha": 0.0}, "dpo", {}),
    "alphapo": ({"alpha": 1e-7, "gamma": 0.5}, "simpo", {"gamma": 0.5}),
    "cpo_simpo": ({"nll": 0.0, "gamma": 0.5}, "simpo", {"gamma": 0.5}),
    "tpo": ({"alpha": 0.0}, "cpo", {"nll": 0.0}),
}


@theorem(*SWITCHED_OFF)
def switched_off(entry: str) -> Iterator[Finding]:
    """Without what it adds it is the loss that it was made from."""
    own, other, others = SWITCHED_OFF[entry]
    gaps = []
    for world in worlds():
        pairs = pairs_of(world.policy, world.reference)
        ours, theirs = create_loss(entry, beta=BETA, **own), create_loss(other, beta=BETA, **others)
        gaps.append(float((ours(pairs).loss - theirs(pairs).loss).detach().abs().max()))
    small = entry == "alphapo"
    claim = f"{next(iter(own))} {'→' if small else '='} 0: equals {other}"
    yield Finding(entry, "limit", claim, max(gaps), 1e-6 if small else 1e-12)


@theorem("orpo")
def pair_of_equals(entry: str) -> Iterator[Finding]:
    """A response compared with itself shows the two terms apart."""
    gaps = []
    for world in worlds():
        same_B = torch.arange(len(world.behaviour_R))
        ours = create_loss(entry, beta=0.7, nll=0.4)(pairs_of(world.policy, world.reference, same_B, same_B)).loss
        gaps.append(float((ours + 0.4 * world.facts.mean_log_prob_R - 0.7 * math.log(2)).detach().abs().max()))
    yield Finding(entry, "identity", "a response against itself costs c NLL / n + λ log 2", max(gaps), 1e-12)


@theorem("tdpo2")
def stopped_gradient(entry: str) -> Iterator[Finding]:
    """The stopped gradient leaves the optimum of its own classifier: a bias that grows with α."""
    for alpha in (0.1, 0.5):
        shares = []
        for world in worlds():
            facts = world.facts
            win_RR = torch.sigmoid(BETA * (differences(facts.ratio_R) + alpha * differences(facts.drift_R)))
            weight_B, loss = labelled(world.behaviour_R, win_RR), create_loss(entry, beta=BETA, alpha=alpha)
            at, start = (
                float(p.gradient(population_loss(loss, p, world.reference, weight_B)).abs().max())
                for p in (world.policy, unfrozen(world.reference))
            )
            shares.append(at / start)
        claim = (
            f"α = {alpha}: where its logits are those of the labels the gradient is not 0, because D_w has none: it "
            "pulls on to the reference (share of that at the reference)"
        )
        yield Finding(entry, "bias", claim, max(shares), None)


# -- losses without an optimum inside ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Push:
    """How a pair pushes: the derivatives of its loss by log π of the two sides, in closed form.

    ``slopes``: from the facts of both sides.
    """

    claim: str
    slopes: Callable[[Facts, Facts], tuple[Tensor, Tensor]]
    options: Mapping[str, Any] = field(default_factory=dict)


def bell(x: Tensor) -> Tensor:
    """Derivative of σ."""
    return torch.sigmoid(x) * torch.sigmoid(-x)


def below_margin(margin_B: Tensor) -> tuple[Tensor, Tensor]:
    push_B = BETA * (BETA * margin_B < 1).double()
    return -push_B, push_B


def below_free_margin(chosen: Facts, rejected: Facts, scale: float, margin: float, nll: float) -> tuple[Tensor, Tensor]:
    push_B = scale * (scale * (chosen.log_prob_R - rejected.log_prob_R) < margin).double()
    return -push_B - nll, push_B


PUSHES: dict[str, list[Push]] = {
    "hinge": [
        Push(
            "a pair pushes both sides by β while β (s_w - s_l) < 1, and not at all beyond",
            lambda w, l: below_margin(w.ratio_R - l.ratio_R),  # noqa: E741
            {"beta": BETA},
        )
    ],
    "cpo_hinge": [
        Push(
            "a pair pushes both sides by β while β (log π_w - log π_l) < 1; the chosen one rises by c always",
            lambda w, l: below_free_margin(w, l, BETA, 1.0, 0.3),  # noqa: E741
            {"beta": BETA, "nll": 0.3},
        )
    ],
    "slic_hf": [
        Push(
            "a pair pushes both sides by 1 while log π_w - log π_l < δ; the chosen one rises by λ always",
            lambda w, l: below_free_margin(w, l, 1.0, 0.8, 0.3),  # noqa: E741
            {"delta": 0.8, "nll": 0.3},
        )
    ],
    "apo_zero": [
        Push(
            "chosen up by β σ'(β s_w), rejected down by β σ'(β s_l): each anchored at the reference by itself",
            lambda w, l: (-BETA * bell(BETA * w.ratio_R), BETA * bell(BETA * l.ratio_R)),  # noqa: E741
            {"beta": BETA},
        )
    ],
    "apo_down": [
        Push(
            "rejected down by β σ'(β (s_w - s_l)), and chosen down too once its margin outgrows its log-ratio",
            lambda w, l: (  # noqa: E741
                BETA * (bell(BETA * w.ratio_R) - bell(BETA * (w.ratio_R - l.ratio_R))),
                BETA * bell(BETA * (w.ratio_R - l.ratio_R)),
            ),
            {"beta": BETA},
        )
    ],
    "dpop": [
        Push(
            "a chosen completion below the reference is pushed up 1 + λ times as hard as the rejected one down",
            lambda w, l: penalised(w.ratio_R, l.ratio_R, 5.0),  # noqa: E741
            {"beta": BETA, "penalty": 5.0},
        )
    ],
}


def penalised(chosen_B: Tensor, rejected_B: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    below_B = (chosen_B < 0).double()
    push_B = BETA * torch.sigmoid(-BETA * (chosen_B - rejected_B + penalty * below_B * chosen_B))
    return -push_B * (1 + penalty * below_B), push_B


def side_facts(facts: Facts, index_B: Tensor) -> Facts:
    return Facts(*(getattr(facts, name)[index_B] for name in Facts.__dataclass_fields__))


@theorem(*PUSHES)
def pushes(entry: str) -> Iterator[Finding]:
    """The derivatives of a pair's loss by log π of both sides."""
    for push in PUSHES[entry]:
        loss, gaps = create_loss(entry, **push.options), []
        for world in worlds():
            wide = moved(world.policy, 0.5, seed=30)  # far enough from the reference to see all regions
            count = len(wide.strings)
            chosen_B = torch.arange(count).repeat_interleave(count)
            rejected_B = torch.arange(count).repeat(count)
            pairs = pairs_of(wide, world.reference, chosen_B, rejected_B)
            got = torch.autograd.grad(loss(pairs).loss.sum(), [pairs.chosen_logps_BT, pairs.rejected_logps_BT])
            facts = Facts.of(wide, world.reference)
            wanted = push.slopes(side_facts(facts, chosen_B), side_facts(facts, rejected_B))
            largest = max(float(side_B.abs().max()) for side_B in wanted)
            apart = chosen_B != rejected_B
            for got_BT, wanted_B in zip(got, wanted, strict=True):
                gaps.append(float((got_BT[:, 0] - wanted_B)[apart].abs().max()) / largest)
        yield Finding(entry, "gradient", push.claim, max(gaps), EXACT)


@theorem("apo_zero")
def majority(entry: str) -> Iterator[Finding]:
    """Over a population it follows P(y ≻ μ) only, and has no optimum inside."""
    gaps, loss = [], create_loss(entry, beta=BETA)
    for world in worlds():
        win_RR = some_labels(world)
        logps = unfrozen(world.policy)
        pairs = pairs_of(logps, world.reference)
        weight_B = labelled(world.behaviour_R, win_RR)
        slopes = torch.autograd.grad(
            (weight_B * loss(pairs).loss).sum(), [pairs.chosen_logps_BT, pairs.rejected_logps_BT]
        )
        count = len(world.behaviour_R)
        slope_R = slopes[0][:, 0].view(count, count).sum(1) + slopes[1][:, 0].view(count, count).sum(0)
        share_R = win_RR @ world.behaviour_R
        wanted_R = 2 * world.behaviour_R * (1 - 2 * share_R) * BETA * bell(BETA * world.facts.ratio_R)
        gaps.append(float((slope_R - wanted_R).abs().max() / wanted_R.abs().max()))
    claim = "over a population y is pushed up where P(y ≻ μ) > 1/2, down otherwise, at every policy: no optimum inside"
    yield Finding(entry, "gradient", claim, max(gaps), EXACT)


HINGES: dict[str, dict[str, float]] = {
    "hinge": {"beta": 1.0},
    "cpo_hinge": {"beta": 1.0, "nll": 0.0},
    "slic_hf": {"delta": 1.0, "nll": 0.0},
}


@theorem(*HINGES)
def majority_of_pairs(entry: str) -> Iterator[Finding]:
    """Two responses: the optimum is a margin of 1 for the likelier winner, however likely."""
    grid, far, loss = torch.linspace(-3, 3, 1201, dtype=torch.float64), 0.0, create_loss(entry, **HINGES[entry])
    for p in (0.55, 0.9, 0.2):
        value = p * loss(pairs_apart(grid)).loss + (1 - p) * loss(pairs_apart(-grid)).loss
        far = max(far, abs(float(grid[value.argmin()]) - (1.0 if p > 0.5 else -1.0)))
    claim = "two responses: the optimum is the margin itself, for the likelier winner: how likely is not learned"
    yield Finding(entry, "optimum", claim, far, 0.01)


@theorem("dpop")
def above_reference(entry: str) -> Iterator[Finding]:
    """Where the chosen completion is not below the reference it is dpo; labels that contradict each other freeze it."""
    gaps = []
    for world in worlds():
        pairs = pairs_of(world.policy, world.reference)
        gap_B = create_loss(entry, beta=BETA)(pairs).loss - create_loss("dpo", beta=BETA)(pairs).loss
        gaps.append(float(gap_B.detach()[pairs.chosen_ratio_B.detach() >= 0].abs().max()))
    yield Finding(
        entry, "identity", "where the chosen completion is not below the reference it is dpo", max(gaps), 1e-12
    )
    gains = []
    for world in worlds():
        weight_B = labelled(world.behaviour_R, torch.sigmoid(BETA * differences(world.facts.ratio_R)))
        policy, loss = unfrozen(world.reference), create_loss(entry, beta=BETA)
        start = float(population_loss(loss, policy, world.reference, weight_B).detach())
        for seed in range(20):
            near = moved(policy, 1e-4, seed=seed)
            gains.append(start - float(population_loss(loss, near, world.reference, weight_B).detach()))
    claim = (
        "Bradley-Terry labels, which favour each response sometimes: no step lowers the loss, so it stays at the "
        "reference (the most that any of 60 small steps gains)"
    )
    yield Finding(entry, "optimum", claim, max(gains), 0.0)


@theorem("aot", "aot_unpaired")
def one_pair(entry: str) -> Iterator[Finding]:
    """A batch of one pair is dpo."""
    gaps = []
    for gap in (-2.0, 0.3, 4.0):
        ours, theirs = (create_loss(name, beta=BETA)(pairs_apart(torch.tensor([gap]))).loss for name in (entry, "dpo"))
        gaps.append(float((ours - theirs).abs().max()))
    yield Finding(entry, "limit", "a batch of one pair: equals dpo", max(gaps), 1e-12)


@theorem("aot", "aot_unpaired")
def by_ranks(entry: str) -> Iterator[Finding]:
    """With smoothed labels every rank ends at log((1 - ε)/ε) / β, whichever pair stands there."""
    share = 0.2
    lift = float(torch.log(torch.tensor((1 - share) / share, dtype=torch.float64))) / BETA
    reference = Tabular(vocabulary=4, length=1, seed=1)
    ref_R = reference.log_probs().detach()
    chosen_B, rejected_B = torch.tensor([0, 1]), torch.tensor([2, 3])
    if entry == "aot":  # each pair takes the reference's difference of the other pair, and the lift
        gap_B = (ref_R[chosen_B] - ref_R[rejected_B]).flip(0) + lift
        target_R = torch.cat([gap_B + ref_R[rejected_B], ref_R[rejected_B]])
    else:  # the chosen log-ratios are those of the rejected ones, in the other order, and the lift
        rejected_ratio_B = torch.tensor([0.4, -0.3], dtype=torch.float64)
        target_R = ref_R + torch.cat([rejected_ratio_B.flip(0) + lift, rejected_ratio_B])
    policy = unfrozen(reference)
    assert isinstance(policy, Tabular)
    policy.become(target_R)
    loss = create_loss(entry, beta=BETA, label_smoothing=share)
    at, start = (
        float(p.gradient(loss(pairs_of(p, reference, chosen_B, rejected_B)).loss.mean()).abs().max())
        for p in (policy, unfrozen(reference))
    )
    claim = "smoothed labels: at rest where every rank is log((1 - ε)/ε) / β above, even if two pairs change places"
    yield Finding(entry, "gradient", claim, at / start, EXACT)
