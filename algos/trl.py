"""TRL's trainers under TRL's names: ``trl:dpo`` has TRL's mathematics, defaults and option spellings.

The options of an entry are the fields of TRL 1.16's configuration that are mathematics; :mod:`prefzoo.algos.trl_fields`
knows what all other fields are here. ``docs/from-trl.md`` is the page for those who come from there.
"""

from __future__ import annotations

from collections.abc import Sequence

from prefzoo.algorithm import ALGORITHMS, Algorithm, Schedule, Term, register_algorithm
from prefzoo.algos.trl_fields import NO_LIMIT, Translated, read_trl_config, spelling, translate
from prefzoo.losses import create_loss
from prefzoo.parts.count import Count
from prefzoo.parts.credit import GroupRelative
from prefzoo.parts.feedback import MaskTruncated, Reward
from prefzoo.parts.prelude import RotatedBaseline
from prefzoo.parts.reference import Moving, Start
from prefzoo.parts.source import DatasetRows, Rollouts
from prefzoo.registry import Positive, UsageError, suggest

# What TRL has under a name and we do not, with the nearest that is here.
ABSENT: dict[str, str] = {
    **dict.fromkeys(("hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "aot", "aot_unpaired"), "trl:sigmoid"),
    **dict.fromkeys(("apo_zero", "apo_down", "discopop", "sigmoid_norm"), "trl:sigmoid"),
    **dict.fromkeys(("cpo", "orpo", "simpo", "tpo", "CPOTrainer", "ORPOTrainer", "TPOTrainer"), "trl:dpo"),
    **dict.fromkeys(("online_dpo", "xpo", "nash_md", "OnlineDPOTrainer", "XPOTrainer", "NashMDTrainer"), "trl:dpo"),
    **dict.fromkeys(("bco", "apo_zero_unpaired", "BCOTrainer"), "trl:kto"),
    **dict.fromkeys(("cispo", "sapo", "luspo", "vespo", "gspo", "gmpo"), "trl:grpo"),
    **dict.fromkeys(("rloo", "RLOOTrainer"), "rlvr"),
    **dict.fromkeys(("gkd", "distillation", "dft", "GKDTrainer", "DistillationTrainer"), "trl:sft"),
    "sppo_hard": "trl:ipo", "ppo": "ppo", "PPOTrainer": "ppo", "prm": "trl:reward", "PRMTrainer": "trl:reward",
}  # fmt: skip
ALGORITHMS.absent.update(
    {f"trl:{name}": f"is not in the zoo yet; nearest is {near!r}." for name, near in ABSENT.items()}
)
ALGORITHMS.absent.update(
    {f"trl:{name}": f"is 'trl:grpo' with loss_type={name!r}." for name in ("bnpo", "dr_grpo")}
    | {"trl:chunked_nll": "is 'trl:sft': how the loss is cut into pieces does not change it."}
)

# What TRL's configurations have in common, in our words: linear decay to 0 without warm-up.
TRAINING = {"betas": (0.9, 0.999), "warmup_steps": 0, "final_learning_rate": 0.0}
OF_ROWS = {**TRAINING, "rows_per_step": 8, "epochs": 3.0}
OF_PAIRS = {**OF_ROWS, "implicit_prompt": "character"}


@register_algorithm(
    name="trl:sft", paper="arXiv:2203.02155", aliases=("trl:SFTTrainer", "trl:nll"),
    recommended={**OF_ROWS, "learning_rate": 2e-5}, spelling=spelling("sft", "trl:sft"),
)  # fmt: skip
def trl_sft(*, loss_type: str = "nll") -> Algorithm:
    """TRL's SFTTrainer: the negative log-likelihood of the tokens that carry the loss.

        loss = - mean over tokens of log pi(y_t | x, y_<t)

    Args:
        loss_type: ``"nll"``; TRL's ``dft`` is not here yet.

    Departures: the mean is over the tokens of the whole optimizer batch, as TRL's is, on one device and on several.
    Weight decay takes all parameters, TRL spares biases and norms. No dropout. Float32 unless ``bf16=True``, no
    gradient checkpointing unless asked for. Packing never changes the result here, so ``packing`` is refused.

    Source: TRL 1.16, ``SFTTrainer``.

    Example::

        prefzoo.train("trl:sft", model="my-model", dataset="chats.jsonl", assistant_only_loss=True)
    """
    _known_loss("trl:sft", loss_type, ("nll",))
    return Algorithm(source=DatasetRows("completions"), loss=create_loss("sft"), count="token")


@register_algorithm(
    name="trl:reward", paper="arXiv:2203.02155", aliases=("trl:RewardTrainer",),
    recommended={**OF_PAIRS, "learning_rate": 1e-4}, spelling=spelling("reward", "trl:reward"),
)  # fmt: skip
def trl_reward(*, center_rewards_coefficient: float | None = None) -> Algorithm:
    """TRL's RewardTrainer: a Bradley-Terry reward model from pairs, read from the last token.

        loss = - log sigmoid(r(x, y_w) - r(x, y_l) - margin) + c (r(x, y_w) + r(x, y_l))^2

    Args:
        center_rewards_coefficient: c, pulls the mean reward of a pair to 0; None: 0.

    Departures: the head starts at zero, TRL's at random. Weight decay takes all parameters, TRL spares biases and
    norms. Float32 unless ``bf16=True``, no gradient checkpointing unless asked for.

    Source: TRL 1.16, ``RewardTrainer``.

    Example::

        prefzoo.train("trl:reward", model="my-model", dataset="pairs.jsonl", output_dir="runs/rm")
    """
    loss = create_loss("bradley_terry", centering=center_rewards_coefficient or 0.0)
    return Algorithm(source=DatasetRows("pairs"), loss=loss, pooling="last")


@register_algorithm(
    name="trl:dpo", paper="arXiv:2305.18290", aliases=("trl:DPOTrainer", "trl:sigmoid"),
    recommended={**OF_PAIRS, "learning_rate": 1e-6}, spelling=spelling("dpo", "trl:dpo"),
)  # fmt: skip
def trl_dpo(
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: Positive = 0.1,
    label_smoothing: float = 0.0,
    sync_ref_model: bool = False,
    ref_model_mixup_alpha: float = 0.6,
    ref_model_sync_steps: int = 512,
) -> Algorithm:
    """TRL's DPOTrainer: direct preference optimization and its relatives, by ``loss_type``.

        sigmoid: - log sigmoid(beta (s_w - s_l))     ipo: (s_w / n_w - s_l / n_l - 1 / (2 beta))^2
        s = log pi(y|x) / ref(y|x) over the n tokens of a completion

    Args:
        loss_type: ``"sigmoid"`` or ``"ipo"``, or a list of them: their weighted sum.
        loss_weights: one weight for each; None: 1.
        beta: strength of the pull to the reference; the paper's tau for ``ipo``.
        label_smoothing: 0. Since 0.29 TRL reads it only in ``robust``, ``exo_pair`` and ``aot``; any other value is
            refused here, because it would do nothing.
        sync_ref_model: the reference follows the policy (TR-DPO).
        ref_model_mixup_alpha, ref_model_sync_steps: every so many steps, ref = alpha pi + (1 - alpha) ref.

    Departures: pairs without a prompt are split by TRL's character rule, identical pairs are dropped and counted.
    Weight decay takes all parameters, TRL spares biases and norms. Float32 unless ``bf16=True``, no gradient
    checkpointing unless asked for.

    Source: TRL 1.16, ``DPOTrainer``; Rafailov et al., arXiv:2305.18290, equation 7.

    Example::

        prefzoo.train("trl:dpo", model="my-model", dataset="pairs.jsonl", per_device_train_batch_size=2,
                      gradient_accumulation_steps=8, beta=0.1)

    >>> trl_dpo(loss_type="ipo", beta=0.2).stages[0].terms[0].loss.name
    'ipo'
    """
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    if not _all(names, str) or not names:
        raise UsageError(f"trl:dpo: loss_type is a name or a list of names, got {loss_type!r}.")
    weights = [1.0] * len(names) if loss_weights is None else loss_weights
    if not _all(weights, int, float) or len(weights) != len(names):
        raise UsageError(f"trl:dpo: loss_type {names} needs one of loss_weights each, got {weights!r}.")
    if label_smoothing:
        raise UsageError(
            f"trl:dpo: label_smoothing={label_smoothing:g} has no effect on {', '.join(names)}: TRL 0.29 and later "
            "read it only in robust, exo_pair and aot, which are not here yet; leave it out."
        )
    ours = {"sigmoid": "dpo", "ipo": "ipo"}
    for name in names:
        _known_loss("trl:dpo", name, tuple(ours))
    terms = tuple(
        Term(create_loss(ours[n], beta=float(beta)), weight=float(w)) for n, w in zip(names, weights, strict=True)
    )
    reference = _reference("trl:dpo", sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps)
    return Algorithm(source=DatasetRows("pairs"), terms=terms, reference=reference)


@register_algorithm(
    name="trl:ipo", paper="arXiv:2310.12036",
    recommended={**OF_PAIRS, "learning_rate": 1e-6}, spelling=spelling("dpo", "trl:ipo"),
)  # fmt: skip
def trl_ipo(
    *,
    beta: Positive = 0.1,
    sync_ref_model: bool = False,
    ref_model_mixup_alpha: float = 0.6,
    ref_model_sync_steps: int = 512,
) -> Algorithm:
    """TRL's DPOTrainer with ``loss_type="ipo"``: identity preference optimization on means over tokens.

        loss = (s_w / n_w - s_l / n_l - 1 / (2 beta))^2

    Args:
        beta: the paper's tau, on the scale of one token.
        sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps: a reference that follows, as in ``trl:dpo``.

    Departures: those of ``trl:dpo``.

    Source: TRL 1.16, ``DPOTrainer``; Azar et al., arXiv:2310.12036, equation 17.

    Example::

        prefzoo.train("trl:ipo", model="my-model", dataset="pairs.jsonl", beta=0.1)
    """
    return trl_dpo(
        loss_type="ipo", beta=beta, sync_ref_model=sync_ref_model, ref_model_mixup_alpha=ref_model_mixup_alpha,
        ref_model_sync_steps=ref_model_sync_steps,
    )  # fmt: skip


@register_algorithm(
    name="trl:kto", paper="arXiv:2402.01306", aliases=("trl:KTOTrainer",),
    recommended={**OF_PAIRS, "learning_rate": 1e-6}, spelling=spelling("kto", "trl:kto"),
)  # fmt: skip
def trl_kto(
    *,
    loss_type: str = "kto",
    beta: Positive = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    sync_ref_model: bool = False,
    ref_model_mixup_alpha: float = 0.6,
    ref_model_sync_steps: int = 512,
) -> Algorithm:
    """TRL's KTOTrainer: single completions labelled good or bad, judged against a reference point.

        loss = w (1 - sigmoid(+-beta (r - z0))),   r = log pi(y|x) / ref(y|x),   z0 = max(0, mean of mismatched r)

    Args:
        loss_type: ``"kto"``; TRL's ``apo_zero_unpaired`` is not here yet.
        beta: strength of the pull to the reference.
        desirable_weight, undesirable_weight: w of good and of bad rows.
        sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps: a reference that follows, as in ``trl:dpo``.

    Departures: z0 is estimated from the whole optimizer batch, TRL's from each micro-batch of each device, so here it
    does not depend on how the batch is cut. Rows are shuffled: TRL reads them in the order of the file, a thousand
    good ones and then a thousand bad ones where pairs were taken apart; ``train_sampling_strategy="sequential"`` asks
    for the file's order. Weight decay takes all parameters. Float32 unless ``bf16=True``, no gradient checkpointing
    unless asked for.

    Source: TRL 1.16, ``KTOTrainer``; Ethayarajh et al., arXiv:2402.01306, equation 8.

    Example::

        prefzoo.train("trl:kto", model="my-model", dataset="thumbs.jsonl", undesirable_weight=1.33)
    """
    _known_loss("trl:kto", loss_type, ("kto",))
    loss = create_loss("kto", beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    return Algorithm(
        source=DatasetRows("unpaired"), prelude=RotatedBaseline(), loss=loss,
        reference=_reference("trl:kto", sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps),
    )  # fmt: skip


@register_algorithm(
    name="trl:grpo", paper="arXiv:2402.03300", aliases=("trl:GRPOTrainer", "trl:dapo"),
    recommended={**TRAINING, "learning_rate": 1e-6, "epochs": 3.0, "max_length": NO_LIMIT},
    spelling=spelling("grpo", "trl:grpo"),
)  # fmt: skip
def trl_grpo(
    *,
    loss_type: str = "dapo",
    num_generations: int = 8,
    beta: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    scale_rewards: str | bool = "group",
    mask_truncated_completions: bool = False,
    use_bias_correction_kl: bool = True,
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
            means; ``dr_grpo``: the sum over tokens by completions times ``max_completion_length``.
        num_generations: completions of each prompt.
        beta: weight of the KL to the reference; 0: no reference is loaded.
        epsilon, epsilon_high: how far the ratio rho = pi/pi_old may fall and rise; None: as far as it may fall.
        delta: bound of the ratio for bad tokens (dual clip), above 1 + epsilon_high.
        scale_rewards: ``"group"`` (True) divides by the group's standard deviation, ``"none"`` (False) does not;
            ``"batch"`` is not here yet.
        mask_truncated_completions: no gradient from completions cut at the limit.
        use_bias_correction_kl: the factor rho before the KL, differentiated.
        sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps: a reference that follows, as in ``trl:dpo``.
        per_device_train_batch_size, gradient_accumulation_steps: their product is the completions of an optimizer
            step, as in TRL on one device.
        steps_per_generation, generation_batch_size: completions sampled at once: ``per_device_train_batch_size`` times
            ``steps_per_generation``, by default those of one optimizer step. By ``num_generations``: the prompts.
        num_iterations: passes over what was sampled.
        max_completion_length, temperature, top_p: sampling.

    Departures: ``bnpo`` is the token mean over the optimizer batch (TRL: over each micro-batch), which is ``dapo``.
    Where one sampling serves several optimizer steps, ``dapo`` counts the tokens of each step (TRL: of the sampling,
    shared equally), and rows are cut anew in every pass. Prompts go on into the next epoch where TRL drops a rest.
    ``max_steps`` of :func:`prefzoo.train` counts optimizer steps under this name, as in TRL; without it the run is one
    pass over the prompts (TRL: three). Weight decay takes all parameters. No dropout. Float32 unless ``bf16=True``, no
    gradient checkpointing unless asked for.

    Source: TRL 1.16, ``GRPOTrainer``; Shao et al., arXiv:2402.03300; Yu et al. (DAPO), arXiv:2503.14476.

    Example::

        prefzoo.train("trl:grpo", model="my-model", dataset="prompts.jsonl", reward=my_function, num_generations=4,
                      per_device_train_batch_size=8, gradient_accumulation_steps=2, max_steps=100)
    """
    counts: dict[str, Count | str] = {
        "dapo": "token",
        "bnpo": "token",
        "grpo": "row",
        "dr_grpo": Count("constant", constant=float(max_completion_length)),
    }
    _known_loss("trl:grpo", loss_type, tuple(counts))
    scales = {True: "group", False: "none"}
    scale = scales[scale_rewards] if isinstance(scale_rewards, bool) else scale_rewards
    if scale not in ("group", "none"):
        cure = "is not in the zoo yet" if scale == "batch" else "is unknown" + suggest(scale, ("group", "none"))
        raise UsageError(f"trl:grpo: scale_rewards={scale!r} {cure.rstrip('.')}; there are 'group' and 'none'.")
    if not beta and not use_bias_correction_kl:
        raise UsageError("trl:grpo: use_bias_correction_kl has no effect without beta, the weight of the KL.")
    if num_generations < 2 or max_completion_length < 1:
        raise UsageError("trl:grpo: num_generations must be at least 2, and max_completion_length at least 1.")
    count = counts[loss_type]
    surrogate = Term(
        create_loss("clipped_surrogate", clip=epsilon, clip_high=epsilon_high, dual_clip=delta), count=count
    )
    kl = create_loss("kl_penalty", estimator="k3", importance=use_bias_correction_kl)
    return Algorithm(
        source=Rollouts(
            num_generations, temperature=temperature, top_p=top_p, max_new_tokens=max_completion_length
        ),
        feedback=Reward(),
        keep=MaskTruncated() if mask_truncated_completions else None,
        credit=GroupRelative("group" if scale == "group" else "none"),
        terms=(surrogate, Term(kl, count=count, weight=beta)) if beta else (surrogate,),
        schedule=generation_schedule(
            num_generations, per_device_train_batch_size, gradient_accumulation_steps, steps_per_generation,
            generation_batch_size, num_iterations,
        ),
        reference=_reference("trl:grpo", sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps),
    )  # fmt: skip


def generation_schedule(
    group: int, micro: int, accumulation: int, per_generation: int | None, generation: int | None, iterations: int
) -> Schedule:
    """TRL's batch sizes, which count completions, as prompts per sampling and optimizer steps per pass.

    >>> generation_schedule(group=4, micro=8, accumulation=2, per_generation=4, generation=None, iterations=2)
    Schedule(prompts=8, inner_epochs=2, minibatches=2, minibatch_rows=None)
    """
    where = "trl:grpo:"
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


def _all(values: object, *kinds: type) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(v, kinds) for v in values)


def _known_loss(entry: str, name: str, known: Sequence[str]) -> None:
    if name in known:
        return
    if name == "sft" or name in ABSENT:
        cure = f" is not in the zoo yet; there {'is' if len(known) == 1 else 'are'} {', '.join(known)}."
    else:
        cure = f" is unknown{suggest(name, known)} There are: {', '.join(known)}."
    raise UsageError(f"{entry}: loss_type {name!r}{cure}")


def _reference(entry: str, follows: bool, alpha: float, every: int) -> Start | Moving:
    if follows:
        return Moving(alpha, every)
    if (alpha, every) != (0.6, 512):
        raise UsageError(
            f"{entry}: ref_model_mixup_alpha and ref_model_sync_steps have no effect without sync_ref_model."
        )
    return Start()


__all__ = ["Translated", "generation_schedule", "read_trl_config", "translate"]
