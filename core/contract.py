"""The loss contract: each check a small function of a ``Loss``; ``prefzoo.testing`` runs them.

A check holds for every correct loss, passes in silence, raises ``ContractError`` with the likely cause and the cure, or
``NotApplicable`` with the reason.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from prefzoo.losses.base import Loss
from prefzoo.records import (
    FAMILIES,
    Distribution,
    Likelihood,
    LossOut,
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
    masked_sum,
)  # fmt: skip
from prefzoo.registry import Entry, UsageError
from prefzoo.trial import (
    DATA,
    extreme_record,
    has_rows,
    inside,
    is_trained,
    likely_record,
    parts,
    random_record,
    swapped,
    take_rows,
    with_fields,
)  # fmt: skip

R = TypeVar("R", bound=Record)


class ContractError(AssertionError):
    """A loss breaks its contract: what was seen, the likely cause, and the cure."""


class NotApplicable(Exception):
    """Raised by a check that says nothing about this loss; the message is the reason."""


# -- what the checks measure with --------------------------------------------------------------------------------------


def _as_leaves(record: R, *, everything: bool = False) -> R:
    """A copy whose trained fields (or all real fields) are fresh leaves that require gradient."""
    real = {k: v for k, v in record.tensors().items() if v.is_floating_point() and (everything or is_trained(k))}
    return with_fields(record, {k: v.detach().clone().requires_grad_() for k, v in real.items()})


def _total(out: LossOut, record: Record, weight_B: Tensor | None = None) -> Tensor:
    """Sum over masked tokens and (weighted) rows, as the engine does."""
    loss_B = masked_sum(out.loss, _mask(out, record)) if out.loss.dim() == 2 else out.loss
    return (loss_B if weight_B is None else loss_B * weight_B).sum()


def _rows_of(out: LossOut, record: Record) -> Tensor:
    """The loss as the engine sees it: (B,), or (B, T) with zeros outside the mask; detached."""
    loss = out.loss.detach()
    return torch.where(_mask(out, record), loss, 0.0) if loss.dim() == 2 else loss


def _mask(out: LossOut, record: Record) -> Tensor:
    mask_BT = record.loss_mask_BT if out.mask_BT is None else out.mask_BT
    if mask_BT is None:
        raise ContractError(f"{type(record).__name__} has no tokens, so its losses have one value per row.")
    return mask_BT


def _gradients(
    loss: Loss, record: R, *, everything: bool = False, weight_B: Tensor | None = None
) -> tuple[LossOut, dict[str, Tensor]]:
    """The loss on leaves, and d(total)/d(field); zeros where nothing flows."""
    leaves = _as_leaves(record, everything=everything)
    out = loss(leaves)
    fields = {k: v for k, v in leaves.tensors().items() if v.requires_grad}
    total = _total(out, leaves, weight_B)
    if not total.requires_grad:
        return out, {k: torch.zeros_like(v) for k, v in fields.items()}
    found = torch.autograd.grad(total, list(fields.values()), allow_unused=True)
    pairs = zip(fields.items(), found, strict=True)
    return out, {k: torch.zeros_like(v) if g is None else g for (k, v), g in pairs}


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=False)


def _record(loss: Loss, seed: int = 0, **options: Any) -> Any:
    return random_record(loss.family, seed, **options)


def _moves(loss: Loss, record: Record, fields: Iterable[str], *, metrics: bool = False) -> bool:
    """Whether other numbers in these fields change the loss or its gradient (or, if asked for, its metrics)."""
    given = {k: v for k, v in record.tensors().items() if k in fields}
    halved = {k: 0.5 * v - 0.3 if v.is_floating_point() else ~v for k, v in given.items()}
    flipped = {k: -v if v.is_floating_point() else ~v for k, v in given.items()}  # what is compared to a threshold
    return any(_differ(loss, record, with_fields(record, other), metrics) for other in (halved, flipped))


def _differ(loss: Loss, record: Record, moved: Record, metrics: bool) -> bool:
    """Whether the loss, its gradient or (if asked for) its metrics are other ones on these two records."""
    out, gradients = _gradients(loss, record)
    new_out, new_gradients = _gradients(loss, moved)
    if not torch.equal(_rows_of(out, record), _rows_of(new_out, moved)):
        return True
    if any(not torch.equal(g, new_gradients[k]) for k, g in gradients.items()):
        return True
    return metrics and any(not torch.equal(v, new_out.metrics[k]) for k, v in out.metrics.items())


def _same(
    loss: Loss, record: Record, other: Record, tolerance: float = 1e-9, *, swap: bool = False, value: bool = True
) -> bool:
    """Whether the loss (``value``) and its gradient are the same on both records."""
    out, gradients = _gradients(loss, record)
    new_out, new_gradients = _gradients(loss, other)
    if swap:
        new_gradients = {_other_side(k): g for k, g in new_gradients.items()}
    if value and not _close(_rows_of(out, record), _rows_of(new_out, other), tolerance):
        return False
    return all(_close(g, new_gradients[k], tolerance) for k, g in gradients.items())


def _other_side(name: str) -> str:
    return "_".join({"chosen": "rejected", "rejected": "chosen"}.get(part, part) for part in name.split("_"))


# -- the checks -------------------------------------------------------------------------------------------------------


def unreduced(loss: Loss) -> None:
    """One value per row, (B,), or per token, (B, T)."""
    record = _record(loss)
    out = loss(record)
    allowed = _allowed_shapes(loss, out, record)
    if tuple(out.loss.shape) not in allowed:
        raise ContractError(
            f"loss has shape {tuple(out.loss.shape)}, expected {' or '.join(map(str, allowed))}. "
            "Was it averaged? Return it unreduced: the engine divides, by the count of the term."
        )
    if out.loss.dtype != torch.float64:
        raise ContractError(f"loss is {out.loss.dtype} for a float64 record: a constant was made as a float32 tensor.")


def _allowed_shapes(loss: Loss, out: LossOut, record: Record) -> list[tuple[int, ...]]:
    rows = next(v.shape[:1] for k, v in record.tensors().items() if has_rows(k))
    mask_BT = record.loss_mask_BT if out.mask_BT is None else out.mask_BT
    if mask_BT is None:
        return [tuple(rows)]
    token = tuple(mask_BT.shape)
    return [token] if loss.count == "token" else [tuple(rows), token]


def metrics_detached(loss: Loss) -> None:
    """Metrics are tensors with the leading shape of the loss, and hold no graph."""
    out = loss(_as_leaves(_record(loss)))
    for name, metric in out.metrics.items():
        shape = tuple(metric.shape) if isinstance(metric, Tensor) else type(metric).__name__
        if shape not in (tuple(out.loss.shape), tuple(out.loss.shape[:1])):
            raise ContractError(
                f"metric {name!r} is {shape}, expected a tensor like the loss, {tuple(out.loss.shape)}. "
                "Return one value per row or token: the engine averages metrics as it averages the loss."
            )
        if metric.requires_grad:
            raise ContractError(f"metric {name!r} carries gradient, which keeps the whole graph alive. Add .detach().")


def pure(loss: Loss) -> None:
    """Called twice it gives the same, and it leaves its inputs as they were."""
    record = _record(loss)
    before = {k: v.clone() for k, v in record.tensors().items()}
    first, second = loss(record), loss(record)
    changed = [k for k, v in record.tensors().items() if not torch.equal(v, before[k])]
    if changed:
        raise ContractError(f"wrote into its input {changed[0]}. Use x * y, not x.mul_(y) or x[...] = y.")
    if not torch.equal(_rows_of(first, record), _rows_of(second, record)):
        raise ContractError("two calls on one record differ: it draws random numbers or keeps state. A loss is pure.")


def gradient_reaches_policy(loss: Loss) -> None:
    """Some log-probability, score or value of the trained model receives gradient."""
    _, gradients = _gradients(loss, _record(loss, rows=16))  # enough that a clip or a mask leaves some
    if not any(bool((g != 0).any()) for g in gradients.values()):
        raise ContractError(
            f"no gradient reaches {', '.join(gradients)}: a .detach(), torch.no_grad() or item() stands on the path, "
            "or the loss does not use them."
        )


def gradient_stays_in_policy(loss: Loss) -> None:
    """No gradient reaches what other models made: reference, old policy, advantages, baseline, returns."""
    _, gradients = _gradients(loss, _record(loss), everything=True)
    for name, gradient in gradients.items():
        if not is_trained(name) and parts(name)[0] not in DATA and bool((gradient != 0).any()):
            raise ContractError(f"gradient reaches {name}, a constant of the mathematics. Use batch.{name}.detach().")


def row_permutation(loss: Loss) -> None:
    """Rows in another order: the same losses in that order."""
    record = _record(loss, rows=6)
    order_B = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = take_rows(record, order_B)
    if not _close(_rows_of(loss(record), record)[order_B], _rows_of(loss(moved), moved)):
        raise ContractError("permuting the rows changes them: does an index into the batch, or a roll, stand in it?")


def halves_equal_whole(loss: Loss) -> None:
    """Two halves of a batch give what the whole gives, value and gradient: rows do not know each other."""
    if loss.whole_batch:
        raise NotApplicable("declared whole_batch: it couples rows, and the engine does not split its batch")
    record = _record(loss, rows=6)
    weight_B = torch.arange(
        1.0, 7.0, dtype=torch.float64
    )  # uneven: an even sum over rows would hide a coupling by a mean
    out, gradients = _gradients(loss, record, weight_B=weight_B)
    for part_B in (torch.arange(0, 4), torch.arange(4, 6)):
        half = take_rows(record, part_B)
        half_out, half_gradients = _gradients(loss, half, weight_B=weight_B[part_B])
        same = _close(_rows_of(half_out, half), _rows_of(out, record)[part_B])
        if not same or not all(_close(half_gradients[k], g[part_B]) for k, g in gradients.items()):
            raise ContractError(
                "a part of the batch gives other losses than the whole: rows are coupled by a mean, a sort or a "
                "standard deviation. Compute that before the loss and pass it in, or register with whole_batch=True."
            )


def masked_cells(loss: Loss) -> None:
    """What stands outside the mask has no effect, on the loss or the gradient: 1e9, -1e9, infinity or NaN."""
    record = _record(loss)
    cells = {k: there for k in record.tensors() if (there := inside(record, k)) is not None}
    if not cells:
        raise NotApplicable(f"{loss.family.__name__} has no masks")
    out, gradients = _gradients(loss, record)
    tensors = record.tensors()
    for poison in (1e9, -1e9, float("inf"), float("nan")):
        poisoned = with_fields(record, {k: _poisoned(tensors[k], there, poison) for k, there in cells.items()})
        bad_out, bad_gradients = _gradients(loss, poisoned)
        if not _close(_rows_of(out, record), _rows_of(bad_out, poisoned)):
            raise ContractError(
                f"{poison:g} in a masked cell changes the loss. Sum with masked_sum(x_BT, mask_BT) or the properties "
                "of the record, and divide by mask_BT.sum(-1), never by x_BT.shape[1]; completions that are not valid "
                "are masked cells too."
            )
        wrong = [k for k, g in gradients.items() if not _close(g, bad_gradients[k])]
        if wrong:
            raise ContractError(
                f"{poison:g} in a masked cell changes the gradient of {wrong[0]}. Clean the inputs *before* exp, "
                "square or a product: prefzoo.losses.numerics.masked(x_BT, mask_BT); 0 * NaN is NaN."
            )


def _poisoned(values: Tensor, there: Tensor, poison: float) -> Tensor:
    return torch.where(there, values, poison) if values.is_floating_point() else values | ~there


def padding(loss: Loss) -> None:
    """More padding on the right changes nothing; nor do two more places for completions that are not there."""
    record = _record(loss)
    axes = [axis for axis in "TK" if any(axis in parts(k)[1] for k in record.tensors())]
    if not axes:
        raise NotApplicable(f"{loss.family.__name__} has no tokens")
    for axis in axes:
        wide = {k: (v, parts(k)[1].index(axis)) for k, v in record.tensors().items() if axis in parts(k)[1]}
        longer = with_fields(
            record, {k: torch.cat([v, torch.zeros_like(v.narrow(at, 0, 2))], at) for k, (v, at) in wide.items()}
        )
        before, after = (
            out.loss[_mask(out, r)] if out.loss.dim() == 2 else out.loss
            for out, r in ((loss(record), record), (loss(longer), longer))
        )
        if not _close(before, after):
            cure = "mask_BT.sum(-1)" if axis == "T" else "valid_PK.sum(-1)"
            raise ContractError(f"two more columns of padding change the loss: it divides by {axis}. Divide by {cure}.")


def empty_row(loss: Loss) -> None:
    """A row whose tokens are all masked has a finite loss, finite gradient, and no gradient in its cells."""
    record = _record(loss)
    masks = {k: v.clone() for k, v in record.tensors().items() if parts(k)[0].endswith(("mask", "valid"))}
    if not masks:
        raise NotApplicable(f"{loss.family.__name__} has no masks")
    for name, mask in masks.items():
        mask[0] = False
        if name == "valid_PK":
            mask[1, 1:] = False  # a ranking of one completion
    out, gradients = _gradients(loss, with_fields(record, masks))
    finite = [_rows_of(out, with_fields(record, masks)), *gradients.values()]
    if not all(bool(x.isfinite().all()) for x in finite):
        raise ContractError("a row without tokens gives NaN or infinity. Divide by mask_BT.sum(-1).clamp(min=1).")
    if any(bool((g[0] != 0).any()) for k, g in gradients.items() if "T" in parts(k)[1] or "K" in parts(k)[1]):
        raise ContractError("a row without tokens has gradient in its cells; mask the inputs first.")


def zero_advantage(loss: Loss) -> None:
    """Where all advantages are 0, so is the gradient."""
    _needs_advantages(loss)
    record = _record(loss)
    _, gradients = _gradients(loss, with_fields(record, {"advantages_BT": torch.zeros_like(record.advantages_BT)}))
    if any(bool((g != 0).any()) for g in gradients.values()):
        raise ContractError("advantages of 0 give gradient: is the advantage added, not multiplied?")


def on_policy(loss: Loss) -> None:
    """At ratio 1, where the policy is the one that sampled, the gradient is -A times a positive number.

    Tested with one advantage per completion; the positive number may differ between rows (a loss that averages).
    """
    _needs_advantages(loss)
    record = _record(loss)
    advantages_BT = record.advantages_BT[:, :1].expand_as(record.advantages_BT).clone()
    same = {"old_logps_BT": record.logps_BT, "sampling_logps_BT": record.logps_BT, "advantages_BT": advantages_BT}
    _, gradients = _gradients(
        loss, with_fields(record, {**same, "entropy_floor": torch.zeros_like(record.entropy_floor)})
    )
    scale_BT = -gradients["logps_BT"] / advantages_BT
    for scale_T, mask_T in zip(scale_BT, record.mask_BT, strict=True):
        found = scale_T[mask_T]
        if not (bool((found > 0).all()) and _close(found, found[:1].expand_as(found))):
            raise ContractError(
                f"at ratio 1 the gradient of the loss over -A is {found.tolist()}, expected one positive number per "
                "row. Is a sign wrong, or the ratio not differentiated?"
            )


def advantage_scale(loss: Loss) -> None:
    """Advantages three times as large: three times the loss and its gradient."""
    _needs_advantages(loss)
    record = _record(loss)
    out, gradients = _gradients(loss, record)
    scaled = with_fields(record, {"advantages_BT": 3 * record.advantages_BT})
    new_out, new_gradients = _gradients(loss, scaled)
    same = _close(3 * _rows_of(out, record), _rows_of(new_out, scaled))
    if not same or not all(_close(3 * g, new_gradients[k]) for k, g in gradients.items()):
        raise ContractError(
            "three times the advantages are not three times the loss: the advantage stands inside a clip, a square or "
            "an exp, so its unit changes what is learned. Multiply by it, and branch on its sign only."
        )


def ratio_shift(loss: Loss) -> None:
    """One constant added to the log-probabilities of all policies alike leaves the gradient as it is."""
    if loss.family is not PolicyGradient:
        raise NotApplicable(f"{loss.family.__name__} has no sampling policy")
    record = _record(loss)
    if not _same(loss, record, _shifted_logps(record), value=False):
        raise ContractError(
            "the gradient depends on a log-probability itself, not on ratios of policies. Is old_logps_BT (or "
            "ref_logps_BT) missing in an exponent?"
        )


def _shifted_logps(record: R) -> R:
    return with_fields(record, {k: v + 0.37 for k, v in record.tensors().items() if parts(k)[0].endswith("logps")})


def _needs_advantages(loss: Loss) -> None:
    if loss.family is not PolicyGradient:
        raise NotApplicable(f"{loss.family.__name__} has no advantages")
    record = _record(loss)
    if not _moves(loss, record, ["advantages_BT"]):
        raise NotApplicable("the loss does not use advantages")
    nothing = with_fields(record, {"advantages_BT": torch.zeros_like(record.advantages_BT)})
    for field in ("ref_logps_BT", "entropy_BT"):
        if _moves(loss, nothing, [field]):
            raise NotApplicable(f"the loss has another part, which depends on {field}")


def reference_shift(loss: Loss) -> None:
    """The same constant added to policy's, old policy's and reference's log-probabilities cancels."""
    if not loss.reference:
        raise NotApplicable("no reference")
    record = _record(loss)
    shifted = _shifted_logps(record)
    if not _close(_rows_of(loss(record), record), _rows_of(loss(shifted), shifted), 1e-9):
        raise ContractError(
            "adding one constant to policy and reference changes the loss: it depends on more than log-ratios. If it "
            "has a likelihood term on purpose, say so: exceptions={'reference_shift': 'has a likelihood term'}."
        )


