"""Group relative policy optimization."""

from prefzoo.algorithm import Algorithm, Schedule, Term, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.credit import GroupRelative
from prefzoo.parts.feedback import MaskTruncated, Reward
from prefzoo.parts.source import Rollouts


@register_algorithm(paper="arXiv:2402.03300", recommended={"learning_rate": 1e-6})
def grpo(
    *,
    group_size: int = 8,
    clip: float = 0.2,
    kl: float = 0.04,
    std: bool = True,
    count: str = "row",
    missing_eos_penalty: float = 0.0,
    mask_truncated: bool = False,
    prompts_per_step: int = 32,
    inner_epochs: int = 1,
    minibatches: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
) -> Algorithm:
    """Group relative policy optimization: the other samples of a prompt are the baseline; no critic.

        A_i = (R_i - mean(R)) / (std(R) + 1e-4)
        loss = mean_i mean_t [ - min(rho A_i, clip(rho, 1 - clip, 1 + clip) A_i) + kl (ref/pi - 1 - log ref/pi) ]

    Args:
        group_size: completions sampled per prompt.
        clip: range of the ratio rho = pi/pi_old; binds only from the second optimizer step on a batch on.
        kl: weight of the KL to the reference (k3, in the loss); 0: no reference is loaded.
        std: divide by the group's standard deviation (Dr. GRPO does not).
        count: ``"row"``, the paper's mean over sequences of token means; ``"token"`` is DAPO's.
        missing_eos_penalty: subtracted from the reward of completions cut at the limit.
        mask_truncated: no gradient from completions cut at the limit.
        prompts_per_step, inner_epochs, minibatches: the rollout schedule.
        temperature, max_new_tokens: sampling.

    Convention: the paper's: sequence mean, KL 0.04. TRL's default under this name is DAPO's token mean without KL.

    Source: Shao et al., arXiv:2402.03300, equation 3; k3: equation 4.

    Example::

        prefzoo.train("grpo", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=100)
    """
    surrogate = Term(create_loss("clipped_surrogate", clip=clip), count=count)
    penalty = Term(create_loss("kl_penalty", estimator="k3"), count=count, weight=kl)
    return Algorithm(
        source=Rollouts(group_size, temperature=temperature, max_new_tokens=max_new_tokens),
        feedback=Reward(missing_eos_penalty),
        keep=MaskTruncated() if mask_truncated else None,
        credit=GroupRelative("group" if std else "none"),
        terms=(surrogate, penalty) if kl else (surrogate,),
        schedule=Schedule(prompts_per_step, inner_epochs, minibatches),
    )
