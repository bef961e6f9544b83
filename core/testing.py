"""The loss contract as functions you can call: ``check_loss("dpo")``, or on a loss of your own.

    from prefzoo.testing import check_loss
    check_loss(my_loss)                    # every check; raises ContractError with cause and cure of each failure
    check_loss("clipped_surrogate", clip_high=0.28)

Each check is a small function of a ``Loss``, named as in ``CHECKS``. A check holds for every correct loss; where a loss
breaks one on purpose, its registration says so, ``@register_loss(exceptions={"reference_shift": "has an NLL term"})``,
and from then on ``check_loss`` insists that it does break it.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from prefzoo.losses.base import LOSSES, Loss, create_loss
from prefzoo.records import FAMILIES, LossOut, PolicyGradient, Record, masked_sum, side_of
from prefzoo.registry import UsageError

R = TypeVar("R", bound=Record)


class ContractError(AssertionError):
    """A loss breaks its contract: what was seen, the likely cause, and the cure."""


class NotApplicable(Exception):
    """Raised by a check that says nothing about this loss; the message is the reason."""


# -- records to try a loss on -----------------------------------------------------------------------------------------

# Columns of the data: constants that nobody differentiates.
DATA = ("desirable", "margin", "probability", "weight", "tie", "targets", "labels", "valid", "step")
# Made by models: no gradient may reach them.
FROZEN = ("ref_", "old_", "sampling_", "teacher_", "target_", "next_")
CONSTANTS = ("advantages", "baseline", "delta", "returns", "entropy_floor")


def random_record(
    family: type[R],
    seed: int = 0,
    rows: int = 5,
    tokens: int = 4,
    *,
    dtype: torch.dtype = torch.float64,
    spread: float = 0.5,
) -> R:
    """A plausible record with every field filled: rows of different lengths, one hole in a mask, padding.

    Args:
        family: the record's class.
        seed: of its own random stream; the global one is not touched.
        rows: B.
        tokens: T of the longest side; the other side of a pair is one longer.
        dtype: of all real fields.
        spread: standard deviation of reference and old values around the policy's, in nats.

    >>> from prefzoo.records import Scores
    >>> random_record(Scores, seed=1, rows=2).chosen_B.shape
    torch.Size([2])
    """
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    fields = [f.name for f in dataclasses.fields(family)]  # type: ignore[arg-type]
    for name in sorted(fields, key=lambda f: f.startswith(FROZEN)):
        stem, axes = _parts(name)
        sizes = {"B": rows, "P": rows, "K": 4, "V": 6, "T": tokens + ("rejected" in stem)}
        shape = tuple(sizes[axis] for axis in axes)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        base = made.get(next((name.removeprefix(p) for p in FROZEN if name.startswith(p)), ""))
        made[name] = base + spread * noise if base is not None else _made(family, stem, noise, uniform)
    return family(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in made.items()})


def _made(family: type[Record], stem: str, noise: Tensor, uniform: Tensor) -> Tensor:
    """Plausible values of a field, from normal and uniform numbers of its shape."""
    kind = stem.rpartition("_")[2]
    if kind in ("mask", "step"):
        mask = _random_mask(uniform.reshape(-1, uniform.shape[-1])).view(uniform.shape)
        return mask if kind == "mask" else mask & (torch.arange(mask.shape[-1]) % 2 == 0)
    if kind == "valid":  # rankings of 2 to K completions
        return torch.arange(noise.shape[1]) < 2 + torch.arange(len(noise))[:, None] % (noise.shape[1] - 1)
    if kind == "desirable":
        return torch.arange(len(noise)) % 2 == 0
    if kind == "tie":
        return torch.arange(len(noise)) % 3 == 1
    if kind == "logps":
        return -3 * uniform - 0.05
    if kind == "sq":  # log Σ p² of a distribution
        return -2 * uniform - 0.05
    if kind in ("probability", "labels"):
        return 0.5 + 0.5 * uniform if kind == "probability" else uniform
    if kind in ("margin", "weight", "entropy", "baseline", "delta", "floor", "kl"):
        return uniform + 0.1
    if kind == "lse":  # above any single Q
        return noise.abs() + 2
    if kind == "scores" and family.__name__ == "Ranked":  # best first
        return noise.sort(-1, descending=True)[0]
    return noise


def _random_mask(uniform_BT: Tensor) -> Tensor:
    """Lengths from 1 to T - 1, so there is padding; a hole in the longest rows, as tool output leaves."""
    rows, width = uniform_BT.shape
    length_B = 1 + (torch.arange(rows) + int(uniform_BT[0, 0] * 8)) % (width - 1)
    mask_BT = torch.arange(width) < length_B[:, None]
    mask_BT[length_B >= 3, 1] = False
    return mask_BT


def _parts(name: str) -> tuple[str, str]:
    """``"logps_BT"`` -> ``("logps", "BT")``; a scalar has no axes."""
    stem, _, axes = name.rpartition("_")
    return (stem, axes) if axes.isupper() else (name, "")


def is_trained(name: str) -> bool:
    """Whether gradient may flow into a field of this name: log-probabilities, scores, values, entropy of the policy."""
    stem = _parts(name)[0]
    data = stem in DATA + CONSTANTS or stem.endswith(("mask", "_step"))
    return not (name.startswith(FROZEN) or data or _given_scores(name))


def _given_scores(name: str) -> bool:
    """Scores of the data or of a reward, of rankings and of completions to imitate; those of steps are a model's."""
    return name in ("scores_PK", "scores_B", "rewards_BT")


