"""The built-in decode loop: every prompt prefilled once, a KV slab behind the attention hook, finished rows dropped."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

from prefzoo.data.samples import Ragged, Samples
from prefzoo.models.roles import Policy
from prefzoo.models.tree import AttentionPlan, TreeBatch, scaled_attention
from prefzoo.registry import UsageError
from prefzoo.seeds import uniforms


class Finish(enum.IntEnum):
    """Why a completion ended."""

    STOP = 0  # the model wrote its end-of-sequence token
    LENGTH = 1  # it was cut at the limit


@dataclass(frozen=True)
class Sampling:
    """How to sample. ``temperature=0`` takes the likeliest token; ``top_p`` keeps the smallest set of tokens with
    that much probability."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1:
            raise UsageError(f"sampling needs temperature >= 0, 0 < top_p <= 1 and max_new_tokens >= 1; got {self}.")


class Reader(Protocol):
    """A module that can read along in the decode loop: a :class:`Policy`, or anything on a causal trunk.

    ``packed``: its attention is the hook's, so the loop keeps keys and values; else it is given the library's cache.
    ``config``: the library's, for positions and vocabulary. ``read(keep, **inputs)``: the outputs of a forward pass of
    the library's model or trunk (a cache is taken from them), and what the module says, (R, V), at the last token of
    every row; where ``keep`` is a tensor, at these places of the only row. A number promises that nothing before that
    many last tokens is asked for.
    """

    @property
    def packed(self) -> bool: ...

    @property
    def config(self) -> Any: ...

    def read(self, keep: Tensor | int | None = None, **inputs: Any) -> tuple[Any, Tensor]: ...

    def modules(self) -> Iterator[nn.Module]: ...


@dataclass(frozen=True)
class Next:
    """What is known where the next token of each of R rows is drawn, without gradient.

    ``logits_RV``: the policy's, before temperature. ``other_RV``: what the decoder's ``other`` says there; a policy its
    logits.
    """

    sampling: Sampling
    logits_RV: Tensor
    other_RV: Tensor | None = None


class Decoder(Protocol):
    """What changes the distribution that tokens are drawn from.

    Before every token it is called with :class:`Next` and gives logits (R, V); temperature and top-p come after it, and
    the log-probabilities that are reported are those of what results. A token of logit minus infinity is never drawn.
    Rows come and go between calls, so it must be a function of its argument alone.

    ``other``: a second module of the same vocabulary that reads the same prefix, with a memory of its own; None: there
    is none. Decoding by the advantages of a Q-learner is one line, with an ``other`` that says Q(v) - V:
    ``here.logits_RV + beta * here.other_RV``.
    """

    @property
    def other(self) -> Reader | None: ...

    def __call__(self, here: Next) -> Tensor: ...


@dataclass(frozen=True)
class Mixture:
    """The policy mixed with another, token by token, or held inside what the other would write.

        p(v) ∝ policy(v)^(1 - blend) other(v)^blend [v in the nucleus of other],   all after temperature

    Args:
        other: the second model.
        blend: 0: the policy alone; 1: the other alone.
        mask_top_p: only tokens of the smallest set to which the other gives so much probability may be drawn; None: all
            may. At temperature 0 it is the set of the other's own distribution, at temperature 1.

    Source: the mixture: Munos et al. (Nash-MD), arXiv:2312.00886, section 7; the mask: Ramamurthy et al. (NLPO),
    arXiv:2210.01241, section 4.
    """

    other: Policy
    blend: float = 0.0
    mask_top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.blend <= 1:
            raise UsageError(f"blend is a share from 0 to 1, got {self.blend:g}.")
        if self.mask_top_p is not None and not 0 < self.mask_top_p <= 1:
            raise UsageError(f"mask_top_p is a probability above 0, got {self.mask_top_p:g}.")

    def __call__(self, here: Next) -> Tensor:
        assert here.other_RV is not None
        mine, theirs = here.logits_RV.float(), here.other_RV.float()
        logits_RV = mine.lerp(theirs, self.blend) if self.blend else mine  # normalisers cancel in the softmax
        if self.mask_top_p is None or self.mask_top_p == 1:
            return logits_RV
        their_logps = (theirs / (here.sampling.temperature or 1.0)).log_softmax(-1)
        return logits_RV.masked_fill(outside_nucleus(their_logps, self.mask_top_p), -torch.inf)


