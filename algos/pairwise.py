"""Presets of preference pairs: what is more than one loss, or a loss with another reference."""

from typing import Literal

from prefzoo.algorithm import Algorithm, Term, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.prelude import ClassMidpoint, RunningMean
from prefzoo.parts.reference import BiasCorrected, Moving
from prefzoo.parts.source import DatasetRows
from prefzoo.registry import NotNegative, Positive, Share, UsageError


@register_algorithm(paper="arXiv:2411.10442", recommended={"learning_rate": 5e-6})
def mpo(
    *,
    beta: Positive = 0.1,
    preference: NotNegative = 0.8,
    quality: NotNegative = 0.2,
    generation: NotNegative = 1.0,
    running: bool = True,
) -> Algorithm:
    """Mixed preference optimization: which answer is better, whether each is good, and how the better one is written.

        loss = 0.8 dpo + 0.2 (bco of the chosen + bco of the rejected) + 1.0 (- mean_t log π(chosen))

    Args:
        beta: strength of the pull to the reference, per nat, of both preference parts.
        preference, quality, generation: weights of the three parts.
        running: BCO's shift δ is averaged over the batches so far, as in the paper; False: of the batch alone.

    KL enters by the log-ratios to the reference, summed over an answer's tokens; the last part has none.

    Convention: the weights are the authors'. BCO's two sides are added, as in the paper, and δ is the midpoint of their
    log-ratios, kept in checkpoints; TRL's ``["sigmoid", "bco_pair", "sft"]`` with these weights has no shift any more
    (``trl:dpo``). The likelihood is a mean over the chosen tokens of the optimizer batch. β = 0.1 as in TRL.

    Source: Wang et al., Enhancing the Reasoning Ability of Multimodal LLMs via Mixed Preference Optimization,
    arXiv:2411.10442, section 4.1.

    Example::

        prefzoo.train("mpo", model="my-model", dataset="pairs.jsonl")
    """
    shift = RunningMean("delta") if running and quality else None
    parts = (
        Term(create_loss("dpo", beta=beta), weight=preference),
        Term(create_loss("bco", beta=beta), weight=2 * quality),  # its mean is over both sides
        Term(create_loss("chosen_nll"), weight=generation),
    )
    return Algorithm(
        source=DatasetRows("pairs"), terms=tuple(t for t in parts if t.weight),
        prelude=ClassMidpoint(shift) if quality else None, controllers={} if shift is None else {"delta": shift},
    )  # fmt: skip


@register_algorithm(paper="arXiv:2309.16240", recommended={"learning_rate": 1e-6})
def fdpo(
    *,
    beta: Positive = 0.1,
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "js",
    alpha: Share = 0.5,
) -> Algorithm:
    """f-DPO: DPO whose policy is held to the reference by another divergence than the reverse KL.

        loss = - log σ(β f'(π/ref)(y_w) - β f'(π/ref)(y_l))
        f'(e^s):  reverse_kl s;  forward_kl 1 - e^-s;  js log 2σ(s);  alpha (1 - e^{-α s}) / α

    Args:
        beta: strength of the pull to the reference.
        divergence: ``reverse_kl`` is ``dpo``.
        alpha: α of ``alpha``, between the reverse KL (0) and the forward KL (1); it has no effect on the others.

    The divergence is one of whole answers: s is the log-ratio summed over tokens.

    Convention: the card of the modifier ``divergence`` has its scores and clamps; any loss of differences takes it
    (``ipo`` with ``divergence=js``). Jensen-Shannon is the default here, the paper's compromise between reward and
    diversity. Filtered DPO (arXiv:2404.13846), which drops pairs whose chosen answer is worse than the policy's own,
    has the same nickname and is another algorithm: it is not this one.

    Source: Wang et al., Beyond Reverse KL, arXiv:2309.16240.

    Example::

        prefzoo.train("fdpo", model="my-model", dataset="pairs.jsonl", divergence="forward_kl")
    """
    if divergence != "alpha" and alpha != 0.5:
        raise UsageError(f"fdpo: alpha has no effect with divergence={divergence!r}; leave it out.")
    options = {"divergence_alpha": alpha} if divergence == "alpha" else {}
    loss = create_loss("dpo", beta=beta, divergence=divergence, **options)
    return Algorithm(source=DatasetRows("pairs"), loss=loss)


@register_algorithm(paper="arXiv:2404.09656", recommended={"learning_rate": 1e-6})
def tr_dpo(*, beta: Positive = 0.05, alpha: Share = 0.6, every: int = 1) -> Algorithm:
    """Trust-region DPO: the reference follows the policy, so that it is held back by where it just was.

        dpo's loss;   every ``every`` optimizer steps: ref ← α policy + (1 - α) ref, weight by weight

    Args:
        beta: strength of the pull to the reference, per nat.
        alpha: α. 1: a hard copy.
        every: the paper's τ, optimizer steps between two updates.

    KL enters by the log-ratios to the moving reference, summed over an answer's tokens: nothing holds the policy to its
    start in the end. Each step has a forward pass of the reference more, as its log-probabilities change.

    Convention: the paper's soft update is α = 0.6 at every step (the default), its hard one α = 1 every 512 or 1024
    steps; so is TRL's ``sync_ref_model``, which has both at once. With adapters (lora) only α = 1 is exact, as the
    weights between two adapters are not those between their factors: any other is refused. β = 0.05 as in the paper.

    Source: Gorbatovski et al., Learn Your Reference Model for Real Good Alignment, arXiv:2404.09656.

    Example::

        prefzoo.train("tr_dpo", model="my-model", dataset="pairs.jsonl", alpha=1.0, every=512)
    """
    return Algorithm(
        source=DatasetRows("pairs"), loss=create_loss("dpo", beta=beta), reference=Moving(alpha=alpha, every=every)
    )


@register_algorithm(paper="arXiv:2508.00180", recommended={"learning_rate": 1e-6})
def bema_dpo(
    *, beta: Positive = 0.1, every: int = 400, ema_power: NotNegative = 0.5, bias_power: NotNegative = 0.2,
    lag: Positive = 10.0,
) -> Algorithm:  # fmt: skip
    """DPO whose reference is a bias-corrected mean of the policy's past weights.

        dpo's loss;   every ``every`` steps: EMA ← (1 - b) EMA + b θ,   ref = EMA + a (θ - θ_0)
        b = (lag + t)^-ema_power,   a = (lag + t)^-bias_power

    Args:
        beta: strength of the pull to the reference, per nat.
        every: optimizer steps between two updates.
        ema_power, bias_power, lag: how b and a decay with the steps t.

    KL enters by the log-ratios to the moving reference, summed over an answer's tokens.

    Convention: TRL's experimental "BEMA for the reference model", with its defaults; the paper has the mean for the
    trained weights themselves, not for a reference. Not with adapters (lora), as in ``tr_dpo``.

    Source: Block and Zhang, EMA Without the Lag, arXiv:2508.00180; as a reference: TRL.

    Example::

        prefzoo.train("bema_dpo", model="my-model", dataset="pairs.jsonl", every=50)
    """
    reference = BiasCorrected(every=every, ema_power=ema_power, bias_power=bias_power, lag=lag)
    return Algorithm(source=DatasetRows("pairs"), loss=create_loss("dpo", beta=beta), reference=reference)