def mask_field(record: Record, name: str) -> str | None:
    """The mask that belongs to a field with a token axis."""
    axes = _parts(name)[1]
    if "T" not in axes:
        return None
    side = side_of(name)
    candidate = f"{side}_mask_BT" if side else f"mask_{axes[: axes.index('T') + 1]}"
    return candidate if candidate in record.tensors() else None


def take_rows(record: R, index_B: Tensor) -> R:
    """The record of those rows."""
    tensors = record.tensors()
    return _with(record, {k: v[index_B] for k, v in tensors.items() if _parts(k)[1].startswith(("B", "P"))})


def _with(record: R, fields: dict[str, Tensor]) -> R:
    return dataclasses.replace(record, **fields)  # type: ignore[type-var]


def _as_leaves(record: R, *, everything: bool = False) -> R:
    """A copy whose trained fields (or all real fields) are fresh leaves that require gradient."""
    real = {k: v for k, v in record.tensors().items() if v.is_floating_point() and (everything or is_trained(k))}
    return _with(record, {k: v.detach().clone().requires_grad_() for k, v in real.items()})


def _total(out: LossOut, record: Record, weight_B: Tensor | None = None) -> Tensor:
    """Sum over masked tokens and (weighted) rows, as the engine does."""
    loss_B = masked_sum(out.loss, _mask(record)) if out.loss.dim() == 2 else out.loss
    return (loss_B if weight_B is None else loss_B * weight_B).sum()


def _rows_of(out: LossOut, record: Record) -> Tensor:
    """The loss as the engine sees it: (B,), or (B, T) with zeros outside the mask; detached."""
    loss = out.loss.detach()
    return torch.where(_mask(record), loss, 0.0) if loss.dim() == 2 else loss


def _mask(record: Record) -> Tensor:
    mask_BT = record.loss_mask_BT
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


def _depends_on(loss: Loss, field: str) -> bool:
    """Whether a field changes the loss (its value: a metric does not count)."""
    record = _record(loss)
    if field not in record.tensors():
        return False
    moved = _with(record, {field: record.tensors()[field] * 0.5 - 0.3})
    return not _close(_rows_of(loss(record), record), _rows_of(loss(moved), moved))


# -- the checks -------------------------------------------------------------------------------------------------------


