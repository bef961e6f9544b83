"""Sources: where do samples come from?"""

from __future__ import annotations

from dataclasses import dataclass

from prefzoo.data.samples import Kind
from prefzoo.registry import UsageError
from prefzoo.rollout import Sampling


@dataclass(frozen=True)
class DatasetRows:
    """Rows of the training data, converted to this kind; their order is a function of (seed, epoch)."""

    kind: Kind

    @property
    def gives(self) -> str:
        return self.kind

    @property
    def data(self) -> Kind:
        """The kind of rows that the training data must have or become."""
        return self.kind


@dataclass(frozen=True)
class Rollouts:
    """Completions sampled from the policy, ``group_size`` of each prompt."""

    group_size: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise UsageError(f"group_size must be at least 1, got {self.group_size}.")
        if self.temperature <= 0:
            raise UsageError("rollouts need temperature > 0: greedy samples of one prompt are all the same.")

    gives = "rollouts"
    data: Kind = "prompts"

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.max_new_tokens)
