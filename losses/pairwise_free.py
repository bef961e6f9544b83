"""Pairwise losses without a reference: the policy's own log-probabilities of the two completions are compared.

Notation of the equations: π_w and π_l are log π(y|x) of the chosen (w) and the rejected (l) completion, summed over
their tokens, the EOS included; n_w and n_l are their numbers of tokens, so π_w / n_w is the mean log-probability of a
token. σ is the logistic function. Where a loss has a likelihood term of its own, ``nll`` is its weight; the card says
whether the term is the sum over the tokens or their mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefzoo.losses.base import register_loss
from prefzoo.losses.modifiers import mean_nll
from prefzoo.losses.numerics import deformed
from prefzoo.losses.pairwise import reward_metrics
from prefzoo.records import LossOut, Pairs, masked_mean, masked_sum
from prefzoo.registry import NotNegative, Positive, Share, UsageError


def mean_logps(batch: Pairs) -> tuple[Tensor, Tensor]:
    """Mean log-probability of a token of the chosen and of the rejected completions, (B,) each; 0 without tokens."""
    return (
        masked_mean(batch.chosen_logps_BT, batch.chosen_mask_BT),
        masked_mean(batch.rejected_logps_BT, batch.rejected_mask_BT),
    )


def sum_metrics(batch: Pairs, scale: float) -> dict[str, Tensor]:
    """As ``reward_metrics``, the rewards being scaled log-probabilities of the completions; and ``nll`` per token."""
    return reward_metrics(batch, scale * batch.chosen_B, scale * batch.rejected_B) | {"nll": mean_nll(batch).detach()}


def mean_metrics(batch: Pairs, beta: float) -> dict[str, Tensor]:
    """As ``sum_metrics``, of mean log-probabilities."""
    chosen_B, rejected_B = mean_logps(batch)
    return reward_metrics(batch, beta * chosen_B, beta * rejected_B) | {"nll": mean_nll(batch).detach()}


# -- sums of log-probabilities ----------------------------------------------------------------------------------------


@register_loss(paper="arXiv:2401.08417", reference=False, recommended={"learning_rate": 1e-6})
def cpo(batch: Pairs, *, beta: Positive = 0.1, nll: NotNegative = 1.0) -> LossOut:
    """Contrastive preference optimization: DPO with a uniform reference, and the likelihood of the chosen completion.

        loss = -log σ(β (π_w - π_l)) - c π_w

    Args:
        batch: pairs, (B, T) log-probabilities per side, in nats.
        beta: scale of the difference, per nat.
        nll: c, weight of the likelihood term, a sum over the tokens; 0 leaves the comparison.

    Returns:
        One loss per pair, (B,), in nats. Metrics (B,): ``rewards/chosen`` and ``rewards/rejected``, here beta times the
        log-probability, ``rewards/margins``, ``rewards/accuracies``, ``logps/chosen``, ``logps/rejected``, and ``nll``
        in nats per token.

    Convention: the paper's, whose likelihood term is the log-probability of the whole completion, so a long one weighs
    more. TRL's ``cpo_alpha`` (1.0) weighs a mean over all chosen tokens of the batch, many times smaller: that is
    ``cpo`` with ``nll=0`` and a second term, ``chosen_nll``. Beta is the default of both.

    Known failure: no reference holds the policy. The comparison lowers both sides, and a probability may wander to
    answers that are in neither; with a large c it is supervised learning of the chosen side.

    Source: Xu et al., Contrastive Preference Optimization, arXiv:2401.08417.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), rejected_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> cpo(batch, beta=0.5, nll=0.0).loss, cpo(batch, beta=0.5).loss  # -log σ(0.5 * 2), and 3 more
    (tensor([0.3133]), tensor([3.3133]))
    """
    chosen_B = batch.chosen_B
    loss_B = -F.logsigmoid(beta * (chosen_B - batch.rejected_B)) - nll * chosen_B
    return LossOut(loss_B, sum_metrics(batch, beta))


@register_loss(paper="arXiv:2401.08417", reference=False, recommended={"learning_rate": 1e-6})
def cpo_hinge(batch: Pairs, *, beta: Positive = 0.1, nll: NotNegative = 1.0) -> LossOut:
    """CPO with a hinge: the chosen completion is to be likelier by 1 / β nats, and no more is asked.

        loss = max(0, 1 - β (π_w - π_l)) - c π_w

    Args:
        batch: pairs, (B, T) log-probabilities per side, in nats.
        beta: the reciprocal of the margin, per nat.
        nll: c, weight of the likelihood term, a sum over the tokens.

    Returns:
        One loss per pair, (B,). Metrics (B,) as ``cpo``.

    Convention: TRL's ``loss_type="hinge"`` of its CPO trainer, not in the CPO paper; the likelihood term is that of
    ``cpo``, a sum, where TRL averages over the tokens of the batch (``nll=0`` and a term ``chosen_nll``). With margins
    in nats and its own weights it is ``slic_hf``.

    Known failure: a pair inside the margin pulls with full strength whatever its label is worth; beyond the margin it
    teaches nothing but the likelihood term.

    Source: Xu et al., arXiv:2401.08417; the hinge: Zhao et al., SLiC-HF, arXiv:2305.10425.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), rejected_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> cpo_hinge(batch, beta=0.25, nll=0.1).loss  # 1 - 0.25 * 2 + 0.1 * 3
    tensor([0.8000])
    """
    chosen_B = batch.chosen_B
    return LossOut(F.relu(1 - beta * (chosen_B - batch.rejected_B)) - nll * chosen_B, sum_metrics(batch, beta))


@register_loss(
    paper="arXiv:2305.10425", reference=False, recommended={"learning_rate": 1e-6},
    exceptions={"prefers_chosen@nll": "beyond the margin only the likelihood term has gradient"},
)  # fmt: skip
def slic_hf(batch: Pairs, *, delta: NotNegative = 1.0, nll: NotNegative = 0.1) -> LossOut:
    """Sequence likelihood calibration: the chosen completion is to be likelier by δ nats, and stay likely.

        loss = max(0, δ - π_w + π_l) - λ π_w

    Args:
        batch: pairs, (B, T) log-probabilities per side, in nats.
        delta: δ, the margin in nats.
        nll: λ, weight of the regulariser, a sum over the tokens.

    Returns:
        One loss per pair, (B,), in nats. Metrics (B,) as ``cpo``; the rewards in them are the log-probabilities.

    Convention: sums over tokens. The paper's regulariser may be taken on the targets of supervised training or on the
    best candidate; here it is the chosen completion, which every pair has. TRL's ``hinge`` compares log-ratios to a
    reference and has no regulariser: here ``hinge``. The defaults are ours; the paper tunes both.

    Known failure: sums favour the shorter completion, whose log-probability is larger to begin with; a margin in nats
    does not grow with length.

    Source: Zhao et al., SLiC-HF: Sequence Likelihood Calibration with Human Feedback, arXiv:2305.10425.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), rejected_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> slic_hf(batch, delta=3.0, nll=0.1).loss  # 3 - 2 + 0.1 * 3
    tensor([1.3000])
    """
    chosen_B = batch.chosen_B
    return LossOut(F.relu(delta - chosen_B + batch.rejected_B) - nll * chosen_B, sum_metrics(batch, 1.0))


# -- means of log-probabilities ---------------------------------------------------------------------------------------


@register_loss(paper="arXiv:2401.08417", reference=False, recommended={"learning_rate": 1e-6})
def cpo_ipo(batch: Pairs, *, beta: Positive = 0.1, nll: NotNegative = 1.0) -> LossOut:
    """CPO with IPO's square: the difference of mean log-probabilities is regressed on 1 / (2 β).

        loss = (π_w / n_w - π_l / n_l - 1 / (2 β))² - c π_w / n_w

    Args:
        batch: pairs, (B, T) log-probabilities per side, in nats.
        beta: IPO's τ. Sets the target difference 1 / (2 β), in nats per token.
        nll: c, weight of the likelihood term, a mean over the tokens.

    Returns:
        One loss per pair, (B,). Metrics (B,) as ``cpo``; the rewards in them are beta times the mean log-probability.

    Convention: TRL's ``loss_type="ipo"`` of its CPO trainer, not in the CPO paper. The likelihood term is a mean over
    each completion's tokens, the unit of the comparison; TRL averages over the tokens of the batch (``nll=0`` and a
    term ``chosen_nll``).

    Known failure: at the default beta the target is 5 nats per token, a ratio of 148 at every token, which two fluent
    completions never have: the square then pulls all pairs alike. Choose beta by the difference you want.

    Source: Xu et al., arXiv:2401.08417; the square: Azar et al., arXiv:2310.12036.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), rejected_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> cpo_ipo(batch, beta=0.25, nll=1.0).loss  # (1 - 2)² + 1.5
    tensor([2.5000])
    """
    chosen_B, rejected_B = mean_logps(batch)
    loss_B = (chosen_B - rejected_B - 1 / (2 * beta)).square() - nll * chosen_B
    return LossOut(loss_B, mean_metrics(batch, beta))


MARGIN_SMOOTHED = {
    "prefers_chosen@label_smoothing": "beyond the logit where both readings balance a pair is pulled back"
}


def margin_loss(difference_B: Tensor, gamma: float, label_smoothing: float) -> Tensor:
    """-(1 - ε) log σ(z) - ε log σ(-z) of z = difference - γ, (B,)."""
    logits_B = difference_B - gamma
    return -(1 - label_smoothing) * F.logsigmoid(logits_B) - label_smoothing * F.logsigmoid(-logits_B)


@register_loss(
    paper="arXiv:2405.14734", reference=False, recommended={"learning_rate": 1e-6}, exceptions=MARGIN_SMOOTHED
)
def simpo(batch: Pairs, *, beta: Positive = 2.0, gamma: NotNegative = 0.5, label_smoothing: Share = 0.0) -> LossOut:
    """Simple preference optimization: mean log-probabilities are the rewards, and a margin is asked of them.

        loss = -log σ(β π_w / n_w - β π_l / n_l - γ)

    Args:
        batch: pairs, (B, T) log-probabilities per side, in nats.
        beta: scale of the reward, per nat per token.
        gamma: γ itself, the margin in reward units. Not γ / β: for a quoted ratio of 0.5 and beta = 2, give 1.0.
        label_smoothing: ε; the logit z, its margin included, is smoothed: -(1 - ε) log σ(z) - ε log σ(-z).

    Returns:
        One loss per pair, (B,), in nats. Metrics (B,) as ``dpo``; the rewards in them are beta times the mean
        log-probability.

    Convention: the paper's γ, which is also TRL's ``simpo_gamma``. The authors' later code, HALOs and open-instruct
    take γ / β. Pure SimPO has no likelihood term: TRL's trainer adds one unless ``cpo_alpha=0`` (here ``cpo_simpo``).
    Smoothing is TRL's too: the flipped reading keeps the margin where it was, while the modifier of that name would
    ask it of the other side. The defaults are TRL's gamma and the paper's smallest beta; the paper tunes γ from 0.3
    to 1.6.

    Known failure: nothing holds the policy: with many steps or a large learning rate the log-probabilities of both
    sides fall, and answers degenerate. The learning rate matters more than beta.

    Source: Meng et al., SimPO: Simple Preference Optimization with a Reference-Free Reward, arXiv:2405.14734.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), rejected_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> simpo(batch, beta=2.0, gamma=1.0).loss  # -log σ(2 * (-1.5 + 2.5) - 1)
    tensor([0.3133])
    """
    chosen_B, rejected_B = (beta * mean_B for mean_B in mean_logps(batch))
    loss_B = margin_loss(chosen_B - rejected_B, gamma, label_smoothing)
    return LossOut(loss_B, reward_metrics(batch, chosen_B, rejected_B))


@register_loss(
    paper="arXiv:2405.14734", reference=False, recommended={"learning_rate": 1e-6}, exceptions=MARGIN_SMOOTHED
)
def cpo_simpo(
    batch: Pairs,
    *,
    beta: Positive = 2.0,
    gamma: NotNegative = 0.5,
    nll: NotNegative = 1.0,
    label_smoothing: Share = 0.0,
) -> LossOut:
    """CPO-SimPO: SimPO with the likelihood term of CPO, which keeps the chosen completion likely.

        loss = -log σ(β π_w / n_w - β π_l / n_l - γ) - c π_w / n_w

    Args:
        batch: pairs, (B, T) log-probabilities per side, in nats.
        beta: scale of the reward, per nat per token.
        gamma: γ itself, the margin in reward units, not γ / β.
        nll: c, weight of the likelihood term, a mean over the tokens.
        label_smoothing: ε, of the comparison alone, as in ``simpo``.

    Returns:
        One loss per pair, (B,), in nats. Metrics (B,) as ``cpo``; the rewards in them are beta times the mean
        log-probability.

    Convention: TRL's ``loss_type="simpo"`` with its default ``cpo_alpha=1.0``, whose value c has. The term is a mean
    over each completion's tokens; TRL averages over the tokens of the batch: ``simpo`` and a second term
    ``chosen_nll``. It is ``simpo`` with the modifier ``nll``, by a name.

    Known failure: once the margin is reached the likelihood term rules, and c = 1 is supervised learning of the chosen
    side, good or not; a smaller c leaves more to the comparison.

    Source: Meng et al., arXiv:2405.14734, and Xu et al., arXiv:2401.08417, whose code CPO_SIMPO combines them.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -2.0]]), rejected_logps_BT=torch.tensor([[-2.0, -3.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> cpo_simpo(batch, beta=2.0, gamma=1.0, nll=0.1).loss  # 0.3133 + 0.1 * 1.5
    tensor([0.4633])
    """
    out = simpo(batch, beta=beta, gamma=gamma, label_smoothing=label_smoothing)
    return LossOut(out.loss + nll * mean_nll(batch), mean_metrics(batch, beta))


@register_loss(
    paper="arXiv:2501.03884", reference=False, recommended={"learning_rate": 1e-6}, exceptions=MARGIN_SMOOTHED
)
def alphapo(
    batch: Pairs,
    *,
    beta: Positive = 2.0,
    gamma: NotNegative = 0.5,
    alpha: float = 0.25,
    label_smoothing: Share = 0.0,
) -> LossOut:
    """AlphaPO: SimPO with a bent reward, so that the shape decides how far the probabilities of both sides fall.

        loss = -log σ(β r_w - β r_l - γ),   r = (1 - exp(-α π / n)) / α

    Args:
        batch: pairs, (B, T) log-probabilities per side, in nats.
        beta: scale of the reward.
        gamma: γ itself, the margin in reward units.
        alpha: shape of the reward; 0 is ``simpo``. Above 0 the gradient grows as a completion becomes unlikely.
        label_smoothing: ε, of the logit with its margin, as in ``simpo``.

    Returns:
        One loss per pair, (B,), in nats. Metrics (B,) as ``dpo``; the rewards in them are β r.

    Convention: the paper's reward, (1 - p^-α) / α with p the geometric mean of the token probabilities, computed from
    log p: p itself underflows. The exponent is clamped where ``exp`` overflows (80 in float32 and bfloat16, 700 in
    float64), beyond which a completion has no gradient. TRL's default α is 0, so that nothing is bent; ours is one of
    the small positive values that the paper finds better. γ is as in ``simpo``.

    Known failure: with α above 0 one unlikely rejected completion has a very large gradient, which a clip of the
    gradient norm then takes from all others.

    Source: Gupta et al., AlphaPO: Reward Shape Matters for LLM Alignment, arXiv:2501.03884.

    >>> mask_BT = torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[-1.0, -1.0]]), rejected_logps_BT=torch.tensor([[-2.0, -2.0]]),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> alphapo(batch, beta=1.0, gamma=0.0, alpha=1.0).loss  # -log σ((1 - e) - (1 - e²))
    tensor([0.0093])
    """
    chosen_B, rejected_B = (beta * deformed(mean_B, alpha) for mean_B in mean_logps(batch))
    loss_B = margin_loss(chosen_B - rejected_B, gamma, label_smoothing)
    return LossOut(loss_B, reward_metrics(batch, chosen_B, rejected_B))


# -- odds -------------------------------------------------------------------------------------------------------------


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) of a log-probability; at p = 1 that of the nearest p that is safe to differentiate at.

    1 - p is -expm1(log p), exact near 1, where 1 - exp(log p) is 0; no branch is needed, so none can be NaN.

    >>> log_odds(torch.tensor([0.25, 0.5]).log()), log_odds(torch.tensor(-1e-9))  # log(1/3), log 1, 9 log 10
    (tensor([-1.0986,  0.0000]), tensor(20.7233))
    """
    below_0 = logp.clamp(max=-(torch.finfo(logp.dtype).tiny ** 0.5))
    return below_0 - (-below_0.expm1()).log()


def prompt_fields(options: Mapping[str, Any]) -> tuple[str, ...]:
    """What ORPO needs of the prompt."""
    return ("prompt_logps_BT", "prompt_mask_BT") if options["likelihood"] == "all" else ()


@register_loss(
    paper="arXiv:2403.07691", reference=False, extras=prompt_fields, recommended={"learning_rate": 1e-6}
)  # fmt: skip
def orpo(
    batch: Pairs,
    *,
    beta: Positive = 0.1,
    nll: NotNegative = 1.0,
    likelihood: Literal["completion", "all"] = "completion",
) -> LossOut:
    """Odds ratio preference optimization: supervised learning, with a penalty on the odds of the rejected completion.

        loss = c NLL - λ log σ(log odds_w - log odds_l),   odds = p / (1 - p),   log p = π / n

    Args:
        batch: pairs, (B, T) log-probabilities per side, in nats.
        beta: λ of the paper, weight of the comparison.
        nll: c, weight of the likelihood term, which the paper fixes at 1.
        likelihood: whose mean token NLL: of the chosen ``completion``, or of ``all`` tokens, the prompt's with those of
            the chosen completion; that needs ``prompt_logps_BT`` and ``prompt_mask_BT``.

    Returns:
        One loss per pair, (B,), in nats. Metrics (B,) as ``cpo``, the rewards in them being λ times the mean
        log-probability as in TRL; and ``log_odds/ratio``, the argument of σ.

    Convention: the NLL is a mean over each row's tokens. The paper's and LLaMA-Factory's is over the completion. TRL's
    is over prompt and completion, and a mean over the tokens of a micro-batch, in which longer rows weigh more: that is
    ``orpo`` with ``nll=0`` and a second term, ``prompt_chosen_nll``; ``all`` is it with one pair per micro-batch. TRL
    computes the odds in float32 whatever the model has.

    Known failure: odds of a mean probability near 1 are huge and steep, so short, certain completions rule the batch;
    λ = 0.1 makes the comparison a small part of the gradient, and much of the gain is supervised learning.

    Source: Hong et al., ORPO: Monolithic Preference Optimization without Reference Model, arXiv:2403.07691.

    >>> mask_BT = torch.tensor([[True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=torch.tensor([[0.5]]).log(), rejected_logps_BT=torch.tensor([[0.25]]).log(),
    ...     chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> orpo(batch, beta=1.0).loss  # log 2 - log σ(log 3) = log 2 + log(4/3)
    tensor([0.9808])
    """
    if likelihood == "all" and nll == 0:
        raise UsageError("orpo: likelihood='all' has no effect with nll=0: leave it out, or give the term a weight.")
    chosen_B, rejected_B = mean_logps(batch)
    ratio_B = log_odds(chosen_B) - log_odds(rejected_B)
    nll_B = nll_of_all(batch) if likelihood == "all" else -chosen_B
    metrics = mean_metrics(batch, beta) | {"nll": nll_B.detach(), "log_odds/ratio": ratio_B.detach()}
    return LossOut(nll * nll_B - beta * F.logsigmoid(ratio_B), metrics)


def nll_of_all(batch: Pairs) -> Tensor:
    """Mean token NLL of prompt and chosen completion together, (B,), in nats per token."""
    if batch.prompt_logps_BT is None or batch.prompt_mask_BT is None:
        raise UsageError(
            "likelihood='all' needs prompt_logps_BT and prompt_mask_BT, which this record does not hold; "
            "likelihood='completion' does without."
        )
    tokens_B = batch.prompt_mask_BT.sum(-1) + batch.chosen_len_B
    return -(masked_sum(batch.prompt_logps_BT, batch.prompt_mask_BT) + batch.chosen_B) / tokens_B.clamp(min=1)