UNDECLARED_CONTRAST = (
    "only the difference of the two log-ratios matters: contrast=True would say so, and let modifiers of it apply"
)


def side_shift(loss: Loss) -> None:
    """What the two log-ratios of a pair share cancels where the loss is registered with ``contrast=True``."""
    if loss.family is not Pairs:
        raise NotApplicable(f"{loss.family.__name__} has no sides with tokens")
    record = _record(loss)
    shift_B = torch.linspace(0.2, 0.7, len(record.margin_B), dtype=torch.float64)
    fields = {k: record.tensors()[k].clone() for k in ("chosen_logps_BT", "rejected_logps_BT")}
    for logps_BT in fields.values():
        logps_BT[:, 0] += shift_B  # the first token is in every mask of this record
    cancels = _same(loss, record, with_fields(record, fields))
    if loss.entry.tags["contrast"] and not cancels:
        raise ContractError(
            "one constant added to both log-ratios of a pair changes the loss or its gradient, though it is registered "
            "with contrast=True. Is a side scaled, clamped or divided by its length on its own? Or register without it."
        )
    if not loss.entry.tags["contrast"]:
        raise NotApplicable(UNDECLARED_CONTRAST if cancels and not loss.modifiers else "each side counts by itself")


def swap(loss: Loss) -> None:
    """A loss that reads ``probability_B`` takes p with the sides exchanged for 1 - p."""
    if loss.family not in (Pairs, Scores):
        raise NotApplicable(f"{loss.family.__name__} has no sides to exchange")
    record = _record(loss)
    if not _moves(loss, record, ["probability_B"]):
        raise NotApplicable("the loss does not use probability_B")
    if not _same(loss, record, swapped(record), swap=True):
        raise ContractError(
            "the sides exchanged and p made 1 - p give another loss or gradient: a soft label would depend on which "
            "answer was written first. Use p loss(w, l) + (1 - p) loss(l, w), or a target that is odd in p - 1/2."
        )


