"""Proximal policy optimization from human feedback."""

from typing import Literal

from prefzoo.algorithm import Algorithm, Schedule, Term, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.losses.kl import ValueEstimatorName
from prefzoo.parts.controllers import AdaptiveKL, FixedKL
from prefzoo.parts.credit import GAE
from prefzoo.parts.feedback import Reward
from prefzoo.parts.source import Rollouts
from prefzoo.registry import UsageError


@register_algorithm(
    paper="arXiv:2203.02155",
    aliases=("ppo_rlhf",),
    recommended={"learning_rate": 1e-6, "critic_learning_rate": 5e-6},
)
def ppo(
    *,
    kl: float = 0.05,
    kl_target: float | None = None,
    kl_horizon: int | None = None,
    kl_estimator: ValueEstimatorName = "k1",
    clip: float = 0.2,
    value_clip: float | None = 0.2,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    ptx: float = 0.0,
    missing_eos_penalty: float = 0.0,
    critic_from: Literal["policy", "reward"] = "policy",
    group_size: int = 1,
    prompts_per_step: int = 128,
    inner_epochs: int = 4,
    minibatches: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 256,
) -> Algorithm:
    """PPO from human feedback: a critic, a KL penalty in the reward, and a clipped surrogate on every token.

        r_t = - kl log pi(y_t)/ref(y_t) + [t last] R(x, y);   A_t = sum_l (gamma lam)^l delta_{t+l}, whitened
        policy loss = - mean_t min(rho_t A_t, clip(rho_t, 1 - clip, 1 + clip) A_t) + ptx * (- log pi(demonstrations))
        critic loss = mean_t of the clipped squared error of V(s_t) against A_t + V_old(s_t)

    Args:
        kl: coefficient of the KL penalty in the reward, per token; the first value if ``kl_target`` is given.
        kl_target: KL per sequence (nats) that an adaptive controller steers to; None: fixed coefficient.
        kl_horizon: samples over which that controller acts; by default 10,000.
        kl_estimator: k1 (signed log-ratio), k2, k3 or abs.
        clip, value_clip: ranges of the ratio and of the change of values; ``value_clip=None``: not clipped.
        gamma, lam: of generalised advantage estimation.
        whiten: standardise advantages over the batch.
        ptx: weight of the likelihood of demonstrations (``ptx_dataset=``), beside the surrogate.
        missing_eos_penalty: subtracted from the reward of completions cut at the limit.
        critic_from: the critic starts from the policy's trunk with a zero head, or from the reward model.
        group_size, prompts_per_step, inner_epochs, minibatches: the rollout schedule.
        temperature, max_new_tokens: sampling.

    Convention: advantages are whitened over the whole rollout batch, not per micro-batch; the critic is a model of its
    own with its own optimizer (``critic_learning_rate``), so there is no weight of the value loss.

    Source: Ouyang et al., arXiv:2203.02155; Schulman et al., arXiv:1707.06347; Ziegler et al., arXiv:1909.08593.

    Example::

        prefzoo.train("ppo", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=100)
    """
    if kl_horizon is not None and kl_target is None:
        raise UsageError("ppo: kl_horizon has no effect without kl_target, the KL to steer to.")
    controller = FixedKL(kl) if kl_target is None else AdaptiveKL(kl, target=kl_target, horizon=kl_horizon or 10_000)
    terms = [
        Term(create_loss("clipped_surrogate", clip=clip), count="token"),
        Term(create_loss("clipped_value", clip=value_clip), count="token", trains="critic"),
    ]
    if ptx:
        terms.append(Term(create_loss("sft"), rows="ptx", count="token", weight=ptx))
    return Algorithm(
        source=Rollouts(group_size, temperature=temperature, max_new_tokens=max_new_tokens),
        feedback=Reward(missing_eos_penalty),
        credit=GAE(lam=lam, gamma=gamma, kl=controller, estimator=kl_estimator, whiten=whiten),
        terms=tuple(terms),
        schedule=Schedule(prompts_per_step, inner_epochs, minibatches),
        controllers={"kl": controller},
        critic_from=critic_from,
    )
