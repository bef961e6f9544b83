"""One ``nn.Module`` per role: it takes a tree batch and gives flat scores, its head inside its forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from prefzoo.models.tree import TreeBatch

LOGITS_BYTES = 2**30  # logits of a batch up to this size are kept; beyond, they are recomputed chunk by chunk
Pooling = Literal["last", "mean"]


@dataclass(frozen=True)
class Scores:
    """Flat scores of a tree batch: (C,) one per completion token, (B,) one per completion."""

    logps_C: Tensor | None = None
    entropy_C: Tensor | None = None
    values_C: Tensor | None = None
    rewards_B: Tensor | None = None


class Policy(nn.Module):
    """A causal language model that gives log p(token | what precedes it) at completion positions only.

    ``logps_C = log_softmax(logits_C / temperature)[target]`` in float32 at least; ``entropy_C`` on request, with
    gradient.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tree: TreeBatch, *, temperature: float = 1.0, entropy: bool = False) -> Scores:
        vocabulary = self.model.config.get_text_config().vocab_size
        chunk = max(1, LOGITS_BYTES // (4 * vocabulary))
        if len(tree.target_C) <= chunk:
            logits = self._run(tree, logits_to_keep=tree.predict_C).logits[0]
            logps_C, entropy_C = _score_logits(logits, tree.target_C, temperature, entropy)
            return Scores(logps_C=logps_C, entropy_C=entropy_C)
        return self.chunked(tree, chunk, temperature, entropy)

    def chunked(self, tree: TreeBatch, chunk: int, temperature: float = 1.0, entropy: bool = False) -> Scores:
        """Too many logits to keep: hidden states are kept, and the head is run again in the backward pass."""
        hidden = self._run(tree, base=True).last_hidden_state[0][tree.predict_C]
        parts = [
            checkpoint(self._head, h, t, temperature, entropy, use_reentrant=False)
            for h, t in zip(hidden.split(chunk), tree.target_C.split(chunk), strict=True)
        ]
        logps, entropies = zip(*parts, strict=True)
        return Scores(logps_C=torch.cat(logps), entropy_C=torch.cat(entropies) if entropy else None)

    def _head(self, hidden: Tensor, target: Tensor, temperature: float, entropy: bool) -> Any:
        """What the library does between hidden states and logits; check_packing compares it with the library's."""
        config = self.model.config.get_text_config()
        logits = self.model.get_output_embeddings()(hidden)
        scale, divisor, cap = (
            getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
        )
        logits = logits * (scale or 1.0) / (divisor or 1.0)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return _score_logits(logits, target, temperature, entropy)

    def _run(self, tree: TreeBatch, base: bool = False, **options: Any) -> Any:
        return _run(self.model.base_model if base else self.model, tree, **options)


class Scorer(nn.Module):
    """A causal trunk with a scalar head: a reward model (``rewards_B``) or a critic (``values_C``).

    A reward is read from the states of the completion's own tokens: of its last one (``last``), or of all of them
    (``mean``). A value is read before each token, from the state that predicts it. ``offset`` and ``scale`` standardise
    rewards: reward = (raw - offset) / scale.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, trunk: PreTrainedModel, head: nn.Linear, pooling: Pooling = "last") -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.pooling = pooling
        self.register_buffer("offset", torch.zeros((), device=head.weight.device))
        self.register_buffer("scale", torch.ones((), device=head.weight.device))

    def forward(self, tree: TreeBatch, *, values: bool = False) -> Scores:
        hidden = _run(self.trunk, tree).last_hidden_state[0]
        if values:
            return Scores(values_C=self._read(hidden[tree.predict_C]))
        if self.pooling == "last":
            raw_B = self._read(hidden[tree.last_B])
        else:
            raw_C = self._read(hidden[tree.own_C])
            total_B = raw_C.new_zeros(len(tree.mask_BT)).index_add(0, tree.owner_C, raw_C)
            raw_B = total_B / tree.mask_BT.sum(-1).clamp(min=1)
        return Scores(rewards_B=(raw_B - self.offset) / self.scale)

    def _read(self, hidden: Tensor) -> Tensor:
        """The head in the precision of its weights, whatever the trunk ran in: scores are compared by differences."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight.dtype))[:, 0]


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
