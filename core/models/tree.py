"""Tree batches: a prompt segment followed by its completions, prompt tokens computed once and shared.

The transformer runs on one packed row of N tokens. A completion attends to its prompt and to itself, never to its
siblings; since attention is causal the prompt's states do not depend on the completions, so sharing is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from prefzoo.data.samples import Ragged, Samples, offsets_of
from prefzoo.processes import ALONE, Processes

HOOK = "prefzoo"  # the name under which the attention function is registered with transformers


@dataclass(frozen=True)
class Bucket:
    """Segments of similar lengths, attended in one padded call. S segments, Q queries, K keys of each."""

    query_SQ: Tensor  # positions in the packed row; padding repeats position 0 and is never read back
    key_SK: Tensor
    mask_SQK: Tensor | None  # None: plain causal (roots)


@dataclass(frozen=True)
class AttentionPlan:
    """How the packed row attends. Travels as an argument through the model, so that recomputation and two
    forwards of different batches stay right."""

    buckets: tuple[Bucket, ...]
    where_N: Tensor  # row of the concatenated bucket outputs that holds position n
    positions_N: Tensor

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        """(1, H, N, D) queries, keys, values -> (1, N, H, D)."""
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, D)
        outputs = []
        for b in self.buckets:
            q, k, v = (
                x.index_select(0, index.reshape(-1)).view(*index.shape, *x.shape[1:]).transpose(1, 2)
                for x, index in ((query, b.query_SQ), (key, b.key_SK), (value, b.key_SK))
            )
            mask = b.mask_SQK
            if window is not None and int(self.positions_N.max()) >= window:
                near = self.positions_N[b.query_SQ][:, :, None] - self.positions_N[b.key_SK][:, None] < window
                size = b.query_SQ.shape[1]
                causal = torch.ones(size, size, dtype=torch.bool, device=q.device).tril() if mask is None else mask
                mask = near & causal
            out = scaled_attention(q, k, v, None if mask is None else mask[:, None], scaling, causal=mask is None)
            outputs.append(out.transpose(1, 2).reshape(-1, *query.shape[1:2], value.shape[-1]))
        return torch.cat(outputs).index_select(0, self.where_N)[None]


def scaled_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, causal: bool = False
) -> Tensor:
    """softmax(scaling Q K^T + mask) V for (S, H, Q, D) queries and (S, H', K, D) keys, H' dividing H."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and query.is_cuda:  # with grouped heads CUDA falls back to a kernel that keeps all scores
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=groups > 1
    )


def attention_hook(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    attention_plan: Any = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The function registered with transformers' ``AttentionInterface``: the plan says who attends to whom."""
    if attention_plan is None:
        raise RuntimeError(
            "this model was loaded for prefzoo's packed batches and was called without a plan; "
            "for an ordinary forward call model.set_attn_implementation('sdpa') first."
        )
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"attention with {name!r} cannot run on packed batches")
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    kind = kinds[module.layer_idx] if kinds is not None else None
    # A window that the library keeps in its mask, which is not used here, would only be missed by long rows.
    if kind not in (None, "full_attention", "sliding_attention") or (
        kind == "sliding_attention" and sliding_window is None
    ):
        raise NotImplementedError(f"layers of {kind!r} cannot run on packed batches")
    return attention_plan.attend(module.layer_idx, query, key, value, scaling, sliding_window), None


AttentionInterface.register(HOOK, attention_hook)


@dataclass(frozen=True)
class Segments:
    """Prompts and completions in the order in which they lie in the packed row."""

    length: np.ndarray
    start: np.ndarray
    is_root: np.ndarray
    parent: np.ndarray  # segment of the prompt, of each completion