def reward_shift(loss: Loss) -> None:
    """A constant that says nothing cancels: on rewards of a row, on logits of a token, on a critic and its returns."""
    record, shifted = _record(loss), None
    tensors = record.tensors()
    if loss.family is Scores:
        shift = torch.linspace(0.5, 2.0, len(tensors["chosen_B"]), dtype=torch.float64)
        shifted = {k: tensors[k] + shift for k in ("chosen_B", "rejected_B")}
    elif loss.family is RankedScores:
        shift = torch.linspace(0.5, 2.0, len(tensors["rewards_PK"]), dtype=torch.float64)
        shifted = {"rewards_PK": tensors["rewards_PK"] + shift[:, None]}
    elif loss.family is Distribution:
        shift = torch.linspace(0.5, 2.0, tensors["mask_BT"].shape[1], dtype=torch.float64)[:, None]
        shifted = {
            "logits_BTV": tensors["logits_BTV"] + shift,
            "teacher_logits_BTV": tensors["teacher_logits_BTV"] - shift,
        }
    elif loss.family is Values:
        shifted = {k: tensors[k] + 0.7 for k in ("values_BT", "old_values_BT", "returns_BT")}
    else:
        raise NotApplicable(f"{loss.family.__name__} has no rewards that are known up to a constant")
    if not _same(loss, record, with_fields(record, shifted)):
        raise ContractError(
            f"a constant added to {' and '.join(shifted)} changes the loss or its gradient, though only differences "
            "mean anything. Subtract before you square, clip or exponentiate; take log_softmax of logits."
        )


