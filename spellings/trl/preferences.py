"""TRL's trainers on rows of data under TRL's names: SFT, reward models, DPO, CPO, ORPO, KTO, BCO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from prefzoo.algorithm import Algorithm, Term, register_algorithm
from prefzoo.losses import create_loss
from prefzoo.parts.prelude import ClassMidpoint, RotatedBaseline
from prefzoo.parts.source import DatasetRows
from prefzoo.registry import NotNegative, Positive, UsageError
from prefzoo.spellings.trl.fields import spelling
from prefzoo.spellings.trl.parts import OF_PAIRS, OF_ROWS, all_of, check_read, our_losses, reference

SMOOTHED_DPO = (
    "TRL takes it and does not read it since 0.29. The loss that it made before is 'cdpo', of prefzoo's own entries."
)


@register_algorithm(
    name="trl:sft", paper="arXiv:2203.02155", aliases=("trl:SFTTrainer", "trl:nll"),
    recommended={**OF_ROWS, "learning_rate": 2e-5}, spelling=spelling("sft", "trl:sft"),
)  # fmt: skip
def trl_sft(*, loss_type: str = "nll") -> Algorithm:
    """TRL's SFTTrainer: the negative log-likelihood of the tokens that carry the loss.

        loss = - mean over tokens of log pi(y_t | x, y_<t)

    Args:
        loss_type: ``"nll"``, or ``"dft"``: each token is weighted by its own probability.

    Departures: the mean is over the tokens of the whole optimizer batch, as TRL's is, on one device and on several.
    Weight decay takes all parameters, TRL spares biases and norms. No dropout. Float32 unless ``bf16=True``, no
    gradient checkpointing unless asked for. Packing never changes the result here, so ``packing`` is refused.

    Source: TRL 1.16, ``SFTTrainer``.

    Example::

        prefzoo.train("trl:sft", model="my-model", dataset="chats.jsonl", assistant_only_loss=True)
    """
    (loss,) = our_losses("sft", [loss_type])
    return Algorithm(source=DatasetRows("completions"), loss=create_loss(loss), count="token")


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


DIVERGENCES = {
    "reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha",
}  # fmt: skip
DivergenceName = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


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
    f_divergence_type: DivergenceName = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    discopop_tau: Positive = 0.05,
    sync_ref_model: bool = False,
    ref_model_mixup_alpha: float = 0.6,
    ref_model_sync_steps: int = 512,
) -> Algorithm:
    """TRL's DPOTrainer: direct preference optimization and its relatives, by ``loss_type``.

        sigmoid: - log sigmoid(beta (s_w - s_l))     ipo: (s_w / n_w - s_l / n_l - 1 / (2 beta))^2     ...
        s = log pi(y|x) / ref(y|x) over the n tokens of a completion

    Args:
        loss_type: a name, or a list of names for their weighted sum: sigmoid, hinge, ipo, exo_pair, nca_pair, robust,
            bco_pair, sppo_hard, aot, aot_unpaired, apo_zero, apo_down, discopop, sft, sigmoid_norm. All but sigmoid and
            sft are entries of their own, ``trl:hinge``, whose cards say which loss here they are.
        loss_weights: one weight for each; None: 1.
        beta: strength of the pull to the reference; the paper's tau for ``ipo``.
        label_smoothing: the share of flipped labels, of ``robust``, ``exo_pair`` (which needs it), ``aot`` and
            ``aot_unpaired``. Elsewhere TRL takes it and does not read it; here it is refused.
        f_divergence_type: divergence to the reference whose score replaces s, for losses of the difference of scores.
        f_alpha_divergence_coef: alpha of ``alpha_divergence``, TRL's, which is 1 minus the paper's.
        ld_alpha: share that tokens beyond the length of the shorter side count by (LD-DPO); None: 1.
        use_weighting: weight pairs by how likely the policy itself would have written them (WPO).
        discopop_tau: width of the blend of ``discopop``.
        sync_ref_model: the reference follows the policy (TR-DPO).
        ref_model_mixup_alpha, ref_model_sync_steps: every so many steps, ref = alpha pi + (1 - alpha) ref.

    Departures: ``sft`` is the token mean of the optimizer batch, and ``aot`` sorts all of it; TRL's are those of each
    micro-batch, which depend on how the batch is cut. Exponents are clamped where they would overflow. Pairs without a
    prompt are split by TRL's character rule, identical pairs are dropped and counted. Weight decay takes all
    parameters, TRL spares biases and norms. Float32 unless ``bf16=True``, no gradient checkpointing unless asked for.

    Source: TRL 1.16, ``DPOTrainer``; Rafailov et al., arXiv:2305.18290, equation 7.

    Example::

        prefzoo.train("trl:dpo", model="my-model", dataset="pairs.jsonl", per_device_train_batch_size=2,
                      gradient_accumulation_steps=8, beta=0.1)

    >>> mixture = trl_dpo(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    >>> [(term.weight, term.loss.name) for term in mixture.stages[0].terms]
    [(0.8, 'dpo'), (0.2, 'bco_pair'), (1.0, 'chosen_nll')]
    """
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    if not all_of(names, str) or not names or len(set(names)) < len(names):
        raise UsageError(f"trl:dpo: loss_type is a name or a list of different names, got {loss_type!r}.")
    weights = [1.0] * len(names) if loss_weights is None else loss_weights
    if not all_of(weights, int, float) or len(weights) != len(names):
        raise UsageError(f"trl:dpo: loss_type {names} needs one of loss_weights each, got {weights!r}.")
    losses = our_losses("dpo", names)
    ld_alpha = None if ld_alpha == 1 else ld_alpha
    given = {"beta": beta, "label_smoothing": label_smoothing, "ld_alpha": ld_alpha, "discopop_tau": discopop_tau}
    check_read("dpo", trl_dpo, dict(zip(names, losses, strict=True)), given, {"label_smoothing": SMOOTHED_DPO})
    if f_alpha_divergence_coef != 0.5 and f_divergence_type != "alpha_divergence":
        raise UsageError("trl:dpo: f_alpha_divergence_coef has no effect without f_divergence_type='alpha_divergence'.")
    around: dict[str, Any] = {}
    if f_divergence_type != "reverse_kl":
        around["divergence"] = DIVERGENCES[f_divergence_type]
        if f_alpha_divergence_coef != 0.5:
            around |= {"divergence_alpha": f_alpha_divergence_coef, "alpha_convention": "trl"}
    if ld_alpha is not None:
        around["ld_alpha"] = ld_alpha
    if use_weighting:
        around["wpo"] = True
    if losses == ["chosen_nll"] and around:
        raise UsageError(f"trl:dpo: {', '.join(around)} compare two sides, and sft reads the chosen one; leave it out.")
    terms = []
    for loss, weight in zip(losses, weights, strict=True):
        own: dict[str, Any] = {"beta": float(beta), **around}
        if loss == "chosen_nll":  # as in TRL, a divergence and LD-DPO do not concern it
            own = {"wpo": True} if use_weighting else {}
        elif loss in ("robust_dpo", "exo_pair") or (loss.startswith("aot") and label_smoothing):
            own["label_smoothing"] = label_smoothing
        if loss == "discopop":
            own["tau"] = discopop_tau
        terms.append(Term(create_loss(loss, **own), weight=float(weight)))
    if "exo_pair" in losses and not 0 < label_smoothing < 1:
        raise UsageError(
            f"trl:dpo: loss_type 'exo_pair' needs label_smoothing above 0 and below 1, got {label_smoothing:g}, which "
            "makes its reverse KL infinite (TRL raises too); the paper's is 1e-3."
        )
    if "robust_dpo" in losses and label_smoothing >= 0.5:
        raise UsageError(f"trl:dpo: loss_type 'robust' needs label_smoothing below 0.5, got {label_smoothing:g}.")
    return Algorithm(
        source=DatasetRows("pairs"), terms=tuple(terms),
        reference=reference("dpo", sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps),
    )  # fmt: skip


@register_algorithm(
    name="trl:cpo", paper="arXiv:2401.08417", aliases=("trl:CPOTrainer",),
    recommended={**OF_PAIRS, "learning_rate": 1e-6}, spelling=spelling("cpo", "trl:cpo"),
)  # fmt: skip
def trl_cpo(
    *,
    loss_type: str = "sigmoid",
    beta: Positive = 0.1,
    cpo_alpha: float = 1.0,
    simpo_gamma: NotNegative = 0.5,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> Algorithm:
    """TRL's CPOTrainer: pairs without a reference, and the likelihood of the chosen completions beside them.

        sigmoid: - log sigmoid(beta (p_w - p_l)) + cpo_alpha NLL        p = log pi(y|x)
        simpo:   - log sigmoid(beta (p_w / n_w - p_l / n_l) - simpo_gamma) + cpo_alpha NLL

    Args:
        loss_type: sigmoid, hinge or ipo (here ``cpo``, ``cpo_hinge``, ``cpo_ipo``), simpo or alphapo; the last two are
            also ``trl:simpo`` and ``trl:alphapo``.
        beta: scale of the difference.
        cpo_alpha: weight of the mean NLL of the chosen tokens of the batch. SimPO proper has 0; alphapo sets it to 0.
        simpo_gamma: the margin of simpo and alphapo in reward units, gamma itself and not gamma / beta.
        alpha: shape of AlphaPO's reward; 0: plain SimPO.
        label_smoothing: share of flipped labels, of the comparison alone; of hinge and ipo TRL ignores it with a
            warning, here it is refused.

    Departures: the NLL is the token mean of the optimizer batch; TRL's is that of each micro-batch. With alpha, TRL
    raises a probability that may be 0 to a negative power; here the logarithm is multiplied. alpha with sigmoid, hinge
    or ipo bends the probability of whole completions in TRL, which overflows; here it is refused. As in ``trl:dpo``:
    weight decay, precision, gradient checkpointing.

    Source: TRL 1.16, ``CPOTrainer``; Xu et al., arXiv:2401.08417; Meng et al., arXiv:2405.14734.

    Example::

        prefzoo.train("trl:cpo", model="my-model", dataset="pairs.jsonl", loss_type="simpo", cpo_alpha=0.0, beta=2.0)
    """
    (loss,) = our_losses("cpo", [loss_type])
    given = {"simpo_gamma": simpo_gamma, "alpha": alpha, "label_smoothing": label_smoothing, "cpo_alpha": cpo_alpha}
    check_read("cpo", trl_cpo, {loss_type: loss}, given, {"cpo_alpha": "in TRL too alphapo has none; leave it out."})
    options: dict[str, Any] = {"beta": beta} | ({"label_smoothing": label_smoothing} if label_smoothing else {})
    if loss in ("simpo", "alphapo"):
        options["gamma"] = simpo_gamma
        if alpha or loss == "alphapo":
            loss, options["alpha"] = "alphapo", alpha
    else:
        options["nll"] = 0.0  # TRL's mean is another one: the term below
    terms = [Term(create_loss(loss, **options))]
    if cpo_alpha and loss_type != "alphapo":
        terms.append(Term(create_loss("chosen_nll"), count="token", weight=cpo_alpha))
    return Algorithm(source=DatasetRows("pairs"), terms=tuple(terms))


@register_algorithm(
    name="trl:orpo", paper="arXiv:2403.07691", aliases=("trl:ORPOTrainer",),
    recommended={**OF_PAIRS, "learning_rate": 1e-6}, spelling=spelling("orpo", "trl:orpo"),
)  # fmt: skip
def trl_orpo(*, beta: Positive = 0.1) -> Algorithm:
    """TRL's ORPOTrainer: supervised learning of the chosen completion and a comparison of odds, without a reference.

        loss = NLL of prompts and chosen completions - beta log sigmoid(log odds_w - log odds_l)

    Args:
        beta: weight of the comparison, the paper's lambda.

    Departures: the NLL is a mean over the tokens of all prompts and chosen completions of the optimizer batch; TRL's is
    that of each micro-batch. The paper's, over the completion alone, is ``orpo``. As in ``trl:dpo``: weight decay,
    precision, gradient checkpointing.

    Source: TRL 1.16, ``ORPOTrainer``; Hong et al., arXiv:2403.07691.

    Example::

        prefzoo.train("trl:orpo", model="my-model", dataset="pairs.jsonl", beta=0.1)
    """
    terms = (Term(create_loss("orpo", beta=beta, nll=0.0)), Term(create_loss("prompt_chosen_nll")))
    return Algorithm(source=DatasetRows("pairs"), terms=terms)


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
        loss_type: ``"kto"``, or ``"apo_zero_unpaired"``, where z0 is 0.
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
    (name,) = our_losses("kto", [loss_type])
    loss = create_loss(name, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    return Algorithm(
        source=DatasetRows("unpaired"), prelude=RotatedBaseline() if name == "kto" else None, loss=loss,
        reference=reference("kto", sync_ref_model, ref_model_mixup_alpha, ref_model_sync_steps),
    )  # fmt: skip


@register_algorithm(
    name="trl:bco", paper="arXiv:2404.04656", aliases=("trl:BCOTrainer",),
    recommended={**OF_PAIRS, "learning_rate": 5e-7}, spelling=spelling("bco", "trl:bco"),
)  # fmt: skip
def trl_bco(*, beta: Positive = 0.1) -> Algorithm:
    """TRL's BCOTrainer, last in 1.10: logistic regression of the label on the shifted implicit reward.

        loss = - log sigmoid(+-beta (r - delta)),   r = log pi(y|x) / ref(y|x)

    Args:
        beta: strength of the pull to the reference.

    Departures: delta is the midpoint of the two classes' mean rewards in the optimizer batch, as in the paper; TRL's is
    a running mean of all rewards since the start. Weights from a classifier of prompts are not computed here. Rows are
    shuffled. As in ``trl:dpo``: weight decay, precision, gradient checkpointing.

    Source: TRL 1.10, ``BCOTrainer``; Jung et al., arXiv:2404.04656.

    Example::

        prefzoo.train("trl:bco", model="my-model", dataset="thumbs.jsonl", beta=0.1)
    """
    return Algorithm(source=DatasetRows("unpaired"), prelude=ClassMidpoint(), loss=create_loss("bco", beta=beta))
