"""``compare``: models that exist already, on prompts, by a judge. It trains nothing."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefzoo.benchmarks import statistics
from prefzoo.data.formats import convert, load_dataset
from prefzoo.data.samples import Samples
from prefzoo.data.tokens import encode_prompts
from prefzoo.feedback import resolve_reward
from prefzoo.generation import sample, texts
from prefzoo.models.causal import open_config
from prefzoo.models.folders import run_model
from prefzoo.models.load import load_tokenizer
from prefzoo.registry import UsageError
from prefzoo.rollout import Sampling
from prefzoo.training import Run
from prefzoo.training.run import load_run_policy

PairJudge = Callable[[list[str], list[str], list[str]], Sequence[float]]


@dataclass(frozen=True)
class Comparison:
    """Who wins against whom: for every pair a win rate of A over B with its interval, verdicts by Holm."""

    names: tuple[str, ...]
    pairs: list[dict[str, Any]]
    answers: Mapping[str, list[str]] = field(repr=False)
    left_out: int = 0  # prompts that leave a model no room for an answer

    def __str__(self) -> str:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        console = Console(file=io.StringIO(), width=110, force_terminal=False, markup=False, emoji=False)
        table = Table("A", "B", "A wins, %", "p (Holm)", "ties, %", "order flips, %", "verdict on A", box=SIMPLE_HEAD)
        for p in self.pairs:
            w = p["win"]
            interval = f"{100 * w['estimate']:.1f} [{100 * w['ci'][0]:.1f}, {100 * w['ci'][1]:.1f}]"
            flips = "–" if p["order_flips"] is None else f"{100 * p['order_flips']:.1f}"
            table.add_row(p["a"], p["b"], interval, f"{p['p_holm']:.2g}", f"{100 * p['ties']:.1f}", flips, p["verdict"])
        console.print(table)
        if self.left_out:
            console.print(f"{self.left_out} prompts left out: too long for one of the models with its answer.")
        return console.file.getvalue()  # type: ignore[attr-defined]


def compare(
    models: Mapping[str, Any] | Sequence[Any],
    *,
    prompts: Any,
    judge: Any,
    samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 128,
    seed: int = 0,
) -> Comparison:
    """Compare finished models or runs on the same prompts.

    Args:
        models: name -> folder of a model or run, or a :class:`prefzoo.Run`; a list is named by its folders.
        prompts: a data set of any type; its prompts are used, each once.
        judge: scores single answers: a reward function with TRL's signature, a verifier's name, a reward-model folder.
            Or compares two: ``pairwise(f)`` with ``f(prompts, answers_a, answers_b)`` giving numbers in [0, 1], 1 where
            A is better; it is asked in both orders, and the two verdicts are averaged before any statistics.
        samples: answers per prompt, averaged within the prompt.
        temperature, max_new_tokens, seed: how answers are sampled; the same random numbers for every model.

    One run per model: the verdicts are about these models, not about the methods that made them.
    """
    named = dict(models) if isinstance(models, Mapping) else _named(models)
    if len(named) < 2:
        raise UsageError("compare needs at least two models.")
    found = convert(load_dataset(prompts), "prompt").rows
    rows = list({json.dumps(r, sort_keys=True, default=str): r for r in found}.values())
    found = rows
    for model in named.values():
        rows = _answerable(model, rows, max_new_tokens)
    if not rows:
        raise UsageError(f"none of the {len(found)} prompts leaves every model room for {max_new_tokens} new tokens.")
    answered = {
        n: _answer(m, rows, samples, Sampling(temperature, max_new_tokens=max_new_tokens), seed)
        for n, m in named.items()
    }
    words = {n: texts(s, t) for n, (s, t) in answered.items()}
    scores = None if isinstance(judge, pairwise) else {n: _score(judge, *answered[n]) for n in named}
    asked = [str(r["prompt"]) for r in rows for _ in range(samples)]
    clusters = [str(r["prompt"]) for r in rows]
    pairs, tests = [], []
    for a, b in itertools.combinations(named, 2):
        flips = None
        if isinstance(judge, pairwise):
            forward, backward = judge(asked, words[a], words[b]), 1 - judge(asked, words[b], words[a])
            wins, flips = (forward + backward) / 2, float(((forward - 0.5) * (backward - 0.5) < 0).mean())
        else:
            assert scores is not None
            wins = statistics.win(scores[a], scores[b])
        table = wins.reshape(1, len(rows), samples).mean(-1)
        win = statistics.win_rate(table, clusters=clusters)
        tests.append((table, win))
        pairs.append({"a": a, "b": b, "win": win.to_dict(), "ties": float((wins == 0.5).mean()), "order_flips": flips})
    adjusted = statistics.holm([win.p if win.p is not None else 1.0 for _, win in tests])
    for row, (table, _), p in zip(pairs, tests, adjusted, strict=True):
        gap = statistics.difference(table, 1 - table, paired_seeds=True, clusters=clusters)
        row |= {"p_holm": float(p), "verdict": statistics.verdict(gap, float(p))}
    return Comparison(tuple(named), pairs, words, left_out=len(found) - len(rows))


class pairwise:
    """Marks a judge that compares two answers instead of scoring one."""

    def __init__(self, function: PairJudge) -> None:
        self.function = function

    def __call__(self, prompts: list[str], a: list[str], b: list[str]) -> np.ndarray:
        verdicts = np.asarray(self.function(prompts, a, b), dtype=np.float64)
        if verdicts.shape != (len(prompts),) or not ((verdicts >= 0) & (verdicts <= 1)).all():
            raise UsageError(
                f"a pairwise judge must give {len(prompts)} numbers in [0, 1]; got {verdicts.shape}: {verdicts[:5]}."
            )
        return verdicts


def _named(models: Sequence[Any]) -> dict[str, Any]:
    names = [_name(m) for m in models]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two of the models are called {name!r}; give a mapping of names to models.")
    return dict(zip(names, models, strict=True))


def _name(model: Any) -> str:
    if isinstance(model, Run):
        return model.algorithm
    path = Path(model)
    return path.parent.name if path.name == "final" else path.name


def _answerable(model: Any, rows: list[dict[str, Any]], max_new_tokens: int) -> list[dict[str, Any]]:
    """The rows whose prompts leave the model room for an answer, found without loading its weights."""
    if isinstance(model, Run):
        assert model.policy is not None, "compare needs policies, not reward models"
        tokenizer, config = model.tokenizer, model.policy.model.config
    else:
        folder = run_model(model)
        tokenizer, config = load_tokenizer(folder), open_config(folder)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return rows
    ids = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    return [row for row, prompt in zip(rows, ids, strict=True) if len(prompt) + max_new_tokens <= positions]


def _answer(model: Any, rows: list[dict[str, Any]], n: int, sampling: Sampling, seed: int) -> tuple[Samples, Any]:
    if isinstance(model, Run):
        assert model.policy is not None, "compare needs policies, not reward models"
        policy, tokenizer = model.policy, model.tokenizer
    else:
        policy, tokenizer = load_run_policy(model)
        policy.to(_device())
    return sample(policy, tokenizer, rows, n, sampling, seed), tokenizer


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _score(judge: Any, answers: Samples, tokenizer: Any) -> np.ndarray:
    scores = resolve_reward(judge, tokenizer, _device())(answers).numpy().astype(np.float64)
    if np.isnan(scores).any():
        raise UsageError(f"the judge gave no score for {int(np.isnan(scores).sum())} answers; it must judge every one.")
    return scores
