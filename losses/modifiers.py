"""Modifiers: what changes many losses alike, each a function around the loss, ``modifier(loss, batch, *, option=off)``.

Their options belong to every loss that they apply to: ``create_loss("dpo", label_smoothing=0.1)``.
"""

from __future__ import annotations

from collections.abc import Callable

from prefzoo.losses.base import register_modifier
from prefzoo.records import LossOut, Pairs
from prefzoo.registry import Share

PairLoss = Callable[[Pairs], LossOut]


@register_modifier(order=20)
def label_smoothing(loss: PairLoss, batch: Pairs, *, label_smoothing: Share = 0.0) -> LossOut:
    """Label smoothing: a share ε of the labels is taken to be flipped, and the loss is the mean over both readings.

        loss' = (1 - ε) loss(y_w, y_l) + ε loss(y_l, y_w)

    Args:
        loss: any pairwise loss.
        batch: its pairs.
        label_smoothing: ε, from 0 (off) to 1. Of ``dpo`` it makes conservative DPO (``cdpo``).

    Convention: TRL 1.16 takes ``label_smoothing`` for ``sigmoid`` without reading it; here it is read by every pairwise
    loss, except those that have an option of that name with another meaning. Metrics are those of the labels as given.

    Source: Mitchell, A note on DPO with noisy preferences, 2023.
    """
    out, flipped = loss(batch), loss(batch.swapped())
    return LossOut((1 - label_smoothing) * out.loss + label_smoothing * flipped.loss, out.metrics)
