"""Theorems on likelihood losses: which distribution each one makes the policy, given the data's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prefzoo.losses import create_loss
from prefzoo.records import Likelihood, masked_mean, masked_sum
from prefzoo.theory.base import Finding, theorem
from prefzoo.theory.credit import policies
from prefzoo.theory.expectations import EXACT, alike, bias, difference, moved, some_rewards
from prefzoo.theory.policies import EnumerablePolicy, Tabular


def descent(
    entry: str,
    policy: EnumerablePolicy,
    data_R: Tensor,
    *,
    scores_R: Tensor | None = None,
    advantages_RT: Tensor | None = None,
    unit: str = "row_sum",
    **options: Any,
) -> Tensor:
    """The gradient of the mean loss over the data, by enumeration; scores and advantages by response."""
    logps_RT, mask_RT = policy.logps()
    record = Likelihood(logps_BT=logps_RT, mask_BT=mask_RT, scores_B=scores_R, advantages_BT=advantages_RT)
    loss = create_loss(entry, **options)(record).loss
    loss_R = masked_mean(loss, mask_RT) if unit == "row" else masked_sum(loss, mask_RT)
    return policy.gradient((data_R * loss_R).sum())


def towards(policy: EnumerablePolicy, weight_R: Tensor) -> Tensor:
    """The gradient of KL(target ‖ π) times Σ weight, the target being the normalised weights."""
    target_R = weight_R / weight_R.sum()
    log_target_R = target_R.clamp(min=torch.finfo(target_R.dtype).tiny).log()
    return weight_R.sum() * policy.gradient((target_R * (log_target_R - policy.log_probs())).sum())


def data_of(policy: EnumerablePolicy) -> Tensor:
    """The data's distribution over the responses, (R,)."""
    return moved(policy, 0.8, seed=21).log_probs().detach().exp()


def nearing(entry: str, claim: str, target: str, **options: Any) -> Iterator[Finding]:
    """The gradient is that of KL(target ‖ π) for every policy, so the target is the optimum: checked there too.

    ``target``: how the weight of a response comes from its score, in words of ``WEIGHTS``.
    """
    worst = 0.0
    for policy in policies():
        data_R, scores_R = data_of(policy), some_rewards(policy)
        found = descent(entry, policy, data_R, **columns(entry, policy, scores_R), **options)
        worst = max(worst, difference(found, towards(policy, data_R * WEIGHTS[target](scores_R))))
    yield Finding(entry, "gradient", f"the gradient of KL(target ‖ π), times the mean weight; {claim}", worst, EXACT)
    table = Tabular(vocabulary=3, length=3, seed=1)
    data_R, scores_R = data_of(table), some_rewards(table)
    weight_R = data_R * WEIGHTS[target](scores_R)
    table.become((weight_R / weight_R.sum()).clamp(min=1e-300).log())
    found = descent(entry, table, data_R, **columns(entry, table, scores_R), **options)
    yield Finding(entry, "optimum", f"0 at the target; {claim}", found.norm().item(), EXACT)


def columns(entry: str, policy: EnumerablePolicy, scores_R: Tensor) -> dict[str, Any]:
    """The columns of the record that an entry reads the score from."""
    if entry in ("awr", "hpo"):
        return {"advantages_RT": scores_R[:, None].expand(policy.mask_RT.shape)}
    return {} if entry == "sft" else {"scores_R": scores_R}


TEMPERATURE, CAP, THRESHOLD = 0.5, 1.7, 0.2
WEIGHTS = {
    "data": torch.ones_like,
    "exponential": lambda scores_R: (scores_R / TEMPERATURE).exp(),
    "capped": lambda scores_R: (scores_R / TEMPERATURE).exp().clamp(max=CAP),
    "conditioned": lambda scores_R: (scores_R >= THRESHOLD).double(),
}


@theorem("sft")
def imitation(entry: str) -> Iterator[Finding]:
    """Maximum likelihood is the forward KL from the data."""
    yield from nearing(entry, "the target is the data", "data")
    policy = policies()[0]
    data_R, length_R = data_of(policy), policy.mask_RT.sum(-1)
    found = descent(entry, policy, data_R, unit="row")
    claim = "count 'row': the gradient of KL(target ‖ π), times the mean weight; the target is the data over its length"
    yield Finding(entry, "gradient", claim, difference(found, towards(policy, data_R / length_R)), EXACT)


@theorem("weighted_sft")
def weighted(entry: str) -> Iterator[Finding]:
    """Reward-weighted regression."""
    uncapped: dict[str, Any] = {"temperature": TEMPERATURE, "cap": 1e6}
    yield from nearing(entry, "not capped, the target is data · exp(score / τ)", "exponential", **uncapped)
    capped: dict[str, Any] = {"temperature": TEMPERATURE, "cap": CAP}
    yield from nearing(entry, "capped, it is data · min(exp(score / τ), cap)", "capped", **capped)
    yield from large_temperature(entry, "temperature")


