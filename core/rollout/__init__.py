"""Rollouts: completions sampled from a policy, with the log-probabilities of the distribution sampled from."""

from prefzoo.rollout.loop import (
    CacheEngine,
    Decoder,
    Finish,
    LoopEngine,
    Mixture,
    Next,
    Reader,
    Sampling,
    rollout_engine,
)

__all__ = [
    "CacheEngine", "Decoder", "Finish", "LoopEngine", "Mixture", "Next", "Reader", "Sampling", "rollout_engine",
]  # fmt: skip
