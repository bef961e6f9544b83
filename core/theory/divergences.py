"""Theorems on divergences: KL estimators (value and gradient apart), KL in the reward and in the loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from prefzoo.losses import create_loss
from prefzoo.losses.kl import kl_estimator
from prefzoo.theory.base import Finding, theorem
from prefzoo.theory.expectations import (
    EXACT,
    bias,
    difference,
    draws,
    expected_loss,
    kl,
    moved,
    nats,
    record_of,
    zeros,
)
from prefzoo.theory.policies import EnumerablePolicy, Tabular

SAMPLED = ("k1", "k2", "k3", "abs", "k1_straight", "k3_straight")
# What the value of each estimator is on average, and whose gradient its gradient is (a policy's own samples).
UNBIASED_VALUE = ("k1", "k3", "k1_straight", "k3_straight")
NO_GRADIENT = ("k1",)
REVERSE_GRADIENT = ("k2", "k1_straight", "k3_straight")


def two_policies(length: int = 1) -> tuple[EnumerablePolicy, EnumerablePolicy]:
    """A policy and its reference, some tenths of a nat apart."""
    policy = Tabular(vocabulary=4 if length == 1 else 3, length=length, seed=1)
    return policy, moved(policy, 0.7, seed=2)


@theorem(*SAMPLED)
def sampled_kl(entry: str) -> Iterator[Finding]:
    """The value and the gradient of an estimator of KL(π ‖ ref), on average over the policy's own tokens."""
    policy, reference = two_policies()
    estimator = kl_estimator(entry)
    probs_R = policy.log_probs().detach().exp()
    logps_R, ref_R = policy.log_probs(), reference.log_probs().detach()
    forward = policy.gradient(kl(policy, reference))
    backward = policy.gradient(kl(reference, policy))

    value = float((probs_R * estimator(logps_R, ref_R)).sum().detach())
    true = nats(policy, reference)
    if entry in UNBIASED_VALUE:
        yield Finding(entry, "expectation", "its mean is KL(π ‖ ref)", abs(value - true), EXACT)
    else:
        claim = f"its mean is not KL(π ‖ ref), here {true:.3f} nats: relative bias of the value"
        yield Finding(entry, "bias", claim, abs(value - true) / true, None)

    found = policy.gradient((probs_R * estimator(policy.log_probs(), ref_R)).sum())
    if entry in NO_GRADIENT:
        size = float(found.norm() / forward.norm())
        yield Finding(entry, "gradient", "differentiated as it stands, its mean gradient is 0", size, EXACT)
    elif entry in REVERSE_GRADIENT:
        claim = "differentiated as it stands, its mean gradient is that of KL(π ‖ ref)"
        yield Finding(entry, "gradient", claim, difference(found, forward), EXACT)
    elif entry == "k3":
        claim = "differentiated as it stands, its mean gradient is that of KL(ref ‖ π)"
        yield Finding(entry, "gradient", claim, difference(found, backward), EXACT)
        yield bias(entry, "differentiated as it stands, against the gradient of KL(π ‖ ref)", found, forward)
    else:  # abs
        apart = policy.gradient((policy.log_probs().exp() - ref_R.exp()).abs().sum())
        claim = "differentiated as it stands, its mean gradient is that of Σ |π - ref|, twice the total variation"
        yield Finding(entry, "gradient", claim, difference(found, apart), EXACT)

    # In a reward the value stands, detached, before the gradient of the log-probability.
    rewarded = policy.gradient((probs_R * estimator(logps_R, ref_R).detach() * policy.log_probs()).sum())
    if entry in ("k1", "k1_straight"):
        claim = "in the reward, it gives the gradient of KL(π ‖ ref)"
        yield Finding(entry, "gradient", claim, difference(rewarded, forward), EXACT)
    else:
        if entry in ("k3", "k3_straight"):
            claim = "in the reward, it gives the gradient of KL(π ‖ ref) less that of KL(ref ‖ π)"
            yield Finding(entry, "gradient", claim, difference(rewarded, forward - backward), EXACT)
        yield bias(entry, "in the reward, against the gradient of KL(π ‖ ref)", rewarded, forward)

    equal = policy.gradient((probs_R * estimator(policy.log_probs(), policy.log_probs().detach())).sum())
    yield Finding(entry, "limit", "at π = ref, its mean gradient is 0", float(equal.norm()), EXACT)


