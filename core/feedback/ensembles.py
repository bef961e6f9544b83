"""Several reward models as one: ensembles, and Llama 2's gate of safety and helpfulness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from prefzoo.data.samples import Samples
from prefzoo.feedback.rewards import Several
from prefzoo.feedback.sources import SOURCES
from prefzoo.registry import UsageError

Combine = Literal["mean", "minimum", "pessimistic", "optimistic", "product"]
COMBINED = ("mean", "minimum", "pessimistic", "optimistic", "product")


class Ensemble(Several):
    """One score from several members, which disagree most where they know least.

        mean: m = 1/K sum_k r_k      minimum: min_k r_k      product: prod_k r_k
        pessimistic: m - k s         optimistic: m + k s     s^2 = 1/K sum_k (r_k - m)^2

    A completion that one member says nothing about has no score: that of the others would be on another scale.

    Args:
        members: reward models, functions, verifiers or judges, as ``reward=`` takes each.
        combine: see above.
        k: standard deviations that are taken off or put on, for ``pessimistic`` and ``optimistic`` alone.

    Units: those of the members, which must agree. Bradley-Terry leaves zero and unit of a reward model open: train with
    ``centering``, and bring all to one scale with ``prefzoo calibrate``. No KL enters here.

    Convention: the standard deviation divides by K. Coste et al. subtract the *variance*, times a weight; the standard
    deviation is in the units of the reward, as in Eisenstein et al. ``product`` is for members that are probabilities.

    Metrics: ``rewards/<member>/mean`` and ``rewards/<member>/std``, and ``rewards/disagreement``, the mean of s.

    Source: Coste et al., arXiv:2310.02743 (mean, worst case, uncertainty); Eisenstein et al., arXiv:2312.09244.

    Example::

        prefzoo.train("ppo", ..., reward=prefzoo.feedback.Ensemble(["runs/rm1", "runs/rm2"], combine="minimum"))
    """

    def __init__(self, members: Sequence[Any], combine: Combine = "mean", k: float = 1.0) -> None:
        if isinstance(members, str) or not isinstance(members, Sequence) or len(members) < 2:
            raise UsageError("ensemble: give at least two members, each a reward of its own.")
        if combine not in COMBINED:
            raise UsageError(f"ensemble, option 'combine': expected {' or '.join(COMBINED)}, got {combine!r}.")
        if k < 0 or (k != 1.0 and combine not in ("pessimistic", "optimistic")):
            raise UsageError(
                f"ensemble, option 'k': it is the number of standard deviations, at least 0, of combine='pessimistic' "
                f"and 'optimistic'; got {k} with {combine!r}."
            )
        super().__init__(members)
        self.how, self.k = combine, k

    def facts(self) -> dict[str, Any]:
        return {"combine": self.how, "k": self.k}

    def combine(self, scores_KB: Tensor, samples: Samples) -> Tensor:
        mean_B, std_B = scores_KB.mean(0), scores_KB.std(0, correction=0)
        known = std_B[~std_B.isnan()]
        if len(known):
            self._metrics["rewards/disagreement"].append(float(known.mean()))
        if self.how == "minimum":
            return scores_KB.amin(0)
        if self.how == "product":
            return scores_KB.prod(0)
        return mean_B + {"mean": 0.0, "pessimistic": -self.k, "optimistic": self.k}[self.how] * std_B


class Gate(Several):
    """Llama 2's combination of two reward models: safety where it is in doubt, helpfulness elsewhere.

        R_c = R_s where the prompt is marked or R_s < threshold, else R_h
        R   = (logit(R_c) - mean) / std, over all completions of the batch

    Args:
        safety, helpfulness: the two rewards, each as ``reward=`` takes it. R_s and R_h are the probabilities
            sigmoid(score) of reward models, or the scores themselves with ``given="probabilities"``.
        threshold: on the probability, 0.15 in the paper.
        column: a column of the data that is true for prompts that may bring unsafe answers; where the data has none of
            that name, no prompt is marked.
        whiten: the last line above. The mean and standard deviation are those of the completions that are scored
            together (of one process), so that a score depends on its batch, as in the paper.

    Convention: no KL enters here; the paper subtracts beta KL to the start from R. Rewards are logits, so that logit of
    sigmoid is left out. A completion without one of both scores has none.

    Metrics: ``gate/unsafe``, the share of completions that the safety model scores; and those of both.

    Source: Touvron et al., Llama 2, arXiv:2307.09288, section 3.2.3.

    Example::

        prefzoo train ppo ... --reward "gate(runs/safety, runs/helpful, threshold=0.15, column=unsafe)"
    """

    def __init__(
        self, safety: Any, helpfulness: Any, *, threshold: float = 0.15, column: str = "unsafe", whiten: bool = True,
        given: Literal["logits", "probabilities"] = "logits",
    ) -> None:  # fmt: skip
        if not 0 <= threshold <= 1:
            raise UsageError(f"gate, option 'threshold': expected a probability from 0 to 1, got {threshold}.")
        if given not in ("logits", "probabilities"):
            raise UsageError(f"gate, option 'given': expected 'logits' or 'probabilities', got {given!r}.")
        super().__init__([safety, helpfulness])
        self.threshold, self.column, self.whiten, self.given = threshold, column, whiten, given

    def facts(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "column": self.column, "whiten": self.whiten, "given": self.given}

    def combine(self, scores_KB: Tensor, samples: Samples) -> Tensor:
        if self.given == "probabilities":
            known = scores_KB[~scores_KB.isnan()]
            if len(known) and not 0 <= float(known.min()) <= float(known.max()) <= 1:
                raise UsageError("gate: given='probabilities', but a score is not from 0 to 1; leave given out.")
            scores_KB = scores_KB.logit(1e-6)
        safety_B, help_B = scores_KB
        marks = samples.extra.get(self.column)
        marked_B = torch.tensor([marks is not None and self._marked(marks[p]) for p in samples.prompt_B])
        unsafe_B = marked_B | (safety_B.sigmoid() < self.threshold)
        logit_B = torch.where(unsafe_B, safety_B, help_B)
        logit_B = torch.where(scores_KB.isnan().any(0), torch.nan, logit_B)
        known_B = ~logit_B.isnan()
        if known_B.any():
            self._metrics["gate/unsafe"].append(float(unsafe_B[known_B].float().mean()))
        if not self.whiten or int(known_B.sum()) < 2:
            return logit_B
        known = logit_B[known_B]
        return (logit_B - known.mean()) / known.std().clamp(min=1e-8)

    def _marked(self, mark: Any) -> bool:
        if isinstance(mark, str):  # "false" would be true
            raise UsageError(f"gate: column {self.column!r} must hold true or false, got the text {mark[:80]!r}.")
        return bool(mark)


@SOURCES.register
def ensemble(*members: Any, combine: Combine = "mean", k: float = 1.0) -> Ensemble:
    """Several rewards as one: ``ensemble(runs/rm1, runs/rm2, combine=minimum)``. See :class:`Ensemble`."""
    return Ensemble(members, combine, k)


@SOURCES.register
def gate(
    safety: Any, helpfulness: Any, *, threshold: float = 0.15, column: str = "unsafe", whiten: bool = True,
    given: Literal["logits", "probabilities"] = "logits",
) -> Gate:  # fmt: skip
    """Safety where it is in doubt, helpfulness elsewhere: ``gate(runs/safety, runs/helpful)``. See :class:`Gate`."""
    return Gate(safety, helpfulness, threshold=threshold, column=column, whiten=whiten, given=given)
