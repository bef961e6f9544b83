"""Imports every module that registers a loss: the provider of the registry ``LOSSES``."""

from prefzoo.losses import likelihood, pairwise, policy_gradient, reward, unpaired, value

__all__ = ["likelihood", "pairwise", "policy_gradient", "reward", "unpaired", "value"]
