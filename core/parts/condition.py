"""Conditions: words before a prompt that say how good the answer is to be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefzoo.data.samples import Ragged, Samples
from prefzoo.parts.roles import Roles
from prefzoo.registry import UsageError


@dataclass(frozen=True)
class Condition:
    """Control words before the prompt, one for each level of quality, the best last.

        train on log pi(y | words[level(x, y)], x);   sample y ~ pi(. | words[-1], x)

    The words stand behind the prompt's BOS token, if it has one, and carry no loss. Rewards, and the reference's
    log-probabilities of rollouts, are of the prompt without them. They are encoded by themselves, so they should end
    where the tokenizer cuts: with a space or a line break. The user's tokenizer may know them as tokens of their own
    (``added_tokens=``).

    ``plain_steps``: steps at the beginning that sample without words, which a start model does not know.

    Of rollouts the level is the column ``level`` of the credit's samples. Of rows of a data set it is that column, or
    the label of unpaired rows (two words), or the quantile of the rows' scores among all of them.
    """

    words: tuple[str, ...]
    plain_steps: int = 0

    needs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if len(self.words) < 2 or len(set(self.words)) < len(self.words) or not all(self.words):
            raise UsageError(f"Condition: give at least two different words, the best last; got {self.words}.")

    def best(self, prompts: Samples, roles: Roles) -> Samples:
        """The prompts behind the word of the best level: what is sampled from."""
        if roles.step < self.plain_steps:
            return prompts
        return replace(prompts, prompts=put_before(prompts.prompts, self._ids(roles)[-1], roles.bos))

    def marked(self, samples: Samples, roles: Roles) -> Samples:
        """Each row behind the word of its own level (column ``level``): what is trained on."""
        level_B = samples.columns["level"].numpy()
        if len(level_B) and not 0 <= level_B.min() <= level_B.max() < len(self.words):
            raise UsageError(
                f"Condition: levels go from {level_B.min()} to {level_B.max()}, but there are {len(self.words)} words."
            )
        ids = self._ids(roles)
        pairs, prompt_B = np.unique(np.stack([samples.prompt_B, level_B], 1), axis=0, return_inverse=True)
        parts = [put_before(samples.prompts.take([p]), ids[level], roles.bos) for p, level in pairs]
        return replace(
            samples, prompts=Ragged.concatenate(parts) if parts else samples.prompts, prompt_B=prompt_B.reshape(-1),
            extra={k: [values[p] for p, _ in pairs] for k, values in samples.extra.items()},
        )  # fmt: skip

    def of_rows(self, samples: Samples, roles: Roles) -> Samples:
        """Rows of a data set behind the words of their labels or scores."""
        columns = samples.columns
        if "level" in columns:
            level_B = columns["level"].long()
        elif "desirable" in columns:
            if len(self.words) != 2:
                raise UsageError(f"Condition: labels are bad or good, so there are two words; got {self.words}.")
            level_B = columns["desirable"].long()
        elif "score" in columns:
            level_B = quantile_levels(columns["score"], len(self.words))
        else:
            raise UsageError("Condition: these rows have no label and no score to choose the word by.")
        return self.marked(replace(samples, columns={**columns, "level": level_B}), roles)

    def room(self, tokenizer: Any) -> int:
        """Tokens of the longest word."""
        return max(len(ids) for ids in tokenizer(list(self.words), add_special_tokens=False)["input_ids"])

    def _ids(self, roles: Roles) -> list[np.ndarray]:
        ids = [roles.encode(word) for word in self.words]
        if len({tuple(i) for i in ids}) < len(ids):
            raise UsageError(
                f"Condition: to this tokenizer some of the words {', '.join(self.words)} are the same tokens; choose "
                "others, or add them (added_tokens=)."
            )
        return ids


def put_before(prompts: Ragged, ids: np.ndarray, bos: int | None) -> Ragged:
    """Every prompt with these ids before it, but behind its BOS token.

    >>> put_before(Ragged.of([[1, 5, 6], [7]]), np.array([8, 9]), bos=1).flat.tolist()
    [1, 8, 9, 5, 6, 8, 9, 7]
    """
    first = [int(len(p) > 0 and p[0] == bos) for p in (prompts[i] for i in range(len(prompts)))]
    return Ragged.of(np.concatenate([prompts[i][:b], ids, prompts[i][b:]]) for i, b in enumerate(first))


def quantile_levels(scores_B: Tensor, levels: int) -> Tensor:
    """The quantile of each score among all, from 0 to levels - 1, (B,); equal scores have the same, the upper one.

        level_i = ceil(levels |{j : s_j <= s_i}| / B) - 1

    So the best score always has the best level. A missing score (NaN) is refused.

    >>> quantile_levels(torch.tensor([0.0, 0.0, 1.0, 3.0]), 4).tolist()
    [1, 1, 2, 3]
    """
    if bool(scores_B.isnan().any()):
        raise UsageError("quantiles of scores: some completions have none.")
    sorted_B = scores_B.sort().values
    upto_B = torch.searchsorted(sorted_B, scores_B.contiguous(), right=True)
    return -(-levels * upto_B // len(scores_B)) - 1