def unreduced(loss: Loss) -> None:
    """One value per row, (B,), or per token, (B, T)."""
    record = _record(loss)
    out = loss(record)
    if not isinstance(out, LossOut):
        raise ContractError(f"returned {type(out).__name__}; return LossOut(loss, metrics).")
    allowed = _allowed_shapes(loss, record)
    if tuple(out.loss.shape) not in allowed:
        raise ContractError(
            f"loss has shape {tuple(out.loss.shape)}, expected {' or '.join(map(str, allowed))}. "
            "Was it averaged? Return it unreduced: the engine divides, by the count of the term."
        )
    if out.loss.dtype != torch.float64:
        raise ContractError(f"loss is {out.loss.dtype} for a float64 record: a constant was made as a float32 tensor.")


def _allowed_shapes(loss: Loss, record: Record) -> list[tuple[int, ...]]:
    rows = next(v.shape[:1] for k, v in record.tensors().items() if _parts(k)[1].startswith(("B", "P")))
    mask_BT = record.loss_mask_BT
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
    _, gradients = _gradients(loss, _record(loss))
    if not any(bool((g != 0).any()) for g in gradients.values()):
        raise ContractError(
            f"no gradient reaches {', '.join(gradients)}: a .detach(), torch.no_grad() or item() stands on the path, "
            "or the loss does not use them."
        )


def gradient_stays_in_policy(loss: Loss) -> None:
    """No gradient reaches what other models made: reference, old policy, advantages, baseline, returns."""
    _, gradients = _gradients(loss, _record(loss), everything=True)
    for name, gradient in gradients.items():
        if not is_trained(name) and _parts(name)[0] not in DATA and bool((gradient != 0).any()):
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
    masks = {k: m for k in record.tensors() if (m := mask_field(record, k)) and k != m}
    if not masks:
        raise NotApplicable(f"{loss.family.__name__} has no masks")
    out, gradients = _gradients(loss, record)
    tensors = record.tensors()
    for poison in (1e9, -1e9, float("inf"), float("nan")):
        poisoned = _with(record, {k: _poisoned(tensors[k], tensors[m], poison) for k, m in masks.items()})
        bad_out, bad_gradients = _gradients(loss, poisoned)
        if not _close(_rows_of(out, record), _rows_of(bad_out, poisoned)):
            raise ContractError(
                f"{poison:g} in a masked cell changes the loss. Sum with masked_sum(x_BT, mask_BT) or the properties "
                "of the record, and divide by mask_BT.sum(-1), never by x_BT.shape[1]."
            )
        wrong = [k for k, g in gradients.items() if not _close(g, bad_gradients[k])]
        if wrong:
            raise ContractError(
                f"{poison:g} in a masked cell changes the gradient of {wrong[0]}. Clean the inputs *before* exp, "
                "square or a product: prefzoo.losses.numerics.masked(x_BT, mask_BT); 0 * NaN is NaN."
            )


def _poisoned(values: Tensor, mask: Tensor, poison: float) -> Tensor:
    if not values.is_floating_point():
        return values | ~mask
    while mask.dim() < values.dim():
        mask = mask[..., None]
    return torch.where(mask, values, poison)


def padding(loss: Loss) -> None:
    """More padding on the right changes nothing."""
    record = _record(loss)
    wide = {k: _parts(k)[1].index("T") for k in record.tensors() if "T" in _parts(k)[1]}
    if not wide:
        raise NotApplicable(f"{loss.family.__name__} has no tokens")
    fields = {k: (record.tensors()[k], axis) for k, axis in wide.items()}
    longer = _with(
        record, {k: torch.cat([v, torch.zeros_like(v.narrow(axis, 0, 2))], axis) for k, (v, axis) in fields.items()}
    )
    before, after = _rows_of(loss(record), record), _rows_of(loss(longer), longer)
    if not _close(before, after[:, : before.shape[1]] if before.dim() == 2 else after):
        raise ContractError("two more columns of padding change the loss: it divides by T. Divide by mask_BT.sum(-1).")


