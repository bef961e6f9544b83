"""Baselines from further completions of the same prompt: the others (RLOO), or the greedy one (ReMax)."""

from typing import Any

from prefzoo.algorithm import Algorithm, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.baselines import Greedy
from prefzoo.parts.credit import LeaveOneOut
from prefzoo.parts.options import SAMPLING, sampled
from prefzoo.parts.source import Sampler
from prefzoo.registry import NotNegative


@register_algorithm(paper="arXiv:2402.14740", recommended={"learning_rate": 1e-6}, shared={**SAMPLING, "group_size": 4})
def rloo(*, kl: NotNegative = 0.05, clip: NotNegative = 0.2, normalise: bool = False, **sampling: Any) -> Algorithm:
    """REINFORCE leave-one-out: the mean reward of the other samples of a prompt is the baseline; no critic.

        R'_i = R_i - kl log pi(y_i)/ref(y_i),   A_i = R'_i - mean of the others' R'
        loss = mean_i - min(rho_i A_i, clip(rho_i, 1 - clip, 1 + clip) A_i),   rho = pi(y)/pi_old(y)

    Args:
        kl: weight of the log-ratio to the reference, summed over the completion, in its reward; 0: no reference.
        clip: range of the ratio of a whole completion; binds only from the second optimizer step on a batch on.
        normalise: standardise advantages over the batch; the paper does not.

    KL: k1, in the reward.

    Convention: a completion is one action, as in the paper and in TRL, whose names and defaults are ``trl:rloo``. With
    one step on each batch, as in the paper, the ratio is 1 and the gradient that of REINFORCE; the clip is TRL's.

    Source: Kool et al., 2019; Ahmadian et al., Back to Basics, arXiv:2402.14740.

    Example::

        prefzoo.train("rloo", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=100)
    """
    credit = LeaveOneOut(kl=kl, normalise=normalise)
    loss = create_loss("sequence_surrogate", clip=clip)
    return Algorithm(**sampled(sampling), credit=credit, loss=loss, count="row")


@register_algorithm(
    paper="arXiv:2310.10505",
    recommended={"learning_rate": 1e-6},
    shared={**SAMPLING, "group_size": 1, "prompts_per_step": 128},
)
def remax(*, kl: NotNegative = 0.05, **sampling: Any) -> Algorithm:
    """ReMax: REINFORCE whose baseline is the reward of the prompt's greedy completion; no critic.

        R'_i = R_i - kl log pi(y_i)/ref(y_i),   A_i = R'_i - R(greedy completion),   loss = - mean_i A_i log pi(y_i)

    Args:
        kl: weight of the log-ratio to the reference, summed over the completion, in its reward; 0: no reference.

    KL: k1, in the reward of what is trained on. The greedy completion's is left out: a baseline may be anything that
    does not depend on the sample, and the gradient stays unbiased.

    Convention: the return of a whole completion for all its tokens; the code of the paper has the return to go, with a
    discount of 0.99. Each prompt costs one generation more, which is scored and never trained on; its reward is logged
    as ``reward/sampler_1``.

    Defaults: kl and one step for each sampling are those of the paper's code.

    Source: Li et al., arXiv:2310.10505, algorithm 1.

    Example::

        prefzoo.train("remax", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=100)
    """
    parts = sampled(sampling, beside=(Sampler(temperature=0.0),))
    return Algorithm(**parts, credit=Greedy(kl=kl), loss=create_loss("reinforce"), count="row_sum")