@theorem("awr", "hpo")
def advantage_weighted(entry: str) -> Iterator[Finding]:
    """Advantage-weighted regression, of completions and of tokens."""
    words = "one advantage per completion"
    uncapped: dict[str, Any] = {"beta": TEMPERATURE, "cap": 1e6}
    yield from nearing(entry, f"{words}, not capped, the target is data · exp(A / β)", "exponential", **uncapped)
    capped: dict[str, Any] = {"beta": TEMPERATURE, "cap": CAP}
    yield from nearing(entry, f"{words}, capped, it is data · min(exp(A / β), cap)", "capped", **capped)
    yield from large_temperature(entry, "beta")
    if entry == "awr":
        table, data = Tabular(vocabulary=3, length=3, seed=1), Tabular(vocabulary=3, length=3, seed=21)
        generator = torch.Generator().manual_seed(8)
        credit = torch.randn(table.table.shape, generator=generator, dtype=torch.float64)  # by prefix and token
        with torch.no_grad():
            table.table.copy_(data.table.log_softmax(-1) + credit / TEMPERATURE)
        credit_RT = credit[table.prefix_RT, table.tokens_RT]
        found = descent(entry, table, data.log_probs().detach().exp(), advantages_RT=credit_RT, **uncapped)
        claim = "an advantage per token, not capped: 0 at π(a|s) ∝ data(a|s) exp(A(s, a) / β)"
        yield Finding(entry, "optimum", claim, found.norm().item(), EXACT)


def large_temperature(entry: str, option: str) -> Iterator[Finding]:
    policy = policies()[0]
    data_R, scores_R = data_of(policy), some_rewards(policy)
    large: dict[str, Any] = {option: 1e9}
    found = descent(entry, policy, data_R, **columns(entry, policy, scores_R), **large)
    measured = difference(found, descent("sft", policy, data_R))
    yield Finding(entry, "limit", f"{option} to infinity: the gradient of sft", measured, 1e-7)


@theorem("filtered_sft")
def filtered(entry: str) -> Iterator[Finding]:
    """Rejection sampling."""
    claim = "the target is the data given that score ≥ threshold"
    policy = policies()[0]
    yield from nearing(entry, claim, "conditioned", threshold=THRESHOLD)
    data_R, scores_R = data_of(policy), some_rewards(policy)
    found = descent(entry, policy, data_R, scores_R=scores_R, threshold=-1e9)
    measured = difference(found, descent("sft", policy, data_R))
    yield Finding(entry, "limit", "a threshold below every score: the gradient of sft", measured, EXACT)
    nothing = descent(entry, policy, data_R, scores_R=scores_R, threshold=1e9).norm().item()
    yield Finding(entry, "limit", "a threshold above every score: no gradient", nothing, 0.0)


@theorem("dft")
def own_probability(entry: str) -> Iterator[Finding]:
    """What weighting a token by its own probability follows instead of the likelihood."""
    worst = 0.0
    for policy in policies():
        data_R = data_of(policy)
        found = descent(entry, policy, data_R)
        likely_RT = policy.distributions().gather(-1, policy.tokens_RT[..., None])[..., 0].exp()
        mean = (data_R * torch.where(policy.mask_RT, likely_RT, 0.0).sum(-1)).sum()
        worst = max(worst, difference(found, -policy.gradient(mean)))
    claim = "not the gradient of the likelihood but of the mean probability of the data's tokens"
    yield Finding(entry, "gradient", claim, worst, EXACT)

    data = Tabular(vocabulary=4, seed=1)
    data_R = data.log_probs().detach().exp()
    greedy = Tabular(vocabulary=4).become(torch.where(data_R == data_R.max(), 0.0, -60.0))
    measured = descent(entry, greedy, data_R).norm().item()
    yield Finding(
        entry, "optimum", "one token: 0 where the policy always does what the data does most", measured, 1e-20
    )
    at_data = descent(entry, data, data_R)
    size = at_data.norm() / descent("sft", Tabular(vocabulary=4, spread=0.0), data_R).norm()
    claim = "one token: the gradient at the data's own distribution, as a share of that of sft at the uniform policy"
    yield Finding(entry, "bias", claim, size.item(), None)
    policy = policies()[0]
    sft, found = descent("sft", policy, data_of(policy)), descent(entry, policy, data_of(policy))
    yield bias(entry, "against the likelihood, scaled to the size of its gradient", alike(found, sft), sft)
