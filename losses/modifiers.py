"""Modifiers: what changes many losses alike, each a function around the loss, ``modifier(loss, batch, *, option=off)``.

Their options belong to every loss that they apply to: ``create_loss("dpo", label_smoothing=0.1)``. From outside in:

1. ``wpo`` weights a pair with everything that is learned from it, and reads the log-probabilities as they are.
2. ``nll`` adds the likelihood of the completion that the label calls chosen: flipped labels, weights of tokens and the
   divergence are matters of the comparison, not of this term.
3. ``label_smoothing`` exchanges the sides of the whole comparison.
4. ``length_desensitised`` weights tokens, before they are summed to log-ratios.
5. ``divergence`` replaces these log-ratios, which the loss then reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefzoo.losses.base import Loss, LossEntry, register_modifier
from prefzoo.losses.numerics import deformed, exponent_limit, masked, safe_exp
from prefzoo.records import LossOut, Pairs, masked_mean
from prefzoo.registry import NotNegative, Share, UsageError

PairLoss = Callable[[Pairs], LossOut]


def _of_tokens(entry: LossEntry) -> str | None:
    """Why what weights or compares pairs does not apply to a loss of tokens."""
    of_tokens = entry.tags["count"] == "token"
    return "it has one value per token of the chosen completion, not one per pair" if of_tokens else None


def _couples_rows(entry: LossEntry) -> str | None:
    whole = entry.tags["whole_batch"]
    return "it couples the pairs of a batch, so that no value belongs to one of them" if whole else None


# -- weights of pairs -------------------------------------------------------------------------------------------------


@register_modifier(
    paper="arXiv:2406.11827",
    order=10,
    extras=("chosen_log_sq_BT", "rejected_log_sq_BT"),
    refuses=lambda entry: _of_tokens(entry) or _couples_rows(entry),
    exceptions=dict.fromkeys(("reference_shift", "side_shift"), "the weight reads the policy's own probabilities"),
)
def wpo(loss: PairLoss, batch: Pairs, *, wpo: bool = False) -> LossOut:
    """Weighted preference optimization: a pair counts by how likely the policy itself would have written it.

        loss' = w(y_w) w(y_l) loss(y_w, y_l)        w(y) = exp(mean over t of (log p_t - log Σ_v p_t(v)²))

    Args:
        loss: any pairwise loss with one value per pair.
        batch: its pairs, with ``chosen_log_sq_BT`` and ``rejected_log_sq_BT``, log Σ_v p(v)² at each token.
        wpo: whether the pairs are weighted.

    Returns:
        The weighted loss, (B,); no gradient flows through the weight. Metrics of the loss, and ``wpo/weight``, (B,).

    Convention: the paper's sampled alignment, a token's probability over its expectation Σ p² under the policy, so that
    this quotient is 1 on average for tokens which the policy samples itself. The weight may exceed 1, as in TRL 1.16
    (``use_weighting``); older releases cap it at 1. TRL fails in its backward pass for ``hinge``; here every loss of
    pairs takes it. Losses that sort the batch have no weight per pair and refuse it.

    Known failure: training makes the completions of the data unlikely, often both sides, and so shrinks the gradient of
    every pair. ``wpo/weight`` shows it.

    Source: Zhou et al., WPO: Enhancing RLHF with Weighted Preference Optimization, arXiv:2406.11827.

    >>> x_BT, mask_BT = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=x_BT, rejected_logps_BT=x_BT, chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT,
    ...     chosen_log_sq_BT=x_BT, rejected_log_sq_BT=x_BT + 0.5)
    >>> wpo(lambda pairs: LossOut(torch.ones(1)), batch, wpo=True).loss  # exp(0) * exp(-0.5)
    tensor([0.6065])
    """
    weight_B = pair_weight(batch)
    out = loss(batch)
    return LossOut(weight_B * out.loss, {**out.metrics, "wpo/weight": weight_B})


@torch.no_grad()
def pair_weight(batch: Pairs) -> Tensor:
    """WPO's weight of each pair, (B,): the product of those of its sides, a constant."""
    log_weight_B = torch.zeros_like(batch.chosen_B)
    for side in ("chosen", "rejected"):
        log_sq_BT = getattr(batch, f"{side}_log_sq_BT")
        if log_sq_BT is None:
            raise UsageError(f"wpo=True needs {side}_log_sq_BT, the log of Σ p² at every token; the record has none.")
        logps_BT, mask_BT = getattr(batch, f"{side}_logps_BT"), getattr(batch, f"{side}_mask_BT")
        log_weight_B = log_weight_B + masked_mean(logps_BT - log_sq_BT, mask_BT)
    return safe_exp(log_weight_B)


