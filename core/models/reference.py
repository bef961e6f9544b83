"""References: the adapter switched off, a frozen copy, or log-probabilities kept on disk."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefzoo.data.samples import Ragged, Samples
from prefzoo.files import replacing_file
from prefzoo.models.roles import Policy, is_adapter
from prefzoo.models.tree import TreeBatch, packed
from prefzoo.processes import ALONE, Processes
from prefzoo.source import layer_hash


def reference_of(policy: Policy, *, live: bool) -> Policy:
    """The start of a stage as its anchor; log-probabilities are asked of it without gradient only.

    - A fresh adapter: a view of the policy with the adapter switched off; no copy.
    - Else, if it is asked while the policy moves (``live``): a frozen copy.
    - Else the policy itself, which has not moved yet when :func:`cached_logps` asks it.
    """
    if policy.fresh_adapter:
        return AdapterOff(policy)
    return clone(policy) if live else policy


def clone(policy: Policy) -> Policy:
    """A frozen copy."""
    return copy.deepcopy(policy).requires_grad_(False).eval()


def follower(policy: Policy) -> Policy:
    """A frozen copy that is to be moved after the policy; what lies under an adapter is not copied but shared."""
    under = () if policy.adapter is None else policy.named_parameters()
    shared = {id(p): p for name, p in under if not is_adapter(name)}
    return copy.deepcopy(policy, shared).requires_grad_(False).eval()  # type: ignore[arg-type]


class AdapterOff(Policy):
    """What a policy was before its adapter: the same weights, so it has no state, mode or gradients of its own."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.model, policy.adapter, fp32_head=policy.fp32_head, base=policy.base)

    @contextlib.contextmanager
    def _off(self) -> Iterator[None]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        try:
            with self.adapter.disable_adapter(), torch.no_grad():
                yield
        finally:  # peft turns on the gradients of every adapter when it comes back
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)

    def read(self, keep: Tensor | int | None = None, **inputs: Any) -> tuple[Any, Tensor]:
        with self._off():
            return super().read(keep, **inputs)

    def _whole(self, tree: TreeBatch, predict: Tensor) -> Tensor:
        with self._off():
            return super()._whole(tree, predict)

    def _hidden(self, tree: TreeBatch) -> Tensor:
        with self._off():
            return super()._hidden(tree)

    def _head(self, hidden: Tensor) -> Tensor:
        with self._off():
            return super()._head(hidden)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        return self

    def train(self, mode: bool = True) -> Self:
        return self


@torch.no_grad()
def token_scores(
    forward: Callable[[TreeBatch], Tensor | None],
    samples: Samples,
    token_budget: int,
    device: torch.device | str,
    share_prompts: bool = True,
    processes: Processes = ALONE,
) -> Tensor:
    """One value per completion token (C,), on the CPU, in the order of the samples, micro-batch by micro-batch; each
    process makes its share."""
    out_C = torch.zeros(len(samples.completions.flat))
    for completions, tree in packed(samples, token_budget, device, share_prompts, processes):
        found = forward(tree)
        assert found is not None
        out_C[torch.from_numpy(samples.completions.positions(completions))] = found.float().cpu()
    return processes.sum(out_C)


def autocast(precision: str, device: torch.device | str) -> contextlib.AbstractContextManager[Any]:
    """What every forward pass of a run goes through, so that two of them give the same log-probabilities."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, precision))


def cached_logps(
    policy: Policy,
    samples: Samples,
    token_budget: int,
    device: torch.device | str,
    cache: Path | None,
    precision: str = "float32",
    processes: Processes = ALONE,
) -> Tensor:
    """Log-probabilities of all completions under a frozen policy, computed once per (weights, samples, precision).

    The file is shared by every algorithm that asks for the same; its name is the hash of the content. An adapter that
    is switched off is not part of it: adapters of any kind and seed, and full training, share the file of their start.
    """

    def compute() -> Tensor:
        with autocast(precision, device):
            score = lambda tree: policy(tree).logps_C  # noqa: E731
            return token_scores(score, samples, token_budget, device, policy.packed, processes)

    if cache is None:
        return compute()
    facts = [weights_hash(policy), _hash(samples.prompts), _hash(samples.completions), samples.prompt_B.tobytes().hex()]
    facts += [precision, str(policy.fp32_head), policy.model.config.to_json_string(), layer_hash()]
    file = cache / f"reference-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]}.safetensors"
    if all(processes.gather(file.exists())):  # one that missed it would wait for the others for ever
        return load_file(file)["logps"]
    logps_C = compute()
    if not processes.main:
        return logps_C
    cache.mkdir(parents=True, exist_ok=True)
    with replacing_file(file, shared=True) as aside:  # a killed run leaves no half file under the final name
        save_file({"logps": logps_C}, aside)
    return logps_C


def weights_hash(module: nn.Module) -> str:
    """Hash of all weights, their names, shapes and types; of a model with its adapter off, those of the model."""
    weights: Mapping[str, Tensor] = module.state_dict()
    if isinstance(module, AdapterOff):
        weights = {_plain_name(k): v for k, v in weights.items() if not is_adapter(k)}
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(as_bytes(value.detach().cpu()).numpy().data)
    return digest.hexdigest()[:20]


def as_bytes(value: Tensor) -> Tensor:
    """The bytes of a tensor, whatever its strides."""
    return value.reshape(-1).contiguous().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _plain_name(name: str) -> str:
    """As the weight is called without peft's layer around it."""
    for layer in (".token_adapter", ".base_layer", ".original_module"):
        name = name.replace(layer, "")
    return name


def _hash(ragged: Ragged) -> str:
    return hashlib.sha256(ragged.flat.tobytes() + ragged.offsets.tobytes()).hexdigest()
