"""Sampling and choosing: the best of several completions is given as the answer, or made likelier.

``winners="random"`` is each one's control: as many completions of every prompt, chosen whatever their reward.
"""

from typing import Annotated, Any

from prefzoo.algorithm import Algorithm, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.feedback import Finished, Verifier
from prefzoo.parts.options import ROUNDS, in_rounds
from prefzoo.parts.product import BestOfN
from prefzoo.parts.replay import Replay
from prefzoo.parts.winners import Choose, Distinct, Filtered, Reaches, Winners
from prefzoo.registry import ABOVE_0, NotNegative

FAST = {"learning_rate": 1e-5, "max_steps": 3}
Number = Annotated[int, ABOVE_0]


@register_algorithm(paper="arXiv:2009.01325", aliases=("bon",))
def best_of_n(*, n: Number = 8, winners: Choose = "best") -> Algorithm:
    """Best of n: no training; every answer is the one of n samples that the reward likes best.

        y = argmax_i R(x, y_i),   y_1..y_n ~ pi(. | x)

    Args:
        n: samples for every answer.
        winners: ``"random"``: one of the n whatever its reward, at the same cost.

    KL: not penalised, bounded: KL(best of n || pi) <= log n - (n - 1)/n nats per answer, exact where no two answers
    have equal rewards and each is improbable, smaller where they tie (``prefzoo.parts.product.BestOfN``).

    The weights are written as they are, with ``decode.json`` beside them, which ``prefzoo generate`` obeys; another
    library samples from the weights alone. The reward must be at hand whenever answers are made.

    Source: Stiennon et al., arXiv:2009.01325, which has n up to 512; the bound: Beirami et al., arXiv:2401.01879.

    Example::

        prefzoo.train("best_of_n", model="my-model", reward="runs/rm/final", output_dir="runs/bon", n=16)
    """
    return Algorithm(product=BestOfN(n, choose=winners))


@register_algorithm(paper="arXiv:2307.09288", aliases=("best_of_n_sft",), recommended=FAST, shared=ROUNDS)
def rejection_sampling(*, best: Number = 1, winners: Choose = "best", **rounds: Any) -> Algorithm:
    """Rejection sampling: sample several completions, keep the best by reward, make them likelier; round after round.

        winners(x) = the ``best`` of y_1..y_K ~ pi by reward;   loss = - mean over tokens of log pi(winner)

    Args:
        best: winners kept of each prompt.
        winners: ``"random"``: as many of each prompt, whatever their reward.

    KL: not penalised. Completions cut at the limit do not compete. Each round samples from the policy that the last one
    left.

    Source: Touvron et al. (Llama 2), arXiv:2307.09288, section 3.2.3.

    Example::

        prefzoo.train("rejection_sampling", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final")
    """
    credit = Winners(best, winners)
    return Algorithm(**in_rounds(rounds) | {"keep": Finished()}, credit=credit, loss=create_loss("sft"))


@register_algorithm(paper="arXiv:2304.06767", recommended=FAST, shared=ROUNDS)
def raft(*, kl: NotNegative = 0.0, winners: Choose = "best", **rounds: Any) -> Algorithm:
    """Reward-ranked fine-tuning: of each prompt's samples the one of the highest reward is made likelier.

        winner(x) = argmax over y_1..y_K ~ pi of R(x, y) - kl log pi(y)/ref(y);   loss = - mean over tokens of log pi

    Args:
        kl: weight of the log-ratio in what is ranked, in reward units per nat.
        winners: ``"random"``: one of each prompt, whatever its reward.

    KL: k1, in the ranking alone, to the start; the loss has none.

    Convention: the ranking is within each prompt, the paper's local one; completions cut at the limit compete.

    Source: Dong et al., RAFT, arXiv:2304.06767, algorithm 1 and section 3.3.

    Example::

        prefzoo.train("raft", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final")
    """
    return Algorithm(**in_rounds(rounds), credit=Winners(1, winners, kl), loss=create_loss("sft"))


@register_algorithm(
    paper="arXiv:2308.08998", recommended={**FAST, "max_steps": 2}, shared={**ROUNDS, "epochs_per_round": 1}
)
def rest(
    *,
    thresholds: tuple[float, ...] = (0.0, 0.7, 0.8, 0.9),
    quantiles: bool = True,
    winners: Choose = "best",
    **rounds: Any,
) -> Algorithm:
    """Reinforced self-training: sample once (grow), train on what reaches a threshold, then on less and less (improve).

        grow: D = samples of pi;   improve i: loss = - mean over tokens of log pi(y), y in D with R(y) >= τ_i, τ rising

    Args:
        thresholds: τ_1 <= τ_2 <= ..., one improve step each of ``epochs_per_round`` passes; a round is a grow step.
        quantiles: thresholds are shares of the round's rewards that lie below, not rewards.
        winners: ``"random"``: as many of each prompt in every improve step, whatever their reward.

    KL: not penalised. All improve steps go on from the last one's weights, as in the paper.

    Convention: quantiles, so that the default means the same of any reward; the paper's thresholds are on rewards in
    [0, 1], 0, 0.7, 0.8, 0.9, 0.95, 0.99. It adds the original data to the samples and may take other losses than the
    likelihood; this does not. Rewards that are equal reach a threshold together.

    Source: Gulcehre et al., ReST, arXiv:2308.08998, algorithm 1.

    Example::

        prefzoo.train("rest", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=1)
    """
    epochs = rounds["epochs_per_round"]
    parts = in_rounds({**rounds, "epochs_per_round": epochs * len(thresholds)})
    return Algorithm(**parts, credit=Filtered(tuple(thresholds), quantiles, epochs, winners), loss=create_loss("sft"))


@register_algorithm(paper="arXiv:2202.01344", recommended=FAST, shared=ROUNDS)
def expert_iteration(
    *, threshold: float = 1.0, capacity: Number = 65_536, winners: Choose = "best", **rounds: Any
) -> Algorithm:
    """Expert iteration: sample, keep what a verifier calls right, make all that was ever right likelier.

        D <- D + { y ~ pi : R(x, y) >= threshold };   loss = - mean over tokens of log pi(y), y in D, each once

    Args:
        threshold: the least score of a right answer.
        capacity: right answers that are kept over the rounds, the oldest go first.
        winners: ``"random"``: as many of each prompt, whatever their score.

    KL: not penalised.

    Convention: every round goes on from the last one's weights; Havrilla et al. (arXiv:2403.04642) begin each at the
    start model. A round without a right answer, and none before it, is skipped and logged.

    Source: Polu et al., arXiv:2202.01344, section 4.

    Example::

        prefzoo.train("expert_iteration", model="my-model", dataset="problems.jsonl", reward="exact")
    """
    parts = in_rounds(rounds) | {"feedback": Verifier(), "keep": Reaches(threshold, winners)}
    return Algorithm(**parts, replay=Replay(capacity), credit=Distinct(), loss=create_loss("sft"))