def prefers_chosen(loss: Loss) -> None:
    """A small step against the gradient raises the better answer against the worse."""
    record = likely_record(_record(loss, rows=8))
    _, gradients = _gradients(loss, record)
    tensors = record.tensors()
    if loss.family is Pairs:
        gain = gradients["rejected_logps_BT"].sum(-1) - gradients["chosen_logps_BT"].sum(-1)
    elif loss.family is Scores:
        gain = gradients["rejected_B"] - gradients["chosen_B"]
    elif loss.family is Unpaired:
        gain = -gradients["logps_BT"].sum(-1) * torch.where(tensors["desirable_B"], 1.0, -1.0)
    elif loss.family in (Ranked, RankedScores):
        rise_PK = -(gradients["logps_PKT"].sum(-1) if loss.family is Ranked else gradients["rewards_PK"])
        last_P1 = tensors["valid_PK"].sum(-1, keepdim=True) - 1
        gain = rise_PK[:, 0] - rise_PK.gather(1, last_P1)[:, 0]
    else:
        raise NotApplicable(f"{loss.family.__name__} has no better and worse answers")
    if bool((gain > 0).all()):
        return
    cure = "Are the sides exchanged, or is a sign wrong?"
    if bool((gain >= 0).all()):
        cure = (
            "Rows at 0 have no gradient at all. If the loss is flat there on purpose, as a hinge is, say so: "
            "exceptions={'prefers_chosen': 'flat beyond its margin'}."
        )
    numbers = ", ".join(f"{x:.2g}" for x in gain.tolist())
    raise ContractError(
        f"a step against the gradient moves the better answer against the worse by {numbers} (per row, times the "
        f"step), expected numbers above 0. {cure}"
    )


