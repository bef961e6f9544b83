"""Records: what a loss function is given. One frozen dataclass per family; its type *is* the family.

Legend, everywhere: **B** rows, **T** response tokens, **P** prompts, **G** samples per prompt (B = P * G), **K** ranked
completions, **V** entries of the vocabulary, **N** tokens of a packed batch, **C** completion tokens of a packed batch.
A suffix is a shape: ``logps_BT`` is (B, T). Log-probabilities are natural logarithms; cells outside a mask may hold
anything.

A leaf module: it imports torch and the registry's errors only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

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

    per_token: ClassVar[bool] = False  # whether losses of this family are means over tokens, unless they say otherwise

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
        """The sides of a pair may be padded to different lengths: their T are different axes."""
        side = side_of(name)
        return f"T of {side}" if axis == "T" and side else axis

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are present."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in found.items() if value is not None}

    @property
    def weights(self) -> Tensor | None:
        """The weights of its rows, where it has them."""
        tensors = self.tensors()
        return tensors.get("weight_B", tensors.get("weight_P"))

    @property
    def loss_mask_BT(self) -> Tensor | None:
        """The cells that a token loss of this family lives on; of pairs those of the chosen side."""
        tensors = self.tensors()
        return tensors.get("mask_BT", tensors.get("chosen_mask_BT"))


SIDES = ("chosen", "rejected", "prompt", "gold")


def side_of(name: str) -> str | None:
    """The side of a pair that a field belongs to.

    >>> side_of("ref_chosen_logps_BT"), side_of("margin_B")
    ('chosen', None)
    """
    return next((side for side in SIDES if side in name.split("_")), None)


@dataclass(frozen=True, kw_only=True)
class Pairs(Record):
    """Pairwise: token log-probabilities of a chosen and a rejected completion of one prompt.

    ``margin_B``: by how much the chosen side is better (reward units). ``probability_B``: the probability that it is
    better (a soft label), 1 where absent. ``weight_B``: weight of the pair. What only few losses want: ``*_log_sq_BT``,
    log Σ_v π(v)² of the policy's distribution at each token; ``*_kl_BT``, the exact KL(ref ‖ π) there, in nats, with
    gradient; ``*_step_BT``, the tokens of the step that the label is about; ``prompt_*``, the prompt's own tokens but
    the first; ``gold_*``, a third completion, better than both.
    """

    chosen_logps_BT: Tensor
    rejected_logps_BT: Tensor
    chosen_mask_BT: Tensor
    rejected_mask_BT: Tensor
    ref_chosen_logps_BT: Tensor | None = None
    ref_rejected_logps_BT: Tensor | None = None
    margin_B: Tensor | None = None
    probability_B: Tensor | None = None
    weight_B: Tensor | None = None
    chosen_log_sq_BT: Tensor | None = None
    rejected_log_sq_BT: Tensor | None = None
    chosen_kl_BT: Tensor | None = None
    rejected_kl_BT: Tensor | None = None
    chosen_step_BT: Tensor | None = None
    rejected_step_BT: Tensor | None = None
    prompt_logps_BT: Tensor | None = None
    prompt_mask_BT: Tensor | None = None
    gold_logps_BT: Tensor | None = None
    gold_mask_BT: Tensor | None = None

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
    def ref_chosen_B(self) -> Tensor:
        """Summed log-probability of the chosen completion under the reference."""
        return masked_sum(_required(self.ref_chosen_logps_BT, "reference"), self.chosen_mask_BT)

    @property
    def ref_rejected_B(self) -> Tensor:
        return masked_sum(_required(self.ref_rejected_logps_BT, "reference"), self.rejected_mask_BT)

    @property
    def chosen_ratio_B(self) -> Tensor:
        """Log-ratio of policy to reference of the chosen completion, summed over its tokens."""
        return self.chosen_B - self.ref_chosen_B

    @property
    def rejected_ratio_B(self) -> Tensor:
        return self.rejected_B - self.ref_rejected_B

    def swapped(self) -> Pairs:
        """The same pairs with chosen and rejected exchanged, and so margin and probability."""
        names = [f.name for f in dataclasses.fields(self)]
        other = {"chosen": "rejected", "rejected": "chosen"}
        fields = {n: getattr(self, "_".join(other.get(part, part) for part in n.split("_"))) for n in names}
        fields["margin_B"] = None if self.margin_B is None else -self.margin_B
        fields["probability_B"] = None if self.probability_B is None else 1 - self.probability_B
        return type(self)(**fields)


@dataclass(frozen=True, kw_only=True)
class Unpaired(Record):
    """Unpaired: single completions, each labelled desirable or not.

    ``baseline``: scalar, KTO's reference point z0 in nats; ``delta``: scalar, BCO's shift, in nats too. Both are
    estimated outside the loss and detached.
    """

    logps_BT: Tensor
    mask_BT: Tensor
    desirable_B: Tensor
    ref_logps_BT: Tensor | None = None
    baseline: Tensor | None = None
    delta: Tensor | None = None
    weight_B: Tensor | None = None

    @property
    def ratio_B(self) -> Tensor:
        """Log-ratio of policy to reference, summed over the tokens."""
        return masked_sum(self.logps_BT - _required(self.ref_logps_BT, "reference"), self.mask_BT)


@dataclass(frozen=True, kw_only=True)
class Ranked(Record):
    """Ranked: K completions of one prompt, best first along K.

    ``valid_PK``: which of them are there, where rankings are shorter than K (the invalid ones stand last).
    ``scores_PK``: how good each is, in reward units, where the ranking came from scores. ``weight_P``: weight of a
    list.
    """

    logps_PKT: Tensor
    mask_PKT: Tensor
    valid_PK: Tensor
    ref_logps_PKT: Tensor | None = None
    scores_PK: Tensor | None = None
    weight_P: Tensor | None = None

    @property
    def sum_PK(self) -> Tensor:
        """Summed log-probability of every completion, 0 for one that is not there."""
        return masked_sum(self.logps_PKT, self.mask_PKT & self.valid_PK[..., None])

    @property
    def ratio_PK(self) -> Tensor:
        """Log-ratio of policy to reference, summed over the tokens, 0 for a completion that is not there."""
        return masked_sum(
            self.logps_PKT - _required(self.ref_logps_PKT, "reference"), self.mask_PKT & self.valid_PK[..., None]
        )

    @property
    def len_PK(self) -> Tensor:
        return (self.mask_PKT & self.valid_PK[..., None]).sum(-1)


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Record):
    """Policy gradient: sampled completions with an advantage for every token.

    ``old_logps_BT``: log-probabilities at the start of the update, of the policy that sampled them. Advantages carry no
    gradient. ``sampling_logps_BT``: what the sampler itself reported, where that is another program than the learner's
    model. ``entropy_BT``: of the policy's distribution at each token, in nats, with gradient. ``entropy_floor``:
    scalar, the entropy above which a token counts, estimated over the whole optimizer batch.
    """

    per_token = True

    logps_BT: Tensor
    mask_BT: Tensor
    old_logps_BT: Tensor
    advantages_BT: Tensor
    ref_logps_BT: Tensor | None = None
    sampling_logps_BT: Tensor | None = None
    entropy_BT: Tensor | None = None
    entropy_floor: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Likelihood(Record):
    """Likelihood: completions to be made likelier.

    ``scores_B``: how good each completion is; ``advantages_BT``: what each token deserves; both in reward units,
    without gradient, for losses that weight by them. ``weight_B``: weight of the row.
    """

    per_token = True

    logps_BT: Tensor
    mask_BT: Tensor
    scores_B: Tensor | None = None
    advantages_BT: Tensor | None = None
    weight_B: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Scores(Record):
    """Score: scalar rewards of a chosen and a rejected completion of one prompt.

    ``probability_B``: probability that the first is better (soft label), 1 where absent. ``tie_B``: whether the two
    were called equally good.
    """

    chosen_B: Tensor
    rejected_B: Tensor
    margin_B: Tensor | None = None
    probability_B: Tensor | None = None
    tie_B: Tensor | None = None
    weight_B: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RankedScores(Record):
    """Ranked scores: scalar rewards of K completions of one prompt, best first along K; ``valid_PK``: as ``Ranked``."""

    rewards_PK: Tensor
    valid_PK: Tensor
    weight_P: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Ratings(Record):
    """Rating: the scalar reward of a completion, and the number that people gave it."""

    rewards_B: Tensor
    targets_B: Tensor
    weight_B: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class StepScores(Record):
    """Step scores: the logit that a step is right, read at its last token; ``mask_BT`` marks those tokens.

    ``labels_BT``: the probability that the step is right, 0 or 1 where people said it.
    """

    per_token = True

    scores_BT: Tensor
    labels_BT: Tensor
    mask_BT: Tensor
    weight_B: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Values(Record):
    """Value: a critic's prediction at every token, and the return it should predict."""

    per_token = True

    values_BT: Tensor
    mask_BT: Tensor
    old_values_BT: Tensor
    returns_BT: Tensor


