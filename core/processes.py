"""The processes of a run and the few things they tell each other; for a single process there is nothing to do.

Light tensors (ids, log-probabilities, rewards, masks) are the same in every process, so counts, credit, controllers and
the plan of a batch are too; forward and backward passes are shared out, and gradients are summed once per optimizer
step.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from prefzoo.registry import RunError

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
        there = value.to(_device())
        with self._in_words():
            distributed.all_reduce(there)
        return there.to(value.device)

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Gradients become their sums; who has none of a parameter adds nothing to it."""
        if self.size == 1:
            return
        for bucket in _buckets(parameters):
            flat = torch.cat([torch.zeros_like(p).view(-1) if p.grad is None else p.grad.view(-1) for p in bucket])
            with self._in_words():
                distributed.all_reduce(flat)
            for p, grad in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                p.grad = grad.view_as(p)

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise RunError(
                f"process {self.rank} of {self.size} cannot reach the others ({str(error).strip().splitlines()[0]}): "
                "one of them ended or was killed; what it said last is the reason."
            ) from error


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
