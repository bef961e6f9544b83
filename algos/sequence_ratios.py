"""GRPO's groups under losses with one ratio for a whole completion."""

from typing import Any

from prefzoo.algorithm import Algorithm, register_algorithm
from prefzoo.algos.group_relative import GROUPED, grouped
from prefzoo.registry import NotNegative


@register_algorithm(
    paper="arXiv:2507.18071", recommended={"learning_rate": 1e-6}, around="gspo", shared={**GROUPED, "minibatches": 4}
)
def gspo(
    *, clip: NotNegative = 3e-4, clip_high: NotNegative | None = None, per_token: bool = False, **sampling: Any
) -> Algorithm:
    """Group sequence policy optimization: GRPO with one length-normalised ratio per completion.

        A_i = (R_i - mean(R)) / (std(R) + 1e-4),   s_i = (pi(y_i) / pi_old(y_i))^(1 / n_i)
        loss = - mean_i min(s_i A_i, clip(s_i, 1 - clip, 1 + clip_high) A_i)

    Args:
        clip: how far the ratio s may fall; far below PPO's, because a mean of log-ratios hardly moves.
        clip_high: how far it may rise; None: 4e-4 beside the default clip, else as ``clip``.
        per_token: GSPO-token, the same value with a gradient for each token's own advantage.

    KL: none by default; k3 in the loss otherwise.

    Defaults: the paper's, clip and four minibatches; with a single one the ratio is 1 and nothing is clipped.

    Source: Zheng et al., arXiv:2507.18071, equations 5 to 7.

    Example::

        prefzoo.train("gspo", model="my-model", dataset="problems.jsonl", reward="numeric", max_steps=100)
    """
    return Algorithm(**grouped("gspo", sampling, clip=clip, clip_high=clip_high, per_token=per_token))


@register_algorithm(
    paper="arXiv:2602.05261", recommended={"learning_rate": 1e-6}, around="luspo", shared={**GROUPED, "minibatches": 4}
)
def luspo(*, clip: NotNegative = 0.2, clip_high: NotNegative | None = None, **sampling: Any) -> Algorithm:
    """Length-unbiased sequence policy optimization: GSPO with every completion weighted by its length.

        loss = - mean_i n_i min(s_i A_i, clip(s_i, 1 - clip, 1 + clip_high) A_i)     A, s as in gspo

    Args:
        clip: how far the ratio s may fall.
        clip_high: how far it may rise; None: as ``clip``.

    KL: none by default; k3 in the loss, summed over the tokens of a completion too, otherwise.

    Defaults: clip is TRL's, wide for this ratio; the schedule is ours, that of gspo.

    Source: Liu et al., arXiv:2602.05261.

    Example::

        prefzoo.train("luspo", model="my-model", dataset="problems.jsonl", reward="numeric", max_steps=100)
    """
    return Algorithm(**grouped("luspo", sampling, clip=clip, clip_high=clip_high))


@register_algorithm(
    paper="arXiv:2507.20673", recommended={"learning_rate": 1e-6}, around="gmpo", shared={**GROUPED, "minibatches": 8}
)
def gmpo(*, clip: NotNegative = 0.4, clip_high: NotNegative | None = None, **sampling: Any) -> Algorithm:
    """Geometric-mean policy optimization: GRPO with the geometric mean of a completion's clipped token ratios.

        loss = - mean_i A_i exp(mean_t x_it),   A_i = (R_i - mean(R)) / (std(R) + 1e-4)
        x_it = min(log rho_it, clip_high) where A_i > 0,  max(log rho_it, - clip) where A_i < 0

    Args:
        clip: how far the logarithm of a token's ratio rho = pi/pi_old may fall, in nats.
        clip_high: how far it may rise, in nats; None: as ``clip``.

    KL: none by default, as in the paper's mathematics runs; k3 in the loss otherwise.

    Defaults: clip is the paper's; eight optimizer steps of a sampling are those of its setting, Dr. GRPO's.

    Source: Zhao et al., arXiv:2507.20673.

    Example::

        prefzoo.train("gmpo", model="my-model", dataset="problems.jsonl", reward="numeric", max_steps=100)
    """
    return Algorithm(**grouped("gmpo", sampling, clip=clip, clip_high=clip_high))
