"""REINFORCE and its kin: whole completions, one baseline, no critic."""

from typing import Any, Literal

from prefzoo.algorithm import Algorithm, Term, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.losses.kl import ValueEstimatorName
from prefzoo.parts.baselines import Baseline, BatchNormalised, MovingMean
from prefzoo.parts.options import SAMPLING, sampled
from prefzoo.registry import NotNegative, Share, UsageError

SINGLE = {**SAMPLING, "group_size": 1, "prompts_per_step": 128}
TRAINED = {"learning_rate": 1e-6}


@register_algorithm(paper="arXiv:2402.14740", recommended=TRAINED, around="reinforce", shared=SINGLE)
def reinforce(
    *,
    baseline: Literal["none", "batch", "moving"] = "moving",
    decay: Share | None = None,
    kl: NotNegative = 0.05,
    **sampling: Any,
) -> Algorithm:
    """REINFORCE: make completions likelier in proportion to how much better than a baseline they are.

        R'_i = R_i - kl log pi(y_i)/ref(y_i),   A_i = R'_i - b,   loss = - mean_i A_i log pi(y_i)

    Args:
        baseline: b. ``"moving"``: the mean reward of the steps before; ``"batch"``: that of the other completions of
            this step; ``"none"``: 0.
        decay: of the moving baseline, weight of the past in each step; None: all steps alike.
        kl: weight of the log-ratio to the reference, summed over the completion, in its reward; 0: no reference.

    KL: k1, in the reward. The moving baseline is that of the rewards without it.

    Convention: a completion is one action and its ratio is not corrected: one optimizer step for each sampling is
    right, further ones are biased. Every baseline here leaves the gradient unbiased.

    Source: Williams, 1992; the moving baseline over all steps: Ahmadian et al., arXiv:2402.14740, equation 5.

    Example::

        prefzoo.train("reinforce", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=100)
    """
    if decay is not None and baseline != "moving":
        raise UsageError(f"reinforce: decay has no effect with baseline={baseline!r}; leave it out.")
    moving = MovingMean(decay) if baseline == "moving" else None
    credit = Baseline(moving or ("batch" if baseline == "batch" else None), kl=kl)
    around = {k: v for k, v in sampling.items() if k not in SINGLE}
    controllers = {} if moving is None else {"baseline": moving}
    return Algorithm(
        **sampled(sampling), credit=credit, loss=create_loss("reinforce", **around), controllers=controllers
    )


@register_algorithm(paper="arXiv:2501.03262", recommended=TRAINED, shared=SINGLE)
def reinforce_pp(
    *,
    kl: NotNegative = 0.01,
    kl_estimator: ValueEstimatorName = "k1",
    clip: NotNegative = 0.2,
    gamma: Share = 1.0,
    **sampling: Any,
) -> Algorithm:
    """REINFORCE++: returns with a KL penalty inside, standardised over the tokens of the batch; no critic, no groups.

        r_t = - kl log pi(y_t)/ref(y_t) + [t last] R;   A_t = (G_t - mean(G)) / std(G),   G_t = r_t + gamma G_{t+1}
        loss = - mean over tokens of min(rho A_t, clip(rho, 1 - clip, 1 + clip) A_t)

    Args:
        kl: weight of the penalty at every token, in the reward; 0: no reference is loaded.
        kl_estimator: k1 (signed log-ratio), k2, k3 or abs.
        clip: range of the ratio rho = pi/pi_old; binds only from the second optimizer step on a batch on.
        gamma: discount per token.

    KL: in the reward, k1 by default.

    Source: Hu et al., arXiv:2501.03262; its defaults are those of its code, OpenRLHF.

    Example::

        prefzoo.train("reinforce_pp", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=100)
    """
    credit = BatchNormalised(kl=kl, gamma=gamma, estimator=kl_estimator)
    return Algorithm(**sampled(sampling), credit=credit, loss=create_loss("clipped_surrogate", clip=clip))


@register_algorithm(paper="arXiv:2501.03262", recommended=TRAINED, shared=SAMPLING)
def reinforce_pp_baseline(*, kl: NotNegative = 0.01, clip: NotNegative = 0.2, **sampling: Any) -> Algorithm:
    """REINFORCE++ with the group's mean as baseline: GRPO with the deviation of the batch, and a k2 penalty.

        A_i = (R_i - mean of its group), standardised over the tokens of the batch
        loss = - mean over tokens of min(rho A_i, clip(rho, 1 - clip, 1 + clip) A_i) - kl (log pi/ref)^2 / 2

    Args:
        kl: weight of the KL to the reference; 0: no reference is loaded.
        clip: range of the ratio rho = pi/pi_old.

    KL: k2, in the loss, whose gradient is that of the KL.

    Source: Hu et al., arXiv:2501.03262, section on reasoning tasks.

    Example::

        prefzoo.train("reinforce_pp_baseline", model="my-model", dataset="problems.jsonl", reward="numeric")
    """
    terms = [Term(create_loss("clipped_surrogate", clip=clip), count="token")]
    if kl:
        terms.append(Term(create_loss("kl_penalty", estimator="k2"), count="token", weight=kl))
    return Algorithm(**sampled(sampling), credit=BatchNormalised(group=True, kl=0.0), terms=tuple(terms))
