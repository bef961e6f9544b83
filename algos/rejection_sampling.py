"""Rejection sampling fine-tuning."""

from prefzoo.algorithm import Algorithm, Schedule, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.credit import BestOfK
from prefzoo.parts.feedback import Finished, Reward
from prefzoo.parts.source import Rollouts


@register_algorithm(
    paper="arXiv:2307.09288", aliases=("best_of_n_sft",), recommended={"learning_rate": 1e-5, "max_steps": 3}
)
def rejection_sampling(
    *,
    samples_per_prompt: int = 8,
    best: int = 1,
    prompts_per_round: int = 512,
    epochs_per_round: int = 2,
    rows_per_update: int = 64,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
) -> Algorithm:
    """Rejection sampling: sample several completions, keep the best by reward, make them likelier; round after round.

        winners(x) = the ``best`` of y_1..y_K ~ pi by reward;   loss = - mean over tokens of log pi(winner)

    Args:
        samples_per_prompt: K.
        best: winners kept of each prompt.
        prompts_per_round: prompts sampled before each round of training; ``max_steps`` is the number of rounds.
        epochs_per_round: passes over a round's winners.
        rows_per_update: winners per optimizer step.
        temperature, max_new_tokens: sampling.

    Completions cut at the limit do not compete. Each round samples from the policy that the last one left.

    Source: Touvron et al. (Llama 2), arXiv:2307.09288, section 3.2.3; Dong et al. (RAFT), arXiv:2304.06767.

    Example::

        prefzoo.train("rejection_sampling", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final")
    """
    return Algorithm(
        source=Rollouts(samples_per_prompt, temperature=temperature, max_new_tokens=max_new_tokens),
        feedback=Reward(),
        keep=Finished(),
        credit=BestOfK(best),
        loss=create_loss("sft"),
        schedule=Schedule(prompts_per_round, epochs_per_round, minibatch_rows=rows_per_update),
    )
