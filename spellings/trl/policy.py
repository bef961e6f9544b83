"""TRL's trainers on samples of the policy under TRL's names: GRPO and its relatives, GMPO, RLOO."""

from __future__ import annotations

from typing import Any, Literal

from prefzoo.algorithm import Algorithm, Schedule, Term, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.losses.advantages import Scale
from prefzoo.parts.count import Count
from prefzoo.parts.credit import GroupRelative, LeaveOneOut
from prefzoo.parts.feedback import MaskTruncated, Reward
from prefzoo.parts.prelude import EntropyFloor
from prefzoo.parts.source import Rollouts
from prefzoo.registry import NotNegative, Positive, UsageError, suggest
from prefzoo.spellings.trl.fields import spelling
from prefzoo.spellings.trl.parts import TRAINING, all_of, check_read, our_losses, reference
from prefzoo.spellings.trl.rules import NO_LIMIT

OF_SAMPLES = {**TRAINING, "learning_rate": 1e-6, "epochs": 3.0, "max_length": NO_LIMIT}
SEQUENCE_NEEDED = "with token ratios TRL only warns; give importance_sampling_level='sequence', or loss_type='grpo'"
SEQUENCE_REFUSED = {
    "cispo": "TRL weights tokens by the clipped ratio of their sequence, which is not here",
    "sapo": "TRL puts the ratio of the sequence through the gate, which is not here",
    "vespo": "it makes a weight of the sequence itself, and in TRL the level changes its KL alone, with a warning",
}


