"""The golden cases (tests/golden) as parameters of tests, and how they are compared. Imported by tests/losses."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefzoo.parts.count import Count

GOLDEN = Path(__file__).parent / "golden"
Case = dict[str, Any]
Sort = Callable[[Case], str | None]  # the name of the test that runs a case


@functools.cache
def document(file: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{file}.json").read_text())


def cases(file: str, sort: Sort, test: str) -> list[Any]:
    """The inputs and cases of a file that ``sort`` gives to this test."""
    found = [case for case in document(file)["cases"] if sort(case) == test]
    return [pytest.param(document(file)["input_sets"][case["inputs"]], case, id=case["name"]) for case in found]


def assert_all_run(file: str, sort: Sort, counts: dict[str, int]) -> None:
    """Every case of the file is run by some test, and each test runs as many as it says: none can hide."""
    everything = document(file)["cases"]
    assert [case["name"] for case in everything if sort(case) is None] == []
    assert dict(Counter(sort(case) for case in everything)) == counts


# -- ragged lists to padded tensors and back --------------------------------------------------------------------------

DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]
POISON = 1e9  # stands in every padded cell: it must not be seen


def padded(rows: list[list[float]], dtype: torch.dtype, *, grad: bool = False) -> Tensor:
    """(B, T) with poison in the padding; one more column than the longest row needs."""
    width = max(map(len, rows)) + 1
    return torch.tensor([row + [POISON] * (width - len(row)) for row in rows], dtype=dtype, requires_grad=grad)


def mask_of(rows: list[list[float]]) -> Tensor:
    width = max(map(len, rows)) + 1
    return torch.tensor([[t < len(row) for t in range(width)] for row in rows])


def flat(rows: list[list[float]]) -> list[float]:
    return [x for row in rows for x in row]


def assert_close(actual: Tensor, expected: list[float], case: Case) -> None:
    dtype = actual.dtype
    hard = any(word in case["inputs"] for word in ("extreme", "near_certain", "overflow"))
    rtol, atol = (1e-9, 1e-12) if dtype == torch.float64 else (1e-3, 1e-5) if hard else (2e-5, 1e-5)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=dtype), rtol=rtol, atol=atol)


def assert_padding_untouched(leaf: Tensor, mask_BT: Tensor) -> None:
    assert leaf.grad is not None
    assert bool((leaf.grad[~mask_BT] == 0).all()), "gradient in the padding"


def check_tokens(loss_BT: Tensor, count: Count, leaf_BT: Tensor, mask_BT: Tensor, field: str, case: Case) -> None:
    """Compare token losses, their aggregation by the count, and the gradient of that."""
    expected = case["expected"]
    assert_close(loss_BT[mask_BT], flat(expected["per_token_loss"]), case)
    reduced = count.mean(loss_BT, mask_BT)
    assert_close(reduced, expected["reduced"], case)
    reduced.backward()
    assert leaf_BT.grad is not None
    assert_close(leaf_BT.grad[mask_BT], flat(expected["grad"][field]), case)
    assert_padding_untouched(leaf_BT, mask_BT)


# How the golden names of the aggregations map on counts; "token" counts the tokens of the whole batch.
AGGREGATIONS: dict[str, Callable[[Case], Count]] = {
    "token_mean": lambda hyper: Count("token"),
    "seq_mean_token_mean": lambda hyper: Count("row"),
    "seq_mean_token_sum": lambda hyper: Count("row_sum"),
    "seq_mean_token_sum_norm": lambda hyper: Count("constant", constant=hyper["max_completion_length"]),
    "grpo": lambda hyper: Count("row"),
    "bnpo": lambda hyper: Count("token"),
    "dapo": lambda hyper: Count("token"),
    "dr_grpo": lambda hyper: Count("constant", constant=hyper["max_completion_length"]),
}
