"""The models of a run, and what parts may ask of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefzoo.algorithm import Stage
from prefzoo.data.formats import prompt_only
from prefzoo.data.samples import Ragged, Samples, offsets_of
from prefzoo.data.tokens import tokenise
from prefzoo.feedback import RewardSource
from prefzoo.models.reference import autocast, token_scores
from prefzoo.models.roles import Policy, Scorer, Want
from prefzoo.models.roles import Scores as ModelScores
from prefzoo.models.tree import TreeBatch
from prefzoo.parts.roles import CRITIC, of_critic
from prefzoo.processes import Processes
from prefzoo.registry import UsageError
from prefzoo.rollout import Finish, LoopEngine, Sampling
from prefzoo.seeds import derive_seed
from prefzoo.training.config import TrainConfig
from prefzoo.training.guards import Watchdog
from prefzoo.training.metrics import Meter
from prefzoo.training.stopping import Stopping

TAKEN = ("loss", "reward", "reward_std", "kl", "entropy", "epoch", "num_tokens", "learning_rate", "grad_norm")


class Crew:
    """Models, tokenizer and reward of a stage. Implements :class:`prefzoo.parts.roles.Roles`."""

    stage: Stage
    config: TrainConfig
    tokenizer: PreTrainedTokenizerBase
    policy: Policy
    reference: Policy | None
    teacher: Policy | None
    reward: RewardSource | None
    critics: Mapping[str, Scorer]  # by role: "critic", "critic:NAME"
    rollouts: LoopEngine | None  # of the policy
    device: torch.device
    processes: Processes
    stopping: Stopping
    watchdog: Watchdog
    mine: Meter  # what this process measures
    temperature: float
    step: int
    epoch: float
    written: int = 0  # tokens that this process has written beside its samples, since they were last counted
    shown_columns: Mapping[str, Sequence[Any]]  # what a reward function wants beside its samples

    @property
    def total_steps(self) -> int:
        raise NotImplementedError

    # ------------------------------------------------------------------------------------ scores of tokens

    def policy_logps(self, samples: Samples) -> Tensor:
        return self._logps(samples, self.policy)

    def policy_entropy(self, samples: Samples) -> Tensor:
        want = frozenset[Want]({"entropy"})
        return self._flat(
            samples, self.policy, lambda tree: self.policy(tree, temperature=self.temperature, want=want).entropy_C
        )

    def reference_logps(self, samples: Samples) -> Tensor:
        assert self.reference is not None
        return self._logps(samples, self.reference)

    def teacher_logps(self, samples: Samples) -> Tensor:
        assert self.teacher is not None
        return self._logps(samples, self.teacher)

    def values(self, samples: Samples, critic: str = "") -> Tensor:
        module = self.critics[of_critic(CRITIC, critic)]
        return self._flat(samples, module, lambda tree: module(tree, values=True).values_C)

    def _logps(self, samples: Samples, policy: Policy) -> Tensor:
        return self._flat(samples, policy, lambda tree: policy(tree, temperature=self.temperature).logps_C)

    @torch.no_grad()
    def _flat(
        self, samples: Samples, role: Policy | Scorer, forward: Callable[[TreeBatch], ModelScores | Tensor | None]
    ) -> Tensor:
        """A score of every completion token, without gradient, on the CPU, in the order of the samples."""
        with self._autocast():
            budget = self.config.tokens_per_batch
            return token_scores(forward, samples, budget, self.device, role.packed, self.processes)  # type: ignore[arg-type]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.config.precision, self.device)

    # ------------------------------------------------------------------------------------ scores of completions

    @property
    def compares(self) -> bool:
        """Whether the run's reward is a judge: its scores are chances against the other answers to the prompt."""
        return bool(getattr(self.reward, "compares", False))

    def rewards(self, samples: Samples) -> Tensor:
        assert self.reward is not None
        return self._judged(samples, self.reward)

    def objectives(self, samples: Samples) -> Tensor:
        assert self.reward is not None
        several = getattr(self.reward, "objectives", None)
        return self.rewards(samples)[:, None] if several is None else self._judged(samples, several)

    def _judged(self, samples: Samples, judge: Callable[[Samples], Tensor]) -> Tensor:
        assert self.reward is not None
        self.watchdog.doing(f"reward {self.reward.name!r} for step {self.step + 1}")
        self.reward.begin(SimpleNamespace(global_step=self.step, max_steps=self.total_steps, epoch=self.epoch))
        scores = judge(samples)
        if self.stopping.immediate:  # a bare except in it may have swallowed the signal, and given anything
            self.stopping.check(self.stopping.wanted)
        metrics, self.shown_columns = self.reward.drain()
        for name, value in metrics.items():
            if name in TAKEN:
                raise UsageError(f"log_metric({name!r}, ...): the run has a metric of that name; choose another.")
            self.mine.add(name, value, weight=len(samples.completions))
        return scores

    def note(self, name: str, values: Tensor) -> None:
        self.mine.add(name, values)

    # ------------------------------------------------------------------------------------ words

    def prompts(self, samples: Samples) -> list[Any]:
        return [samples.extra["prompt"][p] for p in samples.prompt_B]

    def texts(self, samples: Samples) -> list[str]:
        ids = [samples.completions[b].tolist() for b in range(len(samples.completions))]
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    @property
    def bos(self) -> int | None:
        return self.tokenizer.bos_token_id

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int32)

    def write(self, prompts: Sequence[Any], sampling: Sampling, purpose: str, by: str = "policy") -> Samples:
        rows = [prompt_only({"prompt": prompt}) for prompt in prompts]
        asked, report = tokenise(rows, self.tokenizer, "prompts", max_length=10**6)
        if len(asked) != len(rows):
            raise UsageError("\n".join([f"some prompts of the {purpose} cannot be answered:", *report.lines()[1:]]))
        seed = derive_seed(self.config.seed, purpose, self.step)
        first = self.processes.rank * 2**20  # other random numbers than those of the other processes
        positions = getattr(self.policy.model.config.get_text_config(), "max_position_embeddings", None) or 10**9
        room = np.flatnonzero(asked.prompts.lengths + sampling.max_new_tokens <= positions)
        lengths, finish = np.zeros(len(rows), dtype=np.int64), torch.full((len(rows),), int(Finish.LENGTH))
        nothing = np.zeros(0, dtype=np.int32)
        written = Samples(
            "completions", asked.prompts, Ragged(nothing, offsets_of(lengths)), np.arange(len(rows)),
            columns={"finish": finish}, extra=asked.extra,
        )  # fmt: skip
        if not len(room):
            return written
        with self._autocast():
            answers = self._writer(by).generate(asked.take(room), 1, sampling, seed, first + room)
        self.written += len(answers.completions.flat)
        lengths[room] = answers.completions.lengths
        finish[torch.from_numpy(room)] = answers.columns["finish"].long()
        return replace(
            written, completions=Ragged(answers.completions.flat, offsets_of(lengths)), tokens=answers.tokens
        )  # fmt: skip

    def answers(self, prompts: Sequence[Any], texts: Sequence[str | None]) -> Samples:
        said = [p for p, text in enumerate(texts) if text]
        rows = [
            {"prompt": prompts[p], "completion": texts[p]}
            if isinstance(prompts[p], str)
            else {"prompt": prompts[p], "completion": [{"role": "assistant", "content": texts[p]}]}
            for p in said
        ]
        lengths, flat = np.zeros(len(texts), dtype=np.int64), np.zeros(0, dtype=np.int32)
        if rows:
            found, _ = tokenise(rows, self.tokenizer, "completions", max_length=10**6, loss_on="completion")
            assert len(found) == len(rows)
            flat, lengths[said] = np.array(found.completions.flat), found.completions.lengths
        count = len(texts)
        return Samples(
            "completions", Ragged.of([[]] * count), Ragged(flat, offsets_of(lengths)), np.arange(count),
            columns={"finish": torch.full((count,), int(Finish.STOP))},
        )  # fmt: skip

    def _writer(self, role: str) -> LoopEngine:
        """Who samples for a role."""
        raise NotImplementedError
