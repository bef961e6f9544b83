"""GRPO's groups under losses that weight tokens instead of clipping them, and under other advantages."""

from typing import Any

from prefzoo.algorithm import Algorithm, register_algorithm
from prefzoo.algos.group_relative import GROUPED, grouped
from prefzoo.parts.baselines import Decoupled, LengthWeighted
from prefzoo.parts.feedback import Objectives
from prefzoo.registry import NotNegative, Positive, UsageError


@register_algorithm(
    paper="arXiv:2506.13585", recommended={"learning_rate": 1e-6}, around="cispo", shared={**GROUPED, "minibatches": 16}
)
def cispo(*, clip: NotNegative | None = None, clip_high: NotNegative = 4.0, **sampling: Any) -> Algorithm:
    """CISPO: group-relative REINFORCE weighted by the clipped ratio; a clipped token keeps its gradient.

        loss = - mean over tokens of sg(clip(rho, 1 - clip, 1 + clip_high)) A_i log pi(y_t)

    Args:
        clip: the least weight is 1 - clip; None: no lower bound.
        clip_high: the largest weight is 1 + clip_high.

    KL: none by default, as in the paper; k3 in the loss otherwise. Its dynamic sampling is ``dapo``'s.

    Defaults: no lower bound and sixteen optimizer steps of a sampling are the paper's; it gives no number for
    clip_high, 4 is the cap of 5 that TRL recommends.

    Source: MiniMax, MiniMax-M1, arXiv:2506.13585, equations 4 and 5.

    Example::

        prefzoo.train("cispo", model="my-model", dataset="problems.jsonl", reward="numeric", max_steps=100)
    """
    return Algorithm(**grouped("cispo", sampling, clip=clip, clip_high=clip_high))


@register_algorithm(
    paper="arXiv:2511.20347", recommended={"learning_rate": 1e-6}, around="sapo", shared={**GROUPED, "minibatches": 4}
)
def sapo(*, temperature_pos: Positive = 1.0, temperature_neg: Positive = 1.05, **sampling: Any) -> Algorithm:
    """Soft adaptive policy optimization: GRPO with a smooth gate on the ratio in place of the clip.

        loss = - mean_i mean_t (4 / tau) sigmoid(tau (rho - 1)) A_i

    Args:
        temperature_pos: tau where A > 0; the larger, the narrower the range of ratios that still has gradient.
        temperature_neg: tau where A <= 0.

    KL: none by default; k3 in the loss otherwise.

    Defaults: the temperatures are the paper's; the schedule is ours, that of gspo.

    Source: Gao et al., arXiv:2511.20347.

    Example::

        prefzoo.train("sapo", model="my-model", dataset="problems.jsonl", reward="numeric", max_steps=100)
    """
    parts = grouped("sapo", sampling, temperature_pos=temperature_pos, temperature_neg=temperature_neg)
    return Algorithm(**parts)


@register_algorithm(paper="arXiv:2505.23585", recommended={"learning_rate": 1e-6}, shared=GROUPED)
def opo(**sampling: Any) -> Algorithm:
    """OPO: exact on-policy REINFORCE with the length-weighted mean reward of the group as its baseline.

        A_i = R_i - sum_j n_j R_j / sum_j n_j,   loss = - mean_i sum_t A_i log pi(y_it)

    KL: none by default, as in the paper; k3 in the loss otherwise.

    Convention: exact on-policy means one optimizer step for each sampling, and another schedule is refused. Count
    ``row_sum``, for which the baseline is derived.

    Source: Hao et al., arXiv:2505.23585.

    Example::

        prefzoo.train("opo", model="my-model", dataset="problems.jsonl", reward="numeric", max_steps=100)
    """
    if sampling["inner_epochs"] > 1 or sampling["minibatches"] > 1:
        raise UsageError("opo is exactly on-policy: leave inner_epochs and minibatches at 1, or take grpo.")
    return Algorithm(**grouped("reinforce", sampling) | {"credit": LengthWeighted()})


@register_algorithm(paper="arXiv:2601.05242", recommended={"learning_rate": 1e-6}, shared=GROUPED)
def gdpo(*, weights: tuple[float, ...] | None = None, clip: NotNegative = 0.2, **sampling: Any) -> Algorithm:
    """GDPO: GRPO for several rewards, each standardised within its group before they are added.

        A_i = standardised over the batch: sum_k w_k (R_ik - mean_k) / (std_k + 1e-4)
        loss = - mean over tokens of min(rho A_i, clip(rho, 1 - clip, 1 + clip) A_i)

    Args:
        weights: w, one for each reward of ``reward=[...]``; None: all 1.
        clip: range of the ratio rho = pi/pi_old.

    KL: none by default; k3 in the loss otherwise.

    Convention: the token mean, as in the code that the paper builds on (TRL and verl).

    Source: Liu et al., arXiv:2601.05242.

    Example::

        prefzoo.train("gdpo", model="my-model", dataset="problems.jsonl", reward=["numeric", my_format], max_steps=100)
    """
    if sampling["missing_eos_penalty"]:
        raise UsageError("gdpo: missing_eos_penalty has no place among several rewards; give a reward for the end.")
    parts = grouped("clipped_surrogate", sampling, count="token", clip=clip)
    return Algorithm(
        **parts | {"feedback": Objectives(None if weights is None else len(weights)), "credit": Decoupled(weights)}
    )
