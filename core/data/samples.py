"""Samples: prompts with their completions as token ids, and everything known about them.

Sources give samples, feedback scores them, credit turns them into what a loss is trained on. Ids are packed
(:class:`Ragged`); nothing is padded until small tensors are made for a loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Kind = Literal["prompts", "completions", "unpaired", "pairs", "rankings", "scored", "steps"]
PER_ROW: dict[Kind, int] = {"prompts": 0, "completions": 1, "unpaired": 1, "pairs": 2, "scored": 1, "steps": 1}


@dataclass(frozen=True)
class Ragged:
    """Sequences of different lengths in one flat array; may be memory-mapped.

    >>> r = Ragged.of([[5, 6], [7]])
    >>> r[0].tolist(), r.lengths.tolist(), r.take([1, 0, 1]).flat.tolist()
    ([5, 6], [2, 1], [7, 5, 6, 7])
    """

    flat: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int] | np.ndarray]) -> Ragged:
        rows = [np.asarray(s, dtype=np.int32) for s in sequences]
        lengths = np.fromiter((len(r) for r in rows), dtype=np.int64, count=len(rows))
        flat = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int32)
        return cls(flat, offsets_of(lengths))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def positions(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Positions in ``flat`` of all elements of these rows, one row after another."""
        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[rows]
        starts = offsets_of(lengths)
        return np.repeat(self.offsets[rows] - starts[:-1], lengths) + np.arange(starts[-1])

    def take(self, rows: np.ndarray | Sequence[int]) -> Ragged:
        rows = np.asarray(rows, dtype=np.int64)
        return Ragged(self.flat[self.positions(rows)], offsets_of(self.lengths[rows]))

    @classmethod
    def concatenate(cls, parts: Sequence[Ragged]) -> Ragged:
        """The sequences of all parts, one part after another."""
        return cls(np.concatenate([p.flat for p in parts]), offsets_of(np.concatenate([p.lengths for p in parts])))

    def save(self, folder: Path, name: str) -> None:
        np.save(folder / f"{name}.flat.npy", self.flat)
        np.save(folder / f"{name}.offsets.npy", self.offsets)

    @classmethod
    def load(cls, folder: Path, name: str) -> Ragged:
        return cls(
            np.load(folder / f"{name}.flat.npy", mmap_mode="r"),
            np.load(folder / f"{name}.offsets.npy"),
        )


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """``[0, l0, l0 + l1, ...]``."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


@dataclass(frozen=True)
class Samples:
    """Prompts, their completions, and columns.

    ``kind`` says what a row is: a prompt, a completion, one with a score, one with a label, one whose steps have
    labels, a pair (the completions ``2i`` and ``2i + 1`` are the chosen and the rejected one of pair i), or a ranking
    (``width`` completions, best first; a shorter one ends with empty completions, which are not there). ``prompt_B`` is
    the prompt of each completion. ``columns`` are per completion (B,) (``desirable``, ``score``, ``finish``, ...),
    ``row_columns`` per row of pairs or rankings, ``tokens`` per completion token, flat (C,) in the order of
    ``completions.flat`` (``old_logps``, ``ref_logps``, ``advantages``, ...). ``extra`` holds the user's other columns,
    one value per prompt, for reward functions.
    """

    kind: Kind
    prompts: Ragged
    completions: Ragged
    prompt_B: np.ndarray
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    row_columns: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    width: int = 0  # completions of a ranking, those that are not there included

    @property
    def per_row(self) -> int:
        """Completions of a row."""
        return PER_ROW.get(self.kind, self.width)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.prompts) if self.kind == "prompts" else len(self.completions) // self.per_row

    def take(self, rows: np.ndarray | Sequence[int]) -> Samples:
        """These rows, in this order. Rows that share a prompt go on sharing it."""
        rows = np.ascontiguousarray(rows, dtype=np.int64)
        if self.kind == "prompts":
            return replace(self, prompts=self.prompts.take(rows), extra=_take_lists(self.extra, rows))
        completions = (rows[:, None] * self.per_row + np.arange(self.per_row)).reshape(-1)
        prompts, prompt_B = np.unique(self.prompt_B[completions], return_inverse=True)
        where = torch.from_numpy(completions)
        token_positions = torch.from_numpy(self.completions.positions(completions)) if self.tokens else None
        return Samples(
            kind=self.kind,
            prompts=self.prompts.take(prompts),
            completions=self.completions.take(completions),
            prompt_B=prompt_B.reshape(-1),
            columns={k: v[where] for k, v in self.columns.items()},
            row_columns={k: v[torch.from_numpy(rows)] for k, v in self.row_columns.items()},
            tokens={k: v[token_positions] for k, v in self.tokens.items()},
            extra=_take_lists(self.extra, prompts),
            width=self.width,
        )

    def with_tokens(self, **tokens: Tensor) -> Samples:
        """Add flat (C,) columns, one value per completion token."""
        for name, value in tokens.items():
            assert len(value) == len(self.completions.flat), (name, len(value), len(self.completions.flat))
        return replace(self, tokens={**self.tokens, **tokens})

    def tensors(self) -> dict[str, Tensor]:
        """All of it but ``extra`` as tensors by name, for a checkpoint."""
        arrays = {"prompt_B": self.prompt_B, "width": np.asarray(self.width)}
        for name, ragged in (("prompts", self.prompts), ("completions", self.completions)):
            arrays |= {f"{name}.flat": ragged.flat, f"{name}.offsets": ragged.offsets}
        groups = (("columns", self.columns), ("row_columns", self.row_columns), ("tokens", self.tokens))
        columns = {f"{group}.{k}": v for group, values in groups for k, v in values.items()}
        return {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()} | columns

    @classmethod
    def from_tensors(cls, kind: Kind, tensors: Mapping[str, Tensor]) -> Samples:
        """What :meth:`tensors` gave."""

        def columns(group: str) -> dict[str, Tensor]:
            return {k.removeprefix(group): v for k, v in tensors.items() if k.startswith(group)}

        prompts, completions = (
            Ragged(tensors[f"{name}.flat"].numpy(), tensors[f"{name}.offsets"].numpy())
            for name in ("prompts", "completions")
        )
        return cls(
            kind, prompts, completions, tensors["prompt_B"].numpy(),
            columns=columns("columns."), row_columns=columns("row_columns."), tokens=columns("tokens."),
            width=int(tensors["width"]),
        )  # fmt: skip

    @classmethod
    def concatenate(cls, parts: Sequence[Samples]) -> Samples:
        """The rows of all parts, of one kind and with the same columns, one part after another."""
        if len(parts) == 1:
            return parts[0]
        first, before = parts[0], offsets_of(np.asarray([len(p.prompts) for p in parts]))
        joined = lambda group: {  # noqa: E731
            k: torch.cat([getattr(p, group)[k] for p in parts]) for k in getattr(first, group)
        }
        return cls(
            first.kind,
            Ragged.concatenate([p.prompts for p in parts]),
            Ragged.concatenate([p.completions for p in parts]),
            np.concatenate([p.prompt_B + start for p, start in zip(parts, before[:-1], strict=True)]),
            columns=joined("columns"), row_columns=joined("row_columns"), tokens=joined("tokens"),
            extra={k: [value for p in parts for value in p.extra[k]] for k in first.extra}, width=first.width,
        )  # fmt: skip

    def as_prompts(self) -> Samples:
        """The prompts alone."""
        return Samples("prompts", self.prompts, Ragged.of([]), np.zeros(0, dtype=np.int64), extra=self.extra)

    def mask_BT(self) -> Tensor:
        lengths = torch.from_numpy(self.completions.lengths)
        width = int(lengths.max()) if len(lengths) else 0
        return torch.arange(width)[None] < lengths[:, None]

    def padded(self, flat_C: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Scatter one value per completion token into (B, T); zeros elsewhere."""
        return scatter(flat_C, self.mask_BT().to(flat_C.device) if mask_BT is None else mask_BT)


