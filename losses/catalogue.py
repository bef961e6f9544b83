"""Imports every module that registers a loss or a modifier: the provider of both registries."""

from prefzoo.losses import likelihood, modifiers, pairwise, policy_gradient, ranked, reward, unpaired, value

__all__ = ["likelihood", "modifiers", "pairwise", "policy_gradient", "ranked", "reward", "unpaired", "value"]
