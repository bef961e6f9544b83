"""Losses of reward models: scalar rewards of pairs, of rankings, of rated completions, and of the steps of a solution.

Notation of the equations: r_w and r_l are the rewards of the chosen and the rejected completion, d = r_w - r_l; in a
ranking r_1 ... r_K are those of its completions, best first. Only ``reward_regression`` and ``process_reward`` fix a
reward's absolute value; of all others differences matter alone, unless ``centering`` is on.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from prefzoo.losses.base import register_loss
from prefzoo.losses.numerics import masked
from prefzoo.losses.rankings import accuracy_P, all_pairs_P, plackett_luce_P, rest_mean_P
from prefzoo.records import LossOut, RankedScores, Ratings, Scores, StepScores
from prefzoo.registry import NotNegative, Positive, Share, UsageError


@torch.no_grad()
def reward_metrics(batch: Scores) -> dict[str, Tensor]:
    """What all losses of scored pairs log, (B,) each."""
    difference_B = batch.chosen_B - batch.rejected_B
    return {
        "rewards/chosen": batch.chosen_B.detach(),
        "rewards/rejected": batch.rejected_B.detach(),
        "rewards/margins": difference_B,
        "rewards/accuracies": (difference_B > 0).to(difference_B.dtype),
    }


def first_is_better(batch: Scores) -> Tensor:
    """p, the probability that the first is better: 1 where the record has no soft labels."""
    return torch.ones_like(batch.chosen_B) if batch.probability_B is None else batch.probability_B


@register_loss(paper="arXiv:2203.02155", exceptions={"reward_shift@centering": "the mean of a pair is pulled to 0"})
def bradley_terry(batch: Scores, *, label_smoothing: Share = 0.0, centering: NotNegative = 0.0) -> LossOut:
    """Bradley-Terry reward model: cross-entropy of "the chosen one wins", whose logit is the difference of rewards.

        x    = r_w - r_l - m
        loss = -p log σ(x) - (1 - p) log σ(-x) + c (r_w + r_l)²

    Args:
        batch: rewards of chosen and rejected, (B,). Where the record has them: ``margin_B`` is m, in reward units
            (absent: 0); ``probability_B`` is p, the probability that the first is better (absent: 1).
        label_smoothing: ε, the share of flipped labels: p becomes p (1 - ε) + (1 - p) ε.
        centering: c, pulls the mean reward of a pair to 0. The difference of one pair does not feel it; where responses
            stand in several pairs, large differences shrink.

    Returns:
        One loss per pair, (B,), in nats. Metrics (B,): ``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``
        = r_w - r_l (without m), ``rewards/accuracies``.

    Convention: every pair counts alike. InstructGPT averages the pairs of one prompt first: use weights for that. With
    soft labels the margin stays on the side of the first completion.

    Known failure: probabilities are never 1, so rewards of pairs that are always won grow as long as training goes on;
    early stopping or centering keeps them small. Rewards of different prompts are not comparable.

    Source: Ouyang et al., arXiv:2203.02155, equation 1; the margin: Llama 2, arXiv:2307.09288, equation 2; centering:
    Eisenstein et al., arXiv:2312.09244; a share of random labels: Christiano et al., arXiv:1706.03741.

    >>> batch = Scores(chosen_B=torch.tensor([1.0, 1.0]), rejected_B=torch.tensor([0.0, 1.0]))
    >>> bradley_terry(batch).loss
    tensor([0.3133, 0.6931])
    """
    difference_B = batch.chosen_B - batch.rejected_B
    logits_B = difference_B if batch.margin_B is None else difference_B - batch.margin_B
    probability_B = first_is_better(batch)
    target_B = probability_B * (1 - label_smoothing) + (1 - probability_B) * label_smoothing
    loss_B = F.binary_cross_entropy_with_logits(logits_B, target_B, reduction="none")
    return LossOut(loss_B + centering * (batch.chosen_B + batch.rejected_B).square(), reward_metrics(batch))


@register_loss(paper="arXiv:2203.02155")
def log_exp(batch: Scores) -> LossOut:
    """The log-exp loss of reward models: ``bradley_terry`` under the name that OpenRLHF has for its other spelling.

        loss = log(1 + exp(-(r_w - r_l - m)))

    Args:
        batch: rewards of chosen and rejected, (B,), with margin m and soft labels as in ``bradley_terry``.

    Returns:
        One loss per pair, (B,), in nats. Metrics (B,) as ``bradley_terry``.

    Convention: log(1 + exp(-x)) = -log σ(x), so this *is* ``bradley_terry`` without its options, value and gradient;
    it exists to be found under its name. OpenRLHF's own reads no margin; here the record's is used where it has one.

    Known failure: that of ``bradley_terry``: the scale of rewards grows as long as training goes on.

    Source: OpenRLHF, ``LogExpLoss``; the function: Ouyang et al., arXiv:2203.02155, equation 1.

    >>> batch = Scores(chosen_B=torch.tensor([1.0, 1.0]), rejected_B=torch.tensor([0.0, 1.0]))
    >>> log_exp(batch).loss
    tensor([0.3133, 0.6931])
    """
    return bradley_terry(batch)


def tie_of(batch: Scores, loss: str) -> Tensor:
    """Which pairs are tied; without that column an error."""
    if batch.tie_B is None:
        raise UsageError(
            f"loss {loss!r} needs Scores.tie_B, whether a pair was called equally good: give data with ties, or take "
            "'bradley_terry', which knows none."
        )
    return batch.tie_B


def of_outcome(logp_3B: tuple[Tensor, Tensor, Tensor], batch: Scores, loss: str) -> LossOut:
    """-log of the probability of what happened, from those of a win of the first, of the second, and of a tie."""
    win_B, lose_B, tie_B = logp_3B
    tied_B = tie_of(batch, loss)
    probability_B = first_is_better(batch).masked_fill(tied_B, 1.0)  # of a tie it may be missing, NaN
    decided_B = probability_B * win_B + (1 - probability_B) * lose_B
    metrics = {**reward_metrics(batch), "probs/tie": tie_B.detach().exp()}
    return LossOut(-torch.where(tied_B, tie_B, decided_B), metrics)


def davidson_logps(difference_B: Tensor, nu: float) -> tuple[Tensor, Tensor, Tensor]:
    """log-probabilities of win, loss and tie in Davidson's model.

    >>> [round(float(x.exp()), 4) for x in davidson_logps(torch.tensor(0.0), nu=2.0)]
    [0.25, 0.25, 0.5]
    """
    half_B = difference_B / 2
    logits_B3 = torch.stack([half_B, -half_B, torch.full_like(half_B, math.log(nu))], -1)
    win_B, lose_B, tie_B = logits_B3.log_softmax(-1).unbind(-1)
    return win_B, lose_B, tie_B


@register_loss(paper="arXiv:2410.05328", extras=("tie_B",))
def davidson(batch: Scores, *, nu: Positive = 1.0) -> LossOut:
    """Davidson's model of pairs with ties: a tie is as likely as ν times the geometric mean of both wins.

        P(win)  = e^{d/2} / Z,  P(loss) = e^{-d/2} / Z,  P(tie) = ν / Z,  Z = e^{d/2} + e^{-d/2} + ν
        loss = -log P(tie) for a tie, else -p log P(win) - (1 - p) log P(loss)

    Args:
        batch: rewards of chosen and rejected, (B,), and ``tie_B``; ``probability_B`` is p where the record has it
            (absent: 1), read where the pair is decided.
        nu: ν, how common ties are; equal rewards are a tie with probability ν / (2 + ν).

    Returns:
        One loss per pair, (B,), in nats. Metrics (B,) as ``bradley_terry``, and ``probs/tie``, the model's P(tie).

    Convention: ν is a constant here, where statistics estimates it; the default makes the three outcomes of equal
    rewards equally likely. ν → 0 is ``bradley_terry`` on the decided pairs. Margins are not used. For large d, P(tie)
    falls as e^{-d/2}; in ``rao_kupper`` as e^{-d}.

    Known failure: with ν too large for the data, decided pairs push rewards apart to make ties unlikely, and the scale
    of rewards means less.

    Source: Davidson, On extending the Bradley-Terry model to accommodate ties, JASA 65, 1970; ties in reward learning:
    Liu et al., Reward Learning From Preference With Ties, arXiv:2410.05328.

    >>> batch = Scores(
    ...     chosen_B=torch.tensor([1.0, 1.0]), rejected_B=torch.tensor([0.0, 1.0]), tie_B=torch.tensor([False, True]))
    >>> davidson(batch).loss
    tensor([0.6803, 1.0986])
    """
    return of_outcome(davidson_logps(batch.chosen_B - batch.rejected_B, nu), batch, "davidson")


def rao_kupper_logps(difference_B: Tensor, theta: float) -> tuple[Tensor, Tensor, Tensor]:
    """log-probabilities of win, loss and tie in the model of Rao and Kupper.

    >>> [round(float(x.exp()), 4) for x in rao_kupper_logps(torch.tensor(0.0), theta=3.0)]
    [0.25, 0.25, 0.5]
    """
    if not theta > 1:
        raise UsageError(
            f"loss 'rao_kupper', option 'theta': expected a number above 1, got {theta}: at 1 no pair can be tied, and "
            "the model is 'bradley_terry'."
        )
    win_B, lose_B = (F.logsigmoid(side_B - math.log(theta)) for side_B in (difference_B, -difference_B))
    return win_B, lose_B, math.log(theta - 1) + math.log(theta + 1) + win_B + lose_B


@register_loss(paper="arXiv:2410.05328", extras=("tie_B",))
def rao_kupper(batch: Scores, *, theta: Positive = 2.0) -> LossOut:
    """Rao and Kupper's model of pairs with ties: who is less than a threshold log θ ahead does not win.

        P(win) = σ(d - log θ),  P(loss) = σ(-d - log θ),  P(tie) = (θ² - 1) P(win) P(loss)
        loss = -log P(tie) for a tie, else -p log P(win) - (1 - p) log P(loss)

    Args:
        batch: rewards of chosen and rejected, (B,), and ``tie_B``; ``probability_B`` is p where the record has it
            (absent: 1), read where the pair is decided.
        theta: θ, above 1; equal rewards are a tie with probability (θ - 1) / (θ + 1).

    Returns:
        One loss per pair, (B,), in nats. Metrics (B,) as ``bradley_terry``, and ``probs/tie``, the model's P(tie).

    Convention: θ is a constant here, where statistics estimates it; the default makes the three outcomes of equal
    rewards equally likely. On decided pairs alone it is ``bradley_terry`` with a margin of log θ, which θ → 1 takes
    away. Margins of the data are not used.

    Known failure: with θ too large for the data, decided pairs push rewards apart to clear the threshold, and the scale
    of rewards means less.

    Source: Rao and Kupper, Ties in paired-comparison experiments, JASA 62, 1967; in reward learning: Liu et al., Reward
    Learning From Preference With Ties, arXiv:2410.05328.

    >>> batch = Scores(
    ...     chosen_B=torch.tensor([1.0, 1.0]), rejected_B=torch.tensor([0.0, 1.0]), tie_B=torch.tensor([False, True]))
    >>> rao_kupper(batch).loss
    tensor([0.5514, 1.0986])
    """
    return of_outcome(rao_kupper_logps(batch.chosen_B - batch.rejected_B, theta), batch, "rao_kupper")


@torch.no_grad()
def ranked_reward_metrics(batch: RankedScores) -> dict[str, Tensor]:
    """Those of pairs, (P,) each: the best completion is the chosen one, the mean of all others the rejected."""
    rewards_PK = masked(batch.rewards_PK.detach(), batch.valid_PK)
    chosen_P, rejected_P = rewards_PK[:, 0], rest_mean_P(rewards_PK, batch.valid_PK)
    return {
        "rewards/chosen": chosen_P,
        "rewards/rejected": rejected_P,
        "rewards/margins": chosen_P - rejected_P,
        "rewards/accuracies": accuracy_P(rewards_PK, batch.valid_PK),
    }


@register_loss(paper="arXiv:2203.02155")
def all_pairs(batch: RankedScores) -> LossOut:
    """Bradley-Terry on all pairs of a ranking, averaged over the pairs of the list.

        loss = 1/C(K,2) Σ_{i < j} -log σ(r_i - r_j)

    Args:
        batch: rewards of K completions per prompt, best first, (P, K), of which those in ``valid_PK`` are there.

    Returns:
        One loss per list, (P,), in nats; log 2 where all rewards are equal, 0 for a list without pairs. Metrics (P,):
        ``rewards/chosen`` = the best one's, ``rewards/rejected`` = mean of the others', ``rewards/margins``,
        ``rewards/accuracies`` = share of pairs in the right order.

    Convention: 1/C(K,2) inside, as in InstructGPT: every prompt counts alike. For every *pair* alike, give ``weight_P``
    = C(K,2) (``prefzoo.losses.rankings.pairs_P``) and the count ``weight``. Two completions give ``bradley_terry``.

    Known failure: pairs of one list are not independent; split into rows of their own and shuffled, they overfit within
    one epoch (the same paper), so keep lists whole.

    Source: Ouyang et al., Training language models to follow instructions, arXiv:2203.02155, equation 1.

    >>> all_pairs(RankedScores(rewards_PK=torch.tensor([[1.0, 0.0, -1.0]]), valid_PK=torch.ones(1, 3).bool())).loss
    tensor([0.2512])
    """
    return LossOut(all_pairs_P(batch.rewards_PK, batch.valid_PK), ranked_reward_metrics(batch))


@register_loss(paper="arXiv:2305.18290")
def plackett_luce(batch: RankedScores, *, per_choice: bool = False) -> LossOut:
    """Plackett-Luce reward model: the likelihood of the whole ranking, drawn from the best downwards.

        loss = Σ_{k < K} [log Σ_{j ≥ k} exp(r_j) - r_k]

    Args:
        batch: rewards of K completions per prompt, best first, (P, K), of which those in ``valid_PK`` are there.
        per_choice: divide by K - 1, the number of choices, so that lists of all lengths have one scale.

    Returns:
        One loss per list, (P,), in nats; log K! (over K - 1) where all rewards are equal, 0 for a list of one. Metrics
        (P,) as ``all_pairs``.

    Convention: the sum is the negative log-likelihood; long lists weigh more. Two completions give ``bradley_terry``.

    Known failure: the first choices have the most competitors and dominate, so noise at the top of a ranking costs
    most.

    Source: Plackett, The analysis of permutations, 1975; Luce, Individual choice behavior, 1959; for language models:
    Rafailov et al., arXiv:2305.18290, appendix A.3.

    >>> batch = RankedScores(rewards_PK=torch.tensor([[1.0, 0.0, -1.0]]), valid_PK=torch.ones(1, 3).bool())
    >>> plackett_luce(batch).loss  # log(1 + e^-1 + e^-2) + log(1 + e^-1)
    tensor([0.7209])
    """
    loss_P = plackett_luce_P(batch.rewards_PK, batch.valid_PK)
    if per_choice:
        loss_P = loss_P / (batch.valid_PK.sum(-1) - 1).clamp(min=1)
    return LossOut(loss_P, ranked_reward_metrics(batch))


@register_loss(paper="arXiv:2311.09528")
def reward_regression(batch: Ratings, *, huber: Positive | None = None) -> LossOut:
    """Reward regression: the reward is to be the number that people gave.

        loss = e²,  e = r - target
        loss = δ (2 |e| - δ)  where |e| > δ, with ``huber`` = δ

    Args:
        batch: rewards of single completions and their targets, (B,).
        huber: δ, beyond which the error counts linearly, in units of the targets. None: squared everywhere.

    Returns:
        One loss per completion, (B,), in squared units of the targets. Metrics (B,): ``rewards``, ``errors`` = |e|.

    Convention: no ½ in front, as mean squared error is written; Huber's loss is twice the textbook's, so that both
    agree near 0. Targets are taken as they are: centre and scale them in the data. The reward gets their zero and unit.

    Known failure: raters use a scale differently, and the loss fits that too. Ratings pile up at few values, and so do
    the rewards.

    Source: Wang et al., HelpSteer: Multi-attribute Helpfulness Dataset for SteerLM, arXiv:2311.09528; robust form:
    Huber, Robust estimation of a location parameter, 1964.

    >>> batch = Ratings(rewards_B=torch.tensor([1.0, 5.0]), targets_B=torch.tensor([0.5, 1.0]))
    >>> reward_regression(batch).loss, reward_regression(batch, huber=1.0).loss
    (tensor([ 0.2500, 16.0000]), tensor([0.2500, 7.0000]))
    """
    error_B = batch.rewards_B - batch.targets_B.detach()
    loss_B = error_B.square()
    if huber is not None:
        loss_B = torch.where(error_B.abs() > huber, huber * (2 * error_B.abs() - huber), loss_B)
    return LossOut(loss_B, {"rewards": batch.rewards_B.detach(), "errors": error_B.detach().abs()})


@register_loss(paper="arXiv:2305.20050")
def process_reward(batch: StepScores) -> LossOut:
    """Process reward model: at the end of every step, is the step right? A binary cross-entropy per step.

        loss_t = -y_t log σ(z_t) - (1 - y_t) log σ(-z_t)   at the last token t of a step

    Args:
        batch: logits z (B, T), labels y from 0 (wrong) to 1 (right), and the mask of the steps' last tokens.

    Returns:
        One loss per token, (B, T), in nats, 0 outside the mask. Metrics (B, T): ``probs`` = σ(z), ``accuracies`` =
        whether z is on the label's side of 0.

    Convention: the mean is over the steps of the batch (count ``token``), so long solutions weigh more; ``row`` gives
    every solution the same weight. Labels between 0 and 1 (shares of roll-outs that succeed) are soft labels. TRL's
    former trainer is a cross-entropy over two classes: the same function of z = the difference of its logits. For the
    last step only, mask the others.

    Known failure: most steps are right, and a model that says so always is hard to beat on average: look at the
    accuracy on wrong steps. Labels after the first mistake mean little; mask them.

    Source: Lightman et al., Let's Verify Step by Step, arXiv:2305.20050.

    >>> batch = StepScores(
    ...     scores_BT=torch.tensor([[0.0, 1.0, 9.0]]), labels_BT=torch.tensor([[1.0, 0.0, 0.0]]),
    ...     mask_BT=torch.tensor([[True, True, False]]))
    >>> process_reward(batch).loss
    tensor([[0.6931, 1.3133, 0.0000]])
    """
    scores_BT, labels_BT = masked(batch.scores_BT, batch.mask_BT), masked(batch.labels_BT, batch.mask_BT)
    loss_BT = F.binary_cross_entropy_with_logits(scores_BT, labels_BT, reduction="none")
    with torch.no_grad():
        right_BT = (scores_BT > 0) == (labels_BT > 0.5)
        metrics = {"probs": scores_BT.detach().sigmoid(), "accuracies": right_BT.to(scores_BT.dtype)}
    return LossOut(masked(loss_BT, batch.mask_BT), metrics)