def sides_of(samples: Samples) -> list[str]:
    """What the completions of a row are called."""
    if samples.kind == "rankings":
        return [f"completion {rank + 1}" for rank in range(samples.width)]
    return ["chosen", "rejected"] if samples.kind == "pairs" else ["completion"] * samples.per_row


def labels_of(samples: Samples) -> Tensor:
    """Which completions are desirable, (B,): by their label, or of pairs the chosen ones."""
    if samples.kind == "pairs":
        return torch.arange(len(samples.completions)) % 2 == 0
    return samples.columns["desirable"]


def scatter(flat_C: Tensor, mask_BT: Tensor) -> Tensor:
    """Flat values (C,) into the masked cells of (B, T), row by row; zeros elsewhere. Differentiable."""
    return torch.zeros(mask_BT.shape, dtype=flat_C.dtype, device=flat_C.device).masked_scatter(mask_BT, flat_C)


def loss_mask(samples: Samples, mask_BT: Tensor) -> Tensor:
    """Cells that a loss may see: the completion's tokens, without those marked as not trainable."""
    if "trainable" not in samples.tokens:
        return mask_BT
    return scatter(samples.tokens["trainable"].to(mask_BT.device), mask_BT)


def _take_lists(extra: Mapping[str, Sequence[Any]], rows: np.ndarray) -> dict[str, list[Any]]:
    return {k: [v[i] for i in rows] for k, v in extra.items()}
