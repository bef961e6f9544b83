"""The models of a run, and what parts may ask of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prefzoo.algorithm import Stage
from prefzoo.data.formats import prompt_only
from prefzoo.data.samples import Samples
from prefzoo.data.tokens import tokenise
from prefzoo.feedback import RewardSource
from prefzoo.models.reference import autocast, token_scores
from prefzoo.models.roles import Policy, Scorer, Want
from prefzoo.models.roles import Scores as ModelScores
from prefzoo.models.tree import TreeBatch
from prefzoo.parts.roles import CRITIC, of_critic
from prefzoo.processes import Processes
from prefzoo.registry import UsageError
from prefzoo.rollout import LoopEngine, Sampling
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
    shown_columns: Mapping[str, Sequence[Any]]  # what a reward function wants beside its samples

    @property
    def critic(self) -> Scorer | None:
        return self.critics.get(CRITIC)

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

    def write(self, prompts: Sequence[Any], sampling: Sampling, purpose: str) -> Samples:
        assert self.rollouts is not None
        rows = [prompt_only({"prompt": prompt}) for prompt in prompts]
        asked, report = tokenise(rows, self.tokenizer, "prompts", max_length=10**6)
        if len(asked) != len(rows):
            raise UsageError("\n".join([f"some prompts of the {purpose} cannot be answered:", *report.lines()[1:]]))
        seed = derive_seed(self.config.seed, purpose, self.step)
        first = self.processes.rank * 2**20  # other random numbers than those of the other processes
        with self._autocast():
            return self.rollouts.generate(asked, 1, sampling, seed, first + np.arange(len(asked)))
