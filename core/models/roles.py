"""One ``nn.Module`` per role: it takes a tree batch and gives flat scores, its head inside its forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from prefzoo.models.tree import HOOK, TreeBatch

LOGITS_BYTES = 2**30  # logits of a batch up to this size are kept; beyond, they are recomputed chunk by chunk
Pooling = Literal["last", "mean"]
Want = Literal["entropy", "log_sq", "kl", "prompt", "logits"]  # beside log-probabilities


@dataclass(frozen=True)
class Scores:
    """Flat scores of a tree batch: (C,) one per completion token, (R,) per prompt token, (B,) per completion.

    ``heads`` are an offline Q-learner's, (C,) each, by the names of :class:`prefzoo.models.heads.QHeads`.
    """

    logps_C: Tensor | None = None
    entropy_C: Tensor | None = None
    log_sq_C: Tensor | None = None
    kl_C: Tensor | None = None
    logits_CV: Tensor | None = None
    teacher_logits_CV: Tensor | None = None
    prompt_logps_R: Tensor | None = None
    values_C: Tensor | None = None
    steps_C: Tensor | None = None
    rewards_B: Tensor | None = None
    heads: Mapping[str, Tensor] = field(default_factory=dict)


class Role(nn.Module):
    """A module under which a peft adapter may lie.

    peft puts its layers into the model itself, so forwards go through the transformers model as ever. ``adapter`` is
    peft's own object around that model, for saving, merging and switching off; it is no submodule, or every weight
    would have two names.
    """

    adapter: Any

    def __init__(self, adapter: Any = None) -> None:
        super().__init__()
        self.__dict__["adapter"] = adapter

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Of an adapter, its own parameters (and a head's) alone: what lies under it stays frozen."""
        for name, parameter in self.named_parameters():
            trained = self.adapter is None or name.startswith("head.") or is_adapter(name)
            if trained or not requires_grad:
                parameter.requires_grad_(requires_grad)
        return self

    def slow(self) -> Mapping[str, Tensor]:
        """What follows the trained weights without being trained, by its own name: it moves with every optimizer step
        and is kept in checkpoints."""
        return {}

    def follow(self) -> None:
        """Move what is :meth:`slow`; called after every optimizer step of this module."""


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name is an adapter's: a factor, a magnitude, a new token's row."""
    return any(part in name for part in ("lora_", "trainable_tokens_", "modules_to_save."))


class Policy(Role):
    """A causal language model that gives log p(token | what precedes it) at completion positions only.

    ``logps_C = log_softmax(logits_C / temperature)[target]`` in float32 at least. On request, all with gradient:
    ``entropy_C``; ``log_sq_C``, log Σ_v p(v)²; ``kl_C``, the exact KL(other ‖ this) to the distribution of another
    policy, without gradient into that; ``prompt_logps_R``, of the prompts' own tokens; ``logits_CV``, the logits
    themselves, before any temperature: they are all kept, 4 bytes for every token and entry of the vocabulary.

    Args:
        model: the transformers model.
        adapter: peft's object around it, if it has an adapter.
        fp32_head: compute logits in float32 from hidden states of whatever precision the trunk ran in.
        base: the folder or hub id that the weights under the adapter came from, unchanged.

    ``product`` (:mod:`prefzoo.parts.product`): how answers are made with it, where that is more than its weights; what
    samples for training does not look at it.
    """

    def __init__(
        self, model: PreTrainedModel, adapter: Any = None, *, fp32_head: bool = False, base: str | None = None
    ) -> None:
        super().__init__(adapter)
        self.model = model
        self.fp32_head = fp32_head
        self.base = base
        self.product: Any = None

    @property
    def packed(self) -> bool:
        """Whether batches run packed, a prompt once for all its completions; else padded, row by row."""
        return is_packed(self.model)

    @property
    def fresh_adapter(self) -> bool:
        """Whether the adapter still changes nothing: one factor starts at zero, of an embedding the first."""
        factors = [p for name, p in self.named_parameters() if "lora_B" in name or "lora_embedding_A" in name]
        return self.adapter is not None and not any(bool(p.any()) for p in factors)

    def forward(
        self,
        tree: TreeBatch,
        *,
        temperature: float = 1.0,
        want: frozenset[Want] = frozenset(),
        other: Policy | None = None,
    ) -> Scores:
        vocabulary = self.model.config.get_text_config().vocab_size
        chunk = max(1, LOGITS_BYTES // (4 * vocabulary * (1 if other is None else 2)))
        predict, target = _places(tree, want)
        if len(target) > chunk and "logits" not in want:
            return self.chunked(tree, chunk, temperature, want, other)
        theirs = None if other is None else other.frozen_logits(tree, predict)
        logits = self._logits(tree, predict)
        scores = _scores(tree, want, _score_logits(logits, target, temperature, want, theirs))
        return replace(scores, logits_CV=logits[: len(tree.target_C)]) if "logits" in want else scores

    def chunked(
        self,
        tree: TreeBatch,
        chunk: int,
        temperature: float = 1.0,
        want: frozenset[Want] = frozenset(),
        other: Policy | None = None,
    ) -> Scores:
        """Too many logits to keep: hidden states are kept, and the head is run again in the backward pass."""
        predict, target = _places(tree, want)
        hidden = self._hidden(tree)[predict]
        theirs = [None] * -(-len(target) // chunk)
        if other is not None:
            with torch.no_grad():
                theirs = other._hidden(tree)[predict].split(chunk)

        def score(hidden: Tensor, target: Tensor, theirs: Tensor | None) -> dict[str, Tensor]:
            if theirs is not None:
                assert other is not None
                with torch.no_grad():
                    theirs = other._head(theirs)
            return _score_logits(self._head(hidden), target, temperature, want, theirs)

        parts = [
            checkpoint(score, h, t, o, use_reentrant=False)
            for h, t, o in zip(hidden.split(chunk), target.split(chunk), theirs, strict=True)
        ]
        return _scores(tree, want, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    @torch.no_grad()
    def frozen_logits(self, tree: TreeBatch, predict: Tensor) -> Tensor:
        """Logits at those positions, without gradient."""
        return self._logits(tree, predict)

    def _logits(self, tree: TreeBatch, predict: Tensor) -> Tensor:
        if self.packed and not self.fp32_head:
            return self._whole(tree, predict)
        return self._head(self._hidden(tree)[predict])

    @property
    def config(self) -> Any:
        return self.model.config

    # The four places where weights are used; AdapterOff wraps each.

    def read(self, keep: Tensor | int | None = None, **inputs: Any) -> tuple[Any, Tensor]:
        """A forward pass of a decode loop: the library's own outputs, and the logits (R, V) at the last token of every
        row, or at the places ``keep`` of the only one."""
        out = self.model(**inputs, **({} if keep is None else {"logits_to_keep": keep}))
        return out, out.logits[0] if isinstance(keep, Tensor) else out.logits[:, -1]

    def _whole(self, tree: TreeBatch, predict: Tensor) -> Tensor:
        return _run(self.model, tree, logits_to_keep=predict).logits[0]

    def _hidden(self, tree: TreeBatch) -> Tensor:
        return run_trunk(trunk_of(self.model), tree)

    def _head(self, hidden: Tensor) -> Tensor:
        """What the library does between hidden states and logits; check_packing compares it with the library's."""
        config = self.model.config.get_text_config()
        head = self.model.get_output_embeddings()
        if self.fp32_head:
            with torch.autocast(hidden.device.type, enabled=False):
                weights = {k: v.float() for k, v in head.state_dict(keep_vars=True).items()}
                logits = functional_call(head, weights, hidden.float())
        else:
            logits = head(hidden)
        scale, divisor, cap = (
            getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
        )
        logits = logits * (scale or 1.0) / (divisor or 1.0)
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _places(tree: TreeBatch, want: frozenset[Want]) -> tuple[Tensor, Tensor]:
    """Positions whose outputs are scored, and the tokens that they predict: completions, then prompts if wanted."""
    if "prompt" not in want:
        return tree.predict_C, tree.target_C
    prompts = tree.prompts
    return (
        torch.cat([tree.predict_C, prompts.predict_R]),
        torch.cat([tree.target_C, tree.ids_N[prompts.own_R]]),
    )


