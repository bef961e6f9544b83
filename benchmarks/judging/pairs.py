"""Judges that compare two answers, in both orders: language models, simulated annotators, people."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefzoo.benchmarks.judging.answers import Answers, PairJudge, Verdicts
from prefzoo.benchmarks.judging.spec import Annotators, Llm
from prefzoo.feedback.endpoint import Endpoint
from prefzoo.feedback.judges import Comparison, LocalModel
from prefzoo.seeds import generator

Asked = Callable[[Sequence[int], bool], Sequence[float | None]]


def both_orders(answers: Answers, baseline: Answers, ask: Asked) -> tuple[np.ndarray, np.ndarray]:
    """``ask(places, first)`` says how likely the method's answer is better, where it stands first or second; answers of
    the same text are a tie and nobody is asked about them."""
    differ = [b for b, (mine, theirs) in enumerate(zip(answers.texts, baseline.texts, strict=True)) if mine != theirs]
    found = np.full((2, len(answers.texts)), 0.5)
    for order, first in enumerate((True, False)):
        said = ask(differ, first) if differ else []
        found[order, differ] = [math.nan if s is None else s for s in said]
    return found[0], found[1]


class LlmJudge:
    """A language model that is shown two answers and says which is better."""

    def __init__(self, told: Llm, cache: Path, device: str = "cpu") -> None:
        self.told = told
        if told.endpoint is None:
            oracle: Any = LocalModel(told.model)
            self._asks = Comparison(oracle, told.template, told.criterion).bind(device)
        else:
            oracle = Endpoint(
                told.endpoint, told.model, key_env=told.key_env, timeout=told.timeout, retries=told.retries,
                concurrency=told.concurrency, max_calls=told.max_calls, max_cost=told.max_cost,
                price_per_million=told.price_per_million, cache=cache / "verdicts", logprobs=told.logprobs,
                max_tokens=told.max_tokens,
            )  # fmt: skip
            self._asks = Comparison(oracle, told.template, told.criterion)

    def compare(self, answers: Answers, baseline: Answers) -> Verdicts:
        def ask(places: Sequence[int], first: bool) -> list[float | None]:
            prompts = [answers.row(b)["prompt"] for b in places]
            mine, theirs = ([side.texts[b] for b in places] for side in (answers, baseline))
            if first:
                return self._asks(prompts, mine, theirs)
            return [None if q is None else 1 - q for q in self._asks(prompts, theirs, mine)]

        forward_B, backward_B = both_orders(answers, baseline, ask)
        spent = {k.removeprefix("judge/"): float(v) for k, v in self._asks.drain().items()}
        return Verdicts(forward_B, backward_B, spent)


@dataclass(frozen=True)
class PoolJudge:
    """Simulated annotators: for each comparison and order one of the pool is drawn, and gives a label; a share of the
    labels is turned round.

        P(label = 1) = (1 - noise) p + noise (1 - p),   p = σ((u(mine) - u(theirs)) / temperature)

    u is the world's gold reward plus the annotator's bias. Draws follow from the seed, the prompt and both texts, so
    that another run, or another judge's order of work, gives the same labels.

    Source: Dubois et al., arXiv:2305.14387 (a pool of annotators, labels flipped with probability 1/4).
    """

    told: Annotators
    world: Any
    members: tuple[PairJudge | None, ...]

    def compare(self, answers: Answers, baseline: Answers) -> Verdicts:
        spent: dict[str, float] = {}

        def ask(places: Sequence[int], first: bool) -> list[float | None]:
            random = [
                generator(self.told.seed, "annotator", str(answers.row(b)["prompt"]), answers.texts[b],
                          baseline.texts[b], first).random(3)
                for b in places
            ]  # fmt: skip
            drawn = [int(r[0] * len(self.members)) for r in random]
            likely: dict[int, float | None] = {}
            for index, member in enumerate(self.members):
                mine = [b for b, d in zip(places, drawn, strict=True) if d == index]
                if member is None:
                    likely |= {b: self._likely(index, answers, baseline, b) for b in mine}
                elif mine:
                    said = member.compare(_some(answers, mine), _some(baseline, mine))
                    likely |= dict(zip(mine, (said.forward_B if first else said.backward_B).tolist(), strict=True))
                    for k, v in said.spent.items():
                        spent[k] = spent.get(k, 0.0) + v
            labels: list[float | None] = []
            for b, r in zip(places, random, strict=True):
                p = likely[b]
                said_better = None if p is None or math.isnan(p) else float(r[1] < p)
                turned = r[2] < self.told.noise
                labels.append(said_better if said_better is None or not turned else 1 - said_better)
            return labels

        forward_B, backward_B = both_orders(answers, baseline, ask)
        return Verdicts(forward_B, backward_B, spent)

    def _likely(self, index: int, answers: Answers, baseline: Answers, b: int) -> float:
        who, request = self.told.pool[index], answers.row(b)["request"]
        worth = [
            self.world.utility(request, side.texts[b], bool(side.ended[b]), bias=who.bias, strength=who.strength)
            for side in (answers, baseline)
        ]
        temperature = self.world.temperature if who.temperature is None else who.temperature
        gap = worth[0] - worth[1]
        return 0.5 + 0.5 * (float(np.sign(gap)) if temperature == 0 else math.tanh(0.5 * gap / temperature))


def _some(answers: Answers, places: Sequence[int]) -> Answers:
    """Some of the answers, as one to each of as many prompts."""
    return Answers([answers.row(b) for b in places], 1, [answers.texts[b] for b in places], answers.ended[list(places)])
