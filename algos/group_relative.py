"""Group-relative policy gradients: the other samples of a prompt are the baseline; no critic."""

from collections.abc import Mapping
from typing import Any

from prefzoo.algorithm import Algorithm, Term, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.count import Count
from prefzoo.parts.credit import GroupRelative
from prefzoo.parts.keep import InTurn, MixedGroups, SoftOverlong
from prefzoo.parts.options import SAMPLING, sampled
from prefzoo.parts.prelude import PRELUDES
from prefzoo.registry import NotNegative, Share, UsageError

GROUPED = {**SAMPLING, "kl": 0.0}


def grouped(name: str, options: Mapping[str, Any], *, count: Count | str | None = None, **own: Any) -> dict[str, Any]:
    """The parts of an algorithm that compares the samples of a prompt: a loss with its own options and those of the
    modifiers among ``options``, and beside it a k3 penalty of weight ``kl`` with the same count."""
    around = {k: v for k, v in options.items() if k not in GROUPED}
    if options["kl"] < 0:
        raise UsageError(f"kl is a weight of at least 0, got {options['kl']:g}.")
    loss = create_loss(name, **own, **around)
    unit = count or loss.count
    terms = [Term(loss, count=unit)]
    if options["kl"]:
        terms.append(Term(create_loss("kl_penalty", estimator="k3"), count=unit, weight=options["kl"]))
    prelude = next((PRELUDES[e]() for e in loss.extras if e in PRELUDES), None)
    return sampled(options) | {"credit": GroupRelative(), "terms": tuple(terms), "prelude": prelude}


@register_algorithm(paper="arXiv:2402.03300", recommended={"learning_rate": 1e-6}, shared={**GROUPED, "kl": 0.04})
def grpo(*, clip: float = 0.2, std: bool = True, count: str = "row", **sampling: Any) -> Algorithm:
    """Group relative policy optimization: the other samples of a prompt are the baseline; no critic.

        A_i = (R_i - mean(R)) / (std(R) + 1e-4)
        loss = mean_i mean_t [ - min(rho A_i, clip(rho, 1 - clip, 1 + clip) A_i) + kl (ref/pi - 1 - log ref/pi) ]

    Args:
        clip: range of the ratio rho = pi/pi_old; binds only from the second optimizer step on a batch on.
        std: divide by the group's standard deviation (Dr. GRPO does not).
        count: ``"row"``, the paper's mean over sequences of token means; ``"token"`` is DAPO's.

    KL: k3, in the loss, differentiated as it stands.

    Convention: the paper's: sequence mean, KL 0.04. TRL's default under this name is DAPO's token mean without KL.

    Source: Shao et al., arXiv:2402.03300, equation 3; k3: equation 4.

    Example::

        prefzoo.train("grpo", model="my-model", dataset="prompts.jsonl", reward="runs/rm/final", max_steps=100)
    """
    parts = grouped("clipped_surrogate", sampling, count=count, clip=clip)
    return Algorithm(**parts | {"credit": GroupRelative("group" if std else "none")})


@register_algorithm(paper="arXiv:2503.20783", recommended={"learning_rate": 1e-6}, shared=GROUPED)
def dr_grpo(*, clip: NotNegative = 0.2, **sampling: Any) -> Algorithm:
    """Dr. GRPO: GRPO without its two divisions, by the group's deviation and by the length of a completion.

        A_i = R_i - mean(R)
        loss = 1 / (rows max_new_tokens) sum_i sum_t - min(rho A_i, clip(rho, 1 - clip, 1 + clip) A_i)

    Args:
        clip: range of the ratio rho = pi/pi_old.

    KL: none by default, as in the paper; k3 in the loss with the same count otherwise.

    Convention: the gradient is that of the mean reward but for a constant, (G - 1) / G over ``max_new_tokens``: the
    learning rate belongs to that constant, so change both together.

    Source: Liu et al., Understanding R1-Zero-like training, arXiv:2503.20783, section 3.2.

    Example::

        prefzoo.train("dr_grpo", model="my-model", dataset="problems.jsonl", reward="numeric", max_steps=100)
    """
    count = Count("constant", constant=float(sampling["max_new_tokens"]))
    parts = grouped("clipped_surrogate", sampling, count=count, clip=clip)
    return Algorithm(**parts | {"credit": GroupRelative("none")})


@register_algorithm(
    paper="arXiv:2503.14476",
    recommended={"learning_rate": 1e-6},
    shared={**GROUPED, "group_size": 16, "minibatches": 16},
)
def dapo(
    *,
    clip: NotNegative = 0.2,
    clip_high: NotNegative = 0.28,
    resamplings: int | None = 8,
    overlong_share: Share = 0.2,
    **sampling: Any,
) -> Algorithm:
    """DAPO: GRPO with a higher upper clip, dynamic sampling, a token mean and a soft punishment of length; no KL.

        R_i ← R_i - clip((n_i - (limit - buffer)) / buffer, 0, 1),   buffer = overlong_share * limit
        A_i = (R_i - mean(R)) / (std(R) + 1e-4)     of prompts whose R_i are not all equal
        loss = - mean over tokens of min(rho A_i, clip(rho, 1 - clip, 1 + clip_high) A_i)

    Args:
        clip: how far the ratio rho = pi/pi_old may fall.
        clip_high: how far it may rise.
        resamplings: how often prompts are sampled anew in a step while too few have a contrast; their cost is the
            run's, and ``kept`` is logged. 0: such prompts are left out; None: they stay.
        overlong_share: of ``max_new_tokens`` (limit), over which the punishment grows from 0 to 1 reward unit; 0: none.

    KL: none by default, as in the paper; k3 in the loss with the same count otherwise.

    Convention: prompts are chosen by the reward as it was given (the paper: by accuracy), before lengths are punished;
    ``reward`` in the logs is that too. Where resampling finds too few, the step is smaller (the paper goes on).
    ``mask_truncated`` is the paper's overlong filtering, an earlier step of its ablation.

    Defaults: the paper's, 4,096 of 20,480 tokens as a share, but for 512 prompts a step and its length. resamplings:
    ours.

    Source: Yu et al., arXiv:2503.14476, equations 8 to 13.

    Example::

        prefzoo.train("dapo", model="my-model", dataset="problems.jsonl", reward="numeric", max_steps=100)
    """
    limit = sampling["max_new_tokens"]
    parts = grouped("clipped_surrogate", sampling, count="token", clip=clip, clip_high=clip_high)
    mixed = () if resamplings is None else (MixedGroups(resamplings),)
    shaped = (SoftOverlong(limit, max(1, round(overlong_share * limit))),) if overlong_share else ()
    keeps = (*mixed, *(() if parts["keep"] is None else (parts["keep"],)), *shaped)
    if not keeps and clip_high == clip:
        raise UsageError("dapo: nothing of it is left; that is grpo with count='token' and kl=0.")
    return Algorithm(**parts | {"keep": InTurn(keeps) if keeps else None})