# -- likelihood -------------------------------------------------------------------------------------------------------


@register_modifier(
    paper="arXiv:2404.19733",
    order=20,
    refuses=_of_tokens,
    exceptions=dict.fromkeys(
        ("reference_shift", "side_shift", "swap"), "the likelihood term reads the chosen side alone"
    ),
)
def nll(loss: PairLoss, batch: Pairs, *, nll: NotNegative = 0.0) -> LossOut:
    """A likelihood term: the mean token NLL of the chosen completion is added to the loss of the pair.

        loss' = loss + nll * (-(1/n_w) Σ_t log p_t(y_w))

    Args:
        loss: any pairwise loss with one value per pair.
        batch: its pairs.
        nll: weight of the term, 0 (off) or more.

    Returns:
        Loss of the pair plus the term, (B,), in nats per token. Metrics of the loss, and ``nll``, (B,), unweighted.

    Convention: divided by each completion's own length, as in iterative RPO. TRL's ``sft`` part of a mixture is a mean
    over the tokens of the batch, in which long completions weigh more: that is a term of its own, ``chosen_nll`` with
    count ``token``. Losses that have an option of this name say themselves which likelihood it is.

    Known failure: a weight far above 1 turns the training into supervised learning of the chosen completions.

    Source: Pang et al., Iterative Reasoning Preference Optimization, arXiv:2404.19733, equation 1.

    >>> x_BT, mask_BT = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]])
    >>> batch = Pairs(chosen_logps_BT=x_BT, rejected_logps_BT=x_BT, chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> nll(lambda pairs: LossOut(torch.ones(1)), batch, nll=0.1).loss  # 1 + 0.1 * 1.5
    tensor([1.1500])
    """
    out, nll_B = loss(batch), mean_nll(batch)
    return LossOut(out.loss + nll * nll_B, {**out.metrics, "nll": nll_B.detach()})


def mean_nll(batch: Pairs) -> Tensor:
    """Mean token NLL of each chosen completion, (B,), in nats per token; 0 for one without tokens."""
    return -masked_mean(batch.chosen_logps_BT, batch.chosen_mask_BT)


# -- labels -----------------------------------------------------------------------------------------------------------


@register_modifier(
    order=30,
    refuses=_of_tokens,
    exceptions={"prefers_chosen": "beyond the margin at which the two readings balance, a pair is pulled back"},
)
def label_smoothing(loss: PairLoss, batch: Pairs, *, label_smoothing: Share = 0.0) -> LossOut:
    """Label smoothing: a share ε of the labels is taken to be flipped, and the loss is the mean over both readings.

        loss' = (1 - ε) loss(y_w, y_l) + ε loss(y_l, y_w)

    Args:
        loss: any pairwise loss with one value per pair.
        batch: its pairs.
        label_smoothing: ε, from 0 (off) to 1. Of ``dpo`` it makes conservative DPO (``cdpo``).

    Returns:
        The smoothed loss, (B,). Metrics of the labels as given.

    Convention: TRL 1.16 takes ``label_smoothing`` for ``sigmoid`` without reading it; here it is read by every pairwise
    loss, except those that have an option of that name with another meaning. The whole loss is smoothed: a likelihood
    term inside it (``cpo``, ``orpo``) is then in part that of the rejected completion. TRL smooths the comparison only:
    switch the term inside off, ``nll=0``, and add a term ``chosen_nll``.

    Known failure: with ε the loss has its minimum at a margin of log((1 - ε) / ε) (of ``dpo``, in reward units), so
    pairs beyond it are pulled back, also those whose labels are right.

    Source: Mitchell, A note on DPO with noisy preferences, 2023.

    >>> x_BT, mask_BT = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=x_BT, rejected_logps_BT=2 * x_BT, chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> label_smoothing(lambda pairs: LossOut(-pairs.chosen_B), batch, label_smoothing=0.1).loss  # 0.9 * 3 + 0.1 * 6
    tensor([3.3000])
    """
    out, flipped = loss(batch), loss(batch.swapped())
    return LossOut((1 - label_smoothing) * out.loss + label_smoothing * flipped.loss, out.metrics)