def visited(policy: EnumerablePolicy, value_RT: Tensor) -> Tensor:
    """The sum over tokens of a quantity of their prefix, prefixes weighted as often as the policy now comes there."""
    probs_R = policy.log_probs().detach().exp()
    return (probs_R[:, None] * torch.where(policy.mask_RT, value_RT, 0.0)).sum()


def token_kl(left: Tensor, right: Tensor) -> Tensor:
    return (left.exp() * (left - right)).sum(-1)


@theorem("kl_penalty")
def kl_in_the_loss(entry: str) -> Iterator[Finding]:
    """What a KL term pulls at, on average over the policy's own completions of 1 to 3 tokens."""
    policy, reference = two_policies(length=3)
    drawn = draws(policy)

    def gradient(old: EnumerablePolicy | None = None, **options: object) -> Tensor:
        sampled = draws(old or policy)
        record = record_of(policy, sampled.index_B, zeros(sampled), old=old, reference=reference)
        return policy.gradient(expected_loss(create_loss(entry, **options), record, sampled))

    theirs = reference.distributions().detach()
    forward = policy.gradient(visited(policy, token_kl(policy.distributions(), theirs)))
    backward = policy.gradient(visited(policy, token_kl(theirs, policy.distributions())))
    whole = policy.gradient(kl(policy, reference))

    record = record_of(policy, drawn.index_B, zeros(drawn), reference=reference)
    for name in ("k1", "k3"):
        value = expected_loss(create_loss(entry, estimator=name), record, drawn).item()
        claim = f"{name}: summed over the completion, its mean is KL(π ‖ ref) of whole responses"
        yield Finding(entry, "expectation", claim, abs(value - nats(policy, reference)), EXACT)
    size = float(gradient(estimator="k1").norm() / forward.norm())
    yield Finding(entry, "gradient", "k1: its mean gradient is 0", size, EXACT)
    words = "at the prefixes that the policy now visits"
    claim = f"k2: its mean gradient is that of KL(π ‖ ref) {words}"
    yield Finding(entry, "gradient", claim, difference(gradient(estimator="k2"), forward), EXACT)
    claim = f"k3 (the default): its mean gradient is that of KL(ref ‖ π) {words}"
    yield Finding(entry, "gradient", claim, difference(gradient(estimator="k3"), backward), EXACT)
    for name in ("k1", "k3"):
        found = gradient(estimator=name, importance=True)
        claim = f"{name}, importance=True: its mean gradient is that of KL(π ‖ ref) {words}"
        yield Finding(entry, "gradient", claim, difference(found, forward), EXACT)
    for name in ("k1_straight", "k3_straight"):
        claim = f"{name}: its mean gradient is that of KL(π ‖ ref) {words}"
        yield Finding(entry, "gradient", claim, difference(gradient(estimator=name), forward), EXACT)
    found = gradient(estimator="k3", importance=True, level="sequence")
    yield bias(entry, f"k3, importance=True, level='sequence', against KL(π ‖ ref) {words}", found, forward)
    yield bias(entry, "k3 (the default), against KL(π ‖ ref) of whole responses", gradient(estimator="k3"), whole)
    yield bias(
        entry, "k2, against KL(π ‖ ref) of whole responses (prefixes yet to come are not reached)",
        gradient(estimator="k2"), whole,
    )  # fmt: skip
    old = moved(policy, 0.3, seed=3)
    far = f"sampled from a policy {nats(old, policy):.2f} nats away"
    yield bias(entry, f"k3, {far}", gradient(old, estimator="k3"), backward)
    yield bias(entry, f"k3, importance=True, {far}", gradient(old, estimator="k3", importance=True), forward)

    policy, reference = two_policies()
    old = moved(policy, 0.3, seed=3)
    forward = policy.gradient(kl(policy, reference))
    for name in ("k1", "k3"):
        found = gradient(old, estimator=name, importance=True)
        claim = f"{name}, importance=True, completions of one token from another policy: the gradient of KL(π ‖ ref)"
        yield Finding(entry, "gradient", claim, difference(found, forward), EXACT)