def empty_row(loss: Loss) -> None:
    """A row whose tokens are all masked has a finite loss, finite gradient, and no gradient in its cells."""
    record = _record(loss)
    masks = {k: v.clone() for k, v in record.tensors().items() if _parts(k)[0].endswith("mask")}
    if not masks:
        raise NotApplicable(f"{loss.family.__name__} has no masks")
    for mask_BT in masks.values():
        mask_BT[0] = False
    out, gradients = _gradients(loss, _with(record, masks))
    if not bool(_rows_of(out, _with(record, masks)).isfinite().all()):
        raise ContractError("a row without tokens gives NaN or infinity. Divide by mask_BT.sum(-1).clamp(min=1).")
    if any(bool((g[0] != 0).any()) for k, g in gradients.items() if "T" in _parts(k)[1]):  # NaN != 0 as well
        raise ContractError("a row without tokens has gradient (or NaN) in its cells; mask the inputs first.")


def zero_advantage(loss: Loss) -> None:
    """Where all advantages are 0, so is the gradient."""
    _needs_advantages(loss)
    record = _record(loss)
    _, gradients = _gradients(loss, _with(record, {"advantages_BT": torch.zeros_like(record.advantages_BT)}))
    if any(bool((g != 0).any()) for g in gradients.values()):
        raise ContractError("advantages of 0 give gradient: is the advantage added, not multiplied?")


def on_policy(loss: Loss) -> None:
    """At ratio 1, where the policy is the one that sampled, the gradient is -A times a positive number.

    Tested with one advantage per completion; the positive number may differ between rows (a loss that averages).
    """
    _needs_advantages(loss)
    record = _record(loss)
    advantages_BT = record.advantages_BT[:, :1].expand_as(record.advantages_BT).clone()
    same = _with(record, {"old_logps_BT": record.logps_BT, "advantages_BT": advantages_BT})
    _, gradients = _gradients(loss, same)
    scale_BT = -gradients["logps_BT"] / advantages_BT
    for scale_T, mask_T in zip(scale_BT, record.mask_BT, strict=True):
        inside = scale_T[mask_T]
        if not (bool((inside > 0).all()) and _close(inside, inside[:1].expand_as(inside))):
            raise ContractError(
                f"at ratio 1 the gradient of the loss over -A is {inside.tolist()}, expected one positive number per "
                "row. Is a sign wrong, or the ratio not differentiated?"
            )


def _needs_advantages(loss: Loss) -> None:
    if loss.family is not PolicyGradient:
        raise NotApplicable(f"{loss.family.__name__} has no advantages")
    if not _depends_on(loss, "advantages_BT"):
        raise NotApplicable("the loss does not use advantages")
    for field in ("ref_logps_BT", "entropy_BT"):
        if _depends_on(loss, field):
            raise NotApplicable(f"the loss has another part, which depends on {field}")


def reference_shift(loss: Loss) -> None:
    """The same constant added to policy's, old policy's and reference's log-probabilities cancels."""
    if not loss.reference:
        raise NotApplicable("no reference")
    record = _record(loss)
    shifted = _with(record, {k: v + 0.37 for k, v in record.tensors().items() if _parts(k)[0].endswith("logps")})
    if not _close(_rows_of(loss(record), record), _rows_of(loss(shifted), shifted), 1e-9):
        raise ContractError(
            "adding one constant to policy and reference changes the loss: it depends on more than log-ratios. If it "
            "has a likelihood term on purpose, say so: exceptions={'reference_shift': 'has a likelihood term'}."
        )


def finite_at_extremes(loss: Loss) -> None:
    """Never NaN or infinity: log-ratios, scores and values of ±500, in float32 and bfloat16, loss and gradient."""
    for dtype in (torch.float32, torch.bfloat16):
        for seed in range(3):
            record = _extreme(_record(loss, seed, rows=32, tokens=4, dtype=dtype), seed)
            out, gradients = _gradients(loss, record)
            finite = {"the loss": _rows_of(out, record), **{f"the gradient of {k}": g for k, g in gradients.items()}}
            for name, value in finite.items():
                if not bool(value.isfinite().all()):
                    raise ContractError(
                        f"{name} is not finite at log-ratios of ±500 in {dtype}. Use logsigmoid, not log(sigmoid); "
                        "prefzoo.losses.numerics.safe_exp, not exp; and no infinite branch inside torch.where."
                    )


