"""Other actors with a critic: A2C, PPO over macro-actions, and PPO inside a nucleus."""

from typing import Any, Literal

from prefzoo.algorithm import Algorithm, Term, register_algorithm
from prefzoo.algos.proximal import ROLLED, CriticStart, actor_critic
from prefzoo.losses import create_loss
from prefzoo.parts.controllers import FixedKL
from prefzoo.parts.critics import GAE, MacroActions
from prefzoo.parts.options import sampled
from prefzoo.parts.reference import Moving
from prefzoo.registry import NotNegative, Positive, Share

TRAINED = {"learning_rate": 1e-6, "critic_learning_rate": 5e-6}


@register_algorithm(paper="arXiv:1602.01783", recommended=TRAINED, around="a2c", shared={**ROLLED, "inner_epochs": 1})
def a2c(
    *,
    entropy: NotNegative = 0.01,
    kl: NotNegative = 0.0,
    gamma: Share = 1.0,
    lam: Share = 1.0,
    critic_from: CriticStart = "policy",
    **sampling: Any,
) -> Algorithm:
    """Advantage actor-critic: REINFORCE on every token with a critic as the baseline, and a bonus for entropy.

        A_t = sum_l (gamma lam)^l delta_{t+l};   policy loss = mean_t - A_t log pi(y_t) - entropy H_t
        critic loss = mean_t of half the squared error of V(s_t) against A_t + V_old(s_t)

    Args:
        entropy: weight of the entropy of the policy at each token, reward units per nat; 0: none.
        kl: coefficient of a KL penalty (k1) in the reward, per token; 0: no reference is loaded.
        gamma, lam: of the advantages; 1 and 1 are the return less the value.
        critic_from: the critic starts from the policy's trunk with a zero head, or from the reward model.

    KL: none by default, as in the paper; k1 in the reward otherwise.

    Convention: one process that samples whole completions in place of many that walk n steps: the returns are not
    bootstrapped. No discount; the paper's is 0.99, which over hundreds of tokens leaves little of a final reward. No
    ratio: one optimizer step for each sampling is right. The critic has an optimizer of its own.

    Source: Mnih et al., arXiv:1602.01783, section 4; its entropy weight.

    Example::

        prefzoo.train("a2c", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=100)
    """
    around = {k: v for k, v in sampling.items() if k not in ROLLED}
    credit = GAE(lam=lam, gamma=gamma, kl=FixedKL(kl) if kl else None, whiten=False)
    critic = Term(create_loss("clipped_value", clip=None), count="token", trains="critic")
    return Algorithm(
        **sampled(sampling),
        credit=credit,
        terms=(Term(create_loss("a2c", entropy=entropy, **around), count="token"), critic),
        critic_from=critic_from,
    )


@register_algorithm(
    paper="arXiv:2410.02743", recommended=TRAINED, shared={**ROLLED, "inner_epochs": 1, "temperature": 0.8}
)
def ma_ppo(
    *,
    actions: Literal["ngram", "perplexity"] = "ngram",
    length: int = 5,
    value: Literal["mean", "first"] = "mean",
    kl: NotNegative = 0.05,
    clip: NotNegative = 0.2,
    value_clip: NotNegative | None = 0.2,
    gamma: Share = 1.0,
    lam: Share = 0.95,
    critic_from: CriticStart = "policy",
    **sampling: Any,
) -> Algorithm:
    """MA-RLHF: PPO whose actions are runs of tokens, so that credit has less far to travel.

        A_k = sum_l (gamma lam)^l delta_{k+l} over macro-actions k; every token of one has its advantage and return

    Args:
        actions: ``"ngram"``, ``length`` tokens each; ``"perplexity"``: a new one begins at every token that the
            reference finds less likely than the one before it.
        length: of n-grams.
        value: of a macro-action: the ``"mean"`` of its tokens' or that of its ``"first"`` one, which alone is unbiased.
        kl, clip, value_clip, gamma, lam, critic_from: as in ``ppo``; gamma and lam count macro-actions.

    KL: k1 at every token, in the reward; a macro-action has the sum of its tokens'.

    Convention: ratios are of tokens, as in the paper's code. Its random lengths and its parser are not here; the code
    averages the rewards of a macro-action, here they are added. Its n-grams of 5 and temperature 0.8.

    Source: Chai et al., arXiv:2410.02743, sections 3.2 and 3.3.

    Example::

        prefzoo.train("ma_ppo", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=100)
    """
    macro = MacroActions(actions, length, value)
    credit = GAE(lam=lam, gamma=gamma, kl=FixedKL(kl) if kl else None, actions=macro)
    return Algorithm(**actor_critic(sampling, credit, clip=clip, value_clip=value_clip), critic_from=critic_from)


@register_algorithm(
    paper="arXiv:2210.01241", recommended={**TRAINED, "learning_rate": 1e-5}, shared={**ROLLED, "inner_epochs": 5}
)
def nlpo(
    *,
    mask_top_p: Positive = 0.9,
    mask_every: int = 5,
    kl: NotNegative = 0.1,
    clip: NotNegative = 0.2,
    value_clip: NotNegative | None = 0.2,
    gamma: Share = 1.0,
    lam: Share = 0.95,
    critic_from: CriticStart = "policy",
    **sampling: Any,
) -> Algorithm:
    """NLPO: PPO that samples only tokens in the nucleus of a mask policy, an older copy of itself.

        y_t ~ pi restricted to the fewest tokens that have probability mask_top_p under the mask policy
        mask policy ← pi after every mask_every samplings; all else as ppo

    Args:
        mask_top_p: probability of the nucleus, under the mask policy.
        mask_every: samplings from one copy to the next.
        kl, clip, value_clip, gamma, lam, critic_from: as in ``ppo``.

    KL: k1, in the reward, and to the mask policy: a run has one reference. The paper's is to the start, with a
    coefficient that adapts; what holds the policy to its start here is the learning rate.

    Convention: the mask acts on sampling. Ratios are those of the whole distribution, of whose mass the nucleus has
    nearly all; the paper masks both sides of the ratio too. At least one token may be sampled (the code keeps 100).

    Defaults: nucleus, copies, epochs and coefficient are those of the paper's IMDB runs (RL4LMs).

    Source: Ramamurthy et al., arXiv:2210.01241, algorithm 1.

    Example::

        prefzoo.train("nlpo", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=100)
    """
    steps = mask_every * sampling["inner_epochs"] * sampling["minibatches"]
    credit = GAE(lam=lam, gamma=gamma, kl=FixedKL(kl))
    parts = actor_critic(sampling, credit, clip=clip, value_clip=value_clip, mask_top_p=mask_top_p)
    return Algorithm(**parts, critic_from=critic_from, reference=Moving(alpha=1.0, every=steps))
