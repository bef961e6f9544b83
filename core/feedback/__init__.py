"""Reward sources: functions with TRL's signature, verifiers by name, reward models."""

from prefzoo.feedback.rewards import FunctionReward, ModelReward, RewardSource, resolve_reward
from prefzoo.feedback.verifiers import VERIFIERS, exact, numeric

__all__ = ["VERIFIERS", "FunctionReward", "ModelReward", "RewardSource", "exact", "numeric", "resolve_reward"]