@dataclass(frozen=True)
class PaddedRows:
    """Each completion after its own copy of the prompt, right-padded in buckets of similar length: for models that
    the hook cannot serve."""

    buckets: tuple[Tensor, ...]  # (R, L) positions in the packed row; padding repeats position 0
    where_N: Tensor  # of position n of the packed row in the flattened buckets; a prompt is read from one of its rows

    @classmethod
    def of(cls, segments: Segments, device: torch.device) -> PaddedRows:
        length, start = segments.length, segments.start
        leaves = np.flatnonzero(~segments.is_root)
        there = length[leaves] > 0  # an empty completion is read at its prompt's end
        leaves, parent = leaves[there], segments.parent[there]
        childless = np.setdiff1d(np.flatnonzero(segments.is_root), parent)
        above = np.concatenate([parent, childless])
        own = np.concatenate([leaves, childless])
        size = np.concatenate([length[leaves], np.zeros_like(childless)])
        where = np.empty(start[-1], dtype=np.int64)
        buckets, done = [], 0
        total = length[above] + size
        for rows in _similar(np.arange(len(own)), total, np.zeros_like(total)):
            step = np.arange(total[rows].max())[None]
            prompt = length[above[rows], None]
            place = np.where(step < prompt, start[above[rows], None] + step, start[own[rows], None] + step - prompt)
            valid = step < total[rows, None]
            place = np.where(valid, place, 0)
            where[place[valid]] = done + np.flatnonzero(valid)
            done += place.size
            buckets.append(torch.from_numpy(place).to(device))
        return cls(tuple(buckets), torch.from_numpy(where).to(device))


@dataclass(frozen=True)
class PromptTokens:
    """The R prompt tokens that have a prediction, all but the first of each of P prompts."""

    predict_R: Tensor
    own_R: Tensor
    mask_PT: Tensor


@dataclass(frozen=True)
class TreeBatch:
    """One packed row: N tokens of prompts and completions, C of them completion tokens, of B completions."""

    ids_N: Tensor
    positions_N: Tensor
    predict_C: Tensor  # position whose output predicts completion token c (the one before it in its sequence)
    own_C: Tensor  # position of completion token c itself
    target_C: Tensor
    owner_C: Tensor  # completion that token c belongs to, in the order of the samples
    last_B: Tensor  # position of each completion's last token; of an empty one, of its prompt's
    mask_BT: Tensor
    plan: AttentionPlan
    segments: Segments

    @functools.cached_property
    def padded(self) -> PaddedRows:
        """The same sequences for a model that cannot run on the packed row."""
        return PaddedRows.of(self.segments, self.ids_N.device)

    @functools.cached_property
    def prompts(self) -> PromptTokens:
        """The prompts' own tokens, in the order of the prompts, for losses that see them."""
        roots = self.segments.is_root
        length = np.maximum(self.segments.length[roots] - 1, 0)
        spans, valid = _spans(self.segments.start[:-1][roots], length)
        device, width = self.ids_N.device, length.max(initial=0)
        predict_R = torch.from_numpy(spans[valid]).to(device)
        mask_PT = np.arange(width)[None] < length[:, None]
        return PromptTokens(predict_R, predict_R + 1, torch.from_numpy(mask_PT).to(device))

    @classmethod
    def of(cls, samples: Samples, device: torch.device | str = "cpu") -> TreeBatch:
        """Pack all prompts and completions of these samples."""
        return cls.pack(samples.prompts, samples.completions, samples.prompt_B, device)

    @classmethod
    def pack(
        cls, prompts: Ragged, completions: Ragged, prompt_B: np.ndarray, device: torch.device | str = "cpu"
    ) -> TreeBatch:
        P, B = len(prompts), len(completions)
        order = np.argsort(prompt_B, kind="stable")  # completions tree by tree
        # Segments in storage order: prompt 0, its completions, prompt 1, ...
        children = np.bincount(prompt_B, minlength=P)
        root_segment = np.arange(P) + offsets_of(children)[:-1]
        is_root = np.zeros(P + B, dtype=bool)
        is_root[root_segment] = True
        length = np.empty(P + B, dtype=np.int64)
        length[is_root] = prompts.lengths
        length[~is_root] = completions.lengths[order]
        start = offsets_of(length)
        parent = np.repeat(root_segment, children)  # of the leaves, in storage order
        parent_length = length[parent]

        ids = np.empty(start[-1], dtype=np.int64)
        positions = np.arange(start[-1]) - np.repeat(start[:-1], length)
        in_root = np.repeat(is_root, length)
        ids[in_root] = prompts.flat
        ids[~in_root] = completions.take(order).flat
        leaf_length, leaf_start = length[~is_root], start[:-1][~is_root]
        positions[~in_root] += np.repeat(parent_length, leaf_length)

        # Completion tokens in the order of the samples (not of storage), so that flat columns line up.
        back = np.argsort(order, kind="stable")
        own_ragged = Ragged(np.flatnonzero(~in_root), offsets_of(leaf_length)).take(back)
        own = own_ragged.flat
        predict = own - 1
        first = own_ragged.offsets[:-1][completions.lengths > 0]
        prompt_end = start[:-1][parent] + parent_length - 1
        predict[first] = prompt_end[back][completions.lengths > 0]
        lengths_B = completions.lengths
        mask = np.arange(lengths_B.max(initial=0))[None] < lengths_B[:, None]

        to = lambda array: torch.from_numpy(np.ascontiguousarray(array)).to(device)  # noqa: E731
        positions_N = to(positions)
        return cls(
            ids_N=to(ids),
            positions_N=positions_N,
            predict_C=to(predict),
            own_C=to(own),
            target_C=to(np.asarray(completions.flat, dtype=np.int64)),
            owner_C=to(np.repeat(np.arange(B), lengths_B)),
            last_B=to(np.where(leaf_length > 0, leaf_start + leaf_length - 1, prompt_end)[back]),
            mask_BT=to(mask),
            plan=_plan(length, start, is_root, parent, positions_N),
            segments=Segments(length, start, is_root, parent),
        )

    def __len__(self) -> int:
        return len(self.ids_N)


