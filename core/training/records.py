"""From samples and scores to the record of a loss's family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from prefzoo.data.samples import Samples, labels_of, loss_mask, scatter
from prefzoo.losses import Loss
from prefzoo.models.roles import Scores as ModelScores
from prefzoo.models.roles import Want
from prefzoo.models.tree import TreeBatch
from prefzoo.parts.roles import of_critic
from prefzoo.records import (
    Distribution,
    Heads,
    Likelihood,
    Pairs,
    PolicyGradient,
    Ranked,
    RankedScores,
    Ratings,
    Record,
    Scores,
    StepScores,
    Unpaired,
    Values,
)

# What the policy's forward must give for a field that a loss declares in its extras.
WANTED: Mapping[str, Want] = MappingProxyType({
    "entropy_BT": "entropy", "chosen_log_sq_BT": "log_sq", "rejected_log_sq_BT": "log_sq", "chosen_kl_BT": "kl",
    "rejected_kl_BT": "kl", "prompt_logps_BT": "prompt",
})  # fmt: skip


def wanted(losses: Iterable[Loss]) -> frozenset[Want]:
    """What these losses need of the policy's distribution, beside log-probabilities."""
    losses = list(losses)
    logits = frozenset[Want]({"logits"}) if any(loss.family is Distribution for loss in losses) else frozenset[Want]()
    return logits | {WANTED[e] for loss in losses for e in loss.extras if e in WANTED}


def cells(loss: Loss, rows: Samples) -> Tensor:
    """The cells that a loss of tokens lives on, known before any forward: of pairs the chosen side's, and before them
    the prompt's where the loss reads it; of rankings the best one's."""
    mask_BT = loss_mask(rows, rows.mask_BT())
    if rows.kind == "rankings":
        return mask_BT[0 :: rows.width]
    if rows.kind != "pairs" or loss.family is Unpaired:
        return mask_BT
    if "prompt_logps_BT" not in loss.extras:
        return mask_BT[0::2]
    lengths_B = torch.from_numpy(rows.prompts.lengths[rows.prompt_B[0::2]] - 1)
    prompt_BT = torch.arange(max(int(lengths_B.max()), 0))[None] < lengths_B[:, None]
    return torch.cat([prompt_BT, mask_BT[0::2]], -1)


def rows_of(loss: Loss, rows: Samples) -> tuple[int, Tensor | None]:
    """How many values of rows a loss has on these samples, and their weights; of pairs taken apart, two each."""
    weights = rows.row_columns.get("weight", rows.columns.get("weight"))
    if rows.kind != "pairs" or loss.family is not Unpaired:
        return len(rows), weights
    return 2 * len(rows), None if weights is None else weights.repeat_interleave(2)