@dataclass
class _Capture:
    """Prefill: attends by the tree plan and keeps keys and values of every layer."""

    plan: AttentionPlan
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        self.layers[layer] = (key[0].transpose(0, 1), value[0].transpose(0, 1))  # (N, H, D)
        return self.plan.attend(layer, query, key, value, *rest)


@dataclass
class _Slab:
    """Decode: one new token for each of R rows. Prompts are right-aligned to L, so row r writes column L + step."""

    keys: dict[int, Tensor]  # (R, H, L + T, D)
    values: dict[int, Tensor]
    visible: Tensor | None  # (R, L + T): False where a shorter prompt is padded; None if none is
    lengths_R: Tensor
    column: int
    reader: Reader
    done: int = 0  # tokens decoded

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
    ) -> Tensor:
        keys, values, end = self.keys[layer], self.values[layer], self.column + 1
        keys[:, :, self.column] = key[:, :, 0]
        values[:, :, self.column] = value[:, :, 0]
        first = max(0, end - window) if window is not None else 0
        mask = None if self.visible is None else self.visible[:, None, None, first:end]
        return scaled_attention(query, keys[:, :, first:end], values[:, :, first:end], mask, scaling).transpose(1, 2)

    def keep(self, rows: Tensor) -> None:
        for slab in (self.keys, self.values):
            for layer in slab:  # one at a time: the old copy goes before the next is made
                slab[layer] = slab[layer][rows]
        self.visible = None if self.visible is None else self.visible[rows]
        self.lengths_R = self.lengths_R[rows]

    def advance(self, token_R: Tensor) -> Tensor:
        """What is said after one more token of each row, (R, V)."""
        _, said_RV = self.reader.read(
            1, input_ids=token_R[:, None], position_ids=(self.lengths_R + self.done)[:, None], use_cache=False,
            attention_plan=self,
        )  # fmt: skip
        self.column, self.done = self.column + 1, self.done + 1
        return said_RV


@dataclass
class _Cached:
    """Decode with the library's own cache; where a model gives none that can drop rows, the whole text again."""

    ids_RL: Tensor
    reader: Reader
    cache: dict[str, Cache] = field(default_factory=dict)  # under the name that the model's forward takes

    def forward(self, ids_RL: Tensor) -> Tensor:
        out, said_RV = self.reader.read(input_ids=ids_RL, use_cache=True, **self.cache)
        names = ("past_key_values", "cache_params")
        self.cache = {k: out[k] for k in names if isinstance(getattr(out, k, None), Cache)}
        return said_RV

    def advance(self, token_R: Tensor) -> Tensor:
        self.ids_RL = torch.cat([self.ids_RL, token_R[:, None]], 1)
        return self.forward(token_R[:, None] if self.cache else self.ids_RL)

    def keep(self, rows: Tensor) -> None:
        index = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows
        self.ids_RL = self.ids_RL[index]
        for cache in self.cache.values():
            cache.reorder_cache(index)


_Memory = _Slab | _Cached


