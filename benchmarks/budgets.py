"""The same budget for every method: how many steps it is, when it is spent, and what was spent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefzoo.algorithm import Algorithm, algorithm_entry, create_algorithm
from prefzoo.parts.roles import REFERENCE
from prefzoo.parts.source import Rollouts
from prefzoo.training import TrainConfig

if TYPE_CHECKING:
    from prefzoo.benchmarks.suites.spec import Budget, Method

SIDES = {"pairs": 2, "rankings": 4}  # completions of a row; of a ranking, as many as ours have at least


def fitted(
    budget: Budget | None, method: Method, options: dict[str, Any], training: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and training of a method at a budget whose steps can be counted beforehand: prompts, completions,
    optimizer steps. The other units end runs (:class:`Meter`); their steps are estimated by :func:`steps_of`.

    What a method says itself (``max_steps``) is kept. What the task's recipe says gives way, for it would leave some
    methods with less than the budget; a budget of seconds keeps it, as a bound.
    """
    assert method.algorithm is not None
    made = create_algorithm(method.algorithm, **options)
    if budget is None or not made.stages:
        return options, training
    own = method.split_options[0]
    sampled = isinstance(made.stages[0].source, Rollouts)
    if budget.of == "rollouts" and not sampled:
        return options, training
    if budget.per_step is not None and sampled:
        each = completions_each(made)
        known = algorithm_entry(method.algorithm).options
        # Where samples are drawn in rounds, eight times as many a round.
        for name, completions in (("prompts_per_step", budget.per_step), ("prompts_per_round", 8 * budget.per_step)):
            if name in known and name not in own:
                options = {**options, name: max(1, completions // each)}
        made = create_algorithm(method.algorithm, **options)
    if method.split_options[1].get("max_steps") is not None or budget.unit == "seconds":
        return options, training
    training = {k: v for k, v in training.items() if k != "max_steps"}
    step = per_step(made, training, 0.0)
    if not step.get(budget.unit):
        return options, training
    return options, {**training, "max_steps": max(1, round(budget.amount / step[budget.unit]))}


def completions_each(made: Algorithm) -> int:
    """Completions of a prompt that is drawn, or of a row that is read."""
    source = made.stages[0].source
    return source.completions if isinstance(source, Rollouts) else SIDES.get(made.data, 1)


def per_step(made: Algorithm, training: Mapping[str, Any], tokens: float) -> dict[str, float]:
    """What a step is expected to spend of each unit that needs no measuring, and of tokens where ``tokens`` says how
    long an answer is."""
    stage = made.stages[0]
    rollouts = isinstance(stage.source, Rollouts)
    prompts = stage.schedule.prompts if rollouts else training.get("rows_per_step", TrainConfig().rows_per_step)
    completions = prompts * completions_each(made)
    spent = {"prompts": float(prompts), "completions": float(completions)}
    schedule = stage.schedule
    cuts = math.ceil(completions / schedule.minibatch_rows) if schedule.minibatch_rows else schedule.minibatches
    spent["optimizer_steps"] = float(schedule.inner_epochs * cuts if rollouts else 1)
    if tokens:
        epochs = schedule.inner_epochs if rollouts else 1
        spent |= {"generated_tokens": rollouts * completions * tokens, "trained_tokens": completions * tokens * epochs}
    return spent


def steps_of(
    budget: Budget, made: Algorithm, training: Mapping[str, Any], tokens: float, parameters: int
) -> int | None:
    """Steps that a budget of tokens or FLOPs is expected to last, for the decay of the learning rate; None: unknown."""
    if not made.stages:
        return None
    step = per_step(made, training, tokens)
    if budget.unit == "flops":
        step["flops"] = flops(step, parameters, REFERENCE in made.needs)
    each = step.get(budget.unit)
    return max(1, math.ceil(budget.amount / each)) if each else None


def flops(spent: Mapping[str, float], parameters: int, reference: bool) -> float:
    """Floating-point operations, estimated: 2 a parameter for a generated token, 6 for a trained one, 2 more where a
    reference is asked."""
    trained = 8 if reference else 6
    return parameters * (2 * spent.get("generated_tokens", 0) + trained * spent.get("trained_tokens", 0))


@dataclass(frozen=True)
class Meter:
    """What a run has spent, in every unit."""

    made: Algorithm
    training: Mapping[str, Any]
    parameters: int

    def read(self, spent: Mapping[str, float]) -> dict[str, float]:
        """A run's ``spent`` with prompts and completions of data counted too, and FLOPs."""
        found = dict(spent)
        if not self.made.stages:  # it answers otherwise and trains nothing
            return found | {"completions": 0.0, "flops": 0.0}
        if not isinstance(self.made.stages[0].source, Rollouts):
            rows = self.training.get("rows_per_step", TrainConfig().rows_per_step)
            found["prompts"] = found["optimizer_steps"] * rows
        found["completions"] = found["prompts"] * completions_each(self.made)
        found["flops"] = flops(found, self.parameters, REFERENCE in self.made.needs)
        return found

    def reached(self, budget: Budget | None, spent: Mapping[str, float]) -> bool:
        """Whether the budget is spent."""
        if budget is None or not self.made.stages:
            return False
        if budget.of == "rollouts" and not isinstance(self.made.stages[0].source, Rollouts):
            return False
        return self.read(spent)[budget.unit] >= budget.amount