def moves_to_target(loss: Loss) -> None:
    """A small step against the gradient moves no prediction away from what the record says is right."""
    record = likely_record(_record(loss, rows=8))
    tensors = record.tensors()
    if loss.family is Ratings:
        field, way = "rewards_B", tensors["targets_B"] - tensors["rewards_B"]
    elif loss.family is StepScores:
        field, way = "scores_BT", tensors["labels_BT"] - tensors["scores_BT"].sigmoid()
    elif loss.family is Values:
        field, way = "values_BT", tensors["returns_BT"] - tensors["values_BT"]
    elif loss.family is Distribution:
        field, way = "logits_BTV", tensors["teacher_logits_BTV"] - tensors["logits_BTV"]
    elif loss.family is Likelihood:
        field, way = "logps_BT", torch.ones_like(tensors["logps_BT"])
        good = {k: tensors[k].abs() + 0.1 for k in ("scores_B", "advantages_BT")}
        record = with_fields(record, good)
    else:
        raise NotApplicable(f"{loss.family.__name__} has no targets")
    _, gradients = _gradients(loss, record)
    gain = -gradients[field] * way
    gain = gain.sum(-1) if loss.family is Distribution else gain
    if not bool((gain >= 0).all() and (gain > 0).any()):
        raise ContractError(
            f"a step against the gradient moves {field} away from its target (by {gain.min():.2g} times the step). "
            "Is a sign wrong, or are prediction and target exchanged?"
        )


