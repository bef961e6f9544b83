"""What judges see, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from transformers import PreTrainedTokenizerBase

from prefzoo.data.samples import Ragged, Samples
from prefzoo.data.tokens import encode_sides
from prefzoo.models.tokenizer import end_ids


@dataclass(frozen=True)
class Answers:
    """K answers of one model to each of P prompts, all answers to a prompt one after the other: B = P K.

    ``rows``: the P rows of the data, with "prompt" and other columns. ``samples``: their tokens, where a judge reads
    tokens; ``ended``: whether each ended by itself.
    """

    rows: Sequence[Mapping[str, Any]]
    per_prompt: int
    texts: Sequence[str]
    ended: np.ndarray
    samples: Samples | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.rows) * self.per_prompt:
            raise ValueError(f"{len(self.texts)} texts for {len(self.rows)} prompts of {self.per_prompt} answers")

    @classmethod
    def of_texts(
        cls,
        rows: Sequence[Mapping[str, Any]],
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        ended: np.ndarray | None = None,
    ) -> Answers:
        """Answers that are text, and have ended unless it is told; with a tokenizer, for judges that read tokens."""
        ended = np.ones(len(texts), dtype=bool) if ended is None else ended
        made = cls(rows, len(texts) // max(1, len(rows)), texts, ended, None, tokenizer)
        if tokenizer is None:
            return made
        mine = [made.row(b) for b in range(len(texts))]
        said = [t if isinstance(r["prompt"], str) else [{"role": "assistant", "content": t}]
                for r, t in zip(mine, texts, strict=True)]  # fmt: skip
        prompts, sides = encode_sides(tokenizer, [r["prompt"] for r in mine], [said])
        closes = set(end_ids(tokenizer))
        ids = [side[:-1] if not whole and side and side[-1] in closes else side
               for [side], whole in zip(sides, ended, strict=True)]  # fmt: skip
        extra = {k: [r.get(k) for r in mine] for k in (mine[0] if mine else {})}
        samples = Samples("completions", Ragged.of(prompts), Ragged.of(ids), np.arange(len(ids)), extra=extra)
        return replace(made, samples=samples)

    def row(self, b: int) -> Mapping[str, Any]:
        """The row that answer b answers."""
        return self.rows[b // self.per_prompt]


@dataclass(frozen=True)
class Verdicts:
    """``forward_B``, ``backward_B``: the probability that the method's answer is better, where it was shown first and
    where second; NaN: no verdict, or none that could be read. ``spent``: calls, tokens, money."""

    forward_B: np.ndarray
    backward_B: np.ndarray
    spent: Mapping[str, float] = field(default_factory=dict)

    def y(self, unparsed: float = 0.5) -> np.ndarray:
        """Both orders averaged; a verdict that is missing counts ``unparsed``.

        >>> Verdicts(np.array([1.0, np.nan]), np.array([0.0, 1.0])).y().tolist()
        [0.5, 0.75]
        """
        both = np.stack([self.forward_B, self.backward_B])
        return np.where(np.isnan(both), unparsed, both).mean(0)


@runtime_checkable
class ScoreJudge(Protocol):
    """Scores single answers."""

    def score(self, answers: Answers) -> np.ndarray:
        """(B,) finite numbers, larger is better."""
        ...


@runtime_checkable
class PairJudge(Protocol):
    """Compares the answers of two models to the same prompts, answer by answer, in both orders."""

    def compare(self, answers: Answers, baseline: Answers) -> Verdicts: ...
