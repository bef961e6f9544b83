"""REINFORCE leave-one-out."""

from prefzoo.algorithm import Algorithm, Schedule, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.credit import LeaveOneOut
from prefzoo.parts.feedback import Reward
from prefzoo.parts.source import Rollouts
from prefzoo.registry import NotNegative


@register_algorithm(paper="arXiv:2402.14740", recommended={"learning_rate": 1e-6})
def rloo(
    *,
    group_size: int = 4,
    kl: NotNegative = 0.05,
    clip: NotNegative = 0.2,
    normalise: bool = False,
    missing_eos_penalty: float = 0.0,
    prompts_per_step: int = 32,
    inner_epochs: int = 1,
    minibatches: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
) -> Algorithm:
    """REINFORCE leave-one-out: the mean reward of the other samples of a prompt is the baseline; no critic.

        R'_i = R_i - kl log pi(y_i)/ref(y_i),   A_i = R'_i - mean of the others' R'
        loss = mean_i - min(rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i),   rho = pi(y)/pi_old(y)

    Args:
        group_size: completions sampled per prompt.
        kl: weight of the log-ratio to the reference, summed over the completion, in its reward; 0: no reference.
        clip: range of the ratio of a whole completion; binds only from the second optimizer step on a batch on.
        normalise: standardise advantages over the batch; the paper does not.
        missing_eos_penalty: subtracted from the reward of completions cut at the limit.
        prompts_per_step, inner_epochs, minibatches: the rollout schedule.
        temperature, max_new_tokens: sampling.

    Convention: a completion is one action, as in the paper and in TRL, whose names and defaults are ``trl:rloo``. With
    one step on each batch, as in the paper, the ratio is 1 and the gradient that of REINFORCE; the clip is TRL's.

    Source: Kool et al., 2019; Ahmadian et al., Back to Basics, arXiv:2402.14740.

    Example::

        prefzoo.train("rloo", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=100)
    """
    return Algorithm(
        source=Rollouts(group_size, temperature=temperature, max_new_tokens=max_new_tokens),
        feedback=Reward(missing_eos_penalty),
        credit=LeaveOneOut(kl=kl, normalise=normalise),
        loss=create_loss("sequence_surrogate", clip=clip),
        count="row",
        schedule=Schedule(prompts_per_step, inner_epochs, minibatches),
    )
