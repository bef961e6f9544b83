"""The processes of a run and the few things they tell each other; for a single process there is nothing to do.

Light tensors (ids, log-probabilities, rewards, masks) are the same in every process, so counts, credit, controllers and
the plan of a batch are too; forward and backward passes are shared out, and gradients are summed once per optimizer
step.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from prefzoo.registry import RunError, UsageError

Item = TypeVar("Item")
BUCKET = 2**25  # elements that are summed in one message


@dataclass(frozen=True)
class Processes:
    """Those of this run, and which one this is.

    >>> alone = Processes()
    >>> alone.main, alone.gather("x"), alone.share([1, 2, 3])
    (True, ['x'], [1, 2, 3])
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def launched(cls, cpu: bool = False) -> Processes:
        """As ``accelerate launch`` or ``torchrun`` started them."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing and not distributed.is_initialized():
            raise UsageError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that there are several processes, but {missing[0]} is not "
                "set; start them with accelerate launch or torchrun, or unset WORLD_SIZE."
            )
        from accelerate import PartialState

        state = PartialState(cpu=cpu or not torch.accelerator.is_available())
        return cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this one writes and speaks for all."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's consecutive part of a list."""
        start, end = (len(items) * r // self.size for r in (self.rank, self.rank + 1))
        return list(items[start:end])

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in the order of their ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._in_words():
            distributed.all_gather_object(found, value)
        return found

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes: the same bits in each of them."""
        if self.size == 1:
            return value
        there = value.to(_device(), copy=True)
        with self._in_words():
            distributed.all_reduce(there)
        return there.to(value.device)

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Gradients become their sums; who has none of a parameter adds nothing, and where nobody has any, none there
        is: an optimizer leaves such a parameter alone."""
        if self.size == 1:
            return
        for bucket in _buckets(parameters):
            grads = [p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1) for p in bucket]
            flat = torch.cat([*grads, grads[0].new_tensor([float(p.grad is not None) for p in bucket])])
            with self._in_words():
                distributed.all_reduce(flat)
            *sums, known = flat.split([*(p.numel() for p in bucket), len(bucket)])
            for p, grad, there in zip(bucket, sums, known.tolist(), strict=True):
                p.grad = grad.view_as(p) if there else None

    def tell(self, error: BaseException) -> None:
        """Hand the words of an error to the launcher, whose summary is the last that a person reads."""
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if self.size > 1 and file is not None and not Path(file).exists():
            told = {"message": str(error), "extraInfo": {"timestamp": str(int(time.time()))}}
            with contextlib.suppress(OSError):
                Path(file).write_text(json.dumps({"message": told}), encoding="utf-8")

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            said = (
                re.sub(r"^\[\S+\] ", "", str(error).strip()).splitlines()[0].partition(". ")[0]
            )  # without the C++ file
            raise RunError(
                f"process {self.rank} of {self.size} cannot go on without the others ({said}): one of them ended, was "
                "killed, or did not answer for too long. What that one said, or the launcher says of it, is the reason."
            ) from None  # the C++ and the collective that met it are no help


def _device() -> str:
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters of one type after another, at most so many elements together."""
    bucket: list[torch.nn.Parameter] = []
    for p in parameters:
        full = sum(q.numel() for q in bucket) + p.numel() > BUCKET
        if bucket and (full or p.dtype != bucket[0].dtype or p.device != bucket[0].device):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket


ALONE = Processes()
