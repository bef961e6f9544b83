"""Proximal policy optimization from human feedback."""

from collections.abc import Mapping
from typing import Any, Literal

from prefzoo.algorithm import Algorithm, Term, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.losses.kl import ValueEstimatorName
from prefzoo.parts.controllers import AdaptiveKL, FixedKL
from prefzoo.parts.critics import GAE, RunningScale
from prefzoo.parts.options import SAMPLING, sampled
from prefzoo.registry import NotNegative, Positive, Share, UsageError

ROLLED = {**SAMPLING, "group_size": 1, "prompts_per_step": 128, "inner_epochs": 4}
CriticStart = Literal["policy", "reward"]


def actor_critic(
    options: Mapping[str, Any], credit: GAE, *, clip: float, value_clip: float | None, ptx: float = 0.0, **source: Any
) -> dict[str, Any]:
    """The parts of PPO: rollouts, a clipped surrogate, a critic; with ``ptx`` the likelihood of demonstrations."""
    terms = [
        Term(create_loss("clipped_surrogate", clip=clip), count="token"),
        Term(create_loss("clipped_value", clip=value_clip), count="token", trains="critic"),
    ]
    if ptx:
        terms.append(Term(create_loss("sft"), rows="ptx", count="token", weight=ptx))
    controllers = {} if credit.kl is None else {"kl": credit.kl}
    return sampled(options, **source) | {"credit": credit, "terms": tuple(terms), "controllers": controllers}


@register_algorithm(
    paper="arXiv:2203.02155",
    aliases=("ppo_rlhf",),
    recommended={"learning_rate": 1e-6, "critic_learning_rate": 5e-6},
    shared=ROLLED,
)
def ppo(
    *,
    kl: NotNegative = 0.05,
    kl_target: Positive | None = None,
    kl_horizon: int | None = None,
    kl_estimator: ValueEstimatorName = "k1",
    clip: NotNegative = 0.2,
    value_clip: NotNegative | None = 0.2,
    gamma: Share = 1.0,
    lam: Share = 0.95,
    whiten: bool = True,
    ptx: NotNegative = 0.0,
    critic_from: CriticStart = "policy",
    **sampling: Any,
) -> Algorithm:
    """PPO from human feedback: a critic, a KL penalty in the reward, and a clipped surrogate on every token.

        r_t = - kl log pi(y_t)/ref(y_t) + [t last] R(x, y);   A_t = sum_l (gamma lam)^l delta_{t+l}, whitened
        policy loss = - mean_t min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t) + ptx * (- log pi(demonstrations))
        critic loss = mean_t of the clipped squared error of V(s_t) against A_t + V_old(s_t)

    Args:
        kl: coefficient of the KL penalty in the reward, per token; the first value if ``kl_target`` is given; 0: no
            reference is loaded.
        kl_target: KL per sequence (nats) that an adaptive controller steers to; None: fixed coefficient.
        kl_horizon: samples over which that controller acts; by default 10,000.
        kl_estimator: k1 (signed log-ratio), k2, k3 or abs.
        clip, value_clip: ranges of the ratio and of the change of values; ``value_clip=None``: not clipped.
        gamma, lam: of generalised advantage estimation.
        whiten: standardise advantages over the batch.
        ptx: weight of the likelihood of demonstrations (``ptx_dataset=``), beside the surrogate.
        critic_from: the critic starts from the policy's trunk with a zero head, or from the reward model.

    Convention: advantages are whitened over the whole rollout batch, not per micro-batch; the critic is a model of its
    own with its own optimizer (``critic_learning_rate``), so there is no weight of the value loss.

    Source: Ouyang et al., arXiv:2203.02155; Schulman et al., arXiv:1707.06347; Ziegler et al., arXiv:1909.08593.

    Example::

        prefzoo.train("ppo", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=100)
    """
    if kl_horizon is not None and kl_target is None:
        raise UsageError("ppo: kl_horizon has no effect without kl_target, the KL to steer to.")
    controller: FixedKL | AdaptiveKL | None = FixedKL(kl) if kl else None
    if kl_target is not None:
        controller = AdaptiveKL(kl, target=kl_target, horizon=kl_horizon or 10_000)
    credit = GAE(lam=lam, gamma=gamma, kl=controller, estimator=kl_estimator, whiten=whiten)
    return Algorithm(
        **actor_critic(sampling, credit, clip=clip, value_clip=value_clip, ptx=ptx), critic_from=critic_from
    )


@register_algorithm(
    paper="arXiv:2307.04964",
    recommended={"learning_rate": 5e-7, "critic_learning_rate": 1.5e-6, "warmup_steps": 0.1},
    shared={**ROLLED, "inner_epochs": 1, "minibatches": 4, "temperature": 0.8},
)
def ppo_max(
    *,
    kl: NotNegative = 0.01,
    clip: NotNegative = 0.2,
    value_clip: NotNegative | None = 0.2,
    gamma: Share = 1.0,
    lam: Share = 0.95,
    centre: bool = True,
    reward_clip: Positive | None = 10.0,
    whiten: bool = False,
    advantage_clip: Positive | None = None,
    top_p: Positive = 0.9,
    ptx: NotNegative = 0.0,
    critic_from: CriticStart = "policy",
    **sampling: Any,
) -> Algorithm:
    """PPO-max: PPO with rewards that are standardised over the run and clipped, and a small buffer of experience.

        R ← clip((R - mean(run)) / std(run), - reward_clip, reward_clip)
        r_t = - kl log pi(y_t)/ref(y_t) + [t last] R;   from there on as ppo

    Args:
        kl: coefficient of the KL penalty in the reward, per token.
        clip, value_clip, gamma, lam, ptx, critic_from: as in ``ppo``.
        centre: subtract the mean of the run's rewards, not only divide by their deviation.
        reward_clip: bound of the standardised reward; None: no bound.
        whiten: standardise advantages over the batch too.
        advantage_clip: bound of the advantages; None: no bound.
        top_p: nucleus that is sampled from.

    KL: k1, in the reward, after the standardisation.

    Convention: the paper starts the critic from the reward model (``critic_from="reward"``, where the reward is one)
    and trains it alone for a while, adds pretraining data (``ptx``), and penalises repetition when it samples; training
    the critic alone and the penalty of repetition are not here. Critic and policy have optimizers of their own.

    Defaults: the released code, MOSS-RLHF, whose script only divides by the deviation and does not clip; that rewards
    are centred and clipped is the text of the paper, 10 the bound in the code's configuration.

    Source: Zheng et al., Secrets of RLHF part I, arXiv:2307.04964, section 5.

    Example::

        prefzoo.train("ppo_max", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final",
                      critic_from="reward", max_steps=100)
    """
    scale = RunningScale()
    credit = GAE(
        lam=lam, gamma=gamma, kl=FixedKL(kl) if kl else None, whiten=whiten, scale=scale, centre=centre,
        reward_clip=reward_clip, advantage_clip=advantage_clip,
    )  # fmt: skip
    parts = actor_critic(sampling, credit, clip=clip, value_clip=value_clip, ptx=ptx, top_p=top_p)
    controllers = {**parts.pop("controllers"), "reward_scale": scale}
    return Algorithm(**parts, critic_from=critic_from, controllers=controllers)
