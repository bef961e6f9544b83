"""Reward sources: functions with TRL's signature, verifiers by name, reward models."""

from prefzoo.feedback.rewards import FunctionReward, ModelReward, RewardSource, SumReward, resolve_reward
from prefzoo.feedback.text import TextReward
from prefzoo.feedback.verifiers import (
    VERIFIERS,
    cosine_scaled,
    exact,
    numeric,
    repetition_penalty,
    soft_overlong_punishment,
    think_format,
)

__all__ = [
    "VERIFIERS", "FunctionReward", "ModelReward", "RewardSource", "SumReward", "TextReward", "cosine_scaled", "exact",
    "numeric", "repetition_penalty", "resolve_reward", "soft_overlong_punishment", "think_format",
]  # fmt: skip