def _extreme(record: R, seed: int) -> R:
    """Log-probabilities of -0.01 or -500.01 at random, other numbers -500, 0 or 500."""
    generator = torch.Generator().manual_seed(1000 + seed)
    made = {}
    for name, value in record.tensors().items():
        stem = _parts(name)[0]
        dice = torch.randint(0, 3, value.shape, generator=generator)
        if stem.endswith("logps"):
            made[name] = (-500.0 * (dice > 0) - 0.01).to(value.dtype)
        elif value.is_floating_point() and stem.endswith(
            ("values", "chosen", "rejected", "returns", "rewards", "targets", "scores", "logits", "q1", "q2", "q", "v")
        ):
            made[name] = (500.0 * (dice - 1)).to(value.dtype)
    return _with(record, made)


BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 5e-2}  # of the largest loss of the batch, and of 1


def low_precision(loss: Loss) -> None:
    """float32 and bfloat16 stay within 2e-5 and 5e-2 of float64, relative to the largest loss of the batch."""
    exact = _record(loss, rows=8, dtype=torch.bfloat16)
    real = {k: v for k, v in exact.tensors().items() if v.is_floating_point()}
    record = _with(exact, {k: v.double() for k, v in real.items()})
    expected = _rows_of(loss(record), record)
    for dtype, bound in BOUNDS.items():
        low = _with(exact, {k: v.to(dtype) for k, v in real.items()})
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
        raise ContractError(
            f"without {', '.join(names)} it fails with {type(error).__name__}: {error}. Declare the need "
            "(reference=True, extras=('...',)), or handle None, or raise a UsageError that says what is missing."
        ) from error


def needs_are_used(loss: Loss) -> None:
    """A declared reference is used: nobody loads a model for nothing."""
    if not loss.reference:
        raise NotApplicable("no reference")
    record = _record(loss)
    moved = _with(record, {k: v - 0.5 for k, v in record.tensors().items() if k.startswith("ref_")})
    one, two = loss(record), loss(moved)
    metrics = [k for k, v in one.metrics.items() if not torch.equal(v, two.metrics[k])]
    if torch.equal(_rows_of(one, record), _rows_of(two, moved)) and not metrics:
        raise ContractError("neither loss nor metrics use the reference: register with reference=False.")


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
    name, value = next((k, v) for k, v in record.tensors().items() if _parts(k)[1].startswith("B"))
    try:
        _with(record, {name: value[:-1]})
    except UsageError as error:
        if name not in str(error) or str(tuple(value[:-1].shape)) not in str(error):
            raise ContractError(f"the refusal of a wrong shape names neither field nor shape: {error}") from error
    else:
        raise ContractError(f"{loss.family.__name__} takes a {name} with a row missing: broadcasting would hide it.")


def options_have_effect(loss: Loss) -> None:
    """Every option changes the loss, its gradient or refuses: silence is an error."""
    for name, default in loss.entry.options.items():
        value = loss.options.get(name, default)
        tried = {str(other): _differs(loss, {name: other}) for other in _alternatives(loss, name, value)}
        if not any(tried.values()) and False in tried.values():
            accepted = ", ".join(other for other, differs in tried.items() if differs is False)
            raise ContractError(
                f"option {name!r} changes nothing (tried {accepted} for {value!r}). Use it, drop it, or raise a "
                "UsageError where it has no effect."
            )


def _alternatives(loss: Loss, name: str, value: Any) -> list[Any]:
    """Other values of an option: the other names of a Literal, not for a bool, other numbers for a number or None."""
    hint = typing.get_type_hints(loss.entry.function).get(name)
    names = [v for arm in (hint, *typing.get_args(hint)) for v in typing.get_args(arm) if isinstance(v, str)]
    if names:
        return [n for n in dict.fromkeys(names) if n != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value + 3]
    if isinstance(value, float):
        return [1.5 * value + 0.05, 0.5 * value + 0.01, 0.3]
    return [0.05, 0.3, 2.0, 1, 3, True]


