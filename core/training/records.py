"""From samples and scores to the record of a loss's family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from prefzoo.data.samples import Samples, loss_mask, scatter
from prefzoo.losses import Loss
from prefzoo.models.roles import Scores as ModelScores
from prefzoo.models.roles import Want
from prefzoo.models.tree import TreeBatch
from prefzoo.records import (
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
    return frozenset(WANTED[e] for loss in losses for e in loss.extras if e in WANTED)


def cells(loss: Loss, rows: Samples) -> Tensor:
    """The cells that a loss of tokens lives on, known before any forward: of pairs the chosen side's, and before them
    the prompt's where the loss reads it; of rankings the best one's."""
    mask_BT = loss_mask(rows, rows.mask_BT())
    if rows.kind == "rankings":
        return mask_BT[0 :: rows.width]
    if rows.kind != "pairs":
        return mask_BT
    if "prompt_logps_BT" not in loss.extras:
        return mask_BT[0::2]
    lengths_B = torch.from_numpy(rows.prompts.lengths[rows.prompt_B[0::2]] - 1)
    prompt_BT = torch.arange(max(int(lengths_B.max()), 0))[None] < lengths_B[:, None]
    return torch.cat([prompt_BT, mask_BT[0::2]], -1)


def build_record(
    family: type[Record], samples: Samples, scores: ModelScores, tree: TreeBatch, shared: Mapping[str, Tensor]
) -> Record:
    """The record of one micro-batch. ``shared`` is what the prelude knows about the whole optimizer batch."""
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
            old_values_BT=_need(tokens("values")), returns_BT=_need(tokens("returns")),
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
        return Unpaired(
            logps_BT=logps_BT, mask_BT=trained_BT, desirable_B=_need(column("desirable", samples.columns)),
            ref_logps_BT=ref_BT, baseline=shared.get("baseline"), delta=shared.get("delta"), weight_B=weight_B,
        )  # fmt: skip
    if family is Likelihood:
        return Likelihood(logps_BT=logps_BT, mask_BT=trained_BT, scores_B=score_B, weight_B=weight_B)
    assert family is PolicyGradient
    return PolicyGradient(
        logps_BT=logps_BT, mask_BT=trained_BT, old_logps_BT=_need(tokens("old_logps")),
        advantages_BT=_need(tokens("advantages")), ref_logps_BT=ref_BT,
        sampling_logps_BT=tokens("sampling_logps"), entropy_BT=scored(scores.entropy_C),
        entropy_floor=shared.get("entropy_floor"),
    )  # fmt: skip


def _need(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
