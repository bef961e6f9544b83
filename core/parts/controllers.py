"""Controllers: scalars of an algorithm that adapt to what was measured, checkpointed with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from prefzoo.registry import UsageError


class Controller(Protocol):
    """What the engine asks of a scalar that adapts.

    ``follows``: what is measured, ``"kl"``, ``"reward"``, ``"entropy"``, ``"length"`` or ``"objective:0"`` (the first
    of several rewards), over all completions of a rollout step. ``update`` gets its mean and their number, after the
    credit: a batch moves the value of the next one.
    """

    value: float

    @property
    def follows(self) -> str: ...

    def update(self, mean: float, n: int, /) -> None: ...

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: Mapping[str, float]) -> None: ...


class FixedKL:
    """A coefficient that stays.

    >>> controller = FixedKL(0.05)
    >>> controller.update(kl=100.0, n=64)
    >>> controller.value
    0.05
    """

    follows = "kl"

    def __init__(self, value: float = 0.05) -> None:
        self.value = value

    def update(self, kl: float, n: int) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.value = float(state["value"])


class AdaptiveKL:
    """A coefficient that steers the KL to a target.

        value ← value (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon)

    Args:
        init: the first value, in reward units per nat.
        target: the KL to reach, in nats per completion (the same unit as ``update`` is given).
        horizon: in completions; larger is slower.

    ``update(kl, n)``: the mean KL measured over the n completions of the batch.

    Source: Ziegler et al., Fine-Tuning Language Models from Human Preferences, arXiv:1909.08593, section 2.2.

    >>> controller = AdaptiveKL(0.2, target=6.0, horizon=10_000)
    >>> controller.update(kl=3.0, n=256)
    >>> round(controller.value, 6)
    0.198976
    """

    follows = "kl"

    def __init__(self, init: float = 0.2, target: float = 6.0, horizon: int = 10_000) -> None:
        if target <= 0 or horizon <= 0:
            raise UsageError(f"AdaptiveKL: target and horizon must be positive, got {target} and {horizon}.")
        self.value = init
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, n: int) -> None:
        """Move the value after a batch of n completions whose mean KL was ``kl``."""
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.value *= 1.0 + error * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.value = float(state["value"])