def _differs(loss: Loss, change: dict[str, Any]) -> bool | None:
    """Whether the changed option changes value or gradient on some record; None where it is refused."""
    other = dataclasses.replace(loss, options={**loss.options, **change})
    for seed, spread in ((0, 0.5), (1, 2.0)):
        record = _record(loss, seed, rows=16, spread=spread)
        out, gradients = _gradients(loss, record)
        try:
            new_out, new_gradients = _gradients(other, record)
        except UsageError:
            return None
        if not torch.equal(_rows_of(out, record), _rows_of(new_out, record)):
            return True
        if any(not torch.equal(g, new_gradients[k]) for k, g in gradients.items()):
            return True
    return False


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
        reference_shift,
        finite_at_extremes,
        low_precision,
        needs_are_told,
        needs_are_used,
        wrong_record,
        options_have_effect,
    )
}


# -- running them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One check of one loss. Call it: it returns how it went, or raises ``ContractError``."""

    name: str
    loss: Loss
    exception: str | None = None

    @property
    def line(self) -> str:
        """What the check demands."""
        return (inspect.getdoc(CHECKS[self.name]) or "").split("\n", 1)[0]

    def __call__(self) -> str:
        """``"passed"``, ``"not applicable: why"``, or ``"exception: why"``."""
        try:
            CHECKS[self.name](self.loss)
            outcome = "passed"
        except NotApplicable as reason:
            outcome = f"not applicable: {reason}"
        except Exception as error:  # whatever a user's loss raises on a plain record is a failure of the check
            if self.exception is not None:
                return f"exception: {self.exception}"
            told = str(error) if isinstance(error, ContractError) else f"It raised {type(error).__name__}: {error}"
            raise ContractError(f"loss {self.loss.name!r} breaks {self.name!r} ({self.line}) {told}") from error
        if self.exception is not None:
            raise ContractError(
                f"loss {self.loss.name!r} declares an exception from {self.name!r} ({self.exception}), but it holds "
                f"({outcome}): remove the exception."
            )
        return outcome


def loss_checks(loss: str | Callable[..., LossOut] | Loss, /, **options: Any) -> Iterator[Check]:
    """The checks of a loss, given by its name, its registered function, or with its options bound.

    >>> [check() for check in loss_checks("dpo") if check.name in ("unreduced", "zero_advantage")]
    ['passed', 'not applicable: Pairs has no advantages']
    """
    bound = _bind(loss, options)
    exceptions = bound.entry.tags["exceptions"]
    unknown = set(exceptions) - set(CHECKS)
    if unknown:
        raise UsageError(f"loss {bound.name!r}: no check {sorted(unknown)[0]!r}. Checks: {', '.join(CHECKS)}.")
    for name in CHECKS:
        yield Check(name, bound, exceptions.get(name))


def check_loss(loss: str | Callable[..., LossOut] | Loss, /, **options: Any) -> dict[str, str]:
    """Run the whole contract; raise one ``ContractError`` that lists every failure, or return how each check went.

    >>> check_loss("dpo", beta=0.5)["halves_equal_whole"]
    'passed'
    """
    results, failures = {}, []
    for check in loss_checks(loss, **options):
        try:
            results[check.name] = check()
        except ContractError as error:
            failures.append(str(error))
    if failures:
        raise ContractError("\n".join(failures))
    return results


def _bind(loss: str | Callable[..., LossOut] | Loss, options: dict[str, Any]) -> Loss:
    if isinstance(loss, Loss):
        loss.entry.check_options(options, "loss")
        return dataclasses.replace(loss, options={**loss.options, **options})
    if isinstance(loss, str):
        return create_loss(loss, **options)
    name = getattr(loss, "__name__", repr(loss))
    if name not in LOSSES or inspect.unwrap(LOSSES.entry(name).function) is not inspect.unwrap(loss):
        raise UsageError(f"{name!r} is not registered: put @register_loss above it (from prefzoo.losses).")
    return create_loss(name, **options)
