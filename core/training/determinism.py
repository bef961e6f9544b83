"""Determinism mode: the same bits on the same machine, or words; and the random state of the process as data."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefzoo.registry import UsageError
from prefzoo.seeds import derive_seed
from prefzoo.training.config import TrainConfig

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACE = ":4096:8"  # cuBLAS is deterministic with a fixed workspace per stream: this one, or the smaller :16:8


@contextlib.contextmanager
def deterministic(settings: TrainConfig, device: torch.device) -> Iterator[None]:
    """Deterministic kernels, float32 products in float32, seeded global generators; all put back afterwards.

    A run draws nothing from the global generators itself: they are seeded for what a user's reward function or a
    model's code draws. They are derived from the run's seed, each by its own hash.

    Errors: an operation without a deterministic kernel on this device, told when it is met; a process whose cuBLAS
        has started with another workspace, which cannot be undone.
    """
    tensors, facts = rng_state()
    kernels = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    precision = torch.get_float32_matmul_precision()
    variable = os.environ.get(CUBLAS)
    cuda = device.type == "cuda"
    try:
        torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("highest")
        random.seed(derive_seed(settings.seed, "python"))
        np.random.seed(derive_seed(settings.seed, "numpy") % 2**32)
        torch.default_generator.manual_seed(derive_seed(settings.seed, "torch"))
        if cuda:
            if variable not in (":4096:8", ":16:8"):
                os.environ[CUBLAS] = WORKSPACE
            torch.cuda.manual_seed_all(derive_seed(settings.seed, "torch"))
            _start_cublas(device)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
            yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise UsageError(
            f"deterministic: {str(error).partition(' does not')[0]} has no deterministic kernel on {device}; run on "
            "another device (device cpu), or leave deterministic out."
        ) from error
    finally:
        torch.use_deterministic_algorithms(kernels[0], warn_only=kernels[1])
        torch.set_float32_matmul_precision(precision)
        set_rng_state(tensors, facts)
        if cuda and variable is None:
            os.environ.pop(CUBLAS, None)
        elif cuda:
            os.environ[CUBLAS] = str(variable)


def _start_cublas(device: torch.device) -> None:
    """torch looks at the variable once, at the first product on a GPU: here, or before us."""
    one = torch.ones(1, 1, device=device)
    try:
        one @ one
    except RuntimeError as error:
        raise UsageError(
            f"deterministic: this process has used the GPU without {CUBLAS}, which is read once. Set it before the "
            f"process starts: {CUBLAS}={WORKSPACE} prefzoo train ..., or train before anything else uses the GPU."
        ) from error


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The global generators of python, numpy and torch (of each GPU, where CUDA runs), as tensors and JSON."""
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict)
    state = dict(legacy["state"])
    tensors = {"python": torch.from_numpy(np.array(words, dtype=np.int64)), "torch": torch.get_rng_state()}
    if "key" in state:  # not every bit generator has one
        tensors["numpy"] = torch.from_numpy(state.pop("key").astype(np.int64))
    if torch.cuda.is_initialized():
        tensors |= {f"cuda:{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return tensors, {"python": [version, gauss], "numpy": {**legacy, "state": state}}


def set_rng_state(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Put back what :func:`rng_state` gave; the state of a GPU that is not here any more is left out.

    >>> state = rng_state()
    >>> first = random.random(), np.random.rand(), float(torch.rand(()))
    >>> set_rng_state(*state)
    >>> first == (random.random(), np.random.rand(), float(torch.rand(())))
    True
    """
    version, gauss = facts["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    state = dict(facts["numpy"]["state"])
    if "numpy" in tensors:
        state["key"] = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state({**facts["numpy"], "state": state})
    torch.set_rng_state(tensors["torch"])
    for name, value in tensors.items():
        if name.startswith("cuda:") and int(name.removeprefix("cuda:")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value, name)