class LoopEngine:
    """Samples from a :class:`Policy` in this process; a completion ends with any of the EOS ids."""

    def __init__(
        self,
        policy: Policy,
        eos_token_id: int | Sequence[int],
        *,
        rows_per_batch: int = 512,
        tokens_per_batch: int = 2**17,
    ) -> None:
        if isinstance(self, CacheEngine) == policy.packed:
            raise UsageError(
                "this engine cannot serve this policy; rollout_engine(policy, ...) gives the one that can."
            )
        self.policy = policy
        self.ends = torch.tensor(np.atleast_1d(eos_token_id), dtype=torch.long)
        self.rows_per_batch = rows_per_batch
        self.tokens_per_batch = tokens_per_batch  # of the slab: rows x (longest prompt + new tokens)

    @torch.no_grad()
    def generate(
        self,
        prompts: Samples,
        n: int,
        sampling: Sampling,
        seed: int,
        keys_P: np.ndarray | None = None,
        *,
        decoder: Decoder | None = None,
    ) -> Samples:
        """``n`` completions of each prompt, prompt by prompt.

        A completion depends on (weights, prompt, ``seed``, its prompt's key, its number) only, not on its neighbours;
        ``keys_P`` defaults to the prompt's position. Columns: ``finish`` (:class:`Finish`), token column
        ``old_logps``: log-probabilities under the distribution that was sampled from (after the decoder, temperature
        and top-p; at temperature 0 under the model's own distribution, or what the decoder makes of it). The EOS token
        is part of a finished completion.
        """
        readers: list[Reader] = [self.policy]
        if decoder is not None and decoder.other is not None:
            readers.append(decoder.other)
        lengths = prompts.prompts.lengths
        _check(readers, int(lengths.max(initial=0)), sampling)
        keys = np.arange(len(lengths)) if keys_P is None else np.asarray(keys_P)
        modes = [(module, module.training) for reader in readers for module in reader.modules()]
        for module, _ in modes:
            module.training = False
        order = np.argsort(lengths, kind="stable")
        longest = int(lengths.max(initial=0)) + sampling.max_new_tokens
        per_batch = max(1, min(self.rows_per_batch, self.tokens_per_batch // (longest * len(readers))) // n)
        ids: list[np.ndarray] = [np.zeros(0)] * (len(lengths) * n)
        logps: list[Tensor] = [torch.zeros(0)] * (len(lengths) * n)
        packed = all(reader.packed for reader in readers)
        for which in _batches(order, lengths, per_batch, alike=not packed):
            row_keys = (keys[which, None] * 65_537 + np.arange(n)).reshape(-1)  # (prompt, number of the sample)
            uniform_RT = torch.from_numpy(uniforms(seed, row_keys, sampling.max_new_tokens))
            rows = self._batch(readers, prompts.prompts.take(which), n, sampling, uniform_RT, decoder)
            for place, (row_ids, row_logps) in enumerate(rows):
                target = int(which[place // n]) * n + place % n
                ids[target], logps[target] = row_ids, row_logps
        for module, training in modes:
            module.training = training
        ends = set(self.ends.tolist())
        finish = [Finish.STOP if int(i[-1]) in ends else Finish.LENGTH for i in ids]
        return Samples(
            "completions", prompts.prompts, Ragged.of(ids), np.repeat(np.arange(len(lengths)), n),
            columns={"finish": torch.tensor(finish)}, tokens={"old_logps": torch.cat(logps)}, extra=prompts.extra,
        )  # fmt: skip

    def _batch(
        self,
        readers: Sequence[Reader],
        prompts: Ragged,
        n: int,
        sampling: Sampling,
        uniform_RT: Tensor,
        decoder: Decoder | None,
    ) -> list[tuple[np.ndarray, Tensor]]:
        device = next(self.policy.parameters()).device
        steps, rows = sampling.max_new_tokens, len(prompts) * n
        memories, said = zip(*(_prefill(r, prompts, n, steps, device) for r in readers), strict=True)
        uniform_RT, ends = uniform_RT.to(device), self.ends.to(device)
        out = torch.zeros(rows, steps, dtype=torch.long, device=device)
        out_logps = torch.zeros(rows, steps, device=device)
        count = torch.full((rows,), steps, device=device)
        live = torch.arange(rows, device=device)  # rows of the memory -> rows of the output
        done = torch.zeros(rows, dtype=torch.bool, device=device)  # of the memory
        for step in range(steps):
            logits = said[0] if decoder is None else decoder(Next(sampling, *said))
            token, logp = choose(logits, uniform_RT[live, step], sampling)
            out[live, step], out_logps[live, step] = token, logp.float()
            ended = torch.isin(token, ends) & ~done
            count[live[ended]] = step + 1
            done |= ended
            if step == steps - 1 or bool(done.all()):
                break
            if int(done.sum()) >= 0.25 * len(done):
                keep = ~done
                for memory in memories:
                    memory.keep(keep)
                live, token, done = live[keep], token[keep], done[keep]
            said = tuple(memory.advance(token) for memory in memories)
        out_ids, counts, out_logps = out.cpu().numpy(), count.tolist(), out_logps.cpu()
        return [(out_ids[r, : counts[r]], out_logps[r, : counts[r]]) for r in range(rows)]


class CacheEngine(LoopEngine):
    """For models that the attention hook cannot serve: the library's cache, prompts of one length at a time, so that
    nothing is padded. The same samples: the random numbers are those of :class:`LoopEngine`."""


def _check(readers: Sequence[Reader], longest: int, sampling: Sampling) -> None:
    configs = [reader.config.get_text_config() for reader in readers]
    positions = [getattr(config, "max_position_embeddings", None) for config in configs]
    limit = min((n for n in positions if n is not None), default=None)
    if limit is not None and longest and longest + sampling.max_new_tokens > limit:
        raise UsageError(
            f"prompts of up to {longest} tokens and max_new_tokens={sampling.max_new_tokens} exceed the "
            f"model's {limit} positions; lower max_new_tokens, or max_length of the data."
        )
    sizes = {config.vocab_size for config in configs}
    if len(sizes) > 1:
        raise UsageError(f"decoding by two models needs the same vocabulary; theirs have {sorted(sizes)} tokens.")


def _batches(order: np.ndarray, lengths: np.ndarray, size: int, alike: bool) -> Iterator[np.ndarray]:
    """Prompts that are decoded together; ``alike``: only those of one length."""
    groups = np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1) if alike else [order]
    for group in groups:
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _prefill(reader: Reader, prompts: Ragged, n: int, steps: int, device: Any) -> tuple[_Memory, Tensor]:
    """Run each prompt once, for n rows each; and what is said where their first token is drawn, (R, V)."""
    memory: _Memory
    if reader.packed:
        memory, said_PV = _slab(reader, prompts, n, steps, device)
    else:
        ids_PL = torch.from_numpy(prompts.flat.reshape(len(prompts), -1).astype(np.int64)).to(device)
        memory = _Cached(ids_PL, reader)
        said_PV = memory.forward(ids_PL)
        memory.keep(torch.arange(len(prompts), device=device).repeat_interleave(n))
    return memory, said_PV.repeat_interleave(n, 0)


def _slab(reader: Reader, prompts: Ragged, n: int, steps: int, device: Any) -> tuple[_Slab, Tensor]:
    """Keys and values of the prompts, right-aligned and repeated n times."""
    tree = TreeBatch.pack(prompts, Ragged.of([]), np.zeros(0, dtype=np.int64), device)
    capture = _Capture(tree.plan)
    lengths, width = prompts.lengths, int(prompts.lengths.max())
    ends = torch.from_numpy(prompts.offsets[1:] - 1).to(device)
    _, said_PV = reader.read(
        ends, input_ids=tree.ids_N[None], position_ids=tree.positions_N[None], use_cache=False, attention_plan=capture
    )
    columns = np.arange(width)[None] - (width - lengths)[:, None]  # position within the prompt; negative: padding
    index = torch.from_numpy(np.where(columns >= 0, prompts.offsets[:-1, None] + columns, 0)).to(device)
    keys: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    for layer, (key, value) in capture.layers.items():
        for slab, x in ((keys, key), (values, value)):
            filled = x[index].transpose(1, 2).repeat_interleave(n, 0)  # (R, H, L, D)
            slab[layer] = filled.new_zeros(*filled.shape[:2], width + steps, filled.shape[3])
            slab[layer][:, :, :width] = filled
    visible = None
    if (lengths < width).any():
        real = torch.from_numpy(columns >= 0).to(device).repeat_interleave(n, 0)
        visible = torch.cat([real, real.new_ones(len(real), steps)], dim=1)
    lengths_R = torch.from_numpy(lengths).to(device).repeat_interleave(n)
    return _Slab(keys, values, visible, lengths_R, column=width, reader=reader), said_PV


def rollout_engine(policy: Policy, eos_token_id: int | Sequence[int], **options: Any) -> LoopEngine:
    """The engine that can serve the policy."""
    return (LoopEngine if policy.packed else CacheEngine)(policy, eos_token_id, **options)


def choose(logits_RV: Tensor, uniform_R: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token per row by inverse CDF, and its log-probability under the distribution sampled from."""
    logits_RV = logits_RV.float()
    if sampling.temperature == 0:
        token_R = logits_RV.argmax(-1)
        return token_R, logits_RV.log_softmax(-1).gather(-1, token_R[:, None])[:, 0]
    logps_RV = (logits_RV / sampling.temperature).log_softmax(-1)
    if sampling.top_p < 1:
        logps_RV = logps_RV.masked_fill(outside_nucleus(logps_RV, sampling.top_p), -torch.inf).log_softmax(-1)
    cumulative = logps_RV.exp().cumsum(-1)
    total_R1 = cumulative[:, -1:]
    # Below the total even where the product rounds up to it: what comes after has no probability.
    level = (uniform_R[:, None].to(total_R1.dtype) * total_R1).minimum(total_R1.nextafter(torch.zeros_like(total_R1)))
    token_R1 = torch.searchsorted(cumulative, level, right=True).clamp_(max=logits_RV.shape[-1] - 1)
    return token_R1[:, 0], logps_RV.gather(-1, token_R1)[:, 0]


def outside_nucleus(logps_RV: Tensor, top_p: float) -> Tensor:
    """Which tokens are not in the smallest set with that much probability, (R, V); the likeliest always is in it."""
    sorted_logps, order = logps_RV.sort(-1, descending=True)
    before = sorted_logps.exp().cumsum(-1) - sorted_logps.exp()
    return (before >= top_p).scatter(-1, order, before >= top_p)
