"""Process reward models as rewards: the probabilities that the steps of a completion are right, as one score."""

from __future__ import annotations

import bisect
import copy
import itertools
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefzoo.data.samples import Samples
from prefzoo.feedback.rewards import ModelReward, RewardSource, resolve_reward
from prefzoo.feedback.sources import SOURCES
from prefzoo.models.reference import token_scores
from prefzoo.models.roles import Scorer
from prefzoo.registry import UsageError

Reduce = Literal["product", "minimum", "mean", "last"]


class StepReward(RewardSource):
    """The score of a completion from the probabilities that its steps are right.

        R = prod_t sigmoid(z_t), or min_t, mean_t, or of the last step alone;   t: the last token of a step

    A step ends with the separator, or with the completion, at the token where training puts its label. A completion
    without tokens has no score.

    Args:
        model: what ``process_reward_model`` made: a run, a folder or a reward model in memory, with the policy's
            tokenizer.
        reduce: see above. The product is the paper's: the probability that every step is right. The minimum does not
            punish long solutions.
        separator: text that ends a step, as in the data that the model was trained on.

    No KL enters here. Metrics: ``rewards/steps``, the mean number of steps.

    Source: Lightman et al., Let's Verify Step by Step, arXiv:2305.20050 (product); Wang et al., Math-Shepherd,
    arXiv:2312.08935 (minimum).

    Example::

        prefzoo train grpo ... --reward "steps(runs/prm, reduce=minimum)"
    """

    verifies = False

    def __init__(self, model: Any, *, reduce: Reduce = "product", separator: str = "\n") -> None:
        if reduce not in ("product", "minimum", "mean", "last"):
            raise UsageError(f"steps, option 'reduce': expected product, minimum, mean or last, got {reduce!r}.")
        if not separator:
            raise UsageError("steps, option 'separator': expected a text, such as a line break, got nothing.")
        self.model = model
        self.reduce = reduce
        self.separator = separator
        self.name = Path(model).name if isinstance(model, str | Path) else "steps"
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._counts: list[int] = []

    def bind(self, tokenizer: PreTrainedTokenizerBase, device: torch.device | str = "cpu") -> StepReward:
        reward = resolve_reward(self.model, tokenizer, device)
        if not isinstance(reward, ModelReward):
            raise UsageError(
                f"steps: {self.name!r} is no reward model that reads the policy's tokens, so none of steps."
            )
        bound = copy.copy(self)
        bound.model, bound.name, bound._tokenizer, bound._counts = reward.scorer, reward.name, tokenizer, []
        return bound

    def __call__(self, samples: Samples) -> Tensor:
        scorer, tokenizer = self.model, self._tokenizer
        if not isinstance(scorer, Scorer) or tokenizer is None:
            raise UsageError("steps: not bound to a tokenizer yet; call bind(tokenizer) first.")
        device = scorer.head.weight.device
        steps_C = token_scores(lambda tree: scorer(tree, steps=True).steps_C, samples, 16_384, device, scorer.packed)
        scores_B = torch.full((len(samples.completions),), torch.nan)
        for b, ends in enumerate(self.ends(samples)):
            if ends:
                p = steps_C[int(samples.completions.offsets[b]) + torch.tensor(ends)].sigmoid()
                kinds = {"product": p.prod(), "minimum": p.min(), "mean": p.mean(), "last": p[-1]}
                scores_B[b] = kinds[self.reduce]
                self._counts.append(len(ends))
        return scores_B

    def ends(self, samples: Samples) -> list[list[int]]:
        """The places of the last tokens of the steps of each completion."""
        assert self._tokenizer is not None
        out = []
        for b in range(len(samples.completions)):
            ids = samples.completions[b].tolist()
            pieces = self._tokenizer.batch_decode([[i] for i in ids], skip_special_tokens=True)
            starts, text = [0, *itertools.accumulate(map(len, pieces))][:-1], "".join(pieces)
            closed: list[int] = []  # where in the text the steps end, but for the last
            place = text.find(self.separator)
            while place >= 0:
                end = place + len(self.separator)
                if not text[closed[-1] if closed else 0 : place].strip():  # more of the same separator
                    closed = closed[:-1]
                closed.append(end)
                place = text.find(self.separator, end)
            places = {bisect.bisect_left(starts, end) - 1 for end in closed if text[end:].strip()}
            out.append(sorted({*places, len(ids) - 1}) if ids else [])
        return out

    def drain(self) -> tuple[dict[str, float], dict[str, list[Any]]]:
        counts, self._counts = self._counts, []
        return ({"rewards/steps": sum(counts) / len(counts)} if counts else {}), {}


@SOURCES.register
def steps(model: Any, *, reduce: Reduce = "product", separator: str = "\n") -> StepReward:
    """A process reward model as a reward: ``steps(runs/prm, reduce=minimum)``. See :class:`StepReward`."""
    return StepReward(model, reduce=reduce, separator=separator)