# -- log-ratios -------------------------------------------------------------------------------------------------------


def _no_desensitised_form(entry: LossEntry) -> str | None:
    if "nll" in entry.own_options:
        return "its likelihood term would be desensitised too"
    token_fields = [name for name in Loss(entry).extras if name.endswith("_BT")]
    if token_fields:
        return f"it reads tokens by {token_fields[0]} as well, for which the method has no weights"
    return None


@register_modifier(paper="arXiv:2409.06411", order=40, reference=True, refuses=_no_desensitised_form)
def length_desensitised(loss: PairLoss, batch: Pairs, *, ld_alpha: Share = 1.0) -> LossOut:
    """Length desensitisation (LD-DPO): tokens beyond the length of the shorter completion count by a share.

        log p'(y) = Σ_{t ≤ l} log p_t + α Σ_{t > l} log p_t,   l = min(n_w, n_l),   of policy and reference alike

    Args:
        loss: a pairwise loss that reads log-probabilities of both sides.
        batch: its pairs.
        ld_alpha: α, the share of the tokens beyond, from 0 (they have no effect) to 1 (off).

    Returns:
        The loss of the weighted log-probabilities, (B,). Metrics too are those of the weighted ones.

    Convention: tokens are counted inside the mask, so holes (tool output) do not use up length. A loss that divides by
    the lengths (``ipo``) divides by the full ones, as in TRL (``ld_alpha``). With a divergence the weighted log-ratio
    takes the place of the log-ratio.

    Known failure: it removes what length itself gains, not a preference of the labels for longer answers in their first
    tokens; with α near 0 the end of a long answer, its EOS included, is not trained at all.

    Source: Liu et al., Length Desensitization in Direct Preference Optimization, arXiv:2409.06411.

    >>> x_BT, mask_BT = torch.tensor([[-1.0, -2.0, -4.0]]), torch.tensor([[True, True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=x_BT, ref_chosen_logps_BT=0 * x_BT, chosen_mask_BT=mask_BT,
    ...     rejected_logps_BT=x_BT, ref_rejected_logps_BT=0 * x_BT, rejected_mask_BT=mask_BT & (x_BT > -3))
    >>> length_desensitised(lambda pairs: LossOut(pairs.chosen_ratio_B), batch, ld_alpha=0.5).loss  # -1 - 2 - 0.5 * 4
    tensor([-5.])
    """
    length_B = torch.minimum(batch.chosen_len_B, batch.rejected_len_B)
    weighted: dict[str, Tensor] = {}
    for side in ("chosen", "rejected"):
        mask_BT = getattr(batch, f"{side}_mask_BT")
        beyond_BT = mask_BT.cumsum(-1) > length_B[:, None]
        for name in (f"{side}_logps_BT", f"ref_{side}_logps_BT"):
            logps_BT = getattr(batch, name)
            if logps_BT is not None:
                logps_BT = masked(logps_BT, mask_BT)
                weighted[name] = torch.where(beyond_BT, ld_alpha * logps_BT, logps_BT)
    return loss(dataclasses.replace(batch, **weighted))


Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


