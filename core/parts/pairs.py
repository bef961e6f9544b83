"""Credits that compare completions of one prompt: scored rollouts become pairs, labelled rows or rankings.

Rules of all of them. A missing reward is never compared. Equal scores say nothing, so they give no pair; nor does a
completion against its own like. Only differences of scores count, and the order of the samples decides nothing but
which of several equal scores is taken. What was left out is measured: ``measure`` gives it in shares, which are logged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from prefzoo.data.samples import Ragged, Samples, offsets_of
from prefzoo.losses import advantages
from prefzoo.registry import UsageError
from prefzoo.seeds import generator

ScoreUnit = Literal["rewards", "win_rates"]
PAIR_COLUMNS = frozenset({"margin", "probability"})


def win_probability(margin_B: Tensor, unit: ScoreUnit = "rewards") -> Tensor:
    """The probability that the chosen completion is better, from the margin of its score.

    Rewards are Bradley-Terry's, sigmoid(margin); of two win rates p and q it is (1 + p - q) / 2, which of the win rates
    of just two completions, p and 1 - p, is p itself.

    >>> win_probability(torch.tensor([0.0, 0.5]), "win_rates")
    tensor([0.5000, 0.7500])
    """
    return torch.sigmoid(margin_B) if unit == "rewards" else (1 + margin_B) / 2


def by_prompt(samples: Samples, scores_B: Tensor) -> Iterator[list[int]]:
    """Of each prompt the completions whose score is known, in the order of the samples."""
    known_B = ~scores_B.isnan()
    rows: dict[int, list[int]] = {int(p): [] for p in np.unique(samples.prompt_B)}
    for row in torch.nonzero(known_B)[:, 0].tolist():
        rows[int(samples.prompt_B[row])].append(row)
    yield from rows.values()


def different(samples: Samples, scores_B: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Those pairs of completions, (N, 2), that differ in score and in a token."""
    told = [
        (i, j)
        for i, j in pairs
        if scores_B[i] != scores_B[j] and not np.array_equal(samples.completions[i], samples.completions[j])
    ]
    return torch.tensor(told, dtype=torch.long).reshape(-1, 2)


def as_pairs(samples: Samples, scores_B: Tensor, index_N2: Tensor, **columns: Tensor) -> Samples:
    """Pairs of these completions, the chosen one first, with the ``margin`` of their scores."""
    margin_N = scores_B[index_N2[:, 0]] - scores_B[index_N2[:, 1]]
    taken = samples.take(index_N2.reshape(-1).numpy())
    return replace(taken, kind="pairs", row_columns={"margin": margin_N, **columns})


def matched(
    samples: Samples, scores_B: Tensor, pairs: Sequence[tuple[int, int]], unit: ScoreUnit, soft: bool = False
) -> Samples:
    """Pairs of completions in any order, the better one chosen; or soft ones, trained on in both orders."""
    index_N2 = different(samples, scores_B, pairs)
    margin_N = scores_B[index_N2[:, 0]] - scores_B[index_N2[:, 1]]
    if not soft:
        index_N2 = torch.where(margin_N[:, None] > 0, index_N2, index_N2.flip(1))
        return as_pairs(samples, scores_B, index_N2, probability=win_probability(margin_N.abs(), unit))
    both_N2 = torch.stack([index_N2, index_N2.flip(1)], 1).reshape(-1, 2)
    probability_N = win_probability(torch.stack([margin_N, -margin_N], 1).reshape(-1), unit)
    return as_pairs(samples, scores_B, both_N2, probability=probability_N, weight=2 * probability_N)


@dataclass(frozen=True)
class _Comparison:
    """What credits of comparisons share.

    Those of pairs give the columns ``margin``, R_w - R_l, and ``probability``, by ``unit`` of the scores
    (:func:`win_probability`). ``soft``: the label is that probability p instead of the larger score: each pair is
    trained on in both orders, with the weights 2 p and 2 (1 - p).
    """

    needs = frozenset[str]()
    smallest_group = 2

    def measure(self, before: Samples, scores_B: Tensor, after: Samples) -> dict[str, Tensor]:
        """Shares of prompts: without two known scores, with equal scores only, and of which nothing is trained on."""
        known, tied = [], []
        for rows in by_prompt(before, scores_B):
            known.append(len(rows) > 1)
            tied.append(len(rows) > 1 and bool((scores_B[rows] == scores_B[rows[0]]).all()))
        used = len(np.unique(after.prompt_B)) if len(after) else 0
        return {
            "prompts/unscored": 1 - torch.tensor(known).float(),
            "prompts/tied": torch.tensor(tied).float(),
            "prompts/unused": torch.tensor([1 - used / max(len(known), 1)]),
        }


