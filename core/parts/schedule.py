"""Schedules: how often?"""

from __future__ import annotations

from dataclasses import dataclass

from prefzoo.registry import UsageError


@dataclass(frozen=True)
class Schedule:
    """For rollout sources: prompts per step, and how its samples are walked through.

    Each of ``inner_epochs`` passes is cut into ``minibatches`` optimizer steps, or into steps of ``minibatch_rows``.
    For every source: ``steps`` of this stage, where they are not the run's ``max_steps``; ``rate``: times the run's
    learning rate.
    """

    prompts: int = 32
    inner_epochs: int = 1
    minibatches: int = 1
    minibatch_rows: int | None = None
    steps: int | None = None
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.minibatch_rows is not None and self.minibatches != 1:
            raise UsageError("schedule: give minibatches or minibatch_rows, not both.")
        numbers = (self.prompts, self.inner_epochs, self.minibatches, self.minibatch_rows, self.steps)
        if any(n is not None and n < 1 for n in numbers) or self.rate <= 0:
            raise UsageError(f"schedule: all numbers must be at least 1, and rate above 0; got {self}.")