def _plan(
    length: np.ndarray, start: np.ndarray, is_root: np.ndarray, parent: np.ndarray, positions_N: Tensor
) -> AttentionPlan:
    device = positions_N.device
    where = np.empty(start[-1], dtype=np.int64)
    buckets, done = [], 0
    roots = np.flatnonzero(is_root)
    leaves = np.flatnonzero(~is_root)
    leaf_parent = np.zeros(len(length), dtype=np.int64)
    leaf_parent[leaves] = parent
    for group in _similar(roots, length[roots], np.zeros_like(roots)):
        query, valid = _spans(start[group], length[group])
        buckets.append(Bucket(*(torch.from_numpy(query).to(device),) * 2, None))
        where[query[valid]] = done + np.flatnonzero(valid)
        done += query.size
    for group in _similar(leaves, length[leaves], length[parent]):
        above = leaf_parent[group]
        query, valid = _spans(start[group], length[group])
        prefix, prefix_valid = _spans(start[above], length[above])
        size = query.shape[1]
        # A query sees the whole prompt and its own past; padded queries see them too and are never read back.
        causal = np.broadcast_to(np.tril(np.ones((size, size), dtype=bool)), (len(group), size, size))
        seen = np.broadcast_to(prefix_valid[:, None], (len(group), size, prefix.shape[1]))
        buckets.append(
            Bucket(
                torch.from_numpy(query).to(device),
                torch.from_numpy(np.concatenate([prefix, query], axis=1)).to(device),
                torch.from_numpy(np.concatenate([seen, causal], axis=2)).to(device),
            )
        )
        where[query[valid]] = done + np.flatnonzero(valid)
        done += query.size
    return AttentionPlan(tuple(buckets), torch.from_numpy(where).to(device), positions_N)


