"""GPUs by their free memory: which a process may use, and which of them the next job gets."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefzoo.registry import UsageError

DEVICES = ("auto", "cpu", "cuda")
QUERY = ("nvidia-smi", "--query-gpu=index,uuid,memory.free", "--format=csv,noheader,nounits")
GiB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A GPU by its name for ``CUDA_VISIBLE_DEVICES``, and bytes of its memory: free at first, and free now."""

    uuid: str
    capacity: int
    free: int


def place(job_memory: int, gpus: Sequence[Gpu], jobs_per_gpu: int = 1) -> int | None:
    """The index of the GPU that has the most memory left when the job has its own; None where no GPU has room.

    Args:
        job_memory: bytes that the job needs; 0: unknown, then its share of a GPU.
        gpus: what is free of each now.
        jobs_per_gpu: how many jobs that do not know their memory share one.

    >>> gpus = [Gpu("GPU-a", 24 * GiB, 10 * GiB), Gpu("GPU-b", 80 * GiB, 12 * GiB)]
    >>> place(8 * GiB, gpus), place(16 * GiB, gpus), place(0, gpus, jobs_per_gpu=4)
    (1, None, 0)
    """
    left = [gpu.free - needed(job_memory, gpu, jobs_per_gpu) for gpu in gpus]
    best = max(range(len(gpus)), key=left.__getitem__, default=None)
    return best if best is not None and left[best] >= 0 else None


def needed(job_memory: int, gpu: Gpu, jobs_per_gpu: int) -> int:
    """Bytes of this GPU to keep for a job."""
    return job_memory or gpu.capacity // jobs_per_gpu


class Places:
    """Which running job has which GPU.

    Free memory is read once, before the first job: what jobs ask for is counted, not what they happen to use.
    """

    def __init__(self, gpus: Sequence[Gpu], jobs: int) -> None:
        self.gpus = list(gpus)
        self.jobs_per_gpu = math.ceil(jobs / len(gpus))
        self._kept: dict[str, tuple[int, int]] = {}  # job -> index of its GPU, bytes

    def take(self, job: str, memory: int) -> str | None:
        """The UUID of a GPU with room for a job, None while there is none. ``UsageError``: there never will be."""
        most = max(gpu.capacity for gpu in self.gpus)
        if memory > most:
            raise UsageError(
                f"it needs {memory / GiB:.1f} GiB on a GPU, and no GPU has more than {most / GiB:.1f} GiB free. Make "
                "its batches smaller, stop what else uses the GPUs, or use --device cpu."
            )
        index = place(memory, self.gpus, self.jobs_per_gpu)
        if index is None:
            return None
        self._add(index, -needed(memory, self.gpus[index], self.jobs_per_gpu))
        self._kept[job] = index, needed(memory, self.gpus[index], self.jobs_per_gpu)
        return self.gpus[index].uuid

    def give_back(self, job: str) -> None:
        """Free what a job kept, if it kept anything."""
        if job in self._kept:
            self._add(*self._kept.pop(job))

    def _add(self, index: int, memory: int) -> None:
        self.gpus[index] = dataclasses.replace(self.gpus[index], free=self.gpus[index].free + memory)


def usable_gpus(device: str, environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that jobs may use: those that ``nvidia-smi`` lists and ``CUDA_VISIBLE_DEVICES`` does not hide.

    Args:
        device: cpu: none; auto: all there are; cuda: the same, and an error where there are none.
        environment: of this process.
    """
    if device == "cpu":
        return []
    rows, problem = _listed()
    gpus = [_gpu(row) for row in _visible(rows, environment.get("CUDA_VISIBLE_DEVICES"))]
    if device == "cuda" and not gpus:
        why = problem or "CUDA_VISIBLE_DEVICES hides all of them"
        raise UsageError(f"--device cuda: no GPU was found: {why}. --device auto uses the CPU then.")
    return gpus


def _listed() -> tuple[list[list[str]], str]:
    """Index, UUID and free MiB of every GPU, or why there are none. CUDA is not begun: this process needs no GPU."""
    try:
        asked = subprocess.run(QUERY, capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        return [], f"{QUERY[0]} cannot be run ({error.strerror})"
    except subprocess.TimeoutExpired:
        return [], f"{QUERY[0]} does not answer"
    if asked.returncode:
        return [], f"{QUERY[0]} says {(asked.stderr or asked.stdout).strip()!r}"
    rows = [[cell.strip() for cell in line.split(",")] for line in asked.stdout.splitlines()]
    return rows, "" if rows else f"{QUERY[0]} lists none"


def _visible(rows: Sequence[Sequence[str]], mask: str | None) -> list[Sequence[str]]:
    """The rows that a mask names by index or by the beginning of a UUID, in its order, up to a negative index."""
    if mask is None:
        return list(rows)
    found: list[Sequence[str]] = []
    for word in (w.strip() for w in mask.split(",")) if rows else ():
        if not word or word.startswith("-"):
            break
        named = [row for row in rows if (row[0] == word if word.isdigit() else row[1].startswith(word))]
        if len(named) != 1:
            known = ", ".join(f"{index} ({uuid})" for index, uuid, _ in rows)
            raise UsageError(f"CUDA_VISIBLE_DEVICES names {word!r}; nvidia-smi lists {known}. Name one of these.")
        found += named
    return found


def _gpu(row: Sequence[str]) -> Gpu:
    _, uuid, free = row
    if not free.isdigit():
        raise UsageError(f"nvidia-smi gives {free!r} as the free memory of {uuid}: use --device cpu.")
    return Gpu(uuid, int(free) * 2**20, int(free) * 2**20)