@dataclass(frozen=True, kw_only=True)
class Distribution(Record):
    """Distribution: logits of the policy and of its teacher over the whole vocabulary, at every token."""

    per_token = True

    logits_BTV: Tensor
    teacher_logits_BTV: Tensor
    mask_BT: Tensor


@dataclass(frozen=True, kw_only=True)
class Heads(Record):
    """Heads: what an offline Q-learner reads at every token of a completion.

    ``q1_BT``, ``q2_BT``: the two Q of the token taken; ``q1_lse_BT``, ``q2_lse_BT``: log Σ_v exp Q(v); ``v_BT``: the
    value before the token; ``next_v_BT``: the value after it, 0 after the last; ``target_q_BT``: the smaller of the two
    slow Q; ``rewards_BT``: of the data. No gradient flows through the last three.
    """

    per_token = True

    q1_BT: Tensor
    q2_BT: Tensor
    v_BT: Tensor
    next_v_BT: Tensor
    target_q_BT: Tensor
    rewards_BT: Tensor
    mask_BT: Tensor
    q1_lse_BT: Tensor | None = None
    q2_lse_BT: Tensor | None = None


@dataclass(frozen=True)
class LossOut:
    """What a loss function returns: one value per row (B,) or token (B, T), never reduced, and detached metrics.

    The engine weights, masks and divides: ``count`` of the term says by what. Metrics have the leading shape of the
    loss and are averaged over rows (B,) or masked tokens (B, T) for the log. ``mask_BT``: the cells of a token loss,
    where they are others than the record's (``loss_mask_BT``).
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    mask_BT: Tensor | None = None


FAMILIES: tuple[type[Record], ...] = (
    Pairs, Unpaired, Ranked, PolicyGradient, Likelihood, Scores, RankedScores, Ratings, StepScores, Values,
    Distribution, Heads,
)  # fmt: skip


def _required(value: Tensor | None, what: str) -> Tensor:
    """The log-probabilities of a frozen model: present, and without gradient."""
    if value is None:
        raise UsageError(f"this loss needs {what} log-probabilities, but the record holds none.")
    return value.detach()
