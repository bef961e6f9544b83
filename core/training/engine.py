"""The one loop. It knows sources, roles, terms and counts; it knows no algorithm by name."""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prefzoo.algorithm import Stage, Term
from prefzoo.data.samples import Samples, loss_mask
from prefzoo.feedback import RewardSource
from prefzoo.models.load import end_ids
from prefzoo.models.reference import follower
from prefzoo.models.roles import Policy, Scorer
from prefzoo.models.roles import Scores as ModelScores
from prefzoo.models.teacher import with_teacher
from prefzoo.models.tree import TreeBatch, micro_batches, shares
from prefzoo.parts.reference import Moving
from prefzoo.parts.roles import HEADS, POLICY, REFERENCE, REWARD, critic_of_role, of_critic
from prefzoo.parts.source import Rollouts, Sampler
from prefzoo.processes import ALONE, Processes
from prefzoo.records import StepScores
from prefzoo.registry import RunError, UsageError
from prefzoo.rollout import rollout_engine
from prefzoo.seeds import derive_seed, generator
from prefzoo.training.collect import Collector
from prefzoo.training.config import TrainConfig
from prefzoo.training.determinism import rng_state, set_rng_state
from prefzoo.training.guards import Monitor, Watchdog, gradient_norms, not_finite, words, write_post_mortem
from prefzoo.training.metrics import Meter, RunLog
from prefzoo.training.records import build_record, cells, rows_of, wanted
from prefzoo.training.stopping import Stopping
from prefzoo.training.updates import Landscape, natural_step, put


class NonFiniteError(RunError):
    """The loss or its gradient is not finite; raised before the step, which is not taken."""


IN_A_ROW = 10  # steps that are not finite, one after another, before a run that skips them gives up


@dataclass
class Spent:
    """What a run has cost."""

    optimizer_steps: int = 0
    prompts: int = 0
    generated_tokens: int = 0
    trained_tokens: int = 0  # completion tokens that a loss was computed on, each time it was
    reward_calls: int = 0
    nonfinite_steps: int = 0  # optimizer steps that were not taken
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
    parameters: dict[str, nn.Parameter]
    terms: tuple[Term, ...] = field(default=())


