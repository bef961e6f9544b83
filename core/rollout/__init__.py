"""Rollouts: completions sampled from a policy, with the log-probabilities of the distribution sampled from."""

from prefzoo.rollout.loop import Finish, LoopEngine, Sampling

__all__ = ["Finish", "LoopEngine", "Sampling"]
