"""Scores of every completion token without gradient, and reference log-probabilities kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prefzoo.data.samples import Ragged, Samples
from prefzoo.models.roles import Policy
from prefzoo.models.tree import TreeBatch, packed
from prefzoo.source import layer_hash


@torch.no_grad()
def token_scores(
    forward: Callable[[TreeBatch], Tensor | None], samples: Samples, token_budget: int, device: torch.device | str
) -> Tensor:
    """One value per completion token (C,), on the CPU, in the order of the samples, micro-batch by micro-batch."""
    out_C = torch.zeros(len(samples.completions.flat))
    for completions, tree in packed(samples, token_budget, device):
        found = forward(tree)
        assert found is not None
        out_C[torch.from_numpy(samples.completions.positions(completions))] = found.float().cpu()
    return out_C


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
) -> Tensor:
    """Log-probabilities of all completions under a frozen policy, computed once per (weights, samples, precision).

    The file is shared by every algorithm that asks for the same; its name is the hash of the content.
    """

    def compute() -> Tensor:
        with autocast(precision, device):
            return token_scores(lambda tree: policy(tree).logps_C, samples, token_budget, device)

    if cache is None:
        return compute()
    facts = [weights_hash(policy), _hash(samples.prompts), _hash(samples.completions), samples.prompt_B.tobytes().hex()]
    facts += [precision, policy.model.config.to_json_string(), layer_hash()]
    file = cache / f"reference-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:20]}.safetensors"
    if file.exists():
        return load_file(file)["logps"]
    logps_C = compute()
    cache.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=cache, suffix=".safetensors")
    os.close(handle)
    save_file({"logps": logps_C}, aside)
    os.replace(aside, file)  # a killed run leaves no half file under the final name
    return logps_C


def weights_hash(module: nn.Module) -> str:
    """Hash of all weights, their names, shapes and types."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:20]


def _hash(ragged: Ragged) -> str:
    return hashlib.sha256(ragged.flat.tobytes() + ragged.offsets.tobytes()).hexdigest()
