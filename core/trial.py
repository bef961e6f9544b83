"""Records to try a loss on: plausible ones and extreme ones, and what is known of a field from its name."""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeVar

import torch
from torch import Tensor

from prefzoo.records import Pairs, Record, side_of

R = TypeVar("R", bound=Record)

# Columns of the data: constants that nobody differentiates.
DATA = ("desirable", "margin", "probability", "weight", "tie", "targets", "labels", "valid", "step")
# Made by models: no gradient may reach them.
FROZEN = ("ref_", "old_", "sampling_", "teacher_", "target_", "next_")
# The last word of the fields that have no natural size.
EXTREME = (
    "values", "chosen", "rejected", "returns", "rewards", "targets", "scores", "logits", "lse", "q1", "q2", "q", "v",
)  # fmt: skip
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
    made = _random_fields(family, seed, rows, tokens, spread)  # type: ignore[arg-type]
    return family(**{name: x.to(dtype, copy=True) if x.is_floating_point() else x.clone() for name, x in made.items()})


@functools.lru_cache(maxsize=256)
def _random_fields(family: type[Record], seed: int, rows: int, tokens: int, spread: float) -> dict[str, Tensor]:
    """The fields in float64; made once, because a contract asks for the same record again and again."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    fields = [f.name for f in dataclasses.fields(family)]  # type: ignore[arg-type]
    for name in sorted(fields, key=lambda f: f.startswith(FROZEN)):
        stem, axes = parts(name)
        sizes = {"B": rows, "P": rows, "K": 4, "V": 6, "T": tokens + ("rejected" in stem)}
        shape = tuple(sizes[axis] for axis in axes)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        base = made.get(next((name.removeprefix(p) for p in FROZEN if name.startswith(p)), ""))
        made[name] = base + spread * noise if base is not None else _made(family, stem, noise, uniform)
    return made


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


def parts(name: str) -> tuple[str, str]:
    """``"logps_BT"`` -> ``("logps", "BT")``; a scalar has no axes."""
    stem, _, axes = name.rpartition("_")
    return (stem, axes) if axes.isupper() else (name, "")


def is_trained(name: str) -> bool:
    """Whether gradient may flow into a field of this name: log-probabilities, scores, values, entropy of the policy."""
    stem = parts(name)[0]
    data = stem in DATA + CONSTANTS or stem.endswith(("mask", "_step"))
    return not (name.startswith(FROZEN) or data or _given_scores(name))


def _given_scores(name: str) -> bool:
    """Scores of the data or of a reward, of rankings and of completions to imitate; those of steps are a model's."""
    return name in ("scores_PK", "scores_B", "rewards_BT")


def inside(record: Record, name: str) -> Tensor | None:
    """Which cells of a field are there at all, in its shape: inside its mask, and of a completion that is valid.

    None for a field without such cells, and for the masks themselves.
    """
    tensors, axes = record.tensors(), parts(name)[1]
    found, side = None, side_of(name)
    if "T" in axes:
        mask = f"{side}_mask_BT" if side else f"mask_{axes[: axes.index('T') + 1]}"
        found = tensors.get(mask) if mask != name else None
    valid_PK = tensors.get("valid_PK")
    if "K" in axes and valid_PK is not None and name != "valid_PK":
        there = valid_PK[..., None] if "T" in axes else valid_PK
        found = there if found is None else found & there
    if found is None:
        return None
    while found.dim() < tensors[name].dim():
        found = found[..., None]
    return found.expand_as(tensors[name])


def has_rows(name: str) -> bool:
    """Whether a field has one entry per row (or per prompt, of rankings)."""
    return parts(name)[1].startswith(("B", "P"))


def take_rows(record: R, index_B: Tensor) -> R:
    """The record of those rows."""
    return with_fields(record, {k: v[index_B] for k, v in record.tensors().items() if has_rows(k)})


def with_fields(record: R, fields: dict[str, Tensor]) -> R:
    """A copy of the record with other values in these fields."""
    return dataclasses.replace(record, **fields)  # type: ignore[type-var]


def extreme_record(record: R, seed: int) -> R:
    """Log-probabilities of -0.01 or -500.01 at random; scores, values and logits -500, 0 or 500."""
    generator = torch.Generator().manual_seed(1000 + seed)
    made = {}
    for name, value in record.tensors().items():
        stem = parts(name)[0]
        dice = torch.randint(0, 3, value.shape, generator=generator)
        if stem.endswith("logps"):
            made[name] = (-500.0 * (dice > 0) - 0.01).to(value.dtype)
        elif stem.rpartition("_")[2] == "kl":
            made[name] = (500.0 * (dice > 1) + 0.01).to(value.dtype)
        elif stem.rpartition("_")[2] in EXTREME and value.is_floating_point():
            made[name] = (500.0 * (dice - 1)).to(value.dtype)
    return with_fields(record, made)


def likely_record(record: R) -> R:
    """The record early in a training: the policy near its reference, answers about equally likely, labels sure.

    There every loss that learns preferences still wants the better answer likelier.
    """
    made = {k: 0.1 * v for k, v in record.tensors().items() if parts(k)[0].endswith("logps")}
    sure = {"margin_B": 3.0, "probability_B": 0.95, "weight_B": 1.0, "weight_P": 1.0}
    made |= {k: torch.full_like(v, sure[k]) for k, v in record.tensors().items() if k in sure}
    made |= {k: torch.zeros_like(v) for k, v in record.tensors().items() if k == "tie_B"}
    return with_fields(record, made)


def swapped(record: Record) -> Record:
    """The record with the two sides exchanged: margin negated, probability p become 1 - p, ties as they were."""
    if isinstance(record, Pairs):
        return record.swapped()
    made = {"chosen_B": record.tensors()["rejected_B"], "rejected_B": record.tensors()["chosen_B"]}
    made |= {k: -v for k, v in record.tensors().items() if k == "margin_B"}
    made |= {k: 1 - v for k, v in record.tensors().items() if k == "probability_B"}
    return with_fields(record, made)
