"""Reward sources: functions with TRL's signature, verifiers by name, reward models, judges, ensembles and rules."""

from prefzoo.feedback.calibration import Calibration, calibrate
from prefzoo.feedback.endpoint import Endpoint
from prefzoo.feedback.ensembles import Ensemble, Gate, ensemble, gate
from prefzoo.feedback.judges import Judge, LocalModel, judge
from prefzoo.feedback.process import StepReward, steps
from prefzoo.feedback.rewards import FunctionReward, ModelReward, RewardSource, SumReward, resolve_reward
from prefzoo.feedback.rule_based import Rule, Rules, rules
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
    "VERIFIERS", "Calibration", "Endpoint", "Ensemble", "FunctionReward", "Gate", "Judge", "LocalModel",
    "ModelReward", "RewardSource", "Rule", "Rules", "StepReward", "SumReward", "TextReward", "calibrate",
    "cosine_scaled", "ensemble", "exact", "gate", "judge", "numeric", "repetition_penalty", "resolve_reward", "rules",
    "soft_overlong_punishment", "steps", "think_format",
]  # fmt: skip
