"""What judges say of the answers of models, as the tables that results are computed from."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from prefzoo.benchmarks.cells import cluster_of, places
from prefzoo.benchmarks.contenders import device
from prefzoo.benchmarks.judging import Answers, JudgeSpec, PairJudge, ScoreJudge, Verdicts, make_judge
from prefzoo.benchmarks.judging.pairs import Shown, both_orders
from prefzoo.benchmarks.judging.scores import finite
from prefzoo.benchmarks.results.stored import PLACES
from prefzoo.feedback import resolve_reward
from prefzoo.registry import UsageError

TASK = "compare"  # the one task of a comparison
Judges = Mapping[str, tuple[str, ScoreJudge | PairJudge]]  # name -> kind and judge


class pairwise:
    """Marks a judge that compares two answers instead of scoring one: ``f(prompts, answers_a, answers_b)`` gives
    numbers in [0, 1], 1 where A is better. It is asked in both orders; equal texts are ties, and it is not asked."""

    def __init__(self, function: Callable[[list[str], list[str], list[str]], Sequence[float]]) -> None:
        self.function = function

    def __call__(self, prompts: list[str], a: list[str], b: list[str]) -> np.ndarray:
        verdicts = np.asarray(self.function(prompts, a, b), dtype=np.float64)
        if verdicts.shape != (len(prompts),) or not ((verdicts >= 0) & (verdicts <= 1)).all():
            raise UsageError(
                f"a pairwise judge must give {len(prompts)} numbers in [0, 1]; got {verdicts.shape}: {verdicts[:5]}."
            )
        return verdicts

    def compare(self, answers: Answers, baseline: Answers) -> Verdicts:
        return Verdicts(*both_orders(answers, baseline, self._prefers))

    def _prefers(self, shown: Sequence[Shown]) -> list[float]:
        asked = ([str(s.row["prompt"]) for s in shown], [s.first.text for s in shown], [s.second.text for s in shown])
        return self(*asked).tolist()


@dataclass(frozen=True)
class Scored:
    """A judge that is a function with TRL's signature, or a reward source in memory."""

    function: Any
    name: str

    def score(self, answers: Answers) -> np.ndarray:
        assert answers.samples is not None and answers.tokenizer is not None
        scores = resolve_reward(self.function, answers.tokenizer, device())(answers.samples)
        return finite(scores.cpu().numpy().astype(np.float64), answers, f"judge {self.name!r}")


def judges_of(given: Any, cache: Path) -> Judges:
    """Name -> kind and judge; the first decides."""
    found: dict[str, tuple[str, ScoreJudge | PairJudge]] = {}
    for one in given if isinstance(given, list | tuple) else [given]:
        name, kind, judge = _judge(one, cache)
        if name in found or name in COLUMNS:
            why = "two judges have this name" if name in found else "a column of the answers has this name"
            raise UsageError(f"judge {name!r}: {why}; give it another: {{{kind}: ..., name: ...}}.")
        found[name] = kind, judge
    if not found:
        raise UsageError("judge: name at least one, such as a reward-model folder, a verifier, or length.")
    return found


def _judge(given: Any, cache: Path) -> tuple[str, str, ScoreJudge | PairJudge]:
    if isinstance(given, str | Path | Mapping):
        text = json.dumps(dict(given)) if isinstance(given, Mapping) else str(given)
        given = JudgeSpec.parse("{verifier: exact}" if text == "exact" else text)
    if isinstance(given, JudgeSpec):
        return given.name, given.kind, make_judge(given, cache=cache, device=device())
    plain = getattr(given, "function", given)
    name = getattr(plain, "__name__", type(plain).__name__)
    name = name if name.isidentifier() else "function"  # of a lambda
    return name, "function", given if isinstance(given, pairwise) else Scored(given, name)


COLUMNS = {*PLACES, "cluster", "prompt_text", "completion", "characters", "finished"}  # of the answers


def judged(found: Mapping[str, Answers], judges: Judges) -> tuple[dict[str, pa.Table], dict[str, dict[str, float]]]:
    """The answers with their scores; what judges of pairs say of every pair, seen from both sides; and what it took."""
    scores = {
        j: {n: judge.score(a) for n, a in found.items()}
        for j, (_, judge) in judges.items()
        if not isinstance(judge, PairJudge)
    }
    tables = {"rows": pa.concat_tables([_rows(n, a, {j: s[n] for j, s in scores.items()}) for n, a in found.items()])}
    said, spent = [], {}
    for j, (_, judge) in judges.items():
        if not isinstance(judge, PairJudge):
            continue
        spent[j] = dict[str, float]()
        for a, b in itertools.combinations(found, 2):
            verdicts = judge.compare(found[a], found[b])
            for unit, amount in verdicts.spent.items():
                spent[j][unit] = spent[j].get(unit, 0.0) + amount
            forward, backward = verdicts.forward_B, verdicts.backward_B
            said.append(_verdicts(j, a, b, found[a], forward, backward))
            said.append(_verdicts(j, b, a, found[a], 1 - backward, 1 - forward))
    return tables | ({"judgements": pa.concat_tables(said)} if said else {}), spent


def _rows(name: str, answers: Answers, scores: Mapping[str, np.ndarray]) -> pa.Table:
    count, of = len(answers.texts), [answers.row(b) for b in range(len(answers.texts))]
    return pa.table({
        "task": [TASK] * count, "method": [name] * count, "run": [0] * count, "seed": [0] * count,
        **places(list(answers.rows), answers.per_prompt), **scores,  # type: ignore[arg-type]
        "characters": [len(t) for t in answers.texts], "finished": np.asarray(answers.ended),
        "cluster": [cluster_of(r) for r in of], "prompt_text": [str(r["prompt"]) for r in of],
        "completion": list(answers.texts),
    })  # fmt: skip


def _verdicts(judge: str, a: str, b: str, answers: Answers, forward: np.ndarray, backward: np.ndarray) -> pa.Table:
    count = len(forward)
    return pa.table({
        "task": [TASK] * count, "method": [a] * count, "run": [0] * count, "judge": [judge] * count,
        "against": [b] * count, **places(list(answers.rows), answers.per_prompt),  # type: ignore[arg-type]
        "forward": forward, "backward": backward,
    })  # fmt: skip
