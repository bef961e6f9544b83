"""Likelihood losses: completions to be made likelier, one value per token.

They differ in the weight of a token: none (``sft``), its probability (``dft``), its completion's score
(``weighted_sft``, ``filtered_sft``) or an advantage (``awr``, ``hpo``). Weights carry no gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefzoo.losses.base import register_loss
from prefzoo.losses.numerics import masked, safe_exp
from prefzoo.records import Likelihood, LossOut
from prefzoo.registry import Positive, UsageError


@register_loss(paper="arXiv:2203.02155")
def sft(batch: Likelihood) -> LossOut:
    """Supervised fine-tuning: the negative log-likelihood of every completion token.

        loss_t = -log π(y_t | x, y_<t)

    Args:
        batch: completions, (B, T), in nats.

    Returns:
        One loss per token, (B, T), in nats; 0 outside the mask.

    Convention: its count is ``token``, the mean over all completion tokens of the optimizer batch, as in TRL; prompt
    tokens are not in the mask. ``row`` weights every completion alike, ``row_sum`` is the likelihood of completions.

    Known failure: every token counts alike, right or wrong: what the data does badly is imitated as well.

    Source: the first stage of Ouyang et al., arXiv:2203.02155.

    >>> sft(Likelihood(logps_BT=torch.tensor([[-1.0, -0.5]]), mask_BT=torch.tensor([[True, True]]))).loss
    tensor([[1.0000, 0.5000]])
    """
    return LossOut(-masked(batch.logps_BT, batch.mask_BT))


@register_loss(paper="arXiv:2508.05629")
def dft(batch: Likelihood) -> LossOut:
    """Dynamic fine-tuning: the likelihood of every token weighted by its own probability, as a constant.

        loss_t = -sg(π(y_t)) log π(y_t),   gradient -∇ π(y_t)

    Args:
        batch: completions, (B, T), in nats.

    Returns:
        One loss per token, (B, T), in nats, at most 1 / e. Metrics (B, T): ``weight``, the probability of the token.

    Convention: sg is a stop of the gradient, so the gradient is that of the mean *probability* of the tokens, without
    the 1 / π of ``sft``. TRL's ``loss_type="dft"``. Count as ``sft``.

    Known failure: what the model finds unlikely is hardly learned at all: new knowledge, other languages, rare tokens.

    Source: Wu et al. (On the Generalization of SFT), arXiv:2508.05629.

    >>> logps_BT = torch.tensor([[-1.0, -5.0]], requires_grad=True)
    >>> loss_BT = dft(Likelihood(logps_BT=logps_BT, mask_BT=torch.tensor([[True, True]]))).loss
    >>> torch.autograd.grad(loss_BT.sum(), logps_BT)[0]  # -π
    tensor([[-0.3679, -0.0067]])
    """
    weight_BT = safe_exp(masked(batch.logps_BT, batch.mask_BT).detach())
    return LossOut(-weight_BT * masked(batch.logps_BT, batch.mask_BT), {"weight": weight_BT})


@register_loss(paper="arXiv:1910.00177", aliases=("rwr",), extras=("scores_B",))
def weighted_sft(batch: Likelihood, *, temperature: Positive = 1.0, cap: Positive = 20.0) -> LossOut:
    """Reward-weighted regression: the likelihood of completions weighted by the exponential of their score.

        loss_t = -min(exp(score / τ), cap) log π(y_t)

    Args:
        batch: completions, (B, T), in nats, with ``scores_B``, how good each is, in reward units.
        temperature: τ, in reward units. Small: only the best count; large: ``sft``.
        cap: largest weight.

    Returns:
        One loss per token, (B, T), in nats. Metrics (B, T): ``weight``.

    Convention: weights are not normalised, so the scores want a zero: subtract their mean or maximum in the data. With
    a count over tokens or rows the denominator counts them, not their weights. The cap is 20 as in advantage-weighted
    regression. No gradient flows through scores.

    Known failure: with a small temperature a few completions carry the whole gradient.

    Source: reward-weighted regression (Peters and Schaal, 2007), as in Peng et al., arXiv:1910.00177, section 2.

    >>> batch = Likelihood(logps_BT=torch.tensor([[-1.0], [-1.0]]), mask_BT=torch.ones(2, 1) > 0,
    ...     scores_B=torch.tensor([0.0, 1.0]))
    >>> weighted_sft(batch).loss
    tensor([[1.0000],
            [2.7183]])
    """
    scores_B = _scores(batch, "weighted_sft")
    return _weighted(batch, exponential_weight(scores_B, temperature, cap)[:, None].expand_as(batch.logps_BT))


@register_loss(paper="arXiv:2308.08998", extras=("scores_B",))
def filtered_sft(batch: Likelihood, *, threshold: float = 0.0) -> LossOut:
    """Filtered fine-tuning: the likelihood of the completions whose score reaches a threshold.

        loss_t = -[score ≥ threshold] log π(y_t)

    Args:
        batch: completions, (B, T), in nats, with ``scores_B``, how good each is, in reward units.
        threshold: the least score that counts, in reward units.

    Returns:
        One loss per token, (B, T), in nats, 0 in rows below the threshold. Metrics (B, T): ``weight``, 0 or 1.

    Convention: the rows left out still count in the denominator (tokens with count ``token``, rows with ``row``), so
    the gradient is the share of the kept times that of ``sft`` on them, and a batch without any good row does nothing.
    To divide by the kept alone, filter the data, or give ``weight_B`` of 0 and 1 and the count ``weight``. A score of
    NaN is below any threshold. The first row of each prompt in the order of scores is ``best_of_k``.

    Known failure: easy prompts pass the threshold most and take over the data.

    Source: the improve step of Gulcehre et al. (ReST), arXiv:2308.08998.

    >>> batch = Likelihood(logps_BT=torch.tensor([[-1.0], [-1.0]]), mask_BT=torch.ones(2, 1) > 0,
    ...     scores_B=torch.tensor([0.2, 0.9]))
    >>> filtered_sft(batch, threshold=0.5).loss.tolist()
    [[0.0], [1.0]]
    """
    weight_B = (_scores(batch, "filtered_sft") >= threshold).to(batch.logps_BT.dtype)
    return _weighted(batch, weight_B[:, None].expand_as(batch.logps_BT))


@register_loss(paper="arXiv:1910.00177", extras=("advantages_BT",))
def awr(batch: Likelihood, *, beta: Positive = 1.0, cap: Positive = 20.0) -> LossOut:
    """Advantage-weighted regression: the likelihood of every token weighted by the exponential of its advantage.

        loss_t = -min(exp(A_t / β), cap) log π(y_t)

    Args:
        batch: completions, (B, T), in nats, with ``advantages_BT``, what each token deserves, in reward units.
        beta: β, in reward units. Small: greedy; large: ``sft``.
        cap: largest weight.

    Returns:
        One loss per token, (B, T), in nats. Metrics (B, T): ``weight``.

    Convention: off-policy without ratios: the data may come from anywhere. The cap of 20 is the authors'. β has no
    default that fits every scale of advantages; 1 is for standardised ones. ILQL's and IQL's policies are learned so,
    with A = Q - V. No gradient flows through advantages.

    Known failure: weights are positive, so bad actions are imitated less, never avoided.

    Source: Peng et al., Advantage-Weighted Regression, arXiv:1910.00177.

    >>> batch = Likelihood(logps_BT=torch.tensor([[-1.0, -1.0]]), mask_BT=torch.ones(1, 2) > 0,
    ...     advantages_BT=torch.tensor([[0.0, -1.0]]))
    >>> awr(batch).loss
    tensor([[1.0000, 0.3679]])
    """
    return _weighted(batch, exponential_weight(_advantages(batch, "awr"), beta, cap))


@register_loss(paper="arXiv:2405.17956", extras=("advantages_BT",), count="row_sum")
def hpo(batch: Likelihood, *, beta: Positive = 1.0, cap: Positive = 20.0) -> LossOut:
    """Hybrid preference optimization's auxiliary part: likelihood weighted by the advantage of the designer's rewards.

        loss_t = -min(exp(A / β), cap) log π(y_t),   A = Σ_k w_k R_k(x, y) - V(x)

    Args:
        batch: completions, (B, T), in nats, with ``advantages_BT``: the auxiliary rewards minus their expected value
            for the prompt, in reward units, the same for all tokens of a completion.
        beta: β, in reward units. Small: only the best completions count; large: ``sft``.
        cap: largest weight.

    Returns:
        One loss per token, (B, T), in nats. Metrics (B, T): ``weight``.

    Convention: HPO is this term beside a preference loss (``kto`` in the paper, any other works), with a coefficient
    as the term's weight. What is a loss stands here; the sum is the algorithm's, and V(x), a learned value or the mean
    of the prompt's completions, is the credit's. For one completion the arithmetic is that of ``awr``; the count is
    not: ``row_sum``, the likelihood of whole completions. The cap is ``awr``'s.

    Known failure: no completion is pushed down: what the auxiliary reward forbids fades only because others grow.

    Source: Badrinath et al. (Hybrid, later Unified Preference Optimization), arXiv:2405.17956.

    >>> batch = Likelihood(logps_BT=torch.tensor([[-1.0, -1.0]]), mask_BT=torch.ones(1, 2) > 0,
    ...     advantages_BT=torch.tensor([[1.0, 1.0]]))
    >>> hpo(batch, beta=0.5, cap=5.0).loss
    tensor([[5., 5.]])
    """
    return _weighted(batch, exponential_weight(_advantages(batch, "hpo"), beta, cap))


def exponential_weight(values: Tensor, temperature: float, cap: float) -> Tensor:
    """min(exp(value / temperature), cap), without gradient; a missing value (NaN) weighs 0.

    >>> exponential_weight(torch.tensor([0.0, 900.0, float("nan")]), temperature=1.0, cap=20.0)
    tensor([ 1., 20.,  0.])
    """
    scaled = torch.where(values.isnan(), -math.inf, values.detach()) / temperature
    return scaled.exp().clamp(max=cap)  # infinity too becomes the cap


def _weighted(batch: Likelihood, weight_BT: Tensor) -> LossOut:
    """The negative log-likelihood times a constant weight; what stands outside the mask is 0."""
    weight_BT = masked(weight_BT, batch.mask_BT)
    return LossOut(-weight_BT * masked(batch.logps_BT, batch.mask_BT), {"weight": weight_BT})


def _scores(batch: Likelihood, name: str) -> Tensor:
    if batch.scores_B is None:
        raise UsageError(f"loss {name!r} needs Likelihood.scores_B, how good each completion is, but it is None.")
    return batch.scores_B.detach()


def _advantages(batch: Likelihood, name: str) -> Tensor:
    if batch.advantages_BT is None:
        raise UsageError(f"loss {name!r} needs Likelihood.advantages_BT, what each token deserves, but it is None.")
    return batch.advantages_BT.detach()
