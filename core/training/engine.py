"""The one loop. It knows sources, roles, terms and counts; it knows no algorithm by name."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prefzoo.algorithm import Stage, Term
from prefzoo.data.samples import Samples
from prefzoo.feedback import RewardSource
from prefzoo.models.load import end_ids
from prefzoo.models.reference import autocast, token_scores
from prefzoo.models.roles import Policy, Scorer
from prefzoo.models.roles import Scores as ModelScores
from prefzoo.models.tree import TreeBatch, micro_batches
from prefzoo.parts.credit import sequence_kl
from prefzoo.parts.feedback import Reward
from prefzoo.parts.reference import Moving
from prefzoo.parts.roles import CRITIC, POLICY, REFERENCE, REWARD
from prefzoo.parts.source import Rollouts
from prefzoo.registry import UsageError
from prefzoo.rollout import Finish, rollout_engine
from prefzoo.seeds import derive_seed, generator
from prefzoo.training.config import TrainConfig
from prefzoo.training.metrics import Meter, RunLog
from prefzoo.training.records import build_record, loss_mask


class NonFiniteError(RuntimeError):
    """The loss or its gradient is not finite; raised before the step, which is not taken."""


TAKEN = ("loss", "reward", "reward_std", "kl", "entropy", "epoch", "num_tokens", "learning_rate", "grad_norm")


@dataclass
class Spent:
    """What a run has cost."""

    optimizer_steps: int = 0
    prompts: int = 0
    generated_tokens: int = 0
    trained_tokens: int = 0  # completion tokens that a loss was computed on, each time it was
    reward_calls: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, float]:
        return dict(self.__dict__)

    def __add__(self, other: Spent) -> Spent:
        return Spent(**{k: v + getattr(other, k) for k, v in self.__dict__.items()})


@dataclass
class Trained:
    """A module that terms move, with its optimizer."""

    module: Policy | Scorer
    optimizer: torch.optim.Optimizer
    peak: float
    terms: tuple[Term, ...] = field(default=())


class Engine:
    """Runs one stage. Implements :class:`prefzoo.parts.roles.Roles` for the parts."""

    def __init__(
        self,
        stage: Stage,
        config: TrainConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        policy: Policy,
        data: Samples,
        ptx: Samples | None = None,
        reward: RewardSource | None = None,
        reference: Policy | None = None,
        scorer: Scorer | None = None,
        critic: Scorer | None = None,
        log: RunLog,
    ) -> None:
        self.stage = stage = copy.deepcopy(stage)  # its controllers have state, which is this run's own
        self.tokenizer = tokenizer
        self.policy = policy
        self.reference = reference
        self.reward = reward
        self.critic = critic
        self.scorer = scorer
        self.data = data
        self.ptx = ptx
        self.log = log
        self.moving = stage.reference if isinstance(stage.reference, Moving) else None
        self.spent = Spent()
        self.device = next(policy.parameters()).device
        self.config = config
        if 0 < config.warmup_steps < 1:  # a share of the run's optimizer steps
            share = math.ceil(config.warmup_steps * self.optimizer_steps)
            self.config = config.model_copy(update={"warmup_steps": share})
        self.temperature = stage.source.temperature if isinstance(stage.source, Rollouts) else 1.0
        modules: dict[str, Policy | Scorer | None] = {POLICY: policy, REWARD: scorer, CRITIC: critic}
        self.trained = {role: self._trained(role, modules[role]) for role in stage.trains}
        self.rollouts = rollout_engine(policy, end_ids(tokenizer, policy.model)) if stage.on_policy else None
        self.now = Meter()  # of this step
        self.window = Meter()  # since the last logging
        self.step = 0
        self.epoch = 0.0
        self.shown_columns: Mapping[str, Sequence[Any]] = {}  # what a reward function wants beside its samples

    def _trained(self, role: str, module: Policy | Scorer | None) -> Trained:
        assert module is not None, role
        c = self.config
        peak = c.learning_rate
        if role == CRITIC and c.critic_learning_rate is not None:
            peak = c.critic_learning_rate
        module.requires_grad_(True).train()
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer
        if c.optimizer == "sgd":
            optimizer = torch.optim.SGD(parameters, lr=peak, weight_decay=c.weight_decay)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=peak, betas=c.betas, weight_decay=c.weight_decay, fused=True)
        return Trained(module, optimizer, peak, tuple(t for t in self.stage.terms if t.trains == role))

    # ------------------------------------------------------------------------------------ what parts may ask

    @torch.no_grad()
    def policy_logps(self, samples: Samples) -> Tensor:
        return self._flat(samples, self.policy, lambda tree: self.policy(tree, temperature=self.temperature).logps_C)

    @torch.no_grad()
    def reference_logps(self, samples: Samples) -> Tensor:
        assert self.reference is not None
        reference = self.reference
        return self._flat(samples, reference, lambda tree: reference(tree, temperature=self.temperature).logps_C)

    @torch.no_grad()
    def values(self, samples: Samples) -> Tensor:
        assert self.critic is not None
        critic = self.critic
        return self._flat(samples, critic, lambda tree: critic(tree, values=True).values_C)

    def rewards(self, samples: Samples) -> Tensor:
        assert self.reward is not None
        self.spent.reward_calls += len(samples.completions)
        self.reward.begin(SimpleNamespace(global_step=self.step, max_steps=self.total_steps, epoch=self.epoch))
        scores_B = self.reward(samples)
        metrics, self.shown_columns = self.reward.drain()
        for name, value in metrics.items():
            if name in TAKEN:
                raise UsageError(f"log_metric({name!r}, ...): the run has a metric of that name; choose another.")
            self.now.add(name, value)
        return scores_B

    def _flat(self, samples: Samples, role: Policy | Scorer, forward: Any) -> Tensor:
        """A score of every completion token, without gradient, on the CPU, in the order of the samples."""
        with self._autocast():
            return token_scores(forward, samples, self.config.tokens_per_batch, self.device, role.packed)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.config.precision, self.device)

    # ------------------------------------------------------------------------------------ the loop

    @property
    def total_steps(self) -> int:
        """Optimizer steps for data sets, rollout steps for rollouts."""
        c, rows = self.config, len(self.data)
        if self.stage.on_policy:
            return c.max_steps or math.ceil(rows * c.epochs / self.stage.schedule.prompts)
        return c.max_steps or max(1, round(math.ceil(rows / c.rows_per_step) * c.epochs))

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run, if no sample is dropped."""
        schedule, source = self.stage.schedule, self.stage.source
        if not isinstance(source, Rollouts):
            return self.total_steps
        parts = schedule.minibatches
        if schedule.minibatch_rows is not None:
            parts = max(1, round(schedule.prompts * source.group_size / schedule.minibatch_rows))
        return self.total_steps * schedule.inner_epochs * parts

    def run(self) -> Iterator[tuple[int, dict[str, float], dict[str, float] | None]]:
        """Train to the end; of each step its number, its metrics, and, where it is logged, those since the last
        logging."""
        total = self.total_steps
        steps = self._on_policy(total) if self.stage.on_policy else self._offline(total)
        while True:
            started = time.monotonic()  # the caller's time between two steps is not the run's
            step = next(steps, None)
            self.spent.seconds += time.monotonic() - started
            if step is None:
                return
            self.step = step
            self.log.step(step)
            progress = {"epoch": self.epoch, "num_tokens": float(self.spent.trained_tokens)}
            self.window.merge(self.now)
            values, logged = self.now.means() | progress, None
            self.now.clear()
            if step % self.config.logging_steps == 0 or step == total:
                logged = self.window.means() | progress
                self.window.clear()
                self.log.metrics(step, logged)
            yield step, values, logged

    def _offline(self, total: int) -> Iterator[int]:
        rows = self.config.rows_per_step
        per_epoch = math.ceil(len(self.data) / rows)
        order = np.zeros(0, dtype=np.int64)
        for step in range(total):
            epoch, place = divmod(step, per_epoch)
            if place == 0:
                order = self._order("order", epoch, len(self.data))
            chosen = order[place * rows : (place + 1) * rows]
            self.epoch = (step + 1) / per_epoch
            batch = self.data.take(chosen)
            if self.moving is not None:  # its log-probabilities are not those of the start
                batch = batch.with_tokens(ref_logps=self.reference_logps(batch))
            self._optimizer_step(batch, step / total, step)
            yield step + 1

    def _on_policy(self, total: int) -> Iterator[int]:
        schedule = self.stage.schedule
        for step in range(total):
            samples = self._collect(step, total)
            self.epoch = (step + 1) * schedule.prompts / len(self.data)
            rows = len(samples)
            if rows == 0:
                self.now.add("skipped_steps", 1.0)
                yield step + 1
                continue
            parts = schedule.minibatches
            if schedule.minibatch_rows is not None:
                parts = max(1, round(rows / schedule.minibatch_rows))
            for inner in range(schedule.inner_epochs):
                whole = parts == 1
                order = np.arange(rows) if whole else self._order(f"inner {step}", inner, rows)
                for number, chosen in enumerate(np.array_split(order, min(parts, rows))):
                    done = (inner + number / parts) / schedule.inner_epochs
                    batch = samples if whole else samples.take(chosen)
                    self._optimizer_step(batch, (step + done) / total, self.spent.optimizer_steps)
            yield step + 1

    def _order(self, purpose: str, epoch: int, rows: int) -> np.ndarray:
        if not self.config.shuffle:
            return np.arange(rows)
        return generator(self.config.seed, purpose, epoch).permutation(rows)

    # ------------------------------------------------------------------------------------ rollouts

    def _collect(self, step: int, total: int) -> Samples:
        """Sample, score, keep, credit: what this rollout step trains on."""
        source, stage = self.stage.source, self.stage
        assert self.rollouts is not None and isinstance(source, Rollouts) and isinstance(stage.feedback, Reward)
        prompts, keys = self._prompts(step)
        seed = derive_seed(self.config.seed, "rollout", step)
        with self._autocast():  # the learner's precision, or the ratio does not start at 1
            samples = self.rollouts.generate(prompts, source.group_size, source.sampling, seed, keys)
        self.spent.prompts += len(prompts)
        self.spent.generated_tokens += len(samples.completions.flat)
        if source.top_p < 1 or not self.config.precision == self.config.dtype == "float32":
            # The sampler's numbers are not the learner's; the ratio must start at 1.
            samples = samples.with_tokens(old_logps=self.policy_logps(samples))
        scores_B = stage.feedback(samples, self)
        if REFERENCE in stage.needs:
            samples = samples.with_tokens(ref_logps=self.reference_logps(samples))
            kl_B = sequence_kl(samples)
            self.now.add("kl", kl_B)
            if "kl" in stage.controllers:
                self.now.add("kl_coefficient", stage.controllers["kl"].value)
        if self.critic is not None:
            samples = samples.with_tokens(values=self.values(samples))
        self._rollout_metrics(samples, scores_B)
        if (step + 1) % self.config.logging_steps == 0 or step == 0 or step == total - 1:
            self.log.samples(step + 1, self._shown(samples, scores_B))
        if stage.keep is not None:
            samples, scores_B = stage.keep(samples, scores_B)
        if len(samples) and stage.credit is not None:
            samples = stage.credit(samples, scores_B)
        if "kl" in stage.controllers:  # after the credit: this batch moves the coefficient of the next one
            stage.controllers["kl"].update(float(kl_B.mean()), len(kl_B))
        return samples

    def _prompts(self, step: int) -> tuple[Samples, np.ndarray]:
        """The prompts of a rollout step, epoch after epoch, and keys that name (epoch, row) to the sampler."""
        rows, count = len(self.data), self.stage.schedule.prompts
        chosen: list[int] = []
        keys: list[int] = []
        place = step * count
        while len(chosen) < count:
            epoch, offset = divmod(place + len(chosen), rows)
            piece = self._order("prompts", epoch, rows)[offset : offset + count - len(chosen)]
            chosen.extend(piece)
            keys.extend(epoch * rows + piece)
        return self.data.take(np.asarray(chosen)), np.asarray(keys)

    def _rollout_metrics(self, samples: Samples, scores_B: Tensor) -> None:
        add = self.now.add
        known_B = ~scores_B.isnan()
        add("reward", scores_B[known_B])
        add("reward_missing", (~known_B).float())
        add("completions/mean_length", torch.from_numpy(samples.completions.lengths).float())
        add("completions/clipped_ratio", (samples.columns["finish"] == Finish.LENGTH).float())
        add("entropy", -samples.tokens["old_logps"])  # unbiased: the samples are the policy's own
        groups = scores_B.view(len(samples.prompts), -1)
        if groups.shape[1] > 1:
            known_P = (~groups.isnan()).sum(1)
            squares_P = (groups - groups.nanmean(1, keepdim=True)).square().nansum(1)
            add("reward_std", (squares_P / (known_P - 1).clamp(min=1)).sqrt()[known_P > 1])
            # By the extremes: rounding may leave a standard deviation above 0. The missing do not count.
            highest, lowest = groups.nan_to_num(-math.inf).amax(1), groups.nan_to_num(math.inf).amin(1)
            add("frac_reward_zero_std", (highest <= lowest).float())

    def _shown(self, samples: Samples, scores_B: Tensor) -> list[dict[str, Any]]:
        count = min(self.config.log_completions, len(samples.completions))
        rows = np.linspace(0, max(len(samples.completions) - 1, 0), count).astype(int)
        return [
            {
                **{name: values[b] for name, values in self.shown_columns.items()},
                "prompt": self.tokenizer.decode(samples.prompts[samples.prompt_B[b]]),
                "completion": self.tokenizer.decode(samples.completions[b]),
                "reward": None if scores_B[b].isnan() else float(scores_B[b]),
            }
            for b in rows
        ]

    # ------------------------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def evaluate(self, held_out: Samples) -> dict[str, float]:
        """Metrics on rows that are not trained on, named ``eval/...``: the losses, or the rewards of fresh samples.

        Samples are drawn with the same random numbers every time, so that evaluations differ by the weights alone.
        """
        training, self.now = self.now, Meter()
        calls = self.spent.reward_calls
        modules = [t.module for t in self.trained.values()]
        for module in modules:
            module.eval()
        try:
            losses = self._evaluate_samples(held_out) if self.stage.on_policy else self._evaluate_rows(held_out)
            return {f"eval/{name}": value for name, value in {**losses, **self.now.means()}.items()}
        finally:
            self.now, self.spent.reward_calls = training, calls
            for module in modules:
                module.train()

    def _evaluate_rows(self, held_out: Samples) -> dict[str, float]:
        """Losses over all rows; what belongs to an optimizer batch (a prelude) is made per batch, as in training."""
        sums: dict[int, float] = defaultdict(float)
        sizes: dict[int, float] = defaultdict(float)
        terms = {id(t): (role, t) for role, trained in self.trained.items() for t in trained.terms if t.rows == "main"}
        for start in range(0, len(held_out), self.config.rows_per_step):
            batch = held_out.take(np.arange(start, min(start + self.config.rows_per_step, len(held_out))))
            if self.moving is not None:
                batch = batch.with_tokens(ref_logps=self.reference_logps(batch))
            shared, plans = self._prepare({"main": batch})
            for key, (_, term) in terms.items():
                sizes[key] += self._size(term, batch)
            for micro in plans["main"]:
                for _, totals in self._losses("main", batch.take(micro), shared):
                    for term, total in totals:
                        sums[id(term)] += float(total)
        losses: dict[str, float] = defaultdict(float)
        for key, (role, term) in terms.items():
            losses[loss_name(role)] += term.weight * sums[key] / max(sizes[key], 1e-30)
        return losses

    def _evaluate_samples(self, held_out: Samples) -> dict[str, float]:
        source = self.stage.source
        assert self.rollouts is not None and isinstance(source, Rollouts) and isinstance(self.stage.feedback, Reward)
        seed, n = derive_seed(self.config.seed, "evaluation"), self.config.eval_samples
        with self._autocast():
            samples = self.rollouts.generate(held_out, n, source.sampling, seed)
        scores_B = self.stage.feedback(samples, self)
        if self.reference is not None:
            samples = samples.with_tokens(ref_logps=self.reference_logps(samples))
            self.now.add("kl", sequence_kl(samples))
        self._rollout_metrics(samples, scores_B)
        return {}

    # ------------------------------------------------------------------------------------ one optimizer step

    def _optimizer_step(self, main: Samples, progress: float, number: int) -> None:
        """Prelude, counts, then forward and backward of every micro-batch, then one step of every trained role."""
        batches: dict[str, Samples] = {"main": main}
        if any(t.rows == "ptx" for t in self.stage.terms):
            batches["ptx"] = self._ptx_rows(len(main), number)
        shared, plans = self._prepare(batches)
        sizes = {id(term): self._size(term, batches[term.rows]) for term in self.stage.terms}

        for role in self.trained.values():
            role.optimizer.zero_grad(set_to_none=True)
        losses: dict[str, float] = defaultdict(float)
        for name, rows in batches.items():
            for micro in plans[name]:
                part = rows.take(micro) if len(plans[name]) > 1 else rows
                self._backward(name, part, sizes, shared, losses)
        self.spent.trained_tokens += int(sum(loss_mask(b, b.mask_BT()).sum() for b in batches.values()))
        for term, value in losses.items():
            self.now.add(term, value)
        self._step(progress, number, losses)

    def _prepare(self, batches: Mapping[str, Samples]) -> tuple[dict[str, Tensor], dict[str, list[np.ndarray]]]:
        """What must be known about the whole optimizer batch first, and how it is cut into micro-batches."""
        shared: dict[str, Tensor] = {}
        if self.stage.prelude is not None:
            shared[self.stage.prelude.gives] = self.stage.prelude(batches["main"], self).to(self.device)
        packed = all(t.module.packed for t in self.trained.values())
        plans = {name: micro_batches(rows, self.config.tokens_per_batch, packed) for name, rows in batches.items()}
        self._refuse_splitting(plans)
        return shared, plans

    def _backward(
        self,
        name: str,
        part: Samples,
        sizes: Mapping[int, float],
        shared: Mapping[str, Tensor],
        losses: dict[str, float],
    ) -> None:
        for role, totals in self._losses(name, part, shared):
            objective = torch.zeros((), device=self.device)
            for term, total in totals:
                mean = total / max(sizes[id(term)], 1e-30)
                objective = objective + term.weight * mean
                if len(self.stage.terms) > 1:
                    losses[f"loss/{term.loss.name}"] += float(mean.detach())
            losses[loss_name(role)] += float(objective.detach())
            objective.backward()

    def _losses(
        self, name: str, part: Samples, shared: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, list[tuple[Term, Tensor]]]]:
        """Role by role, the summed loss of each of its terms on a micro-batch. Their metrics go to the meter."""
        tree = TreeBatch.of(part, self.device)
        mask_BT = None if part.kind == "pairs" else loss_mask(part, tree.mask_BT)  # a pair's loss is one value
        for role, trained in self.trained.items():
            terms = [t for t in trained.terms if t.rows == name]
            if not terms:
                continue
            with self._autocast():
                scores = self._forward(role, trained.module, tree, terms)
            totals = []
            for term in terms:
                record = build_record(term.loss.family, part, scores, tree.mask_BT, shared)
                out = term.loss(record)
                totals.append((term, term.counted.total(out.loss, mask_BT, getattr(record, "weight_B", None))))
                for metric, values in out.metrics.items():
                    self.now.add(metric, values, mask_BT)
            yield role, totals

    def _forward(self, role: str, module: nn.Module, tree: TreeBatch, terms: list[Term]) -> ModelScores:
        if role == POLICY:
            entropy = any("entropy_BT" in t.loss.extras for t in terms)
            return module(tree, temperature=self.temperature, entropy=entropy)
        return module(tree, values=role == CRITIC)

    def _size(self, term: Term, rows: Samples) -> float:
        """The term's count over the whole optimizer batch, known from masks before any forward."""
        if rows.kind == "pairs":
            return term.counted.size(len(rows), None, rows.pair_columns.get("weight"))
        return term.counted.size(len(rows), loss_mask(rows, rows.mask_BT()), rows.columns.get("weight"))

    def _refuse_splitting(self, plans: Mapping[str, list[np.ndarray]]) -> None:
        for term in self.stage.terms:
            pieces = len(plans.get(term.rows, ()))
            if term.loss.entry.tags["whole_batch"] and pieces > 1:
                raise UsageError(
                    f"loss {term.loss.name!r} couples the rows of a batch, but tokens_per_batch="
                    f"{self.config.tokens_per_batch} cuts it into {pieces}; raise tokens_per_batch, or lower "
                    "rows_per_step."
                )

    def _step(self, progress: float, number: int, losses: Mapping[str, float]) -> None:
        c = self.config
        factor = learning_rate_factor(progress, number, c)
        norms = {}
        for role, trained in self.trained.items():
            parameters = [p for group in trained.optimizer.param_groups for p in group["params"]]
            limit = c.max_grad_norm if c.max_grad_norm is not None else math.inf
            norms[role] = float(nn.utils.clip_grad_norm_(parameters, limit))
        bad = [
            k
            for k, v in {**losses, **{f"gradient norm of {r}": n for r, n in norms.items()}}.items()
            if not math.isfinite(v)
        ]
        if bad:
            raise NonFiniteError(
                f"step {number + 1}: {', '.join(bad)} not finite; stopped before the step. Lower the learning rate, or "
                "look at the rows and rewards of this step."
            )
        for role, trained in self.trained.items():
            for group in trained.optimizer.param_groups:
                group["lr"] = trained.peak * factor
            trained.optimizer.step()
            self.now.add("grad_norm" if role != CRITIC else "grad_norm/critic", norms[role])
        first = next(iter(self.trained.values()))
        self.now.add("learning_rate", first.peak * factor)
        self.spent.optimizer_steps += 1
        if self.moving is not None and self.spent.optimizer_steps % self.moving.every == 0:
            assert self.reference is not None
            self.moving.follow(self.reference, self.policy)

    def _ptx_rows(self, rows: int, number: int) -> Samples:
        assert self.ptx is not None
        chosen = generator(self.config.seed, "ptx", number).choice(
            len(self.ptx), size=min(rows, len(self.ptx)), replace=False
        )
        return self.ptx.take(chosen)


def loss_name(role: str) -> str:
    return "loss" if role != CRITIC else "loss/critic"


def learning_rate_factor(progress: float, step: int, config: TrainConfig) -> float:
    """Warm-up over optimizer steps, times decay over the run's progress in [0, 1).

    >>> learning_rate_factor(0.5, 100, TrainConfig(schedule="linear", final_learning_rate=0.0))
    0.5
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    end = config.final_learning_rate
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    decay = shape[config.schedule]
    return warm * (decay if config.schedule == "constant" else end + (1 - end) * decay)


__all__ = ["Engine", "NonFiniteError", "Spent", "learning_rate_factor"]
