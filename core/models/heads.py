"""Heads of an offline Q-learner: two Q over the vocabulary, their slow copies, and a value, on a trunk of their own."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from prefzoo.models.adapters import merge_into
from prefzoo.models.causal import Note, check_trunk, open_causal, prepare, silent
from prefzoo.models.folders import check_source, in_words, no_bars
from prefzoo.models.roles import LOGITS_BYTES, Policy, Role, Scores, is_packed, run_trunk, trunk_of
from prefzoo.models.tree import TreeBatch
from prefzoo.registry import UsageError

HEADS_FILE = "prefzoo_heads"
APART = (
    "the heads are written to heads/ in prefzoo's own format. transformers loads the policy beside them, whose answers "
    "do not know the heads: decoding by advantages needs prefzoo.generate or 'prefzoo generate'."
)
FAST, SLOW = ("q1", "q2"), ("slow_q1", "slow_q2")


class QHeads(Role):
    """A causal trunk with the heads of an implicit language Q-learner, read from the state before each token.

        Q_k(s, v) = (W2 relu(W1 s + b1) + b2)_v,   k = 1, 2 and their slow copies;   V(s): the same with one output

    States are brought to mean 0 and variance 1 first: most trunks end with a norm, and of those that do not, large
    states would leave units of the heads dead for good.

    Its scores (``Scores.heads``), (C,) each: ``q1`` and ``q2`` of the token taken; ``q1_lse`` and ``q2_lse``,
    log Σ_v exp Q(v), on request; ``v``; ``target_q``, the smaller of the two slow Q, without gradient.

    Args:
        trunk: a causal model without its head.
        vocabulary: entries of Q.
        polyak: by how much the slow Q follow with every optimizer step: slow ← slow + polyak (Q - slow).
        adapter: peft's object around the trunk, if it has an adapter.

    Source: Snell et al. (ILQL), arXiv:2206.11871; the heads of two layers as in the authors' code.
    """

    head: Any  # a ModuleDict

    def __init__(self, trunk: PreTrainedModel, vocabulary: int, polyak: float = 0.005, adapter: Any = None) -> None:
        super().__init__(adapter)
        self.trunk = trunk
        self.polyak = polyak
        width = trunk.config.get_text_config().hidden_size
        weight = next(trunk.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
        made: dict[str, nn.Module] = {
            name: nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, outputs))
            for name, outputs in (("q1", vocabulary), ("q2", vocabulary), ("v", 1))
        }
        made |= {slow: copy.deepcopy(made[fast]) for slow, fast in zip(SLOW, FAST, strict=True)}
        self.head = nn.ModuleDict(made).to(device=weight.device, dtype=dtype)

    @property
    def packed(self) -> bool:
        """Whether batches run packed; else padded."""
        return is_packed(self.trunk)

    @property
    def config(self) -> Any:
        return self.trunk.config

    def read(self, keep: Tensor | int | None = None, **inputs: Any) -> tuple[Any, Tensor]:
        """For the decode loop: outputs of the trunk, and :meth:`advantages` at the last token of every row, or at the
        places ``keep`` of the only one."""
        out = self.trunk(**inputs)
        hidden = out.last_hidden_state
        return out, self.advantages(hidden[0, keep] if isinstance(keep, Tensor) else hidden[:, -1])

    def requires_grad_(self, requires_grad: bool = True) -> QHeads:
        """The slow Q are never trained."""
        super().requires_grad_(requires_grad)
        for name in SLOW:
            self.head[name].requires_grad_(False)
        return self

    def slow(self) -> Mapping[str, Tensor]:
        return {f"head.{n}.{k}": p.detach() for n in SLOW for k, p in self.head[n].named_parameters()}

    @torch.no_grad()
    def follow(self) -> None:
        for slow, fast in zip(SLOW, FAST, strict=True):
            for mine, theirs in zip(self.head[slow].parameters(), self.head[fast].parameters(), strict=True):
                mine.lerp_(theirs, self.polyak)

    def forward(self, tree: TreeBatch, *, lse: bool = False) -> Scores:
        """``lse``: also log Σ exp Q, for which Q is computed over the whole vocabulary; beyond ``LOGITS_BYTES`` it is
        computed again in the backward pass, chunk by chunk."""
        hidden = run_trunk(self.trunk, tree)[tree.predict_C]
        with torch.autocast(hidden.device.type, enabled=False):  # in the precision of the heads, as every score
            hidden = self._normal(hidden)
            found = {"v": self.head["v"](hidden)[:, 0]}
            with torch.no_grad():
                q1, q2 = (self._taken(name, hidden, tree.target_C) for name in SLOW)
                found["target_q"] = torch.minimum(q1, q2)
            for name in FAST:
                found |= self._with_lse(name, hidden, tree.target_C) if lse else {
                    name: self._taken(name, hidden, tree.target_C)
                }  # fmt: skip
        return Scores(heads=found)

    def _normal(self, hidden: Tensor) -> Tensor:
        return F.layer_norm(hidden.to(next(self.head.parameters()).dtype), hidden.shape[-1:])

    def _taken(self, name: str, hidden: Tensor, target: Tensor) -> Tensor:
        """Q of the tokens taken, by their rows of the last layer alone."""
        last = self.head[name][2]
        taken: Tensor = (self.head[name][:2](hidden) * last.weight[target]).sum(-1) + last.bias[target]
        return taken

    def _with_lse(self, name: str, hidden: Tensor, target: Tensor) -> dict[str, Tensor]:
        def read(hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            q = self.head[name](hidden)
            return q.gather(-1, target[:, None])[:, 0], q.logsumexp(-1)

        chunk = max(1, LOGITS_BYTES // (8 * self.head[name][2].out_features))
        if len(target) <= chunk:
            parts = [read(hidden, target)]
        else:
            pairs = zip(hidden.split(chunk), target.split(chunk), strict=True)
            parts = [checkpoint(read, h, t, use_reentrant=False) for h, t in pairs]
        taken, lse = (torch.cat(column) for column in zip(*parts, strict=True))
        return {name: taken, f"{name}_lse": lse}

    def advantages(self, hidden: Tensor) -> Tensor:
        """min(slow Q1, slow Q2)(v) - V of every entry v of the vocabulary, from the states (R, D) before it: (R, V)."""
        hidden = self._normal(hidden)
        q1, q2 = (self.head[name](hidden) for name in SLOW)
        advantages: Tensor = torch.minimum(q1, q2) - self.head["v"](hidden)
        return advantages


def new_heads(policy: Policy, *, polyak: float = 0.005, seed: int = 0) -> QHeads:
    """Heads on a copy of the policy's trunk, its adapter if it has one.

    The last layer of V is zero and so is that of both Q, as the reward is on average where it is standardised; the
    layer before it is random by ``seed``, and the two Q differ by it.
    """
    if policy.adapter is None:
        trunk, adapter = copy.deepcopy(trunk_of(policy.model)), None
    else:
        copied = copy.deepcopy(policy)
        trunk, adapter = trunk_of(copied.model), copied.adapter
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = QHeads(trunk, policy.model.config.get_text_config().vocab_size, polyak, adapter)
    for head in heads.head.values():
        nn.init.zeros_(head[2].weight)
        nn.init.zeros_(head[2].bias)
    return heads.requires_grad_(True)


@no_bars()
def save_heads(heads: QHeads, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """The trunk as a causal model's folder with the heads beside it (``prefzoo_heads.safetensors``), for
    :func:`load_heads` alone."""
    folder = Path(folder)
    if heads.adapter is not None:
        heads = copy.deepcopy(heads)
        merge_into(heads.adapter)
    causal = AutoModelForCausalLM.from_config(heads.trunk.config, dtype=heads.trunk.dtype)
    trunk_of(causal).load_state_dict(heads.trunk.state_dict())
    causal.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    save_file({k: v.contiguous() for k, v in heads.head.state_dict().items()}, folder / f"{HEADS_FILE}.safetensors")
    (folder / f"{HEADS_FILE}.json").write_text(json.dumps({"polyak": heads.polyak}))
    return folder


@no_bars()
def load_heads(source: str | Path, *, note: Note = silent) -> QHeads:
    """Heads that :func:`save_heads` wrote."""
    check_source(source)
    if not (Path(source) / f"{HEADS_FILE}.json").exists():
        raise UsageError(f"{str(source)!r} holds no heads of a Q-learner ({HEADS_FILE}.json); 'ilql' trains some.")
    with in_words(f"{str(source)!r} holds no heads that could be loaded"):
        facts = json.loads((Path(source) / f"{HEADS_FILE}.json").read_text())
        weights = load_file(Path(source) / f"{HEADS_FILE}.safetensors")
        trunk = trunk_of(prepare(open_causal(source, torch.float32)))
        heads = QHeads(trunk, len(weights["q1.2.bias"]), facts["polyak"])
        heads.head.load_state_dict(weights)
    check_trunk(trunk, note)
    return heads.requires_grad_(False)