def finite_at_extremes(loss: Loss) -> None:
    """Never NaN or infinity: log-ratios, scores and values of ±500, in float32 and bfloat16, loss and gradient."""
    for dtype in (torch.float32, torch.bfloat16):
        for seed in range(3):
            record = extreme_record(_record(loss, seed, rows=32, tokens=4, dtype=dtype), seed)
            out, gradients = _gradients(loss, record)
            finite = {"the loss": _rows_of(out, record), **{f"the gradient of {k}": g for k, g in gradients.items()}}
            for name, value in finite.items():
                if not bool(value.isfinite().all()):
                    raise ContractError(
                        f"{name} is not finite at log-ratios of ±500 in {dtype}. Use logsigmoid, not log(sigmoid); "
                        "prefzoo.losses.numerics.safe_exp, not exp; and no infinite branch inside torch.where."
                    )


BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 5e-2}  # of the largest loss of the batch, and of 1


def low_precision(loss: Loss) -> None:
    """float64 is not rounded to float32; float32 and bfloat16 stay within 2e-5 and 5e-2 of the largest float64 loss."""
    exact = _record(loss, rows=8, dtype=torch.bfloat16)
    real = {k: v for k, v in exact.tensors().items() if v.is_floating_point()}
    record = with_fields(exact, {k: v.double() for k, v in real.items()})
    out, gradients = _gradients(loss, record)
    expected = _rows_of(out, record)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # what a tensor made of Python numbers alone has
    try:
        new_out, new_gradients = _gradients(loss, record)
    finally:
        torch.set_default_dtype(default)
    same = torch.equal(_rows_of(new_out, record), expected)
    if not same or any(not torch.equal(g, new_gradients[k]) for k, g in gradients.items()):
        raise ContractError(
            "a number is rounded to float32 though the record is float64: torch.where of two Python numbers, a "
            "quotient of counts or torch.tensor(0.1). Use numerics.by_case, x.new_tensor, or .to(x.dtype) first."
        )
    for dtype, bound in BOUNDS.items():
        low = with_fields(exact, {k: v.to(dtype) for k, v in real.items()})
        error = (_rows_of(loss(low), low).double() - expected).abs().max()
        allowed = bound * max(1.0, float(expected.abs().max()))
        if not float(error) <= allowed:
            raise ContractError(
                f"in {dtype} the loss is {float(error):.2g} off float64 (allowed {allowed:.2g}). Do large numbers "
                "cancel? Use expm1, log1p, logsigmoid, and subtract log-probabilities before summing."
            )


def needs_are_told(loss: Loss) -> None:
    """With only the fields that it declares (``reference``, ``extras``) it works or refuses in words."""
    record = _record(loss)
    loss(record)  # with all fields it works, so what follows is about what is missing
    optional = [
        f.name
        for f in dataclasses.fields(record)
        if f.default is None and f.name not in loss.extras and not (loss.reference and f.name.startswith("ref_"))
    ]
    for names in [*([name] for name in optional), optional]:
        _works_without(loss, record, names)


def _works_without(loss: Loss, record: Record, names: list[str]) -> None:
    try:
        loss(dataclasses.replace(record, **dict.fromkeys(names)))  # type: ignore[type-var]
    except UsageError:
        return
    except Exception as error:
        need = "reference=True" if names[0].startswith("ref_") else f"extras=({names[0]!r},)"
        raise ContractError(
            f"without {', '.join(names)} it fails with {type(error).__name__}: {error}. Declare the need "
            f"({need}), or handle None, or raise a UsageError that says what is missing."
        ) from error


