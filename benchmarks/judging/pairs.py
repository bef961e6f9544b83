"""Judges that compare two answers, in both orders: language models, simulated annotators."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prefzoo.benchmarks.judging.answers import Answers, Verdicts
from prefzoo.benchmarks.judging.spec import Annotators, Llm
from prefzoo.feedback.endpoint import Endpoint
from prefzoo.feedback.judges import Comparison, LocalModel
from prefzoo.seeds import generator


class Side(NamedTuple):
    """An answer as it is shown."""

    text: str
    ended: bool


class Shown(NamedTuple):
    """Two answers to one prompt, in the order in which they are shown."""

    row: Mapping[str, Any]
    first: Side
    second: Side


Prefers = Callable[[Sequence[Shown]], Sequence[float | None]]  # how likely the first is better; None: no verdict


def both_orders(answers: Answers, baseline: Answers, prefers: Prefers) -> tuple[np.ndarray, np.ndarray]:
    """How likely each of the method's answers is better, (B,) shown first and (B,) shown second; NaN: no verdict.

        forward_b = q(mine_b, theirs_b),   backward_b = 1 - q(theirs_b, mine_b)

    so that a change of the sides turns every verdict round exactly. Equal texts are a tie, and nobody is asked.
    """
    sides = [[Side(t, bool(e)) for t, e in zip(a.texts, a.ended, strict=True)] for a in (answers, baseline)]
    differ = [b for b, (mine, theirs) in enumerate(zip(*sides, strict=True)) if mine.text != theirs.text]
    orders = ([Shown(answers.row(b), one[b], two[b]) for b in differ] for one, two in (sides, sides[::-1]))
    found = np.full((2, len(answers.texts)), 0.5)
    for order, shown in enumerate(orders):
        found[order, differ] = [math.nan if q is None else q for q in prefers(shown)] if shown else []
    found[1, differ] = 1 - found[1, differ]
    return found[0], found[1]


class LlmJudge:
    """A language model that is shown two answers and says which is better.

    Both orders are asked. ``spent``: questions ``asked``, of which ``unparsed`` had no verdict that could be read and
    ``failed`` no answer; ``calls`` of an endpoint, ``cached`` answers, tokens, and ``cost`` where there is a price.

    Source: both orders: Zheng et al., arXiv:2306.05685; verdicts by log-probabilities: Lee et al., arXiv:2309.00267.
    """

    def __init__(self, told: Llm, cache: Path, device: str = "cpu") -> None:
        oracle: Any = LocalModel(told.model)
        if told.endpoint is not None:
            oracle = Endpoint(
                told.endpoint, told.model, key_env=told.key_env, timeout=told.timeout, retries=told.retries,
                concurrency=told.concurrency, max_calls=told.max_calls, max_cost=told.max_cost,
                price_per_million=told.price_per_million, cache=cache / "verdicts", logprobs=told.logprobs,
                max_tokens=told.max_tokens,
            )  # fmt: skip
        self._asks = Comparison(oracle, told.template, told.criterion).bind(device)
        self._unread = 0

    def prefers(self, shown: Sequence[Shown]) -> list[float | None]:
        """How likely the first answer is better."""
        first, second = [s.first.text for s in shown], [s.second.text for s in shown]
        columns = {name: [s.row[name] for s in shown] for name in self._asks.template.places if self._has(name, shown)}
        said = self._asks([s.row["prompt"] for s in shown], first, second, **columns)
        self._unread += sum(q is None for q in said)
        return said

    def compare(self, answers: Answers, baseline: Answers) -> Verdicts:
        forward_B, backward_B = both_orders(answers, baseline, self.prefers)
        return Verdicts(forward_B, backward_B, self.drain(2 * _different(answers, baseline)))

    def drain(self, asked: int) -> dict[str, float]:
        """What was spent on so many questions since the last time."""
        told = {k.removeprefix("judge/"): float(v) for k, v in self._asks.drain().items()}
        failed = round(told.pop("failed", 0.0) * asked)
        units = ("calls", "cached", "prompt_tokens", "completion_tokens", "cost")
        counts: dict[str, float] = {k: told[k] for k in units if k in told}
        unread, self._unread = self._unread, 0
        return {"asked": float(asked), "unparsed": float(unread - failed), "failed": float(failed), **counts}

    @staticmethod
    def _has(name: str, shown: Sequence[Shown]) -> bool:
        given = ("prompt", "first", "second", "criterion", "fence")
        return name not in given and all(name in s.row for s in shown)


@dataclass(frozen=True)
class PoolJudge:
    """Simulated annotators: for each comparison and order one of the pool is drawn and gives a label; a share of the
    labels is turned round.

        P(label = 1) = (1 - noise) p + noise (1 - p),   p = σ((u(first) - u(second)) / temperature)

    u is the world's gold reward plus the annotator's bias; of a language model p is its verdict. What is drawn follows
    from the seed, the prompt and both texts: the same comparison gets the same label in every run and in every order of
    work. A verdict that could not be read stays one.

    Source: Dubois et al., arXiv:2305.14387 (a pool of annotators, labels flipped with probability 1/4).
    """

    told: Annotators
    world: Any
    members: tuple[LlmJudge | None, ...]

    def compare(self, answers: Answers, baseline: Answers) -> Verdicts:
        asked = [0] * len(self.members)

        def prefers(shown: Sequence[Shown]) -> list[float | None]:
            random = [
                generator(self.told.seed, "annotator", str(s.row["prompt"]), s.first.text, s.second.text).random(3)
                for s in shown
            ]
            drawn = [int(r[0] * len(self.members)) for r in random]
            likely: dict[int, float | None] = {}
            for index, member in enumerate(self.members):
                mine = [i for i, d in enumerate(drawn) if d == index]
                told = [self._likely(index, shown[i]) for i in mine] if member is None else (
                    member.prefers([shown[i] for i in mine]) if mine else [])  # fmt: skip
                likely |= dict(zip(mine, told, strict=True))
                asked[index] += len(mine)
            return [
                None if likely[i] is None else float((label < likely[i]) != (flip < self.told.noise))
                for i, (_, label, flip) in enumerate(random)
            ]

        forward_B, backward_B = both_orders(answers, baseline, prefers)
        spent: dict[str, float] = {}
        for member, count in zip(self.members, asked, strict=True):
            for unit, amount in (member.drain(count) if member is not None else {}).items():
                spent[unit] = spent.get(unit, 0.0) + amount
        return Verdicts(forward_B, backward_B, spent)

    def _likely(self, index: int, shown: Shown) -> float:
        who, request = self.told.pool[index], shown.row["request"]
        worth = [
            self.world.utility(request, side.text, side.ended, bias=who.bias, strength=who.strength)
            for side in (shown.first, shown.second)
        ]
        temperature = self.world.temperature if who.temperature is None else who.temperature
        gap = worth[0] - worth[1]
        return 0.5 + 0.5 * (float(np.sign(gap)) if temperature == 0 else math.tanh(0.5 * gap / temperature))


def _different(answers: Answers, baseline: Answers) -> int:
    return sum(mine != theirs for mine, theirs in zip(answers.texts, baseline.texts, strict=True))
