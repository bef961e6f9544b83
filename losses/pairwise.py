"""Pairwise losses: a chosen and a rejected completion of one prompt, one value per pair.

Notation of the equations: s_w and s_l are the log-ratios log π(y)/ref(y) of the chosen (w) and the rejected (l)
completion, summed over their tokens, the EOS included; n_w and n_l are their numbers of tokens. σ is the logistic
function. The losses that anchor each side by itself stand in ``pairwise_sides``.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefzoo.losses import modifiers
from prefzoo.losses.base import register_loss
from prefzoo.losses.numerics import safe_exp
from prefzoo.records import LossOut, Pairs
from prefzoo.registry import NotNegative, Positive, Share, UsageError

SOFT = "its labels are soft already: the sides exchanged together with their label give the same loss"


@torch.no_grad()
def pair_metrics(batch: Pairs, beta: float) -> dict[str, Tensor]:
    """What TRL logs for pairs, (B,) each: implicit rewards beta * s, their margin, who wins, log-probabilities."""
    return reward_metrics(batch, beta * batch.chosen_ratio_B, beta * batch.rejected_ratio_B)


def reward_metrics(batch: Pairs, chosen_B: Tensor, rejected_B: Tensor) -> dict[str, Tensor]:
    """The metrics of pairs, from the rewards of the two sides; detached."""
    chosen_B, rejected_B = chosen_B.detach(), rejected_B.detach()
    return {
        "rewards/chosen": chosen_B,
        "rewards/rejected": rejected_B,
        "rewards/margins": chosen_B - rejected_B,
        "rewards/accuracies": (chosen_B > rejected_B).to(chosen_B.dtype),
        "logps/chosen": batch.chosen_B.detach(),
        "logps/rejected": batch.rejected_B.detach(),
    }


def contrast(batch: Pairs) -> Tensor:
    """s_w - s_l, (B,), in nats."""
    return batch.chosen_ratio_B - batch.rejected_ratio_B


def contrast_per_token(batch: Pairs) -> Tensor:
    """s_w / n_w - s_l / n_l, (B,), in nats per token; a side without tokens adds nothing."""
    chosen_B = batch.chosen_ratio_B / batch.chosen_len_B.clamp(min=1)
    return chosen_B - batch.rejected_ratio_B / batch.rejected_len_B.clamp(min=1)


def column(values_B: Tensor | None, loss: str, field: str, what: str) -> Tensor:
    """A column of the data that a loss cannot do without; told in words where it is missing."""
    if values_B is None:
        name = field.removesuffix("_B")
        raise UsageError(f"loss {loss!r} needs Pairs.{field}, {what}: give every pair of the data a column {name!r}.")
    return values_B.detach()


@register_loss(paper="arXiv:2305.18290", contrast=True, recommended={"learning_rate": 1e-6})
def dpo(batch: Pairs, *, beta: Positive = 0.1) -> LossOut:
    """Direct preference optimization: a classifier of pairs whose logit is the difference of implicit rewards.

        loss = -log σ(β (s_w - s_l))

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: strength of the pull to the reference, per nat. Smaller moves farther from it.

    Returns:
        One loss per pair, (B,), in nats; log 2 where policy and reference are equal. Metrics (B,): ``rewards/chosen``,
        ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies``, ``logps/chosen``, ``logps/rejected``.

    Convention: log-ratios are sums over tokens, as in the paper and in TRL (``loss_type="sigmoid"``). ``cdpo`` and
    ``robust_dpo`` are for noisy labels; ``margin_B`` is not used (that is ``odpo``). The learning rate, TRL's, suits
    full fine-tuning of models of a billion parameters; tiny models want 1e-4 to 2e-4.

    Known failure: only the difference counts, so the log-probabilities of both completions may fall, the chosen one's
    too. On pairs that always agree nothing bounds the difference, and the pull to the reference is lost.

    Source: Rafailov et al., Direct Preference Optimization, arXiv:2305.18290, equation 7.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> dpo(batch, beta=0.5).loss  # -log σ(0.5 * (2 - 0))
    tensor([0.3133])
    """
    return LossOut(-F.logsigmoid(beta * contrast(batch)), pair_metrics(batch, beta))


@register_loss(paper="arXiv:2305.18290", contrast=True, recommended={"learning_rate": 1e-6})
def cdpo(batch: Pairs, *, beta: Positive = 0.1, label_smoothing: Share = 0.1) -> LossOut:
    """Conservative DPO: a share of the labels is taken to be flipped, so the best difference is finite.

        loss = -(1 - ε) log σ(β (s_w - s_l)) - ε log σ(β (s_l - s_w))

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: strength of the pull to the reference, per nat.
        label_smoothing: ε, the assumed share of flipped labels, from 0 (then it is ``dpo``) to 1.

    Returns:
        One loss per pair, (B,), in nats; least at β (s_w - s_l) = log((1 - ε) / ε). Metrics (B,) as ``dpo``.

    Convention: ``dpo`` with the modifier ``label_smoothing``, by a name and with it switched on. TRL before 0.29 did
    this for ``loss_type="sigmoid"``; TRL 1.16 takes ``label_smoothing`` there without reading it. ``robust_dpo``
    removes the bias that flipped labels cause; this loss does not. The default of ε is ours: the note leaves it open.

    Known failure: biased under label noise, towards less difference: where no label is flipped, it still stops at
    log((1 - ε) / ε). As in ``dpo``, both log-probabilities may fall.

    Source: Mitchell, A note on DPO with noisy preferences and relationship to IPO, 2023; on Rafailov et al.,
    arXiv:2305.18290.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> cdpo(batch, beta=0.5, label_smoothing=0.1).loss  # 0.9 * 0.3133 + 0.1 * 1.3133
    tensor([0.4133])
    """
    return modifiers.label_smoothing(functools.partial(dpo, beta=beta), batch, label_smoothing=label_smoothing)


@register_loss(paper="arXiv:2403.00409", contrast=True, recommended={"learning_rate": 1e-6})
def robust_dpo(batch: Pairs, *, beta: Positive = 0.1, label_smoothing: Share = 0.1) -> LossOut:
    """Robust DPO: its mean over labels flipped with probability ε is DPO's loss on the true labels.

        loss = ((1 - ε) l(z) - ε l(-z)) / (1 - 2 ε)      z = β (s_w - s_l),  l(z) = -log σ(z)

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: strength of the pull to the reference, per nat.
        label_smoothing: ε, the probability that a label is flipped, from 0 (then it is ``dpo``) to below 0.5.

    Returns:
        One loss per pair, (B,), in nats; it can be negative. Metrics (B,) as ``dpo``.

    Convention: TRL's ``loss_type="robust"``, whose ``label_smoothing`` is this ε. Here ε is removed from the loss; in
    ``cdpo`` it is mixed in. TRL's default of 0 would make it ``dpo``; the default here is 0.1.

    Known failure: unbounded below: for z far above 0 it goes on falling as -ε z / (1 - 2 ε), and the variance grows
    with 1 / (1 - 2 ε)², so an ε that is set too high lets the difference run away.

    Source: Chowdhury et al., Provably Robust DPO, arXiv:2403.00409.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> robust_dpo(batch, beta=0.5, label_smoothing=0.1).loss  # (0.9 * 0.3133 - 0.1 * 1.3133) / 0.8
    tensor([0.1883])
    """
    if label_smoothing >= 0.5:
        raise UsageError(
            f"loss 'robust_dpo', option 'label_smoothing': {label_smoothing:g} is not below 0.5. At 0.5 the labels say "
            "nothing, and above it they are better read the other way round: exchange the sides and give "
            f"{1 - label_smoothing:g}."
        )
    z_B = beta * contrast(batch)
    kept_B, flipped_B = -F.logsigmoid(z_B), -F.logsigmoid(-z_B)
    loss_B = ((1 - label_smoothing) * kept_B - label_smoothing * flipped_B) / (1 - 2 * label_smoothing)
    return LossOut(loss_B, pair_metrics(batch, beta))


@register_loss(paper="arXiv:2309.06657", contrast=True, recommended={"learning_rate": 1e-6})
def hinge(batch: Pairs, *, beta: Positive = 0.1) -> LossOut:
    """Hinge loss of log-ratios: pairs that are apart by 1 / β are left alone.

        loss = max(0, 1 - β (s_w - s_l))

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: 1 / β is the wanted difference, in nats per completion.

    Returns:
        One loss per pair, (B,), without a unit; 1 where policy and reference are equal. Metrics (B,) as ``dpo``.

    Convention: on log-ratios, as RSO and TRL (``loss_type="hinge"``). SLiC-HF itself has no reference in it and adds a
    likelihood term: ``slic_hf``. Where the hinge bends, the gradient is taken to be 0.

    Known failure: a pair beyond its margin has no gradient at all, and nothing holds it there; one far on the wrong
    side pulls no harder than one close to the margin.

    Source: Liu et al. (RSO), arXiv:2309.06657; on Zhao et al. (SLiC-HF), arXiv:2305.10425.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> hinge(batch, beta=0.1).loss  # 1 - 0.1 * (2 - 0)
    tensor([0.8000])
    """
    return LossOut(F.relu(1 - beta * contrast(batch)), pair_metrics(batch, beta))


@register_loss(paper="arXiv:2310.12036", divergence=True, recommended={"learning_rate": 1e-6})
def ipo(batch: Pairs, *, beta: Positive = 0.1) -> LossOut:
    """Identity preference optimization, per token: regress the difference of mean log-ratios on 1 / (2 β).

        loss = (s_w / n_w - s_l / n_l - 1 / (2 β))²

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: the paper's τ. Sets the target difference 1 / (2 β), here in nats *per token*.

    Returns:
        One loss per pair, (B,), in squared nats per token. Metrics (B,) as ``dpo``; the rewards in them are
        beta * s, sums over tokens, so that they compare with those of the other pairwise losses.

    Convention: the authors' later form, which TRL (``loss_type="ipo"``) and HALOs use: each side is divided by its
    length. The paper and the original code use sums: ``ipo_sum``. The two need different beta: with n tokens a side, a
    per-token difference of 1 / (2 β) is a summed difference of n / (2 β).

    Known failure: the target does not know how clear a pair is, so clear and close pairs are pushed equally far apart;
    with a per-token target, one token that differs weighs less the longer the completions are.

    Source: Azar et al., A General Theoretical Paradigm, arXiv:2310.12036, equation 17; the division by length: TRL.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> ipo(batch, beta=0.25).loss  # (2/2 - 0 - 2)²
    tensor([1.])
    """
    return LossOut((contrast_per_token(batch) - 1 / (2 * beta)).square(), pair_metrics(batch, beta))


@register_loss(paper="arXiv:2310.12036", contrast=True, recommended={"learning_rate": 1e-6})
def ipo_sum(batch: Pairs, *, beta: Positive = 0.1) -> LossOut:
    """Identity preference optimization, as in the paper: regress the difference of summed log-ratios on 1 / (2 β).

        loss = (s_w - s_l - 1 / (2 β))²

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: the paper's τ. Sets the target difference 1 / (2 β), here in nats *per completion*.

    Returns:
        One loss per pair, (B,), in squared nats. Metrics (B,) as ``dpo``.

    Convention: sums over tokens, as in the paper, the original DPO code and OpenRLHF. TRL's ``ipo`` divides by the
    lengths: here ``ipo``, with its own scale of beta.

    Known failure: the gradient grows with the distance from the target, so one pair with a log-ratio of hundreds of
    nats, common for long completions, outweighs the rest of its batch.

    Source: Azar et al., A General Theoretical Paradigm, arXiv:2310.12036, equation 17.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> ipo_sum(batch, beta=0.1).loss  # (2 - 0 - 5)²
    tensor([9.])
    """
    return LossOut((contrast(batch) - 1 / (2 * beta)).square(), pair_metrics(batch, beta))


@register_loss(paper="arXiv:2402.00856", contrast=True, recommended={"learning_rate": 1e-6})
def exo_pair(batch: Pairs, *, beta: Positive = 0.1, label_smoothing: Share = 0.001) -> LossOut:
    """Exact preference optimization of pairs: the reverse KL from the policy's preference to the smoothed label.

        loss = q (log q - log(1 - ε)) + (1 - q) (log(1 - q) - log ε)      q = σ(β (s_w - s_l))

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: strength of the pull to the reference, per nat.
        label_smoothing: ε, above 0 and below 1: the label is (1 - ε, ε). The reverse KL to a label of (1, 0) is
            infinite, so there is no 0.

    Returns:
        One loss per pair, (B,), in nats, never below 0; 0 where β (s_w - s_l) = log((1 - ε) / ε). Metrics (B,) as
        ``dpo``.

    Convention: KL(q ‖ label), the mode-seeking direction; ``dpo`` and ``cdpo`` are the other one. As TRL's
    ``loss_type="exo_pair"``, which needs the ε too (TRL 0.x put in 1e-3 where it was 0, the default here). For K > 2
    ranked completions: ``exo``.

    Known failure: bounded by -log ε on the wrong side, where its gradient dies: a pair that the policy ranks wrongly by
    far is hardly moved.

    Source: Ji et al., Towards Efficient Exact Optimization of Language Model Alignment, arXiv:2402.00856.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> exo_pair(batch, beta=0.5, label_smoothing=0.1).loss  # q = 0.7311: 0.7311 * -0.2079 + 0.2689 * 0.9893
    tensor([0.1141])
    """
    if not 0 < label_smoothing < 1:
        raise UsageError(
            f"loss 'exo_pair', option 'label_smoothing': {label_smoothing:g} makes the reverse KL infinite; expected a "
            "number above 0 and below 1, such as 1e-3 (the paper's); for labels without smoothing use 'dpo'."
        )
    z_B = beta * contrast(batch)
    chosen_B, rejected_B = F.logsigmoid(z_B), F.logsigmoid(-z_B)
    label_B = torch.full_like(z_B, label_smoothing)
    loss_B = chosen_B.exp() * (chosen_B - (-label_B).log1p()) + rejected_B.exp() * (rejected_B - label_B.log())
    return LossOut(loss_B, pair_metrics(batch, beta))


@register_loss(
    paper="arXiv:2406.08414",
    contrast=True,
    recommended={"learning_rate": 1e-6},
    exceptions={"prefers_chosen": "not convex: near a difference of 0 the loss falls towards the rejected side"},
)
def discopop(batch: Pairs, *, beta: Positive = 0.1, tau: Positive = 0.05) -> LossOut:
    """DiscoPOP: a blend of logistic and exponential loss, found by a search of programs that a language model wrote.

        loss = (1 - m) (-log σ(z)) + m exp(-z)      z = β (s_w - s_l),  m = σ(z / τ)

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: strength of the pull to the reference, per nat.
        tau: τ, width of the change from logistic (z below 0) to exponential (z above 0), in units of z.

    Returns:
        One loss per pair, (B,), in nats. Metrics (B,) as ``dpo``.

    Convention: as TRL's ``loss_type="discopop"`` (``discopop_tau`` is ``tau``), with its defaults. m exp(-z) is
    computed as exp(log m - z): for z far below 0 the product would be 0 times infinity. The exponent is clamped only
    where ``exp`` would overflow (80 in float32 and bfloat16, 700 in float64), which needs τ > 1; there its gradient
    is 0.

    Known failure: not convex: with the default τ the loss has a dip at z = -0.12 and a bump at z = 0.07. In between,
    where training starts, it falls towards the rejected side, and a pair can come to rest there.

    Source: Lu et al., Discovering Preference Optimization Algorithms with and for Large Language Models,
    arXiv:2406.08414.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> discopop(batch, beta=0.05).loss  # m = σ(0.1 / 0.05) = 0.8808: 0.1192 * 0.6444 + 0.8808 * 0.9048
    tensor([0.8738])
    """
    z_B = beta * contrast(batch)
    logistic_B = torch.sigmoid(-z_B / tau) * -F.logsigmoid(z_B)
    exponential_B = safe_exp(F.logsigmoid(z_B / tau) - z_B)
    return LossOut(logistic_B + exponential_B, pair_metrics(batch, beta))


@register_loss(paper="arXiv:2411.15124", divergence=True, recommended={"learning_rate": 5e-7})
def dpo_norm(batch: Pairs, *, beta: Positive = 5.0) -> LossOut:
    """Length-normalised DPO: each log-ratio is a mean over the tokens of its completion.

        loss = -log σ(β (s_w / n_w - s_l / n_l))

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: scale of the logit, per nat *per token*: n times that of ``dpo`` for completions of n tokens.

    Returns:
        One loss per pair, (B,), in nats; log 2 where policy and reference are equal. Metrics (B,) as ``dpo``; the
        rewards in them are beta * s, sums over tokens.

    Convention: TRL's ``loss_type="sigmoid_norm"``, there with beta = 0.1; the defaults here are those of Tülu 3.
    ``simpo`` normalises too, without reference; ``length_dpo`` corrects the lengths in another way.

    Known failure: what one token says is divided by the length, so in long completions a single wrong token counts
    little. As in ``dpo``, both log-probabilities may fall.

    Source: Lambert et al., Tülu 3, arXiv:2411.15124.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> dpo_norm(batch, beta=0.5).loss  # -log σ(0.5 * (2/2 - 0))
    tensor([0.4741])
    """
    return LossOut(-F.logsigmoid(beta * contrast_per_token(batch)), pair_metrics(batch, beta))


@register_loss(paper="arXiv:2403.19159", contrast=True, recommended={"learning_rate": 1e-6})
def length_dpo(batch: Pairs, *, beta: Positive = 0.1, alpha: NotNegative = 0.05) -> LossOut:
    """R-DPO: DPO whose reward pays α per token, so that length alone explains nothing.

        loss = -log σ(β (s_w - s_l) + α (n_w - n_l))

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: strength of the pull to the reference, per nat.
        alpha: α, what a token of length costs in the objective, in reward units. 0: ``dpo``.

    Returns:
        One loss per pair, (B,), in nats. Metrics (B,) as ``dpo``, without the term of lengths.

    Convention: the sign follows from the objective, reward - α n - KL: a chosen completion that is longer has its
    advantage explained by length already, and gets less push. "R-DPO" also names robust DPO: here ``robust_dpo``. Not
    in TRL. α is tuned to the data; its default here is small because it multiplies differences of many tokens.

    Known failure: a chosen completion that is far more than 1 / α tokens longer has a saturated pair, which teaches
    nothing; one that is so much shorter has the full gradient, whatever the policy has learned.

    Source: Park et al., Disentangling Length from Quality in Direct Preference Optimization, arXiv:2403.19159.

    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=torch.tensor([[True, True]]), rejected_mask_BT=torch.tensor([[True, False]]))
    >>> length_dpo(batch, beta=0.5, alpha=0.1).loss  # -log σ(0.5 * (2 - 0) + 0.1 * (2 - 1))
    tensor([0.2873])
    """
    difference_B = contrast(batch)
    longer_B = (batch.chosen_len_B - batch.rejected_len_B).to(difference_B.dtype)
    return LossOut(-F.logsigmoid(beta * difference_B + alpha * longer_B), pair_metrics(batch, beta))


@register_loss(paper="arXiv:2402.10571", extras=("margin_B",), contrast=True, recommended={"learning_rate": 1e-6})
def odpo(batch: Pairs, *, beta: Positive = 0.1, scale: Positive = 1.0) -> LossOut:
    """DPO with an offset: the better the chosen completion, the larger the difference that is asked for.

        loss = -log σ(β (s_w - s_l) - c m)

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats, and ``margin_B``, m, by how much the
            chosen completion is better, in reward units.
        beta: strength of the pull to the reference, per nat.
        scale: c, logits per unit of the margin.

    Returns:
        One loss per pair, (B,), in nats. Metrics (B,) as ``dpo``, without the offset.

    Convention: the offset is the margin times ``scale``. The paper's offset is α log(difference of scores): put the
    logarithm in the column and α in ``scale``. Not in TRL, whose ``margin`` belongs to reward models.

    Known failure: margins in other units than logits swamp the data; a margin of tens asks for differences that only a
    collapsed policy has.

    Source: Amini et al., Direct Preference Optimization with an Offset, arXiv:2402.10571.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT, margin_B=torch.tensor([0.5]))
    >>> odpo(batch, beta=0.5).loss  # -log σ(0.5 * (2 - 0) - 0.5)
    tensor([0.4741])
    """
    margin_B = column(batch.margin_B, "odpo", "margin_B", "by how much the chosen completion is better")
    return LossOut(-F.logsigmoid(beta * contrast(batch) - scale * margin_B), pair_metrics(batch, beta))


@register_loss(
    paper="arXiv:2406.11704", extras=("margin_B",), contrast=True, recommended={"learning_rate": 1e-6},
    refuses={"label_smoothing": SOFT},
)  # fmt: skip
def reward_aware_rpo(
    batch: Pairs, *, beta: Positive = 0.1, scale: Positive = 1.0, distance: Literal["kl", "squared"] = "kl"
) -> LossOut:
    """Reward-aware preference optimization: the implicit reward gap is to be equal to the true one.

        kl:       loss = KL(Bernoulli(σ(b)) ‖ Bernoulli(σ(a)))      a = β (s_w - s_l),  b = η m
        squared:  loss = (a - b)²

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats, and ``margin_B``, m, the reward of the
            chosen completion less that of the rejected one, by a reward model.
        beta: strength of the pull to the reference, per nat.
        scale: η, logits per unit of the reward.
        distance: between the two gaps: ``kl`` (the report's) or ``squared``.

    Returns:
        One loss per pair, (B,), 0 where the gaps are equal; in nats, or in squared logits. Metrics (B,) as ``dpo``.

    Convention: "RPO" of the Nemotron-4 report, whose KL is taken from the true gap: it is ``dpo`` with soft labels
    σ(b), less their entropy. The other RPO, DPO with a likelihood term, is ``rpo_nll``. Not in TRL. Exchanging the
    sides along with the sign of the margin changes nothing, so labels may be the wrong way round. η = 1 is ours.

    Known failure: the gaps are only as good as the reward model, whose errors are imitated to the full; with
    ``squared`` one pair with a large gap outweighs its batch.

    Source: Adler et al., Nemotron-4 340B Technical Report, arXiv:2406.11704; the family: Sun et al., arXiv:2502.00203.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT, margin_B=torch.tensor([3.0]))
    >>> reward_aware_rpo(batch, beta=0.5).loss, reward_aware_rpo(batch, beta=0.5, distance="squared").loss
    (tensor([0.1698]), tensor([4.]))
    """
    margin_B = column(batch.margin_B, "reward_aware_rpo", "margin_B", "the difference of the two rewards")
    have_B, want_B = beta * contrast(batch), scale * margin_B
    if distance == "squared":
        return LossOut((have_B - want_B).square(), pair_metrics(batch, beta))
    loss_B = torch.zeros_like(have_B)
    for sign in (1, -1):
        want_log_B = F.logsigmoid(sign * want_B)
        loss_B = loss_B + want_log_B.exp() * (want_log_B - F.logsigmoid(sign * have_B))
    return LossOut(loss_B, pair_metrics(batch, beta))


@register_loss(
    paper="arXiv:2404.19733", recommended={"learning_rate": 7e-7},
    exceptions={"reference_shift": "has a likelihood term"},
)  # fmt: skip
def rpo_nll(batch: Pairs, *, beta: Positive = 0.1, nll: NotNegative = 1.0) -> LossOut:
    """DPO with a likelihood term, of iterative reasoning preference optimization: the chosen completion may not fall.

        loss = -log σ(β (s_w - s_l)) - c log π(y_w) / n_w

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, in nats.
        beta: strength of the pull to the reference, per nat.
        nll: c, weight of the likelihood term (the paper's α). 0: ``dpo``.

    Returns:
        One loss per pair, (B,), in nats. Metrics (B,) as ``dpo``, and those of the modifier ``nll``.

    Convention: ``dpo`` with the modifier ``nll``, by a name: the term is a mean over the tokens of each chosen
    completion. TRL's ``["sigmoid", "sft"]`` averages it over the tokens of the batch: here a second term with the loss
    ``chosen_nll``. The other RPO is ``reward_aware_rpo``.

    Known failure: imitates the chosen completions whatever their quality, also where they are only the better of two
    bad ones; a large c is supervised fine-tuning.

    Source: Pang et al., Iterative Reasoning Preference Optimization, arXiv:2404.19733.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), ref_chosen_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     rejected_logps_BT=torch.tensor([[-1.0, -1.0]]), ref_rejected_logps_BT=torch.tensor([[-1.0, -1.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> rpo_nll(batch, beta=0.5, nll=1.0).loss  # 0.3133 + (1 + 2) / 2
    tensor([1.8133])
    """
    return modifiers.nll(functools.partial(dpo, beta=beta), batch, nll=nll)
