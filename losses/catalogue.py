"""Imports every module that registers a loss or a modifier: the provider of both registries."""

from prefzoo.losses import (
    advantages,
    distribution,
    kl,
    likelihood,
    modifiers,
    offline,
    pairwise,
    pairwise_sides,
    policy_gradient,
    policy_modifiers,
    policy_sequence,
    ranked,
    reward,
    unpaired,
    value,
)

__all__ = [
    "advantages",
    "distribution",
    "kl",
    "likelihood",
    "modifiers",
    "offline",
    "pairwise",
    "pairwise_sides",
    "policy_gradient",
    "policy_modifiers",
    "policy_sequence",
    "ranked",
    "reward",
    "unpaired",
    "value",
]