def _spans(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions ``start .. start + length`` of each segment, padded with position 0, and which are real."""
    steps = np.arange(max(int(length.max(initial=1)), 1))
    valid = steps[None] < length[:, None]
    return np.where(valid, start[:, None] + steps, 0), valid


def _similar(segments: np.ndarray, own: np.ndarray, above: np.ndarray) -> Iterator[np.ndarray]:
    """Group segments whose own and parent lengths are within a third of each other: few calls, little padding."""
    own, above, segments = own[own > 0], above[own > 0], segments[own > 0]
    if len(segments) == 0:
        return
    key = _grid(own) * 1000 + _grid(above)
    for value in np.unique(key):
        yield segments[key == value]


def _grid(length: np.ndarray) -> np.ndarray:
    """Index of the length on the grid 16, 24, 32, 48, 64, 96, ..."""
    octave = np.ceil(np.log2(np.maximum(length, 16))).astype(np.int64)
    return octave * 2 + (length > 0.75 * 2.0**octave)


def micro_batches(samples: Samples, token_budget: int, share_prompts: bool = True) -> list[np.ndarray]:
    """Cut the rows of one optimizer step into micro-batches of at most ``token_budget`` tokens, trees kept whole.

    First fit, longest first. A tree larger than the budget repeats its prompt; a row larger than it is a batch of
    its own. Rows stay in their order inside a batch. Deterministic. Without ``share_prompts`` (models on padded
    batches) every completion that is not empty counts its prompt as well.
    """
    per_row = samples.per_row
    prompt_of_row = samples.prompt_B[::per_row]
    lengths = samples.completions.lengths.reshape(-1, per_row)
    row_tokens = lengths.sum(1)
    prompt_tokens = samples.prompts.lengths
    pieces: list[tuple[int, list[int]]] = []  # (tokens, rows)
    order = np.argsort(prompt_of_row, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(prompt_of_row[order])) + 1):
        above = int(prompt_tokens[prompt_of_row[rows[0]]])
        shared, repeated = (above, 0) if share_prompts else (0, above)
        size, piece = shared, list[int]()
        for row in rows.tolist():
            more = int(row_tokens[row]) + repeated * int((lengths[row] > 0).sum())
            if piece and size + more > token_budget:
                pieces.append((size, piece))
                size, piece = shared, []
            piece.append(row)
            size += more
        pieces.append((size, piece))
    pieces.sort(key=lambda p: (-p[0], p[1][0]))
    bins: list[list[int]] = []
    room: list[int] = []
    for size, members in pieces:
        fits = next((i for i, left in enumerate(room) if left >= size), None)
        if fits is None:
            bins.append([])
            room.append(token_budget)
            fits = len(bins) - 1
        bins[fits] += members
        room[fits] -= size
    return [np.sort(np.asarray(b)) for b in bins]


def shares(samples: Samples, token_budget: int, share_prompts: bool, size: int) -> list[list[np.ndarray]]:
    """Micro-batches of each of ``size`` processes: smaller ones, so that all have work, dealt to whoever has least."""
    if size == 1:
        return [micro_batches(samples, token_budget, share_prompts)]
    lengths, prompts = samples.completions.lengths, samples.prompts.lengths[samples.prompt_B]
    tokens = int(lengths.sum() + (samples.prompts.lengths.sum() if share_prompts else prompts.sum()))
    cut = micro_batches(samples, min(token_budget, max(1, -(-tokens // size))), share_prompts)
    weight_B = (lengths + prompts).reshape(-1, samples.per_row).sum(1)
    dealt: list[list[np.ndarray]] = [[] for _ in range(size)]
    load = [0] * size
    for rows in sorted(cut, key=lambda rows: (-int(weight_B[rows].sum()), int(rows[0]))):
        least = load.index(min(load))
        dealt[least].append(rows)
        load[least] += int(weight_B[rows].sum())
    return dealt


def packed(
    samples: Samples,
    token_budget: int,
    device: torch.device | str,
    share_prompts: bool = True,
    processes: Processes = ALONE,
) -> Iterator[tuple[np.ndarray, TreeBatch]]:
    """Micro-batch by micro-batch of this process: the numbers of its completions, and the packed row that holds them in
    that order."""
    for rows in shares(samples, token_budget, share_prompts, processes.size)[processes.rank]:
        completions = (rows[:, None] * samples.per_row + np.arange(samples.per_row)).reshape(-1)
        yield completions, TreeBatch.of(samples.take(rows), device)


def pack_rows(rows: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> Samples:
    """Samples of completions from ``[(prompt ids, [completion ids, ...]), ...]``: for tests and notebooks."""
    prompts = Ragged.of([p for p, _ in rows])
    completions = Ragged.of([c for _, cs in rows for c in cs])
    prompt_B = np.repeat(np.arange(len(rows)), [len(cs) for _, cs in rows])
    return Samples("completions", prompts, completions, prompt_B)
