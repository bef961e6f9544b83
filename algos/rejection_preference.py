"""Preference optimization on samples of the start, chosen by their rewards."""

import math
from typing import Annotated, Any, Literal

from prefzoo.algorithm import Algorithm, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.options import ROUNDS, in_rounds
from prefzoo.parts.pairs import AllPairs, RejectionSampled, ScoreUnit
from prefzoo.parts.preference import compared, loss_named
from prefzoo.registry import ABOVE_0, Positive, UsageError


@register_algorithm(
    paper="arXiv:2402.10038", recommended={"learning_rate": 1e-6}, shared={**ROUNDS, "samples_per_prompt": 16}
)
def rs_dpo(*, beta: Positive = 0.1, threshold: float = 0.85, tau: Positive = 1.0, **rounds: Any) -> Algorithm:
    """DPO on all pairs of samples of the start whose rewards are clearly apart.

        y_1..y_K ~ ref;   pairs = {(i, j) : σ((R_i - R_j) / τ) > η};   loss = -log σ(β (s_i - s_j)),  s = log π/ref

    Args:
        beta: strength of the pull to the reference, per nat.
        threshold: η, from 0.5, where all that differ are pairs, up to 1 (not reached).
        tau: τ, in reward units.

    KL: to the start, in the loss, as an implicit reward.

    All rounds sample from the start; the paper has one. A prompt with clear differences gives up to K (K - 1) / 2
    pairs. Prompts without a pair are logged.

    Source: Khaki et al., RS-DPO, arXiv:2402.10038, algorithm 1; the paper tries several η.

    Example::

        prefzoo.train("rs_dpo", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=1)
    """
    if not 0.5 <= threshold < 1:
        raise UsageError(f"rs_dpo: threshold is a probability from 0.5 to below 1, got {threshold:g}.")
    return Algorithm(
        **in_rounds(rounds, by="reference"),
        credit=AllPairs(min_gap=tau * math.log(threshold / (1 - threshold))),
        loss=create_loss("dpo", beta=beta),
    )


@register_algorithm(
    paper="arXiv:2309.06657", recommended={"learning_rate": 1e-6}, shared={**ROUNDS, "samples_per_prompt": 64}
)
def rso(
    *,
    loss: str = "dpo",
    beta: Positive = 0.05,
    reward_beta: Positive = 0.5,
    accepted: Annotated[int, ABOVE_0] = 8,
    pairs: Literal["first_round", "tournament", "all", "extremes"] = "first_round",
    soft_labels: ScoreUnit | None = None,
    **rounds: Any,
) -> Algorithm:
    """Statistical rejection sampling: pairs as the optimal policy would write them, from samples of the start.

        y_1..y_K ~ ref, accepted with probability exp((R - max R) / β_r): then y ~ ref exp(R / β_r)
        loss = -log σ(β (s_w - s_l)),  s = log π/ref

    Args:
        loss: ``dpo`` is the paper's sigmoid-norm, ``hinge`` its hinge-norm; any other loss of pairs, with its options.
        beta: of the loss, the paper's γ.
        reward_beta: β_r, in reward units; smaller accepts better completions.
        accepted: completions kept of each prompt; their share is logged as ``kept``.
        pairs: which of them meet: two by two; the winners again until one is left; all; the best and the worst.
        soft_labels: as in ``online_dpo``.

    KL: to the start, in the loss, as an implicit reward; β_r is the KL coefficient of the policy that is imitated.

    Convention: labels are by the run's reward (the paper asks its pairwise model, a judge). All rounds sample from the
    start; the paper has one. At a small β_r passes after the first fill up ``accepted`` with worse ones.

    Source: Liu et al., Statistical Rejection Sampling Improves Preference Optimization, arXiv:2309.06657; K = 64,
    8 accepted, β_r = 0.5 and γ = 0.05: their experiments.

    Example::

        prefzoo.train("rso", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=1)
    """
    if accepted > rounds["samples_per_prompt"]:
        raise UsageError(f"rso: {accepted} of {rounds['samples_per_prompt']} samples cannot be accepted; sample more.")
    return Algorithm(
        **in_rounds(rounds, by="reference"),
        keep=RejectionSampled(reward_beta, accepted),
        **compared(loss_named(loss, beta=beta), pairs, soft_labels),
    )
