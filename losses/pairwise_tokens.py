"""Pairwise losses that read more of the tokens than two sums: a KL at each, a step, a third completion, or one by one.

The symbols are those of ``pairwise``: s_w and s_l are the log-ratios log π(y)/ref(y) of the chosen (w) and the rejected
(l) completion, summed over their tokens; π_w and π_l are the policy's log-probabilities alone.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from prefzoo.losses.base import register_loss
from prefzoo.losses.numerics import masked
from prefzoo.losses.pairwise import contrast, dpo, pair_metrics, reward_metrics
from prefzoo.records import LossOut, Pairs, masked_mean, masked_sum
from prefzoo.registry import NotNegative, Positive, UsageError

KL_FIELDS = ("chosen_kl_BT", "rejected_kl_BT")
OF_ITS_OWN_KL = {"divergence": "it is derived for the reverse KL, whose forward KL it measures at every token"}


def sequential_kl(batch: Pairs, side: str) -> Tensor:
    """Σ_t KL(ref ‖ π) over the tokens of a side, (B,), in nats, with gradient."""
    kl_BT = batch.tensors().get(f"{side}_kl_BT")
    if kl_BT is None:
        raise UsageError(f"this loss needs {side}_kl_BT, KL(ref ‖ π) at every token; the record does not hold it.")
    return masked_sum(kl_BT, batch.tensors()[f"{side}_mask_BT"])


@torch.no_grad()
def kl_metrics(batch: Pairs) -> dict[str, Tensor]:
    return {f"seq_kl/{side}": sequential_kl(batch, side) for side in ("chosen", "rejected")}


@register_loss(
    paper="arXiv:2404.11999", extras=KL_FIELDS, contrast=True, refuses=OF_ITS_OWN_KL,
    recommended={"learning_rate": 1e-6},
)  # fmt: skip
def tdpo1(batch: Pairs, *, beta: Positive = 0.1) -> LossOut:
    """Token-level DPO, first form: the difference of the two sides' sequential KL is taken from DPO's logit.

        loss = -log σ(β (s_w - s_l) - β (D_l - D_w)),   D = Σ_t KL(ref(.|t) ‖ π(.|t))

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, and ``chosen_kl_BT``, ``rejected_kl_BT``.
        beta: strength of the pull to the reference, per nat.

    Returns:
        One loss per pair, (B,), in nats; log 2 where policy and reference are equal. Metrics (B,) as ``dpo``, and
        ``seq_kl/chosen``, ``seq_kl/rejected``.

    Convention: the paper's; the KL is exact over the vocabulary, the reference first, and has gradient on both sides.
    Not in TRL. It costs the reference's distribution at every token, which cached log-probabilities do not hold.

    Known failure: the chosen side's KL enters with a plus: the policy is rewarded for leaving the reference along the
    chosen completion, which is why the paper has ``tdpo2``.

    Source: Zeng et al., Token-level Direct Preference Optimization, arXiv:2404.11999.

    >>> x_BT, mask_BT = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=x_BT, ref_chosen_logps_BT=x_BT - 1, chosen_kl_BT=0 * x_BT, chosen_mask_BT=mask_BT,
    ...     rejected_logps_BT=x_BT, ref_rejected_logps_BT=x_BT, rejected_kl_BT=0.25 + 0 * x_BT,
    ...     rejected_mask_BT=mask_BT)
    >>> tdpo1(batch, beta=0.5).loss  # -log σ(0.5 * 2 - 0.5 * 0.5)
    tensor([0.3869])
    """
    drift_B = sequential_kl(batch, "rejected") - sequential_kl(batch, "chosen")
    logits_B = beta * (contrast(batch) - drift_B)
    return LossOut(-F.logsigmoid(logits_B), pair_metrics(batch, beta) | kl_metrics(batch))


@register_loss(
    paper="arXiv:2404.11999", extras=KL_FIELDS, contrast=True, refuses=OF_ITS_OWN_KL,
    recommended={"learning_rate": 1e-6},
)  # fmt: skip
def tdpo2(batch: Pairs, *, beta: Positive = 0.1, alpha: NotNegative = 0.5) -> LossOut:
    """Token-level DPO, second form: the rejected side's sequential KL is bounded by the chosen side's, a constant.

        loss = -log σ(β (s_w - s_l) - α β (D_l - stop_gradient(D_w))),   D = Σ_t KL(ref(.|t) ‖ π(.|t))

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, and ``chosen_kl_BT``, ``rejected_kl_BT``.
        beta: strength of the pull to the reference, per nat.
        alpha: α, weight of the difference of KL; 0 is ``dpo``.

    Returns:
        One loss per pair, (B,), in nats; log 2 where policy and reference are equal. Metrics (B,) as ``tdpo1``.

    Convention: the paper's, its α included; no gradient flows through D_w. At α = 1 the value is that of ``tdpo1``, the
    gradient is not. Not in TRL. It costs the reference's distribution at every token.

    Known failure: an α far above 1 makes the loss a KL penalty along rejected completions, and preferences are hardly
    learned.

    Source: Zeng et al., Token-level Direct Preference Optimization, arXiv:2404.11999.

    >>> x_BT, mask_BT = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=x_BT, ref_chosen_logps_BT=x_BT - 1, chosen_kl_BT=0 * x_BT, chosen_mask_BT=mask_BT,
    ...     rejected_logps_BT=x_BT, ref_rejected_logps_BT=x_BT, rejected_kl_BT=0.5 + 0 * x_BT,
    ...     rejected_mask_BT=mask_BT)
    >>> tdpo2(batch, beta=0.5, alpha=0.5).loss  # -log σ(0.5 * 2 - 0.5 * 0.5 * 1)
    tensor([0.3869])
    """
    drift_B = sequential_kl(batch, "rejected") - sequential_kl(batch, "chosen").detach()
    logits_B = beta * (contrast(batch) - alpha * drift_B)
    return LossOut(-F.logsigmoid(logits_B), pair_metrics(batch, beta) | kl_metrics(batch))


@register_loss(
    paper="arXiv:2406.18629",
    extras=("chosen_step_BT", "rejected_step_BT"),
    contrast=True,
    refuses={"divergence": "its log-ratio is that of a step, and the modifier's scores are those of completions"},
    recommended={"learning_rate": 1e-6},
)
def step_dpo(batch: Pairs, *, beta: Positive = 0.1) -> LossOut:
    """Step-DPO: DPO on the first step that went wrong, the steps before it being part of the prompt.

        loss = -log σ(β (s_w - s_l)),   s = Σ log π(t)/ref(t) over the tokens t of the step

    Args:
        batch: pairs with reference log-probabilities, (B, T) per side, and ``chosen_step_BT``, ``rejected_step_BT``,
            which mark the tokens of the step that the label is about.
        beta: strength of the pull to the reference, per nat.

    Returns:
        One loss per pair, (B,), in nats; log 2 where policy and reference are equal. Metrics (B,) as ``dpo``, of the
        steps.

    Convention: a token counts where both the mask and the step's mark are set, so the right steps before it and what
    follows it are in the context and not in the loss. Where the data holds only the step as its completion, this is
    ``dpo``. The default beta is DPO's. Not in TRL.

    Known failure: which step is the first wrong one is itself a judgement; where it is marked too late, the true fault
    stays in both contexts and nothing is learned of it.

    Source: Lai et al., Step-DPO: Step-wise Preference Optimization for Long-chain Reasoning of LLMs, arXiv:2406.18629.

    >>> x_BT, mask_BT = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]])
    >>> step_BT = torch.tensor([[False, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=x_BT, ref_chosen_logps_BT=x_BT - 1, chosen_mask_BT=mask_BT, chosen_step_BT=step_BT,
    ...     rejected_logps_BT=x_BT, ref_rejected_logps_BT=x_BT, rejected_mask_BT=mask_BT, rejected_step_BT=step_BT)
    >>> step_dpo(batch, beta=1.0).loss  # -log σ(1), of the second token alone
    tensor([0.3133])
    """
    if batch.chosen_step_BT is None or batch.rejected_step_BT is None:
        raise UsageError("loss 'step_dpo' needs chosen_step_BT and rejected_step_BT, the tokens of the step.")
    chosen_BT, rejected_BT = (
        batch.chosen_mask_BT & batch.chosen_step_BT,
        batch.rejected_mask_BT & batch.rejected_step_BT,
    )
    return dpo(dataclasses.replace(batch, chosen_mask_BT=chosen_BT, rejected_mask_BT=rejected_BT), beta=beta)


@register_loss(
    paper="arXiv:2405.16681", reference=False, extras=("gold_logps_BT", "gold_mask_BT"), contrast=True,
    recommended={"learning_rate": 5e-7},
)  # fmt: skip
def tpo(batch: Pairs, *, beta: Positive = 0.01, alpha: NotNegative = 1.0) -> LossOut:
    """Triple preference optimization: a comparison of two completions, and the likelihood of a third, the gold one.

        loss = -log σ(β (π_w - π_l)) - α π_gold / n_gold

    Args:
        batch: pairs, (B, T) log-probabilities per side, in nats, with ``gold_logps_BT`` and ``gold_mask_BT``.
        beta: scale of the difference, per nat.
        alpha: α, weight of the likelihood of the gold completion.

    Returns:
        One loss per pair, (B,), in nats. Metrics (B,) as ``dpo``, the rewards in them being beta times the
        log-probability; and ``nll/gold`` in nats per token.

    Convention: no reference model; what TRL calls the column ``reference`` is the gold completion. Its NLL is a mean
    over the tokens of each completion; TRL's is over the tokens of the batch, the paper's formula is the sum. The
    defaults are the authors' and TRL's, for a mean.

    Known failure: as ``cpo``, the comparison alone lowers both of its sides; what is learned is mostly the gold
    completion, and no better than it.

    Source: Saeidi et al., Triple Preference Optimization, arXiv:2405.16681.

    >>> x_BT, mask_BT = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=x_BT, chosen_mask_BT=mask_BT, rejected_logps_BT=x_BT - 1, rejected_mask_BT=mask_BT,
    ...     gold_logps_BT=x_BT, gold_mask_BT=mask_BT)
    >>> tpo(batch, beta=0.5, alpha=0.1).loss  # -log σ(0.5 * 2) + 0.1 * 1.5
    tensor([0.4633])
    """
    if batch.gold_logps_BT is None or batch.gold_mask_BT is None:
        raise UsageError("loss 'tpo' needs gold_logps_BT and gold_mask_BT, a third completion better than both.")
    chosen_B, rejected_B = beta * batch.chosen_B, beta * batch.rejected_B
    nll_B = -masked_mean(batch.gold_logps_BT, batch.gold_mask_BT)
    metrics = reward_metrics(batch, chosen_B, rejected_B) | {"nll/gold": nll_B.detach()}
    return LossOut(-F.logsigmoid(chosen_B - rejected_B) + alpha * nll_B, metrics)


@register_loss(paper="arXiv:2203.02155", reference=False, count="token", recommended={"learning_rate": 2e-5})
def chosen_nll(batch: Pairs) -> LossOut:
    """Negative log-likelihood of the chosen completions, token by token: supervised learning from pairs.

        loss_t = -log π(y_w,t)

    Args:
        batch: pairs, (B, T) log-probabilities of the chosen side, in nats; the rejected side is not read.

    Returns:
        One loss per token of the chosen side, (B, T), in nats; 0 outside its mask. No metrics.

    Convention: with its count, ``token``, the mean over all chosen tokens of the optimizer batch: TRL's ``sft`` part of
    a mixture of losses and the likelihood term of its CPO trainer, whose mean is over a micro-batch and so depends on
    how a batch is split. With count ``row``, the mean of each completion's mean, it is the modifier ``nll``; with
    ``row_sum``, the term of ``cpo``.

    Known failure: what the pair says beyond "this one" is not used: the rejected completion may rise with the chosen
    one.

    Source: the supervised step of Ouyang et al., arXiv:2203.02155, on the preferred completions.

    >>> x_BT, mask_BT = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, False]])
    >>> batch = Pairs(chosen_logps_BT=x_BT, rejected_logps_BT=x_BT, chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT)
    >>> chosen_nll(batch).loss
    tensor([[1., -0.]])
    """
    return LossOut(-masked(batch.chosen_logps_BT, batch.chosen_mask_BT))


@register_loss(paper="arXiv:2203.02155", reference=False, count="token", extras=("prompt_logps_BT",))
def prompt_chosen_nll(batch: Pairs) -> LossOut:
    """Negative log-likelihood of prompts and chosen completions, token by token.

        loss_t = -log π(z_t),   z = (x, y_w) without its first token

    Args:
        batch: pairs, (B, T) log-probabilities of the chosen side and of the prompt's own tokens (``prompt_logps_BT``
            and ``prompt_mask_BT``), in nats; the rejected side is not read.

    Returns:
        One loss per token, the prompt's cells before the chosen side's, (B, T), in nats, with their mask; 0 outside. No
        metrics.

    Convention: with its count, ``token``, the mean over all these tokens of the optimizer batch: the likelihood term of
    TRL's ORPO trainer, whose mean is over a micro-batch. ``chosen_nll`` leaves the prompt out, as the ORPO paper does.

    Known failure: the model learns to write prompts, which nobody asked for; where prompts are long, they are most of
    the loss.

    Source: the supervised step of Ouyang et al., arXiv:2203.02155; the tokens: TRL's ORPOTrainer.

    >>> x_BT, mask_BT = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, False]])
    >>> batch = Pairs(
    ...     chosen_logps_BT=x_BT, rejected_logps_BT=x_BT, chosen_mask_BT=mask_BT, rejected_mask_BT=mask_BT,
    ...     prompt_logps_BT=x_BT, prompt_mask_BT=~mask_BT)
    >>> prompt_chosen_nll(batch).loss
    tensor([[-0., 2., 1., -0.]])
    """
    if batch.prompt_logps_BT is None or batch.prompt_mask_BT is None:
        raise UsageError(
            "loss 'prompt_chosen_nll' needs Pairs.prompt_logps_BT and prompt_mask_BT; 'chosen_nll' does without."
        )
    mask_BT = torch.cat([batch.prompt_mask_BT, batch.chosen_mask_BT], -1)
    return LossOut(-masked(torch.cat([batch.prompt_logps_BT, batch.chosen_logps_BT], -1), mask_BT), mask_BT=mask_BT)
