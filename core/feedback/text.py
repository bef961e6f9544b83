"""Reward models that read text: encoders, and decoders with another tokenizer than the policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefzoo.data.samples import Samples
from prefzoo.feedback.rewards import RewardSource
from prefzoo.models.folders import REWARD_FILE
from prefzoo.models.tokenizer import end_ids
from prefzoo.registry import UsageError

_NO_LIMIT = 10**6  # tokenizers without a limit say 10**30


class TextReward(RewardSource):
    """A sequence classifier with one label, run by the library on text that is tokenised for it.

    Plain prompts: the prompt followed by the completion, with the special tokens that the tokenizer adds. Messages: the
    conversation in the tokenizer's own chat template. A text over the model's limit loses its beginning; the metric
    ``rewards/truncated`` is the share of these. The scores are those of the library's forward, one by one.

    A model that prefzoo wrote was trained on answers that end in EOS, so a finished one gets it. Others read the text
    as it is, as in TRL's ``GRPOTrainer``; departure: TRL adds no special tokens to plain text, which encoders need.

    Args:
        model: what ``AutoModelForSequenceClassification`` loads.
        tokenizer: the reward model's.
        policy_tokenizer: gives the completions' text.
        token_budget: tokens of a batch, padding included.
    """

    verifies = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        name: str = "reward_model",
        token_budget: int = 16_384,
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.policy_tokenizer = policy_tokenizer
        self.name = name
        self.token_budget = token_budget
        tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
        config = model.config.get_text_config()
        self.facts = getattr(model.config, REWARD_FILE, None) or {}
        positions = getattr(config, "max_position_embeddings", None) or _NO_LIMIT
        padding = getattr(getattr(model.base_model, "embeddings", None), "padding_idx", None)
        positions -= 0 if padding is None else padding + 1  # RoBERTa and its kin count positions from behind it
        limit = min(positions, tokenizer.model_max_length)
        self.limit = limit if limit < _NO_LIMIT else None
        # The library scores the last token that is not padding. Without a padding token it takes the very last one, of
        # a single row only: here of rows of one length, none of which has a token -1.
        self.pad = getattr(config, "pad_token_id", None)
        if self.pad is None:
            config.pad_token_id = -1
        self._read = self._cut = 0

    @torch.no_grad()
    def __call__(self, samples: Samples) -> Tensor:
        ids = self._encode(samples)
        scores_B = torch.full((len(ids),), torch.nan)  # an empty text has no score
        for rows in self._batches(np.array([len(i) for i in ids])):
            width = max(len(ids[b]) for b in rows)
            pad = 0 if self.pad is None else self.pad
            padded = torch.tensor([ids[b] + [pad] * (width - len(ids[b])) for b in rows])
            mask = torch.tensor([[1] * len(ids[b]) + [0] * (width - len(ids[b])) for b in rows])
            device = self.model.device
            logits = self.model(input_ids=padded.to(device), attention_mask=mask.to(device)).logits
            scores_B[torch.from_numpy(rows)] = logits[:, 0].float().cpu()
        return (scores_B - self.facts.get("offset", 0.0)) / self.facts.get("scale", 1.0)

    def drain(self) -> tuple[dict[str, float], dict[str, list[Any]]]:
        share = {"rewards/truncated": self._cut / self._read} if self._read else {}
        self._read = self._cut = 0
        return share, {}

    def _encode(self, samples: Samples) -> list[list[int]]:
        """Ids of every completion with its prompt; special tokens of the two tokenizers never meet."""
        rows = [samples.completions[b].tolist() for b in range(len(samples.completions))]
        answers = self.policy_tokenizer.batch_decode(rows, skip_special_tokens=True)
        ends = end_ids(self.policy_tokenizer)
        out = []
        for answer, ids, p in zip(answers, rows, samples.prompt_B, strict=True):
            prompt = samples.extra["prompt"][p]
            finished = bool(ids) and ids[-1] in ends
            out.append(self._ids(prompt, answer, finished))
        return out

    def _ids(self, prompt: Any, answer: str, finished: bool) -> list[int]:
        if isinstance(prompt, str):
            end = self.tokenizer.eos_token if finished and self.facts and self.tokenizer.eos_token else ""
            text, special = prompt + answer + end, True
        elif self.tokenizer.chat_template is None:
            raise UsageError(
                f"reward model {self.name!r} has no chat template, so it cannot read prompts that are messages; set "
                "tokenizer.chat_template in its folder, or give prompts as text."
            )
        else:
            turns = [*prompt, {"role": "assistant", "content": answer}]
            if prompt[-1]["role"] == "assistant":  # which the answer continues
                turns[-2:] = [{**prompt[-1], "content": (prompt[-1].get("content") or "") + answer}]
            text, special = str(self.tokenizer.apply_chat_template(turns, tokenize=False)), False
        ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        self._read += 1
        if self.limit is not None and len(ids) > self.limit:
            self._cut += 1
            ids = self.tokenizer(text, add_special_tokens=special, truncation=True, max_length=self.limit)["input_ids"]
        return list(ids)

    def _batches(self, length_B: np.ndarray) -> Iterator[np.ndarray]:
        """Rows of similar lengths, the longest first; of equal ones where nothing can be padded."""
        order = np.argsort(-length_B, kind="stable")[: int((length_B > 0).sum())]
        start = 0
        while start < len(order):
            longest = int(length_B[order[start]])
            size = max(1, self.token_budget // longest)
            rows = order[start : start + size]
            if self.pad is None:
                rows = rows[length_B[rows] == longest]
            yield rows
            start += len(rows)