def _scores(tree: TreeBatch, want: frozenset[Want], found: dict[str, Tensor]) -> Scores:
    """By name and place: what was found at all positions that were scored."""
    count = len(tree.target_C)
    flat: dict[str, Any] = {f"{name}_C": values[:count] for name, values in found.items()}
    return Scores(**flat, prompt_logps_R=found["logps"][count:] if "prompt" in want else None)


class Scorer(Role):
    """A causal trunk with a scalar head: a reward model (``rewards_B``) or a critic (``values_C``).

    A reward is read from the states of the completion's own tokens: of its last one (``last``), or of all of them
    (``mean``). A value is read before each token, from the state that predicts it; the score of a step (``steps_C``) at
    each token, from its own state. ``offset`` and ``scale`` standardise rewards: reward = (raw - offset) / scale.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, trunk: PreTrainedModel, head: nn.Linear, pooling: Pooling = "last", adapter: Any = None) -> None:
        super().__init__(adapter)
        self.trunk = trunk
        self.head = head
        self.pooling = pooling
        self.register_buffer("offset", torch.zeros((), device=head.weight.device))
        self.register_buffer("scale", torch.ones((), device=head.weight.device))

    def forward(self, tree: TreeBatch, *, values: bool = False, steps: bool = False) -> Scores:
        hidden = run_trunk(self.trunk, tree)
        if values:
            return Scores(values_C=self._read(hidden[tree.predict_C]))
        steps_C = (self._read(hidden[tree.own_C]) - self.offset) / self.scale if steps else None
        if self.pooling == "last":
            raw_B = self._read(hidden[tree.last_B])
        else:
            raw_C = self._read(hidden[tree.own_C])
            total_B = raw_C.new_zeros(len(tree.mask_BT)).index_add(0, tree.owner_C, raw_C)
            raw_B = total_B / tree.mask_BT.sum(-1).clamp(min=1)
        return Scores(rewards_B=(raw_B - self.offset) / self.scale, steps_C=steps_C)

    @property
    def packed(self) -> bool:
        """Whether batches run packed; else padded."""
        return is_packed(self.trunk)

    def _read(self, hidden: Tensor) -> Tensor:
        """The head in the precision of its weights, whatever the trunk ran in: scores are compared by differences."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight.dtype))[:, 0]


