"""``train`` and ``steps``: from names, folders and files to a trained model in a folder."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefzoo.algorithm import Algorithm, Stage, stage_in_words
from prefzoo.data.samples import Samples
from prefzoo.feedback import ModelReward
from prefzoo.files import replacing_folder
from prefzoo.locks import locked
from prefzoo.models.folders import run_model
from prefzoo.models.heads import APART, save_heads
from prefzoo.models.load import (
    load_policy,
    load_scorer,
    load_tokenizer,
    new_scorer,
    save_policy,
    save_scorer,
    set_checkpointing,
)
from prefzoo.models.roles import Policy, Scorer
from prefzoo.parts.product import read_product, write_product
from prefzoo.parts.roles import HEADS, REFERENCE, REWARD, TEACHER
from prefzoo.processes import Processes
from prefzoo.registry import RunError, UsageError, suggest
from prefzoo.seeds import derive_seed
from prefzoo.training import checkpoint, output, setup
from prefzoo.training.checkpoint import Checkpoint
from prefzoo.training.config import TrainConfig
from prefzoo.training.determinism import deterministic, rng_state, set_rng_state
from prefzoo.training.engine import Engine, NonFiniteError, Spent, under
from prefzoo.training.guards import Watchdog
from prefzoo.training.metrics import LOGS, RunLog, read_log
from prefzoo.training.record import RECORD, Difference, describe, differences, fingerprint, refuse_foreign, write_record
from prefzoo.training.stopping import Stopping

Callback = Callable[[int, Policy, dict[str, float]], Any]

# Checkpoints that nobody asked for: the first after a minute, then so that they cost this share of the time.
FIRST_SAVE, SHARE, LONGEST = 60.0, 0.01, 1800.0
LONGER = ("config.max_steps", "config.epochs", "config.patience")  # what makes more of a run that is finished


@dataclass
class Run:
    """A finished run: the trained module, what it cost, its metrics, and where it was written."""

    algorithm: str
    policy: Policy | None = field(repr=False)
    scorer: Scorer | None = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    spent: Spent
    history: list[dict[str, Any]] = field(repr=False)
    output_dir: Path | None = None
    best: dict[str, Any] | None = None  # metric, value and step of the best evaluation, where one was looked for

    @property
    def model(self) -> PreTrainedModel:
        """The trained causal model; call ``set_attn_implementation('sdpa')`` on it for ordinary forwards."""
        assert self.policy is not None
        return self.policy.model


@dataclass(frozen=True)
class Step:
    """One step of a run, after it was taken: an optimizer step, or a rollout step where samples are drawn."""

    number: int
    total: int
    metrics: dict[str, float]
    evaluation: dict[str, float] | None  # where this step was evaluated
    policy: Policy
    stage: int = 0


class Steps:
    """The steps of a run, one by one, for notebooks and loops of one's own: see :func:`steps`."""

    def __init__(
        self,
        algorithm: str | Algorithm,
        *,
        model: Any,
        dataset: Any = None,
        reward: Any = None,
        reward_weights: Sequence[float] | None = None,
        output_dir: str | Path | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        reference: Any = None,
        teacher: Any = None,
        ptx_dataset: Any = None,
        eval_dataset: Any = None,
        config: TrainConfig | Mapping[str, Any] | None = None,
        callback: Callback | Sequence[Callback] = (),
        push_to_hub: str | None = None,
        resume: bool = False,
        may_differ: str | Sequence[str] = (),
        quiet: bool = False,
        **options: Any,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "options", "algorithm", "config")}
        self.algorithm, self.settings = setup.resolve(algorithm, options, config, arguments)
        chosen, settings = self.algorithm, self.settings
        if push_to_hub is not None and output_dir is None:
            raise UsageError("push_to_hub needs output_dir: the model is written there first.")
        if settings.best_metric is not None and output_dir is None:
            raise UsageError("best_metric needs output_dir: the best model is kept in OUTPUT/best.")
        self.push_to_hub = push_to_hub
        self.callbacks = [*callback] if isinstance(callback, Sequence) else [callback]
        for call in self.callbacks:
            if not callable(call):
                raise UsageError(f"callback: expected a function f(step, policy, metrics), got {type(call).__name__}.")
        if settings.on_nonfinite == "rollback" and (output_dir is None or settings.save_steps is None):
            raise UsageError("on_nonfinite='rollback' needs checkpoints to go back to: give output_dir and save_steps.")
        if not isinstance(resume, bool):
            raise UsageError(
                f"resume: expected True or False, got {resume!r}; it takes the newest checkpoint of output_dir."
            )
        self.resume = resume
        words = may_differ.split(",") if isinstance(may_differ, str) else may_differ
        self.may_differ = tuple(stripped for word in words if (stripped := word.strip()))
        if self.may_differ and not resume:
            raise UsageError("may_differ has no effect without resume=True; leave it out.")
        output.check_folder(output_dir, resume)
        setup.check_cache(settings)
        self.processes = Processes.launched(cpu=settings.device == "cpu")
        self.device = setup.device_of(settings, self.processes)
        main = self.processes.main
        folder = None if output_dir is None or not main else Path(output_dir)
        self.log = RunLog(folder, chosen.name, quiet=quiet or not main)
        self.stopping = Stopping(immediate=self.processes.size == 1)
        who = "" if self.processes.size == 1 else f"process {self.processes.rank}: "
        say = self.log.say  # not self: a thread that knew it would keep a dropped iterator, and its lock, for ever
        self.watchdog = Watchdog(settings.stuck_minutes, lambda line: say(who + line))
        self.data, self.held_out = setup.read_data(chosen, dataset, eval_dataset, settings)
        self.policy, self.tokenizer = setup.start_model(model, tokenizer, self.data, settings, self.log.note)
        self.policy.to(self.device)
        self.source = setup.reward_source(chosen, reward, reward_weights, self.tokenizer, self.device, self.log.note)
        self.product = None if chosen.product is None else chosen.product.of_run(
            reward=reward, reward_weights=reward_weights, source=self.source
        )  # fmt: skip
        self.anchor = None
        if reference is not None and REFERENCE not in chosen.needs:
            self.log.note(f"note: {chosen.name} needs no reference; reference= is ignored.")
        elif reference is not None:
            self.anchor = setup.anchor(reference, self.tokenizer, settings, self.log.note).to(self.device)
        self.teacher = None
        if teacher is not None and TEACHER not in chosen.needs:
            self.log.note(f"note: {chosen.name} needs no teacher; teacher= is ignored.")
        elif teacher is not None:
            self.teacher = setup.anchor(teacher, self.tokenizer, settings, self.log.note, TEACHER).to(self.device)
        self.ptx = setup.read_ptx(chosen, ptx_dataset, settings, self.log.note)
        given = {"model": model, "reward": reward, "reference": reference, "teacher": teacher,
                 "ptx_dataset": ptx_dataset}  # fmt: skip
        contents = {"model": self.policy, "tokenizer": self.tokenizer, "reward": self.source,
                    "reference": self.anchor, "teacher": self.teacher, "ptx_dataset": self.ptx}  # fmt: skip
        self.facts = {k: _name_of(v) for k, v in given.items()}
        self.facts["fingerprints"] = {k: fingerprint(v) for k, v in contents.items()}
        self.folder = output.make_folder(output_dir)
        self._done = Spent()  # by earlier stages
        self.scorer: Scorer | None = None
        self.engine: Engine | None = None  # of the stage that runs
        self.best: dict[str, Any] | None = None
        self.result: Run | None = None
        self._waited = 0  # evaluations since the best one
        self._ends = False  # a callback has ended the run
        self.number = 0  # of the stage that runs
        self._before = 0  # steps of the stages before it
        self._good: int | None = None  # the checkpoint to go back to
        self._saved: tuple[int, tuple[int, int]] | None = None  # stage and mark of the newest checkpoint
        self._next_save = math.inf
        self._stage_start: dict[str, Tensor] = {}  # weights that a later stage began with
        self.judge: ModelReward | None = None  # the reward model that an earlier stage has trained
        self._judge_weights: dict[str, Tensor] = {}
        self._open = contextlib.ExitStack()
        self._closing = False
        self._began = False  # the folder is this run's
        self._steps = self._all_steps()

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        with self.stopping:
            return next(self._steps)

    def __enter__(self) -> Steps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the run where it is, with a checkpoint, and its folder to others."""
        self._closing = True
        self._steps.close()
        with self._open:
            self._interrupted()

    def finish(self) -> Run:
        """End the run here: what is trained so far is the result, written to ``output_dir``."""
        if self.result is None:
            self._closing = True
            self._steps.close()
            if self.engine is None and self.algorithm.stages:
                raise UsageError("finish() before the first step: there is nothing to keep.")
            with self._open:
                self.result = self._finish()
        return self.result

    @property
    def spent(self) -> Spent:
        """What the run has cost so far."""
        return self._done if self.engine is None else self._done + self.engine.spent

    @property
    def _done_steps(self) -> int:
        return self._before + (0 if self.engine is None else self.engine.step)

    def _all_steps(self) -> Generator[Step]:
        try:
            if self.folder is not None and self.processes.main:
                self._open.enter_context(locked(self.folder))
            if self.settings.deterministic:
                self._open.enter_context(deterministic(self.settings, self.device))
            for surrounding in (self.watchdog, self.log):
                self._open.enter_context(surrounding)
            start = self._begin()
            if self.result is not None:
                return
            if not self.algorithm.stages:  # a way to decode: the model is written as it is
                self._take_over(None)
            self.log.open_trackers(self.settings.report_to if self.processes.main else (), self.record)
            for number, stage in enumerate(self.algorithm.stages):
                if start is not None and number < start.facts["stage"]:
                    continue
                if not (yield from self._stage_steps(number, stage, start)):
                    break
                start = None
                if self.folder is not None and number + 1 < len(self.algorithm.stages):
                    assert self.engine is not None
                    self._save_checkpoint(self.engine)  # until its first step the next stage has nothing to keep
            self.result = self._finish()
        except GeneratorExit:  # finish(), or the caller dropped the iterator
            raise
        except BaseException as error:
            self.processes.tell(error)
            self._interrupted()
            raise
        finally:
            if not self._closing:
                self._open.close()

    def _begin(self) -> Checkpoint | None:
        """Make the folder ready: the checkpoint to go on from, or none; the result, if the run is finished already."""
        self.record = describe(self.algorithm, self.settings, self.data, self.held_out, self.facts)
        different = {d.place: d for mine in self.processes.gather(self.record) for d in differences(self.record, mine)}
        different = {k: d for k, d in different.items() if d.effect == "result"}
        if different:
            raise UsageError(
                "the processes do not run the same: "
                + "; ".join(d.words() for d in different.values())
                + ". Give all of them the same data, model and options."
            )
        refuse_foreign(self.record, self.record, self.may_differ, "this run")  # finds words that name nothing
        if self.folder is None:
            return None
        found, record = None, None
        if self.processes.main:
            checkpoint.tidy(self.folder)
            found = checkpoint.newest(self.folder, self.log.say) if self.resume else None
            record = output.read_record(self.folder) if self.resume else None
        found, record = self.processes.gather((found, record))[0]  # the others do not look while it writes
        if record is not None and record["finished"] and not self._asks_for_more(record, found):
            self.result = self._finished(record)
            return None
        if found is None and checkpoint.found(self.folder):
            raise RunError(
                f"every checkpoint in {str(self.folder)!r} is damaged; bring back a whole one, or remove them to begin "
                "anew."
            )
        if found is not None:
            rounding = refuse_foreign(self.record, found.facts["record"], self.may_differ, f"checkpoint {found.folder}")
            for difference in rounding:
                self.log.note(
                    f"note: the last digits may differ from a run that was never stopped: {difference.words()}"
                )
            theirs = found.facts["record"]
            changed = [d.words() for d in differences(self.record, theirs) if d.effect != "none"]
            breaks = [*theirs.get("resumed", []), *([{"step": found.number, "here_there": changed}] if changed else [])]
            self.record |= {"resumed": breaks} if breaks else {}
            self.log.note(f"going on from {found.folder}.")
        elif record is not None:
            self.log.note(f"there is no checkpoint in {self.folder}; the run begins anew.")
        return found

    def _asks_for_more(self, record: Mapping[str, Any], found: Checkpoint | None) -> bool:
        """Whether this run is the finished one of the folder, but longer."""
        changed = [d for d in differences(self.record, record) if d.effect == "result"]
        longer = [d for d in changed if d.place in LONGER and not _is_less(d)]
        others = [
            d for d in changed if d not in longer and d.place.partition(".")[0] not in ("versions", "layer", "sources")
        ]
        if others:
            lines = "".join(f"\n  {d.words()}" for d in others)
            raise UsageError(
                f"the finished run in {str(self.folder)!r} has other settings (here: this run; there: that one):"
                f"{lines}\nChoose a new output folder, or take the change back."
            )
        refuse_foreign(self.record, record, self.may_differ, f"the finished run in {self.folder}")
        if longer and found is None:
            raise UsageError(
                f"the run in {str(self.folder)!r} is finished and has kept no checkpoint to go on from (save_steps); "
                f"train its model further as a new run: model={str(self.folder)!r}."
            )
        return bool(longer)

    def _finished(self, record: Mapping[str, Any]) -> Run:
        """What a run left that is finished."""
        assert self.folder is not None
        where, scorer, policy = self.folder / "final", None, None
        if self.algorithm.trains_reward:
            scorer = load_scorer(where).to(self.device)
        else:
            adapter = setup.adapter_of(self.settings) if (where / "adapter_config.json").exists() else None
            dtype = next(self.policy.parameters()).dtype
            policy = load_policy(where, tokenizer=self.tokenizer, adapter=adapter, dtype=dtype).to(self.device)
            policy.product = self.product
            if self.product is not None and HEADS in self.product.needs:
                policy.product = read_product(where)
        self._tidy_up()
        self._done = Spent(**record["spent"])
        ended, total = record.get("ended", (0, 0))
        early = f" (it was ended after step {ended} of {total})" if ended < total else ""
        self.log.note(f"the run in {self.folder} is finished{early}; nothing is left to do.")
        history = read_log(self.folder / "metrics.jsonl")
        return Run(
            self.algorithm.name, policy, scorer, self.tokenizer, self._done, history, self.folder, record["best"]
        )

    def _take_over(self, start: Checkpoint | None) -> None:
        """The folder is this run's from here on."""
        if self.folder is not None and self.processes.main and not self._began:
            for folder in checkpoint.found(self.folder):  # damaged ones must not push whole ones out
                if start is not None and Checkpoint(folder, {}).number > start.number:
                    checkpoint.remove(folder)
            for name in LOGS if start is None else ():  # of a run that left nothing else
                (self.folder / name).unlink(missing_ok=True)
            write_record(self.record | {"finished": False}, self.folder)
        self._began = True

    def _stage_steps(self, number: int, stage: Stage, start: Checkpoint | None) -> Generator[Step, None, bool]:
        """The steps of one stage; whether the run goes on after it."""
        settings = self.settings
        tensors = {} if start is None else start.tensors()
        self._done = self.spent if start is None else Spent(**start.facts["done"])
        self._before = self._done_steps if start is None else start.facts["before"]
        self.engine, self.number = None, number
        if number > 0:
            self._start_of_stage(tensors)
        assert self.data is not None  # only what has no stages needs none
        if len(self.algorithm.stages) > 1:
            self.log.note(f"stage {number + 1} of {len(self.algorithm.stages)}: {stage_in_words(stage)}")
        if number > 0:  # other prompts and other samples than those of the stage before
            settings = settings.model_copy(update={"seed": derive_seed(settings.seed, "stage", number)})
        engine, held = setup.make_engine(
            stage, settings, policy=self.policy, tokenizer=self.tokenizer, data=self.data, held_out=self.held_out,
            ptx=self.ptx, reward=self.judge or self.source, anchor=self.anchor, teacher=self.teacher,
            device=self.device, log=self.log, processes=self.processes, stopping=self.stopping, watchdog=self.watchdog,
        )  # fmt: skip
        engine.whole = False  # until the first mark below
        self.engine, self.scorer = engine, engine.scorer
        if engine.heads is not None and self.product is not None:
            self.product = self.product.of_run(heads=engine.heads)
        self.policy.product = self.product  # callbacks answer as the run will
        engine.roll_back = self._roll_back
        self.best, self._waited = None, 0  # stages differ in what they measure
        if settings.gradient_checkpointing:
            for trained in engine.trained.values():
                set_checkpointing(trained.module)
        total = engine.total_steps
        every = settings.eval_steps or math.ceil(total / 10)
        self._next_save = time.monotonic() + FIRST_SAVE
        going_on = True
        if start is None:
            self._take_over(None)
        else:
            going_on = self._go_on(engine, start, tensors)
        self.log.begin(total, engine.step, self._before)
        if start is None:
            short = engine.optimizer_steps <= engine.config.warmup_steps
            if short and settings.learning_rate > 0 and stage.update is None:
                self.log.note(
                    f"note: the warm-up of {engine.config.warmup_steps:g} steps is as long as the run of "
                    f"{engine.optimizer_steps}: the learning rate hardly reaches {settings.learning_rate:g} "
                    "(warmup_steps)."
                )
            if held is not None:
                self._evaluate(engine, held, 0)
            self._mark(engine, True)
            if settings.on_nonfinite == "rollback":
                self._save_checkpoint(engine)
        if not going_on:
            return not self._ends
        for step, values, logged in engine.run():
            evaluation, going_on, ends = None, True, False
            if held is not None and (step % every == 0 or step == total):
                evaluation = self._evaluate(engine, held, step)
                going_on = settings.patience is None or self._waited < settings.patience
            if logged is not None:
                self.watchdog.doing(f"callbacks after step {step}")
                answers = [call(step, self.policy, logged) for call in self.callbacks]
                ends = any(answer is True for answer in answers)
            going_on = self._mark(engine, going_on and not ends, ends)
            if self._is_due(step, total):
                self._save_checkpoint(engine)
            self.watchdog.idle()
            yield Step(step, total, values, evaluation, self.policy, number)
            if not going_on:
                if step < total:
                    self.log.note(f"stopped after step {step} of {total}, as asked.")
                return not self._ends  # patience is with a stage, a callback ends the run
        return True

    # ------------------------------------------------------------------------------------ checkpoints

    def _start_of_stage(self, tensors: Mapping[str, Tensor]) -> None:
        """The anchor of a later stage is what the one before it has made, and its judge the reward model of an earlier
        one: keep them, or bring them back."""
        mine = {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, value in under("stage_start", tensors).items():
                mine[name].copy_(value)
        self._stage_start = {f"stage_start/{name}": p.detach().cpu().clone() for name, p in mine.items()}
        made = [stage for stage in self.algorithm.stages[: self.number] if REWARD in stage.trains]
        if not made:
            return
        scorer, weights = self.scorer, under("stage_reward", tensors)
        if weights:
            scorer = new_scorer(self.policy, made[-1].pooling).to(self.device)  # type: ignore[arg-type]
            scorer.load_state_dict(weights)
        if scorer is not None:  # of the stage before this one; else the judge is known already
            self.judge = ModelReward(scorer.requires_grad_(False).eval(), "reward_model")
            state = {
                f"stage_reward/{name}": value.detach().cpu().clone() for name, value in scorer.state_dict().items()
            }
            self._judge_weights = state
        self._stage_start |= self._judge_weights

    def _go_on(self, engine: Engine, start: Checkpoint, tensors: Mapping[str, Tensor]) -> bool:
        """Be where the checkpoint was; whether there is more to do."""
        facts, total = start.facts["engine"], engine.total_steps
        if facts["step"] > total:
            raise UsageError(
                f"{start.folder} is after step {facts['step']}, but this run has {total} steps (max_steps, epochs)."
            )
        self._take_over(start)
        if self.log.folder is not None:
            self.log.go_on(facts["log"])
        engine.load_state(tensors, facts)
        self.best, self._waited, self._good, going_on = (engine.kept[k] for k in ("best", "waited", "good", "going_on"))
        self._ends = engine.kept.get("ends", False)
        self._saved = self.number, engine.marked
        if self.settings.on_nonfinite == "rollback" and self._good is None:  # the policy was another one
            self._save_checkpoint(engine)
        return going_on or any(d.place in LONGER for d in differences(self.record, start.facts["record"]))

    def _mark(self, engine: Engine, going_on: bool, ends: bool = False) -> bool:
        """A step is done; whether every process goes on with the stage after it. ``ends``: nor with the run."""
        answers = engine.agree((going_on, ends))
        going_on, self._ends = all(on for on, _ in answers), any(ended for _, ended in answers)
        engine.kept = {"best": self.best, "waited": self._waited, "good": self._good, "going_on": going_on,
                       "ends": self._ends}  # fmt: skip
        engine.mark()
        return going_on

    def _is_due(self, step: int, total: int) -> bool:
        """Whether a checkpoint is written after this step. The main process decides: clocks differ."""
        if self.folder is None:
            return False
        if self.settings.save_steps is not None:
            return step % self.settings.save_steps == 0 or step == total
        return bool(self.processes.gather(time.monotonic() >= self._next_save and step < total)[0])

    def _save_checkpoint(self, engine: Engine, good: bool = True) -> None:
        """Write the state of the last mark; every process comes here, and the main one writes.

        ``good``: one to go back to; where those lie must not depend on when a run was stopped.
        """
        assert self.folder is not None
        number = self._before + engine.marked[0]
        with self.stopping.hold():
            self.watchdog.doing(f"writing checkpoint-{number}")
            started = time.monotonic()
            tensors, facts = engine.state()
            moved = (n for n, t in tensors.items() if t.is_floating_point() and not n.startswith("rollouts/"))
            bad = next((name for name in moved if not tensors[name].isfinite().all()), None)
            if bad is not None:
                what = f"step {number}: {bad} is not finite, an earlier step was too large for it"
                if not good or self._good is None:
                    raise NonFiniteError(
                        f"{what}; no checkpoint is written over the last good ones. Lower the learning rate."
                    )
                self.log.say(f"{what}; back to the weights of {self._roll_back()}, on with the next rows.")
                engine.mark()
                return
            if good and self.settings.on_nonfinite == "rollback":
                self._good = number
            if self.processes.main:
                facts["kept"]["good"] = self._good
                about = {"record": self.record, "stage": self.number, "before": self._before,
                         "done": self._done.to_dict(), "engine": facts}  # fmt: skip
                names = () if self.policy.adapter is not None else dict(self.policy.named_parameters())
                keys = {f"policy/{name}": name.removeprefix("model.") for name in names}
                self.log.sync()
                save = functools.partial(self._save_model, scorer=self.scorer)
                checkpoint.write(self.folder, number, tensors | self._stage_start, about, save, keys)
                checkpoint.prune(self.folder, self.settings.save_total_limit, self._good)
            self._saved = self.number, engine.marked
            cost = time.monotonic() - started
            self._next_save = time.monotonic() + min(cost / SHARE, LONGEST)

    def _roll_back(self) -> str:
        """The weights of the last good checkpoint; says which."""
        assert self.engine is not None and self.folder is not None and self._good is not None
        found = checkpoint.whole(self.folder / f"checkpoint-{self._good}")
        self.engine.go_back(found.tensors(), found.facts["engine"])
        return str(found.folder)

    def _interrupted(self) -> None:
        """Keep what was trained when the run cannot go on; the error that follows is what the user must see."""
        if self.stopping.ending:
            return
        engine, self.stopping.ending = self.engine, True
        if self.folder is None or not self.processes.main or self.result is not None or not self.folder.is_dir():
            return
        if (output.read_record(self.folder) or {}).get("finished") or not self._began:
            return
        if not self.spent.optimizer_steps and not self._done_steps:  # nothing is lost, and nothing stands in the way
            if not checkpoint.found(self.folder):
                checkpoint.remove(self.folder / "best")
                (self.folder / RECORD).unlink(missing_ok=True)
            if self.stopping.wanted is not None:
                self.log.say("stopped before the first step; there is nothing to keep.")
            return
        where = "between two stages" if engine is None else f"after step {engine.marked[0]} of {engine.total_steps}"
        try:
            if engine is not None and engine.whole and self._saved != (self.number, engine.marked):
                self._save_checkpoint(engine, good=False)
        except Exception as error:  # of a device, too; the error that led here is the one to raise
            self.log.say(f"no checkpoint of this step: {error}")
        last = checkpoint.found(self.folder)[-1:]
        if last:
            self.log.say(f"stopped {where}; the run goes on from {last[0]} with resume=True (--resume).")
        else:
            self.log.say(f"stopped {where}; there is no checkpoint.")

    def _tidy_up(self) -> None:
        """Checkpoints that nobody asked for go when the run is finished."""
        if self.folder is not None and self.processes.main and self.settings.save_steps is None:
            checkpoint.prune(self.folder, 0)

    def _evaluate(self, engine: Engine, held_out: Samples, step: int) -> dict[str, float]:
        """Evaluate, and keep the model if it is the best so far."""
        values = engine.evaluate(held_out)
        self.log.evaluation(step, values)
        s = self.settings
        if s.best_metric is None and s.patience is None:
            return values
        metric = s.best_metric or ("eval/reward" if engine.stage.on_policy else "eval/loss")
        metric = metric if metric.startswith("eval/") else f"eval/{metric}"
        if metric not in values and self.best is not None:  # such as a reward that nobody gave this time
            self._waited += 1
            return values
        if metric not in values and self.number + 1 < len(self.algorithm.stages):  # stages differ in what they measure
            return values
        if metric not in values:
            raise UsageError(
                f"best_metric: no metric {metric!r}{suggest(metric, values)} There are: {', '.join(values)}."
            )
        mode = s.best_mode or ("min" if any(word in metric for word in ("loss", "kl")) else "max")
        value = values[metric]
        sign = 1 if mode == "max" else -1
        known = self.best is not None and not math.isnan(self.best["value"])
        if self.best is not None and known and not sign * value > sign * self.best["value"]:
            self._waited += 1
            return values
        self.best, self._waited = {"metric": metric, "value": value, "step": step}, 0
        if s.best_metric is not None and self.processes.main:
            with checkpoint.told(f"the best model could not be written to {str(self.folder)!r}", self.folder or Path()):
                self._save("best")
        return values

    def _finish(self) -> Run:
        chosen = self.algorithm
        reward = chosen.trains_reward
        self.policy.product = self.product
        run = Run(
            chosen.name, None if reward else self.policy, self.scorer if reward else None, self.tokenizer,
            self.spent, self.log.history, self.folder, self.best,
        )  # fmt: skip
        if self.folder is None or not self.processes.main:
            return run
        self.watchdog.doing("writing the result")
        if self.best is not None and self.best["step"] == 0:
            self.log.note("no evaluation was better than the one before the first step.")
        ended = (0, 0) if self.engine is None else (self.engine.step, self.engine.total_steps)
        record = self.record | {"finished": True, "spent": self.spent.to_dict(), "best": self.best, "ended": ended}
        with checkpoint.told(f"the result could not be written to {str(self.folder)!r}", self.folder):
            output.write_card(record, self.log.history, self._save("final"))
            output.draw_curves(self.log.history, self.folder / "curves.png", chosen.name, self.log.note)
        if self.engine is not None and self.engine.heads is not None:
            self.log.note(APART)
        write_record(record, self.folder)
        self._tidy_up()
        if self.push_to_hub is not None:
            output.push(self.folder / "final", self.push_to_hub, self.log.note)
        return run

    def _save(self, name: str) -> Path:
        """The model as it is, as a folder; an older one of that name is replaced only when the new one is whole."""
        assert self.folder is not None
        module = self._made or self.policy
        if not all(bool(torch.isfinite(p).all()) for p in module.parameters() if p.requires_grad):
            self.log.say("the weights are not finite: an earlier step was too large for them. Lower the learning rate.")
        with self.stopping.hold(), replacing_folder(self.folder / name) as aside:
            self._save_model(aside, self._made, merge=self.settings.merge)
        return self.folder / name

    @property
    def _made(self) -> Scorer | None:
        """The reward model, if that is what the run is to make; one of an earlier stage than the last is a means."""
        return self.scorer if self.algorithm.trains_reward else None

    def _save_model(self, folder: Path, scorer: Scorer | None, merge: bool = False) -> None:
        random = rng_state()  # how often a run writes is no part of it, and a new head is drawn before it is filled
        try:
            if scorer is not None:
                save_scorer(scorer, self.tokenizer, folder, note=self.log.note)
            else:
                save_policy(self.policy, self.tokenizer, folder, merge=merge)
            if self.engine is not None and self.engine.heads is not None:
                save_heads(self.engine.heads, self.tokenizer, folder / HEADS)
            if self.product is not None:
                write_product(self.product, folder)
        finally:
            set_rng_state(*random)


def steps(algorithm: str | Algorithm, **arguments: Any) -> Steps:
    """The steps of a run, one by one: the arguments are those of :func:`train`.

    Each :class:`Step` comes after it was taken, with its metrics, and its evaluation where there was one. Leave the
    loop when you like; ``finish()`` then writes what is trained so far and gives the :class:`Run`.

    Example::

        steps = prefzoo.steps("dpo", model="my-model", dataset="pairs.jsonl.gz", output_dir="runs/dpo")
        for step in steps:
            print(step.number, step.metrics["loss"])
            if step.metrics["rewards/margins"] > 2:
                break
        run = steps.finish()
    """
    return Steps(algorithm, **arguments)


def train(
    algorithm: str | Algorithm,
    *,
    model: str | Path | PreTrainedModel | Policy,
    dataset: Any = None,
    reward: Any = None,
    reward_weights: Sequence[float] | None = None,
    output_dir: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reference: str | Path | PreTrainedModel | None = None,
    teacher: str | Path | PreTrainedModel | None = None,
    ptx_dataset: Any = None,
    eval_dataset: Any = None,
    config: TrainConfig | Mapping[str, Any] | None = None,
    callback: Callback | Sequence[Callback] = (),
    push_to_hub: str | None = None,
    resume: bool = False,
    may_differ: str | Sequence[str] = (),
    quiet: bool = False,
    **options: Any,
) -> Run:
    """Train a model with an algorithm, by name.

    Args:
        algorithm: a name (``prefzoo.list_algorithms()``) or a composition.
        model: a local Hugging Face folder, a hub id, a peft adapter's folder, a loaded model (copied), or ``"tiny"``:
            a small random model with a tokenizer learned from the data.
        dataset: a file, a folder, a hub id, a list of rows, a ``datasets`` object, or a list of
            :class:`prefzoo.DataSource`; converted to what the algorithm needs.
        reward: a function with TRL's signature, a verifier's name, a reward-model folder or hub id, or a list of these
            (their sum, with ``reward_weights``). An algorithm that needs none ignores it and says so.
        output_dir: gets ``metrics.jsonl``, ``samples.jsonl``, ``run.json``, ``curves.png`` and ``final/``; None:
            nothing is written.
        reference: the anchor; by default the start model.
        teacher: the model that is learned from (``gkd``, ``minillm``, ``seqkd``), with the policy's tokenizer.
        ptx_dataset: demonstrations for terms on ``ptx`` rows (``ppo(ptx=...)``).
        eval_dataset: rows or prompts that are not trained on, evaluated every ``eval_steps``; or ``eval_split=0.05``.
        config: a :class:`TrainConfig` or a mapping of its fields.
        callback: called as ``callback(step, policy, metrics)`` after every ``logging_steps`` steps; several in a list.
            The run ends early where one returns ``True``.
        push_to_hub: repository on the hub that gets ``final/``.
        resume: go on from the newest whole checkpoint in ``output_dir``, to the same bits on a CPU; from the beginning
            where there is none; a finished run is given back. A checkpoint of another configuration, other data or
            another version is refused.
        may_differ: what of these may differ: options (``"max_steps"``), ``"versions"``, ``"data"``, ``"reward"``, ...
        **options: options of the algorithm (``beta=0.2``) or fields of the configuration (``learning_rate=1e-5``).

    SIGTERM, Ctrl-C and errors leave a checkpoint in ``output_dir``; the first two then raise :class:`Stopped`.

    Example::

        run = prefzoo.train("dpo", model="my-model", dataset="pairs.jsonl.gz", output_dir="runs/dpo", beta=0.2)
    """
    given = {k: v for k, v in locals().items() if k not in ("algorithm", "options")}
    run = Steps(algorithm, **given, **options)
    with run.stopping, run:
        for _ in run:
            pass
        return run.finish()


def load_run_policy(
    source: str | Path, *, chat_template: str | None = None, **where: Any
) -> tuple[Policy, PreTrainedTokenizerBase]:
    """The policy of a run folder, its ``final`` folder, any model or adapter folder, or a hub id, with the way in which
    the run answers (``policy.product``).

    ``where``: ``revision`` and ``trust_remote_code`` of a hub id.
    """
    found = run_model(source)
    tokenizer = load_tokenizer(found, chat_template=chat_template, **where)
    policy = load_policy(found, tokenizer=tokenizer, **where)
    policy.product = read_product(found, where.get("revision"))
    return policy, tokenizer


def _is_less(difference: Difference) -> bool:
    """Less patience than the finished run has had; fewer steps are told where they are counted."""
    here, there = difference.here, difference.there
    return difference.place == "config.patience" and here is not None and (there is None or here < there)


def _name_of(value: Any) -> Any:
    """What a record says about a model or a reward that was given."""
    if value is None or isinstance(value, str | Path):
        return None if value is None else str(value)
    if isinstance(value, list | tuple):
        return [_name_of(v) for v in value]
    path = getattr(getattr(value, "config", None), "_name_or_path", None)
    return path or getattr(value, "__name__", type(value).__name__)


__all__ = ["Run", "Step", "Steps", "load_run_policy", "load_scorer", "steps", "train"]