def build_record(
    family: type[Record],
    samples: Samples,
    scores: ModelScores,
    tree: TreeBatch,
    shared: Mapping[str, Tensor],
    critic: str = "",
) -> Record:
    """The record of one micro-batch. ``shared`` is what the prelude knows about the whole optimizer batch; ``critic``
    the name of the critic whose values they are."""
    mask_BT, device = tree.mask_BT, tree.mask_BT.device
    trained_BT = loss_mask(samples, mask_BT)

    def tokens(name: str) -> Tensor | None:
        flat = samples.tokens.get(name)
        return None if flat is None else scatter(flat.to(device), mask_BT)

    def column(name: str, columns: Mapping[str, Tensor]) -> Tensor | None:
        value = columns.get(name)
        return None if value is None else value.to(device)

    def lists(values: Tensor) -> Tensor:
        """What every completion has, ranking by ranking."""
        return values.unflatten(0, (-1, samples.width))

    def of_pairs(*names: str) -> dict[str, Any]:
        return {f"{name}_B": column(name, samples.row_columns) for name in names}

    def sides(name: str, values_BT: Tensor | None) -> dict[str, Tensor]:
        if values_BT is None:
            return {}
        return {name.format("chosen"): values_BT[0::2], name.format("rejected"): values_BT[1::2]}

    def scored(flat_C: Tensor | None) -> Tensor | None:
        return None if flat_C is None else scatter(flat_C, mask_BT)

    weight_B = column("weight", samples.columns)
    weight_P = column("weight", samples.row_columns)
    score_B = column("score", samples.columns)
    if family is RankedScores:
        return RankedScores(
            rewards_PK=lists(_need(scores.rewards_B)), valid_PK=lists(mask_BT.any(-1)), weight_P=weight_P
        )
    if family is Ratings:
        return Ratings(rewards_B=_need(scores.rewards_B), targets_B=_need(score_B), weight_B=weight_B)
    if family is StepScores:
        return StepScores(
            scores_BT=scatter(_need(scores.steps_C), mask_BT), labels_BT=_need(tokens("labels")), mask_BT=trained_BT,
            weight_B=weight_B,
        )  # fmt: skip
    if family is Scores:
        assert scores.rewards_B is not None
        return Scores(
            chosen_B=scores.rewards_B[0::2], rejected_B=scores.rewards_B[1::2],
            **of_pairs("margin", "probability", "tie", "weight"),
        )  # fmt: skip
    if family is Values:
        assert scores.values_C is not None
        return Values(
            values_BT=scatter(scores.values_C, mask_BT), mask_BT=trained_BT,
            old_values_BT=_need(tokens(of_critic("values", critic))),
            returns_BT=_need(tokens(of_critic("returns", critic))),
        )  # fmt: skip
    if family is Heads:
        heads = {f"{name}_BT": scatter(values_C, mask_BT) for name, values_C in scores.heads.items()}
        return Heads(
            **heads, next_v_BT=after(heads["v_BT"].detach(), trained_BT), mask_BT=trained_BT,
            rewards_BT=at_last(_need(score_B).to(heads["v_BT"].dtype), trained_BT),
        )  # fmt: skip
    assert scores.logps_C is not None
    logps_BT, ref_BT = scatter(scores.logps_C, mask_BT), tokens("ref_logps")
    if family is Pairs:
        prompts: dict[str, Tensor] = {}
        if scores.prompt_logps_R is not None:
            row_B = torch.from_numpy(samples.prompt_B[0::2]).to(device)
            prompt_mask_PT = tree.prompts.mask_PT
            prompts["prompt_logps_BT"] = scatter(scores.prompt_logps_R, prompt_mask_PT)[row_B]
            prompts["prompt_mask_BT"] = prompt_mask_PT[row_B]
        return Pairs(
            **sides("{}_logps_BT", logps_BT), **sides("{}_mask_BT", trained_BT), **sides("ref_{}_logps_BT", ref_BT),
            **sides("{}_log_sq_BT", scored(scores.log_sq_C)), **sides("{}_kl_BT", scored(scores.kl_C)), **prompts,
            **of_pairs("margin", "probability", "weight"),
        )  # fmt: skip
    if family is Ranked:
        return Ranked(
            logps_PKT=lists(logps_BT), mask_PKT=lists(trained_BT), valid_PK=lists(mask_BT.any(-1)),
            ref_logps_PKT=None if ref_BT is None else lists(ref_BT),
            scores_PK=None if score_B is None else lists(score_B), weight_P=weight_P,
        )  # fmt: skip
    if family is Unpaired:
        if samples.kind == "pairs" and weight_P is not None:
            weight_B = weight_P.repeat_interleave(2)
        return Unpaired(
            logps_BT=logps_BT, mask_BT=trained_BT, desirable_B=labels_of(samples).to(device),
            ref_logps_BT=ref_BT, baseline=shared.get("baseline"), delta=shared.get("delta"), weight_B=weight_B,
        )  # fmt: skip
    if family is Likelihood:
        return Likelihood(
            logps_BT=logps_BT, mask_BT=trained_BT, scores_B=score_B, advantages_BT=tokens("advantages"),
            weight_B=weight_B,
        )  # fmt: skip
    if family is Distribution:
        return Distribution(
            logits_BTV=scatter_rows(_need(scores.logits_CV), mask_BT),
            teacher_logits_BTV=scatter_rows(_need(scores.teacher_logits_CV), mask_BT), mask_BT=trained_BT,
        )  # fmt: skip
    assert family is PolicyGradient
    return PolicyGradient(
        logps_BT=logps_BT, mask_BT=trained_BT, old_logps_BT=_need(tokens("old_logps")),
        advantages_BT=_need(tokens("advantages")), ref_logps_BT=ref_BT,
        sampling_logps_BT=tokens("sampling_logps"), entropy_BT=scored(scores.entropy_C),
        entropy_floor=shared.get("entropy_floor"),
    )  # fmt: skip


def scatter_rows(flat_CV: Tensor, mask_BT: Tensor) -> Tensor:
    """Flat rows (C, V) into the masked cells of (B, T, V); zeros elsewhere. Differentiable."""
    return flat_CV.new_zeros(*mask_BT.shape, flat_CV.shape[-1]).index_put((mask_BT,), flat_CV)


def after(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Of every masked cell the value at the next one of its row, 0 after the last; what lies between is skipped.

    >>> after(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[True, False, True, True]]))
    tensor([[3., 3., 4., 0.]])
    """
    width = mask_BT.shape[1]
    place_BT = torch.arange(width, device=mask_BT.device).expand_as(mask_BT)
    own_BT = torch.where(mask_BT, place_BT, width)
    next_BT = torch.cat([own_BT.flip(1).cummin(1).values.flip(1)[:, 1:], torch.full_like(own_BT[:, :1], width)], 1)
    return torch.cat([values_BT, torch.zeros_like(values_BT[:, :1])], 1).gather(1, next_BT)


def at_last(values_B: Tensor, mask_BT: Tensor) -> Tensor:
    """One value per row, (B,), at the last masked cell of the row; zeros elsewhere.

    >>> at_last(torch.tensor([5.0, 7.0]), torch.tensor([[True, True, False], [True, False, False]]))
    tensor([[0., 5., 0.],
            [7., 0., 0.]])
    """
    last_BT = mask_BT & (mask_BT.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(last_BT, values_B[:, None], 0.0)


def _need(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