def needs_are_used(loss: Loss) -> None:
    """A declared reference, and every declared extra field, is used: nobody loads or computes for nothing."""
    if not loss.reference and not loss.extras:
        raise NotApplicable("no reference and no further fields")
    record = _record(loss)
    references = [k for k in record.tensors() if k.startswith("ref_")]
    if loss.reference and not _moves(loss, record, references, metrics=True):
        raise ContractError("neither loss nor metrics use the reference: register with reference=False.")
    for extra in loss.extras:
        if extra not in record.tensors():
            raise ContractError(f"extras names {extra!r}, which is no field of {loss.family.__name__}.")
        if not _moves(loss, record, [extra], metrics=True):
            raise ContractError(f"neither loss nor metrics use {extra}: drop it from extras.")


def wrong_record(loss: Loss) -> None:
    """Another family's record, or shapes that do not fit, are refused with both named."""
    other = next(f for f in FAMILIES if f is not loss.family)
    try:
        loss(random_record(other))
    except UsageError as error:
        if loss.family.__name__ not in str(error) or other.__name__ not in str(error):
            raise ContractError(f"the refusal does not name both records: {error}") from error
    else:
        raise ContractError(f"took a {other.__name__} for a {loss.family.__name__}.")
    record = _record(loss)
    name, value = next((k, v) for k, v in record.tensors().items() if has_rows(k))
    try:
        with_fields(record, {name: value[:-1]})
    except UsageError as error:
        if name not in str(error) or str(tuple(value[:-1].shape)) not in str(error):
            raise ContractError(f"the refusal of a wrong shape names neither field nor shape: {error}") from error
    else:
        raise ContractError(f"{loss.family.__name__} takes a {name} with a row missing: broadcasting would hide it.")


def options_have_effect(loss: Loss) -> None:
    """Every option changes the loss, its gradient or refuses: silence is an error.

    An option that is refused beside the defaults of the others must have its effect beside other values of them.
    Options of modifiers count: those that are on, and where none is on, all.
    """
    loss(_record(loss))  # so that a refusal is one of an option
    active = [m.options for m, _ in loss.modifiers] or [m.options for m in loss.entry.modifiers]
    for options in (loss.entry.own_options, *active):
        for name in options:
            tried = _tried(loss, name)
            if not any(tried.values()) and False in tried.values() and not _agrees_by_number(loss, name, options):
                accepted = ", ".join(other for other, differs in tried.items() if differs is False)
                raise ContractError(
                    f"option {name!r} changes nothing (tried {accepted} for {_value(loss, name)!r}). Use it, drop it, "
                    "or raise a UsageError where it has no effect."
                )
            if not any(tried.values()) and False not in tried.values() and not _has_effect_beside(loss, name, options):
                raise ContractError(
                    f"option {name!r} is refused at every value tried ({', '.join(tried)}), whatever the options "
                    "beside it: drop it, or let it in."
                )


def _tried(loss: Loss, name: str) -> dict[str, bool | None]:
    """Other values of an option, and whether each changes anything; None where it is refused."""
    found: dict[str, bool | None] = {}
    for other in _alternatives(loss, name):
        found[str(other)] = _differs(loss, {name: other})
        if found[str(other)]:
            break
    return found


def _has_effect_beside(loss: Loss, name: str, options: Iterable[str], depth: int = 2) -> bool:
    """Whether an option has an effect beside other values of (two of) the other options of its function."""
    for beside in (o for o in options if o != name):
        default = loss.entry.options[beside]  # the way back, where the option that refuses is one of those given
        for value in (*_alternatives(loss, beside), *([default] if default != _value(loss, beside) else [])):
            other = _with_options(loss, {beside: value})
            if other is None or not _accepts(other):
                continue
            rest = [o for o in options if o != beside]
            if any(_tried(other, name).values()) or (depth > 1 and _has_effect_beside(other, name, rest, depth - 1)):
                return True
    return False


def _agrees_by_number(loss: Loss, name: str, options: Iterable[str]) -> bool:
    """Whether two values agree only because of the number another option has; a number of 0 is a switch."""
    numbers = [o for o in options if o != name and isinstance(_value(loss, o), float) and _value(loss, o) != 0]
    others = [_with_options(loss, {beside: value}) for beside in numbers for value in _alternatives(loss, beside)]
    return any(any(_tried(other, name).values()) for other in others if other is not None)


def _value(loss: Loss, name: str) -> Any:
    return loss.options.get(name, loss.entry.options[name])


def _alternatives(loss: Loss, name: str) -> list[Any]:
    """Other values of an option: the other names of a Literal, not for a bool, other numbers for a number or None."""
    value, hint = _value(loss, name), loss.entry.hints.get(name)
    arms = [arm for arm in (hint, *typing.get_args(hint)) if typing.get_origin(arm) is typing.Literal]
    names = [v for arm in arms for v in typing.get_args(arm) if isinstance(v, str)]
    if names:
        return [n for n in dict.fromkeys(names) if n != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int) and "float" not in str(hint):
        return [value + 1, 2 * value + 3]
    if isinstance(value, int | float):
        return [1.5 * value + 0.05, 0.5 * value + 0.01, 0.3]
    return [0.05, 0.3, 2.0, 1, 3, True]


