"""Reinforcement learning with verifiable rewards."""

from dataclasses import replace
from typing import Any, Literal

from prefzoo.algorithm import Algorithm, create_algorithm, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.credit import GroupRelative, LeaveOneOut
from prefzoo.parts.feedback import Reward, Verifier
from prefzoo.parts.options import SAMPLING, sampled
from prefzoo.registry import UsageError


@register_algorithm(paper="arXiv:2411.15124", recommended={"learning_rate": 1e-6}, shared=SAMPLING, as_given=True)
def rlvr(
    *,
    over: str | None = None,
    estimator: Literal["group_relative", "leave_one_out"] = "group_relative",
    clip: float = 0.2,
    std: bool = True,
    **sampling: Any,
) -> Algorithm:
    """Reinforcement learning with verifiable rewards: right answers are reinforced, wrong ones weakened.

        R_i = 1 if the verifier accepts y_i, else 0
        loss = - mean over tokens of min(rho A_i, clip(rho, 1 - clip, 1 + clip) A_i)

    Args:
        over: the algorithm that learns from the verdicts, in place of the loss above: ``"dapo"``, ``"ppo"``, any that
            samples. It has its own defaults; the sampling options that are given here go on to it. None: the loss
            above.
        estimator: of the advantage: ``group_relative`` (GRPO's) or ``leave_one_out`` (RLOO's).
        clip, std: as in ``grpo``; ``std`` belongs to ``group_relative``.

    Groups that are all right or all wrong teach nothing: ``frac_reward_zero_std`` is their share, and
    ``over="dapo"`` samples others in their place.

    KL: none, but what ``over`` has.

    GRPO's composition with a verifier as the feedback, no KL term and a token mean. ``reward=`` must be a function or
    a verifier's name; a reward model is refused.

    Source: the name: Lambert et al. (Tülu 3), arXiv:2411.15124, who use PPO (``over="ppo"``); the estimator:
    arXiv:2402.03300.

    Example::

        prefzoo.train("rlvr", model="my-model", dataset="problems.jsonl", reward="numeric", max_steps=100)
    """
    credits = {"group_relative": GroupRelative("group" if std else "none"), "leave_one_out": LeaveOneOut()}
    if estimator not in credits:
        raise UsageError(f"rlvr: estimator is {estimator!r}; it must be one of {', '.join(credits)}.")
    if over is not None:
        if (estimator, clip, std) != ("group_relative", 0.2, True):
            raise UsageError(f"rlvr: estimator, clip and std have no effect with over={over!r}, which has its own.")
        return verified(over, sampling)
    sampling = {**SAMPLING, **sampling}
    if estimator == "leave_one_out" and not std:
        raise UsageError("rlvr: std has no effect with estimator='leave_one_out', which never divides; leave it out.")
    parts = sampled(sampling) | {"feedback": Verifier(sampling["missing_eos_penalty"])}
    return Algorithm(
        **parts, credit=credits[estimator], loss=create_loss("clipped_surrogate", clip=clip), count="token"
    )


def verified(name: str, options: dict[str, Any]) -> Algorithm:
    """The algorithm of that name with a verifier wherever it has a reward."""
    algorithm = create_algorithm(name, **options)
    if not any(type(s.feedback) in (Reward, Verifier) for s in algorithm.stages):
        raise UsageError(f"rlvr: over={name!r} does not sample and score; give one that does, such as 'dapo' or 'ppo'.")
    algorithm.stages = tuple(
        replace(s, feedback=Verifier(s.feedback.missing_eos_penalty)) if type(s.feedback) is Reward else s
        for s in algorithm.stages
    )
    return algorithm
