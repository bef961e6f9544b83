"""Records: what a loss function is given. One frozen dataclass per family; its type *is* the family.

Legend, everywhere: **B** rows, **T** response tokens, **P** prompts, **G** samples per prompt (B = P * G), **K** ranked
completions, **N** tokens of a packed batch, **C** completion tokens of a packed batch. A suffix is a shape:
``logps_BT`` is (B, T). Log-probabilities are natural logarithms; cells outside a mask may hold anything.

A leaf module: it imports torch and the registry's errors only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prefzoo.registry import UsageError


def masked_sum(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over the masked cells of each row, (B,). What stands outside the mask cannot reach the result."""
    return torch.where(mask_BT, values_BT, 0.0).sum(-1)


def masked_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the masked cells of each row, (B,); 0 for a row without any."""
    return masked_sum(values_BT, mask_BT) / mask_BT.sum(-1).clamp(min=1)


@dataclass(frozen=True)
class Record:
    """Base of the families: checks the shapes that the field names promise."""

    def __post_init__(self) -> None:
        sizes: dict[str, tuple[int, str]] = {}
        for name, value in self.tensors().items():
            axes = name.rpartition("_")[2] if "_" in name and name.rpartition("_")[2].isupper() else ""
            if value.dim() != len(axes):
                raise UsageError(
                    f"{type(self).__name__}.{name}: expected {len(axes)} dimensions ({axes or 'a scalar'}), "
                    f"got shape {tuple(value.shape)}."
                )
            for axis, size in zip(axes, value.shape, strict=True):
                axis = self._axis(name, axis)
                known, first = sizes.setdefault(axis, (size, name))
                if known != size:
                    raise UsageError(
                        f"{type(self).__name__}: {name} has shape {tuple(value.shape)} but {first} has "
                        f"{tuple(getattr(self, first).shape)}; their axis {axis[0]} must agree."
                    )

    def _axis(self, name: str, axis: str) -> str:
        """The two sides of a pair may be padded to different lengths: their T are different axes."""
        if axis == "T":
            return "T of rejected" if "rejected" in name else "T of chosen" if "chosen" in name else "T"
        return axis

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are present."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Pairs(Record):
    """Pairwise: token log-probabilities of a chosen and a rejected completion of one prompt.

    ``margin_B``: by how much the chosen side is better (reward units). ``weight_B``: weight of the pair.
    """

    chosen_logps_BT: Tensor
    rejected_logps_BT: Tensor
    chosen_mask_BT: Tensor
    rejected_mask_BT: Tensor
    ref_chosen_logps_BT: Tensor | None = None
    ref_rejected_logps_BT: Tensor | None = None
    margin_B: Tensor | None = None
    weight_B: Tensor | None = None

    @property
    def chosen_B(self) -> Tensor:
        """Summed log-probability of the chosen completion."""
        return masked_sum(self.chosen_logps_BT, self.chosen_mask_BT)

    @property
    def rejected_B(self) -> Tensor:
        return masked_sum(self.rejected_logps_BT, self.rejected_mask_BT)

    @property
    def chosen_len_B(self) -> Tensor:
        return self.chosen_mask_BT.sum(-1)

    @property
    def rejected_len_B(self) -> Tensor:
        return self.rejected_mask_BT.sum(-1)

    @property
    def chosen_ratio_B(self) -> Tensor:
        """Log-ratio of policy to reference of the chosen completion, summed over its tokens."""
        return self.chosen_B - masked_sum(_required(self.ref_chosen_logps_BT, "reference"), self.chosen_mask_BT)

    @property
    def rejected_ratio_B(self) -> Tensor:
        return self.rejected_B - masked_sum(_required(self.ref_rejected_logps_BT, "reference"), self.rejected_mask_BT)


@dataclass(frozen=True, kw_only=True)
class Unpaired(Record):
    """Unpaired: single completions, each labelled desirable or not.

    ``baseline``: scalar KTO reference point z0 in nats, estimated outside the loss, detached.
    """

    logps_BT: Tensor
    mask_BT: Tensor
    desirable_B: Tensor
    ref_logps_BT: Tensor | None = None
    baseline: Tensor | None = None
    weight_B: Tensor | None = None

    @property
    def ratio_B(self) -> Tensor:
        """Log-ratio of policy to reference, summed over the tokens."""
        return masked_sum(self.logps_BT - _required(self.ref_logps_BT, "reference"), self.mask_BT)


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Record):
    """Policy gradient: sampled completions with an advantage for every token.

    ``old_logps_BT``: log-probabilities under the policy that sampled them. Advantages carry no gradient.
    """

    logps_BT: Tensor
    mask_BT: Tensor
    old_logps_BT: Tensor
    advantages_BT: Tensor
    ref_logps_BT: Tensor | None = None
    entropy_BT: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Likelihood(Record):
    """Likelihood: completions to be made likelier."""

    logps_BT: Tensor
    mask_BT: Tensor
    weight_B: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Scores(Record):
    """Score: scalar rewards of a chosen and a rejected completion of one prompt.

    ``probability_B``: probability that the first is better (soft label), 1 where absent.
    """

    chosen_B: Tensor
    rejected_B: Tensor
    margin_B: Tensor | None = None
    probability_B: Tensor | None = None
    weight_B: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Values(Record):
    """Value: a critic's prediction at every token, and the return it should predict."""

    values_BT: Tensor
    mask_BT: Tensor
    old_values_BT: Tensor
    returns_BT: Tensor


@dataclass(frozen=True)
class LossOut:
    """What a loss function returns: one value per row (B,) or token (B, T), never reduced, and detached metrics.

    The engine weights, masks and divides: ``count`` of the term says by what. Metrics have the leading shape of the
    loss and are averaged over rows (B,) or masked tokens (B, T) for the log.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


FAMILIES: tuple[type[Record], ...] = (Pairs, Unpaired, PolicyGradient, Likelihood, Scores, Values)


def _required(value: Tensor | None, what: str) -> Tensor:
    """The log-probabilities of a frozen model: present, and without gradient."""
    if value is None:
        raise UsageError(f"this loss needs {what} log-probabilities, but the record holds none.")
    return value.detach()
