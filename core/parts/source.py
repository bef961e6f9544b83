"""Sources: where do samples come from?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefzoo.data.samples import Kind
from prefzoo.parts.roles import REFERENCE, TEACHER
from prefzoo.registry import UsageError
from prefzoo.rollout import Sampling

Writer = Literal["policy", "reference", "teacher", "data"]
_ROLES = {"reference": REFERENCE, "teacher": TEACHER}  # that must be loaded to write


@dataclass(frozen=True)
class DatasetRows:
    """Rows of the training data, converted to this kind; their order is a function of (seed, epoch)."""

    kind: Kind

    needs: frozenset[str] = frozenset()

    @property
    def gives(self) -> str:
        return self.kind

    @property
    def data(self) -> Kind:
        """The kind of rows that the training data must have or become."""
        return self.kind


@dataclass(frozen=True)
class Sampler:
    """Who writes ``count`` completions of each prompt beside the policy's own.

    ``role``: ``"policy"``, ``"reference"``, ``"teacher"``, or ``"data"``, the completion of the prompt's own row.
    ``temperature``: None: that of the source; 0: the likeliest tokens. ``blend``: sample from the geometric mixture
    policy^(1 - blend) reference^blend, normalised at every token.
    """

    role: Writer = "policy"
    count: int = 1
    temperature: float | None = None
    blend: float = 0.0

    def __post_init__(self) -> None:
        if self.count < 1 or (self.role == "data" and self.count > 1):
            raise UsageError(f"sampler {self.role!r}: count is at least 1, and of data just 1; got {self.count}.")
        if self.temperature is not None and self.temperature < 0:
            raise UsageError(f"sampler {self.role!r}: temperature is at least 0, got {self.temperature:g}.")
        if self.temperature == 0 and self.count > 1:
            raise UsageError(f"sampler {self.role!r}: greedy samples of one prompt are all the same; count must be 1.")
        if not 0 <= self.blend < 1:
            raise UsageError(f"sampler {self.role!r}: blend is a share from 0 up to 1, got {self.blend:g}.")
        if self.blend and self.role != "policy":
            raise UsageError(f"sampler {self.role!r}: only the policy is blended with the reference.")

    @property
    def needs(self) -> frozenset[str]:
        wanted = {REFERENCE} if self.blend else set()
        return frozenset(wanted | {_ROLES[r] for r in (self.role,) if r in _ROLES})


@dataclass(frozen=True)
class Rollouts:
    """Completions sampled from the policy, ``group_size`` of each prompt.

    Args:
        group_size: G.
        temperature, top_p, max_new_tokens: sampling.
        by: who writes them: ``"policy"``, ``"reference"`` or ``"teacher"``.
        beside: further samplers of the same prompts. Their completions follow the main ones, prompt by prompt; the
            column ``sampler`` says whose each is: 0 the main one, 1, 2, ... the place in ``beside``.
        share: of the steps that sample; the others take the completions of the data.
        mask_top_p: tokens outside the nucleus of the reference's distribution are not sampled; None: all may be.
    """

    group_size: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128
    by: Writer = "policy"
    beside: tuple[Sampler, ...] = ()
    share: float = 1.0
    mask_top_p: float | None = None

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise UsageError(f"group_size must be at least 1, got {self.group_size}.")
        if self.temperature < 0 or (self.temperature == 0 and self.group_size > 1):
            raise UsageError("rollouts need temperature > 0: greedy samples of one prompt are all the same.")
        if self.by == "data":
            raise UsageError("rollouts are written by a model; completions of the data are DatasetRows('completions').")
        if not 0 <= self.share <= 1:
            raise UsageError(f"share is that of the steps that sample, from 0 to 1; got {self.share:g}.")
        if self.share < 1 and (self.beside or self.group_size > 1):
            raise UsageError("share < 1 mixes steps of one completion per prompt: group_size 1, and nobody beside.")
        if self.mask_top_p is not None and not 0 < self.mask_top_p <= 1:
            raise UsageError(f"mask_top_p is a probability above 0, got {self.mask_top_p:g}.")

    gives = "rollouts"

    @property
    def needs(self) -> frozenset[str]:
        own = {_ROLES[self.by]} if self.by in _ROLES else set()
        masked = {REFERENCE} if self.mask_top_p is not None else set()
        return frozenset(own | masked).union(*(s.needs for s in self.beside))

    @property
    def data(self) -> Kind:
        demonstrated = self.share < 1 or any(s.role == "data" for s in self.beside)
        return "completions" if demonstrated else "prompts"

    @property
    def completions(self) -> int:
        """Of each prompt, all samplers together."""
        return self.group_size + sum(s.count for s in self.beside)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.max_new_tokens)
