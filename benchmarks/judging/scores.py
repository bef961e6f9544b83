"""Judges that score single answers: the truth of a world, reward models, verifiers, rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefzoo.benchmarks.judging.answers import Answers
from prefzoo.feedback import resolve_reward
from prefzoo.models.folders import run_model
from prefzoo.models.load import load_tokenizer
from prefzoo.registry import UsageError


@dataclass(frozen=True)
class Truth:
    """A world's gold reward, or its exact check."""

    world: Any
    which: str

    def score(self, answers: Answers) -> np.ndarray:
        judged = getattr(self.world, self.which)
        texts = zip(answers.texts, answers.ended, strict=True)
        return np.array([float(judged(answers.row(b)["request"], t, bool(e))) for b, (t, e) in enumerate(texts)])


@dataclass(frozen=True)
class Model:
    """A reward model. It reads the policy's tokens, as those of a suite do, or, ``own_tokens``, the text."""

    folder: str
    device: str = "cpu"
    own_tokens: bool = False

    def score(self, answers: Answers) -> np.ndarray:
        if self.own_tokens or answers.samples is None or answers.tokenizer is None:
            own = load_tokenizer(run_model(self.folder))
            answers = Answers.of_texts(answers.rows, answers.texts, own, answers.ended)
        assert answers.samples is not None and answers.tokenizer is not None
        scores = resolve_reward(self.folder, answers.tokenizer, self.device)(answers.samples)
        return finite(scores.cpu().numpy().astype(np.float64), answers, f"reward model {self.folder!r}")


@dataclass(frozen=True)
class Function:
    """A function with TRL's signature: a verifier by name, FILE.py:function, rules of a YAML file."""

    source: str
    device: str = "cpu"

    def score(self, answers: Answers) -> np.ndarray:
        if answers.samples is None or answers.tokenizer is None:
            raise UsageError(f"judge {self.source!r} reads tokens, and there is no tokenizer: name a model's folder.")
        scores = resolve_reward(self.source, answers.tokenizer, self.device)(answers.samples)
        return finite(scores.cpu().numpy().astype(np.float64), answers, f"judge {self.source!r}")


@dataclass(frozen=True)
class Text:
    """A rule that reads the text alone."""

    rule: Callable[[str], float]

    def score(self, answers: Answers) -> np.ndarray:
        return np.array([float(self.rule(text)) for text in answers.texts])


TEXT_RULES: dict[str, Callable[[str], float]] = {"length": len, "brevity": lambda text: -len(text)}


def rule(value: str, device: str) -> Text | Function:
    """``length`` (more characters win), ``brevity``, a YAML file of rules, or FILE.py:function."""
    if value in TEXT_RULES:
        return Text(TEXT_RULES[value])
    return Function(f"rules({value})" if Path(value).suffix in (".yaml", ".yml") else value, device)


def finite(scores: np.ndarray, answers: Answers, who: str) -> np.ndarray:
    """Scores without holes: an answer that a judge says nothing about cannot be left out of a comparison."""
    missing = [b for b, s in enumerate(scores) if not math.isfinite(s)]
    if missing:
        b = missing[0]
        prompt = str(answers.row(b)["prompt"])[:60]
        raise UsageError(
            f"{who} gave no score for {len(missing)} of {len(scores)} answers, the first to prompt "
            f"{b // answers.per_prompt} ({prompt!r}); it must judge every one."
        )
    return scores