class Engine(Collector):
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
        teacher: Policy | None = None,
        scorer: Scorer | None = None,
        critics: Mapping[str, Scorer] | None = None,
        heads: Any = None,
        log: RunLog,
        processes: Processes = ALONE,
        stopping: Stopping | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.stage = stage = copy.deepcopy(stage)  # its controllers have state, which is this run's own
        self.tokenizer = tokenizer
        self.policy = policy
        self.reference = reference
        self.teacher = teacher
        self.reward = reward
        self.critics = dict(critics or {})
        self.scorer = scorer
        self.heads = heads
        self.data = data
        self.ptx = ptx
        self.log = log
        self.processes = processes
        self.stopping = stopping or Stopping()
        self.watchdog = watchdog or Watchdog(None, log.say)
        self.monitor = Monitor(log.note)
        self.moving = stage.reference if isinstance(stage.reference, Moving) else None
        self.spent = Spent()
        self.device = next(policy.parameters()).device
        self.config = config
        if 0 < config.warmup_steps < 1:  # a share of the run's optimizer steps
            share = math.ceil(config.warmup_steps * self.optimizer_steps)
            self.config = config.model_copy(update={"warmup_steps": share})
        own = isinstance(stage.source, Rollouts) and stage.source.by != "teacher" and stage.source.temperature > 0
        self.temperature = stage.source.temperature if isinstance(stage.source, Rollouts) and own else 1.0
        modules: dict[str, Any] = {POLICY: policy, REWARD: scorer, HEADS: heads, **self.critics}
        self.trained = {role: self._trained(role, modules[role]) for role in stage.trains}
        self.rollouts = rollout_engine(policy, end_ids(tokenizer, policy.model)) if stage.on_policy else None
        self.before: Policy | None = None  # the policy before an update that is held to it
        if stage.update is not None:
            if not config.precision == config.dtype == "float32":
                raise UsageError(
                    "a trust region takes differences of gradients, which need precision='float32' and dtype='float32'."
                )
            self.before = follower(policy)
        self.now = Meter()  # of this step
        self.mine = Meter()  # what this process has measured of its share since the processes last agreed
        self.window = Meter()  # since the last logging
        self.step = 0  # steps done
        self.place = 0  # optimizer steps done of the step that runs
        self.buffer: Samples | None = None  # what the rest of its optimizer steps is trained on
        self.pool: Samples | None = None  # what a replay has kept
        self.measured = {}
        self.epoch = 0.0
        self.bad_in_a_row = 0  # optimizer steps that were not finite
        self.whole = True  # no step has begun to move the weights since the last mark
        self.kept: dict[str, Any] = {}  # of whoever runs the engine, kept with its state
        self.roll_back: Callable[[], str] | None = None  # to the last good state; says which it is
        self._epoch_order = (-1, np.zeros(0, dtype=np.int64))
        self.shown_columns = {}
        condition = stage.condition  # of rows of a data set it is known beforehand
        if condition is not None and not stage.on_policy:
            self.data = condition.of_rows(data, self)
        self.data = self._credited(self.data)
        if self.moving is not None:
            assert reference is not None
            self.moving.begin(reference)
        self.agree(None)
        self.mark()

    def _trained(self, role: str, module: Policy | Scorer | None) -> Trained:
        assert module is not None, role
        c = self.config
        peak = c.learning_rate * self.stage.schedule.rate
        if critic_of_role(role) is not None and c.critic_learning_rate is not None:
            peak = c.critic_learning_rate
        module.requires_grad_(True).train()
        parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        optimizer: torch.optim.Optimizer
        if c.optimizer == "sgd":
            optimizer = torch.optim.SGD(parameters.values(), lr=peak, weight_decay=c.weight_decay)
        else:
            optimizer = torch.optim.AdamW(
                parameters.values(), lr=peak, betas=c.betas, weight_decay=c.weight_decay, fused=True
            )
        return Trained(module, optimizer, peak, parameters, tuple(t for t in self.stage.terms if t.trains == role))

    # ------------------------------------------------------------------------------------ what a checkpoint holds

    def agree(self, value: Any) -> list[Any]:
        """The value of every process; with it goes what each has measured of its share, and its random state."""
        parts = self.processes.gather((value, self.mine.state_dict(), rng_state()))
        self.mine.clear()
        for _, measured, _ in parts:
            part = Meter()
            part.load_state_dict(measured)
            self.now.merge(part)
        self.random = [random for _, _, random in parts]
        return [value for value, _, _ in parts]

    def mark(self) -> None:
        """The weights belong to this place of the run, the random state is that of the last agreement: what a
        checkpoint says until the next mark."""
        self._marked: dict[str, Any] = {
            "step": self.step,
            "place": self.place,
            "epoch": self.epoch,
            "bad_in_a_row": self.bad_in_a_row,
            "spent": self.spent.to_dict(),
            "now": self.now.state_dict(),
            "window": self.window.state_dict(),
            "monitor": self.monitor.state_dict(),
            "controllers": {name: c.state_dict() for name, c in self.stage.controllers.items()},
            "log": self.log.position(),
            "kept": dict(self.kept),
        }
        self._marked_random, self.whole = self.random, True
        self._marked_samples = {k: v for k, v in (("rollouts", self.buffer), ("pool", self.pool)) if v is not None}

    @property
    def marked(self) -> tuple[int, int]:
        """Steps done, and optimizer steps of the one that runs, at the last mark."""
        return self._marked["step"], self._marked["place"]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and facts of the last mark; what was begun since then will be done again."""
        tensors = self._moved()
        for role, trained in self.trained.items():
            for index, values in trained.optimizer.state_dict()["state"].items():
                tensors |= {f"{role}.optimizer/{index}/{key}": value for key, value in values.items()}
        for kept, samples in self._marked_samples.items():
            tensors |= {f"{kept}/{name}": value for name, value in samples.tensors().items()}
        for rank, (numbers, _) in enumerate(self._marked_random):
            tensors |= {f"random.{rank}/{name}": value for name, value in numbers.items()}
        kinds = {kept: samples.kind for kept, samples in self._marked_samples.items()}
        return tensors, {**self._marked, "random": [facts for _, facts in self._marked_random], "samples": kinds}

    def load_state(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self.whole = False
        self.go_back(tensors, facts)
        self.step, self.place, self.epoch = facts["step"], facts["place"], facts["epoch"]
        self.bad_in_a_row = facts["bad_in_a_row"]
        self.spent = Spent(**facts["spent"])
        self.kept = dict(facts["kept"])
        self.now.load_state_dict(facts["now"])
        self.window.load_state_dict(facts["window"])
        self.monitor.load_state_dict(facts["monitor"])
        found = {kept: Samples.from_tensors(kind, under(kept, tensors)) for kept, kind in facts["samples"].items()}
        self.buffer, self.pool = found.get("rollouts"), found.get("pool")
        rank = self.processes.rank
        if rank < len(facts["random"]):
            set_rng_state(under(f"random.{rank}", tensors), facts["random"][rank])
        self.agree(None)
        self.mark()

    def go_back(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Weights, optimizers and controllers alone: the run goes on from where it is in the data."""
        moved = self._moved()
        for name, value in moved.items():
            if name not in tensors or tensors[name].shape != value.shape:
                raise UsageError(f"the checkpoint is of another model: {name} is not in it, or has another shape.")
        with torch.no_grad():
            for name, value in moved.items():
                value.copy_(tensors[name])
        for role, trained in self.trained.items():
            state: dict[int, dict[str, Tensor]] = defaultdict(dict)
            for name, value in under(f"{role}.optimizer", tensors).items():
                index, _, key = name.partition("/")
                state[int(index)][key] = value
            trained.optimizer.load_state_dict({**trained.optimizer.state_dict(), "state": dict(state)})
        for name, controller in self.stage.controllers.items():
            controller.load_state_dict(facts["controllers"][name])

    def _moved(self) -> dict[str, Tensor]:
        """All weights that a step may move, themselves."""
        moved = {f"{role}/{name}": p.detach() for role, t in self.trained.items() for name, p in t.parameters.items()}
        for role, trained in self.trained.items():
            moved |= {f"{role}/{name}": value for name, value in trained.module.slow().items()}
        if self.moving is not None:
            assert self.reference is not None
            own = {id(p) for p in self.policy.parameters()}  # what it shares with the policy does not move
            theirs = ((n, p) for n, p in self.reference.named_parameters() if id(p) not in own)
            moved |= {f"{REFERENCE}/{name}": p.detach() for name, p in theirs}
            moved |= {f"{REFERENCE}.kept/{name}": value for name, value in self.moving.kept().items()}
        return moved

    # ------------------------------------------------------------------------------------ the loop

    @property
    def total_steps(self) -> int:
        """Optimizer steps for data sets, rollout steps for rollouts."""
        c, rows = self.config, len(self.data)
        steps = self.stage.schedule.steps or c.max_steps
        if self.stage.on_policy:
            return steps or math.ceil(rows * c.epochs / self.stage.schedule.prompts)
        return steps or max(1, round(math.ceil(rows / c.rows_per_step) * c.epochs))

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run, if no sample is dropped."""
        schedule, source = self.stage.schedule, self.stage.source
        if not isinstance(source, Rollouts):
            return self.total_steps
        parts = schedule.minibatches
        if schedule.minibatch_rows is not None:
            parts = max(1, round(schedule.prompts * source.completions / schedule.minibatch_rows))
        return self.total_steps * schedule.inner_epochs * parts

    def run(self) -> Iterator[tuple[int, dict[str, float], dict[str, float] | None]]:
        """Train to the end; of each step its number, its metrics, and, where it is logged, those since the last
        logging. Whoever runs it calls :meth:`mark` when it is done with a step."""
        total = self.total_steps
        while self.step < total:
            started = time.monotonic()  # the caller's time between two steps is not the run's
            (self._rollout_step if self.stage.on_policy else self._rows_step)(self.step, total)
            self.spent.seconds += time.monotonic() - started
            self.step, self.place, self.buffer = self.step + 1, 0, None
            self.log.step(self.step)
            progress = {"epoch": self.epoch, "num_tokens": float(self.spent.trained_tokens)}
            self.window.merge(self.now)
            values, logged = self.now.means() | progress, None
            self.monitor.watch(self.step, values)
            self.now.clear()
            if self.step % self.config.logging_steps == 0 or self.step == total:
                logged = self.window.means() | progress
                self.window.clear()
                self.log.metrics(self.step, logged)
            yield self.step, values, logged

    def _rows_step(self, step: int, total: int) -> None:
        rows = self.config.rows_per_step
        per_epoch = math.ceil(len(self.data) / rows)
        epoch, place = divmod(step, per_epoch)
        self.epoch = (step + 1) / per_epoch
        if self.place:  # taken before the run was stopped
            return
        if self._epoch_order[0] != epoch:
            self._epoch_order = epoch, self._order("order", epoch, len(self.data))
        batch = self.data.take(self._epoch_order[1][place * rows : (place + 1) * rows])
        self.watchdog.doing(f"step {step + 1}")
        self._optimizer_step(self._of_rows(batch), step / total, step)

    def _of_rows(self, batch: Samples) -> Samples:
        """Rows of a data set with what changes while the run goes on: a moving reference's words, and a credit."""
        if self.moving is not None:  # its log-probabilities are not those of the start
            batch = batch.with_tokens(ref_logps=self.reference_logps(batch))
        if not self.stage.critics:
            return batch
        for name in self._critic_names():
            batch = batch.with_tokens(**{of_critic("values", name): self.values(batch, name)})
        return self._credited(batch, of_all=False)

    def _credited(self, rows: Samples, of_all: bool = True) -> Samples:
        """Rows of a data set with the credit of their scores: of all rows at once, or batch by batch where a critic
        that learns is asked."""
        credit = self.stage.credit
        if self.stage.on_policy or credit is None or of_all == bool(self.stage.critics):
            return rows
        unknown = torch.full((len(rows.completions),), torch.nan)
        return credit(rows, rows.columns.get("score", unknown))

    def _rollout_step(self, step: int, total: int) -> None:
        schedule = self.stage.schedule
        self.epoch = (step + 1) * schedule.prompts / len(self.data)
        samples = self.buffer
        if samples is None:
            if self.place:  # all its optimizer steps were taken before the run was stopped
                return
            samples = self._collect(step, total)
        walk = self._walk(step, samples)
        if not walk:
            self.now.add("skipped_steps", 1.0)
            return
        while self.place < len(walk):
            done, rows = walk[self.place]
            batch = samples if rows is None else samples.take(rows)
            self.buffer = samples if self.place + 1 < len(walk) else None
            self.watchdog.doing(f"forward and backward of step {step + 1}")
            if not self._optimizer_step(batch, (step + done) / total, self.spent.optimizer_steps):
                return  # the samples are not those of the weights that it went back to

    def _walk(self, step: int, samples: Samples) -> list[tuple[float, np.ndarray | None]]:
        """The optimizer steps of a rollout step, pass by pass: the share of it that is done before each, and its rows
        (None: all). Where samples have a column ``passes``, a row is in the first so many passes only."""
        schedule, passes_B = self.stage.schedule, samples.columns.get("passes")
        walk: list[tuple[float, np.ndarray | None]] = []
        for inner in range(schedule.inner_epochs):
            mine = None if passes_B is None else np.flatnonzero(passes_B.numpy() > inner)
            rows = len(samples) if mine is None else len(mine)
            parts = schedule.minibatches
            if schedule.minibatch_rows is not None:
                parts = max(1, round(rows / schedule.minibatch_rows))
            chosen = [mine]
            if parts > 1 and rows:
                order = self._order(f"inner {step}", inner, rows)
                chosen = [*np.array_split(order if mine is None else mine[order], min(parts, rows))]
            done = [(inner + number / parts) / schedule.inner_epochs for number in range(len(chosen))]
            walk += zip(done, chosen if rows else [], strict=False)
        return walk

    # ------------------------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def evaluate(self, held_out: Samples) -> dict[str, float]:
        """Metrics on rows that are not trained on, named ``eval/...``: the losses, or the rewards of fresh samples.

        Where the reward is a judge and nobody writes beside the policy, that is how often its answer beats one of the
        reference's.

        Samples are drawn with the same random numbers every time, so that evaluations differ by the weights alone.
        """
        training, self.now = self.now, Meter()
        if self.stage.condition is not None and not self.stage.on_policy:
            held_out = self.stage.condition.of_rows(held_out, self)
        held_out = self._credited(held_out)
        self.watchdog.doing(f"evaluation after step {self.step}")
        modules = [t.module for t in self.trained.values()]
        for module in modules:
            module.eval()
        try:
            losses = self._evaluate_samples(held_out) if self.stage.on_policy else self._evaluate_rows(held_out)
            self.agree(None)
            return {f"eval/{name}": value for name, value in {**losses, **self.now.means()}.items()}
        finally:
            self.now = training
            for module in modules:
                module.train()

    def _evaluate_rows(self, held_out: Samples) -> dict[str, float]:
        """Losses over all rows; what belongs to an optimizer batch (a prelude) is made per batch, as in training."""
        sums: dict[int, float] = defaultdict(float)
        sizes: dict[int, float] = defaultdict(float)
        terms = {id(t): (role, t) for role, trained in self.trained.items() for t in trained.terms if t.rows == "main"}
        for start in range(0, len(held_out), self.config.rows_per_step):
            batch = held_out.take(np.arange(start, min(start + self.config.rows_per_step, len(held_out))))
            batch = self._of_rows(batch)
            shared, plans = self._prepare({"main": batch})
            for key, (_, term) in terms.items():
                sizes[key] += self._size(term, batch)
            for micro in plans["main"]:
                for _, totals in self._losses("main", batch.take(micro), shared):
                    for term, total, _ in totals:
                        sums[id(term)] += float(total)
        mine = [sums[key] for key in terms]
        sums = dict(zip(terms, map(sum, zip(*self.processes.gather(mine), strict=True)), strict=True))
        losses: dict[str, float] = defaultdict(float)
        for key, (role, term) in terms.items():
            losses[loss_name(role)] += term.weight * sums[key] / max(sizes[key], 1e-30)
        return losses

    def _evaluate_samples(self, held_out: Samples) -> dict[str, float]:
        seed = derive_seed(self.config.seed, "evaluation")
        source = self.stage.source
        assert isinstance(source, Rollouts)
        # Of what the data wrote there is nothing to find out.
        size, beside = self.config.eval_samples, tuple(s for s in source.beside if s.role != "data")
        if self.compares and not beside:  # its mean over answers of one policy is 1/2, whatever the policy
            beside = (Sampler("reference"),) if self.reference is not None else ()
            size = 1 if beside else max(size, 2)
        own = replace(source, group_size=size, by="policy", beside=beside, share=1.0)
        samples, scores = self._sample(held_out, None, seed, own)
        samples = self._as_learned(samples, own)
        if self.reference is not None:
            samples = samples.with_tokens(ref_logps=self.reference_logps(samples))
        self._rollout_metrics(samples, scores, own=True)
        return {}

    # ------------------------------------------------------------------------------------ one optimizer step

    def _optimizer_step(self, main: Samples, progress: float, number: int) -> bool:
        """Prelude, counts, then forward and backward of every micro-batch, then one step of every trained role.

        False: the weights went back to an earlier state.
        """
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
                part = rows.take(micro) if len(micro) < len(rows) else rows
                self._backward(name, part, sizes, shared, losses)
        if self.processes.size > 1:
            self.watchdog.doing(f"waiting for the gradients of the other processes, step {self.step + 1}")
        parts, wanted = zip(*self.agree((dict(losses), self.stopping.wanted)), strict=True)
        losses = {k: sum(p.get(k, 0.0) for p in parts) for k in dict.fromkeys(k for p in parts for k in p)}
        for role in self.trained.values():
            self.processes.sum_gradients(list(role.parameters.values()))
        norms = {
            role: nn.utils.get_total_norm([p.grad for p in t.parameters.values() if p.grad is not None])
            for role, t in self.trained.items()
        }
        reasons = not_finite(losses, {role: float(norm) for role, norm in norms.items()})
        there = None if self.stage.update is None or reasons else self._natural_step(batches, plans, shared, sizes)
        with self.stopping.hold():
            self.spent.trained_tokens += int(sum(loss_mask(b, b.mask_BT()).sum() for b in batches.values()))
            went_back = False
            if not reasons:
                self.bad_in_a_row = 0
                for term, value in losses.items():
                    self.now.add(term, value)
                self._step(progress, number, norms, there)
                for controller in self.stage.controllers.values():
                    if controller.follows in shared:
                        controller.update(float(shared[controller.follows]), len(main))
            else:
                went_back = self._not_finite(reasons, self._post_mortem(reasons, losses, norms, batches, shared))
            self.place, self.buffer = self.place + 1, None if went_back else self.buffer
            self.mark()
        self.stopping.check(next((w for w in wanted if w is not None), None))
        return not went_back

    def _prepare(self, batches: Mapping[str, Samples]) -> tuple[dict[str, Tensor], dict[str, list[np.ndarray]]]:
        """What must be known about the whole optimizer batch first, and this process's micro-batches of it."""
        shared: dict[str, Tensor] = {}
        if self.stage.prelude is not None:
            shared[self.stage.prelude.gives] = self.stage.prelude(batches["main"], self).to(self.device)
        packed = all(t.module.packed for t in self.trained.values())
        plans = {}
        for name, rows in batches.items():
            coupled = [t.loss for t in self.stage.terms if t.rows == name and t.loss.whole_batch]
            size = 1 if coupled else self.processes.size
            dealt = shares(rows, self.config.tokens_per_batch, packed, size)
            if coupled and len(dealt[0]) > 1:
                raise UsageError(
                    f"loss {coupled[0].name!r} couples the rows of a batch, but tokens_per_batch="
                    f"{self.config.tokens_per_batch} cuts it into {len(dealt[0])}; raise tokens_per_batch, or lower "
                    "rows_per_step."
                )
            plans[name] = dealt[self.processes.rank] if self.processes.rank < size else []
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
            for term, total, _ in totals:
                mean = total / max(sizes[id(term)], 1e-30)
                objective = objective + term.weight * mean
                if len(self.stage.terms) > 1:
                    losses[f"loss/{term.loss.name}"] += float(mean.detach())
            losses[loss_name(role)] += float(objective.detach())
            objective.backward()

    def _losses(
        self, name: str, part: Samples, shared: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, list[tuple[Term, Tensor, Tensor]]]]:
        """Role by role, each of its terms on a micro-batch: its summed loss, and the loss of rows or tokens. Their
        metrics go to the meter."""
        tree = TreeBatch.of(part, self.device)
        for role, trained in self.trained.items():
            terms = [t for t in trained.terms if t.rows == name]
            if not terms:
                continue
            with self._autocast():
                scores = self._forward(role, trained.module, tree, terms)
            losses = []
            for term in terms:
                record = build_record(term.loss.family, part, scores, tree, shared, critic_of_role(role) or "")
                out = term.loss(record)
                mask_BT = record.loss_mask_BT if out.mask_BT is None else out.mask_BT
                total = term.counted.total(out.loss, mask_BT, record.weights)
                losses.append((term, total, out.loss.detach()))
                for metric, values in out.metrics.items():
                    self.mine.add(metric, values, mask_BT, weight_B=record.weights)
                if "ratio" in out.metrics:  # one token is enough to spoil a step, and no mean shows it
                    ratio_BT = out.metrics["ratio"]
                    self.mine.extreme("ratio/max", float(ratio_BT.max()))
                    if self.place == 0:  # 1, unless the sampler's numbers are not the learner's
                        self.mine.extreme("ratio/fresh_max", float(ratio_BT.max()))
                        self.mine.extreme("ratio/fresh_min", float(ratio_BT.min()))
            yield role, losses

    def _forward(self, role: str, module: nn.Module, tree: TreeBatch, terms: list[Term]) -> ModelScores:
        if role == POLICY:
            want = wanted(t.loss for t in terms)
            other = self.reference if "kl" in want else None
            scores: ModelScores = module(tree, temperature=self.temperature, want=want, other=other)
            if "logits" not in want:
                return scores
            assert self.teacher is not None
            return with_teacher(scores, self.teacher, tree)
        if role == HEADS:
            return module(tree, lse=any("q1_lse_BT" in t.loss.extras for t in terms))
        return module(
            tree, values=critic_of_role(role) is not None, steps=any(t.loss.family is StepScores for t in terms)
        )

    def _size(self, term: Term, rows: Samples) -> float:
        """The term's count over the whole optimizer batch, known from masks before any forward."""
        count, weights = rows_of(term.loss, rows)
        return term.counted.size(count, cells(term.loss, rows), weights)

    def _step(self, progress: float, number: int, norms: Mapping[str, Tensor], there: Tensor | None = None) -> None:
        """One step of every optimizer; of the policy to ``there``, where an update of its own has found it."""
        factor = learning_rate_factor(progress, number, self.config)
        self.whole = False
        for role, trained in self.trained.items():
            for group in trained.optimizer.param_groups:
                group["lr"] = trained.peak * factor
            if role == POLICY and there is not None:
                put([*trained.parameters.values()], there)
            else:
                if self.config.max_grad_norm is not None:
                    nn.utils.clip_grads_with_norm_(trained.parameters.values(), self.config.max_grad_norm, norms[role])
                trained.optimizer.step()
            trained.module.follow()
            beside = critic_of_role(role) is not None or role == HEADS
            self.now.add(f"grad_norm/{role}" if beside else "grad_norm", float(norms[role]))
        first = next(iter(self.trained.values()))
        self.now.add("learning_rate", first.peak * factor)
        self.spent.optimizer_steps += 1
        if self.moving is not None and self.moving.due(self.spent.optimizer_steps):
            assert self.reference is not None
            self.moving.follow(self.reference, self.policy, self.spent.optimizer_steps)

    def _natural_step(
        self,
        batches: Mapping[str, Samples],
        plans: Mapping[str, list[np.ndarray]],
        shared: Mapping[str, Tensor],
        sizes: Mapping[int, float],
    ) -> Tensor:
        """Where the trust region of the stage's update leads; the policy's gradients are there, summed."""
        assert self.stage.update is not None and self.before is not None
        self.watchdog.doing(f"the trust region of step {self.step + 1}")
        policy, mine = self.trained[POLICY], self.mine
        parameters = [*policy.parameters.values()]
        with torch.no_grad():
            for name, parameter in self.before.named_parameters():
                if name in policy.parameters:
                    parameter.copy_(policy.parameters[name])
        rows = {name: [batch.take(micro) for micro in plans[name]] for name, batch in batches.items()}
        tokens = len(batches["main"].completions.flat)

        def gradients() -> list[Tensor]:
            return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

        def kl_gradient() -> list[Tensor]:
            policy.optimizer.zero_grad(set_to_none=True)
            for part in rows["main"]:
                (self._moved_by(part) / tokens).backward()
            self.processes.sum_gradients(parameters)
            return gradients()

        def loss_and_kl() -> tuple[float, float]:
            loss = sum(
                term.weight * float(total) / max(sizes[id(term)], 1e-30)
                for name, parts in rows.items()
                for part in parts
                for role, totals in self._losses(name, part, shared)
                for term, total, _ in totals
                if role == POLICY
            )
            kl = sum(float(self._moved_by(part)) for part in rows["main"]) / tokens
            both = zip(*self.processes.gather((loss, kl)), strict=True)
            return tuple(map(sum, both))  # type: ignore[return-value]

        self.mine = Meter()  # its passes are not the run's to tell
        try:
            there, found = natural_step(self.stage.update, Landscape(parameters, gradients, kl_gradient, loss_and_kl))
        finally:
            self.mine = mine
        for name, value in found.items():
            self.now.add(name, value)
        return there

    def _moved_by(self, part: Samples) -> Tensor:
        """KL(before ‖ policy), exact over the vocabulary, summed over the tokens of these rows."""
        tree = TreeBatch.of(part, self.device)
        with self._autocast():
            scores = self.policy(tree, temperature=self.temperature, want=frozenset({"kl"}), other=self.before)
        return scores.kl_C.sum()

    def _not_finite(self, reasons: Sequence[str], why: str) -> bool:
        """The step is not taken: say why, and stop, skip it or go back (true)."""
        step, policy, what = self.step + 1, self.config.on_nonfinite, ", ".join(reasons)
        self.bad_in_a_row += 1
        self.spent.nonfinite_steps += 1
        self.now.add("skipped_nonfinite", 1.0)
        for role in self.trained.values():
            role.optimizer.zero_grad(set_to_none=True)
        if policy == "stop":
            raise NonFiniteError(
                f"step {step}: {what}; stopped before the step. {why}Lower the learning rate, or look at the rows and "
                "rewards of this step."
            )
        if self.bad_in_a_row >= IN_A_ROW:
            raise NonFiniteError(
                f"step {step}: {what}; stopped before the step, the {IN_A_ROW}th of this kind in a row. {why}"
            )
        if policy == "skip" or self.roll_back is None:
            self.log.say(f"step {step}: {what}; the step is skipped. {why}".rstrip())
            return False
        back = self.roll_back()
        self.log.say(f"step {step}: {what}; back to the weights of {back}, on with the next rows. {why}".rstrip())
        return True

    def _post_mortem(
        self,
        reasons: Sequence[str],
        losses: Mapping[str, float],
        norms: Mapping[str, Tensor],
        batches: Mapping[str, Samples],
        shared: Mapping[str, Tensor],
    ) -> str:
        """Write the batch and its numbers beside the run; sentences about it."""
        gradients: dict[str, float] = {}
        for role, trained in self.trained.items():
            gradients |= gradient_norms((f"{role}/{name}", p) for name, p in trained.parameters.items())
        row_losses = {name: self._row_losses(name, rows, shared) for name, rows in batches.items()}
        culprits = words(batches, row_losses, self.tokenizer, gradients)
        said = f"{culprits[:1].upper()}{culprits[1:]} " if culprits else ""
        if self.log.folder is None:
            return said
        file = write_post_mortem(
            self.log.folder / f"post-mortem-{self.step + 1}.json", step=self.step + 1, reasons=reasons, losses=losses,
            norms={role: float(norm) for role, norm in norms.items()}, gradients=gradients, batches=batches,
            row_losses=row_losses, tokenizer=self.tokenizer, say=self.log.say,
            extra={"peak_learning_rate": self.config.learning_rate, **self.spent.to_dict()},
        )  # fmt: skip
        return said + (f"The batch is in {file}. " if file is not None else "")

    @torch.no_grad()
    def _row_losses(self, name: str, rows: Samples, shared: Mapping[str, Tensor]) -> Tensor:
        """The loss of every row by itself, on the CPU: all its terms, summed over its tokens."""
        training, self.mine = self.mine, Meter()
        row_losses = torch.zeros(len(rows))
        try:
            for micro in micro_batches(rows, self.config.tokens_per_batch, self.policy.packed):
                part = rows.take(micro)
                for _, losses in self._losses(name, part, shared):
                    for term, _, loss in losses:
                        loss_B = loss.float().reshape(len(micro), -1).sum(1).cpu()
                        row_losses[torch.from_numpy(micro)] += term.weight * loss_B
        finally:
            self.mine = training
        return row_losses

    def _ptx_rows(self, rows: int, number: int) -> Samples:
        assert self.ptx is not None
        chosen = generator(self.config.seed, "ptx", number).choice(
            len(self.ptx), size=min(rows, len(self.ptx)), replace=False
        )
        return self.ptx.take(chosen)


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those named ``prefix/...``, without it."""
    return {k.removeprefix(f"{prefix}/"): v for k, v in tensors.items() if k.startswith(f"{prefix}/")}


def loss_name(role: str) -> str:
    return f"loss/{role}" if critic_of_role(role) is not None or role == HEADS else "loss"


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
