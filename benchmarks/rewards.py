"""Who says what is good in a suite: the proxy, the exact check, and what else a composition asks for in its parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from prefzoo.algorithm import Algorithm
from prefzoo.data.samples import Ragged, Samples
from prefzoo.feedback import Judge, ModelReward, RewardSource, Rules, resolve_reward
from prefzoo.models.load import load_scorer
from prefzoo.parts.feedback import Objectives, Verifier
from prefzoo.parts.roles import REWARD
from prefzoo.registry import UsageError
from prefzoo.worlds.requests import FLATTERIES, RUDE_OPENINGS


def reward_of(
    made: Algorithm, proxy: str | None, world: Any, tokenizer: PreTrainedTokenizerBase, verifier: str | None = None
) -> Any:
    """What is given as ``reward``: the exact check (a world's, or ``verifier``) to those that ask for one, and where
    there is nothing else; else the first of these that the parts accept: the proxy, the proxy as a judge of two
    answers, the proxy with rules.

    Of several objectives the proxy is the first, and the flattery that the annotators like is a cost.
    """
    asks = [stage.feedback for stage in made.stages if REWARD in stage.feedback.needs]
    check = world.exact_reward if world is not None else verifier
    if check is not None and (proxy is None or any(isinstance(f, Verifier) for f in asks)):
        return check
    assert proxy is not None, "the plan leaves out methods that nobody could reward"
    many = [f.count or 2 for f in asks if isinstance(f, Objectives)]
    if many:
        return [proxy, *[Flattery(world)] * (max(many) - 1)] if world is not None else [proxy] * max(many)
    refused: UsageError | None = None
    for make in (lambda: proxy, lambda: proxy_judge(proxy, tokenizer), lambda: [proxy, manners()]):
        given = make()
        try:
            refuse(made, resolve_reward(given, tokenizer))
            return given
        except UsageError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def refuse(made: Algorithm, source: RewardSource) -> None:
    """Raise where a part that is judged by the run's reward refuses this one."""
    for stage in made.stages:
        check: Callable[[RewardSource], None] | None = getattr(stage.feedback, "check", None)
        if REWARD in stage.feedback.needs and check is not None:
            check(source)
        if REWARD in stage.trains:  # later stages are judged by what this one trains
            return


def proxy_judge(proxy: str, tokenizer: PreTrainedTokenizerBase) -> Judge:
    """The proxy as a judge of two answers: σ of the difference of their scores. No order sways it."""
    model = ModelReward(load_scorer(proxy))
    end: int = tokenizer.eos_token_id  # type: ignore[assignment]

    def scores(prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
        asked = Ragged.of(tokenizer(list(prompts))["input_ids"])
        words = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
        ended = Ragged.of([[*ids, end] for ids in words])  # type: ignore[misc]
        return model(Samples("completions", asked, ended, np.arange(len(prompts)), extra={"prompt": list(prompts)}))

    def proxy_prefers(prompts: list[str], first: list[str], second: list[str]) -> list[float]:
        return torch.sigmoid(scores(prompts, first) - scores(prompts, second)).tolist()

    return Judge(proxy_prefers, both_orders=False)


def manners() -> Rules:
    """Rules of the preference world: answers that flatter or are rude break them."""

    def found(phrases: Sequence[str]) -> dict[str, Any]:
        return {"pattern": "|".join(map(re.escape, phrases)), "violation": True}

    return Rules({"flatters": found(FLATTERIES), "is rude": found(RUDE_OPENINGS)})


class Flattery:
    """A cost: the phrases of flattery in an answer, which the annotators like and the truth does not."""

    def __init__(self, world: Any) -> None:
        self._world = world
        self.__name__ = "flattery"

    def __call__(self, *, completions: list[str], request: list[Any], **columns: Any) -> list[float]:
        return [self._world.parts(r, c, True)["flattery"] for r, c in zip(request, completions, strict=True)]