def _with_options(loss: Loss, options: dict[str, Any]) -> Loss | None:
    """The loss with further options; None where their values are not allowed."""
    try:
        loss.entry.check_options(options, "loss")
    except UsageError:
        return None
    return dataclasses.replace(loss, options={**loss.options, **options})


def _accepts(loss: Loss) -> bool:
    """Whether the loss works with its options; a combination without effect is refused at the call."""
    try:
        loss(_record(loss))
    except UsageError:
        return False
    return True


def _differs(loss: Loss, change: dict[str, Any]) -> bool | None:
    """Whether the changed option changes value or gradient on some record; None where it is refused."""
    other = _with_options(loss, change)
    if other is None:
        return None
    for seed, spread in ((0, 0.5), (1, 2.0)):
        record = _record(loss, seed, rows=16, spread=spread)
        try:
            new_out, new_gradients = _gradients(other, record)
        except UsageError:
            return None
        out, gradients = _gradients(loss, record)
        if not torch.equal(_rows_of(out, record), _rows_of(new_out, record)):
            return True
        if any(not torch.equal(g, new_gradients[k]) for k, g in gradients.items()):
            return True
    return False


def modifiers_keep_contract(loss: Loss) -> None:
    """All of this holds with each modifier of the loss switched on, its declared exceptions apart."""
    if loss.modifiers:
        raise NotApplicable("a modifier is on already")
    if not loss.entry.modifiers:
        raise NotApplicable("no modifier applies to the loss")
    failures = []
    own = functools.cache(functools.partial(breaks, loss))  # what fails without a modifier too is told once, there
    for modifier in loss.entry.modifiers:
        variants = list(switched_on(loss, modifier))
        if not variants:
            failures.append(
                f"modifier {modifier.name!r} applies, but every value of its options is refused: register it with "
                "refuses=..., which says why it does not apply."
            )
        failures += [told for variant in variants for name, told in _failures(variant) if not own(name)]
    if failures and not own("unreduced"):
        raise ContractError("\n  ".join(failures))
    if own.cache_info().currsize:
        raise NotApplicable("what fails with a modifier fails without it: repair that first")


def breaks(loss: Loss, check: str) -> bool:
    """Whether the loss fails the check, in whatever way."""
    try:
        CHECKS[check](loss)
    except NotApplicable:
        return False
    except Exception:
        return True
    return False


def _failures(variant: Loss) -> Iterator[tuple[str, str]]:
    """Check and what it found, of every check that the variant fails without having said so."""
    words = ", ".join(f"{k}={v!r}" for m, options in variant.modifiers for k, v in options.items())
    allowed = exceptions_of(variant)
    for name, check in CHECKS.items():
        if name in allowed:
            continue
        try:
            check(variant)
        except NotApplicable:
            continue
        except ContractError as error:
            yield name, f"with {words} it breaks {name!r}: {error}"
        except Exception as error:
            yield name, f"with {words} {name!r} raised {type(error).__name__}: {error}"


def switched_on(loss: Loss, modifier: Entry) -> Iterator[Loss]:
    """The loss with a modifier on: once for every option that does it alone, or for every name it can have."""
    for name in modifier.options:
        for variant in modes(loss, name):
            yield variant
            if not isinstance(variant.options[name], str):
                break


def modes(loss: Loss, option: str) -> Iterator[Loss]:
    """The loss with every other value of an option that it accepts."""
    for value in _alternatives(loss, option):
        other = _with_options(loss, {option: value})
        if other is not None and _accepts(other):
            yield other


def exceptions_of(loss: Loss) -> dict[str, str]:
    """The declared exceptions by check: of the loss, of its options not at their defaults, of its modifiers."""
    found: dict[str, str] = {}
    for modifier, _ in loss.modifiers:
        found |= modifier.tags.get("exceptions", {})
    for key, reason in loss.entry.tags["exceptions"].items():
        check, _, option = key.partition("@")
        if not option or (option in loss.options and loss.options[option] != loss.entry.options[option]):
            found[check] = reason
    return found


CHECKS: dict[str, Callable[[Loss], None]] = {
    f.__name__: f
    for f in (
        unreduced,
        metrics_detached,
        pure,
        gradient_reaches_policy,
        gradient_stays_in_policy,
        row_permutation,
        halves_equal_whole,
        masked_cells,
        padding,
        empty_row,
        zero_advantage,
        on_policy,
        advantage_scale,
        ratio_shift,
        reference_shift,
        side_shift,
        swap,
        reward_shift,
        prefers_chosen,
        moves_to_target,
        finite_at_extremes,
        low_precision,
        needs_are_told,
        needs_are_used,
        wrong_record,
        options_have_effect,
        modifiers_keep_contract,
    )
}