@register_modifier(
    paper="arXiv:2309.16240",
    order=50,
    reference=True,
    exceptions={
        "side_shift": "the score is not linear in the log-ratio",
        "options_have_effect": "the two conventions of alpha agree at its default, 0.5",
    },
    refuses=lambda entry: None if entry.tags["divergence"] else (
        "it does not know the two log-ratios through a difference, in which the constant of the divergence would cancel"
    ),
)  # fmt: skip
def divergence(
    loss: PairLoss,
    batch: Pairs,
    *,
    divergence: Divergence = "reverse_kl",
    divergence_alpha: float = 0.5,
    alpha_convention: Literal["paper", "trl"] = "paper",
) -> LossOut:
    """Another divergence to the reference (f-DPO): f'(π/ref) takes the place of log π/ref.

        reverse_kl   s            forward_kl   1 - exp(-s)            s = log π(y)/ref(y), summed over tokens
        js           log 2σ(s)    alpha        (1 - exp(-α s)) / α

    Args:
        loss: a pairwise loss that knows the log-ratios through their difference.
        batch: its pairs.
        divergence: ``reverse_kl`` (off), ``forward_kl``, ``js`` (Jensen-Shannon) or ``alpha``.
        divergence_alpha: α of ``alpha``, and only of it. 0 is the reverse KL, 1 the forward KL, as limits.
        alpha_convention: ``paper`` as above, or ``trl``: TRL's ``f_alpha_divergence_coef`` is 1 - α.

    Returns:
        The loss of the pairs with these scores, (B,). Metrics: rewards are beta times the score.

    Convention: every score is 0 at π = ref; the constant that this takes from f' cancels in a difference. Losses that
    divide each side by its length (``ipo``, ``dpo_norm``) see it, and have it as in TRL, f'(1) = 0. The slope at
    π = ref is 1, of ``js`` 1/2. The two conventions of α agree at 0.5. The exponent is clamped where the square of
    ``exp`` would overflow (40 in float32 and bfloat16, 350 in float64), since some losses square the score; beyond, a
    completion has no gradient. TRL clamps that of ``alpha`` at 80, and no other.

    Known failure: forward KL and α > 0 give a completion that the policy has made unlikely, which is what training does
    to the rejected one, a gradient that grows like exp(-α s): few pairs then rule the batch. Jensen-Shannon gives a
    completion that the policy has made likelier than the reference a gradient that vanishes like exp(-s).

    Source: Wang et al., Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
    Constraints, arXiv:2309.16240, table 1.

    >>> x_BT, mask_BT = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=x_BT, ref_chosen_logps_BT=x_BT - 0.5, chosen_mask_BT=mask_BT,
    ...     rejected_logps_BT=x_BT, ref_rejected_logps_BT=x_BT, rejected_mask_BT=mask_BT)
    >>> divergence(lambda pairs: LossOut(pairs.chosen_ratio_B), batch, divergence="forward_kl").loss  # 1 - 1/e
    tensor([0.6321])
    """
    if divergence != "alpha" and (divergence_alpha != 0.5 or alpha_convention != "paper"):
        name = "divergence_alpha" if divergence_alpha != 0.5 else "alpha_convention"
        raise UsageError(
            f"{name} has no effect with divergence={divergence!r}: leave it out, or say divergence='alpha'."
        )
    alpha = divergence_alpha if alpha_convention == "paper" else 1 - divergence_alpha
    return loss(ScoredPairs.of(batch, divergence, alpha))


@dataclass(frozen=True, kw_only=True)
class ScoredPairs(Pairs):
    """Pairs whose log-ratios are replaced by the scores of a divergence; all else is as it was."""

    chosen_score_B: Tensor
    rejected_score_B: Tensor

    @classmethod
    def of(cls, batch: Pairs, divergence: Divergence, alpha: float) -> ScoredPairs:
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(Pairs)}
        return cls(
            **fields,
            chosen_score_B=divergence_score(batch.chosen_ratio_B, divergence, alpha),
            rejected_score_B=divergence_score(batch.rejected_ratio_B, divergence, alpha),
        )

    @property
    def chosen_ratio_B(self) -> Tensor:
        return self.chosen_score_B

    @property
    def rejected_ratio_B(self) -> Tensor:
        return self.rejected_score_B


def divergence_score(ratio_B: Tensor, divergence: Divergence, alpha: float = 0.5) -> Tensor:
    """f'(π/ref) as a function of log π/ref, up to a constant that makes it 0 at 0.

    >>> x_B = torch.tensor([0.0, 1.0])
    >>> [[round(v, 3) for v in divergence_score(x_B, d).tolist()] for d in ("reverse_kl", "forward_kl", "js", "alpha")]
    [[0.0, 1.0], [0.0, 0.632], [0.0, 0.38], [0.0, 0.787]]
    """
    if divergence == "js":
        return F.logsigmoid(ratio_B) - F.logsigmoid(torch.zeros_like(ratio_B))
    powers = {"reverse_kl": 0.0, "forward_kl": 1.0, "alpha": alpha}
    if divergence not in powers:
        raise UsageError(f"divergence={divergence!r} is not known: reverse_kl, forward_kl, js, alpha.")
    return deformed(ratio_B, powers[divergence], limit=exponent_limit(ratio_B.dtype) / 2)
