"""Judges of answers: those that score one answer, and those that compare two, in both orders.

A judge is data first (:class:`JudgeSpec`), so that a suite can be checked before anything runs; :func:`make_judge`
makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefzoo.benchmarks.judging.answers import Answers, PairJudge, ScoreJudge, Verdicts
from prefzoo.benchmarks.judging.spec import Annotators, JudgeSpec, Llm
from prefzoo.registry import UsageError

__all__ = [
    "Annotators", "Answers", "JudgeSpec", "Llm", "PairJudge", "ScoreJudge", "Verdicts", "make_judge",
]  # fmt: skip


def make_judge(
    spec: JudgeSpec,
    *,
    world: Any = None,
    tokenizer: Any = None,
    inputs: Mapping[str, Path] | None = None,
    cache: Path = Path(".prefzoo-judge"),
    device: str = "cpu",
) -> ScoreJudge | PairJudge:
    """The judge that a spec says.

    Args:
        world: of the task, for ``gold``, ``exact`` and simulated annotators.
        tokenizer: of the policies, for judges that read their tokens.
        inputs: the suite's artifacts by name.
        cache: a folder for the verdicts of endpoints.
        device: of models.

    Raises:
        UsageError: the judge needs something that is not there.
    """
    from prefzoo.benchmarks.judging import pairs, people, scores

    value = spec.value
    if spec.worldly and world is None:
        raise UsageError(f"judge {spec.name!r} knows the truth of an embedded world, and this task has none.")
    if isinstance(value, Annotators):
        members = tuple(None if a.llm is None else pairs.LlmJudge(a.llm, cache, device) for a in value.pool)
        return pairs.PoolJudge(value, world, members)
    if isinstance(value, Llm):
        return pairs.LlmJudge(value, cache, device)
    if spec.kind in ("gold", "exact"):
        return scores.Truth(world, spec.kind)
    if spec.kind in ("reward_model", "held_out"):
        if value is not None:
            return scores.Model(value, device, own_tokens=True)
        if spec.kind not in (inputs or {}):
            raise UsageError(f"judge {spec.name!r}: the task makes no such reward model (feedback.reward_model).")
        from prefzoo.benchmarks.materials import reward_model_folder

        return scores.Model(reward_model_folder((inputs or {})[spec.kind]), device)
    if spec.kind == "verifier":
        return scores.Function(str(value), device)
    return scores.rule(str(value), device) if spec.kind == "rule" else people.HumanJudge(str(value))
