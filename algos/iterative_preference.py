"""Iterative preference optimization: rounds of sampling, comparing, and training on the comparisons."""

from typing import Any, Literal

from prefzoo.algorithm import Algorithm, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.options import ROUNDS, in_rounds
from prefzoo.parts.pairs import AgainstOther, RankedSamples, ScoreUnit
from prefzoo.parts.preference import compared, loss_named
from prefzoo.parts.reference import EachRound, Start
from prefzoo.parts.source import Sampler
from prefzoo.parts.win_rate import Demonstrated, WinRate
from prefzoo.registry import Positive

SLOWLY = {"learning_rate": 5e-7, "max_steps": 3}


@register_algorithm(paper="arXiv:2312.16682", recommended=SLOWLY, shared=ROUNDS)
def iterative_dpo(
    *,
    loss: str = "dpo",
    beta: Positive | None = None,
    pairs: Literal["extremes", "all"] = "extremes",
    soft_labels: ScoreUnit | None = None,
    reference: Literal["round", "start"] | None = None,
    **rounds: Any,
) -> Algorithm:
    """Iterative DPO: sample from the policy, compare by reward, train on the pairs for some epochs; and again.

        (y_w, y_l) = the best and the worst of y_1..y_K ~ π_t;   π_t+1 = argmin E[-log σ(β (s_w - s_l))]
        s = log π/ref,  ref = π_t, or the start

    Args:
        loss: any loss of pairs, labelled completions or rankings, with its options, as in ``online_dpo``.
        beta: of the loss; None: its own default.
        pairs: the best against the worst, or all that differ in reward.
        soft_labels: as in ``online_dpo``.
        reference: ``round``: the policy as it was at the beginning of the round; ``start``: the start. None: ``round``,
            where the loss has a reference.

    KL: to the reference, in the loss, as an implicit reward. With ``round`` it holds each round to the last, and
    nothing holds the sum of the rounds: T rounds may go T times as far.

    Equal and missing rewards give no pair; their shares are logged.

    Source: Xu et al., Some Things Are More Cringe than Others, arXiv:2312.16682; with a fixed reference: Dong et al.,
    RLHF Workflow, arXiv:2405.07863. The best against the worst: Yuan et al., arXiv:2401.10020.

    Example::

        prefzoo.train("iterative_dpo", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final")
    """
    chosen = loss_named(loss, beta=beta)
    anchors = {"round": EachRound(), "start": Start(), None: EachRound() if chosen.reference else Start()}
    return Algorithm(**in_rounds(rounds), **compared(chosen, pairs, soft_labels), reference=anchors[reference])


@register_algorithm(
    paper="arXiv:2405.00675", recommended=SLOWLY,
    shared={**ROUNDS, "samples_per_prompt": 5, "epochs_per_round": 1},
)  # fmt: skip
def sppo_iterative(
    *, beta: Positive = 0.001, tau: Positive = 1.0, train_on: Literal["ends", "all"] = "ends", **rounds: Any
) -> Algorithm:
    """Self-play preference optimization: each completion's log-ratio is regressed on how often it wins against others.

        p_i = mean over j ≠ i of P(y_i beats y_j), of K samples of π_t
        loss = mean_i (log π(y_i)/π_t(y_i) - (p_i - 1/2) / β)²

    Args:
        beta: 1 / η of the paper, in win probability per nat.
        tau: reward units of one logit, where ``reward`` scores completions one by one; a judge gives P itself.
        train_on: the completions that win most and least often, as the authors do, or all K.

    KL: to the policy at the beginning of the round, in the loss; with exact p a round ends at π ∝ π_t exp(p / β).

    Prompts where all win equally often are left out; their share is logged.

    Convention: a completion does not meet itself. The paper's mean includes that as one half, which takes p towards 1/2
    by 1 / K.

    Source: Wu et al., arXiv:2405.00675, algorithm 1; K = 5, three rounds, η = 1000: their experiments.

    Example::

        prefzoo.train("sppo_iterative", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final")
    """
    return Algorithm(
        **in_rounds(rounds) | {"feedback": WinRate(tau)},
        credit=RankedSamples(ends=train_on == "ends"),
        loss=create_loss("sppo", beta=beta),
        reference=EachRound(),
    )


@register_algorithm(
    paper="arXiv:2401.01335", recommended=SLOWLY,
    shared={**ROUNDS, "samples_per_prompt": 1},
)  # fmt: skip
def spin(*, loss: str = "dpo", beta: Positive | None = None, **rounds: Any) -> Algorithm:
    """Self-play fine-tuning: the demonstration is preferred to what the policy of the last round wrote itself.

        y' ~ π_t;   loss = -log σ(β (log π(y)/π_t(y) - log π(y')/π_t(y'))),   y the demonstration of the prompt

    Args:
        loss: any loss of pairs, with its options; the paper's is the logistic one, ``dpo``.
        beta: the paper's λ; None: the loss's default, 0.1 for ``dpo``, which the paper has in its first rounds.

    KL: to the policy of the last round, in the loss. The game is over where the policy writes as the demonstrations do.

    Trains on prompts with completions; no reward is asked for. A sample that equals the demonstration gives no pair.

    Source: Chen et al., Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models,
    arXiv:2401.01335, algorithm 1.

    Example::

        prefzoo.train("spin", model="my-model", dataset="demonstrations.jsonl")
    """
    return Algorithm(
        **in_rounds(rounds, beside=(Sampler("data"),)) | {"feedback": Demonstrated()},
        credit=AgainstOther(),
        loss=loss_named(loss, beta=beta),
        reference=EachRound(),
    )