@dataclass(frozen=True)
class TopAgainstBottom(_Comparison):
    """The best completion of each prompt against its worst, one pair a prompt.

        (y_w, y_l) = (argmax_i R_i, argmin_i R_i) of each prompt with max R > min R

    Source: Yuan et al., Self-Rewarding Language Models, arXiv:2401.10020.
    """

    unit: ScoreUnit = "rewards"
    soft: bool = False

    gives = "pairs"
    columns = PAIR_COLUMNS

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        chosen, rejected = advantages.top_against_bottom(scores_B, torch.from_numpy(samples.prompt_B))
        pairs = list(zip(chosen.tolist(), rejected.tolist(), strict=True))
        return matched(samples, scores_B, pairs, self.unit, self.soft)


@dataclass(frozen=True)
class AllPairs(_Comparison):
    """Every two completions of a prompt whose scores are further apart than ``min_gap``.

        {(i, j) : R_i - R_j > min_gap}

    A prompt with many different scores gives many pairs, and so weighs more.

    Source: Khaki et al., RS-DPO, arXiv:2402.10038, algorithm 1.
    """

    min_gap: float = 0.0
    unit: ScoreUnit = "rewards"
    soft: bool = False

    gives = "pairs"
    columns = PAIR_COLUMNS

    def __post_init__(self) -> None:
        if self.min_gap < 0:
            raise UsageError(f"AllPairs: min_gap is a difference of rewards of at least 0, got {self.min_gap:g}.")

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        pairs = [
            (i, j)
            for rows in by_prompt(samples, scores_B)
            for i, j in itertools.combinations(rows, 2)
            if abs(float(scores_B[i] - scores_B[j])) > self.min_gap
        ]
        return matched(samples, scores_B, pairs, self.unit, self.soft)


@dataclass(frozen=True)
class Matches(_Comparison):
    """Completions of a prompt meet in the order of the samples, the first with the second, the third with the fourth.

    ``tournament``: the winners meet again, until one is left: K - 1 pairs instead of K / 2. Of a draw there is no
    pair, and the first goes on; who has no partner goes on too.

    Source: first-round and tournament ranking of Liu et al. (RSO), arXiv:2309.06657.
    """

    tournament: bool = False
    unit: ScoreUnit = "rewards"
    soft: bool = False

    gives = "pairs"
    columns = PAIR_COLUMNS

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        pairs: list[tuple[int, int]] = []
        for rows in by_prompt(samples, scores_B):
            while len(rows) > 1:
                met = list(zip(rows[0::2], rows[1::2], strict=False))
                pairs.extend(met)
                if not self.tournament:
                    break
                left = [rows[-1]] if len(rows) % 2 else []
                rows = [j if scores_B[j] > scores_B[i] else i for i, j in met] + left
        return matched(samples, scores_B, pairs, self.unit, self.soft)


@dataclass(frozen=True)
class AgainstOther(_Comparison):
    """Every main completion against every one that another sampler wrote to the same prompt.

    The better one is chosen. ``ordered``: the main one is called chosen whatever the scores say, and the column
    ``probability`` is 1 where it is the better one and 0 where it is not, or what is between if ``soft``: for losses
    that must know who wrote which.
    """

    ordered: bool = False
    unit: ScoreUnit = "rewards"
    soft: bool = False

    gives = "pairs"
    columns = PAIR_COLUMNS

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        sampler_B = _samplers(samples, "AgainstOther")
        pairs = [
            (i, j)
            for rows in by_prompt(samples, scores_B)
            for i in rows
            for j in rows
            if sampler_B[i] == 0 and sampler_B[j] != 0
        ]
        if not self.ordered:
            return matched(samples, scores_B, pairs, self.unit, self.soft)
        index_N2 = different(samples, scores_B, pairs)
        margin_N = scores_B[index_N2[:, 0]] - scores_B[index_N2[:, 1]]
        probability_N = win_probability(margin_N, self.unit) if self.soft else (margin_N > 0).float()
        return as_pairs(samples, scores_B, index_N2, probability=probability_N)


def _samplers(samples: Samples, credit: str) -> Tensor:
    if "sampler" not in samples.columns:
        raise UsageError(
            f"{credit} compares with another sampler's completions: give Rollouts(beside=(Sampler(...),))."
        )
    return samples.columns["sampler"]


@dataclass(frozen=True)
class Desirable(_Comparison):
    """Completions labelled good or bad, each for itself.

    good: R >= threshold. ``threshold=None``: R above the mean of its prompt's known scores; below it is bad, and what
    equals it is left out.
    """

    threshold: float | None = None

    gives = "unpaired"

    @property
    def smallest_group(self) -> int:  # type: ignore[override]
        return 2 if self.threshold is None else 1

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        if self.threshold is None:
            # Differences to the prompt's mean, exactly 0 where all its scores are equal.
            above_B = advantages.group_relative(scores_B, torch.from_numpy(samples.prompt_B), scale="none")
            rows = torch.nonzero(above_B != 0)[:, 0]
            desirable = above_B[rows] > 0
        else:
            rows = torch.nonzero(~scores_B.isnan())[:, 0]
            desirable = scores_B[rows] >= self.threshold
        taken = samples.take(rows.numpy())
        return replace(taken, kind="unpaired", columns={**taken.columns, "desirable": desirable})


