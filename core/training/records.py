"""From samples and scores to the record of a loss's family."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from prefzoo.data.samples import Samples, scatter
from prefzoo.models.roles import Scores as ModelScores
from prefzoo.records import Likelihood, Pairs, PolicyGradient, Record, Scores, Unpaired, Values


def loss_mask(samples: Samples, mask_BT: Tensor) -> Tensor:
    """Cells that a loss may see: the completion's tokens, without those marked as not trainable."""
    if "trainable" not in samples.tokens:
        return mask_BT
    return scatter(samples.tokens["trainable"].to(mask_BT.device), mask_BT)


def build_record(
    family: type[Record], samples: Samples, scores: ModelScores, mask_BT: Tensor, shared: Mapping[str, Tensor]
) -> Record:
    """The record of one micro-batch. ``shared`` is what the prelude knows about the whole optimizer batch."""
    device = mask_BT.device
    trained_BT = loss_mask(samples, mask_BT)

    def tokens(name: str) -> Tensor | None:
        flat = samples.tokens.get(name)
        return None if flat is None else scatter(flat.to(device), mask_BT)

    def column(name: str, columns: Mapping[str, Tensor]) -> Tensor | None:
        value = columns.get(name)
        return None if value is None else value.to(device)

    if family is Scores:
        assert scores.rewards_B is not None
        return Scores(
            chosen_B=scores.rewards_B[0::2], rejected_B=scores.rewards_B[1::2],
            margin_B=column("margin", samples.pair_columns), weight_B=column("weight", samples.pair_columns),
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
        return Pairs(
            chosen_logps_BT=logps_BT[0::2], rejected_logps_BT=logps_BT[1::2],
            chosen_mask_BT=trained_BT[0::2], rejected_mask_BT=trained_BT[1::2],
            ref_chosen_logps_BT=None if ref_BT is None else ref_BT[0::2],
            ref_rejected_logps_BT=None if ref_BT is None else ref_BT[1::2],
            margin_B=column("margin", samples.pair_columns), weight_B=column("weight", samples.pair_columns),
        )  # fmt: skip
    weight_B = column("weight", samples.columns)
    if family is Unpaired:
        return Unpaired(
            logps_BT=logps_BT, mask_BT=trained_BT, desirable_B=_need(column("desirable", samples.columns)),
            ref_logps_BT=ref_BT, baseline=shared.get("baseline"), weight_B=weight_B,
        )  # fmt: skip
    if family is Likelihood:
        return Likelihood(logps_BT=logps_BT, mask_BT=trained_BT, weight_B=weight_B)
    assert family is PolicyGradient
    return PolicyGradient(
        logps_BT=logps_BT, mask_BT=trained_BT, old_logps_BT=_need(tokens("old_logps")),
        advantages_BT=_need(tokens("advantages")), ref_logps_BT=ref_BT,
        entropy_BT=None if scores.entropy_C is None else scatter(scores.entropy_C, mask_BT),
    )  # fmt: skip


def _need(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
