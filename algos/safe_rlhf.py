"""Safe reinforcement learning from human feedback."""

from typing import Any

from prefzoo.algorithm import Algorithm, Term, register_algorithm
from prefzoo.algos.proximal import ROLLED, actor_critic
from prefzoo.losses import create_loss
from prefzoo.parts.controllers import FixedKL
from prefzoo.parts.critics import GAE
from prefzoo.parts.feedback import Objectives
from prefzoo.parts.safety import Lagrangian, Multiplier
from prefzoo.registry import NotNegative, Positive, Share

PRICED = {k: v for k, v in ROLLED.items() if k != "missing_eos_penalty"}


@register_algorithm(
    paper="arXiv:2310.12773", aliases=("ppo_lag",), recommended={"learning_rate": 1e-6, "critic_learning_rate": 5e-6},
    shared=PRICED,
)  # fmt: skip
def safe_rlhf(
    *,
    budget: float = 0.0,
    multiplier: Positive = 1.0,
    multiplier_rate: NotNegative = 0.1,
    multiplier_max: Positive | None = 5.0,
    kl: NotNegative = 0.01,
    clip: NotNegative = 0.2,
    value_clip: NotNegative | None = 0.2,
    gamma: Share = 1.0,
    lam: Share = 0.95,
    whiten: bool = False,
    ptx: NotNegative = 0.0,
    **sampling: Any,
) -> Algorithm:
    """Safe RLHF: raise a reward while the mean cost stays within a budget, by a multiplier that learns its price.

        max over π of E[R] subject to E[C] <= budget:   A = (A_r - λ A_c) / (1 + λ),   surrogate and KL as ppo
        after each step  ln λ ← ln λ + multiplier_rate λ (mean C - budget),   at most multiplier_max

    ``reward`` is a list of two: the reward, and the cost, of which **more is worse**: above the budget is unsafe. A
    reward model of harmlessness is a cost with ``reward_weights=[1, -1]``.

    Args:
        budget: largest mean cost, in units of the cost: -d of the paper. 0 fits a cost whose sign says safe or not.
        multiplier, multiplier_max: the first λ, and its bound; None: no bound. A bound that is reached means that the
            budget cannot be met at that price: look at ``multiplier_coefficient``.
        multiplier_rate: step size of ln λ; 0: λ stays, a fixed price.
        kl: coefficient of the KL penalty per token, whatever λ is.
        clip, value_clip, gamma, lam, ptx: as in ``ppo``; both critics alike.
        whiten: standardise A over the batch.

    KL: k1 per token to the start, subtracted from the reward and added to the cost, so that (1 + λ) cancels and its
    weight in A is ``kl``: β/2 of the paper.

    Logged: ``reward/objective_0`` and ``reward/objective_1``, mean reward and mean cost. An answer without one of both
    gives no gradient; one without a cost moves no λ.

    Convention: λ moves by the mean cost of the step; the code's is over the last 128 answers. The step is that of
    equation 31, with λ in it. A critic learns each objective, the cost's with the sign turned; ptx only if asked.

    Defaults: λ, its rate and bound: the released code. Learning rates and kl: ours.

    Source: Dai et al., arXiv:2310.12773, section 3.4 and equations 27-31.

    Example::

        prefzoo.train("safe_rlhf", model="my-model", dataset="prompts.jsonl", reward=["runs/rm/final", "runs/cm/final"])
    """
    controller, price = FixedKL(kl), Multiplier(multiplier, budget=budget, rate=multiplier_rate, largest=multiplier_max)
    gain = GAE(lam=lam, gamma=gamma, kl=controller, whiten=False)
    cost = GAE(lam=lam, gamma=gamma, kl=controller, whiten=False, critic="cost")
    parts = actor_critic({**ROLLED, **sampling}, gain, clip=clip, value_clip=value_clip, ptx=ptx)
    critic = Term(create_loss("clipped_value", clip=value_clip), count="token", trains="critic:cost")
    return Algorithm(
        **parts | {
            "feedback": Objectives(2),
            "credit": Lagrangian(price, gain, cost, whiten=whiten),
            "terms": (*parts["terms"], critic),
            "controllers": {"kl": controller, "multiplier": price},
        }
    )  # fmt: skip