@register_algorithm(
    name="trl:grpo", paper="arXiv:2402.03300", aliases=("trl:GRPOTrainer", "trl:dapo"), recommended=OF_SAMPLES,
    spelling=spelling("grpo", "trl:grpo"),
)  # fmt: skip
def trl_grpo(
    *,
    loss_type: str = "dapo",
    num_generations: int = 8,
    beta: float = 0.0,
    epsilon: NotNegative = 0.2,
    epsilon_high: NotNegative | None = None,
    delta: float | None = None,
    importance_sampling_level: Literal["token", "sequence"] = "token",
    scale_rewards: str | bool = "group",
    mask_truncated_completions: bool = False,
    use_bias_correction_kl: bool = True,
    sapo_temperature_neg: Positive = 1.05,
    sapo_temperature_pos: Positive = 1.0,
    vespo_k_pos: NotNegative = 2.0,
    vespo_lambda_pos: NotNegative = 3.0,
    vespo_k_neg: NotNegative = 3.0,
    vespo_lambda_neg: NotNegative = 2.0,
    top_entropy_quantile: float = 1.0,
    entropy_coef: float = 0.0,
    off_policy_mask_threshold: float | None = None,
    sync_ref_model: bool = False,
    ref_model_mixup_alpha: float = 0.6,
    ref_model_sync_steps: int = 512,
    per_device_train_batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    steps_per_generation: int | None = None,
    generation_batch_size: int | None = None,
    num_iterations: int = 1,
    max_completion_length: int = 512,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Algorithm:
    """TRL's GRPOTrainer: group-relative advantages and a clipped surrogate, by default DAPO's token mean without KL.

        A_i = (R_i - mean(R)) / (std(R) + 1e-4)
        loss = mean of - min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta rho (ref/pi - 1 - log ref/pi)

    Args:
        loss_type: what the mean is. ``dapo`` and ``bnpo``: over tokens; ``grpo``: over completions of their token
            means; ``dr_grpo``: the sum over tokens by completions times ``max_completion_length``. Or another loss:
            ``cispo``, ``sapo``, ``luspo``, ``vespo``; each is also an entry of its own, ``trl:cispo``.
        num_generations: completions of each prompt.
        beta: weight of the KL to the reference; 0: no reference is loaded.
        epsilon: how far the ratio rho = pi/pi_old may fall.
        epsilon_high: how far it may rise; None: as far as it may fall. Of ``cispo`` it is the cap of the ratio itself
            (5, say), and must be given.
        delta: bound of the ratio for bad tokens (dual clip), above 1 + epsilon_high.
        importance_sampling_level: ``"token"``, or ``"sequence"``: one ratio for each completion, the geometric mean
            of its tokens' (GSPO, with ``grpo``; ``trl:gspo``).
        scale_rewards: ``"group"`` (True) divides by the group's standard deviation, ``"batch"`` by that of all rewards
            of a sampling, ``"none"`` (False) by nothing.
        mask_truncated_completions: no gradient from completions cut at the limit.
        use_bias_correction_kl: the factor rho before the KL, differentiated.
        sapo_temperature_neg, sapo_temperature_pos: of ``sapo``, how narrow its gate is for bad and for good tokens.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: of ``vespo``, the shape of its kernel.
        top_entropy_quantile: share of the tokens, those of highest entropy, that get a gradient; 1: all.
        entropy_coef: weight of a bonus for entropy, a mean over tokens.
        off_policy_mask_threshold: drop bad completions that have become less likely by more, in nats per token.
        sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps: a reference that follows, as in ``trl:dpo``.
        per_device_train_batch_size, gradient_accumulation_steps: their product is the completions of an optimizer
            step, as in TRL on one device.
        steps_per_generation, generation_batch_size: completions sampled at once: ``per_device_train_batch_size`` times
            ``steps_per_generation``, by default those of one optimizer step. By ``num_generations``: the prompts.
        num_iterations: passes over what was sampled.
        max_completion_length, temperature, top_p: sampling.

    Departures: ``bnpo`` is the token mean over the optimizer batch (TRL: over each micro-batch), which is ``dapo``; so
    are the mean of the entropy bonus and the quantile of entropies. Where one sampling serves several optimizer steps,
    ``dapo`` counts the tokens of each step (TRL: of the sampling, shared equally), and rows are cut anew in every pass.
    Ratios are clamped where they would overflow (TRL: nowhere). ``cispo`` at TRL's default epsilon_high of 0.2 would
    scale every token down, and is refused. Prompts go on into the next epoch where TRL drops a rest. ``max_steps`` of
    :func:`prefzoo.train` counts optimizer steps under this name, as in TRL; without it the run is one pass over the
    prompts (TRL: three). Weight decay takes all parameters. No dropout. Float32 unless ``bf16=True``, no gradient
    checkpointing unless asked for.

    Source: TRL 1.16, ``GRPOTrainer``; Shao et al., arXiv:2402.03300; Yu et al. (DAPO), arXiv:2503.14476.

    Example::

        prefzoo.train("trl:grpo", model="my-model", dataset="prompts.jsonl", reward=my_function, num_generations=4,
                      per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=100)
    """
    (loss,) = our_losses("grpo", [loss_type])
    sequence = importance_sampling_level == "sequence"
    if loss == "luspo" and not sequence:
        raise UsageError(f"trl:grpo: loss_type 'luspo' has a ratio of sequences; {SEQUENCE_NEEDED}.")
    if sequence and loss_type in SEQUENCE_REFUSED:
        raise UsageError(
            f"trl:grpo: loss_type {loss_type!r} with importance_sampling_level='sequence': "
            f"{SEQUENCE_REFUSED[loss_type]}; leave the level out."
        )
    if sequence and loss == "clipped_surrogate":
        loss = "gspo"
    kernel = {
        "k_pos": vespo_k_pos, "lambda_pos": vespo_lambda_pos, "k_neg": vespo_k_neg, "lambda_neg": vespo_lambda_neg
    }  # fmt: skip
    gate = {"temperature_neg": sapo_temperature_neg, "temperature_pos": sapo_temperature_pos}
    given = {"epsilon": epsilon, "epsilon_high": epsilon_high, "delta": delta}
    given |= {f"sapo_{k}": v for k, v in gate.items()} | {f"vespo_{k}": v for k, v in kernel.items()}
    check_read("grpo", trl_grpo, {loss_type: loss}, given)
    cap = epsilon if epsilon_high is None else epsilon_high
    if loss == "cispo" and cap < 1:
        raise UsageError(
            f"trl:grpo: loss_type 'cispo' with epsilon_high={cap:g}: it is the cap of the ratio itself, and below 1 "
            "would scale every token down; give epsilon_high=5.0, say."
        )
    own: dict[str, dict[str, Any]] = {
        "clipped_surrogate": {"clip": epsilon, "clip_high": epsilon_high, "dual_clip": delta},
        "gspo": {"clip": epsilon, "clip_high": epsilon_high},
        "luspo": {"clip": epsilon, "clip_high": epsilon_high},
        "cispo": {"clip_high": max(cap - 1, 0.0)},
        "sapo": gate,
        "vespo": kernel,
    }
    around: dict[str, Any] = {}
    if off_policy_mask_threshold is not None:
        around["off_policy_threshold"] = off_policy_mask_threshold
    if not 0 < top_entropy_quantile <= 1:
        raise UsageError(f"trl:grpo: top_entropy_quantile is a share above 0, got {top_entropy_quantile:g}.")
    if top_entropy_quantile < 1:
        around["high_entropy"] = True
    counts: dict[str, Count | str] = dict.fromkeys(("dapo", "bnpo", "cispo", "vespo"), "token")
    counts |= {"grpo": "row", "sapo": "row", "luspo": "row_sum"}
    counts |= {"dr_grpo": Count("constant", constant=float(max_completion_length))}
    count = counts[loss_type]
    terms = [Term(create_loss(loss, **own[loss], **around), count=count)]
    if beta:
        level: dict[str, Any] = {"level": "sequence"} if sequence and use_bias_correction_kl else {}
        penalty = create_loss("kl_penalty", estimator="k3", importance=use_bias_correction_kl, **level)
        terms.append(Term(penalty, count=count, weight=beta))
    elif not use_bias_correction_kl:
        raise UsageError("trl:grpo: use_bias_correction_kl has no effect without beta, the weight of the KL.")
    if entropy_coef:
        if top_entropy_quantile < 1:
            raise UsageError(
                "trl:grpo: entropy_coef with top_entropy_quantile: TRL takes the entropy's mean over the tokens that "
                "are kept, which is not here; give one of them."
            )
        terms.append(Term(create_loss("entropy_bonus"), count="token", weight=entropy_coef))
    return Algorithm(
        **_sampled(
            "grpo", num_generations, max_completion_length, temperature, top_p, mask_truncated_completions,
            (per_device_train_batch_size, gradient_accumulation_steps, steps_per_generation, generation_batch_size,
             num_iterations),
        ),
        credit=GroupRelative(_scale("grpo", scale_rewards)),
        prelude=EntropyFloor(top_entropy_quantile) if top_entropy_quantile < 1 else None,
        terms=tuple(terms),
        reference=reference("grpo", sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps),
    )  # fmt: skip


@register_algorithm(
    name="trl:gmpo", paper="arXiv:2507.20673", aliases=("trl:GMPOTrainer",), recommended=OF_SAMPLES,
    spelling=spelling("gmpo", "trl:gmpo"),
)  # fmt: skip
def trl_gmpo(
    *,
    num_generations: int = 8,
    beta: float = 0.0,
    epsilon: NotNegative = 0.4,
    epsilon_high: NotNegative | None = None,
    scale_rewards: str | bool = "group",
    mask_truncated_completions: bool = False,
    sync_ref_model: bool = False,
    ref_model_mixup_alpha: float = 0.6,
    ref_model_sync_steps: int = 512,
    per_device_train_batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    steps_per_generation: int | None = None,
    generation_batch_size: int | None = None,
    num_iterations: int = 1,
    max_completion_length: int = 512,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Algorithm:
    """TRL's GMPOTrainer: GRPO with the geometric mean of a completion's token ratios, each clipped in log space.

        loss = mean over completions of - A exp(mean_t x_t) + beta mean_t (ref/pi - 1 - log ref/pi)
        x_t = min(log rho_t, epsilon_high) where A > 0, max(log rho_t, -epsilon) where A < 0

    Args:
        num_generations: completions of each prompt.
        beta: weight of the KL to the reference; 0: no reference is loaded.
        epsilon, epsilon_high: how far the logarithm of a token's ratio may fall and rise; None: as far as it may fall.
        scale_rewards: as in ``trl:grpo``.
        mask_truncated_completions: no gradient from completions cut at the limit.
        sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps: a reference that follows, as in ``trl:dpo``.
        per_device_train_batch_size, gradient_accumulation_steps: as in ``trl:grpo``.
        steps_per_generation, generation_batch_size, num_iterations: as in ``trl:grpo``.
        max_completion_length, temperature, top_p: sampling.

    Departures: those of ``trl:grpo`` that are not about its losses. TRL can leave tokens of low entropy out of the mean
    (top_entropy_quantile); here that is refused.

    Source: TRL 1.16, ``GMPOTrainer``; Zhao et al., arXiv:2507.20673.

    Example::

        prefzoo.train("trl:gmpo", model="my-model", dataset="prompts.jsonl", reward=my_function, num_iterations=2)
    """
    terms = [Term(create_loss("gmpo", clip=epsilon, clip_high=epsilon_high), count="row")]
    if beta:
        terms.append(Term(create_loss("kl_penalty", estimator="k3"), count="row", weight=beta))
    return Algorithm(
        **_sampled(
            "gmpo", num_generations, max_completion_length, temperature, top_p, mask_truncated_completions,
            (per_device_train_batch_size, gradient_accumulation_steps, steps_per_generation, generation_batch_size,
             num_iterations),
        ),
        credit=GroupRelative(_scale("gmpo", scale_rewards)),
        terms=tuple(terms),
        reference=reference("gmpo", sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps),
    )  # fmt: skip


@register_algorithm(
    name="trl:rloo", paper="arXiv:2402.14740", aliases=("trl:RLOOTrainer",), recommended=OF_SAMPLES,
    spelling=spelling("rloo", "trl:rloo"),
)  # fmt: skip
def trl_rloo(
    *,
    num_generations: int = 2,
    beta: float = 0.05,
    epsilon: NotNegative = 0.2,
    epsilon_high: NotNegative | None = None,
    normalize_advantages: bool = False,
    reward_clip_range: tuple[float, float] | None = None,
    mask_truncated_completions: bool = False,
    sync_ref_model: bool = False,
    ref_model_mixup_alpha: float = 0.6,
    ref_model_sync_steps: int = 512,
    per_device_train_batch_size: int = 8,
    gradient_accumulation_steps: int = 1,
    steps_per_generation: int | None = None,
    generation_batch_size: int | None = None,
    num_iterations: int = 1,
    max_completion_length: int = 512,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Algorithm:
    """TRL's RLOOTrainer: the other samples of a prompt are the baseline, the KL is a part of the reward.

        R'_i = R_i - beta sum_t log pi(y_t)/ref(y_t);   A_i = R'_i - mean of the others' R'
        loss = mean over completions of - min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A),  rho = pi(y)/pi_old(y)

    Args:
        num_generations: completions of each prompt.
        beta: weight of the KL in the reward; 0: no reference is loaded.
        epsilon, epsilon_high: how far the ratio of a whole completion may fall and rise; None: as far as it may fall.
        normalize_advantages: standardise advantages over what was sampled at once.
        reward_clip_range: rewards are clipped to this range, before the KL is subtracted.
        mask_truncated_completions: no gradient from completions cut at the limit.
        sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps: a reference that follows, as in ``trl:dpo``.
        per_device_train_batch_size, gradient_accumulation_steps: as in ``trl:grpo``.
        steps_per_generation, generation_batch_size, num_iterations: as in ``trl:grpo``.
        max_completion_length, temperature, top_p: sampling.

    Departures: those of ``trl:grpo`` that are not about its losses. With mask_truncated_completions TRL leaves the KL
    out of the reward of what was cut; here every reward has it.

    Source: TRL 1.16, ``RLOOTrainer``; Ahmadian et al., arXiv:2402.14740.

    Example::

        prefzoo.train("trl:rloo", model="my-model", dataset="prompts.jsonl", reward=my_function, num_generations=4)
    """
    clipped = reward_clip_range
    if clipped is not None and not (all_of(clipped, int, float) and len(clipped) == 2 and clipped[0] < clipped[1]):
        raise UsageError(f"trl:rloo: reward_clip_range is a least and a largest reward, got {reward_clip_range!r}.")
    return Algorithm(
        **_sampled(
            "rloo", num_generations, max_completion_length, temperature, top_p, mask_truncated_completions,
            (per_device_train_batch_size, gradient_accumulation_steps, steps_per_generation, generation_batch_size,
             num_iterations),
        ),
        credit=LeaveOneOut(kl=beta, normalise=normalize_advantages, reward_clip=clipped and (clipped[0], clipped[1])),
        loss=create_loss("sequence_surrogate", clip=epsilon, clip_high=epsilon_high),
        count="row",
        reference=reference("rloo", sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps),
    )  # fmt: skip


def _scale(trainer: str, value: str | bool) -> Scale:
    names: dict[str | bool, Scale] = {True: "group", False: "none", "group": "group", "batch": "batch", "none": "none"}
    if value not in names:
        near = suggest(str(value), ("group", "batch", "none"))
        raise UsageError(f"trl:{trainer}: scale_rewards={value!r} is unknown{near} There are group, batch and none.")
    return names[value]


def _sampled(
    trainer: str, group: int, longest: int, temperature: float, top_p: float, mask_truncated: bool, batches: Any
) -> dict[str, Any]:
    """The parts that all trainers on samples share."""
    if group < 2 or longest < 1:
        raise UsageError(f"trl:{trainer}: num_generations must be at least 2, and max_completion_length at least 1.")
    return {
        "source": Rollouts(group, temperature=temperature, top_p=top_p, max_new_tokens=longest),
        "feedback": Reward(),
        "keep": MaskTruncated() if mask_truncated else None,
        "schedule": generation_schedule(group, *batches, trainer=trainer),
    }


def generation_schedule(
    group: int,
    micro: int,
    accumulation: int,
    per_generation: int | None,
    generation: int | None,
    iterations: int,
    *,
    trainer: str = "grpo",
) -> Schedule:
    """TRL's batch sizes, which count completions, as prompts per sampling and optimizer steps per pass.

    >>> generation_schedule(group=4, micro=8, accumulation=2, per_generation=4, generation=None, iterations=2)
    Schedule(prompts=8, inner_epochs=2, minibatches=2, minibatch_rows=None, steps=None, rate=1.0)
    """
    where = f"trl:{trainer}:"
    if per_generation is not None and generation is not None:
        raise UsageError(f"{where} give steps_per_generation or generation_batch_size, not both.")
    for number in (group, micro, accumulation, per_generation, generation, iterations):
        if number is not None and number < 1:
            raise UsageError(f"{where} batch sizes, num_generations and num_iterations must be at least 1.")
    update = micro * accumulation
    sampled = generation or micro * (per_generation or accumulation)
    told = f"{sampled} completions are sampled at once and {update} make an optimizer step"
    if sampled % micro:
        raise UsageError(
            f"{where} generation_batch_size={sampled} is no multiple of per_device_train_batch_size={micro}."
        )
    if sampled % group:
        raise UsageError(
            f"{where} {told}; {sampled} is no multiple of num_generations={group}. Change per_device_train_batch_size "
            "or gradient_accumulation_steps."
        )
    if sampled >= update and sampled % update == 0:
        return Schedule(sampled // group, iterations, sampled // update)
    if update % sampled == 0 and iterations == 1:  # several samplings of one policy make a step: one larger sampling
        return Schedule(update // group)
    raise UsageError(
        f"{where} {told}: one must be a multiple of the other, and num_iterations above 1 needs the samples of whole "
        "steps. Set steps_per_generation to a multiple of gradient_accumulation_steps."
    )
