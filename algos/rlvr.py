"""Reinforcement learning with verifiable rewards."""

from typing import Literal

from prefzoo.algorithm import Algorithm, Schedule, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.credit import GroupRelative, LeaveOneOut
from prefzoo.parts.feedback import Verifier
from prefzoo.parts.source import Rollouts
from prefzoo.registry import UsageError


@register_algorithm(paper="arXiv:2411.15124", recommended={"learning_rate": 1e-6})
def rlvr(
    *,
    estimator: Literal["group_relative", "leave_one_out"] = "group_relative",
    group_size: int = 8,
    clip: float = 0.2,
    std: bool = True,
    prompts_per_step: int = 32,
    inner_epochs: int = 1,
    minibatches: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
) -> Algorithm:
    """Reinforcement learning with verifiable rewards: right answers are reinforced, wrong ones weakened.

        R_i = 1 if the verifier accepts y_i, else 0
        loss = - mean over tokens of min(rho A_i, clip(rho, 1 - clip, 1 + clip) A_i)

    Args:
        estimator: of the advantage: ``group_relative`` (GRPO's) or ``leave_one_out`` (RLOO's).
        group_size: completions sampled per prompt; groups that are all right or all wrong teach nothing.
        clip, std: as in ``grpo``; ``std`` belongs to ``group_relative``.
        prompts_per_step, inner_epochs, minibatches: the rollout schedule.
        temperature, max_new_tokens: sampling.

    GRPO's composition with a verifier as the feedback, no KL term and a token mean. ``reward=`` must be a function or
    a verifier's name; a reward model is refused.

    Source: the name: Lambert et al. (Tülu 3), arXiv:2411.15124, who use PPO; the estimator: arXiv:2402.03300.

    Example::

        prefzoo.train("rlvr", model="my-model", dataset="problems.jsonl", reward="numeric", max_steps=100)
    """
    credits = {"group_relative": GroupRelative("group" if std else "none"), "leave_one_out": LeaveOneOut()}
    if estimator not in credits:
        raise UsageError(f"rlvr: estimator is {estimator!r}; it must be one of {', '.join(credits)}.")
    if estimator == "leave_one_out" and not std:
        raise UsageError("rlvr: std has no effect with estimator='leave_one_out', which never divides; leave it out.")
    return Algorithm(
        source=Rollouts(group_size, temperature=temperature, max_new_tokens=max_new_tokens),
        feedback=Verifier(),
        credit=credits[estimator],
        loss=create_loss("clipped_surrogate", clip=clip),
        count="token",
        schedule=Schedule(prompts_per_step, inner_epochs, minibatches),
    )
