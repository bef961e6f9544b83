"""What parts may ask of the shared layer while a run is under way."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from prefzoo.data.samples import Samples

POLICY, REFERENCE, REWARD, CRITIC = "policy", "reference", "reward", "critic"


class Roles(Protocol):
    """The models of a run. Token results are flat (C,), in the order of the samples' completions; no gradient."""

    def policy_logps(self, samples: Samples) -> Tensor: ...

    def policy_entropy(self, samples: Samples) -> Tensor: ...

    def reference_logps(self, samples: Samples) -> Tensor: ...

    def values(self, samples: Samples) -> Tensor: ...

    def rewards(self, samples: Samples) -> Tensor:
        """One score per completion (B,); NaN where the reward function said None."""
        ...
