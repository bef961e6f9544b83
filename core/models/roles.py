"""One ``nn.Module`` per role: it takes a tree batch and gives flat scores, its head inside its forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from prefzoo.models.tree import HOOK, TreeBatch

LOGITS_BYTES = 2**30  # logits of a batch up to this size are kept; beyond, they are recomputed chunk by chunk
Pooling = Literal["last", "mean"]


@dataclass(frozen=True)
class Scores:
    """Flat scores of a tree batch: (C,) one per completion token, (B,) one per completion."""

    logps_C: Tensor | None = None
    entropy_C: Tensor | None = None
    values_C: Tensor | None = None
    rewards_B: Tensor | None = None


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


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name is an adapter's: a factor, a magnitude, a new token's row."""
    return any(part in name for part in ("lora_", "trainable_tokens_", "modules_to_save."))


class Policy(Role):
    """A causal language model that gives log p(token | what precedes it) at completion positions only.

    ``logps_C = log_softmax(logits_C / temperature)[target]`` in float32 at least; ``entropy_C`` on request, with
    gradient.

    Args:
        model: the transformers model.
        adapter: peft's object around it, if it has an adapter.
        fp32_head: compute logits in float32 from hidden states of whatever precision the trunk ran in.
        base: the folder or hub id that the weights under the adapter came from, unchanged.
    """

    def __init__(
        self, model: PreTrainedModel, adapter: Any = None, *, fp32_head: bool = False, base: str | None = None
    ) -> None:
        super().__init__(adapter)
        self.model = model
        self.fp32_head = fp32_head
        self.base = base

    @property
    def packed(self) -> bool:
        """Whether batches run packed, a prompt once for all its completions; else padded, row by row."""
        return is_packed(self.model)

    @property
    def fresh_adapter(self) -> bool:
        """Whether the adapter still changes nothing: one factor starts at zero, of an embedding the first."""
        factors = [p for name, p in self.named_parameters() if "lora_B" in name or "lora_embedding_A" in name]
        return self.adapter is not None and not any(bool(p.any()) for p in factors)

    def forward(self, tree: TreeBatch, *, temperature: float = 1.0, entropy: bool = False) -> Scores:
        vocabulary = self.model.config.get_text_config().vocab_size
        chunk = max(1, LOGITS_BYTES // (4 * vocabulary))
        if len(tree.target_C) > chunk:
            return self.chunked(tree, chunk, temperature, entropy)
        if self.packed and not self.fp32_head:
            logits = _run(self.model, tree, logits_to_keep=tree.predict_C).logits[0]
            logps_C, entropy_C = _score_logits(logits, tree.target_C, temperature, entropy)
        else:
            hidden = run_trunk(trunk_of(self.model), tree)[tree.predict_C]
            logps_C, entropy_C = self._head(hidden, tree.target_C, temperature, entropy)
        return Scores(logps_C=logps_C, entropy_C=entropy_C)

    def chunked(self, tree: TreeBatch, chunk: int, temperature: float = 1.0, entropy: bool = False) -> Scores:
        """Too many logits to keep: hidden states are kept, and the head is run again in the backward pass."""
        hidden = run_trunk(trunk_of(self.model), tree)[tree.predict_C]
        parts = [
            checkpoint(self._head, h, t, temperature, entropy, use_reentrant=False)
            for h, t in zip(hidden.split(chunk), tree.target_C.split(chunk), strict=True)
        ]
        logps, entropies = zip(*parts, strict=True)
        return Scores(logps_C=torch.cat(logps), entropy_C=torch.cat(entropies) if entropy else None)

    def _head(self, hidden: Tensor, target: Tensor, temperature: float, entropy: bool) -> Any:
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
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return _score_logits(logits, target, temperature, entropy)


class Scorer(Role):
    """A causal trunk with a scalar head: a reward model (``rewards_B``) or a critic (``values_C``).

    A reward is read from the states of the completion's own tokens: of its last one (``last``), or of all of them
    (``mean``). A value is read before each token, from the state that predicts it. ``offset`` and ``scale`` standardise
    rewards: reward = (raw - offset) / scale.
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

    def forward(self, tree: TreeBatch, *, values: bool = False) -> Scores:
        hidden = run_trunk(self.trunk, tree)
        if values:
            return Scores(values_C=self._read(hidden[tree.predict_C]))
        if self.pooling == "last":
            raw_B = self._read(hidden[tree.last_B])
        else:
            raw_C = self._read(hidden[tree.own_C])
            total_B = raw_C.new_zeros(len(tree.mask_BT)).index_add(0, tree.owner_C, raw_C)
            raw_B = total_B / tree.mask_BT.sum(-1).clamp(min=1)
        return Scores(rewards_B=(raw_B - self.offset) / self.scale)

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


def _score_logits(logits: Tensor, target: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    log_normaliser = logits.logsumexp(-1)
    logps = logits.gather(-1, target[:, None])[:, 0] - log_normaliser
    if not entropy:
        return logps, None
    all_logps = logits - log_normaliser[:, None]
    return logps, -(all_logps.exp() * all_logps).sum(-1)
