"""Rollouts: completions sampled from a policy, with the log-probabilities of the distribution sampled from."""

from prefzoo.rollout.loop import CacheEngine, Finish, LoopEngine, Sampling, rollout_engine

__all__ = ["CacheEngine", "Finish", "LoopEngine", "Sampling", "rollout_engine"]
