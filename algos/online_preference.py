"""Online preference optimization: completions of the policy are compared while it learns."""

from typing import Any, Literal

from prefzoo.algorithm import Algorithm, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.options import SAMPLING, sampled
from prefzoo.parts.pairs import AgainstOther, ScoreUnit
from prefzoo.parts.preference import compared, loss_named
from prefzoo.parts.source import Sampler
from prefzoo.parts.win_rate import WinMargin, WinRate
from prefzoo.registry import NotNegative, Positive

ON_POLICY = {k: v for k, v in SAMPLING.items() if k not in ("inner_epochs", "minibatches")}


@register_algorithm(
    paper="arXiv:2402.04792", aliases=("oaif",), recommended={"learning_rate": 5e-7},
    shared={**SAMPLING, "group_size": 2},
)  # fmt: skip
def online_dpo(
    *,
    loss: str = "dpo",
    beta: Positive | None = None,
    pairs: Literal["extremes", "all"] = "extremes",
    soft_labels: ScoreUnit | None = None,
    **sampling: Any,
) -> Algorithm:
    """Online preference optimization: the policy's own completions are judged, and trained on as a pair at once.

        y, y' ~ π;   (y_w, y_l) = the better and the worse one;   loss = -log σ(β (s_w - s_l)),  s = log π/ref

    Args:
        loss: any loss of pairs, with its options: ``"ipo"``, ``"hinge"``, ``"simpo(beta=2, gamma=1)"``; also one of
            labelled completions (``"kto"``: good above the prompt's mean reward) or of rankings (``"pl_dpo"``).
        beta: of the loss; None: its own default.
        pairs: with more than two completions, the best against the worst, or all that differ in reward.
        soft_labels: None: the better completion wins. ``rewards``: with Bradley-Terry's probability p = σ(R - R');
            ``win_rates``: with that of a judge. The pair then counts p as (y, y') and 1 - p as (y', y).

    KL: to the start, in the loss, as an implicit reward β log π/ref; losses without reference have none. With soft
    labels the optimum is ref exp(R / β), however the pairs were sampled; where the better one always wins there is
    none, and the policy goes on to the best completion.

    Prompts whose rewards are all equal or missing give no pair; their shares are logged.

    Convention: the gradient does not go through the sampling, as in the paper. ``reward`` may be a judge. The paper and
    TRL sample at temperature 0.9; here it is 1, at which the optimum is that of the loss. Of equal rewards TRL takes
    the first completion for the better one. Its ``ipo``, of sums, is ``loss="ipo_sum"``.

    Source: Guo et al., Direct Language Model Alignment from Online AI Feedback, arXiv:2402.04792; online IPO:
    Calandriello et al., arXiv:2403.08635.

    Example::

        prefzoo.train("online_dpo", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=100)
    """
    return Algorithm(**sampled(sampling), **compared(loss_named(loss, beta=beta), pairs, soft_labels))


@register_algorithm(paper="arXiv:2405.21046", recommended={"learning_rate": 5e-7}, shared={**SAMPLING, "group_size": 1})
def xpo(
    *, beta: Positive = 0.1, alpha: NotNegative = 1e-5, soft_labels: ScoreUnit | None = None, **sampling: Any
) -> Algorithm:
    """Exploratory preference optimization: online DPO against the reference's completions, with a bonus to leave them.

        y ~ π, y' ~ ref;   loss = -log σ(β (s_w - s_l)) + α log π(y')

    Args:
        beta: strength of the pull to the reference, per nat.
        alpha: α, weight of the exploration bonus, a sum over the tokens of y'; 0: online DPO on these pairs.
        soft_labels: as in ``online_dpo``.

    KL: to the start, in the loss, as an implicit reward; α works against it, by -α KL(ref ‖ π) on average.

    Each of ``group_size`` completions is paired with one of the reference's. Equal or missing rewards give no pair, and
    no bonus either; their shares are logged.

    Convention: trained on the pairs of the step; the paper's objective is over all pairs so far. α is TRL's default;
    the paper's shrinks with the number of iterations.

    Source: Xie et al., arXiv:2405.21046, algorithm 1.

    Example::

        prefzoo.train("xpo", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=100)
    """
    return Algorithm(
        **sampled(sampling, beside=(Sampler("reference"),)),
        credit=AgainstOther(ordered=True, unit=soft_labels or "rewards", soft=soft_labels is not None),
        loss=create_loss("xpo", beta=beta, alpha=alpha),
    )


@register_algorithm(
    paper="arXiv:2312.00886", recommended={"learning_rate": 5e-7}, shared={**ON_POLICY, "group_size": 1}
)
def nash_md(*, kl: NotNegative = 0.008, mixture: float = 0.125, tau: Positive = 1.0, **sampling: Any) -> Algorithm:
    """Nash learning from human feedback by mirror descent: win against a mixture of policy and reference.

        y ~ π, y' ~ π^(1-b) ref^b, normalised at every token
        A = P(y beats y') - 1/2 - kl log π(y)/ref(y);   loss = - A log π(y)

    Args:
        kl: the paper's τ, in win probability per nat.
        mixture: b, the paper's β, from 0 (self-play) up to 1 (not reached): the share of the reference in the opponent.
        tau: reward units of one logit, where ``reward`` scores completions one by one: P = σ((R - R') / tau). A judge
            gives P itself, and it need not be transitive.

    KL: to the start, in the reward of the whole completion; k1, summed over its tokens, with an unbiased gradient.

    With b = 0 the policy is at rest at the Nash equilibrium of the game P - kl KL(π ‖ ref) + kl KL(π' ‖ ref); with
    b > 0 beside it, by a distance that shrinks with b.

    Convention: one step on each batch, as in the paper's policy gradient. b = 0.125 is best there; TRL had 0.5 and
    kl = 0.1. A completion without a judgement has no gradient; it counts as a row.

    Source: Munos et al., Nash Learning from Human Feedback, arXiv:2312.00886.

    Example::

        prefzoo.train("nash_md", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=100)
    """
    parts = sampled({"inner_epochs": 1, "minibatches": 1, **sampling}, beside=(Sampler("policy", blend=mixture),))
    feedback = WinRate(tau, against="beside", missing_eos_penalty=sampling["missing_eos_penalty"])
    return Algorithm(**parts | {"feedback": feedback}, credit=WinMargin(kl), loss=create_loss("reinforce"))
