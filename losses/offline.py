"""Offline Q-learning losses: the heads of an implicit language Q-learner at every token, one value per token.

ILQL is the sum of three terms, ``ilql_q``, ``ilql_v`` and a small multiple of ``ilql_cql``: each is a loss here, and
their weights are the algorithm's. How the tokens are then chosen (π · exp(β (Q - V))) is sampling, not training.
"""

from __future__ import annotations

from prefzoo.losses.base import register_loss
from prefzoo.losses.numerics import by_case, masked
from prefzoo.records import Heads, LossOut
from prefzoo.registry import Share, UsageError


@register_loss(paper="arXiv:2206.11871")
def ilql_q(batch: Heads, *, gamma: Share = 0.99) -> LossOut:
    """Implicit Q-learning, the two Q: the squared temporal difference to the reward and the value of what follows.

        loss_t = (r_t + γ V_{t+1} - Q1_t)² + (r_t + γ V_{t+1} - Q2_t)²

    Args:
        batch: heads, (B, T), in reward units; ``next_v_BT`` is 0 after the last token.
        gamma: discount per token.

    Returns:
        One loss per token, (B, T), in squared reward units. Metrics (B, T): ``q`` = mean of both, ``td_error`` = the
        target minus that.

    Convention: both Q learn the same target, and the sum has no ½, as in the authors' code. No gradient flows through
    the target.

    Known failure: rewards at the last token only reach early tokens one value at a time: long completions learn slowly.

    Source: Snell et al. (ILQL), arXiv:2206.11871; implicit Q-learning: Kostrikov et al., arXiv:2110.06169.

    >>> import torch
    >>> one, half = torch.ones(1, 1), torch.full((1, 1), 0.5)
    >>> batch = Heads(q1_BT=half, q2_BT=0 * half, v_BT=half, next_v_BT=0 * half, target_q_BT=half, rewards_BT=one,
    ...     mask_BT=one > 0)
    >>> ilql_q(batch).loss  # (1 - 0.5)² + (1 - 0)²
    tensor([[1.2500]])
    """
    target_BT = masked(batch.rewards_BT.detach() + gamma * batch.next_v_BT.detach(), batch.mask_BT)
    q1_BT, q2_BT = masked(batch.q1_BT, batch.mask_BT), masked(batch.q2_BT, batch.mask_BT)
    mean_BT = ((q1_BT + q2_BT) / 2).detach()
    loss_BT = (target_BT - q1_BT).square() + (target_BT - q2_BT).square()
    return LossOut(loss_BT, {"q": mean_BT, "td_error": target_BT - mean_BT})


@register_loss(paper="arXiv:2206.11871")
def ilql_v(batch: Heads, *, expectile: Share = 0.7) -> LossOut:
    """Implicit Q-learning, the value: an expectile of the Q of the tokens in the data.

        u_t    = min(Q1, Q2 of the slow copy)_t - V_t
        loss_t = |τ - [u_t < 0]| u_t²

    Args:
        batch: heads, (B, T), in reward units; ``target_q_BT`` is the smaller of the two slow Q at the token taken.
        expectile: τ: 0.5 is the mean over the data's tokens, towards 1 their best.

    Returns:
        One loss per token, (B, T), in squared reward units. Metrics (B, T): ``v``, ``advantage`` = u.

    Convention: at τ = ½ it is half the squared error. 0.7 as in the authors' runs. No gradient flows through Q.

    Known failure: an expectile near 1 takes luck for skill where outcomes are random.

    Source: Snell et al. (ILQL), arXiv:2206.11871; the expectile: Kostrikov et al., arXiv:2110.06169, equation 5.

    >>> import torch
    >>> zero, one = torch.zeros(1, 2), torch.ones(1, 2)
    >>> batch = Heads(q1_BT=zero, q2_BT=zero, v_BT=zero, next_v_BT=zero, rewards_BT=zero, mask_BT=one > 0,
    ...     target_q_BT=torch.tensor([[1.0, -1.0]]))
    >>> ilql_v(batch).loss
    tensor([[0.7000, 0.3000]])
    """
    v_BT = masked(batch.v_BT, batch.mask_BT)
    error_BT = masked(batch.target_q_BT.detach(), batch.mask_BT) - v_BT
    weight_BT = by_case(error_BT.detach() < 0, 1 - expectile, expectile, error_BT)
    return LossOut(weight_BT * error_BT.square(), {"v": v_BT.detach(), "advantage": error_BT.detach()})


@register_loss(paper="arXiv:2206.11871", extras=("q1_lse_BT", "q2_lse_BT"))
def ilql_cql(batch: Heads) -> LossOut:
    """Conservative Q-learning: the Q of the token in the data above those of all others, as a cross-entropy.

        loss_t = (log Σ_v exp Q1(v) - Q1_t) + (log Σ_v exp Q2(v) - Q2_t)

    Args:
        batch: heads, (B, T), with ``q1_lse_BT`` and ``q2_lse_BT``, log Σ_v exp Q(v), with gradient.

    Returns:
        One loss per token, (B, T), in nats, never negative where Q and its log-sum-exp belong together.

    Convention: the two cross-entropies are added. Its weight is the term's; 0.1 in trlX. Q is taken as logits as it is,
    so the scale of the rewards is a temperature.

    Known failure: with a large weight Q becomes the data's log-probabilities, and imitation is all that is left.

    Source: Snell et al. (ILQL), arXiv:2206.11871; conservatism: Kumar et al., arXiv:2006.04779.

    >>> import torch
    >>> q_BT, lse_BT, one = torch.zeros(1, 1), torch.full((1, 1), 0.6931), torch.ones(1, 1) > 0  # two tokens, alike
    >>> batch = Heads(q1_BT=q_BT, q2_BT=q_BT, v_BT=q_BT, next_v_BT=q_BT, target_q_BT=q_BT, rewards_BT=q_BT, mask_BT=one,
    ...     q1_lse_BT=lse_BT, q2_lse_BT=lse_BT)
    >>> ilql_cql(batch).loss
    tensor([[1.3862]])
    """
    if batch.q1_lse_BT is None or batch.q2_lse_BT is None:
        missing = "q1_lse_BT" if batch.q1_lse_BT is None else "q2_lse_BT"
        raise UsageError(f"loss 'ilql_cql' needs Heads.{missing}, log Σ exp Q over the vocabulary, but it is None.")
    loss_BT = (batch.q1_lse_BT - batch.q1_BT) + (batch.q2_lse_BT - batch.q2_BT)
    return LossOut(masked(loss_BT, batch.mask_BT))