def trunk_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head."""
    base = model.base_model
    return model.get_decoder() if base is model else base  # some classes have a prefix that is no attribute


def is_packed(model: PreTrainedModel) -> bool:
    return bool(model.config.get_text_config()._attn_implementation == HOOK)


def run_trunk(trunk: PreTrainedModel, tree: TreeBatch) -> Tensor:
    """Hidden states (N, D) of the packed row, whichever way the model can run it."""
    if is_packed(trunk):
        return _run(trunk, tree).last_hidden_state[0]
    # Right padding needs no mask: what is causal never looks at it.
    states = [trunk(input_ids=tree.ids_N[rows], use_cache=False).last_hidden_state for rows in tree.padded.buckets]
    return torch.cat([s.flatten(0, 1) for s in states]).index_select(0, tree.padded.where_N)


def _run(model: Any, tree: TreeBatch, **options: Any) -> Any:
    return model(
        input_ids=tree.ids_N[None], position_ids=tree.positions_N[None], use_cache=False,
        attention_plan=tree.plan, **options,
    )  # fmt: skip


def _score_logits(
    logits: Tensor, target: Tensor, temperature: float, want: frozenset[Want], theirs: Tensor | None
) -> dict[str, Tensor]:
    """What is wanted of the distribution at each position, by name."""

    def tempered(logits: Tensor) -> Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits if temperature == 1.0 else logits / temperature

    logits = tempered(logits)
    log_normaliser = logits.logsumexp(-1)
    found = {"logps": logits.gather(-1, target[:, None])[:, 0] - log_normaliser}
    if want & {"entropy", "log_sq", "kl"}:
        logps = logits - log_normaliser[:, None]
        if "entropy" in want:
            found["entropy"] = -(logps.exp() * logps).sum(-1)
        if "log_sq" in want:
            found["log_sq"] = (2 * logps).logsumexp(-1)
        if "kl" in want:
            assert theirs is not None
            their_logps = tempered(theirs).log_softmax(-1)
            found["kl"] = (their_logps.exp() * (their_logps - logps)).sum(-1)
    return found
