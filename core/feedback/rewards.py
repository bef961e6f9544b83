"""What the run's ``reward=`` may be, behind one interface: samples in, one score per completion out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefzoo.data.samples import Samples
from prefzoo.feedback.verifiers import VERIFIERS
from prefzoo.models.load import load_scorer, load_tokenizer
from prefzoo.models.roles import Scorer
from prefzoo.models.tree import packed
from prefzoo.registry import UsageError, suggest

RewardFunction = Callable[..., list[float | None]]


class RewardSource(Protocol):
    """Scores completions. ``verifies``: it checks (a function, a verifier) rather than judges (a reward model)."""

    name: str
    verifies: bool

    def __call__(self, samples: Samples) -> Tensor:
        """One score per completion (B,), NaN where there is none."""
        ...


class FunctionReward:
    """A function with TRL's signature: keywords ``prompts``, ``completions``, ``completion_ids`` and every other
    column of the data as lists, one item per completion; it returns a list of float or None."""

    verifies = True

    def __init__(self, function: RewardFunction, tokenizer: PreTrainedTokenizerBase) -> None:
        self.function = function
        self.tokenizer = tokenizer
        self.name = getattr(function, "__name__", type(function).__name__)
        parameters = inspect.signature(function).parameters.values()
        # TRL passes everything to everybody; a function without **kwargs gets the columns that it names.
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._accepted = None if takes_all else {p.name for p in parameters}

    def __call__(self, samples: Samples) -> Tensor:
        count = len(samples.completions)
        ids = [samples.completions[i].tolist() for i in range(count)]
        per_prompt = {k: v for k, v in samples.extra.items() if k != "prompt"}
        keywords: dict[str, Any] = {
            "prompts": [samples.extra["prompt"][p] for p in samples.prompt_B],
            "completions": self.tokenizer.batch_decode(ids, skip_special_tokens=True),
            "completion_ids": ids,
            **{k: [v[p] for p in samples.prompt_B] for k, v in per_prompt.items()},
        }
        if keywords["prompts"] and not isinstance(keywords["prompts"][0], str):  # messages in, messages out
            keywords["completions"] = [[{"role": "assistant", "content": c}] for c in keywords["completions"]]
        if self._accepted is not None:
            keywords = {k: v for k, v in keywords.items() if k in self._accepted}
        result = self.function(**keywords)
        return torch.tensor(self._checked(result, count), dtype=torch.float32)

    def _checked(self, result: Any, count: int) -> list[float]:
        if inspect.isawaitable(result):
            getattr(result, "close", lambda: None)()  # or Python warns that it was never awaited
            raise UsageError(
                f"reward function {self.name!r} is asynchronous; wrap it: def f(**k): return asyncio.run(...)."
            )
        if isinstance(result, Tensor | np.ndarray):
            result = result.tolist()
        if not isinstance(result, Sequence) or isinstance(result, str) or len(result) != count:
            got = f"{len(result)} values" if isinstance(result, Sequence) else type(result).__name__
            raise UsageError(
                f"reward function {self.name!r} must return a list of {count} numbers, one per completion; got {got}."
            )
        out = []
        for index, value in enumerate(result):
            if value is None:
                out.append(math.nan)
                continue
            try:
                if isinstance(value, str):  # float() would read it, but a text is a mistake
                    raise TypeError
                out.append(float(value))
            except (TypeError, ValueError):
                raise UsageError(
                    f"reward function {self.name!r}: value {index} is {value!r}, not a number or None."
                ) from None
            if not math.isfinite(out[-1]):
                raise UsageError(
                    f"reward function {self.name!r}: value {index} is {value!r}; return None where there is no reward."
                )
        return out


class ModelReward:
    """A reward model that shares the policy's tokenizer: it reads the same ids, nothing is tokenised again."""

    verifies = False

    def __init__(self, scorer: Scorer, name: str = "reward_model", token_budget: int = 16_384) -> None:
        self.scorer = scorer.requires_grad_(False).eval()
        self.name = name
        self.token_budget = token_budget

    @torch.no_grad()
    def __call__(self, samples: Samples) -> Tensor:
        scores_B = torch.zeros(len(samples.completions))
        for completions, tree in packed(samples, self.token_budget, self.scorer.head.weight.device):
            scores_B[torch.from_numpy(completions)] = self.scorer(tree).rewards_B.float().cpu()
        return scores_B


class SumReward:
    """The sum of several sources; a completion for which one says None gets the sum of the others."""

    def __init__(self, parts: Sequence[RewardSource]) -> None:
        self.parts = parts
        self.name = "+".join(p.name for p in parts)
        self.verifies = all(p.verifies for p in parts)

    def __call__(self, samples: Samples) -> Tensor:
        scores_KB = torch.stack([p(samples) for p in self.parts])
        return torch.where(scores_KB.isnan().all(0), torch.nan, scores_KB.nan_to_num().sum(0))


def resolve_reward(reward: Any, tokenizer: PreTrainedTokenizerBase, device: torch.device | str = "cpu") -> RewardSource:
    """A source from what the user gave: a function, a verifier's name, a reward-model folder, or a list of them."""
    if isinstance(reward, list | tuple):
        return SumReward([resolve_reward(r, tokenizer, device) for r in reward])
    if isinstance(reward, Scorer):
        return ModelReward(reward.to(device))
    if isinstance(reward, FunctionReward | ModelReward | SumReward):
        return reward
    if isinstance(reward, str) and reward in VERIFIERS:
        return FunctionReward(VERIFIERS.entry(reward).function, tokenizer)
    if isinstance(reward, str | Path):
        folder = Path(reward)
        if not folder.is_dir():
            known = VERIFIERS.names()
            raise UsageError(
                f"reward {str(reward)!r} is neither a reward-model folder nor a verifier{suggest(str(reward), known)} "
                f"Verifiers: {', '.join(known)}."
            )
        scorer = load_scorer(folder)
        if load_tokenizer(folder).get_vocab() != tokenizer.get_vocab():  # it reads the policy's ids
            raise UsageError(
                f"reward model {str(reward)!r} has another tokenizer than the policy; train one on this model."
            )
        return ModelReward(scorer.to(device), name=folder.name)
    if callable(reward):
        return FunctionReward(reward, tokenizer)
    raise UsageError(
        f"reward: expected a function, a verifier's name or a reward-model folder, got {type(reward).__name__}."
    )
