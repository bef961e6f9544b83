"""Counts: by what a term's loss is divided.

A loss is never reduced inside its function. The engine sums ``count.total`` over the micro-batches and divides once
by ``count.size`` gathered over the whole optimizer batch (all micro-batches, all processes) before the first backward.
So 1 x 8, 2 x 4 and 8 x 1 micro-batches give the same gradient, by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from prefzoo.records import masked_mean, masked_sum
from prefzoo.registry import UsageError, suggest

Unit = Literal["token", "row", "row_sum", "constant", "weight"]
UNITS: dict[str, str] = {
    "token": "mean over all masked tokens of the batch",
    "row": "mean over rows; a token loss is first averaged over its row's tokens",
    "row_sum": "mean over rows of the sum over their tokens",
    "constant": "sum over tokens / (rows x constant)",
    "weight": "weighted mean over rows: sum of weight x loss / sum of weights",
}


@dataclass(frozen=True)
class Count:
    """The unit a term averages over, and whether fully masked rows count.

    ``token``: sum of l_bt / sum of m_bt. ``row``: mean_b (sum_t l_bt / sum_t m_bt), or mean_b l_b for a loss of rows
    (a pair, a ranking and a completion are rows of their families). ``row_sum``: mean_b sum_t l_bt.
    ``constant``: sum l_bt / (B x constant). ``weight``: sum_b w_b l_b / sum_b w_b.

    >>> import torch
    >>> loss_BT, mask_BT = torch.tensor([[1.0, 2.0], [3.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    >>> [round(float(Count(u).mean(loss_BT, mask_BT)), 4) for u in ("token", "row", "row_sum")]
    [2.0, 2.25, 3.0]
    >>> float(Count("constant", constant=4).mean(loss_BT, mask_BT))
    0.75
    """

    unit: Unit = "row"
    constant: float | None = None
    empty_rows: bool = True

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UsageError(f"no count {self.unit!r}{suggest(self.unit, UNITS)} Known: {', '.join(UNITS)}.")
        if (self.unit == "constant") != (self.constant is not None):
            raise UsageError("Count: 'constant' is the number of tokens for unit='constant', and only for it.")

    def size(self, rows: int, mask_BT: Tensor | None = None, weight_B: Tensor | None = None) -> float:
        """What a micro-batch adds to the denominator."""
        if self.unit == "token":
            return float(_mask(mask_BT, self).sum())
        if self.unit == "weight":
            return float(rows if weight_B is None else weight_B.sum())
        if not self.empty_rows and mask_BT is not None:
            rows = int(mask_BT.any(-1).sum())
        return rows * (self.constant or 1.0)

    def total(self, loss: Tensor, mask_BT: Tensor | None = None, weight_B: Tensor | None = None) -> Tensor:
        """What a micro-batch adds to the numerator: a scalar with gradient."""
        if loss.dim() not in (1, 2):
            raise UsageError(
                f"a loss has shape {tuple(loss.shape)}, expected one value per row, (B,), or per token, (B, T). Return "
                "it unreduced: the mean is the count's."
            )
        if loss.dim() == 1:
            if self.unit == "token":
                raise UsageError(
                    "count 'token' needs a loss of tokens (B, T); this loss has one value per row: use 'row'."
                )
            loss_B = loss
        elif self.unit == "row":
            loss_B = masked_mean(loss, _mask(mask_BT, self))
        else:
            loss_B = masked_sum(loss, _mask(mask_BT, self))
        return (loss_B if weight_B is None else loss_B * weight_B).sum()

    def mean(self, loss: Tensor, mask_BT: Tensor | None = None, weight_B: Tensor | None = None) -> Tensor:
        """Numerator over denominator of one whole batch."""
        return self.total(loss, mask_BT, weight_B) / max(self.size(len(loss), mask_BT, weight_B), 1e-30)


def _mask(mask_BT: Tensor | None, count: Count) -> Tensor:
    if mask_BT is None:
        raise UsageError(f"count {count.unit!r} needs the mask of the tokens.")
    return mask_BT


def as_count(count: Count | str) -> Count:
    """``"token"`` means ``Count("token")``."""
    return count if isinstance(count, Count) else Count(count)  # type: ignore[arg-type]
