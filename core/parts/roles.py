"""What parts may ask of the shared layer while a run is under way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from prefzoo.data.samples import Samples
from prefzoo.rollout import Sampling

POLICY, REFERENCE, REWARD, CRITIC = "policy", "reference", "reward", "critic"
TEACHER, HEADS = "teacher", "heads"


def critic_of_role(role: str) -> str | None:
    """The name of a critic: ``""`` of ``"critic"``, ``"cost"`` of ``"critic:cost"``; None of another role."""
    family, _, name = role.partition(":")
    return name if family == CRITIC else None


def of_critic(field: str, name: str) -> str:
    """A token column of a critic: ``"values"``, or ``"values:cost"``."""
    return f"{field}:{name}" if name else field


class Roles(Protocol):
    """The models of a run. Token results are flat (C,), in the order of the samples' completions; no gradient."""

    def policy_logps(self, samples: Samples) -> Tensor: ...

    def policy_entropy(self, samples: Samples) -> Tensor: ...

    def reference_logps(self, samples: Samples) -> Tensor: ...

    def teacher_logps(self, samples: Samples) -> Tensor: ...

    def values(self, samples: Samples, critic: str = "") -> Tensor: ...

    def rewards(self, samples: Samples) -> Tensor:
        """One score per completion (B,); NaN where the reward function said None."""
        ...

    def objectives(self, samples: Samples) -> Tensor:
        """The scores of each of several rewards, (B, K)."""
        ...

    @property
    def compares(self) -> bool:
        """Whether the run's reward is a judge: its scores are chances against the other answers to the prompt."""
        ...

    def note(self, name: str, values: Tensor) -> None:
        """Log the mean of these values, under this name, with the metrics of the step."""
        ...

    def prompts(self, samples: Samples) -> Sequence[Any]:
        """The prompt of every completion as the data has it: text or messages."""
        ...

    def texts(self, samples: Samples) -> list[str]:
        """The completions as text."""
        ...

    step: int
    """Steps of the stage that are done."""

    @property
    def bos(self) -> int | None:
        """The tokenizer's BOS token."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, without special tokens."""
        ...

    def write(self, prompts: Sequence[Any], sampling: Sampling, purpose: str, by: str = "policy") -> Samples:
        """One completion to each of these prompts, text or messages, by the policy, the reference or the teacher; an
        empty one where the prompt leaves no room for it in the model's positions."""
        ...

    def answers(self, prompts: Sequence[Any], texts: Sequence[str | None]) -> Samples:
        """These texts as completions of these prompts, ended as demonstrations are; None and "" become empty ones."""
        ...