@dataclass(frozen=True)
class RankedSamples(_Comparison):
    """The completions of each prompt from the best to the worst, with their scores; equal ones as they were sampled.

    ``ends``: the best and the worst only. Prompts whose scores are all equal are left out.
    """

    ends: bool = False

    gives = "rankings"
    columns = frozenset({"scores"})

    def __call__(self, samples: Samples, scores_B: Tensor) -> Samples:
        lists = [sorted(rows, key=lambda i: -float(scores_B[i])) for rows in by_prompt(samples, scores_B)]
        lists = [rows for rows in lists if len(rows) > 1 and scores_B[rows[0]] > scores_B[rows[-1]]]
        if self.ends:
            lists = [[rows[0], rows[-1]] for rows in lists]
        width = max(map(len, lists), default=2)
        order = np.asarray([row for rows in lists for row in rows], dtype=np.int64)
        taken = samples.take(order)
        there = torch.tensor([len(rows) for rows in lists])[:, None] > torch.arange(width)
        return padded_rankings(replace(taken, columns={**taken.columns, "score": scores_B[order]}), there)


def padded_rankings(samples: Samples, there_PK: Tensor) -> Samples:
    """Rankings of one width: ``there_PK`` says which places the completions fill, the others become empty ones."""
    there_PK = there_PK.reshape(-1, there_PK.shape[-1])
    there = there_PK.reshape(-1)
    lengths = np.zeros(len(there), dtype=np.int64)
    lengths[there.numpy()] = samples.completions.lengths

    def fill(column: Tensor) -> Tensor:
        return column.new_zeros(len(there), *column.shape[1:]).masked_scatter(
            there.view(-1, *[1] * (column.dim() - 1)), column
        )

    return replace(
        samples,
        kind="rankings",
        width=there_PK.shape[-1],
        completions=Ragged(samples.completions.flat, offsets_of(lengths)),
        prompt_B=np.repeat(np.arange(len(there_PK)), there_PK.shape[-1]),
        columns={name: fill(value) for name, value in samples.columns.items()},
    )


@dataclass(frozen=True)
class RejectionSampled:
    """Keep some of many candidates, so that what is kept is distributed as a policy of higher reward.

        accept y with probability exp((R(y) - max R) / beta); then again among the rest, until ``count`` are accepted

    Candidates from ref that are accepted in the first pass are distributed as ref(y) exp(R(y) / beta), the optimum of
    KL-regularised reward, up to rewards above the largest that was seen; later passes are flatter, because the best
    are gone. A candidate without a reward is never accepted.

    Args:
        beta: in reward units; smaller keeps better ones, 0 would be best-of-N, infinity a random choice.
        count: how many to keep of each prompt.

    The random numbers are a hash of the candidates themselves: the same candidates, the same choice.

    Source: Liu et al. (RSO), arXiv:2309.06657.
    """

    beta: float = 0.5
    count: int = 8

    def __post_init__(self) -> None:
        if self.beta <= 0 or self.count < 1:
            raise UsageError(
                f"RejectionSampled: beta is above 0 and count at least 1, got {self.beta:g} and {self.count}."
            )

    def __call__(self, samples: Samples, scores_B: Tensor) -> tuple[Samples, Tensor]:
        kept: list[int] = []
        for rows in by_prompt(samples, scores_B):
            if rows:
                stream = _stream(samples, rows)
                kept.extend(rows[k] for k in accepted(scores_B[rows].double().numpy(), self.beta, self.count, stream))
        index = torch.tensor(kept, dtype=torch.long)
        return samples.take(index.numpy()), scores_B[index]


def accepted(scores_K: np.ndarray, beta: float, count: int, stream: np.random.Generator) -> list[int]:
    """Places of the accepted candidates, in their order.

    >>> accepted(np.array([0.0, -1e9, 0.0]), 1.0, 2, np.random.default_rng(0))
    [0, 2]
    """
    left, taken = list(range(len(scores_K))), list[int]()
    while left and len(taken) < count:
        chance = np.exp((scores_K[left] - scores_K[left].max()) / beta)
        passed = [k for k, ok in zip(left, stream.random(len(left)) < chance, strict=True) if ok]
        taken += passed[: count - len(taken)]
        left = [k for k in left if k not in passed]
    return sorted(taken)


def _stream(samples: Samples, rows: Sequence[int]) -> np.random.Generator:
    texts = [samples.prompts[samples.prompt_B[rows[0]]], *(samples.completions[row] for row in rows)]
    return generator("rejection sampling", *(ids.tobytes().hex() for ids in texts))
